"""Distillation: a converted model learns to give what the dense model gives that it comes from.

Calibration fits one layer at a time; here all of them are trained together, attention and embeddings too.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ..tasks import get_task
from ..tasks.evaluate import check_teacher
from .arguments import DistillationArguments
from .base import MEASURED_ROWS, FastTrainer, without_labels
from .data import Cropping, check_rows
from .objectives import OBJECTIVES, Objective, get_objective, logits_at, masked_places, visible
from .processes import not_sharded


class DistillationTrainer(FastTrainer):
    """Trains a student to give the hidden states of a teacher, and its embeddings (general distillation) or the logits of its
    head (distillation of a task).

    The loss of a batch is ``hidden_weight * hidden + embedding_weight * (1 - cosine)``. ``hidden`` is the mean over layers,
    visible tokens and dimensions of the squared difference of the hidden states after a layer, each dimension divided by the
    standard deviation that it has in the teacher (measured once, on the first rows, before the first step). ``cosine`` is the
    mean, over rows, of the cosine of the mean-pooled last hidden states. Both are logged; ``evaluate`` gives ``eval_loss``,
    ``eval_cosine`` and ``eval_hidden`` of the whole set, whatever the batch size.

    Only ``student.base_model`` is trained, and ``trainer.model`` and checkpoints are that base model: a head is left as it is
    (one that is tied to the embeddings moves with them), and so is the pooler, which the loss does not reach. ``save_model``
    saves the student with its head. There is no dropout in training, which to a regression is only noise.

    With ``logits_weight`` or ``label_weight`` above 0, the whole student is trained, with its head, and the loss gets
    ``logits_weight * temperature**2 * kl + label_weight * label_loss``. ``kl`` is the mean over the positions that count of
    KL(teacher, student), both at that temperature; of a regression it is the squared error of the logits instead, which is
    called ``squared_error`` and has no temperature. ``label_loss`` is the cross entropy (the squared error) where there are
    labels: a label of -100 (NaN) is none. Both are logged, and ``evaluate`` gives them too, with ``eval_agreement``, the share
    of the positions where the likeliest class is the teacher's.

    Args:
        model: the student, with any head.
        teacher: the dense model, with any head. It is put in evaluation mode and moved to the student's device.
        args: how to train.
        task: where the logits are and which positions count, a name of ``objectives.OBJECTIVES``; needed, and looked at, only
            where the loss looks at logits.
        train_dataset, eval_dataset: rows with ``input_ids`` and, where there is padding, ``attention_mask``; labels are looked
            at with a task alone. With an attribute ``lengths``, rows of similar length are batched together.
        kwargs: as ``Trainer``; with ``processing_class=tokenizer``, batches are padded as they are made.

    Raises:
        ValueError: student and teacher differ in shape or share parameters, a data set is too small, the loss looks at logits
            and there is no task, or a model has no head for it; it would run under FSDP or DeepSpeed; from ``train`` as
            ``SafeCheckpoints``.
        FloatingPointError: from ``train``: the loss is not finite. This is looked at when something is logged or saved, and at
            the end; the last checkpoint is from before.
    """

    args: DistillationArguments

    def __init__(
        self,
        model: Any,
        args: DistillationArguments | None = None,
        *,
        teacher: Any,
        task: str | None = None,
        **kwargs: Any,
    ) -> None:
        args = DistillationArguments() if args is None else args
        if not isinstance(args, DistillationArguments):
            raise ValueError(f"args must be DistillationArguments, not {type(args).__name__}")
        _check_whole(model)
        _check_pair(model, teacher)
        self.objective: Objective | None = _objective(task, model, teacher) if args.needs_task else None
        check_rows("train_dataset", kwargs.get("train_dataset"), args.train_batch_size * args.world_size)
        super().__init__(model if self.objective else model.base_model, args, **kwargs)
        _check_whole(model, self)
        self.student = model
        self.teacher = (teacher if self.objective else teacher.base_model).to(args.device).eval()
        self._watched: Any = self.teacher
        if args.torch_compile:  # the student is Accelerate's to compile
            backend: Any = args.torch_compile_backend
            self._watched = torch.compile(self.teacher, backend=backend, mode=args.torch_compile_mode)
        self._scales: list[Tensor] = []  # [H] for each layer

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``."""
        self._measure_scales()
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """As ``Trainer`` has it, with batches that are cropped, where they are to be."""
        collate: Any = self.data_collator
        if self.args.crop:
            self.data_collator = Cropping(collate, self.args.crop)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, a scalar."""
        rows, outputs = self._compare(model, inputs)
        parts = _parts(rows, len(self._scales))
        if torch.is_grad_enabled():
            self._seen.append((self.state.global_step + 1, parts.detach()))
        loss = self._weighted(parts)
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the student with its head; checkpoints hold what is trained alone."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save and self.student is not self.model:
            self.student.save_pretrained(output_dir or self.args.output_dir)

    def _described(self) -> dict[str, Any]:
        names = ("hidden_weight", "embedding_weight", "logits_weight", "label_weight", "temperature", "crop")
        return {**super()._described(), **{name: getattr(self.args, name) for name in names}}

    def _learned_from(self, out: Any) -> list[Tensor]:
        logits = [out[name] for name in self.objective.logits] if self.objective else []
        return [*out.hidden_states, _last(out), *logits]

    def _place(self, part: int) -> str:
        layers = len(self._scales)
        if part < layers:
            return f"layer {part} is the first whose hidden state is"
        return "the embedding is" if part == layers else "the logits are"

    # What is compared

    def _compare(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """``[rows, layers + 2]``: each row's error summed over its visible tokens, after each layer; how many tokens these
        are; the cosine. With a task, five columns more: its objective's. And the student's outputs."""
        given = without_labels(inputs)
        if self.args.torch_compile:  # once for all shapes
            for value in given.values():
                torch._dynamo.maybe_mark_dynamic(value, (0, 1))
        places = self._masked(inputs)
        with ExitStack() as narrowed:
            if places is not None:
                inputs = {**inputs, "labels": inputs["labels"].gather(1, places)}
                for one in (self.teacher, self.student):
                    narrowed.enter_context(logits_at(one, places))
            with torch.no_grad(), self.accelerator.autocast():
                want = self._watched(**given, output_hidden_states=True)
            have = model(**given, output_hidden_states=True)
        if places is not None:
            for out in (have, want):
                if out["logits"].shape[1] != places.shape[1]:  # a head that does not call its output embeddings
                    out["logits"] = out["logits"].gather(1, places[..., None].expand(-1, -1, out["logits"].shape[-1]))
        seen = visible(given)
        # All layers at once: fewer kernels to launch.
        apart = torch.stack(have.hidden_states[1:]).float() - torch.stack(want.hidden_states[1:]).float()
        errors = ((apart / torch.stack(self._scales)[:, None, None]).square().mean(-1) * seen).sum(2)
        a, b = (_pooled(_last(out), seen) for out in (have, want))
        cosine = F.cosine_similarity(a, b, dim=-1)
        rows = torch.cat([errors.T, seen.sum(1, keepdim=True), cosine.unsqueeze(1)], 1)
        if self.objective:
            distances = self.objective.distances(have, want, inputs, self.args.temperature)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.args.label_weight > 0):
                losses = self.objective.label_losses(have, inputs)
            rows = torch.cat([rows, distances, losses], 1)
        return rows, have

    def _masked(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Where the logits of a masked-LM step are looked at; None where they are to be everywhere."""
        share = getattr(self.train_dataset, "masked_share", None)
        if share is None or not torch.is_grad_enabled() or self.args.torch_compile:
            return None
        if not all(isinstance(model.get_output_embeddings(), nn.Linear) for model in (self.teacher, self.student)):
            return None
        tokens = inputs["labels"].shape[1]
        most = math.ceil(share * tokens) + 1
        return masked_places(inputs["labels"], most) if most < tokens else None

    def _weighted(self, parts: Tensor) -> Tensor:
        args, layers = self.args, len(self._scales)
        loss = args.hidden_weight * parts[:layers].mean() + args.embedding_weight * parts[layers]
        if self.objective and args.logits_weight:
            loss = loss + args.logits_weight * self.objective.factor(args.temperature) * parts[layers + 1]
        if self.objective and args.label_weight:
            loss = loss + args.label_weight * parts[layers + 2]
        return loss

    def _named(self, parts: Tensor) -> dict[str, float]:
        layers = len(self._scales)
        named = {"hidden": float(parts[:layers].mean()), "cosine": 1 - float(parts[layers])}
        if self.objective:
            named |= {self.objective.distance: float(parts[layers + 1]), "label_loss": float(parts[layers + 2])}
        return named

    @torch.no_grad()
    def _measure_scales(self) -> None:
        """Standard deviations of the teacher's hidden states, at least a hundredth of their layer's median, so that a
        dimension that hardly varies does not fill the loss."""
        if self._scales:
            return
        shifts: list[Tensor] = []  # about the means, for the sake of float32
        count, sums, squares = torch.zeros(3, device=self.args.device).unbind()
        for inputs in self._first_batches(MEASURED_ROWS):
            states = self.teacher(**inputs, output_hidden_states=True).hidden_states[1:]
            seen = visible(inputs)
            if not shifts:
                shifts = [_pooled(h.flatten(0, 1)[None], seen.flatten()[None])[0] for h in states]
            moved = torch.stack(
                [(h.float() - shift) * seen.unsqueeze(-1) for h, shift in zip(states, shifts, strict=True)]
            )
            count = count + seen.sum()
            sums = sums + moved.sum((1, 2))
            squares = squares + moved.square().sum((1, 2))
        if not shifts:
            raise ValueError("the data set is empty")
        spread = ((squares / count) - (sums / count).square()).clamp_min(0).sqrt()
        self._scales = list(torch.maximum(spread, 0.01 * spread.median(1, keepdim=True).values).clamp_min(1e-6))

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ``Trainer.evaluate``; see the class for what it gives."""
        self._measure_scales()
        return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the place of logits, what ``evaluation_loop`` makes the metrics of: see ``_compare``."""
        with torch.no_grad():
            return None, self._compare(model, self._prepare_inputs(inputs))[0], None

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows, layers = torch.as_tensor(output.predictions).double(), len(self._scales)
        parts = _parts(rows, layers)
        values = {"loss": float(self._weighted(parts)), **self._named(parts)}
        if self.objective:
            _, positions, agreeing, _, labels = rows[:, layers + 2 :].sum(0).tolist()
            if self.objective.distance == "kl" and positions:
                values["agreement"] = agreeing / positions
            if not labels:
                del values["label_loss"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output


def _parts(rows: Tensor, layers: int) -> Tensor:
    """What ``_compare`` gives ``-> [layers + 1]``: the mean error after each layer, and 1 - cosine; with a task
    ``[layers + 3]``: the means of the distance of the logits and of the loss on labels, too."""
    parts = [rows[:, :layers].sum(0) / rows[:, layers].sum(), 1 - rows[:, layers + 1 : layers + 2].mean(0)]
    if rows.shape[1] > layers + 2:
        distance, positions, _, loss, labels = rows[:, layers + 2 :].sum(0).split(1)
        parts += [distance / positions.clamp_min(1), loss / labels.clamp_min(1)]
    return torch.cat(parts)


def _last(out: Any) -> Tensor:
    """The last hidden state, which models with heads give only among all of them."""
    last: Tensor = out.hidden_states[-1] if getattr(out, "last_hidden_state", None) is None else out.last_hidden_state
    return last


def _pooled(hidden: Tensor, seen: Tensor) -> Tensor:
    """``[rows, tokens, H] -> [rows, H]``."""
    return (hidden.float() * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True).clamp_min(1)


def shares_parameters(student: nn.Module, teacher: nn.Module) -> bool:
    storages = {p.untyped_storage().data_ptr() for p in student.parameters() if p.numel()}
    return any(p.untyped_storage().data_ptr() in storages for p in teacher.parameters() if p.numel())


def own_parameters(model: nn.Module) -> None:
    """Gives a model parameters that it shares with no other; those that are tied in it stay tied."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, new.setdefault(id(p), nn.Parameter(p.detach().clone(), p.requires_grad)))


def _check_pair(student: Any, teacher: Any) -> None:
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        has, wants = getattr(student.config, name), getattr(teacher.config, name)
        if has != wants:
            raise ValueError(f"{name} differs: {has} in the student, {wants} in the teacher")
    if shares_parameters(student, teacher):
        raise ValueError(
            "student and teacher share parameters, as a converted model does with its source: the teacher would move with "
            "the student, and the loss would fall falsely. Give teacher=copy.deepcopy(teacher)"
        )


def _check_whole(student: Any, trainer: Any = None) -> None:
    """Raises ``ValueError`` where each process holds a part of the parameters."""
    how = "fully_shard" if any(isinstance(p, DTensor) for p in student.parameters()) else None
    if trainer is not None:
        how = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else how
    if how:
        raise ValueError(not_sharded(how))


def _objective(task: str | None, student: Any, teacher: Any) -> Objective:
    if task is None:
        raise ValueError(
            "logits_weight and label_weight need a task, which says what the logits are "
            f"(allowed: {', '.join(OBJECTIVES)})"
        )
    objective = get_objective(task)
    for model in (student, teacher):
        get_task(task).check_model(model)
    check_teacher(student, teacher, get_task(task))
    return objective
