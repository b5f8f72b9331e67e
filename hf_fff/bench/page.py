"""The pages of docs/results that tell how fast this is, from the JSON that the commands wrote.

python -m hf_fff.bench.page docs/results

For each of cpu-layer.json, cpu-frontier.json, cpu-scaling.json, cpu-model.json, serve.json, train.json and cuda-*.json in the folder it writes a page and
a picture, and says which of a CPU's were not there. Layers with trained weights are in files of their own, cpu-layer-*.json, which stand on the page of cpu-layer.json;
the page of serve.json also has serve-*.json, or these alone. A folder is of one machine; those of
others lie in folders beside these files, such as docs/results/avx2, and pages of the same name link to each other.
"""

import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_file
from .plot import plot
from .shapes import PAIRS

PAPER_CLAIM = 4095 / 12  # arXiv 2311.10770: 1x11 against a dense layer of as many neurons
GOALS = {"1x11": 0.95, "8x8": 0.85}  # of the speed of a model without feedforward networks
# On a GPU: section, FFF, dtype, tokens, what it is compared with, and how many times as fast it should be
GPU_GOALS: tuple[tuple[str, str, str, int, str, float], ...] = (
    ("forward", "1x11", "bfloat16", 131072, "dense:3072", 8),
    ("forward", "1x11", "bfloat16", 131072, "dense:4095", 10),
    ("forward", "1x11", "bfloat16", 16384, "dense:3072", 6),
    ("forward", "1x11", "bfloat16", 131072, "mlp:12", 0.5),
    ("forward", "4x9", "bfloat16", 131072, "dense:3072", 2.5),
    ("forward", "8x8", "bfloat16", 131072, "dense:3072", 1.4),
    ("forward", "1x11", "float32", 131072, "dense:3072", 45),
    ("forward", "8x8", "float32", 131072, "dense:3072", 8),
    ("backward", "1x11", "bfloat16", 131072, "dense:3072", 3),
    *(
        ("backward", fff, "bfloat16", 131072, "masked", 1)  # the paper's, and those between
        for fff in ("1x11", "2x10", "4x9", "8x8", "16x7", "32x6", "64x5", "128x4", "512x2")
    ),
    *(("graph", "1x11", "bfloat16", tokens, "dense:3072", 1) for tokens in (128, 256, 512, 1024, 2048)),
)
GPU_LIMIT = 0.9  # of the speed of a model without feedforward networks
# µs a token and layer at H = 768 with int8 rows, on 2 threads: what was aimed at, on a Zen 5
FRONTIER_GOALS = {
    "1x11": {16: 0.30, 128: 0.20, 1024: 0.15, 8192: 0.15},
    "4x9": {16: 0.5, 128: 0.40, 1024: 0.32, 8192: 0.35},
    "8x8": {16: 0.85, 128: 0.65, 1024: 0.50, 8192: 0.55},
    "32x6": {16: 2.3, 128: 1.6, 1024: 1.4, 8192: 1.4},
}
# A 1x11 of float32 at H = 768, on 2 threads, in a loop: times as fast as torch's dense layer of as many neurons, by the instruction set that they were
# set for; tokens -> goal
LAYER_GOALS: dict[str, dict[str, dict[int, int]]] = {
    "avx512": {
        "float32 rows": {1: 400, 8: 400, 128: 210, 512: 220, 4096: 190},
        "bf16 rows": {1: 420, 8: 420, 128: 280, 512: 300, 4096: 280},
    },
    "avx2": {"float32 rows": {1: 500, 8: 550, 128: 300, 512: 300, 4096: 200, 16384: 200, 65536: 200}},
}
_ISA = {"avx512": "AVX-512", "avx2": "AVX2"}
_BUSY = 0.25  # cores that others used: the figure is marked

Told = Mapping[str, Any]


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown, with an empty one behind."""
    return [f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *rows)] + [""]


def machine_name(told: Told) -> str:
    """Such as "Intel Xeon (family 6), AVX-512", for titles."""
    plain = re.sub(r"\((?:R|TM)\)| Processor| CPU(?= @)", "", told["cpu"])
    return f"{' '.join(plain.split())}, {_ISA.get(told['isa'], told['isa'])}"


def machine_of(told: Told, command: str) -> list[str]:
    """What stands beside the figures: command, machine, versions, date, load."""
    caches = ", ".join(f"{name} {size}" for name, size in told["caches"].items())
    load = told["load"]
    return [
        f"`{command}`. Machine: {told['cpu']}, {told['cores']} cores, {told['isa']}, caches {caches}; torch {told['torch']}, "
        f"transformers {told['transformers']}, Python {told['python']}, hf_fff {told['hf_fff']}; {told['date']}. "
        f"Load average {load['before']} before and {load['after']} after; the machine is shared, and other processes used up to "
        f"{load['others']} cores while a figure was measured. A star marks figures during which they used more than {_BUSY}. It took {told['seconds']} s, waiting left out.",
        "",
    ]


def star(row: Told) -> str:
    return " *" if (row["others"] or 0) > _BUSY else ""


def micro(value: float) -> str:
    if value < 1000:
        return f"{value:.3g} µs"
    return f"{value / 1000:.3g} ms" if value < 1e6 else f"{value / 1e6:.3g} s"


def times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def grid(rows: Sequence[Told], first: Sequence[str], cell: Callable[[Told], str]) -> list[str]:
    """A table with a column for each number of tokens; ``first`` names the fields that tell its lines apart."""
    tokens = sorted({row["tokens"] for row in rows})
    lines: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in rows:
        lines.setdefault(tuple(row[name] for name in first), {})[row["tokens"]] = cell(row) + star(row)
    names = [*(name.replace("_", " ") for name in first), *(f"{t} token{'s' * (t > 1)}" for t in tokens)]
    return table(names, ([*map(str, key), *(of.get(t, "-") for t in tokens)] for key, of in lines.items()))


def _packed(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Times of packed copies of the float32 layers, a line each."""
    shown = [{**row, "rows": name} for name in names for row in rows if name in row["loop"]]
    if not shown:
        return []
    return [
        "## Packed rows",
        "",
        "The same, of layers packed by `hf_fff.optimize`, whose rows are int8 or bf16; inputs and outputs are float32.",
        "",
        *grid(
            shown,
            ("fff", "rows", "threads"),
            lambda r: f"{micro(r['loop'][r['rows']])}, {times(r['loop']['dense'] / r['loop'][r['rows']])}",
        ),
    ]


