"""The operators as functions of Python, with autocast. A kernel of the Hub holds this file too (``hf_fff/hub/kernel.py``)."""

from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from ._schema import depth_of, library


def _autocast(name: str, device: str) -> Any:
    operator = getattr(ops, name).default

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            cast = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
            return operator(*cast, **kwargs)

    return kernel


for _name in ("fff", "fff_train"):
    library.impl(_name, _autocast(_name, "cpu"), "AutocastCPU")
    library.impl(_name, _autocast(_name, "cuda"), "AutocastCUDA")


class _OnGpu(torch.autograd.Function):
    """The differentiable operator on a GPU, with CUDA kernels: what ``fff_train`` does, without the dispatcher's kernels in Python, which take
    longer than the GPU does. Under autocast the kernels cast, and give the gradients back in the weights' type."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, settings: tuple[Any, ...]
    ) -> Tensor:
        n_trees, activation, _, _, mixed = settings
        if mixed is None:
            with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
                y, path, logits = fff_train(x, weight_in, bias_in, weight_out, n_trees, activation)
            ctx.save_for_backward(x, weight_in, bias_in, weight_out, path, logits)
        else:  # an operator that neither autocast nor autograd knows
            y, kept = _train_mixed(x, weight_in, bias_in, weight_out, n_trees, activation, mixed == torch.float16)
            ctx.save_for_backward(kept, x if x.dtype == mixed else None)
        ctx.settings, ctx.nodes = settings, len(weight_in)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return (_once if torch.is_grad_enabled() else _gradients)(ctx, grad_y)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    n_trees, activation, alpha, tau, mixed = ctx.settings
    x, w_in, b_in, w_out, _ = ctx.needs_input_grad
    needed, saved = (x, w_in or b_in or w_out), ctx.saved_tensors  # once: checkpointing recomputes at every look
    with torch._C._DisableAutocast(), torch._C._AutoDispatchBelowAutograd():
        if mixed is None:
            grads = _backward(grad_y, *saved, n_trees, activation, alpha, tau, *needed)
        else:
            kept, own = saved
            depth = depth_of(ctx.nodes, n_trees)
            grads = _backward_mixed(grad_y, own, kept, n_trees, depth, activation, alpha, tau, *needed)
    return (
        grads[0] if x else None,
        grads[1] if w_in else None,
        grads[2] if b_in else None,
        grads[3] if w_out else None,
        None,
    )


_once = torch.autograd.function.once_differentiable(_gradients)  # for create_graph, which asks for more than there is


_PLAIN = {Tensor, torch.nn.Parameter}
_MIXED_NAME = add_op_namespace_prefix("fff_train_mixed")
_BIAS_NAME = add_op_namespace_prefix("add_bias")


def _on_gpu(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> bool:
    """Whether that can be taken: CUDA kernels are loaded, and nobody traces, transforms or counts what is called."""
    return (
        x.is_cuda
        and {type(x), type(weight_in), type(bias_in), type(weight_out)} <= _PLAIN
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._dispatch_has_kernel_for_dispatch_key(_MIXED_NAME, "CUDA")
    )


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """``x + bias``, for ``x`` ``[..., hidden]`` and one number a column; quick on a GPU where no gradient is asked for."""
    quick = (
        type(x) is Tensor
        and x.is_cuda
        and type(bias) in _PLAIN
        and not (torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad))
        and x.dtype == bias.dtype
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._dispatch_has_kernel_for_dispatch_key(_BIAS_NAME, "CUDA")
    )
    return _add_bias(x, bias) if quick else x + bias


def _can_mix(dtype: torch.dtype, x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> bool:
    single = torch.float32
    return (
        dtype in (torch.bfloat16, torch.float16)
        and x.dtype in (single, dtype)
        and weight_in.dtype == bias_in.dtype == weight_out.dtype == single
    )


fff_train = ops.fff_train.default
_backward = ops.fff_backward.default
_train_mixed = ops.fff_train_mixed.default
_backward_mixed = ops.fff_backward_mixed.default
_add_bias = ops.add_bias.default
pack = ops.pack.default
fff_packed = ops.fff_packed.default
_infer = ops.fff.default


def fff(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    n_trees: int,
    activation: str = "gelu",
    routing_gradient: float = 0.0,
    routing_temperature: float = 1.0,
) -> Tensor:
    """A layer of ``n_trees`` fast feedforward trees (arXiv 2311.10770, section 2), differentiable where autograd is on.

    Args:
        x: ``[..., hidden]``.
        weight_in, weight_out: ``[n_trees * (2**(depth+1) - 1), hidden]``, tree-major, nodes of a tree in heap order.
        bias_in: one number a node.
        activation: one of ``ACTIVATIONS``; "gelu" is the exact (erf) one.
        routing_gradient: alpha of the straight-through routing gradient; 0 is the paper's training, which never learns
            where to send a token.
        routing_temperature: tau of the same.

    Returns:
        ``[..., hidden]``, in the dtype of ``x``.

    Raises:
        ValueError or RuntimeError: shapes, dtypes or devices that do not fit each other, an unknown activation.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or weight_in.requires_grad or weight_out.requires_grad or bias_in.requires_grad
    ):
        routing = (routing_gradient, routing_temperature)
        if not torch.compiler.is_compiling() and _on_gpu(x, weight_in, bias_in, weight_out):
            mixed = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
            if mixed is None or _can_mix(mixed, x, weight_in, bias_in, weight_out):
                return _OnGpu.apply(x, weight_in, bias_in, weight_out, (n_trees, activation, *routing, mixed))
        y, _, _ = fff_train(x, weight_in, bias_in, weight_out, n_trees, activation, *routing)
        return y
    return _infer(x, weight_in, bias_in, weight_out, n_trees, activation)
