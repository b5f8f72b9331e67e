"""Masked-LM pretraining from nothing of small BERTs that differ in what stands in the place of the FFNs; a line of JSON a run.

    python examples/experiments/pretrain_small.py --tokenizer DIR --text train.txt --unseen unseen.txt --results pretrain_small.jsonl
    python examples/experiments/pretrain_small.py --tokenizer DIR --text train.txt --results pretrain_small.jsonl --time    # alone on a GPU
    python examples/experiments/pretrain_small.py --results pretrain_small.jsonl --report                                  # page and picture
    python examples/experiments/pretrain_small.py --tokenizer DIR --results try.jsonl --quick                              # seconds on a CPU

6 layers of 384, the dense FFN of 1536; 25 % of the tokens masked and all else as in the preset crammed-pretrain, at a constant rate after the
warm-up, so that any two points of any two curves may be compared. Trees are trained with each of ``--routing-gradient``. Texts (a paragraph a
line) are packed: every row is full. Logits are those of the masked words alone, since all words' would take more time than all else. ``--time`` measures the steps, all models by turns in one process; the page reads the loss after equal
seconds off the curves by these times, since runs that shared a GPU cannot tell theirs. ``side_by_side.py`` starts several processes.
"""

import argparse
import hashlib
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import numpy as np
from runs import append, make_runs, results, spread

HERE = Path(__file__).parent
DATA = HERE.parent / "data"
PAGE = HERE.parents[1] / "docs" / "results" / "pretraining.md"
KINDS = ("dense", "8x8", "mlp:72", "1x11", "mlp:12", "none")
# Classes of transformers, what their configs are told, and how they differ
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("Bert", {}, "BERT's norms behind, learnt positions"),
    "megatron_bert": ("MegatronBert", {}, "norms before, learnt positions"),
    "esm": ("Esm", {"position_embedding_type": "rotary"}, "norms before, rotary positions"),
}
KEY = (
    "run",
    "family",
    "fff",
    "routing_gradient",
    "seed",
    "steps",
    "rows",
    "tokens",
    "learning_rate",
    "fff_learning_rate",
    "units",
    "zero_outputs",
    "warmup",
    "layers",
    "hidden_size",
    "quick",
)
SHARE = 0.25  # of the tokens that are masked, the paper's
HELD_OUT = 256  # rows of the training text, by which rates are chosen
CHUNK = 4096  # texts that are tokenised at once


class Kind(NamedTuple):
    """What stands in the place of the FFNs; ``routing`` is the routing gradient of trees, None of all else."""

    fff: str
    routing: float | None = None

    @property
    def neurons(self) -> str | None:
        """What they are arranged in, where there are any that the package made."""
        return "tree" if "x" in self.fff else "mlp" if self.fff.startswith("mlp") else None

    @property
    def label(self) -> str:
        return f"{self.fff}, no routing gradient" if self.routing == 0 else self.fff


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--tokenizer", help="folder of a tokenizer, or of a model that has one")
    found.add_argument("--text", type=Path, nargs="+", default=[DATA / "everyday_calibrate.txt"])
    found.add_argument("--unseen", type=Path, nargs="+", default=[DATA / "everyday_eval.txt"])
    found.add_argument("--results", type=Path, required=True)
    found.add_argument(
        "--run", default="main", help="main is what the page shows; rates is for choosing, otherwise for trees beside"
    )
    found.add_argument(
        "--fff", nargs="+", default=list(KINDS), help="what takes the place of the FFNs; dense leaves them"
    )
    found.add_argument(
        "--routing-gradient", nargs="+", type=float, default=[3.0, 0.0], help="of trees; 0 is the paper's"
    )
    found.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    found.add_argument("--steps", type=int, default=1024)
    found.add_argument("--rows", type=int, default=64, help="of a step")
    found.add_argument("--tokens", type=int, default=128, help="of a row")
    found.add_argument("--family", default="esm", choices=FAMILIES)
    found.add_argument("--layers", type=int, default=6)
    found.add_argument("--hidden-size", type=int, default=384)
    found.add_argument("--learning-rate", type=float, default=1e-3)
    found.add_argument("--fff-learning-rate", type=float, help="of what replaces the FFNs; the package's by default")
    found.add_argument("--units", nargs="*", default=[], choices=("tree", "mlp"), help="what is trained in units")
    found.add_argument("--zero-outputs", action="store_true", help="trees and MLPs begin without giving anything")
    found.add_argument("--warmup", type=int, default=128, help="steps")
    found.add_argument("--graphs", action="store_true", help="steps as CUDA graphs")
    found.add_argument("--evaluations", type=int, default=16)
    found.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "packed"), help="for the packed text")
    found.add_argument("--claims", type=Path, help="folder that processes side by side have in common, a fresh one")
    found.add_argument("--seconds", type=float, default=1e9, help="no run is begun that would not end by then")
    found.add_argument("--time", action="store_true", help="measure the steps of all kinds, by turns, and nothing else")
    found.add_argument("--rounds", type=int, default=3, help="of --time")
    found.add_argument("--quick", action="store_true", help="a tiny model, a few steps: tells nothing but that it runs")
    found.add_argument("--report", action="store_true", help="write the page and the picture")
    found.add_argument("--page", type=Path, default=PAGE)
    return found


