"""Batches of few lengths, for what is done once for each shape."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

_LENGTHS = 8  # at most, of inputs up to the longest
_ALIGNED = 16  # tokens


class FewLengths:
    """Pads the inputs of a batch to one of few lengths.

    Args:
        padding: what a padded token has, by the name of the input; 0 where nothing is told.
        longest: tokens of the longest input.
        most: tokens that the model takes.
    """

    def __init__(self, padding: Mapping[str, int], longest: int, most: int | None = None) -> None:
        self._padding, self._most = dict(padding), most
        self._multiple = _ALIGNED * -(-longest // (_ALIGNED * _LENGTHS))

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs, of which ``input_ids`` is ``[rows, tokens]``, padded as ``pad_to_multiple`` does it."""
        return pad_to_multiple(inputs, self._multiple, self._padding, self._most)


def pad_to_multiple(
    inputs: Mapping[str, Tensor], multiple: int, padding: Mapping[str, int], most: int | None = None
) -> dict[str, Tensor]:
    """Inputs of a batch, those that are ``[rows, tokens]`` padded on the right to a multiple of so many tokens, or to as many as the model takes.

    Without an attention mask they stay as they are: nothing would tell the padding.
    """
    tokens = inputs["input_ids"].shape[1]
    wanted = -(-tokens // multiple) * multiple
    wanted = max(tokens, wanted if most is None else min(wanted, most))
    if wanted == tokens or "attention_mask" not in inputs:
        return dict(inputs)
    return {
        name: F.pad(value, (0, wanted - tokens), value=padding.get(name, 0)) if value.shape[1:] == (tokens,) else value
        for name, value in inputs.items()
    }
