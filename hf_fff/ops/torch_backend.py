"""The operators in plain PyTorch: on any device, and the place where a call goes that no native library has taken.

Two ways of the same arithmetic. *Gather* fetches the rows of the visited nodes, as the definition reads; *dense* multiplies by all
rows and masks, which pays where a token visits a good part of the nodes, and which the routing gradient needs. Work is
cut into pieces of tokens so that memory stays bounded.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ._schema import check_arguments, logits_dtype

# Gathering a row costs about as much as this many rows of a matrix product: measured on a CPU; on a GPU tensor cores make
# the product nearly free.
_DENSE_RATIO = {"cpu": 8, "cuda": 512}
_PIECE = 1 << 24  # elements of the largest intermediate tensor


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _gelu_new_slope(z: Tensor) -> Tensor:
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (z + c * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * c * z * z)


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


# activation -> (function, derivative)
_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, _gelu_slope),
    "gelu_new": (lambda z: F.gelu(z, approximate="tanh"), _gelu_new_slope),
    "relu": (F.relu, lambda z: (z > 0).to(z.dtype)),
    "silu": (F.silu, _silu_slope),
    "identity": (lambda z: z, torch.ones_like),
}


def activation_functions(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The function of that name and its derivative."""
    if name not in _FUNCTIONS:
        raise ValueError(f"activation {name!r} is not known (allowed: {', '.join(_FUNCTIONS)})")
    return _FUNCTIONS[name]


def pays_dense(weight: Tensor, walk: int) -> bool:
    return weight.shape[0] <= _DENSE_RATIO.get(weight.device.type, 8) * walk


