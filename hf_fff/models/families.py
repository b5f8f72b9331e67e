"""Where each model family keeps its feedforward network. A new family is one row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FFNInterface:
    """One family. Names are paths of attributes; those below ``layers`` are seen from a layer.

    The FFF takes the place of the module ``ffn_in``; of the output projection ``dense_out`` only the bias stays, so that
    residual, dropout and LayerNorm keep their names and transformers' own forward keeps working.
    """

    model_type: str
    layers: str  # the list of layers, seen from the base model
    ffn_in: str  # what the FFF replaces: input projection and activation
    dense_in: str  # the input projection
    dense_out: str  # the output projection
    input_norm: str  # the LayerNorm whose output the FFN reads
    output_norm: str  # the next LayerNorm on the residual stream
    activation: str  # field of the model's config

    def blocks(self, base_model: Any) -> list[Any]:
        """The layers; not typed, since what they hold is the family's own."""
        return list(base_model.get_submodule(self.layers))

    def ffn_keys(self) -> Iterator[str]:
        """Parts of a layer's parameter names that belong to its FFN, dense or not."""
        yield f"{self.ffn_in}."
        yield f"{self.dense_out}."


FAMILIES = {
    row.model_type: row
    for row in [
        FFNInterface(
            model_type="bert",
            layers="encoder.layer",
            ffn_in="intermediate",
            dense_in="intermediate.dense",
            dense_out="output.dense",
            input_norm="attention.output.LayerNorm",
            output_norm="output.LayerNorm",
            activation="hidden_act",
        )
    ]
}
