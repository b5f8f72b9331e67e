"""What packed rows do to a layer of trees, on any device and with gradients: so it can be trained to bear them.

Rows, tokens and what output rows are multiplied by are rounded as ``kernels/cpu/packed.h`` rounds them, to numbers of their own dtype;
gradients pass the rounding as if it were not there (straight-through). The products are those of the usual operators.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..ops.packed_backend import scales
from ..ops.torch_backend import activation_functions


def _units(t: Tensor, rows: str) -> tuple[Tensor, Tensor]:
    """What is kept of the rows of ``t``, float32, and what one of it is worth: ``[..., n] -> [..., n], [..., 1]``."""
    t = t.detach().float()
    if rows == "bf16":
        return t.bfloat16().float(), t.new_ones(()).expand(*t.shape[:-1], 1)
    up, down = scales(t)
    return torch.round(t * up), down


def _straight_through(t: Tensor, units: Tensor, worth: Tensor) -> Tensor:
    return (units * worth).to(t.dtype) + (t - t.detach())


def rounded_fff(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    n_trees: int,
    activation: str,
    rows: str,
    routing_gradient: float = 0.0,
    routing_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """What ``ops.fff_train`` gives, the output ``[..., hidden]`` and the path ``[..., n_trees, depth + 1]``, with rows that are rounded
    as packed layers have them: ``"int8"`` or ``"bf16"``."""
    units, worth = _units(weight_out, rows)
    y, path, logits = ops.fff_train(
        _straight_through(x, *_units(x, rows)),
        _straight_through(weight_in, *_units(weight_in, rows)),
        bias_in,
        _straight_through(weight_out, units, worth),
        n_trees,
        activation,
        routing_gradient,
        routing_temperature,
    )
    with torch.no_grad():  # a token's factors are rounded together, of all trees: that is known only now
        roots = torch.arange(n_trees, device=path.device).unsqueeze(-1) * (len(weight_out) // n_trees)
        visited = (path + roots).reshape(-1, path.shape[-2] * path.shape[-1])
        act, _ = activation_functions(activation)
        factors = act(logits.float()).view(visited.shape) * worth.squeeze(-1)[visited]
        kept, of = _units(factors, rows)
        change = F.embedding_bag(visited, units, per_sample_weights=kept * of - factors, mode="sum")
    return y + change.view(y.shape).to(y.dtype), path