def pieces(tokens: int, elements_per_token: int, most: int = _PIECE) -> Iterator[slice]:
    size = max(1, most // max(1, elements_per_token))
    return (slice(i, min(i + size, tokens)) for i in range(0, tokens, size))


def _rows(path: Tensor, tree_nodes: int) -> Tensor:
    """Rows of the weights for a path ``[T, K, levels]`` of nodes within their trees."""
    roots = torch.arange(path.shape[-2], device=path.device).unsqueeze(-1) * tree_nodes
    return path.long() + roots


def _descend(x: Tensor, weight_in: Tensor, bias_in: Tensor, n_trees: int, depth: int) -> tuple[Tensor, Tensor]:
    """Path (int32) and logits, each ``[T, K, depth + 1]``."""
    tree_nodes = weight_in.shape[0] // n_trees
    acc = logits_dtype(x)
    node = torch.zeros(x.shape[0], n_trees, dtype=torch.long, device=x.device)
    roots = torch.arange(n_trees, device=x.device) * tree_nodes
    dense = pays_dense(weight_in, n_trees * (depth + 1))
    every = F.linear(x, weight_in).to(acc) + bias_in.to(acc) if dense else None
    nodes, logits = [], []
    for _ in range(depth + 1):
        rows = roots + node
        if every is not None:
            z = every.gather(1, rows)
        else:
            z = (weight_in[rows].to(acc) @ x.to(acc).unsqueeze(-1)).squeeze(-1) + bias_in[rows].to(acc)
        nodes.append(node)
        logits.append(z)
        node = 2 * node + 1 + (z > 0)
    return torch.stack(nodes, -1).int(), torch.stack(logits, -1)


def _combine(coefficient: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Sum of ``coefficient * weight[rows]`` over the visits: ``[T, walk] -> [T, H]``."""
    if pays_dense(weight, rows.shape[1]):
        spread = torch.zeros(rows.shape[0], weight.shape[0], dtype=weight.dtype, device=weight.device)
        return spread.scatter_(1, rows, coefficient.to(weight.dtype)) @ weight
    return (coefficient.unsqueeze(1) @ weight[rows].to(coefficient.dtype)).squeeze(1).to(weight.dtype)


def fff_train(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    n_trees: int,
    activation: str,
    routing_gradient: float = 0.0,
    routing_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    depth = check_arguments(x, weight_in, bias_in, weight_out, n_trees)
    act, _ = activation_functions(activation)
    nodes, hidden = weight_in.shape
    walk = n_trees * (depth + 1)
    tokens = x.reshape(-1, hidden)
    y = torch.empty_like(tokens)
    path = torch.empty(len(tokens), n_trees, depth + 1, dtype=torch.int32, device=x.device)
    logits = torch.empty(path.shape, dtype=logits_dtype(x), device=x.device)
    for piece in pieces(len(tokens), max(walk * hidden, nodes)):
        path[piece], logits[piece] = _descend(tokens[piece], weight_in, bias_in, n_trees, depth)
        rows = _rows(path[piece], nodes // n_trees).flatten(1)
        y[piece] = _combine(act(logits[piece]).flatten(1), rows, weight_out)
    lead = x.shape[:-1]
    return y.view(x.shape), path.view(*lead, n_trees, depth + 1), logits.view(*lead, n_trees, depth + 1)


def fff(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, n_trees: int, activation: str) -> Tensor:
    return fff_train(x, weight_in, bias_in, weight_out, n_trees, activation)[0]


def _routing(
    grad_y: Tensor, x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, path: Tensor, logits: Tensor,
    act: Callable[[Tensor], Tensor], alpha: float, tau: float,
) -> Tensor:  # fmt: skip
    """The straight-through routing gradient of the logits, ``[T, K, depth + 1]`` (zero at the leaves).

    ``worth[n]`` is ``<grad_y, output of the path that descends greedily from n>``, for all nodes at once, leaves first.
    """
    acc = logits.dtype
    n_trees, levels = path.shape[1:]
    every_z = (F.linear(x, weight_in).to(acc) + bias_in.to(acc)).unflatten(1, (n_trees, -1))
    value = act(every_z) * F.linear(grad_y, weight_out).to(acc).unflatten(1, (n_trees, -1))
    worth = value[:, :, 2 ** (levels - 1) - 1 :]
    result = torch.zeros_like(logits)
    for level in range(levels - 2, -1, -1):
        at = slice(2**level - 1, 2 ** (level + 1) - 1)
        left, right = worth.unflatten(2, (-1, 2)).unbind(-1)
        place = path[:, :, level : level + 1].long() - at.start
        s = torch.sigmoid(logits[:, :, level] / tau)
        result[:, :, level] = alpha * (right - left).gather(2, place).squeeze(2) * s * (1 - s) / tau
        worth = value[:, :, at] + torch.where(every_z[:, :, at] > 0, right, left)
    return result


def fff_backward(
    grad_y: Tensor,
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    path: Tensor,
    logits: Tensor,
    n_trees: int,
    activation: str,
    routing_gradient: float = 0.0,
    routing_temperature: float = 1.0,
    need_x: bool = True,
    need_weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    depth = check_arguments(x, weight_in, bias_in, weight_out, n_trees)
    act, slope = activation_functions(activation)
    nodes, hidden = weight_in.shape
    walk, acc = n_trees * (depth + 1), logits.dtype
    x_tokens, grad_tokens = x.reshape(-1, hidden), grad_y.reshape(-1, hidden)
    path, logits = path.reshape(-1, n_trees, depth + 1), logits.reshape(-1, n_trees, depth + 1)
    grad_x = torch.empty_like(x_tokens) if need_x else x.new_empty(0)
    sum_in, sum_bias, sum_out = (
        torch.zeros_like(w, dtype=acc) if need_weights else x.new_empty(0) for w in (weight_in, bias_in, weight_out)
    )
    dense = pays_dense(weight_in, walk) or routing_gradient != 0
    for piece in pieces(len(x_tokens), nodes if dense else walk * hidden):
        xs, gs, z = x_tokens[piece], grad_tokens[piece], logits[piece]
        rows = _rows(path[piece], nodes // n_trees).flatten(1)
        if dense:
            gain = F.linear(gs, weight_out).to(acc).gather(1, rows)
        else:
            gain = (weight_out[rows].to(acc) @ gs.to(acc).unsqueeze(-1)).squeeze(-1)
        grad_z = gain * slope(z).flatten(1)
        if routing_gradient:
            grad_z += _routing(
                gs, xs, weight_in, bias_in, weight_out, path[piece], z, act, routing_gradient, routing_temperature
            ).flatten(1)
        if need_x:
            grad_x[piece] = _combine(grad_z, rows, weight_in)
        if need_weights:
            value = act(z).flatten(1)
            for total, coefficient, row in ((sum_in, grad_z, xs), (sum_out, value, gs)):
                if dense:
                    spread = torch.zeros(len(xs), nodes, dtype=x.dtype, device=x.device)
                    total += spread.scatter_(1, rows, coefficient.to(x.dtype)).mT @ row
                else:
                    terms = coefficient.unsqueeze(-1) * row.to(acc).unsqueeze(1)
                    total.index_add_(0, rows.flatten(), terms.flatten(0, 1))
            sum_bias.index_add_(0, rows.flatten(), grad_z.flatten())
    grad_x = grad_x.view(x.shape) if need_x else grad_x
    return grad_x, sum_in.to(x.dtype), sum_bias.to(x.dtype), sum_out.to(x.dtype)
