"""How good a model is at a task, and how close to its teacher."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..modes import evaluating
from .data import Collator, Encoded
from .kinds import Embeddings, Task


def evaluate(
    model: Any,
    task: Task,
    data: Encoded,
    tokenizer: Any,
    *,
    teacher: Any = None,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, float]:
    """The metrics of ``task``, where the data is labelled, and with a teacher how far the model agrees with it.

    Agreement is ``agreement`` (share of decisions in which both choose the same; for "regression" Spearman's correlation) and
    ``kl``, the mean of KL(teacher || model) in nats; a decision is a row, a word, a start or an end of an answer, a masked
    token. For embedders it is ``cosine``, ``cosine_p5`` and ``neighbours``.

    Args:
        data: encoded by ``task``, with the model's config.
        teacher: a model with the same tokenizer, on any device; moved to none.

    Raises:
        ValueError: a model without the head, a teacher that does not fit, nothing to measure, or a ``batch_size`` below 1.
        FloatingPointError: an output is not finite.
    """
    task.check_model(model)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be at least 1")
    if teacher is not None:
        task.check_model(teacher)
        check_teacher(model, teacher, task)
    if teacher is None and not data.labelled:
        raise ValueError(f"there is nothing to measure: {task.name} on rows without labels needs a teacher")
    outputs: list[Any] = [None] * len(data)
    compared: list[Any] = [None] * len(data)
    with evaluating(*(m for m in (model, teacher) if m is not None)):
        steps = batches(data, task.collator(tokenizer), batch_size)
        total = -(-len(data) // batch_size)
        for indices, batch in tqdm(steps, total=total, disable=not progress, desc=task.name, unit="batch"):
            have = task.outputs(model, on_device(batch, model), data, indices)
            want = have if teacher is model else None
            if teacher is not None and want is None:
                want = task.outputs(teacher, on_device(batch, teacher), data, indices)
            for place, i in enumerate(indices):
                if data.labelled:
                    outputs[i] = task.reduce(have[place], data[i]).cpu()
                if want is not None:
                    compared[i] = task.compare(have[place], want[place].to(have[place].device)).cpu()
                for kept in (outputs[i], compared[i]):
                    if kept is not None and not bool(kept.isfinite().all()):
                        raise FloatingPointError(f"an output for row {data.row_of[i] + 1} is not finite")
    result = task.score(outputs, data) if data.labelled else {}
    return result | (task.agreement(compared) if teacher is not None else {})


def batches(data: Encoded, collate: Collator, batch_size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Which items, and their batch; the longest first, so that what does not fit into memory is known at once."""
    order = sorted(range(len(data)), key=lambda i: -data.lengths[i])
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, collate([data[i] for i in indices])


def on_device(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}


def check_teacher(model: Any, teacher: Any, task: Task, role: str = "teacher") -> None:
    """Raises ``ValueError`` where a model cannot be compared with a teacher, or whatever ``role`` says that it is."""
    fields = ["vocab_size"]
    if isinstance(task, Embeddings):
        fields.append("hidden_size")
    if task.name in ("classification", "regression", "tokens"):
        fields.append("num_labels")
    for name in fields:
        has, wants = getattr(model.config, name), getattr(teacher.config, name)
        if has != wants:
            raise ValueError(f"{name} differs: {has} in the model, {wants} in the {role}")
    if "num_labels" in fields:
        names = [[m.config.id2label[i] for i in range(m.config.num_labels)] for m in (model, teacher)]
        if names[0] != names[1] and not any(str(n[0]).startswith("LABEL_") for n in names):  # by default
            raise ValueError(f"the labels differ: {names[0]} in the model, {names[1]} in the {role}")
