"""How to train: the rates of what replaced the FFNs; how to distil, with what was measured to be good for a task; how to finetune."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..config import FFFConfig
from ..ops import ROWS
from .objectives import get_objective

_WEIGHTS = ("hidden_weight", "embedding_weight", "logits_weight", "label_weight")
_FOR_LOGITS = ("logits_weight", "label_weight")


@dataclass
class FastArguments(TrainingArguments):
    """transformers' ``TrainingArguments`` with a rate for what replaced the FFNs, rounded rows, and other defaults.

    Raises:
        ValueError: a rate that is not above 0, rows that are not known; CUDA graphs with accumulated batches or several processes.
    """

    fff_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "For what replaced the FFNs; by default 0.75 times learning_rate for trees and output biases, 2.5 times for MLPs in units "
            "and 6 times for those that have none, and with fff_units off learning_rate; half of that with muon."
        },
    )
    fff_units: bool = field(
        default=True,
        metadata={
            "help": "Train what replaced the FFNs in units of its inputs and outputs; MLPs not where distillation has no task."
        },
    )
    packed_rows: str | None = field(
        default=None,
        metadata={
            "help": "Train and evaluate trees with such rows as they are packed with later, int8 or bf16.",
            "choices": ROWS,
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={"help": "Record a step on a GPU once for each length of the inputs, and replay it."},
    )
    muon: bool = field(
        default=False,
        metadata={
            "help": "Take the steps of the encoder's linear layers, attention's and FFNs that were not replaced, by Muon; wants twice the learning "
            "rate, of which what replaced the FFNs then takes half as much. Not with fp16, FSDP, DeepSpeed or adapters."
        },
    )
    report_to: Any = field(default="none", metadata={"help": "Where to report to."})
    # The filter would hide a loss that is not finite, and wait for the GPU at every step to do so.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN losses out of the logs."})
    # Nothing is unused: what the loss cannot reach is frozen.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Passed to DDP."})

    def __post_init__(self) -> None:
        if self.cuda_graphs and self.accelerator_config is None and self.dataloader_pin_memory:
            # Else a batch waits until the GPU has done the step before.
            self.accelerator_config = {"non_blocking": True}
        super().__post_init__()
        for name in ("learning_rate", "fff_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be above 0")
        if self.packed_rows is not None and self.packed_rows not in ROWS:
            raise ValueError(f"packed_rows={self.packed_rows!r} is not known (allowed: {', '.join(ROWS)}, None)")
        if self.cuda_graphs and (self.gradient_accumulation_steps > 1 or self.world_size > 1):
            raise ValueError(
                "cuda_graphs=True needs gradient_accumulation_steps=1 and one process, not "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} and {self.world_size} processes"
            )

    def units_of(self, kind: str) -> bool:
        """Whether trees (``"tree"``) or MLPs (``"mlp"``) are trained in units of their inputs and outputs."""
        return self.fff_units

    def rate_of(self, kind: str) -> float:
        """The learning rate of what stands in the place of an FFN, ``"tree"`` or ``"mlp"``, or of its output bias."""
        if self.fff_learning_rate is not None:
            return self.fff_learning_rate
        # As measured on MiniLM; MLPs without units at 3e-3, beside 4e-4 and 5e-4 of Adam's and 1e-3 of Muon's.
        times = 1.0 if not self.fff_units else 0.75 if kind != "mlp" else 2.5 if self.units_of(kind) else 6.0
        return times * self.learning_rate / (2 if self.muon else 1)

    def rates_of(self, layers: Iterable[FFFConfig]) -> float | str:
        """Of all that stands in the place of FFNs: a number, or where trees and MLPs have their own, both in words."""
        rates = sorted({self.rate_of(part.kind) for c in layers for part in c.parts} or {self.rate_of("bias")})
        return rates[0] if len(rates) == 1 else " and ".join(f"{rate:g}" for rate in rates)


@dataclass
class FinetuningArguments(FastArguments):
    """``FastArguments`` with what finetuning and pretraining want beside them. All else is transformers' default.

    Raises:
        ValueError: a value out of range.
    """

    routing_gradient: float | None = field(
        default=None,
        metadata={"help": "Of the trees, 0 for none (the paper's training); what the model has by default."},
    )
    dropout: bool = field(default=True, metadata={"help": "Train with the model's dropout."})
    mlm_probability: float = field(default=0.25, metadata={"help": "Share of the tokens that are masked, of mlm."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routing_gradient is not None and not 0 <= self.routing_gradient < math.inf:
            raise ValueError(f"routing_gradient={self.routing_gradient!r} must be a finite number of at least 0")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability={self.mlm_probability!r} must lie between 0 and 1")


@dataclass
class DistillationArguments(FastArguments):
    """``FastArguments`` with the weights of the loss, and other defaults.

    These are the defaults of general distillation, measured with about 8000 tokens a step; see ``arguments_for``, too.

    Raises:
        ValueError: a weight below 0, all of them 0, a rate or temperature that is not above 0, or a share that is none; cropped
            inputs of a task; as ``FastArguments``.
    """

    hidden_weight: float = field(default=0.5, metadata={"help": "Of the hidden states' error in the loss."})
    embedding_weight: float = field(default=10.0, metadata={"help": "Of 1 - cosine of the embeddings in the loss."})
    logits_weight: float = field(
        default=0.0, metadata={"help": "Of temperature**2 * KL(teacher, student), or of the error of a number."}
    )
    label_weight: float = field(default=0.0, metadata={"help": "Of the loss on labels, where there are any."})
    temperature: float = field(default=2.0, metadata={"help": "By which logits are divided for the KL divergence."})
    crop: float = field(
        default=0.0,
        metadata={"help": "Share of the batches whose texts are cropped at random; for distillation without a task."},
    )
    learning_rate: float = field(default=4e-4, metadata={"help": "For all but what replaced the FFNs."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the rates fall."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps in which the rates rise; below 1: a share."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _WEIGHTS:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0")
        if not sum(getattr(self, name) for name in _WEIGHTS) > 0:
            raise ValueError(f"{', '.join(_WEIGHTS)} are all 0: there is nothing to learn")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} must be above 0")
        if not 0 <= self.crop <= 1:
            raise ValueError(f"crop={self.crop!r} must lie between 0 and 1")
        if self.crop and self.needs_task:
            raise ValueError(f"crop={self.crop!r} is for distillation without a task, whose labels are of whole inputs")

    def units_of(self, kind: str) -> bool:
        """As in ``FastArguments``, but for MLPs without a task, which learn better in none (measured on MiniLM, with one not)."""
        return self.fff_units and (kind != "mlp" or self.needs_task)

    @property
    def needs_task(self) -> bool:
        """Whether the loss looks at logits, so that it must be known what they are."""
        return any(getattr(self, name) for name in _FOR_LOGITS)


# What was measured to be good, without a task and with one.
_GENERAL: dict[str, Any] = {"per_device_train_batch_size": 192, "per_device_eval_batch_size": 192}
_TASK: dict[str, Any] = {
    "hidden_weight": 1.0,
    "embedding_weight": 0.0,
    "logits_weight": 2.0,
    "label_weight": 0.5,
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
}
_OWN: dict[str, dict[str, Any]] = {
    "mlm": {"label_weight": 0.0, "learning_rate": 3e-4},
}
_SHORT = 500  # steps


def arguments_for(task: str | None, **overrides: Any) -> DistillationArguments:
    """Good arguments for general distillation (``task=None``), or for that of a task; ``overrides`` come before them.

    With ``muon`` the learning rate is twice as high, but not that of what replaced the FFNs. In fewer than 500 steps it is lower, in
    proportion: the first steps of Adam cost a calibrated model more than it gains, and a short training does not make that good. (8x8, 40
    steps of 32 texts: cosine 0.753 calibrated, 0.772 with rates so lowered, 0.733 with those of a long training.)

    Raises:
        ValueError: a task that has no logits to distil; as ``DistillationArguments``.
    """
    if task is not None:
        get_objective(task)
    usual = _GENERAL if task is None else {**_TASK, **_OWN.get(task, {})}
    found = DistillationArguments(**{**usual, **overrides})
    if "learning_rate" not in overrides:
        found.learning_rate *= min(found.max_steps / _SHORT, 1) if found.max_steps > 0 else 1
        found.learning_rate *= 2 if found.muon else 1
    return found
