"""Which neurons of its trees a model uses."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..layers import FFF
from .families import FFNInterface


class _Visits:
    """Counts the visits of one tree layer's nodes."""

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
    """Layers with trees; a dense model has none."""
    family: FFNInterface | None = getattr(model, "family", None)
    if family is None:
        return
    for number, block in enumerate(family.blocks(model.base_model)):
        ffn = block.get_submodule(family.ffn_in)
        if isinstance(ffn, FFF):
            yield number, ffn


@torch.no_grad()
def fff_usage(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> dict[int, dict[str, float]]:
    """How the trees of a converted model are used by some inputs, padding left out.

    Args:
        model: put into evaluation mode while it runs. One that has no trees gives an empty dict.
        batches: as the model takes them, on any device, labels or not.

    Returns:
        For each layer with trees: ``dead``, the share of nodes that no token visited (few tokens cannot visit many);
        ``entropy``, of the leaves' shares of the tokens, in bits, the mean over the trees: ``depth`` at most, which says that
        all leaves are used alike, and 0 if all tokens end in one; ``depth``, in which a token visits one node more.

    Raises:
        ValueError: there is not one batch, or not one visible token.
    """
    visits = {i: _Visits(ffn) for i, ffn in _trees(model)}
    if not visits:
        return {}
    hooks = [v.ffn.register_forward_pre_hook(v.see) for v in visits.values()]
    training = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    try:
        model.eval()
        for batch in batches:
            names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
            inputs = {name: batch[name].to(device) for name in names if name in batch}
            model.base_model(**inputs)
            mask = inputs.get("attention_mask")
            for v in visits.values():
                v.count(None if mask is None else mask.bool())
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training:
            module.training = mode
    if not any(v.counts.any() for v in visits.values()):
        raise ValueError("there is no visible token, so there is nothing to count")
    return {i: v.summary() for i, v in visits.items()}
