"""Where each model family keeps its feedforward networks. A new family is one row."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from ..config import FFFConfig
from ..layers import ChannelsFirst, Feedforward, FeedforwardBlock, OutputBias, feedforward


@dataclass(frozen=True)
class FFNInterface:
    """One family: the names of its parts, as paths of attributes. The defaults are BERT's.

    The FFF takes the place of the module ``ffn_in``; of the output projection ``dense_out`` only the bias stays, so that
    residual, dropout and LayerNorm keep their names and transformers' own forward keeps working. Where ``dense_out`` lies
    inside ``ffn_in``, as in gated networks, the FFF and an output bias take the place of all of ``ffn_in``.
    """

    model_type: str
    layers: str = "encoder.layer"  # the list of layers, seen from the base model
    shared: bool = (
        False  # the list is shorter than the model is deep, and each of its layers runs several times in a row
    )
    parts: tuple[str, ...] = ("",)  # where a layer's FFNs are, in the order in which they run; "*" is each of a list
    # Seen from such a part:
    ffn_in: str = "intermediate"  # what the FFF replaces: input projection and activation
    dense_in: str = "intermediate.dense"  # the input projection that goes through the activation
    gate: str | None = None  # the one that multiplies it; where both are one module, the second half of its outputs
    between: tuple[str, ...] = ()  # what does nothing any more: an activation outside ``ffn_in``
    dense_out: str = "output.dense"  # the output projection
    input_norm: str | None = "attention.output.LayerNorm"  # the LayerNorm whose output the FFN reads, if there is one
    output_norm: str | None = (
        "output.LayerNorm"  # the next LayerNorm on the residual stream; None: it is not in the layer,
    )
    next_norm: str | None = None  # but here, seen from the next layer,
    final_norm: str | None = None  # and here after the last layer, seen from the base model
    embeddings: str = "embeddings.word_embeddings"  # the table of the tokens' vectors, seen from the base model
    activation: str = "hidden_act"  # field of the model's config, or the activation itself where there is no such field
    channels_first: bool = False  # hidden states are [rows, H, tokens]

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def whole(self) -> bool:
        """The FFF takes the place of the output projection too."""
        return self.dense_out.startswith(f"{self.ffn_in}.")

    def activation_of(self, config: Any) -> Any:
        """The dense network's activation, as the model's config names it."""
        return getattr(config, self.activation, self.activation)

    def blocks(self, base_model: Any) -> list[Any]:
        """The layers in the order in which they run, a shared one as often as it does; not typed, since what they hold is the
        family's own.

        Raises:
            ValueError: the row does not fit the model.
        """
        held = list(self.get(base_model, self.layers))
        if not self.shared:
            return held
        depth = base_model.config.num_hidden_layers
        return [held[int(i / (depth / len(held)))] for i in range(depth)]

    def ffns(self, block: Any) -> list["FFN"]:
        """The feedforward networks of a layer, in the order in which they run."""
        found = []
        for part in self.parts:
            if not part.endswith(".*"):
                found.append(FFN(self, block, part))
            elif hasattr(block, part[:-2]):
                found += [FFN(self, block, f"{part[:-2]}.{i}") for i in range(len(getattr(block, part[:-2])))]
        return found

    def get(self, module: Any, path: str) -> Any:
        """A submodule.

        Raises:
            ValueError: there is none.
        """
        try:
            return module.get_submodule(path)
        except AttributeError as error:
            raise ValueError(
                f"the family {self.model_type!r} does not fit transformers {transformers.__version__}: "
                f"there is no {path!r} in {type(module).__name__}"
            ) from error

    def groups(self, base_model: Any) -> list[list[int]]:
        """The layers' numbers, of those that share one FFN together; in most families each is alone."""
        owners: dict[int, list[int]] = {}
        for index, block in enumerate(self.blocks(base_model)):
            owners.setdefault(id(block), []).append(index)
        return list(owners.values())

    def check_shared(self, base_model: Any, layers: Mapping[int, FFFConfig]) -> None:
        """Raises ``ValueError`` where layers that share one FFN are to get different ones."""
        for indices in self.groups(base_model):
            if any(layers.get(i) != layers.get(indices[0]) for i in indices):
                given = ", ".join(f"{i}: {layers[i].shorthand if i in layers else 'dense'}" for i in indices)
                raise ValueError(
                    f"layers {indices[0]} to {indices[-1]} of a {self.model_type!r} model share one feedforward network, "
                    f"so that they need one config (given: {given})"
                )

    def ffn_key(self) -> re.Pattern[str]:
        """Finds the names of parameters that belong to a layer's FFN, dense or not."""
        parts = "|".join(re.escape(f"{part}." if part else "").replace(r"\*", r"\d+") for part in self.parts)
        names = "|".join(re.escape(name) for name in (self.ffn_in, self.dense_out))
        return re.compile(rf"(^|\.){re.escape(self.layers)}\.\d+\.({parts})({names})\.")