def _layer_goals(rows: Sequence[Told], isa: str) -> list[str]:
    """A 1x11 beside what was aimed at for such machines; kinds of rows without a goal are told without."""
    of = [r for r in rows if (r["fff"], r["hidden_size"], r["dtype"], r["threads"]) == ("1x11", 768, "float32", 2)]
    goals = LAYER_GOALS.get(isa)
    if not of or goals is None:
        return []
    shown = [{**r, "rows": "float32 rows", "time": r["loop"]["fff"]} for r in of]
    shown += [{**r, "rows": n, "time": r["loop"][n]} for n in ("bf16 rows", "int8 rows") for r in of if n in r["loop"]]
    unjudged = " and ".join(n for n in dict.fromkeys(r["rows"] for r in shown) if n not in goals)

    def cell(row: Told) -> str:
        ratio, goal = row["loop"]["dense"] / row["time"], goals.get(row["rows"], {}).get(row["tokens"])
        if goal is None:
            return times(ratio)
        judged = "" if star(row) else " **reached**" if ratio >= goal else " missed"
        return f"{times(ratio)}, goal {goal}x{judged}"

    return [
        "## The goals",
        "",
        f"1x11, hidden size 768, 2 threads, in a loop, beside what was aimed at for machines with {_ISA[isa]}"
        f"{' alone' if isa == 'avx2' else ''}; figures with a star are not judged{f', {unjudged} have no goal here' if unjudged else ''}.",
        "",
        *grid(shown, ("rows",), cell),
    ]


def layer_page(told: Told, trained: Sequence[Told]) -> list[str]:
    rows = told["rows"]
    best = [{**row, "best": row["loop"] or row["forward"]} for row in rows]
    looped = [row for row in best if row["loop"]]
    size = ("fff", "dtype", "threads")
    hidden = ", ".join(str(h) for h in sorted({row["hidden_size"] for row in rows}))
    packed = [n for n in rows[0]["loop"] if n.endswith(" rows")]
    others = [n for n in rows[0]["forward"] if n not in ("fff", "dense", "torch", *packed)]
    lines = [
        f"# How fast a layer is on a CPU: {machine_name(told)}",
        "",
        *machine_of(told, "hf-fff bench layer"),
        f"Hidden size {hidden}. *dense* is torch's Linear-GELU-Linear of as many neurons as the FFF has in all; *torch* is the same FFF "
        "gathered row by row in PyTorch. Random weights and inputs, the worst case for caches: every path is as likely as any other. "
        "All candidates and numbers of threads of a cell took turns in one process, medians, outputs and gradients checked first.",
        "",
        "![times as fast as the dense layer, over tokens](cpu-layer.png)",
        "",
        "## The operation",
        "",
        "In a loop inside the library, without Python around the call (the dense layer too): time a call, and how many times as fast "
        "as dense.",
        "",
        *grid(looped, size, lambda r: f"{micro(r['loop']['fff'])}, {times(r['loop']['dense'] / r['loop']['fff'])}"),
        *_overhead(looped),
        *_packed(looped, packed),
        *_layer_goals(looped, told["isa"]),
        "## A call from Python",
        "",
        f"`FFF(x)`: time, and how many times as fast as *dense* / *torch*{''.join(f' / *{n}*' for n in others)}.",
        "",
        *grid(
            rows,
            size,
            lambda r: (
                f"{micro(r['forward']['fff'])}, "
                + " / ".join(times(r["forward"][n] / r["forward"]["fff"]) for n in ("dense", "torch", *others))
            ),
        ),
    ]
    if backward := [row for row in rows if row["backward"]]:
        lines += [
            "## Backward",
            "",
            "All gradients: time, and how many times as fast as the backward pass of *dense* / of a dense layer with a mask, which is how "
            "the reference code trains / of *torch*; after the semicolon with the routing gradient, against *dense*.",
            "",
            *grid(backward, size, _backward_cell),
        ]
    if told["threads_faster"]:
        lines += [
            "## More threads",
            "",
            "How many times as fast as with the fewest threads: the FFF, and in brackets the dense layer.",
            "",
            *grid(
                [{**row, "others": 0} for row in told["threads_faster"]],
                ("fff", "dtype", "threads"),
                lambda r: f"{r['faster']:.2f}x ({r['dense']:.2f}x)",
            ),
        ]
    if trained:
        lines += [
            "## Trained weights",
            "",
            "A layer of a calibrated MiniLM on the hidden states that it meets in everyday sentences it was not calibrated on, beside the same "
            "shape with random weights and inputs; the operation in a loop: time a call, times as fast as dense, and the neurons that "
            "the tokens of a call visit together.",
            "",
            *grid(
                [{**row, "best": row["loop"] or row["forward"]} for of in trained for row in of["rows"]],
                ("fff", "hidden_size", "weights", "dtype", "threads"),
                lambda r: f"{micro(r['best']['fff'])}, {times(r['best']['dense'] / r['best']['fff'])}, {r['visited']}",
            ),
        ]
    return lines


