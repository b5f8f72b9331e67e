"""Distillation: a converted model learns to give what the dense model gives that it comes from.

Calibration fits one layer at a time; here all of them are trained together, attention and embeddings too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import Trainer

from ..layers import FFF, MLP, NoFFN, OutputBias
from ..tasks import get_task
from ..tasks.evaluate import check_teacher
from .arguments import DistillationArguments
from .checkpoints import SafeCheckpoints
from .data import ByLength, check_rows
from .objectives import OBJECTIVES, Objective, get_objective, visible
from .routing import RoutingMetrics

_SCALE_ROWS = 1024  # on which the teacher's standard deviations are measured
_LABELS = {"label", "label_ids", *(name for objective in OBJECTIVES.values() for name in objective.labels)}


class DistillationTrainer(SafeCheckpoints, Trainer):
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
        args._n_gpu = min(args.n_gpu, 1)  # else DataParallel, slower than one GPU; several are for accelerate launch
        self.objective: Objective | None = _objective(task, model, teacher) if args.needs_task else None
        check_rows("train_dataset", kwargs.get("train_dataset"), args.train_batch_size * args.world_size)
        check_rows("eval_dataset", kwargs.get("eval_dataset"), 1)
        super().__init__(model=model if self.objective else model.base_model, args=args, **kwargs)
        _check_whole(model, self)
        if not any(isinstance(callback, RoutingMetrics) for callback in self.callback_handler.callbacks):
            self.add_callback(RoutingMetrics())
        self.student = model
        self.teacher = (teacher if self.objective else teacher.base_model).to(args.device).eval()
        self._watched: Any = self.teacher
        if args.torch_compile:  # the student is Accelerate's to compile
            backend: Any = args.torch_compile_backend
            self._watched = torch.compile(self.teacher, backend=backend, mode=args.torch_compile_mode)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        self._scales: list[Tensor] = []  # [H] for each layer
        self._units: dict[nn.Parameter, Tensor] = {}
        self._seen: list[tuple[int, Tensor]] = []  # step and parts of the loss, since the last log

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``."""
        self._measure_scales()
        self._measure_units()
        self._seen = []
        if self.model_wrapped is self.model:  # after an evaluation, which would keep DDP from being wrapped around it
            unprepare(self.model)
        with self._undisturbed():
            return super().train(*args, **kwargs)

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

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Groups of parameters, those of what replaced the FFNs last, for each rate and where there is a weight decay. Steps of
        the latter are in units in which inputs and outputs have a standard deviation of 1, see ``_measure_units``."""
        if self.optimizer is None:
            model = self.model if model is None else model
            own = {
                p: self.args.rate_of(getattr(m, "kind", "bias"))
                for m in model.modules()
                if isinstance(m, (FFF, MLP, NoFFN, OutputBias))
                for p in m.parameters()
            }
            decayed = set(self.get_decay_parameter_names(model)) if self.args.weight_decay else set()
            groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
            for name, p in model.named_parameters():
                if p.requires_grad:
                    key = (p in own, own.get(p, self.args.learning_rate), name in decayed)
                    groups.setdefault(key, []).append(p)
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(
                [
                    {
                        "params": groups[key],
                        "lr": key[1],
                        "weight_decay": self.args.weight_decay if key[2] else 0.0,
                    }
                    for key in sorted(groups)
                ],
                **options,
            )
            _take_steps_in(self._units, self.optimizer)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss."""
        if self._seen and ("loss" in logs or "train_loss" in logs):
            mean = self._checked().mean(0)
            if "loss" in logs:
                logs |= self._named(mean)
            self._seen = []
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the student with its head; checkpoints hold what is trained alone."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save and self.student is not self.model:
            self.student.save_pretrained(output_dir or self.args.output_dir)

    def _described(self) -> dict[str, Any]:
        names = (
            "fff_learning_rate",
            "hidden_weight",
            "embedding_weight",
            "logits_weight",
            "label_weight",
            "temperature",
        )
        return {**super()._described(), **{name: getattr(self.args, name) for name in names}}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._seen:
            self._checked()
        trained: Any = self.model
        for name, p in trained.named_parameters():
            if p.requires_grad and not bool(p.isfinite().all()):
                raise FloatingPointError(f"after step {self.state.global_step} the weights {name} are not finite")
        super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = getattr(self.train_dataset if train_dataset is None else train_dataset, "lengths", None)
        if lengths is None:
            return super()._get_train_sampler(train_dataset)
        # Of all processes, so that the order does not depend on how many there are.
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByLength(lengths, size, self.args.seed)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """No dropout; what the loss does not reach is frozen, so that DDP does not wait for its gradients."""
        trained: Any = self.model
        dropouts = [(m, m.p) for m in trained.modules() if isinstance(m, nn.Dropout)]
        for module, _ in dropouts:
            module.p = 0.0
        frozen = self._unreached()
        for p in frozen:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for module, rate in dropouts:
                module.p = rate
            for p in frozen:
                p.requires_grad_(True)

    def _unreached(self) -> list[nn.Parameter]:
        """Trainable parameters that nothing in the loss depends on."""
        trained: Any = self.model
        parameters = [p for p in trained.parameters() if p.requires_grad]
        with torch.enable_grad():
            out = trained.eval()(**next(self._first_batches(1)), output_hidden_states=True)
            logits = [out[name] for name in self.objective.logits] if self.objective else []
            total = sum(t.float().sum() for t in (*out.hidden_states, _last(out), *logits))
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is None]

    def _checked(self) -> Tensor:
        """``[steps, parts]``, the parts of the losses since the last log, of all processes. Waits for the GPU."""
        parts = self.accelerator.gather(torch.stack([p for _, p in self._seen])).float().cpu()
        wrong = (~parts.isfinite()).nonzero()
        if len(wrong):
            step, part = min((self._seen[i % len(self._seen)][0], part) for i, part in wrong.tolist())
            layers = len(self._scales)
            place = (
                f"layer {part} is the first whose hidden state is"
                if part < layers
                else "the embedding is"
                if part == layers
                else "the logits are"
            )
            raise FloatingPointError(
                f"the loss is not finite at step {step}: {place} not finite. "
                "Continue from the last checkpoint with lower learning rates"
            )
        return parts

    # What is compared

    def _compare(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """``[rows, layers + 2]``: each row's error summed over its visible tokens, after each layer; how many tokens these
        are; the cosine. With a task, five columns more: its objective's. And the student's outputs."""
        given = _without_labels(inputs)
        if self.args.torch_compile:  # once for all shapes
            for value in given.values():
                torch._dynamo.maybe_mark_dynamic(value, (0, 1))
        with torch.no_grad(), self.accelerator.autocast():
            want = self._watched(**given, output_hidden_states=True)
        have = model(**given, output_hidden_states=True)
        seen = visible(given)
        errors = [
            (((h.float() - w.float()) / scale).square().mean(-1) * seen).sum(1)
            for h, w, scale in zip(have.hidden_states[1:], want.hidden_states[1:], self._scales, strict=True)
        ]
        a, b = (_pooled(_last(out), seen) for out in (have, want))
        cosine = F.cosine_similarity(a, b, dim=-1)
        rows = torch.stack([*errors, seen.sum(1), cosine], 1)
        if self.objective:
            distances = self.objective.distances(have, want, inputs, self.args.temperature)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.args.label_weight > 0):
                losses = self.objective.label_losses(have, inputs)
            rows = torch.cat([rows, distances, losses], 1)
        return rows, have

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
        for inputs in self._first_batches(_SCALE_ROWS):
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

    @torch.no_grad()
    def _measure_units(self) -> None:
        """In which units the parameters of what replaced the FFNs are trained: as if its inputs and its outputs had a standard
        deviation of 1 in every dimension. A few dimensions of a BERT's hidden states are far larger than the others, and Adam's
        steps are of one size in all: they would turn every node's decision by those few."""
        trained: Any = self.model
        sums: dict[Any, Tensor] = {}  # [2, 3, H]: of inputs and outputs; count, sum and sum of squares

        def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            both = torch.stack([inputs[0].flatten(0, -2), output.flatten(0, -2)]).double()
            seen = torch.stack([torch.ones_like(both).sum(1), both.sum(1), both.square().sum(1)], 1)
            sums[module] = sums.get(module, 0) + seen

        layers = [m for m in trained.modules() if isinstance(m, (FFF, MLP))]
        handles = [m.register_forward_hook(look) for m in layers]
        try:
            trained.eval()
            for inputs in self._first_batches(_SCALE_ROWS):
                trained(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        for module, seen in sums.items():
            count, total, squares = seen.unbind(1)
            spread = (squares / count - (total / count).square()).clamp_min(0).sqrt()
            spread = torch.maximum(spread, 0.01 * spread.median(1, keepdim=True).values).clamp_min(1e-6).float()
            outputs = spread[1].clamp_min(0.1 * float(spread[0].median()))  # one that gives nothing yet has to learn to
            self._units |= {module.weight_in: 1 / spread[0], module.weight_out: outputs}

    def _first_batches(self, rows: int) -> Iterator[dict[str, Any]]:
        """The first rows as they lie in the data set, the same in all processes and however often it is asked."""
        data: Any = self.eval_dataset if self.train_dataset is None else self.train_dataset
        if data is None:
            raise ValueError("there is no train_dataset, on which the teacher's standard deviations are measured")
        size = self.args.train_batch_size
        items = (data[i] for i in range(len(data))) if hasattr(data, "__len__") else iter(data)
        items = islice(items, rows)
        collate = self._get_collator_with_removed_columns(self.data_collator)
        while part := list(islice(items, size)):
            yield _without_labels(self._prepare_inputs(collate(part)))

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
        output: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
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


def _without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in _LABELS}


