"""The operator without its registration: what ``torch.ops.hf_fff.fff`` computes, forward and backward, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..ops import torch_backend


class FFFFunction(torch.autograd.Function):
    """As ``fff_train`` and ``fff_backward``, which need no registered operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, path, logits = torch_backend.fff_train(*inputs)
        ctx.save_for_backward(*inputs[:4], path, logits)
        ctx.settings = inputs[4:]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_in, bias_in, weight_out, path, logits = ctx.saved_tensors
        weights = (weight_in, bias_in, weight_out)
        found = torch_backend.fff_backward(grads[0].to(x.dtype), x, *weights, path, logits, *ctx.settings)
        return (*found, *[None] * len(ctx.settings))


def fff_in_torch(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, *settings: Any) -> Tensor:
    """``hf_fff.ops.fff``; under autocast in the type that it asks for, as there."""
    tensors = (x, weight_in, bias_in, weight_out)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        tensors = tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)  # type: ignore[assignment]
    with torch.autocast(device, enabled=False):
        result: Tensor = FFFFunction.apply(*tensors, *settings)
    return result
