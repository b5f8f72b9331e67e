"""What all trainers share: rates of their own for what replaced the FFNs, steps in its units, and an end where a loss is not finite."""

import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..graphs import StepGraphs
from ..layers import FFF, MLP, NoFFN, OutputBias
from ..modes import rounded_rows
from ..tasks.data import IGNORED
from ..tasks.evaluate import on_device
from .arguments import FastArguments
from .checkpoints import SafeCheckpoints, _SeededCollator
from .data import ByLength, check_rows
from .lengths import FewLengths
from .muon import take_orthogonal_steps
from .objectives import OBJECTIVES
from .routing import RoutingMetrics

MEASURED_ROWS = 1024  # on which standard deviations are measured
_LABELS = {"label", "label_ids", *(name for objective in OBJECTIVES.values() for name in objective.labels)}


class FastTrainer(SafeCheckpoints):
    """A ``Trainer`` for models with FFFs, with ``SafeCheckpoints`` and ``RoutingMetrics``. Subclasses fill ``_seen``: for each step its number and, as a tensor on the device, the
    parts by which it is told where a loss is not finite, see ``_place``.

    The loss is a mean over the batch, so that gradient accumulation and processes take means of means. Data sets with an attribute
    ``lengths`` are batched by length, unless ``train_sampling_strategy`` asks for another order.

    Raises:
        ValueError: a data set is empty, ``args.packed_rows`` and a model without trees, ``args.muon`` and shards,
            adapters or float16; as ``SafeCheckpoints``.
        FloatingPointError: from ``train``: the loss is not finite. This is looked at when something is logged or saved, and at
            the end; the last checkpoint is from before.
    """

    args: FastArguments

    def __init__(self, model: Any, args: FastArguments, **kwargs: Any) -> None:
        check_rows("train_dataset", kwargs.get("train_dataset"), 1)
        check_rows("eval_dataset", kwargs.get("eval_dataset"), 1)
        with rounded_rows(model, args.packed_rows):
            pass  # raises where there are no trees
        super().__init__(model, args, **kwargs)
        for wrong, what in (
            (self.is_fsdp_enabled or self.is_deepspeed_enabled, "FSDP and DeepSpeed, which share out matrices"),
            # Its scaler leaves it to a fused Adam to pass over an overflow.
            (self.accelerator.mixed_precision == "fp16", "fp16"),
            (hasattr(model, "peft_config"), "adapters"),
        ):
            if args.muon and wrong:
                raise ValueError(f"muon=True is not for {what}: use muon=False")
        if not any(isinstance(callback, RoutingMetrics) for callback in self.callback_handler.callbacks):
            self.add_callback(RoutingMetrics())
        self.model_accepts_loss_kwargs = False  # some heads take them, and do not heed them
        self._units: dict[nn.Parameter, Tensor] = {}
        self._seen: list[tuple[int, Tensor]] = []  # since the last log
        self._graphs: tuple[FewLengths, StepGraphs] | None = None
        self._graphed = False  # whether steps are to be recorded

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``."""
        self._measure_units()
        self._seen = []
        if self.model_wrapped is self.model:  # after an evaluation, which would keep DDP from being wrapped around it
            unprepare(self.model)
        trained: Any = self.model
        self._graphed = self.args.cuda_graphs and self.args.device.type == "cuda"
        if self.args.cuda_graphs and not self._graphed:
            warnings.warn(f"cuda_graphs=True is for GPUs: on {self.args.device} steps run as usual", stacklevel=2)
        try:
            with self._undisturbed(), rounded_rows(trained, self.args.packed_rows):
                return super().train(*args, **kwargs)
        finally:
            self._graphs, self._graphed = None, False

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As ``Trainer.training_step``."""
        if not self._graphed or len(inputs["input_ids"]) != self.args.train_batch_size:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        if self._graphs is None:
            self._graphs = self._new_graphs(inputs)
        pad, graphs = self._graphs
        before = len(self._seen)

        def run(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            loss: Tensor = super(FastTrainer, self).training_step(model, given, num_items_in_batch)
            return loss, self._seen[-1][1]

        loss, parts = graphs.step(pad(inputs), run)
        self._seen[before:] = [(self.state.global_step + 1, parts)]
        return loss

    def _new_graphs(self, inputs: Mapping[str, Tensor]) -> tuple[FewLengths, StepGraphs]:
        trained: Any = self.model
        config = trained.config
        longest = max(getattr(self.train_dataset, "lengths", None) or [inputs["input_ids"].shape[1]])
        padding = {"input_ids": getattr(config, "pad_token_id", None) or 0, "labels": IGNORED}
        lengths = FewLengths(padding, longest, getattr(config, "max_position_embeddings", None))
        return lengths, StepGraphs(p for p in trained.parameters() if p.requires_grad)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.evaluation_loop``, with rounded rows where there are any in training."""
        trained: Any = self.model
        with rounded_rows(trained, self.args.packed_rows):
            return super().evaluation_loop(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Groups of parameters, those of what replaced the FFNs last, for each rate and where there is a weight decay. Steps of
        the latter are in units in which inputs and outputs have a standard deviation of 1, see ``_measure_units``, where
        ``args.units_of`` says so."""
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
            if self.args.muon:
                take_orthogonal_steps(self.optimizer, self._matrices(own.keys()))
        return self.optimizer

    def _matrices(self, others: Set[nn.Parameter]) -> list[nn.Parameter]:
        """The weights of linear layers that are neither of a head, whose outputs are no hidden states, nor of what replaced the FFNs, whose
        rows are nodes."""
        trained: Any = self.model
        linear = {m.weight for m in trained.base_model.modules() if isinstance(m, nn.Linear)}
        return [p for p in trained.parameters() if p.requires_grad and p in linear and p not in others]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss."""
        if self._seen and ("loss" in logs or "train_loss" in logs):
            mean = self._checked().mean(0)
            if "loss" in logs:
                logs |= self._named(mean)
            self._seen = []
        super().log(logs, start_time)

    def _described(self) -> dict[str, Any]:
        own = {name: getattr(self.args, name) for name in ("fff_learning_rate", "fff_units", "packed_rows")}
        own["muon"] = self.args.muon or None  # as checkpoints have it that know no Muon, nor MLPs without units
        trained: Any = self.model
        plain = self.args.fff_units and not self.args.units_of("mlp")
        plain = plain and any(isinstance(m, MLP) for m in trained.modules())
        own["mlp_units"] = False if plain else None
        return {**super()._described(), **own}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._seen:
            self._checked()
        trained: Any = self.model
        names, parameters = zip(*(pair for pair in trained.named_parameters() if pair[1].requires_grad), strict=True)
        wrong = torch.stack([~_local(p).isfinite().all() for p in parameters]).int()
        found = (
            self.accelerator.gather(wrong.unsqueeze(0)).any(0).nonzero().flatten().tolist()
        )  # the same in all processes
        if found:
            raise FloatingPointError(
                f"after step {self.state.global_step} the weights {names[found[0]]} are not finite"
            )
        super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = getattr(self.train_dataset if train_dataset is None else train_dataset, "lengths", None)
        if lengths is None or self.args.train_sampling_strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        # Of all processes, so that the order does not depend on how many there are.
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByLength(lengths, size, self.args.seed)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """No dropout where none is wanted; what the loss does not reach is frozen, so that DDP does not wait for its gradients."""
        trained: Any = self.model
        dropouts = [] if self._drops_out else [(m, m.p) for m in trained.modules() if isinstance(m, nn.Dropout)]
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

    _drops_out = False  # whether there is dropout in training

    def _unreached(self) -> list[nn.Parameter]:
        """Trainable parameters that nothing in the loss depends on."""
        trained: Any = self.model
        parameters = [p for p in trained.parameters() if p.requires_grad]
        with torch.enable_grad():
            out = trained.eval()(**next(self._first_batches(1)), output_hidden_states=True)
            total = torch.stack([t.float().sum() for t in self._learned_from(out)]).sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is None]

    def _learned_from(self, out: Any) -> list[Tensor]:
        """Which of a model's outputs the loss depends on."""
        raise NotImplementedError

    def _checked(self) -> Tensor:
        """``[steps, parts]``, the parts of the steps since the last log, of all processes. Waits for the GPU."""
        parts = self.accelerator.gather(torch.stack([p for _, p in self._seen])).float().cpu()
        wrong = (~parts.isfinite()).nonzero()
        if len(wrong):
            step, part = min((self._seen[i % len(self._seen)][0], part) for i, part in wrong.tolist())
            raise FloatingPointError(
                f"the loss is not finite at step {step}: {self._place(part)} not finite. "
                "Continue from the last checkpoint with lower learning rates"
            )
        return parts

    def _place(self, part: int) -> str:
        """What a part is of, as in "the logits are"."""
        raise NotImplementedError

    def _named(self, parts: Tensor) -> dict[str, float]:
        """What is logged of the parts, which are means over steps."""
        return {}

    # Units

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

        layers = [m for m in trained.modules() if isinstance(m, (FFF, MLP)) and self.args.units_of(m.kind)]
        encoder = (
            trained if self.is_fsdp_enabled else trained.base_model
        )  # without a head, which may cost more than all else
        handles = [m.register_forward_hook(look) for m in layers]
        try:
            trained.eval()
            for inputs in self._first_batches(MEASURED_ROWS) if layers else ():
                encoder(**inputs)
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
        """The first rows as they lie in the data set, without labels, the same in all processes and however often it is asked."""
        data: Any = self.eval_dataset if self.train_dataset is None else self.train_dataset
        if data is None:
            raise ValueError("there is no train_dataset, on which standard deviations are measured")
        size = self.args.train_batch_size
        items = (data[i] for i in range(len(data))) if hasattr(data, "__len__") else iter(data)
        items = islice(items, rows)
        collate = _SeededCollator(self._get_collator_with_removed_columns(self.data_collator), self.args.seed)
        while part := list(islice(items, size)):  # Accelerate moves a model to its device only when it shards it
            yield on_device(without_labels(self._prepare_inputs(collate(part))), self.model)


def without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in _LABELS}


def _local(p: Any) -> Tensor:
    """A parameter, or the shard of it that this process has."""
    return p.to_local() if hasattr(p, "to_local") else p


def _take_steps_in(units: Mapping[nn.Parameter, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Multiplies an optimizer's steps, those of each parameter by its units."""
    places = {  # not by parameter: FSDP2 puts shards, by rows, where they are
        (g, i): units[p]
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p in units
    }
    before: list[Tensor] = []

    def at(optimizer: torch.optim.Optimizer, g: int, i: int) -> Tensor:
        return _local(optimizer.param_groups[g]["params"][i]).detach()

    def remember(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        before[:] = [at(optimizer, g, i).clone() for g, i in places]

    @torch.no_grad()
    def stretch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for (place, unit), old in zip(places.items(), before, strict=True):
            new = at(optimizer, *place)
            places[place] = unit.to(new.device)
            new.copy_(torch.addcmul(old, new - old, places[place]))
        before.clear()

    if places:
        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(stretch)


def unprepare(model: Any) -> None:
    """Takes away what accelerate leaves on a model: its autocast around ``forward``, and a mark that it is prepared."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(name, None)