def _last(out: Any) -> Tensor:
    """The last hidden state, which models with heads give only among all of them."""
    last: Tensor = out.hidden_states[-1] if getattr(out, "last_hidden_state", None) is None else out.last_hidden_state
    return last


def _pooled(hidden: Tensor, seen: Tensor) -> Tensor:
    """``[rows, tokens, H] -> [rows, H]``."""
    return (hidden.float() * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True).clamp_min(1)


def _take_steps_in(units: Mapping[nn.Parameter, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Multiplies an optimizer's steps, those of each parameter by its units."""
    trained = {p: unit for p, unit in units.items() if p.requires_grad}
    before: dict[nn.Parameter, Tensor] = {}

    def remember(*_: Any) -> None:
        before.update({p: p.detach().clone() for p in trained})

    @torch.no_grad()
    def stretch(*_: Any) -> None:
        for p, unit in trained.items():
            p.copy_(torch.addcmul(before[p], p - before[p], unit))
        before.clear()

    if trained:
        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(stretch)


def unprepare(model: Any) -> None:
    """Takes away what accelerate leaves on a model: its autocast around ``forward``, and a mark that it is prepared."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(name, None)


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
        raise ValueError(
            f"distillation does not run under {how}: it trains what replaced the FFNs in units of its inputs and outputs, and needs "
            "whole parameters in each process. Use DDP (see examples/accelerate)"
        )


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
