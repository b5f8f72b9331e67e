"""The operators on a GPU, in the dense form: all logits are one matrix product, and Triton walks the trees in them.

Between the matrix products, which are torch's, two kernels do what a step of PyTorch calls for each level would do: they
read the logits once and write the coefficients of the visited nodes, zeros elsewhere. Sums run in a fixed order: the
gradients of two runs are equal bit for bit.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import torch_backend
from ._schema import check_arguments, logits_dtype
from .torch_backend import pays_dense, pieces

_BLOCK = 2048  # nodes that a program holds at a time: more would not fit into the registers
_PIECE = 1 << 27  # elements of the largest intermediate tensor


@triton.jit
def _act(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.math.erf(z * 0.7071067811865476))
    if ACTIVATION == "gelu_new":
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # (1 + tanh(u)) / 2 = sigmoid(2u)
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    if ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    return z


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * (1 + tl.math.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    if ACTIVATION == "gelu_new":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1 - s) * 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)
    if ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
    return z * 0 + 1


@triton.jit
def _walk_kernel(
    every, bias, spread, path, logits, tokens, trees,
    LEVELS: tl.constexpr, ACTIVATION: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Each program: ``TOKENS`` tokens and one tree. Walks down, and writes the tree's part of ``spread [T, nodes]``."""
    NODES: tl.constexpr = 2**LEVELS - 1
    tree = tl.program_id(1)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < tokens
    row = token * trees * NODES + tree * NODES
    visit = (token * trees + tree) * LEVELS
    column = tl.arange(0, 2**LEVELS)
    node = tl.zeros([TOKENS], tl.int32)
    values = tl.zeros([TOKENS, 2**LEVELS], tl.float32)
    for level in tl.static_range(LEVELS):
        z = tl.load(every + row + node, mask=here, other=0).to(tl.float32)
        z += tl.load(bias + tree * NODES + node).to(tl.float32)
        tl.store(path + visit + level, node, mask=here)
        tl.store(logits + visit + level, z, mask=here)
        values = tl.where(column[None, :] == node[:, None], _act(z, ACTIVATION)[:, None], values)
        node = 2 * node + 1 + (z > 0).to(tl.int32)
    inside = here[:, None] & (column < NODES)[None, :]
    tl.store(spread + row[:, None] + column[None, :], values.to(spread.dtype.element_ty), mask=inside)


@triton.jit
def _slopes_kernel(
    every, gain, bias, path, into_logits, values, alpha, tau, tokens, trees,
    LEVELS: tl.constexpr, ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, ROUTING: tl.constexpr,
):  # fmt: skip
    """Each program: ``TOKENS`` tokens and one tree, from the leaves up.

    ``gain[n]`` is ``<dL/dy, weight_out[n]>``; ``worth[n]`` is ``<dL/dy, output of the path that descends greedily from n>``.
    Writes dL/dz and the activations of the visited nodes, zeros elsewhere, both ``[T, nodes]``.
    """
    NODES: tl.constexpr = 2**LEVELS - 1
    tree = tl.program_id(1)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = token < tokens
    row = token * trees * NODES + tree * NODES
    leaf = tl.load(path + (token * trees + tree) * LEVELS + LEVELS - 1, mask=here, other=0)
    worth = tl.zeros([TOKENS, 2**LEVELS], tl.float32)
    for up in tl.static_range(LEVELS):
        place = tl.arange(0, 2 ** (LEVELS - 1 - up))  # within the level
        first = 2 ** (LEVELS - 1 - up) - 1
        at = row[:, None] + first + place[None, :]
        mask = here[:, None] & (place >= 0)[None, :]
        z = tl.load(every + at, mask=mask, other=0).to(tl.float32)
        z += tl.load(bias + tree * NODES + first + place).to(tl.float32)[None, :]
        g = tl.load(gain + at, mask=mask, other=0).to(tl.float32)
        a = _act(z, ACTIVATION)
        slope = g * _slope(z, ACTIVATION)
        if ROUTING:
            left, right = tl.split(tl.reshape(worth, [TOKENS, 2 ** (LEVELS - 1 - up), 2]))
            s = tl.sigmoid(z / tau)
            slope += alpha * (right - left) * s * (1 - s) / tau
            worth = a * g + tl.where(z > 0, right, left)
        visited = place[None, :] == (((leaf + 1) >> up) - 1 - first)[:, None]
        tl.store(into_logits + at, tl.where(visited, slope, 0.0).to(into_logits.dtype.element_ty), mask=mask)
        tl.store(values + at, tl.where(visited, a, 0.0).to(values.dtype.element_ty), mask=mask)


def _serves(x: Tensor, weight_in: Tensor, n_trees: int, levels: int) -> bool:
    """Not float64, and not where a token visits a tiny part of the nodes: there PyTorch gathers rows."""
    return x.dtype != torch.float64 and 2**levels <= 2 * _BLOCK and pays_dense(weight_in, n_trees * levels)


