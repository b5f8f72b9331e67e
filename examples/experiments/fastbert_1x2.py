"""FastBERT-1x2 on a subset of GLUE: a dense model, and the same with other FFNs, finetuned on the same rows; a line of JSON a run.

    python examples/experiments/fastbert_1x2.py --model DIR --data DIR --results fastbert_1x2.jsonl            # what is not there yet
    python examples/experiments/fastbert_1x2.py --results fastbert_1x2.jsonl --report                        # page and picture
    python examples/experiments/fastbert_1x2.py --model DIR --data DIR --results try.jsonl --quick           # minutes on a CPU
    python examples/experiments/side_by_side.py --gpus 0 1 --at-once 6 fastbert_1x2.py --model DIR --data DIR --results FILE --bf16

1x2 uses 3 of 7 neurons, 512x2 1536 of 3584; beside each stands an MLP of as many neurons as it uses, and beside all no FFN at all. What
is converted is calibrated on the rows to train on, and then all are finetuned alike, by the preset crammed-finetune (5 epochs of batches of 16, 4e-5).
DATA holds sst2, mrpc, qnli and stsb, each with train.tsv and dev.tsv. Nothing is chosen by what is reported on: the dev rows, after the last epoch.
"""

import argparse
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from runs import make_runs, results, spread

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "results" / "glue-subset.md"
TASKS = {
    "sst2": ("SST-2", "classification", "accuracy"),
    "mrpc": ("MRPC", "classification", "f1"),  # of calling all dev rows paraphrases: 0.812
    "qnli": ("QNLI", "classification", "accuracy"),
    "stsb": ("STS-B", "regression", "spearman"),
}
KINDS = ("dense", "1x2", "mlp:3", "512x2", "mlp:1536", "none")
APART = 0.03  # what FFNs have to be worth for a share of it to be told
KEY = ("model", "task", "fff", "seed", "limit", "quick")  # of a run

