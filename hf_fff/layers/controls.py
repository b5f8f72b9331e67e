"""What a tree is measured against, in the same place and with the same names: a dense MLP, and no network at all."""

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ConfigLike, FFFConfig, as_config
from ..ops.torch_backend import activation_functions
from .fff import Neurons


class MLP(Neurons):
    """A dense feedforward network without output bias, of kind "mlp": ``act(x @ weight_in.T + bias_in) @ weight_out``."""

    kind = "mlp"

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``."""
        act, _ = activation_functions(self.config.activation)
        return F.linear(act(F.linear(x, self.weight_in, self.bias_in)), self.weight_out.T)


class NoFFN(nn.Module):
    """Nothing, of kind "none": zeros, to which the output bias is added."""

    def __init__(
        self,
        hidden_size: int,
        config: ConfigLike = "none",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.config: FFFConfig = as_config(config)

    def reset_parameters(self, init: ModuleType = nn.init) -> None:
        """There are none."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``, all zero."""
        return x.new_zeros(()).expand(x.shape)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}"