def main() -> None:
    asked = parser()
    args = asked.parse_args()
    if args.report:
        report([row for row in results(args.results) if row["quick"] == args.quick], args.page)
        return
    if not args.tokenizer:
        asked.error("--tokenizer is needed")
    if args.quick:
        args.layers, args.hidden_size, args.steps, args.rows, args.tokens = 2, 64, 8, 8, 32
        args.seeds, args.evaluations, args.rounds, args.warmup = args.seeds[:1], 2, 1, 2
    if args.steps % args.evaluations:
        asked.error(f"--steps {args.steps} must be a multiple of --evaluations {args.evaluations}")
    kinds = [Kind(fff, r) for fff in args.fff for r in (args.routing_gradient if "x" in fff else (None,))]
    if args.time:
        times(args, kinds)
        return
    keys = [key_of(args, kind, seed) for seed in args.seeds for kind in kinds]

    def of(key: Mapping[str, Any]) -> dict[str, Any]:
        return run(args, Kind(key["fff"], key["routing_gradient"]), key["seed"])

    if make_runs(keys, of, args.results, claims=args.claims, seconds=args.seconds):
        raise SystemExit("not all runs could be made")


def key_of(args: argparse.Namespace, kind: Kind, seed: int | None) -> dict[str, Any]:
    given = {name: getattr(args, name, None) for name in KEY}
    own = {"fff": kind.fff, "routing_gradient": kind.routing, "seed": seed, "units": kind.neurons in args.units}
    return given | own


# Text


def packed(tokenizer: Any, paths: list[Path], tokens: int, cache: Path) -> np.ndarray:
    """``[rows, tokens]`` of int32: texts one after the other, each with a separator behind it, cut into rows that begin with the class token.
    Made once, by whichever process comes first."""
    from filelock import FileLock

    facts = [(path.name, path.stat().st_size) for path in paths], tokenizer.vocab_size, tokens
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    place = cache / f"{name}.npy"
    with FileLock(cache / f"{name}.lock"):
        if not place.exists():
            lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            parts = []
            for at in range(0, len(lines), CHUNK):
                ids = tokenizer(lines[at : at + CHUNK], add_special_tokens=False, verbose=False)["input_ids"]
                parts += [np.array([*row, tokenizer.sep_token_id], dtype=np.int32) for row in ids]
            flat = np.concatenate(parts)
            count = len(flat) // (tokens - 1)
            if not count:
                raise SystemExit(f"{', '.join(map(str, paths))}: {len(flat)} tokens do not fill a row of {tokens}")
            rows = flat[: count * (tokens - 1)].reshape(count, tokens - 1)
            np.save(cache / f"{name}.new.npy", np.pad(rows, ((0, 0), (1, 0)), constant_values=tokenizer.cls_token_id))
            (cache / f"{name}.new.npy").rename(place)
    return np.load(place, mmap_mode="r")


