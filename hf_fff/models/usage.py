"""Which neurons of its trees a model uses."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..layers import FFF
from ..modes import evaluating
from .families import FFNInterface


class _Visits:
    """Counts the visits of one FFF's nodes."""

    def __init__(self, ffn: FFF) -> None:
        self.ffn = ffn
        self.counts = torch.zeros(ffn.config.nodes, dtype=torch.int64)
        self._paths: list[Tensor] = []

    def see(self, _module: Any, args: tuple[Tensor, ...]) -> None:
        """Before the layer's forward, which may come several times a batch, each with some of the tokens."""
        ffn = self.ffn
        weights = (ffn.weight_in, ffn.bias_in, ffn.weight_out)
        self._paths.append(ops.fff_train(args[0], *weights, ffn.n_trees, ffn.config.activation)[1])

    def count(self, visible: Tensor | None) -> None:
        """After a batch; ``visible`` is ``[rows, tokens]``."""
        path = torch.cat(self._paths, 1).long()  # [rows, tokens, trees, depth + 1], nodes within their tree
        self._paths = []
        if visible is not None:
            visible = visible.repeat(1, path.shape[1] // visible.shape[1])  # layers that share an FFF run it in turn
        path = path.flatten(0, 1) if visible is None else path[visible]
        roots = torch.arange(0, len(self.counts), len(self.counts) // self.ffn.n_trees, device=path.device)
        rows = (path + roots.unsqueeze(-1)).flatten()
        self.counts += rows.bincount(minlength=len(self.counts)).cpu()

    def summary(self) -> dict[str, float]:
        trees = self.counts.view(self.ffn.n_trees, -1)
        leaves = trees[:, trees.shape[1] // 2 :].double()
        share = leaves / leaves.sum(1, keepdim=True)
        entropy = -(share * share.clamp_min(1e-300).log2()).sum(1)
        return {
            "dead": float((self.counts == 0).double().mean()),
            "entropy": float(entropy.mean()),
            "depth": trees.shape[1].bit_length() - 1,
        }


def _trees(model: Any) -> Iterator[tuple[int, FFF]]:
    """Trees and the layers that they are in, a shared one in its first; a dense model has none."""
    family: FFNInterface | None = getattr(model, "family", None)
    known: set[int] = set()
    for number, block in enumerate(family.blocks(model.base_model) if family else ()):
        for ffn in family.ffns(block) if family and id(block) not in known else ():
            if isinstance(ffn.fast, FFF):
                yield number, ffn.fast
        known.add(id(block))


def _mean(summaries: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(s[name] for s in summaries) / len(summaries) for name in summaries[0]}


def fff_usage(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> dict[int, dict[str, float]]:
    """How the trees of a converted model are used by some inputs, padding left out.

    Args:
        model: put into evaluation mode while it runs. One that has no trees gives an empty dict.
        batches: as the model takes them, on any device, labels or not.

    Returns:
        For each layer with trees: ``dead``, the share of nodes that no token visited (few tokens cannot visit many);
        ``entropy``, of the leaves' shares of the tokens, in bits, the mean over the trees: ``depth`` at most, which says that
        all leaves are used alike, and 0 if all tokens end in one; ``depth``, in which a token visits one node more. Of a layer
        with several feedforward networks it is their mean; of layers that share one, the first stands for all.

    Raises:
        ValueError: there is not one batch, or not one visible token.
    """
    visits: dict[int, list[_Visits]] = {}
    for number, ffn in _trees(model):
        visits.setdefault(number, []).append(_Visits(ffn))
    if not visits:
        return {}
    every = [v for one in visits.values() for v in one]
    hooks = [v.ffn.register_forward_pre_hook(v.see) for v in every]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for batch in batches:
                names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
                inputs = {name: batch[name].to(device) for name in names if name in batch}
                model.base_model(**inputs)
                mask = inputs.get("attention_mask")
                for v in every:
                    v.count(None if mask is None else mask.bool())
    finally:
        for hook in hooks:
            hook.remove()
    if not any(v.counts.any() for v in every):
        raise ValueError("there is no visible token, so there is nothing to count")
    return {i: _mean([v.summary() for v in one]) for i, one in visits.items()}