def _overhead(rows: Sequence[Told]) -> list[str]:
    single = [row["overhead"] for row in rows if row["tokens"] == 1]
    if not single:
        return []
    return [
        f"Around it, a call of `FFF(x)` from Python costs {min(single):.1f} to {max(single):.1f} µs more (at one token).",
        "",
    ]


def _backward_cell(row: Told) -> str:
    b = row["backward"]
    ratios = " / ".join(times(b[name] / b["fff"]) for name in ("dense", "masked", "torch"))
    return f"{micro(b['fff'])}, {ratios}; {times(b['dense'] / b['routing'])}"


def frontier_page(told: Told) -> list[str]:
    """Each tree beside the int8 MLP that fits as well, µs a token."""
    rows = told["rows"]
    sizes = ", ".join(str(h) for h in sorted({row["hidden_size"] for row in rows}))
    empty = sorted(row["engine"]["empty call"] for row in rows)
    installed = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    lines = [
        f"# Trees against small MLPs in int8: {machine_name(told)}",
        "",
        *machine_of(told, "hf-fff bench layer --engine openvino"),
        f"One layer, hidden size {sizes}, **random weights and inputs**, µs a token, medians, by turns; {installed}. The rival of a tree is the dense "
        "MLP whose layerwise fit is about as good: "
        + ", ".join(f"{m} of {t}" for t, m in PAIRS.items())
        + ". It is quantised to int8 as whole models "
        "are (weights and activations, NNCF after training), has a known shape, and runs inside OpenVINO, in a process of its own, which "
        "works while the other waits.",
        "",
        "*In a loop*: the tree's operation inside the library, without Python. *OpenVINO*: called from Python, the tree as it is deployed. "
        f"A call of the engine that does nothing, with one token, takes {empty[0]:.3g} to {empty[-1]:.3g} µs (median {empty[len(empty) // 2]:.3g}); *less the "
        "call* has the median of the same number of threads taken off. In brackets how many times as fast as the MLP: *in a loop* against it less the call, "
        "*OpenVINO* call against call.",
        "",
        "![µs a token over tokens](cpu-frontier.png)",
        "",
    ]
    for n in sorted({row["threads"] for row in rows}):
        of = [{**row, "call": _call_of(rows, n)} for row in rows if row["threads"] == n]
        shown = [{**row, "who": who, "cell": cell} for row in of for who, cell in _frontier_cells(row)]
        lines += [
            f"## {n} thread{'s' * (n > 1)}",
            "",
            *grid([{"tree": row["fff"], **row} for row in shown], ("tree", "who"), lambda row: str(row["cell"])),
            *_ahead_of_mlps(of),
            *_whole_ffn(of, told["isa"] == "avx512"),
        ]
    threads = max(row["threads"] for row in rows)
    judged = [r for r in rows if r["threads"] == threads and r["hidden_size"] == 768 and r["weights"] == "random"]
    judged = [r for r in judged if "int8 rows" in r["loop"] and r["tokens"] in FRONTIER_GOALS.get(r["fff"], {})]
    if judged and told["isa"] == "avx512":  # for which they were set: without VNNI there are none
        lines += [
            "## The goals",
            "",
            f"int8 rows in a loop, {threads} threads, beside what was aimed at (for a Zen 5).",
            "",
            *grid(judged, ("fff",), _frontier_goal),
        ]
    return lines


def _call_of(rows: Sequence[Told], threads: int) -> float:
    """µs of a call of the engine that does nothing."""
    return statistics.median(row["engine"]["empty call"] for row in rows if row["threads"] == threads)


def _frontier_cells(row: Told) -> Iterable[tuple[str, str]]:
    rival, tokens = PAIRS.get(row["fff"]), row["tokens"]
    mlp = row["engine"].get(rival)
    net = None if mlp is None or mlp <= row["call"] else mlp - row["call"]

    def cell(t: float, against: float | None) -> str:
        return f"{t / tokens:.3g}" + ("" if against is None else f" ({against / t:.2f}x)")

    for name in ("int8 rows", "bf16 rows", "fff"):
        if name in row["loop"]:
            yield f"{name.replace('fff', 'float32 rows')}, in a loop", cell(row["loop"][name], net)
    for name in ("int8 rows", "bf16 rows", "fff"):
        yield f"{name.replace('fff', 'float32 rows')}, OpenVINO", cell(row["engine"][name], mlp)
    if mlp is not None:
        yield f"{rival}, int8, OpenVINO", cell(mlp, None)
        yield f"{rival}, less the call", "less than the call" if net is None else cell(net, None)


def _ahead_of_mlps(rows: Sequence[Told]) -> list[str]:
    """Where int8 rows are faster than the MLP, call against call in the engine; what was disturbed is not judged."""
    ahead: list[str] = []
    behind: list[str] = []
    for row in rows:
        rival = PAIRS.get(row["fff"])
        if rival in row["engine"] and not star(row):
            faster = row["engine"]["int8 rows"] < row["engine"][rival]
            (ahead if faster else behind).append(f"{row['fff']} at {row['tokens']}")
    if not ahead and not behind:
        return ["Not judged: no rival was measured, or only while others used the machine.", ""]
    return [
        "With int8 rows, inside the engine, trees are ahead of their MLP: " + (", ".join(ahead) or "nowhere") + " tokens; "
        "they are not: " + (", ".join(behind) or "nowhere") + ".",
        "",
    ]  # fmt: skip


