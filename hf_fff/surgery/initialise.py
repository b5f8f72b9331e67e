"""First values of an FFF, before anything is fitted."""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import FFF
from ..ops.torch_backend import activation_functions


@torch.no_grad()
def init_from_dense(fff: FFF, dense_in: Any, dense_out: Any, norm: Any, generator: torch.Generator) -> None:
    """Each node becomes one neuron of the dense FFN, all neurons in equal shares; the output is scaled to the dense one's size.

    A token meets ``active_nodes`` of them instead of all, so their sum is too small; the scale is measured on inputs as the
    LayerNorm before the FFN makes them from noise.

    Args:
        dense_in, dense_out: the FFN's projections, ``[inner, H]`` and ``[H, inner]``.
        norm: the LayerNorm whose output the FFN reads.
    """
    inner, nodes = dense_in.weight.shape[0], fff.config.nodes
    rounds = -(-nodes // inner)
    neurons = torch.cat([torch.randperm(inner, generator=generator) for _ in range(rounds)])[:nodes]
    neurons = neurons.to(fff.weight_in.device)
    fff.weight_in.copy_(dense_in.weight[neurons])
    fff.bias_in.copy_(dense_in.bias[neurons] if dense_in.bias is not None else torch.zeros(nodes))
    fff.weight_out.copy_(dense_out.weight[:, neurons].T)
    noise = torch.randn(512, fff.hidden_size, generator=generator).to(fff.weight_in)
    x = noise * norm.weight + norm.bias
    want = activation_functions(fff.config.activation)[0](dense_in(x)) @ dense_out.weight.T
    fff.weight_out.mul_((_spread(want) / _spread(fff(x)).clamp_min(1e-12)).to(fff.weight_out.dtype))


def _spread(y: Tensor) -> Tensor:
    return (y.float() - y.float().mean(0)).norm()


@torch.no_grad()
def balance_hyperplanes(fff: FFF, x: Tensor) -> None:
    """Gives the rows of ``weight_in`` unit spread on the tokens that reach their node, and each node the bias that sends half
    of those tokens either way; ``weight_out`` becomes zero. The directions of the rows are kept.

    Args:
        x: ``[tokens, H]``, inputs of the layer.
    """
    c = fff.config
    tokens = x.shape[0]
    weight = fff.weight_in.view(c.n_trees, c.tree_nodes, -1)
    bias = fff.bias_in.view(c.n_trees, c.tree_nodes)
    for tree in range(c.n_trees):
        node = torch.zeros(tokens, dtype=torch.long, device=x.device)
        for level in range(c.depth + 1):
            first, count = 2**level - 1, 2**level
            z = (x * weight[tree][node]).sum(-1)
            place = node - first
            visits = torch.bincount(place, minlength=count).clamp_min(1)
            mean = torch.zeros(count, device=x.device).index_add_(0, place, z) / visits
            variance = torch.zeros(count, device=x.device).index_add_(0, place, (z - mean[place]) ** 2) / visits
            scale = torch.where((visits > 1) & (variance > 1e-12), variance.rsqrt(), 1.0)
            z = z * scale[place]
            median = _group_medians(z, place, visits, mean * scale)
            weight[tree, first : first + count] *= scale.unsqueeze(1)
            bias[tree, first : first + count] = -median
            node = 2 * node + 1 + (z > median[place]).long()
    nn.init.zeros_(fff.weight_out)


def _group_medians(values: Tensor, group: Tensor, counts: Tensor, default: Tensor) -> Tensor:
    """The lower median of each group's values; ``default`` where a group is empty."""
    order = torch.argsort(values)
    order = order[torch.argsort(group[order], stable=True)]
    present = torch.bincount(group, minlength=len(counts))
    starts = present.cumsum(0) - present
    middle = (starts + (present - 1).clamp_min(0) // 2).clamp_max(len(values) - 1)
    return torch.where(present > 0, values[order[middle]], default)