HEAD = """# FastBERT-1x2 on a subset of GLUE

Made by `python examples/experiments/fastbert_1x2.py --report` from the JSON lines of its runs; how to run them stands there. {model}; all FFNs
replaced, calibrated on the rows to train on ({steps} steps a layer), then finetuned like the dense model: 5 epochs, batches of 16, learning rate
4e-5 (trees and output biases 0.75 times, MLPs 2.5 times that, in units of their inputs and outputs), cosine, 10 % warm-up, {limit} rows to train on at
most, the same of all seeds{graphs}. Scores on the dev rows after the last epoch, by which nothing was chosen; mean ± standard deviation over seeds, one seed where no
deviation stands. *Kept*: the mean of the share of what the FFNs give, (x - none) / (dense - none), over the tasks on which they give at least
three points ({told}).

"""
TAIL = """
![Scores by what stands in the place of the FFNs]({picture})

{device}, torch {torch}; a run took {seconds}, calibration included, beside others on the same GPU. A score that the model without any FFN
has too says nothing about trees.{missing}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pretrained model, or a repository of the Hub")
    parser.add_argument("--name", help="of the model in the results; its folder's by default")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument(
        "--fff", nargs="+", default=list(KINDS), help="what takes the place of the FFNs; dense leaves them"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--limit", type=int, default=10_000, help="rows to train on at most, the first ones of a shuffle"
    )
    parser.add_argument("--calibration-steps", type=int, default=1000)
    parser.add_argument("--claims", type=Path, help="folder that processes side by side have in common, a fresh one")
    parser.add_argument("--seconds", type=float, default=1e9, help="no run is begun that would not end by then")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; for GPUs")
    parser.add_argument("--graphs", action="store_true", help="steps as CUDA graphs")
    parser.add_argument(
        "--quick", action="store_true", help="64 rows, one epoch, one seed: tells nothing but that it runs"
    )
    parser.add_argument("--report", action="store_true", help="write the page and the picture")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.limit, args.calibration_steps = args.seeds[:1], 64, 5
    if args.report:
        report([row for row in results(args.results) if row["quick"] == args.quick], args.page)
        return
    if not args.model or not args.data:
        parser.error("--model and --data are needed")
    name = args.name or Path(args.model).name
    keys = [
        dict(zip(KEY, (name, task, fff, seed, args.limit, args.quick), strict=True))
        for seed in args.seeds
        for task in args.tasks
        for fff in args.fff
    ]

    def of(key: Mapping[str, Any]) -> dict[str, Any]:
        return run(args, key["task"], key["fff"], key["seed"])

    if make_runs(keys, of, args.results, claims=args.claims, seconds=args.seconds):
        raise SystemExit("not all runs could be made")


def run(args: argparse.Namespace, name: str, fff: str, seed: int) -> dict[str, Any]:
    """Converts, calibrates and finetunes one model; what that gave."""
    import torch
    from transformers.utils import logging

    from hf_fff.surgery import Calibration
    from hf_fff.surgery.folder import ModelFolder
    from hf_fff.surgery.record import read_record
    from hf_fff.surgery.text import shuffled
    from hf_fff.tasks import Columns, read_rows
    from hf_fff.training import TrainingRows, finetuning_arguments, preset, train_folder

    logging.disable_progress_bar()  # of a second, for each model that is read or written
    task, gpu = TASKS[name][1], torch.cuda.is_available()
    train, dev = (read_rows(args.data / name / f"{part}.tsv") for part in ("train", "dev"))
    rows = shuffled(train, 0)[: args.limit]  # the same for all seeds
    columns = Columns(label="score") if task == "regression" else None
    settings = preset("crammed-finetune") | {
        "bf16": args.bf16,
        "cuda_graphs": args.graphs,
        "dataloader_pin_memory": gpu,
    }
    if args.quick:
        settings, dev = settings | {"num_train_epochs": 1}, dev[:100]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that are cut, which the record has
        out = Path(folder, "out")
        # A batch of the evaluation is no part of the preset; a line in the logs waits for the GPU.
        settings |= {"save_strategy": "no", "per_device_eval_batch_size": 128, "logging_steps": 100}
        fixed = {"output_dir": f"{folder}/work", "seed": seed, "use_cpu": not gpu, "disable_tqdm": True}
        plan = Calibration(None, steps=args.calibration_steps, max_tokens=400_000, seed=seed, progress=False)
        trained = train_folder(
            ModelFolder.find(args.model),
            out,
            TrainingRows(task, rows, dev, columns),
            finetuning_arguments(settings, evaluates=False, **fixed),
            fff=None if fff == "dense" else fff,
            calibration=plan,
        )
        fitted = read_record(out).get("calibration") or {}
    told = trained.training_report
    return {
        "scores": {metric: round(value, 4) for metric, value in told.scores.items()},
        "loss": round(told.loss, 4),
        "rows": told.rows,
        "dev_rows": told.evaluated,
        "cut": told.cut,
        "steps": told.steps,
        "calibration_steps": args.calibration_steps if fff != "dense" else None,
        "unexplained": {i: round(value, 3) for i, value in fitted.get("unexplained", {}).items()},
        "bf16": args.bf16,
        "graphs": args.graphs,
        "seconds": round(time.monotonic() - begin, 1),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
    }


def report(rows: list[dict[str, Any]], page: Path) -> None:
    """The table of all runs, and a picture of it."""
    from hf_fff.config import FFFConfig
    from hf_fff.files import atomic_file

    if not rows:
        raise SystemExit("there are no runs to report")
    last = rows[-1]
    rows = [row for row in rows if all(row[name] == last[name] for name in ("model", "limit", "bf16", "device"))]
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        scores[row["fff"], row["task"]].append(row["scores"][TASKS[row["task"]][2]])
    names = {name for name, _ in scores}
    kinds = [kind for kind in KINDS if kind in names] + sorted(names - {*KINDS})
    tasks = [task for task in TASKS if any(t == task for _, t in scores)]

    def kept(kind: str) -> str:
        shares = []
        for task in tasks:
            if all((name, task) in scores for name in (kind, "dense", "none")):
                x, dense, none = (mean(scores[name, task]) for name in (kind, "dense", "none"))
                shares += [(x - none) / (dense - none)] if dense - none >= APART else []
        return f"{mean(shares):.2f}" if shares else "cannot be told"

    wide = [task for task in tasks if {("dense", task), ("none", task)} <= {*scores}]
    wide = [TASKS[task][0] for task in wide if mean(scores["dense", task]) - mean(scores["none", task]) >= APART]
    text = HEAD.format(
        model=last["model"],
        steps=max((row["calibration_steps"] or 0 for row in rows), default=0),
        limit=f"{last['limit']:,}",
        graphs="; bf16, steps recorded as CUDA graphs" if last["bf16"] and last["graphs"] else "",
        told=", ".join(wide) or "none",
    )
    columns = [f"{TASKS[task][0]}, {TASKS[task][2]}" for task in tasks]
    text += f"| | neurons used | seeds | {' | '.join(columns)} | kept |\n|{'---|' * (len(tasks) + 4)}\n"
    for kind in kinds:
        used = "all" if kind == "dense" else str(FFFConfig.from_shorthand(kind).active_nodes)
        cells = [spread(scores[kind, task]) if scores.get((kind, task)) else "not measured" for task in tasks]
        counts = {len(scores.get((kind, task), ())) for task in tasks}
        seeds = "-".join(map(str, sorted({min(counts), max(counts)})))
        text += f"| {kind} | {used} | {seeds} | {' | '.join(cells)} | {kept(kind)} |\n"
    picture = page.with_suffix(".png")
    on = {name: ", ".join(sorted({row[name] for row in rows})) for name in ("device", "torch")}
    times = {kind: median(row["seconds"] for row in rows if row["fff"] == kind) for kind in kinds}
    wanted = 3 * len(KINDS) * len(TASKS)
    text += TAIL.format(
        picture=picture.name,
        seconds=", ".join(f"{seconds:.0f} s ({kind})" for kind, seconds in times.items()),
        missing=f"{wanted - len(rows)} of {wanted} runs, three seeds each, are not made yet."
        if len(rows) < wanted
        else "",
        **on,
    )
    draw(scores, kinds, tasks, picture)
    with atomic_file(page) as new:
        new.write_text(text, encoding="utf-8")


def draw(scores: dict[tuple[str, str], list[float]], kinds: list[str], tasks: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    from hf_fff.files import atomic_file

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, kind in enumerate(kinds):
        there = [(x, scores[kind, task]) for x, task in enumerate(tasks) if scores.get((kind, task))]
        places = [x + 0.1 * (i - (len(kinds) - 1) / 2) for x, _ in there]
        spread = [stdev(v) if len(v) > 1 else 0.0 for _, v in there]
        axes.errorbar(places, [mean(v) for _, v in there], spread, fmt="o", capsize=3, label=kind)
    axes.set_xticks(range(len(tasks)), [f"{TASKS[task][0]}\n{TASKS[task][2]}" for task in tasks])
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylabel("score on the dev rows")
    axes.legend(ncols=3)
    with atomic_file(path) as new:
        figure.savefig(new, dpi=120)


if __name__ == "__main__":
    main()
