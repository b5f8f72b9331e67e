"""How much of the dense model's quality a model keeps, and how sure that is."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..surgery.text import shuffled
from ..tasks import Columns, Encoded, evaluate, get_task

_GROUPS, _IN_A_GROUP = 20, 10
_SOME = 128  # rows on which outputs are compared


@dataclass(frozen=True)
class Quality:
    """A task's main metric on all held-out rows, and on each of some groups of them, drawn at random."""

    value: float
    groups: tuple[float, ...]

    def share(self, dense: "Quality") -> float:
        return self.value / dense.value

    def error(self, dense: "Quality") -> float | None:
        """The standard error of the share's difference from 1, from the differences group by group, which both models have
        in common; None with fewer than five groups."""
        if len(self.groups) < 5:
            return None
        differences = [a - b for a, b in zip(self.groups, dense.groups, strict=True)]
        return statistics.stdev(differences) / math.sqrt(len(differences)) / dense.value


class HeldOut:
    """Rows to decide on, encoded once: all of them, and in random groups of ten rows at least, twenty groups at most.

    Metrics such as F1 or a rank correlation are of many rows together, so that a row has no score of its own. That of a group
    has, whatever the task, and groups cost one more evaluation.

    Raises:
        ValueError: rows that the task cannot read, or that have no labels where it needs some.
    """

    def __init__(
        self,
        task: str,
        rows: Sequence[dict[str, Any]],
        tokenizer: Any,
        config: Any,
        *,
        max_length: int,
        columns: Columns,
        batch_size: int = 32,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.task, self._tokenizer, self._batch_size = get_task(task), tokenizer, batch_size
        self._progress = progress
        rows = shuffled(rows, seed)
        groups = min(_GROUPS, len(rows) // _IN_A_GROUP)

        def encode(some: Sequence[dict[str, Any]]) -> Encoded:
            return self.task.encode(some, tokenizer, config, max_length=max_length, columns=columns, seed=seed)

        self.all = encode(rows)
        if not self.all.labelled and task != "embeddings":
            raise ValueError(f"the rows to decide on have no labels, by which {task} is measured")
        self.groups = [encode(rows[i::groups]) for i in range(groups)] if groups >= 5 else []
        self.some = encode(rows[:_SOME]) if len(rows) > _SOME else self.all

    @property
    def metric(self) -> str:
        return "exp(-loss)" if self.task.name == "mlm" else self.task.main_metric

    def measure(self, model: Any, dense: Any) -> Quality:
        """Of "embeddings" against the dense model's; of "mlm" ``exp(-loss)``, so that the share is the dense model's
        perplexity by the model's."""
        teacher = dense if self.task.name == "embeddings" else None

        def value(data: Encoded) -> float:
            options: dict[str, Any] = {"batch_size": self._batch_size, "progress": self._progress and data is self.all}
            told = evaluate(model, self.task, data, self._tokenizer, teacher=teacher, **options)
            return math.exp(-told["loss"]) if self.task.name == "mlm" else told[self.task.main_metric]

        return Quality(value(self.all), tuple(map(value, self.groups)))

    def distance(self, model: Any, dense: Any) -> float:
        """How far a model's outputs are from the dense one's, on some of the rows and whatever their labels: KL divergence, squared difference
        ("regression") or 1 - cosine ("embeddings"). It tells small changes that no metric of so few rows would show."""
        told = evaluate(model, self.task, self.some, self._tokenizer, teacher=dense, batch_size=self._batch_size)
        return 1 - told["cosine"] if "cosine" in told else told["teacher_mse"] if "teacher_mse" in told else told["kl"]