def _whole_ffn(rows: Sequence[Told], judged: bool) -> list[str]:
    """Trees beside what they replace, where that was measured."""
    shown = [
        {**row, "tree": row["fff"], "rows": name, "ffn": row["engine"][full]}
        for row in rows
        for name in ("int8 rows", "bf16 rows", "fff")
        if (full := f"mlp:{4 * row['hidden_size']}") in row["engine"]
    ]
    if not shown:
        return []
    return [
        "How many times as fast as the whole feedforward network (4 x hidden size) in int8, both inside OpenVINO, call against call."
        + " Aimed at, from 1024 tokens on: 8x8 5x and 32x6 1.8x with bf16 rows, half of that with float32 rows."
        * judged,
        "",
        *grid(
            [{**row, "rows": row["rows"].replace("fff", "float32 rows")} | {"name": row["rows"]} for row in shown],
            ("tree", "rows"),
            lambda row: f"{row['ffn'] / row['engine'][row['name']]:.1f}x",
        ),
    ]


def _frontier_goal(row: Told) -> str:
    reached, goal = row["loop"]["int8 rows"] / row["tokens"], FRONTIER_GOALS[row["fff"]][row["tokens"]]
    return f"{reached:.3g}, goal {goal:g}{' **reached**' if reached <= goal else ''}"


def scaling_page(told: Told) -> list[str]:
    rows = told["rows"]
    threads = sorted({row["threads"] for row in rows})
    lines = [
        f"# How the speedup grows with the layer: {machine_name(told)}",
        "",
        *machine_of(told, "hf-fff bench scaling"),
        "One layer, float32, the dense feedforward network of a model's size against the deepest single tree with at most as many neurons, "
        "random weights and inputs, in loops inside the library, by turns, medians. *paper* is what the paper compares: 1x11 at "
        "BERT-base's hidden size against a dense layer of as many neurons, 4095.",
        "",
        "*Theory* is the neurons of the dense layer over those that a token uses. *Memory permits* is the speedup that the FFF would have if "
        "it did nothing but read the rows that the tokens of a call visit, their inputs, and write the outputs, as fast as "
        "torch reads the whole tree's weights one after the other (`torch.sum` or `torch.mv`, the faster of them, measured in the same run); it can be "
        "exceeded where the rows of few tokens stay in a nearer cache than the whole tree does.",
        "",
        "![speedup over hidden size](cpu-scaling.png)",
        "",
        "## Does the paper's 341x hold?",
        "",
        *claim(rows),
    ]
    for n in threads:
        lines += [
            f"## {n} thread{'s' * (n > 1)}",
            "",
            *table(
                [
                    "size",
                    "dense",
                    "tree",
                    "tokens",
                    "dense layer",
                    "FFF",
                    "measured",
                    "theory",
                    "memory permits",
                    "GB/s",
                ],
                (
                    [
                        r["name"],
                        f"{r['hidden_size']}/{r['inner']}",
                        r["fff"],
                        str(r["tokens"]),
                        micro(r["dense"]),
                        micro(r["measured"]),
                        times(r["speedup"]) + star(r),
                        times(r["theory"]),
                        times(r["roofline"]),
                        f"{r['bandwidth']:.0f}",
                    ]
                    for r in rows
                    if r["threads"] == n
                ),
            ),
        ]
    lines += [f"{name} was skipped: {why}.\n" for name, why in told["skipped"].items()]
    sizes = sorted({b["mb"] for b in told["bandwidth"]})
    found = {(b["mb"], b["threads"]): b for b in told["bandwidth"]}
    lines += [
        "## The machine's memory",
        "",
        "GB/s at which torch reads a buffer of that size from one end to the other, again and again; small ones include the start of "
        "the threads.",
        "",
        *table(
            ["threads", *(f"{mb} MB" for mb in sizes)],
            ([str(n), *(f"{found[mb, n]['gb_per_second']:.0f}{star(found[mb, n])}" for mb in sizes)] for n in threads),
        ),
    ]
    return lines


def claim(rows: Sequence[Told]) -> list[str]:
    """Says whether the paper's factor is reached at BERT-base's size, and where."""
    rows = [row for row in rows if not star(row)]  # what was disturbed proves nothing
    of = [row for row in rows if row["name"] == "paper"]
    if not of:
        return ["Not judged: its size was not measured, or only while others used the machine.", ""]

    def at(row: Told) -> str:
        return (
            f"{row['tokens']} token{'s' * (row['tokens'] > 1)} on {row['threads']} thread{'s' * (row['threads'] > 1)}"
        )

    def told(some: Sequence[Told]) -> str:
        return ", ".join(f"{times(row['speedup'])} at {at(row)}{star(row)}" for row in some)

    reached = [row for row in of if row["speedup"] >= PAPER_CLAIM]
    missed = [row for row in of if row["speedup"] < PAPER_CLAIM]
    lines = [
        f"{PAPER_CLAIM:.0f}x is the ratio of neurons, 4095 / 12. Measured at BERT-base's size (768, 1x11 against 4095 neurons):"
    ]
    if not reached:
        lines += [f"**it is reached nowhere**: {told(missed)}."]
    elif not missed:
        lines += [f"**it is reached everywhere**: {told(reached)}."]
    else:
        lines += [f"**it is reached** with {told(reached)}; **it is not** with {told(missed)}."]
    beyond = [row for row in rows if row["name"] != "paper" and row["speedup"] >= PAPER_CLAIM]
    if beyond:
        where = ", ".join(
            f"{row['name']} ({row['fff']}) {times(row['speedup'])} at {at(row)}{star(row)}" for row in beyond
        )
        lines += [f"Of the other sizes, these exceed {PAPER_CLAIM:.0f}x: {where}."]
    lines += [
        "The more tokens a call has, the better a dense layer uses each weight that it reads, and the further the speedup falls below the ratio."
    ]
    return [*lines, ""]


