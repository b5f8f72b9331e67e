"""From a student, its teacher and data to a trained student: general distillation on texts, and that of a task."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list

from ..memory import memory_explained
from ..modes import rounded_rows
from ..surgery.text import shuffled
from ..tasks import Encoded, evaluate, get_task
from .arguments import DistillationArguments
from .base import unprepare
from .data import TaskMix, TokenisedTexts, check_rows
from .progress import tell_progress
from .trainer import DistillationTrainer, own_parameters, shares_parameters

_HELD_OUT_ROWS = 2048  # more would only cost time


@dataclass
class DistillationReport:
    """What was done, and what it gave on held-out rows, before and after: the mean cosine of the embeddings to the teacher's;
    of a task also its main metric, and the teacher's own. ``undone``: the training had made that worse, so the student is as it
    was before. ``packed_rows``: of the trees, in the training and in all these numbers."""

    rows: int
    held_out: int
    steps: int
    seconds: float
    cosine_before: float
    cosine: float
    loss: float
    undone: bool = False
    packed_rows: str | None = None
    task: str | None = None
    metric: str | None = None
    score_before: float | None = None
    score: float | None = None
    score_teacher: float | None = None


def distil_texts(
    student: Any,
    teacher: Any,
    texts: Sequence[str],
    tokenizer: Any,
    args: DistillationArguments,
    *,
    max_length: int = 128,
    held_out: float = 0.02,
    resume_from_checkpoint: str | None = None,
) -> Any:
    """Trains ``student`` in place and returns it, in evaluation mode; ``student.distillation_report`` says what was reached.

    Args:
        teacher: not changed. Where the student shares parameters with it, as a converted model does with its source, the
            student gets its own.
        texts: unlabelled; shuffled by ``args.seed``, and no more of them are taken than ``args.max_steps`` needs.
        max_length: longer texts are cut, and so are those that are longer than the model takes.
        held_out: share of the texts to evaluate on, at least one of them.
        resume_from_checkpoint: a checkpoint of the same student, texts and args.

    Raises:
        ValueError: too little text; as ``DistillationTrainer``.
        FloatingPointError: as ``DistillationTrainer``.
        RuntimeError: out of memory.

    Warns:
        UserWarning: the training made the student worse on the held-out texts, and is undone.
    """
    train, test = split_texts(texts, args, held_out)
    max_length = length_for(max_length, student)
    data = {
        "train_dataset": TokenisedTexts(train, tokenizer, max_length),
        "eval_dataset": TokenisedTexts(test, tokenizer, max_length),
        "processing_class": tokenizer,
    }
    done = _distil(student, teacher, args, resume_from_checkpoint, **data)
    student.distillation_report = DistillationReport(rows=len(train), held_out=len(test), **done)
    return student.eval()


def distil_task(
    student: Any,
    teacher: Any,
    task: str,
    train: Encoded,
    tokenizer: Any,
    args: DistillationArguments,
    *,
    held_out: Encoded,
    transfer: Encoded | None = None,
    resume_from_checkpoint: str | None = None,
) -> Any:
    """Trains ``student``, head and all, in place, on a ``TaskMix``, and returns it, in evaluation mode;
    ``student.distillation_report`` says what was reached.

    Args:
        teacher: a model with a finetuned head; not changed, and the student gets its own parameters as in ``distil_texts``.
        task: a name of ``objectives.OBJECTIVES``.
        train: labelled rows, encoded by the task.
        args: as ``arguments_for`` gives them, with ``max_steps``.
        held_out: labelled rows to evaluate on.
        transfer: inputs of the same form, encoded by the task, labels or not.
        resume_from_checkpoint: a checkpoint of the same student, data and args.

    Raises:
        ValueError: data that is empty or has no labels, no steps; as ``DistillationTrainer``.
        FloatingPointError: as ``DistillationTrainer``.
        RuntimeError: out of memory.

    Warns:
        UserWarning: the training made the main metric worse on the held-out rows, and is undone.
    """
    length = mixed_rows(args)
    check_rows("the held-out data", held_out, 1)
    if not held_out.labelled:
        raise ValueError("the held-out data has no labels, so that there is nothing to measure")
    data = {
        "task": task,
        "train_dataset": TaskMix(task, train, tokenizer, length, transfer=transfer, seed=args.seed),
        "eval_dataset": held_out,
        "data_collator": get_task(task).collator(tokenizer),
        "processing_class": tokenizer,
    }
    kind = get_task(task)

    def score(model: Any) -> float:
        shown, batch_size = not args.disable_tqdm, args.eval_batch_size
        return evaluate(model, kind, held_out, tokenizer, batch_size=batch_size, progress=shown)[kind.main_metric]

    done = _distil(student, teacher, args, resume_from_checkpoint, score=score, **data)
    told = {"task": task, "metric": kind.main_metric, **done}
    student.distillation_report = DistillationReport(rows=len(train), held_out=len(held_out), **told)
    return student.eval()


def _distil(
    student: Any,
    teacher: Any,
    args: DistillationArguments,
    checkpoint: str | None,
    *,
    score: Callable[[Any], float] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates, trains, and evaluates again: what a report says of that. Undoes a training that made the student worse, as a
    short one does: its first steps cost more than they give."""
    if shares_parameters(student, teacher):
        own_parameters(student)
    start = time.monotonic()
    begun = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
    advice = "the batch size (per_device_train_batch_size) or the maximal length of the inputs"
    with memory_explained("training", advice):
        trainer = DistillationTrainer(student, args, teacher=teacher, **options)
        tell_progress(trainer)
        with rounded_rows(student, args.packed_rows):
            try:
                scores = [score(teacher), score(student)] if score else []
                before = trainer.evaluate()
                done = trainer.train(resume_from_checkpoint=checkpoint)
                after = trainer.evaluate()
            finally:
                unprepare(trainer.model)
            scores += [score(student)] if score else []
    was, now = scores[1:] if scores else (before["eval_cosine"], after["eval_cosine"])
    worse = now < was and after["eval_loss"] > before["eval_loss"]  # a score of few rows alone is noise
    undone = bool(broadcast_object_list([worse])[0])  # scores may differ in the last digit from one GPU to the other
    if undone:
        name = get_task(options["task"]).main_metric if score else "cosine"
        if args.process_index == 0:
            warnings.warn(
                f"{done.global_step} steps made the {name} on held-out rows worse ({was:.4f} before, {now:.4f} after) and are undone: "
                "take more steps, or lower learning rates",
                stacklevel=3,
            )
        student.load_state_dict(begun)
        after, scores = before, [*scores[:2], *scores[1:2]]
    return {
        "steps": done.global_step,
        "seconds": time.monotonic() - start,
        "cosine_before": before["eval_cosine"],
        "cosine": after["eval_cosine"],
        "loss": after["eval_loss"],
        "undone": undone,
        "packed_rows": args.packed_rows,
        **dict(zip(("score_teacher", "score_before", "score"), scores, strict=False)),
    }


