"""Which neurons of its trees a model uses."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..layers import FFF
from ..modes import evaluating
from .families import FFNInterface


class Visits:
    """How many tokens end in each leaf of one FFF's trees, which tells the visits of all nodes. Nothing waits for a GPU before
    ``summary``."""

    def __init__(self, ffn: FFF) -> None:
        self.ffn = ffn
        self._leaves = (ffn.config.tree_nodes + 1) // 2
        self.counts: Tensor | None = None  # int64 [trees, leaves]
        self._seen: list[Tensor] = []

    def see(self, path: Tensor) -> None:
        """The paths of a forward pass of the layer, which may come several times a batch, each with some of the tokens."""
        ends = path.detach()[..., -1] - (self._leaves - 1)
        self._seen.append(ends if ends.ndim == 3 else ends.reshape(1, -1, ends.shape[-1]))

    def taken(self) -> Tensor:
        """``[rows, tokens, trees]``: the leaves in which the batch's tokens ended, which are not told again."""
        ends = torch.cat(self._seen, 1)
        self._seen = []
        return ends

    def count(self, ends: Tensor, visible: Tensor | None) -> None:
        """Adds what ``taken`` gave; ``visible`` is as ``visible_of`` gives it."""
        trees = ends.shape[-1]
        if self.counts is None:
            self.counts = torch.zeros(trees, self._leaves, dtype=torch.int64, device=ends.device)
        places = ends + self._leaves * torch.arange(trees, device=ends.device)
        ones = torch.ones_like(places) if visible is None else visible.unsqueeze(-1).expand_as(places)
        self.counts.view(-1).scatter_add_(0, places.flatten().long(), ones.flatten().long())

    def summary(self) -> dict[str, float]:
        """See ``fff_usage``."""
        assert self.counts is not None
        level = self.counts.cpu()
        share = level.double() / level.sum(1, keepdim=True)
        entropy = -(share * share.clamp_min(1e-300).log2()).sum(1)
        dead = int((level == 0).sum())
        while level.shape[1] > 1:
            level = level.view(len(level), -1, 2).sum(-1)
            dead += int((level == 0).sum())
        depth = self._leaves.bit_length() - 1
        return {"dead": dead / self.ffn.config.nodes, "entropy": float(entropy.mean()), "depth": depth}


def visible_of(mask: Tensor | None, ends: Tensor) -> Tensor | None:
    """``[rows, tokens]``: which of the tokens of ``ends`` count, given a batch's attention mask; None where all of them do."""
    if mask is None or mask.numel() == 0 or ends.shape[:2].numel() % mask.numel():
        return None  # layers that get nothing but what is visible
    mask = mask.reshape(ends.shape[0], -1).bool()
    return mask.repeat(1, ends.shape[1] // mask.shape[1])  # layers that share an FFF run it in turn


class Watch:
    """Counts what the trees of a model do as it runs, until it is stopped: in training for no more than the counting.

    Attributes:
        layers: the visits of each layer's trees; empty without trees.
    """

    def __init__(self, model: Any) -> None:
        model = without_adapters(model)
        self.layers: dict[int, list[Visits]] = {}
        for number, ffn in _trees(model):
            self.layers.setdefault(number, []).append(Visits(ffn))
        self.inputs: dict[str, Any] = {}  # of the batch that is seen, by name
        self._names = inspect.signature(model.base_model.forward)
        self._handles: list[Any] = []
        if self.layers:
            self._handles.append(model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(model.base_model.register_forward_hook(self._end))
        for visits in self.every():
            visits.ffn.watch = visits.see

    def every(self) -> list[Visits]:
        return [visits for some in self.layers.values() for visits in some]

    def see(self, ends: list[Tensor], mask: Tensor | None) -> None:
        """What is done with a batch: for each FFF where its tokens ended, and the attention mask."""
        for visits, end in zip(self.every(), ends, strict=True):
            visits.count(end, visible_of(mask, end))

    def summary(self) -> dict[int, dict[str, float]]:
        """See ``fff_usage``."""
        return {number: _mean([v.summary() for v in some]) for number, some in self.layers.items()}

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        for visits in self.every():
            visits.ffn.watch = None

    def _begin(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for visits in self.every():
            visits._seen = []  # of a pass that broke off, or was made again for its gradients
        self.inputs = self._names.bind_partial(*args, **kwargs).arguments

    def _end(self, *_: Any) -> None:
        self.see([visits.taken() for visits in self.every()], self.inputs.get("attention_mask"))
        self.inputs = {}


def without_adapters(model: Any) -> Any:
    """The model that PEFT has wrapped, adapters in it; any other as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _trees(model: Any) -> Iterator[tuple[int, FFF]]:
    """Trees and the layers that they are in, a shared one in its first; a dense model has none."""
    family: FFNInterface | None = getattr(model, "family", None)
    known: set[int] = set()
    for number, block in enumerate(family.blocks(model.base_model) if family else ()):
        for ffn in family.ffns(block) if family and id(block) not in known else ():
            # PEFT wraps what it adapts, and puts what it trains whole beside the original.
            held = [m for m in ffn.get(ffn.family.ffn_in).modules() if isinstance(m, FFF)]
            if held:
                yield number, held[-1]
        known.add(id(block))


def _mean(summaries: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(s[name] for s in summaries) / len(summaries) for name in summaries[0]}


def fff_usage(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> dict[int, dict[str, float]]:
    """How the trees of a converted model are used by some inputs, padding left out.

    Args:
        model: put into evaluation mode while it runs; PEFT may have wrapped it. One that has no trees gives an empty dict.
        batches: as the model takes them, on any device, labels or not.

    Returns:
        For each layer with trees: ``dead``, the share of nodes that no token visited (few tokens cannot visit many);
        ``entropy``, of the leaves' shares of the tokens, in bits, the mean over the trees: ``depth`` at most, which says that
        all leaves are used alike, and 0 if all tokens end in one; ``depth``, in which a token visits one node more. Of a layer
        with several feedforward networks it is their mean; of layers that share one, the first stands for all.

    Raises:
        ValueError: there is not one batch, or not one visible token.
    """
    model = without_adapters(model)
    watch = Watch(model)
    if not watch.layers:
        return {}
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for batch in batches:
                names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
                model.base_model(**{name: batch[name].to(device) for name in names if name in batch})
    finally:
        watch.stop()
    if not any(v.counts is not None and v.counts.any() for v in watch.every()):
        raise ValueError("there is no visible token, so there is nothing to count")
    return watch.summary()
