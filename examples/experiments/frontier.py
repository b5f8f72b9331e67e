"""Writes docs/results/quality-frontier.md and its picture: what converted MiniLMs keep beside the time that they take, engine by engine.

    python examples/experiments/frontier.py

Qualities are those of quality_minilm.jsonl and tasks_minilm.jsonl; times those of serve-minilm*.json in docs/results (`make bench-serve`) and in the
folders there, and of model_time.jsonl (`hf-fff bench model --size minilm`). What is not there is left out.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

from quality_report import HERE, masked_words_kept, mlp_in_units, rows_of, runs, unusual
from runs import spread

from hf_fff import FFFConfig

RESULTS = HERE.parents[1] / "docs" / "results"
PAGE = RESULTS / "quality-frontier.md"
WORKLOADS = ("1x16", "1x128", "8x128", "32x128", "1x512", "mixed")
DRAWN = ("1x16", "1x128", "8x128")
LEVEL = 0.1  # of times: nearer than that is a draw
SHORT = {"EPYC (family 26)": "Zen 5", "EPYC (family 25), avx2": "EPYC, AVX2 alone", "Xeon": "Xeon"}

HEAD = """# Quality at equal time, engine by engine

Made by `python examples/experiments/frontier.py` from measured times and qualities. all-MiniLM-L6-v2, all six FFNs replaced; *cosine* is the mean
cosine of unseen sentences' embeddings to the original's ([quality](quality.md)), times are the whole model's,
microseconds a token, and in brackets how many times as fast as the original in the same engine. Times are of models of the same shapes with random
weights, which take as long. The picture has the cosines after the longest training. *torch-packed* is `hf_fff.optimize(model)`: trees with int8 rows, attention and MLPs in float32;
*torch-packed-bf16* is `hf_fff.optimize(model, "bf16", linears="bf16")`: all of it in bfloat16. Left out are times of PyTorch with AVX2 alone: its threads slept between products there, as
they do not by default, and small products pay for that.

![cosine against microseconds a token](quality-frontier.png)
"""

VERDICT = """
## Where a tree is ahead