@dataclass(frozen=True)
class FFN:
    """One feedforward network of a layer, dense or converted."""

    family: FFNInterface
    block: Any
    part: str

    def get(self, path: str) -> Any:
        return self.family.get(self.block, self._path(path))

    def _path(self, path: str) -> str:
        return f"{self.part}.{path}" if self.part else path

    @property
    def hidden_size(self) -> int:
        """What goes into a dense network and comes out of it."""
        out = self.get(self.family.dense_out)
        sizes = (getattr(out, name, None) for name in ("out_features", "out_channels", "output_size"))
        return next(size for size in sizes if size is not None)

    def replace(self, config: FFFConfig) -> None:
        """Puts a new network in the place of the dense one."""
        family, weight = self.family, self.get(self.family.dense_out).weight
        like = {"device": weight.device, "dtype": weight.dtype}
        size, set_module = self.hidden_size, self.block.set_submodule
        new: nn.Module = feedforward(size, config, **like)
        output: nn.Module = OutputBias(size, **like)
        for path in family.between:
            set_module(self._path(path), nn.Identity())
        if family.whole:
            new = FeedforwardBlock(new, output)
        set_module(self._path(family.ffn_in), ChannelsFirst(new) if family.channels_first else new)
        if not family.whole:
            set_module(self._path(family.dense_out), ChannelsFirst(output) if family.channels_first else output)

    @property
    def fast(self) -> Feedforward | None:
        """What stands in the place of the dense network; None where that is still there."""
        module = self.get(self.family.ffn_in)
        module = getattr(module, "inner", module) if self.family.channels_first else module
        module = module.ffn if isinstance(module, FeedforwardBlock) else module
        return module if isinstance(module, Feedforward) else None

    @property
    def output(self) -> OutputBias:
        """Of a converted network, its output bias."""
        module = self.get(self.family.ffn_in if self.family.whole else self.family.dense_out)
        module = module.inner if self.family.channels_first else module
        return module.output if isinstance(module, FeedforwardBlock) else module

    @property
    def ends(self) -> tuple[Any, Any]:
        """The modules whose input the network reads and whose output it gives."""
        return self.get(self.family.ffn_in), self.get(
            self.family.ffn_in if self.family.whole else self.family.dense_out
        )


_PRE_NORM: dict[str, Any] = {"output_norm": None}
_GATED: dict[str, Any] = {
    "ffn_in": "mlp",
    "dense_in": "mlp.gate_proj",
    "gate": "mlp.up_proj",
    "dense_out": "mlp.down_proj",
    "input_norm": "post_attention_layernorm",
}

FAMILIES: dict[str, FFNInterface] = {
    row.model_type: row
    for row in [
        FFNInterface("bert"),
        FFNInterface("roberta"),
        FFNInterface("xlm-roberta"),
        FFNInterface("camembert"),
        FFNInterface("electra"),
        FFNInterface("ernie"),
        FFNInterface(
            "esm",
            input_norm="LayerNorm",
            **_PRE_NORM,
            next_norm="attention.LayerNorm",
            final_norm="encoder.emb_layer_norm_after",
            activation="gelu",
        ),
        FFNInterface("convbert"),
        FFNInterface("megatron-bert", input_norm="ln", **_PRE_NORM, next_norm="attention.ln", final_norm="encoder.ln"),
        FFNInterface("rembert"),
        FFNInterface("layoutlm"),
        FFNInterface("deberta"),
        FFNInterface("deberta-v2"),
        FFNInterface("mpnet", input_norm="attention.LayerNorm"),
        FFNInterface(
            "distilbert",
            layers="transformer.layer",
            ffn_in="ffn.lin1",
            dense_in="ffn.lin1",
            between=("ffn.activation",),
            dense_out="ffn.lin2",
            input_norm="sa_layer_norm",
            output_norm="output_layer_norm",
            activation="activation",
        ),
        FFNInterface(
            "albert",
            layers="encoder.albert_layer_groups",
            shared=True,
            parts=("albert_layers.*",),
            ffn_in="ffn",
            dense_in="ffn",
            between=("activation",),
            dense_out="ffn_output",
            input_norm="attention.LayerNorm",
            output_norm="full_layer_layer_norm",
        ),
        FFNInterface("mobilebert", parts=("ffn.*", ""), input_norm=None),
        FFNInterface(
            "squeezebert",
            layers="encoder.layers",
            dense_in="intermediate.conv1d",
            dense_out="output.conv1d",
            input_norm="post_attention.layernorm",
            output_norm="output.layernorm",
            channels_first=True,
        ),
        FFNInterface(
            "modernbert",
            layers="layers",
            ffn_in="mlp",
            dense_in="mlp.Wi",
            gate="mlp.Wi",
            dense_out="mlp.Wo",
            input_norm="mlp_norm",
            **_PRE_NORM,
            next_norm="attn_norm",
            final_norm="final_norm",
            embeddings="embeddings.tok_embeddings",
            activation="hidden_activation",
        ),
        FFNInterface("nomic_bert", layers="layers", **_GATED, output_norm="post_mlp_layernorm"),
        FFNInterface(
            "eurobert",
            layers="layers",
            **_GATED,
            **_PRE_NORM,
            next_norm="input_layernorm",
            final_norm="norm",
            embeddings="embed_tokens",
        ),
    ]
}