class Rows:
    """Packed rows as a data set: nothing to pad, and no attention mask."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        import torch

        return torch.from_numpy(self.ids[index].astype(np.int64))


def texts(args: argparse.Namespace) -> tuple[Any, Rows, Rows, Rows]:
    """The tokenizer; rows to train on; some of the same text that are not; of unseen text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    train = packed(tokenizer, args.text, args.tokens, args.cache)
    unseen = packed(tokenizer, args.unseen, args.tokens, args.cache)
    held_out = min(HELD_OUT, len(train) // 10)
    if len(train) - held_out < args.rows:
        raise SystemExit(f"--text has {len(train)} rows of {args.tokens} tokens, too few for steps of {args.rows}")
    return tokenizer, Rows(train[held_out:]), Rows(train[:held_out]), Rows(unseen[: 2 * HELD_OUT])


# Runs


def of_masked_words(base: Any) -> Any:
    """A class of models for masked words whose loss computes the logits of masked words alone. How many there are changes from batch to batch,
    and to ask would wait for the GPU: it takes a number that there never are more of (by six standard deviations of ``SHARE``)."""
    import torch
    from transformers.modeling_outputs import MaskedLMOutput

    class OfMaskedWords(base):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **options: Any) -> Any:
            if labels is None:
                return super().forward(input_ids, attention_mask, **options)
            found = self.base_model(input_ids, attention_mask, **options)
            labels, hidden = labels.flatten(), found.last_hidden_state.flatten(0, 1)
            count = min(
                labels.numel(), int(SHARE * labels.numel() + 6 * (SHARE * (1 - SHARE) * labels.numel()) ** 0.5) + 1
            )
            places = (labels >= 0).int().topk(count, sorted=False).indices
            head = self.cls if hasattr(self, "cls") else self.lm_head
            loss = torch.nn.functional.cross_entropy(head(hidden.index_select(0, places)).float(), labels[places])
            return MaskedLMOutput(loss=loss, hidden_states=found.hidden_states)

    OfMaskedWords.__name__ = base.__name__
    return OfMaskedWords