def _launch(kernel: Any, every: Tensor, n_trees: int, width: int, *args: Any, **constants: Any) -> None:
    size = max(1, min(_BLOCK // width, 16))
    with torch.cuda.device_of(every):
        kernel[(triton.cdiv(len(every), size), n_trees)](every, *args, len(every), n_trees, TOKENS=size, **constants)


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
    levels = check_arguments(x, weight_in, bias_in, weight_out, n_trees) + 1
    if not _serves(x, weight_in, n_trees, levels):
        return torch_backend.fff_train(x, weight_in, bias_in, weight_out, n_trees, activation)
    torch_backend.activation_functions(activation)  # knows all there are
    nodes, hidden = weight_in.shape
    tokens, bias_in = x.reshape(-1, hidden), bias_in.contiguous()
    y = torch.empty_like(tokens)
    path = torch.empty(len(tokens), n_trees, levels, dtype=torch.int32, device=x.device)
    logits = torch.empty(path.shape, dtype=logits_dtype(x), device=x.device)
    for piece in pieces(len(tokens), nodes, _PIECE):
        every = F.linear(tokens[piece], weight_in)
        spread = torch.empty_like(every)
        _launch(
            _walk_kernel, every, n_trees, 2**levels, bias_in, spread, path[piece], logits[piece],
            LEVELS=levels, ACTIVATION=activation,
        )  # fmt: skip
        torch.mm(spread, weight_out, out=y[piece])
    lead = x.shape[:-1]
    return y.view(x.shape), path.view(*lead, n_trees, levels), logits.view(*lead, n_trees, levels)


def fff(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, n_trees: int, activation: str) -> Tensor:
    return fff_train(x, weight_in, bias_in, weight_out, n_trees, activation)[0]


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
    levels = check_arguments(x, weight_in, bias_in, weight_out, n_trees) + 1
    if not _serves(x, weight_in, n_trees, levels):
        return torch_backend.fff_backward(
            grad_y, x, weight_in, bias_in, weight_out, path, logits, n_trees, activation, routing_gradient,
            routing_temperature, need_x, need_weights,
        )  # fmt: skip
    nodes, hidden = weight_in.shape
    x_tokens, grad_tokens = x.reshape(-1, hidden), grad_y.reshape(-1, hidden)
    path, bias_in = path.reshape(-1, n_trees, levels).contiguous(), bias_in.contiguous()
    grad_x = torch.empty_like(x_tokens) if need_x else x.new_empty(0)
    sums = [
        torch.zeros_like(w, dtype=logits.dtype) if need_weights else x.new_empty(0)
        for w in (weight_in, bias_in, weight_out)
    ]
    for piece in pieces(len(x_tokens), nodes, _PIECE):
        xs, gs = x_tokens[piece], grad_tokens[piece]
        every, gain = F.linear(xs, weight_in), F.linear(gs, weight_out)
        into_logits, values = torch.empty_like(every), torch.empty_like(every)
        _launch(
            _slopes_kernel, every, n_trees, 2 ** (levels - 1), gain, bias_in, path[piece], into_logits, values,
            float(routing_gradient), float(routing_temperature),
            LEVELS=levels, ACTIVATION=activation, ROUTING=routing_gradient != 0,
        )  # fmt: skip
        if need_x:
            torch.mm(into_logits, weight_in, out=grad_x[piece])
        if need_weights:
            sums[0] += into_logits.mT @ xs
            sums[1] += into_logits.sum(0, dtype=logits.dtype)
            sums[2] += values.mT @ gs
    grad_x = grad_x.view(x.shape) if need_x else grad_x
    into_in, into_bias, into_out = (total.to(x.dtype) for total in sums)
    return grad_x, into_in, into_bias, into_out


def try_out() -> None:
    """Raises whatever is wrong with Triton or its compiler here, or that its numbers are."""
    x, weight_in, weight_out = (torch.linspace(-1, 1, n, device="cuda").sin().view(-1, 16) for n in (64, 224, 224))
    bias = torch.zeros(14, device="cuda")
    y, path, logits = fff_train(x, weight_in, bias, weight_out, 2, "gelu")
    results = [y, *fff_backward(x, x, weight_in, bias, weight_out, path, logits, 2, "gelu", 1.0)]
    wanted = [torch_backend.fff(x, weight_in, bias, weight_out, 2, "gelu")]
    wanted += torch_backend.fff_backward(x, x, weight_in, bias, weight_out, path, logits, 2, "gelu", 1.0)
    for got, want in zip(results, wanted, strict=True):
        if not torch.allclose(got, want, rtol=1e-2, atol=1e-2):  # TF32, where that is on
            raise RuntimeError("wrong numbers")
