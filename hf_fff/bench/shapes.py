"""Sizes of known models: what a layer's speed is measured over."""

from dataclasses import dataclass
from typing import Any

from ..config import MAX_DEPTH, FFFConfig


@dataclass(frozen=True)
class Size:
    """A transformer's sizes; ``inner`` is the width of its feedforward networks."""

    hidden: int
    inner: int
    layers: int
    heads: int

    @property
    def tree(self) -> FFFConfig:
        """The deepest single tree with at most ``inner`` neurons."""
        return FFFConfig(1, min(MAX_DEPTH, (self.inner + 1).bit_length() - 2))


SIZES = {
    "bert-tiny": Size(128, 512, 2, 2),
    "bert-mini": Size(256, 1024, 4, 4),
    "minilm": Size(384, 1536, 6, 12),
    "bert-small": Size(512, 2048, 4, 8),
    "bert-medium": Size(512, 2048, 8, 8),
    "bert-base": Size(768, 3072, 12, 12),
    "bert-large": Size(1024, 4096, 24, 16),
    "gpt-2-xl": Size(1600, 6400, 48, 25),
    "gpt-3-6.7b": Size(4096, 16384, 32, 32),
    "gpt-3": Size(12288, 49152, 96, 96),
}

# Trees, and the MLP whose layerwise fit is about theirs: the rival that counts.
PAIRS = {"1x11": "mlp:107", "4x9": "mlp:256", "8x8": "mlp:256", "32x6": "mlp:512"}


def size_of(name: str) -> Size:
    """Raises ``ValueError`` for a name that is not known."""
    if name not in SIZES:
        raise ValueError(f"size {name!r} is not known (allowed: {', '.join(SIZES)})")
    return SIZES[name]


def bert(name: str) -> Any:
    """A BERT of that size with random weights, the encoder alone.

    Raises:
        ValueError: a name that is not known.
    """
    from transformers import BertConfig, BertModel

    size = size_of(name)
    config = BertConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
    )
    return BertModel(config, add_pooling_layer=False).eval()
