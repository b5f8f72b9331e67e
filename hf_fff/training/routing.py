"""What the trees of a model do while it is trained, as metrics."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from ..models.usage import Watch, visible_of

_ROWS = 16  # of an evaluation's first batch, on which paths are compared
_SETS = 16  # evaluation sets whose paths are kept


class RoutingMetrics(TrainerCallback):
    """Logs, for each layer with trees, beside the loss: ``dead_nodes_3``, the share of layer 3's nodes that no token visited in the
    steps since the last log, and ``visit_entropy_3``, of the leaves' shares of the tokens, in bits, as ``fff_usage`` has both; and
    beside an evaluation's metrics ``eval_agreeing_paths_3``, the share of the paths of its first 16 rows (of each process) that are what they
    were at the last evaluation of the same rows.

    Padding is left out. Visits are counted where the model runs, on its own forward passes, and looked at when something is logged: no
    step waits for a GPU. Several processes count together. Of a layer with several feedforward networks it is their mean, and
    layers that share one are told as the first of them.

    Without trees it logs nothing; under ``DataParallel`` (a bare ``Trainer`` that sees several GPUs) neither, with a warning.
    """

    def __init__(self) -> None:
        self._watch: _Routing | None = None
        self._before: dict[Any, list[Tensor]] = {}  # by the rows that were looked at

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.stop()
        self._before = {}
        if args.n_gpu > 1:
            warnings.warn(
                "RoutingMetrics does not count under DataParallel: start a process a GPU (accelerate launch), or show "
                "it one GPU (CUDA_VISIBLE_DEVICES)",
                stacklevel=2,
            )
            return
        self._watch = _Routing(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._watch is None or not self._watch.layers or logs is None:
            return
        told: dict[str, float] = {}
        if "loss" in logs:
            told = self._told_of_training(self._watch)
        elif name := next((key for key in logs if key.endswith("_runtime") and key != "train_runtime"), None):
            told = self._told_of_evaluation(self._watch, name.removesuffix("_runtime"))
        logs.update(told)
        if state.log_history:  # what the Trainer has kept of these logs already
            state.log_history[-1].update(told)

    def stop(self) -> None:
        """Leaves the model alone."""
        if self._watch is not None:
            self._watch.stop()
        self._watch = None

    def _told_of_training(self, watch: "_Routing") -> dict[str, float]:
        counts = [v.counts for v in watch.every() if v.counts is not None]  # of all layers, or of none
        if not counts:
            return {}
        _sum_over_processes(counts)
        told: dict[str, float] = {}
        for number, found in watch.summary().items():
            told |= {f"dead_nodes_{number}": found["dead"], f"visit_entropy_{number}": found["entropy"]}
        for count in counts:
            count.zero_()  # in its place, where a recorded step goes on counting
        return told

    def _told_of_evaluation(self, watch: "_Routing", prefix: str) -> dict[str, float]:
        rows, ends, masks = watch.rows, watch.ends, watch.masks
        watch.rows = None
        before = self._before.pop(rows, None)
        self._before[rows] = ends
        if len(self._before) > _SETS:
            self._before.pop(next(iter(self._before)))
        # Of each layer how many paths agree, and of how many. A process that has not seen these rows before adds nothing.
        found = torch.zeros(2, len(watch.layers), dtype=torch.int64)
        places = [i for i, some in enumerate(watch.layers.values()) for _ in some]
        for place, now, then, mask in zip(places, ends, before or [], masks, strict=False):
            same = now == then if mask is None else (now == then)[mask]
            found[:, place] += torch.tensor([int(same.sum()), same.numel()])
        counted = found.to(ends[0].device) if ends else found
        _sum_over_processes([counted])
        return {
            f"{prefix}_agreeing_paths_{number}": agreeing / paths
            for number, (agreeing, paths) in zip(watch.layers, counted.T.tolist(), strict=True)
            if paths
        }


class _Routing(Watch):
    """Counts in training; in an evaluation keeps where the tokens of its first rows end."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.rows: Any = None  # what the rows are; None until some were seen
        self.ends: list[Tensor] = []
        self.masks: list[Tensor | None] = []

    def see(self, ends: list[Tensor], mask: Tensor | None) -> None:
        if torch.is_grad_enabled():
            super().see(ends, mask)
        elif self.rows is None:
            self.masks = [visible_of(mask, end) for end in ends]
            self.masks = [None if m is None else m[:_ROWS] for m in self.masks]
            self.ends = [end[:_ROWS] for end in ends]
            inputs = self.inputs.get("input_ids")
            self.rows = b"" if inputs is None else inputs[:_ROWS].cpu().numpy().tobytes()


def _sum_over_processes(counts: list[Tensor]) -> None:
    """In place."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    together = torch.cat([c.flatten() for c in counts])
    dist.all_reduce(together)
    for count, part in zip(counts, together.split([c.numel() for c in counts]), strict=True):
        count.copy_(part.view_as(count))
