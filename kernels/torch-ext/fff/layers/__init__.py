"""Layers that ``kernels.kernelize`` puts into the place of others' ``forward``: they have no state of their own."""

from typing import Any

import torch
from torch import nn

from ..functions import fff

__all__ = ["FFF"]


class FFF(nn.Module):
    """The forward of ``hf_fff.FFF``, whose members it uses."""

    weight_in: torch.Tensor  # [nodes, hidden], tree-major, nodes of a tree in heap order
    bias_in: torch.Tensor  # [nodes]
    weight_out: torch.Tensor  # [nodes, hidden]
    n_trees: int
    config: Any  # activation, routing_gradient, routing_temperature

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.config
        return fff(
            x,
            self.weight_in,
            self.bias_in,
            self.weight_out,
            self.n_trees,
            c.activation,
            c.routing_gradient,
            c.routing_temperature,
        )
