"""What MiniLM keeps of masked words with trees, small MLPs and no FFNs at all in the place of its FFNs: one teacher, and students of it; a line of JSON a
run, as of tasks_minilm.py.

    python examples/experiments/side_by_side.py --gpus 0 --at-once 4 masked_words.py --model DIR --text train.txt --unseen unseen_long.txt \\
        --work DIR --results tasks_minilm.jsonl

All students are told by the same masks. Processes side by side read the text while one of them trains the teacher, and then make student after student,
the most telling first.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runs import BEGIN, OutOfTime, append, claimed, make_runs
from tasks_table import wait_for

STUDENTS = (
    "8x8-0 mlp:72-0 none-0 1x11-0 8x8-1 mlp:72-1 none-1 8x8-2 mlp:72-2 none-2 32x6-0 mlp:224-0 mlp:12-0"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--unseen", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the teacher is kept")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--students", nargs="+", default=STUDENTS, help="kind-seed, in this order")
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--teacher-batch-size", type=int, default=192)
    parser.add_argument("--calibration-steps", type=int, default=800)
    parser.add_argument("--calibration-batch", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="texts to train on, and to report on, at most")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--muon", action="store_true", help="for the students' attention")
    parser.add_argument("--claims", type=Path, help="folder that processes side by side have in common, a fresh one")
    parser.add_argument("--seconds", type=float, default=1e9, help="no run is begun that would not end by then")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        make_teacher(args)
    except OutOfTime:
        return
    keys = [
        {"name": "mlm", "fff": fff, "seed": int(seed), "teacher_steps": args.teacher_steps, "muon": args.muon or None}
        for fff, _, seed in (student.rpartition("-") for student in args.students)
    ]

    def of(key: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in run(args, key["fff"], key["seed"]).items() if k not in key}

    if make_runs(keys, of, args.results, claims=args.claims, seconds=args.seconds):
        raise SystemExit("not all runs could be made")


def make_teacher(args: argparse.Namespace) -> None:
    """By one of the processes; the others read the text meanwhile, and wait."""
    folder = teacher_of(args)
    made, failed = (folder.with_name(f"{folder.name}.{word}") for word in ("made", "failed"))
    if made.exists():
        return
    if claimed(args.claims, ("teacher", args.teacher_steps)):
        failed.unlink(missing_ok=True)
        try:
            append(args.results, run(args, "dense", 0))
        except BaseException:
            failed.touch()
            raise
        made.touch()
        return
    import tasks_minilm
    from transformers import AutoConfig, AutoTokenizer

    from hf_fff.tasks import get_task

    tokenizer, config = (auto.from_pretrained(args.model) for auto in (AutoTokenizer, AutoConfig))
    tasks_minilm.read(options(args, "none", 0), get_task("mlm"), tokenizer, config)
    wait_for(made, failed, args.claims is not None, BEGIN + args.seconds)


def teacher_of(args: argparse.Namespace) -> Path:
    return args.work / f"mlm-{args.teacher_steps}"


def options(args: argparse.Namespace, fff: str, seed: int) -> argparse.Namespace:
    """What tasks_minilm.py is told."""
    import tasks_minilm

    words = [
        *("--model", args.model, "--teacher", teacher_of(args), "--name", "mlm", "--task", "mlm", "--fff", fff),
        *("--train", *args.text, "--report", *args.unseen, "--seed", seed, "--data-seed", 0, "--held-out-rows", 256),
        *("--teacher-steps", args.teacher_steps, "--teacher-batch-size", args.teacher_batch_size),
        *("--teacher-learning-rate", 5e-4, "--steps", args.steps, "--batch-size", args.batch_size),
        *("--calibration-steps", args.calibration_steps, "--calibration-batch", args.calibration_batch),
        *("--max-tokens", args.max_tokens, *(["--limit", args.limit] if args.limit else [])),
        *["--graphs"] * args.graphs,
        *["--muon"] * args.muon,
    ]
    return tasks_minilm.parser().parse_args([str(word) for word in words])


def run(args: argparse.Namespace, fff: str, seed: int) -> dict[str, Any]:
    import tasks_minilm

    return tasks_minilm.run(options(args, fff, seed))


if __name__ == "__main__":
    main()