def mixed_rows(args: DistillationArguments) -> int:
    """How many rows the training on a task takes; raises ``ValueError`` where there are no steps."""
    if args.max_steps < 1:
        raise ValueError(f"max_steps={args.max_steps} must be at least 1: so many batches are mixed")
    return args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size


def split_texts(texts: Sequence[str], args: DistillationArguments, held_out: float) -> tuple[list[str], list[str]]:
    """What to train on, and what to evaluate on."""
    train, test = split_rows([t for t in texts if t.strip()], args.seed, held_out, "text")
    batch = args.train_batch_size * args.world_size
    check_rows("the text to train on", train, batch)
    if args.max_steps > 0:
        train = train[: args.max_steps * batch * args.gradient_accumulation_steps]
    return train, test


def split_rows(rows: Sequence[Any], seed: int, held_out: float, name: str = "row") -> tuple[list[Any], list[Any]]:
    """All but a share of the rows, in an order that depends on the seed, and that share, which is at least one row.

    Raises:
        ValueError: a share that is none, or no rows.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out!r} must lie between 0 and 1")
    chosen = shuffled(rows, seed)
    if not chosen:
        raise ValueError(f"there is no {name} to distil on")
    count = min(max(1, int(held_out * len(chosen))), _HELD_OUT_ROWS)
    return chosen[count:], chosen[:count]


def length_for(max_length: int, model: Any) -> int:
    """At which length inputs are cut."""
    if max_length < 1:
        raise ValueError(f"max_length={max_length!r} must be at least 1")
    return min(max_length, getattr(model.config, "max_position_embeddings", max_length))