def model_page(told: Told) -> list[str]:
    rows, names = told["rows"], list(told["rows"][0]["seconds"])
    lines = [
        f"# How fast a model is on a CPU: {told['size']} in PyTorch, {machine_name(told)}",
        "",
        *machine_of(told, "hf-fff bench model"),
        f"{told['threads']} threads, random weights and ids, models by turns, medians. *none* has no feedforward networks, which is the limit: nothing in "
        "their place can be faster. A cell: milliseconds a batch, times as fast as the first line, share of the speed of *none* in the same dtype.",
        "",
        "![times as fast as the dense model](cpu-model.png)",
        "",
        *table(
            ["model", *(row["workload"] + star(row) for row in rows)],
            ([name, *(_model_cell(row, name) for row in rows)] for name in names),
        ),
        "## Share of the limit's speed",
        "",
        *table(
            ["model", "goal", *(row["workload"] for row in rows), "reached"],
            (
                _goal(name, goal, rows, told["isa"])
                for name in names
                for kind, goal in GOALS.items()
                if name.split()[0] == kind
            ),
        ),
    ]
    workload, neurons = told["visited"]["workload"], {k: v for k, v in told["visited"].items() if k != "workload"}
    if neurons:
        between = "; ".join(f"{name} {min(counts)} to {max(counts)}" for name, counts in neurons.items())
        lines += [
            f"Neurons that a batch of {workload} uses in a layer: {between}. Tokens of a model with random weights resemble each other more than "
            "independent random inputs do, so the layers' pages are the harder test of the caches.",
            "",
        ]
    return lines


def _model_cell(row: Told, name: str) -> str:
    rows, _, length = row["workload"].partition("x")
    milliseconds = 1e3 * row["seconds"][name] * int(rows) * int(length) / row["tokens"]
    share = f", {100 * row['shares'][name]:.0f} %" if name in row["shares"] else ""
    return f"{milliseconds:.3g} ms, {1 / row['ratios'][name]:.2f}x{share}"


def _goal(name: str, goal: float, rows: Sequence[Told], isa: str = "avx512") -> list[str]:
    shares = [row["shares"].get(name, float("nan")) for row in rows]
    told = [f"{100 * share:.0f} %" for share in shares]
    if name.endswith("bfloat16") and isa != "avx512":
        return [name, "-", *told, "not judged: such a CPU has no bfloat16"]
    judged = [(row["workload"], share) for row, share in zip(rows, shares, strict=True) if not star(row)]
    reached = [workload for workload, share in judged if share >= goal]
    where = "everywhere" if len(reached) == len(rows) else "at " + ", ".join(reached) if reached else "nowhere"
    if len(judged) < len(rows):
        where = f"{where} of those undisturbed" if judged else "not judged: others used the machine"
    return [name, f"{100 * goal:.0f} %", *told, where]


_AHEAD = 1.05  # times as fast: less is within what runs differ by
_TREE_ROWS = {"auto": "rows as `hf-fff export` chooses them"}


def serve_page(tolds: Sequence[Told]) -> list[str]:
    lines = [f"# How fast a model is served on a CPU: {machine_name(tolds[0])}", ""]
    lines += [
        "Engines against each other, one process a system, which take turns in random order. A cell: the "
        "median of a batch's milliseconds, then times as fast as the dense model **in OpenVINO int8** of the same run, and in brackets "
        "as the dense model in torch float32. *none* has no feedforward networks: nothing in their place can be faster in that engine. *mixed* is "
        "a padded batch of 32 sentences' real lengths.",
        "",
        "![times as fast as the dense model in OpenVINO int8](serve.png)",
        "",
    ]
    for told in tolds:
        rows = told["rows"]
        of: dict[tuple[str, str], list[Told]] = {}
        for row in rows:
            of.setdefault((row["engine"], row["model"]), []).append(row)
        random = rows[0]["weights"] == "random"
        lines += [
            f"## {told['size']}, random weights, {_TREE_ROWS.get(told['tree_rows'], 'rows of ' + told['tree_rows'])}"
            if random
            else "## Trained weights",
            "",
        ]
        distilled = any(row.get("distilled_cosine") is not None for row in rows)
        training = next((f", {row['distilled_training']}" for row in rows if row.get("distilled_training")), "")
        if random:
            lines += ["**Random weights: nothing here tells what a model is worth**, only what it costs.", ""]
        if distilled:
            lines += [
                "*cosine* and *neighbours* (the share of the ten nearest that are found again) are not of these weights, but of MiniLMs with these kinds in place of their FFNs, "
                f"after general distillation{training}, in float32, on unseen sentences, means over seeds ([quality.md](RESULTS/quality.md)). A kind without such a model has none. "
                "What int8 takes off besides: [openvino.md](RESULTS/../openvino.md#quality).",
                "",
            ]
        lines += [told["note"], ""] if "note" in told else []
        installed = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
        lines += [*machine_of(told, "hf-fff bench serve")]
        lines += [
            f"{told['threads']} threads, {told['rounds']} rounds; trees with {_TREE_ROWS.get(told['tree_rows'], 'rows of ' + told['tree_rows'])}; {installed}.",
            "",
        ]
        shown = [row["workload"] + star(row) for row in next(iter(of.values()))]
        quality = ["distilled_cosine", "distilled_neighbours"] if distilled else [] if random else ["cosine"]
        names = [name.removeprefix("distilled_") for name in quality]
        lines += table(
            ["engine", "model", *(["weights"] if random else []), *shown, *names],
            (
                [
                    *name,
                    *(["random: speed alone"] if random else []),
                    *map(_serve_cell, cells),
                    *(_known(cells[0][field], "{:.3f}") for field in quality),
                ]
                for name, cells in of.items()
            ),
        )
        if distilled:
            lines += _equal_fidelity(of)
        lines += ["Cores that others used, on average, and the load average at the end: "]
        lines[-1] += "; ".join(
            f"{r['workload']} {_known(r['others'], '{:.2f}')}, {_known(r['load'], '{:.1f}')}"
            for r in next(iter(of.values()))
        )
        lines += [""]
        if not random:
            lines += [
                "*cosine*: of the outputs (the mean of a text's tokens) to those of the dense model in torch float32.",
                "",
            ]
        lines += ["### The slowest calls, the start, memory", ""]
        lines += [
            "95 % of the calls took at most so many milliseconds; seconds from the start of Python to the first answer (imports included); "
            "most memory of the process.",
            "",
            *table(
                ["engine", "model", *shown, "start, s", "memory, MB"],
                (
                    [
                        *name,
                        *(f"{c['p95']:.3g}" for c in cells),
                        f"{cells[0]['cold_start']:.1f}",
                        _known(cells[0]["peak_mb"], "{:.0f}"),
                    ]
                    for name, cells in of.items()
                ),
            ),
        ]
        if shares := {n: c for n, c in of.items() if c[0]["share_of_the_limit"] is not None and n[1] not in ("none",)}:
            lines += ["### Share of the speed of *none* in the same engine", ""]
            lines += table(
                ["engine", "model", *shown],
                ([*name, *(f"{100 * c['share_of_the_limit']:.0f} %" for c in cells)] for name, cells in shares.items()),
            )
        lines += [f"{name} was left out: {why}.\n" for name, why in told["left_out"].items()]
    return lines


