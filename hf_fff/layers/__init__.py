"""Modules with plain parameters that know no model."""

from typing import Any

from ..config import FFFConfig
from .controls import MLP, NoFFN
from .fff import FFF, OutputBias
from .joint import TreesAndMLP
from .linear import LINEARS, PackedLinear, PackedMLP
from .packed import Packed, PackedFFF
from .wrappers import ChannelsFirst, FeedforwardBlock

Feedforward = FFF | MLP | TreesAndMLP | NoFFN
_OF_KIND: dict[str, type[FFF] | type[MLP] | type[TreesAndMLP] | type[NoFFN]] = {
    "tree": FFF,
    "mlp": MLP,
    "tree+mlp": TreesAndMLP,
    "none": NoFFN,
}

__all__ = [
    "FFF",
    "LINEARS",
    "MLP",
    "ChannelsFirst",
    "Feedforward",
    "FeedforwardBlock",
    "NoFFN",
    "OutputBias",
    "Packed",
    "PackedFFF",
    "PackedLinear",
    "PackedMLP",
    "TreesAndMLP",
    "feedforward",
]


def feedforward(hidden_size: int, config: FFFConfig, **options: Any) -> Feedforward:
    """The module that ``config`` describes; ``options`` are its ``device`` and ``dtype``."""
    return _OF_KIND[config.kind](hidden_size, config, **options)
