"""How an FFF sits in models whose feedforward network is built otherwise than BERT's."""

from typing import Any

from torch import Tensor, nn


class FeedforwardBlock(nn.Module):
    """A feedforward network and its output bias, in the place of a whole dense block."""

    def __init__(self, ffn: Any, output: Any) -> None:
        super().__init__()
        self.ffn = ffn
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``."""
        return self.output(self.ffn(x))


class ChannelsFirst(nn.Module):
    """A module of ``[rows, tokens, hidden_size]`` between convolutions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, hidden_size, tokens] -> [rows, hidden_size, tokens]``."""
        return self.inner(x.transpose(1, 2)).transpose(1, 2)