_SECTIONS = {
    "forward": "Forward",
    "backward": "Backward",
    "graph": "Forward in a CUDA graph",
}


_KERNELS = {"native": "CUDA kernels", "triton": "Triton kernels", "torch": "PyTorch"}


def cuda_page(told: Told) -> list[str]:
    from .cuda import lines as lines_of

    gpu, rates = told["gpu"], told["rates"]
    driver = f" a driver for CUDA up to {gpu['driver']}," if gpu["driver"] else ""
    rows = lines_of(told)
    lines = [
        f"# How fast this is on a GPU: {told['device']}",
        "",
        f"`{told['line']}`. {gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, {gpu['memory_gib']} GiB, "
        f"second-level cache {gpu['l2_mib']} MiB;{driver} CUDA {gpu['cuda']}; torch {told['torch']}, transformers "
        f"{told['transformers']}, Python {told['python']}, hf_fff {told['hf_fff']}, FFFs in {_KERNELS[told['backend']]}; {told['date']}. It took {told['seconds']} s.",
        "",
        f"In the same run the device copied {rates['copy_gb_per_second']:.0f} GB/s (read and written), and multiplied bfloat16 matrices at "
        f"{rates['matmul_tflops']:.0f} TFLOP/s.",
        "",
    ]
    if rows:
        lines += [
            f"Hidden size {told['hidden_size']}, random weights and inputs. What the GPU takes, between two events; medians of rounds in which all "
            "candidates came in another random order, the second-level cache overwritten before each; outputs and gradients checked against float64 first. "
            "*dense* and *mlp* are Linear-GELU-Linear of so many neurons, the faster of torch's plain one and of one with a fused activation; *masked* is "
            "the dense layer with a mask, as the reference code trains; *copy* copies the input; *tf32* lets float32 products be made in TF32. "
            "A cell: how many times as fast the FFF is (below 1x the other is faster); of the others their time, and of dense layers in bfloat16 the part of "
            "the speed above.",
            "",
            "*Way* is how the kernels compute it (*dense*: all nodes and a mask, which they do where that is faster). *Bytes a token* is what has to be moved from "
            "and to the memory, at least: the input, the output (backward: the gradients, path and logits), and the rows of visited nodes once (backward: the gradients "
            "of all); beside it, the part of the copy's bandwidth that this would take. *Error* is the largest relative one against float64 on the same path; *same "
            "path* the share of tokens whose path is float64's.",
            "",
            "![times as fast as the dense layer, over tokens](FIGURE)",
            "",
        ]
    for section, title in _SECTIONS.items():
        for dtype in dict.fromkeys(row["dtype"] for row in rows if row["section"] == section):
            of = [row for row in rows if (row["section"], row["dtype"]) == (section, dtype)]
            lines += [f"## {title}, {dtype}", "", *_gpu_grid(of), *_rivals(told, section, dtype), *_roofline(of)]
    lines += _gpu_goals(rows)
    for row in told["rows"]:
        if row["section"] == "model":
            lines += _gpu_model(row, told["size"])
    lines += _training([row for row in told["rows"] if row["section"] == "train"])
    for row in told["rows"]:
        where = f"{row['section']}, {row['dtype']}, {row['work']}"
        lines += [f"Left out: {name} ({where}): {why}\n" for name, why in row["left_out"].items()]
    lines += [f"**{section} failed**: {why}\n" for section, why in told["failed"].items()]
    lines += [f"There was no time for all of {section}.\n" for section in told["stopped"]]
    return lines


def _named(row: Told) -> str:
    return f"{row['fff']}{', routing gradient' if row['routing'] else ''}"


def _gpu_grid(rows: Sequence[Told]) -> list[str]:
    """For each FFF its times, and a line for each rival."""
    tokens = sorted({row["tokens"] for row in rows})
    fields = (
        "section",
        "dtype",
        "tokens",
        "fff",
        "routing",
        "microseconds",
        "bytes_a_token",
        "share",
        "error",
        "agreeing",
        "way",
    )
    table_lines = []
    for name in dict.fromkeys(map(_named, rows)):
        of = {row["tokens"]: row for row in rows if _named(row) == name}
        table_lines.append([f"**{name}**", *(micro(of[t]["microseconds"]) if t in of else "-" for t in tokens)])
        for rival in dict.fromkeys(key for row in of.values() for key in row if key not in fields):
            cells = (of[t].get(rival) if t in of else None for t in tokens)
            table_lines.append([f"against {rival}", *("-" if cell is None else _ratio(cell) for cell in cells)])
    return table(["", *(f"{t} tokens" for t in tokens)], table_lines)