def trainer(args: argparse.Namespace, kind: Kind, seed: int, data: tuple[Any, Rows, Rows, Rows], **options: Any) -> Any:
    import torch
    import transformers
    from transformers.models.esm import modeling_esm

    import hf_fff
    from hf_fff import FinetuningArguments, FinetuningTrainer
    from hf_fff.layers import FFF, MLP
    from hf_fff.training import preset

    # ESM's own is the same in several operators, which would make dense FFNs slow.
    modeling_esm.gelu = torch.nn.functional.gelu
    tokenizer, train, _, unseen = data
    gpu = torch.cuda.is_available()
    shape = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,  # an odd one is slow on a GPU
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // 32,
        "intermediate_size": 4 * args.hidden_size,
        "max_position_embeddings": args.tokens,
        "pad_token_id": tokenizer.pad_token_id,
    }
    name, own, _ = FAMILIES[args.family]
    package, name, fff = (transformers, name, {}) if kind.fff == "dense" else (hf_fff, f"Fast{name}", {"fff": kind.fff})
    transformers.set_seed(seed)
    config = getattr(package, f"{name}Config")(**shape, **own, **fff)
    model = of_masked_words(getattr(package, f"{name}ForMaskedLM"))(config)
    if args.zero_outputs:
        for module in model.modules():
            if isinstance(module, (FFF, MLP)):
                torch.nn.init.zeros_(module.weight_out)
    settings = preset("crammed-pretrain") | {  # no dropout
        "mlm_probability": SHARE,
        "optim": "adamw_torch_fused",
        "learning_rate": args.learning_rate,
        "fff_learning_rate": args.fff_learning_rate,
        "fff_units": key_of(args, kind, seed)["units"],
        "cuda_graphs": args.graphs,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": args.warmup,
        "per_device_train_batch_size": args.rows,
        "per_device_eval_batch_size": args.rows,
        "routing_gradient": kind.routing,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": gpu,
        "use_cpu": not gpu,
        "dataloader_num_workers": 2 if gpu else 0,
        "dataloader_pin_memory": gpu,
        "seed": seed,
    }
    made = FinetuningTrainer(
        model,
        FinetuningArguments(**settings | options),
        task="mlm",
        train_dataset=train,
        eval_dataset=unseen,
        processing_class=tokenizer,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def on(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def run(args: argparse.Namespace, kind: Kind, seed: int) -> dict[str, Any]:
    """Pretrains one model; what that gave."""
    from hf_fff import FFFConfig

    begin = time.monotonic()
    data = texts(args)
    every = args.steps // args.evaluations
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(
            args,
            kind,
            seed,
            data,
            output_dir=folder,
            max_steps=args.steps,
            eval_strategy="steps",
            eval_steps=every,
            logging_steps=every,
        )
        started = time.monotonic()
        made.train()
        trained = time.monotonic() - started
        history = list(made.state.log_history)
        held_out = made.evaluate(data[2])["eval_loss"]
    curve = [(row["step"], round(row["eval_loss"], 4)) for row in history if "eval_loss" in row]
    last = next(row for row in reversed(history) if "loss" in row)
    routing = {
        name: round(mean(found), 4)
        for name in ("dead_nodes", "visit_entropy")
        if (found := [value for key, value in last.items() if key.startswith(name)])
    }
    rate = None if kind.fff == "dense" else made.args.rate_of(FFFConfig.from_shorthand(kind.fff).kind)
    return {
        "curve": curve,
        "training_curve": [(row["step"], round(row["loss"], 4)) for row in history if "loss" in row],
        "unseen": curve[-1][1],
        "held_out": round(held_out, 4),
        **routing,
        "rate": rate,
        "parameters": sum(p.numel() for p in made.model.parameters()),
        "graphs": args.graphs,
        "train_rows": len(data[1]),
        "unseen_rows": len(data[3]),
        "training_seconds": round(trained, 1),
        "seconds": round(time.monotonic() - begin, 1),
        **on(args),
    }


# Times


def times(args: argparse.Namespace, kinds: list[Kind]) -> None:
    """What a step takes, data and all, in the median of windows of several steps; the kinds take turns."""
    import torch
    from transformers import TrainerCallback

    first, window, windows = (2, 2, 1) if args.quick else (8, 10, 2)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= first and (state.global_step - first) % window == 0:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.marks.append(time.perf_counter())

    data, order = texts(args), random.Random(0)
    found: dict[Kind, list[float]] = defaultdict(list)
    for number in range(args.rounds):
        for kind in order.sample(kinds, len(kinds)):
            with tempfile.TemporaryDirectory() as folder:
                steps = first + window * windows
                made = trainer(args, kind, number, data, output_dir=folder, max_steps=steps, logging_steps=1000)
                made.add_callback(clock := Clock())
                made.train()
            found[kind] += [1e3 * (b - a) / window for a, b in zip(clock.marks, clock.marks[1:], strict=False)]
    for kind in kinds:
        measured = {"milliseconds": round(median(found[kind]), 3), "windows": [round(ms, 3) for ms in found[kind]]}
        measured["graphs"] = args.graphs
        append(args.results, key_of(args, kind, None) | {"run": "time", "steps": None} | measured | on(args))


# The page

HEAD = """# Pretraining from nothing

Made by `python examples/experiments/pretrain_small.py --report` from the JSON lines of its runs; how to run them stands there. Encoders of {layers} layers of
{hidden_size} ({arrangement}), which differ in nothing but what stands in the place of the FFNs (dense: {inner} neurons), pretrained on masked words from
random weights: {steps} steps of {rows} full rows of {tokens} tokens ({seen:.1f} million tokens, {passes:.2f} passes over the text), 25 % of the tokens masked,
AdamW at {learning_rate:g} (0.9, 0.98, 1e-12), weight decay 0.01, clipping at 0.5, no dropout, a warm-up of {warmup} steps and then a constant rate,
bf16. What replaces the FFNs has the rate of its column. Loss on masked words of {unseen_rows} rows of text from documents that no training
text is from, the same masks every time; mean ± standard deviation over seeds. *Recovered*: the share of what the dense FFNs give that is
kept, (none - x) / (none - dense).

"""
COLUMNS = ("routing gradient", "neurons used", "parameters", "rate", "seeds", "loss after {steps} steps", "recovered")
LONGER = ("seeds", "after {longest} steps", "recovered")
TIMED = ("a step, ms", "loss after equal seconds")
SECONDS = """*After equal seconds*: the loss that each has when the fastest is through, {budget:.1f} s, by the time that a step takes alone on the GPU (median; all models
by turns in one process{graphs}; logits are computed of masked words alone). The rate is constant, so that a training which stops earlier is no other one.
{unsure}
"""
UNSURE = """A step that is not recorded is mostly Python that launches kernels: windows of one model differ by up to {windows:.0f} % here, so that equal seconds say little of the models.
"""
TAIL = """
![Loss over steps]({picture})

*Nodes never visited*: in the last {every} of {steps} steps, the mean over layers. {device}, torch {torch}. Runs shared a GPU, a run took {seconds:.0f} s so on average.
{missing}"""
OTHERWISE = """
## Trees otherwise

Lower rates, and outputs that begin at zero, in the place of random ones; of the runs above the same seed stands beside. MLPs began at random alone.

"""
CHOICE = """
## How the setting was chosen

Short runs, one seed each, by the loss on masked words of rows of the *training* text that were kept back; the unseen text above took no part. *Units*:
what replaces the FFNs takes its steps in units of its inputs and outputs, as in finetuning.

"""


def at(curve: list[tuple[int, float]], step: float) -> float:
    """The loss after so many steps, between two evaluations on the line through them."""
    return float(np.interp(step, [s for s, _ in curve], [loss for _, loss in curve]))


def report(rows: list[dict[str, Any]], page: Path) -> None:
    """The table of all runs, and a picture of it."""
    from hf_fff.config import FFFConfig
    from hf_fff.files import atomic_file

    trained = [row for row in rows if row["run"] == "main"]
    if not trained:
        raise SystemExit("there are no runs to report")
    first = trained[-1]
    same = ("family", "rows", "tokens", "learning_rate", "warmup", "layers", "hidden_size", "device")
    inner = 4 * first["hidden_size"]  # neurons of the dense FFN
    trained = [row for row in trained if all(row[name] == first[name] for name in same)]
    groups: dict[Kind, list[dict[str, Any]]] = defaultdict(list)
    for row in trained:
        groups[Kind(row["fff"], row["routing_gradient"])].append(row)
    order = [Kind(fff, r) for fff in KINDS for r in (None, 3.0, 0.0)]
    kinds = [kind for kind in order if kind in groups] + [kind for kind in groups if kind not in order]
    shape = ("family", "rows", "tokens", "layers", "hidden_size", "device")
    timings = [row for row in rows if row["run"] == "time" and all(row[name] == first[name] for name in shape)]
    ms = {Kind(row["fff"], row["routing_gradient"]): row["milliseconds"] for row in timings}
    # All are the same training up to where the shortest ends, and may be longer for some seeds.
    steps, longest = (pick(row["steps"] for row in trained) for pick in (min, max))
    budget = min((ms[kind] * steps / 1e3 for kind in kinds if kind in ms), default=float("nan"))
    ends = {kind: [at(row["curve"], steps) for row in groups[kind]] for kind in kinds}
    later = {kind: [row["unseen"] for row in groups[kind] if row["steps"] == longest] for kind in kinds}
    later = {kind: losses for kind, losses in later.items() if losses}
    timed = {kind: [at(row["curve"], 1e3 * budget / ms[kind]) for row in groups[kind]] for kind in kinds if kind in ms}

    def recovered(losses: dict[Kind, list[float]], kind: Kind) -> str:
        if not {Kind("dense"), Kind("none"), kind} <= {*losses}:
            return "not measured"
        x, dense, none = (mean(losses[k]) for k in (kind, Kind("dense"), Kind("none")))
        return f"{100 * (none - x) / (none - dense) + 0.0:.0f} %" if none > dense else "none is ahead of dense"

    seen = longest * first["rows"]
    text = HEAD.format(
        arrangement=FAMILIES[first["family"]][2],
        **{name: first[name] for name in ("unseen_rows", *same[:-1])},
        steps=f"{longest:,}" if steps == longest else f"{steps:,}, or with some seeds {longest:,},",
        inner=inner,
        seen=seen * first["tokens"] / 1e6,
        passes=seen / first["train_rows"],
    )
    if timings:
        recorded = ", steps recorded as CUDA graphs" if any(row.get("graphs") for row in timings) else ""
        windows = max(max(row["windows"]) / min(row["windows"]) - 1 for row in timings)
        unsure = UNSURE.format(windows=100 * windows) if not recorded and windows > 0.05 else ""
        text += SECONDS.format(budget=budget, graphs=recorded, unsure=unsure)
    columns = " | ".join(
        ("", *COLUMNS, *(LONGER if longest > steps else ()), *(TIMED if timings else ()), "nodes never visited")
    ).format(steps=steps, longest=longest)
    text += f"| {columns} |\n|{'---|' * (columns.count('|') + 1)}\n"
    for kind in kinds:
        of = groups[kind]
        dead = [row["dead_nodes"] for row in of if row["steps"] == steps and "dead_nodes" in row]
        used = inner if kind.fff == "dense" else FFFConfig.from_shorthand(kind.fff).active_nodes
        cells = [
            kind.fff,
            "-" if kind.routing is None else f"{kind.routing:g}",
            f"{used} ({100 * used / inner:.1f} %)",
            f"{of[0]['parameters'] / 1e6:.1f} M",
            "-" if kind.neurons is None else f"{of[0]['rate']:g}{', in units' if of[0]['units'] else ''}",
            str(len(of)),
            spread(ends[kind]),
            recovered(ends, kind),
            *(
                (str(len(later.get(kind, ()))), spread(later[kind]) if kind in later else "-", recovered(later, kind))
                if longest > steps
                else ()
            ),
            *(
                (f"{ms[kind]:.1f}", spread(timed[kind]))
                if kind in ms
                else ("not measured",) * len(TIMED)
                if timings
                else ()
            ),
            f"{100 * mean(dead):.1f} %" if dead else "-",
        ]
        text += f"| {' | '.join(cells)} |\n"
    missing = (
        []
        if timings
        else [
            "What each has after equal seconds is not measured yet: nobody has timed the steps alone on a GPU (`--time`)."
        ]
    )
    if not any(row["run"] == "otherwise" for row in rows):
        missing.append("Lower rates for trees, and outputs that begin at zero, are not tried yet (`--run otherwise`).")
    if min(map(len, groups.values())) < 2:
        missing.append("With one seed nobody can tell how far two seeds of one model lie apart.")
    picture = page.with_suffix(".png")
    text += TAIL.format(
        picture=picture.name,
        **{name: first[name] for name in ("device", "torch")},
        every=first["training_curve"][0][0],
        steps=steps,
        seconds=mean(row["seconds"] for row in trained),
        missing="".join(f"\n{line}\n" for line in missing),
    )
    text += otherwise(rows, trained, steps) + choice([row for row in rows if row["run"] == "rates"])
    draw(groups, kinds, ms, picture)
    with atomic_file(page) as new:
        new.write_text(text, encoding="utf-8")


def otherwise(rows: list[dict[str, Any]], trained: list[dict[str, Any]], steps: int) -> str:
    """What was tried with trees beside the table's, of the same seeds."""
    tried = [row for row in rows if row["run"] == "otherwise" and row["steps"] == steps]
    if not tried:
        return ""
    seeds = {row["seed"] for row in tried}
    kinds = {(row["fff"], row["routing_gradient"]) for row in tried}
    beside = [row for row in trained if row["seed"] in seeds and (row["fff"], row["routing_gradient"]) in kinds]
    columns = ["", "routing gradient", "rate", "units", "outputs begin", f"loss after {steps} steps"]
    text = f"{OTHERWISE}| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    for row in sorted([*beside, *tried], key=lambda row: (row["fff"], row["run"], row["zero_outputs"], -row["rate"])):
        cells = [
            row["fff"] + (f", seed {row['seed']} of the above" if row["run"] == "main" else ""),
            f"{row['routing_gradient']:g}",
            f"{row['rate']:g}",
            "yes" if row["units"] else "no",
            "at zero" if row["zero_outputs"] else "random",
            f"{at(row['curve'], steps):.3f}",
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def choice(rows: list[dict[str, Any]]) -> str:
    """The table of the short runs by which rates and all that were chosen."""
    if not rows:
        return ""
    columns = ["", "in the FFNs' place", "steps x rows", "rate", "its own rate", "units", "loss"]
    text = f"{CHOICE}| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    families = list(FAMILIES)
    for row in sorted(
        rows, key=lambda row: (families.index(row["family"]), row["rows"], row["fff"] != "dense", row["fff"])
    ):
        own = row["rate"] is not None and row["fff"] != "none"
        cells = [
            FAMILIES[row["family"]][2],
            row["fff"],
            f"{row['steps']} x {row['rows']}",
            f"{row['learning_rate']:g}",
            f"{row['rate']:g}" if own else "-",
            ("yes" if row["units"] else "no") if own else "-",
            f"{row['held_out']:.3f}",
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def draw(groups: dict[Kind, list[dict[str, Any]]], kinds: list[Kind], ms: dict[Kind, float], path: Path) -> None:
    from matplotlib.figure import Figure

    from hf_fff.files import atomic_file

    scales = [dict.fromkeys(kinds, 1.0), *([{kind: ms.get(kind, float("nan")) / 1e3 for kind in kinds}] if ms else [])]
    figure = Figure(figsize=(1 + 5 * len(scales), 5), layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    colours = {fff: f"C{i}" for i, fff in enumerate(dict.fromkeys(kind.fff for kind in kinds))}
    highest = []
    for kind in kinds:
        found: dict[float, list[float]] = defaultdict(list)  # of all runs that came so far
        for row in groups[kind]:
            for step, loss in row["curve"]:
                found[step].append(loss)
        steps = sorted(found)
        middle = np.array([mean(found[step]) for step in steps])
        sd = np.array([stdev(found[step]) if len(found[step]) > 1 else 0.0 for step in steps])
        highest.append(middle[min(2, len(middle) - 1)])
        for axes, scale in zip(panels, scales, strict=True):
            x = [scale[kind] * step for step in steps]
            style = {"color": colours[kind.fff], "linestyle": "--" if kind.routing == 0 else "-"}
            axes.plot(x, middle, label=kind.label, **style)
            axes.fill_between(x, middle - sd, middle + sd, color=colours[kind.fff], alpha=0.15, linewidth=0)
    panels[0].set_ylim(top=max(highest))
    panels[0].set_xlabel("steps")
    if ms:
        panels[1].set_xlabel("seconds, alone on the GPU")
    panels[0].set_ylabel("loss on masked words of unseen text")
    panels[-1].legend()
    for axes in panels:
        axes.grid(alpha=0.3)
    with atomic_file(path) as new:
        figure.savefig(new, dpi=120)


if __name__ == "__main__":
    main()
