"""The operators as functions of Python, with autocast. A kernel of the Hub holds this file too (``hf_fff/hub/kernel.py``)."""

from typing import Any

import torch
from torch import Tensor

from ._ops import ops
from ._schema import library


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

fff_train = ops.fff_train.default
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
        y, _, _ = fff_train(x, weight_in, bias_in, weight_out, n_trees, activation, *routing)
        return y
    return _infer(x, weight_in, bias_in, weight_out, n_trees, activation)
