"""What MiniLM keeps of eight tasks with trees, small MLPs and no FFNs at all in the place of its FFNs, by task distillation; a line of JSON a run.

    python examples/experiments/tasks_table.py --model DIR --data DIR --work DIR --results tasks_table.jsonl
    python examples/experiments/side_by_side.py --gpus 0 1 --at-once 6 tasks_table.py --model DIR --data DIR --work DIR --results FILE

Each seed has its own teacher, finetuned first (fff: dense), and students of it, by tasks_minilm.py with the options below. Teachers lie in
WORK; one that has its line but is no longer there is finetuned again. The page docs/results/quality.md has the table (quality_report.py).
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runs import BEGIN, OutOfTime, claimed, make_runs, results

KINDS = ("8x8", "mlp:72", "none")
# Name -> kind of task, rows to train on, rows to report on, and what else tasks_minilm.py is told. Teachers of
# few rows take more epochs.
TASKS: dict[str, tuple[str, str, str, list[str]]] = {
    "qa": ("qa", "squad/train.jsonl", "squad/test_xquad_en.jsonl", ["--max-length", "256", "--epochs", "5"]),
    "mnli": ("classification", "mnli/train.tsv", "mnli/dev_matched.tsv", ["--transfer", "snli/train.tsv"]),
    "wnut17": ("tokens", "wnut17/train.jsonl", "wnut17/test.jsonl", ["--epochs", "8"]),
    "mrpc": (
        "classification",
        "mrpc/train.tsv",
        "mrpc/test.tsv",
        ["--transfer", "qqp/train.tsv", "snli/train.tsv", "--epochs", "5"],
    ),
    "sst2": ("classification", "sst2/train.tsv", "sst2/test.tsv", []),
    "qnli": ("classification", "qnli/train.tsv", "qnli/dev.tsv", []),
    "stsb": ("regression", "stsb/train.tsv", "stsb/test.tsv", ["--epochs", "5"]),
    "mlm": (
        "mlm",
        "text/train.txt",
        "text/unseen_long.txt",
        [
            "--teacher-steps",
            "500",
            "--teacher-batch-size",
            "128",
            "--teacher-learning-rate",
            "5e-4",
            "--batch-size",
            "64",
        ],
    ),
}
FILES = (".tsv", ".jsonl", ".txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--fff", nargs="+", default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=10_000, help="rows to train on")
    parser.add_argument("--report-limit", type=int, default=3000, help="rows to report on")
    parser.add_argument("--steps", type=int, default=600, help="of the distillation")
    parser.add_argument("--calibration-steps", type=int, default=400)
    parser.add_argument("--graphs", action="store_true", help="steps of the distillation as CUDA graphs")
    parser.add_argument("--claims", type=Path, help="folder that processes side by side have in common, a fresh one")
    parser.add_argument("--seconds", type=float, default=1e9, help="no run is begun that would not end by then")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    def keys_of(seed: int, kinds: list[str]) -> list[dict[str, Any]]:
        made = {"seed": seed, "limit": args.limit, "asked_steps": args.steps}
        return [{"name": name, "fff": fff} | made for fff in kinds for name in args.tasks]

    # Seed after seed, and teachers a seed ahead, so that few students wait for theirs.
    teachers = [keys_of(seed, ["dense"]) for seed in args.seeds]
    students = [keys_of(seed, args.fff) for seed in args.seeds]
    keys = [key for wave in zip([*teachers[1:], []], students, strict=True) for part in wave for key in part]
    keys = teachers[0] + keys

    def of(key: Mapping[str, Any]) -> dict[str, Any]:
        return run(args, key["name"], key["fff"], key["seed"])

    if make_runs(keys, of, args.results, claims=args.claims, seconds=args.seconds):
        raise SystemExit("not all runs could be made")


def run(args: argparse.Namespace, name: str, fff: str, seed: int) -> dict[str, Any]:
    import tasks_minilm

    task, train, report, more = TASKS[name]
    teacher = args.work / f"{name}-{seed}"
    made, failed = (teacher.with_name(f"{teacher.name}.{word}") for word in ("made", "failed"))

    def make(fff: str) -> dict[str, Any]:
        words = [
            *("--model", args.model, "--teacher", teacher, "--name", name, "--task", task, "--fff", fff),
            *("--train", args.data / train, "--report", args.data / report, "--seed", seed),
            *("--limit", args.limit, "--report-limit", args.report_limit, *["--graphs"] * args.graphs),
            *("--steps", args.steps, "--calibration-steps", args.calibration_steps),
            *(args.data / word if word.endswith(FILES) else word for word in more),
        ]
        return tasks_minilm.run(tasks_minilm.parser().parse_args([str(word) for word in words]))

    def make_teacher() -> dict[str, Any]:
        failed.unlink(missing_ok=True)
        try:
            told = make("dense")
        except Exception:
            failed.touch()
            raise
        made.touch()
        return told

    if fff == "dense":
        told = make_teacher()
    else:
        # A teacher that is being made has its line after its mark, so that a line without a mark is an earlier session's.
        known = any((row["name"], row["fff"], row["seed"]) == (name, "dense", seed) for row in results(args.results))
        if known and not made.exists() and claimed(args.claims, ("teacher", name, seed)):
            make_teacher()
        wait_for(made, failed, args.claims is not None, BEGIN + args.seconds)
        told = make(fff)
    return {k: v for k, v in told.items() if k not in ("name", "fff", "seed", "limit")}


def wait_for(made: Path, failed: Path, others: bool, until: float) -> None:
    """Until another process has made a teacher, at the latest until that time; ``others`` says whether there may be one."""
    while not made.exists():
        if failed.exists() or not others:
            raise RuntimeError(f"there is no teacher {made.stem} in {made.parent}, where its run should have left it")
        if time.monotonic() > until:
            raise OutOfTime
        time.sleep(0.5)


if __name__ == "__main__":
    main()