def _ratio(ratio: float) -> str:
    return times(ratio) if ratio >= 10 else f"{ratio:.2f}x"


def _rivals(told: Told, section: str, dtype: str) -> list[str]:
    """What the others take."""
    rows = [row for row in told["rows"] if (row["section"], row["dtype"]) == (section, dtype)]
    names = dict.fromkeys(name for row in rows for name in row["seconds"] if name == "copy" or ":" in name)
    cells = ([name, *(_rival(told, row, name) for row in rows)] for name in names)
    return ["The others:", "", *table(["", *(f"{row['work']} tokens" for row in rows)], cells)]


def _rival(told: Told, row: Told, name: str) -> str:
    """The time; and of a dense layer in bfloat16 the part of the matrix product's speed."""
    if (seconds := row["seconds"].get(name)) is None:
        return "-"
    if row["dtype"] != "bfloat16" or name == "copy":
        return micro(1e6 * seconds)
    width = int(name.split()[0].partition(":")[2])
    products = 4 if row["section"] == "backward" else 2
    operations = 2 * products * int(row["work"]) * told["hidden_size"] * width
    return f"{micro(1e6 * seconds)} ({operations / seconds / 1e12 / told['rates']['matmul_tflops']:.0%})"


def _roofline(rows: Sequence[Told]) -> list[str]:
    """Bytes a token, the part of the bandwidth, and how far outputs are off."""
    return [
        *table(
            ["", "tokens", "way", "bytes a token", "part of the bandwidth", "error", "same path"],
            (
                [
                    _named(row),
                    str(row["tokens"]),
                    row["way"] or "-",
                    f"{row['bytes_a_token']:.0f}",
                    f"{100 * row['share']:.0f} %",
                    _known(row["error"], "{:.1e}"),
                    _known(row["agreeing"], "{:.2%}"),
                ]
                for row in rows
            ),
        ),
    ]


def _gpu_goals(rows: Sequence[Told]) -> list[str]:
    found = {(r["section"], r["fff"], r["dtype"], r["tokens"]): r for r in rows if not r["routing"]}
    judged = []
    for *at, rival, goal in GPU_GOALS:
        section, fff, dtype, tokens = at
        measured = found.get((section, fff, dtype, tokens), {}).get(rival)
        if measured is not None:
            reached = "yes" if measured >= goal else "no"
            judged.append(
                [f"{fff} {dtype}, {section}, {tokens} tokens", rival, f"{goal:g}x", _ratio(measured), reached]
            )
    return ["## Goals", "", *table(["", "against", "goal", "measured", "reached"], judged)] if judged else []


def _gpu_model(row: Told, size: str) -> list[str]:
    seconds, lines = row["seconds"], []
    for name, s in seconds.items():
        suffix = " graph" if name.endswith(" graph") else ""
        dense, none = seconds.get(f"dense{suffix}"), seconds.get(f"none{suffix}")
        share = none / s if none else None
        tree = not name.startswith(("dense", "none"))
        lines.append(
            [
                name,
                micro(1e6 * s),
                _known(dense and dense / s, "{:.2f}x"),
                _known(share, "{:.0%}"),
                ("yes" if share >= GPU_LIMIT else "no") if tree and share else "",
            ]
        )
    head = ["", "a batch", "times as fast as dense", "share of the limit's speed", f"{GPU_LIMIT:.0%} reached"]
    return [
        f"## {size}, {row['dtype']}, {row['work']}",
        "",
        "Random weights and ids, without padding, Python included; *graph* is the forward pass in a CUDA graph. *none* has no feedforward networks, which is the limit.",
        "",
        *table(head, lines),
    ]


def _training(rows: Sequence[Told]) -> list[str]:
    if not rows:
        return []
    shown = []
    for row in rows:
        for kind, s in row["seconds"].items():
            recorded = " graph" if kind.endswith(" graph") else ""
            dense, memory = row["seconds"].get("dense" + recorded), row["peak_mb"].get(kind)
            faster = _known(dense and dense / s, "{:.2f}x")
            shown.append([row["work"], kind, micro(1e6 * s), faster, _known(memory, "{:.0f} MB")])
    return [
        "## A step of training",
        "",
        "Forward, backward and AdamW, bfloat16 autocast, float32 weights, with the routing gradient, Python included; *graph* is the whole step recorded as a "
        "CUDA graph; memory is the most that was allocated, weights and optimizer included.",
        "",
        *table(["", "in place of the FFNs", "a step", "times as fast as dense", "memory"], shown),
    ]


def _equal_fidelity(of: Mapping[tuple[str, str], Sequence[Told]]) -> list[str]:
    """Trees, alone or beside an MLP, against the smallest MLP in the same engine whose distilled model keeps at least as much, or else the one that keeps most."""
    lines = []
    for (engine, kind), cells in of.items():
        kept = cells[0]["distilled_cosine"]
        rivals = [c for (e, name), c in of.items() if e == engine and name.startswith("mlp:")]
        rivals = sorted(
            (c for c in rivals if c[0]["distilled_cosine"] is not None), key=lambda c: c[0]["distilled_cosine"]
        )
        if "x" not in kind or kept is None or not rivals:
            continue
        rival = next((c for c in rivals if c[0]["distilled_cosine"] >= kept), rivals[-1])
        keeps = rival[0]["distilled_cosine"]
        ratios = [b["milliseconds"] / a["milliseconds"] for a, b in zip(cells, rival, strict=True)]
        name = f"{rival[0]['model']} ({keeps:.3f}{'' if keeps >= kept else ': keeps less'})"
        lines.append(
            [engine, f"{kind} ({kept:.3f})", name, *(f"{r:.2f}x{' ahead' if r > _AHEAD else ''}" for r in ratios)]
        )
    if not lines:
        return []
    shown = [row["workload"] + star(row) for row in next(iter(of.values()))]
    return [
        "### Against the MLP of equal fidelity",
        "",
        "How many times as fast as the smallest MLP measured in the same engine that keeps at least as much (cosine in brackets), or, where none does, as the one that "
        "keeps the most. *Ahead*: by more than 5 %.",
        "",
        *table(["engine", "tree", "MLP", *shown], lines),
    ]


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _serve_cell(row: Told) -> str:
    ratio = _known(row["to_openvino"], ", **{:.2f}x**")
    return f"{row['milliseconds']:.3g} ms{'' if ratio == '-' else ratio}" + (
        "" if row["to_torch"] is None else f" ({row['to_torch']:.2f}x)"
    )


