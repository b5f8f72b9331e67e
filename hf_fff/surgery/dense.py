"""A dense feedforward network as its neurons, however the family writes it down."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import FFN


@dataclass(frozen=True)
class DenseNeurons:
    """Matrices of a dense FFN; a gated one has a second input row for each neuron, by whose value it is multiplied."""

    weight_in: Tensor  # [inner, H]
    bias_in: Tensor | None  # [inner]
    weight_out: Tensor  # [inner, H]
    bias_out: nn.Parameter | None  # [H], the module's own
    gate_weight: Tensor | None = None  # [inner, H]
    gate_bias: Tensor | None = None  # [inner]

    @classmethod
    @torch.no_grad()
    def of(cls, ffn: FFN) -> "DenseNeurons":
        """Those of a network that is still dense. Where it consists of plain linear layers, its parameters themselves.

        Raises:
            ValueError: a projection is not one of plain weights, as after quantisation or with an adapter.
        """
        family = ffn.family
        dense_in, dense_out = ffn.get(family.dense_in), ffn.get(family.dense_out)
        weight, bias = _matrix(dense_in, family.dense_in)
        out, _ = _matrix(dense_out, family.dense_out)
        gate: tuple[Tensor | None, Tensor | None] = (None, None)
        if family.gate == family.dense_in:
            halves = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
            (weight, bias), gate = ((w, b) for w, b in zip(*halves, strict=True))
        elif family.gate is not None:
            gate = _matrix(ffn.get(family.gate), family.gate)
        return cls(weight, bias, out.T, dense_out.bias, *gate)

    def values(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """What the neurons give for some inputs: ``[tokens, H] -> [tokens, inner]``."""
        values = act(F.linear(x, self.weight_in, self.bias_in))
        return values if self.gate_weight is None else values * F.linear(x, self.gate_weight, self.gate_bias)

    def outputs(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows for the output of ungated neurons that stand for these: ``[inner, H]``. Gated ones are multiplied by what the
        gate is at most, in the mean of some inputs (least squares); nothing better can be said of each alone."""
        if self.gate_weight is None:
            return self.weight_out
        alone = act(F.linear(x, self.weight_in, self.bias_in))
        factor = (alone * self.values(x, act)).sum(0) / alone.square().sum(0).clamp_min(1e-12)
        return self.weight_out * factor.unsqueeze(1)


def _matrix(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight ``[out, in]`` and bias of a linear map, grouped or not."""
    weight: Any = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    plain = type(weight) is nn.Parameter and weight.dtype.is_floating_point
    if plain and type(module) is nn.Linear:
        return weight, bias
    if plain and type(module) is nn.Conv1d and module.kernel_size == (1,):
        return torch.block_diag(*weight.squeeze(-1).chunk(module.groups)), bias
    if plain and type(module).__name__ == "GroupedLinearLayer":  # ConvBERT's: [groups, in, out]
        return torch.block_diag(*weight.transpose(1, 2)), bias
    raise ValueError(
        f"the projection {name!r} is a {type(module).__name__} with {type(weight).__name__} weights, not a linear layer of "
        "plain ones: convert the model before it is quantised, and merge its adapters first"
    )