How many times as long an MLP takes that keeps exactly as much as the tree (mean cosine, or share of what the FFNs give for masked words), by interpolation between *none* and the measured MLPs: **above
1.00x the tree is ahead.** Trees beside an MLP are trees here. Counted are the cells of each table [below](#cell-by-cell) in which some measured MLP keeps as much as the tree; less
than 10 % is a draw, since two models' times, measured twice on the Zen 5, had another ratio by 1 to 9 % in the median of ten pairs, and by up to 23 %.
"""

CELLS = """
## Cell by cell

As above; in brackets the fastest measured MLP that keeps as much or more, and how many times as long as the tree that takes. Where no MLP
measured here keeps as much as the tree, the original stands there instead, which is no rival of equal quality. Bold: a tree ahead by more than a draw.
"""


@dataclass(frozen=True)
class Timed:
    """Microseconds a token of models in an engine on a machine, by kind."""

    engine: str
    machine: str
    workload: str
    took: Mapping[str, float]


@dataclass(frozen=True)
class Training:
    """What is kept by kind, of seeds, after a training that none, a tree and two MLPs have had, each in its best way: cosines, or shares of what the FFNs give."""

    title: str
    kept: Mapping[str, list[float]]

    @property
    def means(self) -> dict[str, float]:
        return {kind: mean(values) for kind, values in self.kept.items()}


def trainings(rows: Iterable[Mapping]) -> list[Training]:
    """The longest one, the one of 1000 steps that most kinds had, and calibration alone, as far as they were made."""
    rows = [row for row in rows if not {*unusual(row)} - {"crop"}]
    found = [by_steps(row for row in rows if row["run"] in run) for run in (("general", "long"), ("tried",))]
    return [training for training in (*found, calibrated(rows)) if training is not None]


def by_steps(rows: Iterable[Mapping]) -> Training | None:
    recipes: dict[tuple, dict[str, dict[tuple, list[Mapping]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        if "distilled" in row:
            muon = bool(row.get("muon"))
            recipe = (row["steps"] * row["batch_size"], row["steps"], row["batch_size"], row.get("crop", 0.0), muon)
            units = mlp_in_units(row) if "mlp" in row["fff"] else not row.get("plain_steps")
            way = units, row["learning_rate"], row["fff_learning_rate"], row["calibration_steps"]
            recipes[recipe][row["fff"]][way].append(row)
    complete = {recipe: kinds for recipe, kinds in recipes.items() if enough(kinds)}
    if not complete:
        return None
    (_, steps, batch, crop, muon), kinds = max(complete.items(), key=lambda item: item[0])
    best = {  # by the loss on held-out training text
        kind: min(ways.values(), key=lambda group: mean(row["eval_loss"] for row in group))
        for kind, ways in kinds.items()
    }
    found = {kind: [row["distilled"]["unseen_short"]["cosine"] for row in group] for kind, group in best.items()}
    told = f"{steps} steps of {batch} texts" + (f", {100 * crop:.0f} % of the batches cropped" if crop else "")
    return Training(f"After {told}" + (", Muon for attention" if muon else "") + seeds(found), found)


def calibrated(rows: Iterable[Mapping]) -> Training | None:
    plans: dict[tuple, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if "calibrated" in row and "calibration_batch" in row:
            plan = row["calibration_steps"], row["calibration_batch"], row.get("texts", 0)
            plans[plan][row["fff"]].setdefault(row["seed"], row["calibrated"]["unseen_short"]["cosine"])
    complete = {plan: kinds for plan, kinds in plans.items() if enough(kinds)}
    if not complete:
        return None
    (steps, tokens, _), kinds = max(complete.items(), key=lambda item: (len(item[1]), item[0]))
    found = {kind: list(of_seed.values()) for kind, of_seed in kinds.items()}
    return Training(f"Calibrated alone, {steps} steps of {tokens} tokens a layer" + seeds(found), found)


def of_words(shares: Mapping[str, list[float]]) -> Training:
    """Times are of models without the head that tells the words, which costs all kinds the same."""
    title = "Masked words, distilled for them ([table](quality.md#masked-words)); times without their head"
    return Training(title + seeds(shares), shares)


def enough(kinds: Iterable[str]) -> bool:
    kinds = {*kinds}
    return "none" in kinds and any("x" in k for k in kinds) and sum(k.startswith("mlp") for k in kinds) > 1


def seeds(found: Mapping[str, list[float]]) -> str:
    counts = sorted({len(values) for values in found.values()})
    return f" (seeds: {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))})"


def times() -> list[Timed]:
    found = []
    for serve in sorted(RESULTS.rglob("serve-minilm*.json")):  # of a kind of machine in a folder
        told = json.loads(serve.read_text())
        machine = f"{told['cpu']}, {told['isa']}, {told['threads']} threads"
        took: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        awake = told.get("waiting") == "awake"
        for row in told["rows"]:
            if row["engine"].startswith("torch") and not awake:
                continue  # threads slept between products, which an MLP's small ones pay for
            took[row["engine"], row["workload"]][row["model"]] = 1e3 * row["milliseconds"] / row["tokens"]
        found += [Timed(engine, machine, workload, of) for (engine, workload), of in took.items()]
    for told in rows_of("model_time.jsonl"):
        machine = f"{told['cpu']}, {told['isa']}, {told['threads']} threads"
        found += [Timed("torch-f32", machine, row["workload"], row["microseconds"]) for row in told["rows"]]
    return [t for t in found if t.workload in WORKLOADS and any("x" in kind for kind in t.took)]


def rivals(kinds: Iterable[str]) -> list[str]:
    return [kind for kind in kinds if kind == "none" or kind.startswith("mlp")]


def between(tree: float, took: Mapping[str, float], cosines: Mapping[str, float]) -> float | None:
    """The time of an MLP, or of none, that keeps as much as a tree; None outside of what was measured."""
    points = sorted((cosines[kind], took[kind]) for kind in rivals(took) if kind in cosines)
    for (low, fast), (high, slow) in pairwise(points):
        if low <= tree <= high and low < high:
            return fast + (slow - fast) * (tree - low) / (high - low)
    return None


def noise(timed: Timed) -> float:
    """Of times in an engine at a workload: by how much something was faster than no FFN at all, or trees beside an MLP than one of the two alone, which nothing can be."""
    took = timed.took
    return max(LEVEL, *(took[part] / took[kind] - 1 for kind in took for part in parts_of(kind) if part in took))


def parts_of(kind: str) -> list[str]:
    return ["none", *kind.split("+")] if kind != "dense" else ["none"]


def verdict(tree: str, timed: Timed, cosines: Mapping[str, float], level: float = LEVEL) -> tuple[str, float | None]:
    """A cell, and how many times as long what keeps as much as the tree takes; None where nothing measured does."""
    known = {kind: t for kind, t in timed.took.items() if kind in cosines}
    good = {kind: known[kind] for kind in rivals(known) if cosines[kind] >= cosines[tree]}
    if not good:
        dense = timed.took.get("dense")
        return (f"dense {dense / known[tree]:.2f}x" if dense else "-"), None
    name = min(good, key=lambda kind: good[kind])
    ratio, same = good[name] / known[tree], between(cosines[tree], known, cosines)
    equal = ratio if same is None else min(ratio, same / known[tree])
    cell = f"{equal:.2f}x ({name} {ratio:.2f}x)"
    return (f"**{cell}**" if equal > 1 + level else cell), equal


def short(machine: str) -> str:
    """Of a machine's name as much as tells it from the others."""
    return next((told for part, told in SHORT.items() if part in machine), machine)


def order(kind: str) -> tuple[int, str]:
    return (10**9 if kind == "dense" else FFFConfig.from_shorthand(kind).active_nodes, kind)


def timed_cell(took: Mapping[str, float], kind: str) -> str:
    """Microseconds, and how many times as fast as the original, where an engine runs that."""
    if kind not in took:
        return ""
    return f"{took[kind]:.1f}" + (f" ({took['dense'] / took[kind]:.2f}x)" if "dense" in took else "")


def table(timed: list[Timed], every: list[Training], words: Mapping[str, float]) -> str:
    """All kinds in an engine: times and quality."""
    names = [t.workload for t in timed]
    titles = [training.title.split(",")[0].split(" (")[0].lower() for training in every]
    columns = [*names, *(f"cosine {title}" for title in titles), "masked words: of what the FFNs give"]
    text = f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
    for kind in sorted({kind for t in timed for kind in t.took}, key=order):
        cells = [timed_cell(t.took, kind) for t in timed]
        cells += [spread(t.kept[kind]) if kind in t.kept else "1" if kind == "dense" else "" for t in every]
        cells.append("100 %" if kind == "dense" else f"{100 * words[kind]:.0f} %" if kind in words else "")
        text += f"| {kind} | {' | '.join(cells)} |\n"
    return text


def draw(groups: Mapping[tuple[str, str], list[Timed]], cosines: Mapping[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every = pyplot.subplots(
        len(groups), len(DRAWN), figsize=(4.2 * len(DRAWN), 3.2 * len(groups)), squeeze=False
    )
    for axes_of, ((engine, machine), timed) in zip(every, groups.items(), strict=True):
        for axes, t in zip(axes_of, [t for t in timed if t.workload in DRAWN], strict=True):
            known = {kind: (t.took[kind], cosines[kind]) for kind in t.took if kind in cosines}
            for kinds, style in ((rivals(known), "o-"), ([k for k in known if "x" in k], "^--")):
                points = sorted((known[kind], kind) for kind in kinds)
                if points:
                    label = "MLPs and none" if style == "o-" else "trees"
                    axes.plot(*zip(*(p for p, _ in points), strict=True), style, label=label)
                for (x, y), kind in points:
                    axes.annotate(kind, (x, y), fontsize=7, xytext=(3, -8), textcoords="offset points")
            axes.set_title(f"{short(machine)}, {engine}, {t.workload}", fontsize=9)
            axes.set_xlabel("microseconds a token", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        axes_of[0].set_ylabel("cosine to the original", fontsize=8)
    every[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


@dataclass(frozen=True)
class Judged:
    """A tree in an engine on a machine: for each workload its cell, and how many times as long an MLP takes that keeps as much."""

    place: str
    tree: str
    cells: Mapping[str, tuple[str, float | None]]
    levels: Mapping[str, float]

    @property
    def ahead(self) -> dict[str, float]:
        return {name: ratio for name, (_, ratio) in self.cells.items() if (ratio or 0) > 1 + self.levels[name]}

    @property
    def compared(self) -> int:
        return sum(ratio is not None for _, ratio in self.cells.values())


def judged(groups: Mapping[tuple[str, str], list[Timed]], training: Training) -> list[Judged]:
    """Each tree in each engine, after a training."""
    cosines, found = training.means, []
    for (engine, machine), some in groups.items():
        levels = {t.workload: noise(t) for t in some}
        for tree in sorted({kind for t in some for kind in t.took if "x" in kind and kind in cosines}, key=order):
            cells = {t.workload: verdict(tree, t, cosines, levels[t.workload]) for t in some if tree in t.took}
            found.append(Judged(f"{short(machine)}, {engine}", tree, cells, levels))
    return found


def summary(training: Training, every: list[Judged]) -> str:
    """Where trees are ahead, engine by engine."""
    page = f"\n### {training.title}\n\n| | cells with a tree ahead | of | where, and how many times as long the MLP takes |\n|---|---|---|---|\n"
    for place in dict.fromkeys(j.place for j in every):
        some = [j for j in every if j.place == place]
        where = [
            f"{j.tree} ({', '.join(f'{name} {ratio:.2f}x' for name, ratio in j.ahead.items())})"
            for j in some
            if j.ahead
        ]
        counts = sum(len(j.ahead) for j in some), sum(j.compared for j in some)
        page += f"| {place} | {counts[0]} | {counts[1]} | {'; '.join(where) or 'nowhere'} |\n"
    return page


def cell_by_cell(training: Training, every: list[Judged]) -> str:
    page = f"\n### {training.title}\n\n| | tree | {' | '.join(WORKLOADS)} |\n|---|---|{'---|' * len(WORKLOADS)}\n"
    for j in every:
        page += f"| {j.place} | {j.tree} | {' | '.join(j.cells.get(name, ('',))[0] for name in WORKLOADS)} |\n"
    return page


def main() -> None:
    every = trainings(runs())
    words = of_words(masked_words_kept(rows_of("tasks_minilm.jsonl")))
    groups: dict[tuple[str, str], list[Timed]] = defaultdict(list)
    for timed in times():
        groups[timed.engine, timed.machine].append(timed)
    for some in groups.values():
        some.sort(key=lambda t: WORKLOADS.index(t.workload))
    groups = dict(sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])))
    verdicts = [(training, judged(groups, training)) for training in (*every, words)]
    page = HEAD + VERDICT + "".join(summary(*one) for one in verdicts)
    noisy = [
        f"{100 * level:.0f} % on {short(machine)}, {engine} at {t.workload}"
        for (engine, machine), some in groups.items()
        for t in some
        if (level := noise(t)) > LEVEL
    ]
    if noisy:
        page += f"\nNo FFN at all cannot be slower than anything else, nor trees alone than beside an MLP. Where they were, times are known to no more than that ({', '.join(noisy)}), and less than that is a draw there.\n"
    for (engine, machine), some in groups.items():
        page += f"\n## {short(machine)}, {engine}\n\n{machine}.\n" + table(some, every, words.means)
    page += CELLS + "".join(cell_by_cell(*one) for one in verdicts)
    PAGE.write_text(page, encoding="utf-8")
    draw(groups, every[0].means, PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