def train_page(told: Told) -> list[str]:
    rows = told["rows"]
    shown = [
        [
            row["workload"],
            row["model"],
            micro(1e3 * row["milliseconds"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['times_as_fast']:.2f}x",
            _known(row["peak_mb"], "{:.0f}"),
            _known(row["dead"], "{:.0%}"),
        ]
        for row in rows
    ]
    return [
        f"# What a step of training takes: {told['size']}, {told.get('device') or machine_name(told)}",
        "",
        *machine_of(told, "hf-fff bench train"),
        f"Forward, backward and AdamW of a classifier with random weights on random tokens, {'bfloat16 autocast' if told['bf16'] else 'float32'}, "
        f"{told['threads']} threads, models by turns, medians of {told['rounds']} rounds. *+ routing*: with the routing gradient. *Unvisited*: nodes that no token of a batch "
        "visits. [What it means](RESULTS/../training.md).",
        "",
        *table(
            [
                "batch",
                "in place of the FFNs",
                "a step",
                "tokens a second",
                "times as fast as dense",
                "memory, MB",
                "unvisited",
            ],
            shown,
        ),
    ]


def _pages(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of JSON files, without their suffix -> page -> the files that it is made of, the main one first."""
    found = sorted(names)
    made = {name: [name] for name in found if name in _CPU or name.startswith("cuda-")}
    if "cpu-layer" in made:
        made["cpu-layer"] += [name for name in found if name.startswith("cpu-layer-")]
    if served := [name for name in found if name == "serve" or name.startswith("serve-")]:
        made["serve"] = served
    return made


def _files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("*.json")}


def _elsewhere(folder: Path, name: str) -> list[str]:
    """Links to the pages of the same name of other machines: in the folder above, if this is one of several there, or in folders below."""

    def sources(of: Path) -> list[str]:
        return _pages(_files(of)).get(name, [])

    root = folder.parent if sources(folder.parent) else folder
    links = []
    for other in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        if (found := sources(other)) and not other.samefile(folder):
            told = json.loads((other / f"{found[0]}.json").read_text(encoding="utf-8"))
            where = os.path.relpath(other / f"{name}.md", folder).replace(os.sep, "/")
            links.append(f"[{told.get('device') or machine_name(told)}]({where})")
    return [f"The same on another machine: {'; '.join(links)}.", ""] if links else []


# Of a CPU, and what writes their JSON
_CPU = {
    "cpu-layer": "`make bench`",
    "cpu-frontier": "`make bench`",
    "cpu-scaling": "`make bench`",
    "cpu-model": "`make bench`",
    "serve": "`hf-fff bench serve --json`",
    "train": "`hf-fff bench train --json`",
}


def missing(folder: Path) -> list[str]:
    """The pages of a CPU that ``folder`` has no JSON for."""
    made = _pages(_files(folder))
    return [name for name in _CPU if name not in made]


def write_pages(folder: Path) -> list[Path]:
    """Writes the pages and pictures of all measurements in ``folder``.

    Raises:
        FileNotFoundError: there is none.
    """
    files = _files(folder)
    made = _pages(files)
    if not made:
        raise FileNotFoundError(f"{folder} has no {', '.join(f'{name}.json' for name in _CPU)} or cuda-*.json")
    writers: dict[str, Callable[[Told, Sequence[Told]], list[str]]] = {
        "cpu-layer": layer_page,
        "cpu-frontier": lambda told, _: frontier_page(told),
        "cpu-scaling": lambda told, _: scaling_page(told),
        "cpu-model": lambda told, _: model_page(told),
        "serve": lambda told, more: serve_page([told, *more]),
        "train": lambda told, _: train_page(told),
    }
    up = "" if (folder / "quality.md").is_file() or not (folder.parent / "quality.md").is_file() else "../"
    written = []
    for name, sources in made.items():
        page = folder / f"{name}.md"
        maker = _CPU.get(name, "`make bench-cuda` (or the command below)")
        source = f"Made by `python -m hf_fff.bench.page` from {', '.join(f'`{n}.json`' for n in sources)}, which {maker} writes."
        first, *more = (json.loads(files[n].read_text(encoding="utf-8")) for n in sources)
        lines = writers[name](first, more) if name in writers else cuda_page(first)
        figure = page.with_suffix(".png")
        lines = [line.replace("(FIGURE)", f"({figure.name})").replace("(RESULTS/", f"({up}") for line in lines]
        if any(figure.name in line for line in lines):
            plot(first, figure)
        with atomic_file(page) as path:
            head = [*lines[:2], source, "", *_elsewhere(folder, name)]
            path.write_text("\n".join([*head, *lines[2:]]).rstrip() + "\n", encoding="utf-8")
        written.append(page)
    return sorted(written)


def main() -> None:
    folder = Path(sys.argv[1])
    for page in write_pages(folder):
        print(page)
    for name in missing(folder):
        print(f"{folder} has no {name}.json: {name}.md was not made", file=sys.stderr)


if __name__ == "__main__":
    main()
