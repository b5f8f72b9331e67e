"""What task distillation compares beside hidden states: the logits of a head with the teacher's, and with labels.

All is summed and counted row by row, so that batches of whatever size add up to the same, and multiplied by masks instead of
indexed with them, which would wait for the GPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tasks.data import IGNORED

Inputs = Mapping[str, Tensor]
_NEVER = -1e30  # the logit of what cannot be; minus infinity would make NaN of 0 * (p - q)


def visible(inputs: Inputs) -> Tensor:
    """``[rows, tokens]``, 1 where there is no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.float32) if mask is None else mask.float()


@dataclass(frozen=True)
class Objective:
    """One decision a row, as of a classifier; other heads say what their decisions are.

    Attributes:
        logits: their names among the model's outputs.
        labels: their names in the batch.
        missing: what stands there for no label.
        per_token: whether a row has a label for each token.
        distance: what the distance of the logits is called.
        padding_counts: whether a head's own loss depends on how far a batch is padded, so that ``label_losses`` takes its place.
    """

    logits: tuple[str, ...] = ("logits",)
    labels: tuple[str, ...] = ("labels",)
    missing: float = IGNORED
    per_token: bool = False
    distance: str = "kl"
    padding_counts: bool = False

    def unlabelled(self, tokens: int) -> dict[str, Any]:
        """What a row of so many tokens has in the place of its labels."""
        return {name: [self.missing] * tokens if self.per_token else self.missing for name in self.labels}

    def factor(self, temperature: float) -> float:
        """Of the distance in the loss: with it, gradients hardly depend on the temperature."""
        return temperature**2

    def distances(self, have: Any, want: Any, inputs: Inputs, temperature: float) -> Tensor:
        """``[rows, 3]``, from the outputs of student and teacher: KL(teacher, student) in nats, summed over the decisions that
        count; how many these are; in how many of them the likeliest class is the same."""
        ours, theirs = (self._decisions(out, inputs) for out in (have, want))
        q, p = (F.log_softmax(logits / temperature, -1) for logits in (ours, theirs))
        counts = self._counts(inputs, ours)
        kl, agreeing = (p.exp() * (p - q)).sum(-1), ours.argmax(-1) == theirs.argmax(-1)
        return torch.stack([(kl * counts).sum(1), counts.sum(1), (agreeing * counts).sum(1)], 1)

    def label_losses(self, have: Any, inputs: Inputs) -> Tensor:
        """``[rows, 2]``: the cross entropy, summed over the labels of a row, and how many labels these are."""
        logits, labels = self._decisions(have, inputs), self._labels(inputs)
        if labels is None:
            return logits.new_zeros(len(logits), 2)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
        return torch.stack([loss.view_as(labels).sum(1), (labels != IGNORED).float().sum(1)], 1)

    def _decisions(self, out: Any, inputs: Inputs) -> Tensor:
        """``[rows, decisions, classes]``, the logits in float32."""
        return out[self.logits[0]].float().unsqueeze(1)

    def _labels(self, inputs: Inputs) -> Tensor | None:
        """``[rows, decisions]``."""
        labels = [inputs[name] for name in self.labels if name in inputs]
        return torch.stack(labels, 1) if len(labels) == len(self.labels) else None

    def _counts(self, inputs: Inputs, logits: Tensor) -> Tensor:
        """``[rows, decisions]``, 1 where a decision counts, else 0."""
        return torch.ones_like(logits[..., 0])


class _Tokens(Objective):
    """A decision a token. Where a row has labels, those that have one count, else all that are visible."""

    def _decisions(self, out: Any, inputs: Inputs) -> Tensor:
        return out[self.logits[0]].float()

    def _labels(self, inputs: Inputs) -> Tensor | None:
        return inputs.get(self.labels[0])

    def _counts(self, inputs: Inputs, logits: Tensor) -> Tensor:
        labels = self._labels(inputs)
        if labels is None:
            return visible(inputs)
        known = labels != IGNORED
        return torch.where(known.any(1, keepdim=True), known.float(), visible(inputs))


class _MaskedTokens(_Tokens):
    """A decision a masked token: one that has a label."""

    def _counts(self, inputs: Inputs, logits: Tensor) -> Tensor:
        if self.labels[0] not in inputs:
            raise ValueError("the batch has no labels, which tell what is masked")
        return (inputs[self.labels[0]] != IGNORED).float()


def masked_places(labels: Tensor, most: int) -> Tensor:
    """``[rows, tokens] -> [rows, most]``: where the labels are, and then other places, which have none."""
    return (labels != IGNORED).int().topk(min(most, labels.shape[1]), dim=1).indices


@contextmanager
def logits_at(model: Any, places: Tensor) -> Iterator[None]:
    """Within, a masked-LM model gives logits at ``places``, ``[rows, n]``, alone, as ``[rows, n, vocabulary]``: of one in seven tokens that
    takes a seventh of the time and memory, which at a vocabulary of thirty thousand is most of a step."""

    def gathered(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])), *others

    handle = model.get_output_embeddings().register_forward_pre_hook(gathered)
    try:
        yield
    finally:
        handle.remove()


class _Spans(Objective):
    """Two decisions a row, where a span starts and where it ends; the visible tokens are the classes."""

    def _decisions(self, out: Any, inputs: Inputs) -> Tensor:
        both = torch.stack([out[name] for name in self.logits], 1).float()
        return both.masked_fill(visible(inputs).unsqueeze(1) == 0, _NEVER)


class _Number(Objective):
    """A number a row, of which squared errors are taken: it has no temperature, and no classes to agree on."""

    def factor(self, temperature: float) -> float:
        return 1.0

    def distances(self, have: Any, want: Any, inputs: Inputs, temperature: float) -> Tensor:
        ours, theirs = (self._decisions(out, inputs).flatten() for out in (have, want))
        return torch.stack([(ours - theirs).square(), torch.ones_like(ours), torch.zeros_like(ours)], 1)

    def label_losses(self, have: Any, inputs: Inputs) -> Tensor:
        ours, labels = self._decisions(have, inputs).flatten(), self._labels(inputs)
        labels = torch.full_like(ours, self.missing) if labels is None else labels.flatten().float()
        known = (~labels.isnan()).float()
        error = (ours - labels.nan_to_num(0.0)).square()  # 0 * NaN would be NaN
        return torch.stack([error * known, known], 1)


OBJECTIVES: dict[str, Objective] = {
    "classification": Objective(),
    "regression": _Number(missing=float("nan"), distance="squared_error"),
    "tokens": _Tokens(per_token=True),
    "mlm": _MaskedTokens(per_token=True),
    # transformers' heads let spans start and end in the padding.
    "qa": _Spans(
        logits=("start_logits", "end_logits"), labels=("start_positions", "end_positions"), padding_counts=True
    ),
}


def get_objective(task: str) -> Objective:
    """Raises ``ValueError`` for a task that has no logits, or is not known."""
    if task not in OBJECTIVES:
        raise ValueError(f"task={task!r} has no logits to distil (allowed: {', '.join(OBJECTIVES)})")
    return OBJECTIVES[task]
