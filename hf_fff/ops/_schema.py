"""The operators, declared once: schemas, shape inference, autograd, autocast. Backends only register kernels.

``fff`` is the inference operator. ``fff_train`` also returns the path and the logits, from which ``fff_backward`` computes
gradients touching only visited nodes. All of them take ``x`` of shape ``[..., hidden]`` and tree-major weights.
"""

from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "identity")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

ROWS = ("int8", "bf16")  # what the rows of a packed layer are made of
PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_WEIGHTS = "Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, int n_trees, str activation"
_ROUTING = "float routing_gradient=0.0, float routing_temperature=1.0"

library = torch.library.Library(add_op_namespace_prefix("fff").split("::")[0], "DEF")
library.define(f"fff({_WEIGHTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.define(f"fff_train({_WEIGHTS}, {_ROUTING}) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_BACKWARD = (
    "(Tensor grad_y, Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor path, "
    f"Tensor logits, int n_trees, str activation, {_ROUTING}, bool need_x=True, bool need_weights=True)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"fff_backward{_BACKWARD}", tags=(torch.Tag.pt2_compliant_tag,))
# The same by matrix products over all nodes and a mask: what the CUDA kernels call where that is faster.
library.define(f"fff_backward_dense{_BACKWARD}")
# Training under autocast on a GPU: float32 weights (and x, or it is of the type already), computed in bfloat16 or float16. What backward needs, the
# cast numbers among it, comes in one buffer; the gradients are float32 where the kernels can write them so. ``functions`` calls them.
library.define(
    "fff_train_mixed(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, int n_trees, str activation, bool half)"
    " -> (Tensor, Tensor)"
)
library.define(
    "fff_backward_mixed(Tensor grad_y, Tensor? x, Tensor kept, int n_trees, int depth, str activation, float routing_gradient, "
    "float routing_temperature, bool need_x, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)"
)
# x + bias, for inference on a GPU: torch's own kernel for it, which broadcasts, takes three times as long.
library.define("add_bias(Tensor x, Tensor bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# Frozen layers, for inference on a CPU: one flat buffer with rows of fewer bytes, and the forward pass over it.
library.define(
    "pack(Tensor weight_in, Tensor bias_in, Tensor weight_out, int n_trees, str rows) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define("fff_packed(Tensor x, Tensor packed, str activation) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def depth_of(nodes: int, n_trees: int) -> int:
    """Depth of ``n_trees`` balanced trees that hold ``nodes`` nodes together (depth D visits D + 1 neurons)."""
    depth = (nodes // n_trees).bit_length() - 1 if n_trees > 0 else 0
    if nodes != n_trees * (2 ** (depth + 1) - 1):
        raise ValueError(f"{nodes} nodes are not n_trees={n_trees} balanced trees of 2**(depth+1)-1 nodes each")
    return depth


def check_arguments(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, n_trees: int) -> int:
    """Raises ``ValueError`` where the arguments do not fit each other; returns the depth."""
    if x.ndim < 1 or weight_in.ndim != 2 or x.shape[-1] != weight_in.shape[1]:
        shapes = f"x {list(x.shape)} must be [..., hidden] and weight_in {list(weight_in.shape)} [nodes, hidden]"
        raise ValueError(shapes)
    if bias_in.shape != weight_in.shape[:1] or weight_out.shape != weight_in.shape:
        raise ValueError(
            f"bias_in {list(bias_in.shape)} must be [{weight_in.shape[0]}] and weight_out {list(weight_out.shape)} "
            f"{list(weight_in.shape)}, as weight_in is"
        )
    if not x.dtype == weight_in.dtype == bias_in.dtype == weight_out.dtype:
        raise ValueError(
            "x, weight_in, bias_in and weight_out must have one dtype, found "
            f"{x.dtype}, {weight_in.dtype}, {bias_in.dtype}, {weight_out.dtype}"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"dtype {x.dtype} is not supported (allowed: {', '.join(map(str, DTYPES))})")
    return depth_of(weight_in.shape[0], n_trees)


def logits_dtype(x: Tensor) -> torch.dtype:
    """Sums are kept in float32 for every type but float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@torch.library.register_fake(add_op_namespace_prefix("fff"), lib=library)
def _(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, n_trees: int, activation: str) -> Tensor:
    check_arguments(x, weight_in, bias_in, weight_out, n_trees)
    return _empty(x)


@torch.library.register_fake(add_op_namespace_prefix("fff_train"), lib=library)
def _(
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
    visits = [*x.shape[:-1], n_trees, depth + 1]
    path = torch.empty(visits, dtype=torch.int32, device=x.device)
    return _empty(x), path, torch.empty(visits, dtype=logits_dtype(x), device=x.device)


@torch.library.register_fake(add_op_namespace_prefix("fff_backward"), lib=library)
def _(
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
    def gradient(of: Tensor, needed: bool) -> Tensor:
        return _empty(of) if needed else x.new_empty(0)

    into_in, into_bias, into_out = (gradient(w, need_weights) for w in (weight_in, bias_in, weight_out))
    return gradient(x, need_x), into_in, into_bias, into_out


@torch.library.register_fake(add_op_namespace_prefix("add_bias"), lib=library)
def _(x: Tensor, bias: Tensor) -> Tensor:
    return _empty(x)


@torch.library.register_fake(add_op_namespace_prefix("pack"), lib=library)
def _(weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, n_trees: int, rows: str) -> Tensor:
    from .packed_backend import Layout

    depth = check_arguments(weight_in, weight_in, bias_in, weight_out, n_trees)
    layout = Layout(rows, int(weight_in.shape[1]), n_trees, depth)
    return weight_in.new_empty(layout.bytes, dtype=torch.uint8)


@torch.library.register_fake(add_op_namespace_prefix("fff_packed"), lib=library)
def _(x: Tensor, packed: Tensor, activation: str) -> Tensor:
    return _empty(x)


def _no_backward(ctx: Any, grad_y: Tensor) -> None:
    raise RuntimeError(
        "a packed layer (hf_fff::fff_packed) has no gradients: it is for inference. Train the model that it was packed from."
    )


torch.library.register_autograd(add_op_namespace_prefix("fff_packed"), _no_backward, lib=library)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight_in, bias_in, weight_out, n_trees, activation, *routing = inputs
    _, path, logits = output
    ctx.save_for_backward(x, weight_in, bias_in, weight_out, path, logits)
    ctx.settings = (n_trees, activation, *routing)
    ctx.mark_non_differentiable(path, logits)


def _backward(ctx: Any, grad_y: Tensor, _grad_path: Any, _grad_logits: Any) -> tuple[Tensor | None, ...]:
    need_x, *need_weights = ctx.needs_input_grad[:4]
    saved = ctx.saved_tensors  # once: checkpointing recomputes at every look
    grads = ops.fff_backward(
        grad_y.to(saved[0].dtype), *saved, *ctx.settings, need_x=need_x, need_weights=any(need_weights)
    )
    wanted = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[:4], strict=True)]
    return (*wanted, *[None] * len(ctx.settings))


torch.library.register_autograd(
    add_op_namespace_prefix("fff_train"), _backward, setup_context=_setup_context, lib=library
)
