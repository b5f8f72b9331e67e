"""Dense layers with weights of fewer bytes, laid out for oneDNN, for inference on a CPU."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FFFConfig
from ..ops.torch_backend import activation_functions
from .controls import MLP
from .packed import Packed

LINEARS = ("int8", "bf16")
_TINY = 1e-30  # a scale of zeros


class PackedLinear(Packed):
    """An ``nn.Linear`` whose products are of int8 or bf16.

    With "int8" a row of the weight has a scale, and so has each token, found when it comes: what a token gives does not depend on the
    others of its batch.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
        kind: one of ``LINEARS``.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str) -> None:
        super().__init__()
        self.kind, (self.out_features, self.in_features) = kind, weight.shape
        weight, scale = weight.detach().float().contiguous(), None
        if kind == "int8":
            scale = (weight.abs().amax(dim=1) / 127).clamp_min(_TINY)
            weight = torch.round(weight / scale[:, None]).to(torch.int8)
        self.register_buffer("weight", weight.bfloat16() if kind == "bf16" else weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._ready: tuple[Any, ...] | None = None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``, in the dtype of ``x``."""
        self.check_mode()
        if torch.is_grad_enabled() and x.requires_grad:
            return _NoGradient.apply(x, self)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """The same, without autograd, of which oneDNN's operators know nothing."""
        x = x.contiguous()  # oneDNN reads what it is given as if it were
        # Made at the first call: oneDNN's tensors are neither copied nor saved.
        ready = self._ready = self._ready or self._prepared()
        if self.kind == "bf16":
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), *ready, "none", [], "")
            return y.to(x.dtype)
        weight, scale, zeros, bias = ready
        token = (x.float().abs().amax(-1, keepdim=True) / 127).clamp_min(_TINY)
        whole = torch.round(x / token).to(torch.int8)
        y = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, 0, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return (y * token if bias is None else torch.addcmul(bias, y, token)).to(x.dtype)

    def _prepared(self) -> tuple[Any, ...]:
        bias = self.bias
        if self.kind == "bf16":
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.bfloat16(), None)
            return packed, None if bias is None else bias.bfloat16()
        assert self.scale is not None
        packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        zeros = torch.zeros(self.out_features, dtype=torch.int64)
        return packed, self.scale.float(), zeros, None if bias is None else bias.float()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedLinear":
        super()._apply(*args, **kwargs)
        self._ready = None
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._ready = None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "a packed layer has no gradients: it is for inference. Train the model that it was packed from."
        )


class PackedMLP(nn.Module):
    """An ``MLP`` of two such layers."""

    def __init__(self, mlp: MLP, kind: str) -> None:
        super().__init__()
        self.config: FFFConfig = mlp.config
        self.up = PackedLinear(mlp.weight_in, mlp.bias_in, kind)
        self.down = PackedLinear(mlp.weight_out.T, None, kind)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``."""
        act, _ = activation_functions(self.config.activation)
        return self.down(act(self.up(x)))


@cache
def why_not(kind: str) -> str | None:
    """Why such layers cannot be used on this machine, or None: tried once, on a few numbers."""
    if kind == "bf16" and not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return "this CPU, or this PyTorch, has no bfloat16 products"
    x, weight = torch.linspace(-1, 1, 64).sin().view(2, 32), torch.linspace(-3, 3, 512).cos().view(16, 32)
    try:
        y = PackedLinear(weight, torch.ones(16), kind)(x)
    except (RuntimeError, AttributeError) as error:  # an operator that this build lacks
        return str(error)
    if torch.allclose(y, x @ weight.T + 1, atol=0.2):
        return None
    return f"PyTorch's products of {kind} are wrong on this CPU" + (
        ", as they are without VNNI" if kind == "int8" else ""
    )
