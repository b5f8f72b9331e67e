"""First values of an FFF, before anything is fitted."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import FFF, MLP, Feedforward
from ..ops.torch_backend import activation_functions
from .dense import DenseNeurons


@torch.no_grad()
def init_from_dense(ffn: Feedforward, dense: DenseNeurons, norm: Any, generator: torch.Generator) -> None:
    """Each neuron becomes one of the dense FFN, and the output is scaled to the dense one's size. Of a gated FFN it becomes the
    activated half: what multiplies that is lost, but for its mean.

    A tree takes all dense neurons in equal shares, an MLP those that do most for the output. A token meets few of them, so
    their sum is too small; the scale is measured on inputs as the LayerNorm before the FFN makes them from noise.

    Args:
        dense: the FFN's neurons.
        norm: the LayerNorm whose output the FFN reads; None where there is none.
    """
    parts = parts_of(ffn)
    if not parts:
        return
    noise = torch.randn(512, ffn.hidden_size, generator=generator).to(parts[0].weight_in)
    x = noise if norm is None else noise * norm.weight
    if getattr(norm, "bias", None) is not None:
        x = x + norm.bias
    act, _ = activation_functions(ffn.config.activation)
    values, outputs = dense.values(x, act), dense.outputs(x, act)
    inner = values.shape[1]
    for part in parts:
        nodes = part.config.nodes
        if isinstance(part, MLP):
            order = best_neurons(values, dense.weight_out)
        else:
            order = torch.randperm(inner, generator=generator)
        rounds = [order] + [torch.randperm(inner, generator=generator) for _ in range(-(-nodes // inner) - 1)]
        neurons = torch.cat([r.to(part.weight_in.device) for r in rounds])[:nodes]
        part.weight_in.copy_(dense.weight_in[neurons])
        part.bias_in.copy_(dense.bias_in[neurons] if dense.bias_in is not None else torch.zeros(nodes))
        part.weight_out.copy_(outputs[neurons])
    times = _spread(values @ dense.weight_out) / _spread(ffn(x)).clamp_min(1e-12)
    for part in parts:
        part.weight_out.mul_(times.to(part.weight_out.dtype))


def parts_of(ffn: Feedforward) -> list[FFF | MLP]:
    """Trees, an MLP, both or neither: what an FFN's place is taken by."""
    return [m for m in ffn.modules() if isinstance(m, (FFF, MLP))]


def best_neurons(values: Tensor, weight_out: Tensor) -> Tensor:
    """All neurons, those that move the output most first.

    Args:
        values: ``[tokens, neurons]``, activations.
        weight_out: ``[neurons, H]``.
    """
    return (values.float().var(0) * weight_out.float().square().sum(1)).argsort(descending=True)


@torch.no_grad()
def solve_outputs(mlp: MLP, bias: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> None:
    """Ridge regression: the ``weight_out`` and ``bias`` that give ``y`` best with the neurons as they are.

    Args:
        x, y: ``[tokens, H]``, inputs and wanted outputs.
        weight: ``[tokens]``, of each token's error.
    """
    act, _ = activation_functions(mlp.config.activation)
    values = act(F.linear(x, mlp.weight_in, mlp.bias_in))
    design = (torch.cat([values, torch.ones_like(x[:, :1])], 1) * weight.unsqueeze(1)).double()
    gram = design.T @ design
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, design.T @ (y * weight.unsqueeze(1)).double())
    mlp.weight_out.copy_(solution[:-1])
    bias.copy_(solution[-1])


def _spread(y: Tensor) -> Tensor:
    return (y.float() - y.float().mean(0)).norm()


@torch.no_grad()
def balance_hyperplanes(fff: FFF, x: Tensor) -> None:
    """Gives the rows of ``weight_in`` unit spread on the tokens that reach their node, and each node the bias that sends half
    of those tokens either way; ``weight_out`` becomes zero. The directions of the rows are kept.

    Args:
        x: ``[tokens, H]``, inputs of the layer.
    """
    tokens, tree_nodes = x.shape[0], fff.config.tree_nodes
    weight = fff.weight_in.view(fff.n_trees, tree_nodes, -1)
    bias = fff.bias_in.view(fff.n_trees, tree_nodes)
    for tree in range(fff.n_trees):
        node = torch.zeros(tokens, dtype=torch.long, device=x.device)
        for level in range((tree_nodes + 1).bit_length() - 1):
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
