"""Trees and a dense MLP side by side."""

from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..config import ConfigLike, FFFConfig, as_config
from .controls import MLP
from .fff import FFF


class TreesAndMLP(nn.Module):
    """Trees and a small dense MLP, of kind "tree+mlp", whose outputs are added: what all tokens want is one matrix product, and the
    trees are for what differs between them.

    Args:
        hidden_size: H, size of input and output.
        config: an ``FFFConfig``, ``"KxD+mlp:WIDTH"``, or a dict of its fields.
        options: ``device`` and ``dtype`` of both.
    """

    def __init__(self, hidden_size: int, config: ConfigLike, **options: Any) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        if (config := as_config(config)).kind != "tree+mlp":
            raise ValueError(
                f"a TreesAndMLP is of kind='tree+mlp', not {config.kind!r}: hf_fff.layers.feedforward makes any"
            )
        trees, mlp = config.parts
        self.trees = FFF(hidden_size, trees, **options)
        self.mlp = MLP(hidden_size, mlp, **options)

    @property
    def config(self) -> FFFConfig:
        """What both are, together."""
        return replace(self.trees.config, kind="tree+mlp", width=self.mlp.config.width)

    def reset_parameters(self, init: ModuleType = nn.init) -> None:
        """As each of the two has them."""
        self.trees.reset_parameters(init)
        self.mlp.reset_parameters(init)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``."""
        return self.trees(x) + self.mlp(x)
