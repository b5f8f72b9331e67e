"""FastCrammedBert's configuration."""

from typing import Any, ClassVar

import transformers
from transformers import AutoConfig, PreTrainedConfig

from ..families import FFNInterface
from ..fast import FastConfigMixin

POOLINGS = ("avg", "avg_masked", "zero_index")
MODELS = {
    "AutoModel": "FastCrammedBertModel",
    "AutoModelForMaskedLM": "FastCrammedBertForMaskedLM",
    "AutoModelForSequenceClassification": "FastCrammedBertForSequenceClassification",
}


class FastCrammedBertConfig(FastConfigMixin, PreTrainedConfig):
    """The sizes of a crammed BERT, by default those of UltraFastBERT-1x11-long.

    Args:
        fff: which FFF the layers hold (see ``FastConfigMixin``); each layer has one, for there is no dense network to fall back to.
        max_position_embeddings: the length that it was trained on. Longer inputs work, with a warning.
        tie_word_embeddings: the decoder of masked words is the embedding.
        classifier_hidden_size: between the pooled hidden states and the labels.
        classifier_pooling: "avg", the mean over all positions, padding included, which is what UltraFastBERT was trained with:
            a text's logits depend on the padding of its batch. "avg_masked" leaves padding out; "zero_index" takes the first token.
        classifier_dropout: before the last layer; ``hidden_dropout_prob`` where it is None.

    Raises:
        ValueError: sizes that do not fit each other, an unknown pooling, a layer without an FFF.
    """

    model_type = "fastcrammedbert"
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embeddings.word_embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
    }
    dense_model_type: ClassVar[str] = "crammedbert"
    family = FFNInterface(
        "crammedbert",
        layers="layers",
        ffn_in="ffn",
        dense_in="ffn",
        dense_out="ffn",
        input_norm="ffn_norm",
        output_norm=None,
        next_norm="attention_norm",
        final_norm="final_norm",
        activation="gelu",
    )

    vocab_size: int = 32768
    hidden_size: int = 768
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    fff: Any = "1x11"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    max_position_embeddings: int = 128
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False
    classifier_hidden_size: int = 1024
    classifier_pooling: str = "avg"
    classifier_dropout: float | int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Whoever asks an Auto class for a model has made a config before.
        register_models()
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % 2 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be even, and a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.classifier_pooling not in POOLINGS:
            raise ValueError(
                f"classifier_pooling={self.classifier_pooling!r} is not known (allowed: {', '.join(POOLINGS)})"
            )
        if missing := sorted(set(range(self.num_hidden_layers)) - set(self.fff_layers)):
            raise ValueError(f"fff has nothing for layers {', '.join(map(str, missing))}: each layer needs an FFF")


def register() -> None:
    """Makes ``AutoConfig`` know the config; models follow when one is made."""
    AutoConfig.register(FastCrammedBertConfig.model_type, FastCrammedBertConfig, exist_ok=True)


_registered: list[bool] = []


def register_models() -> None:
    """Makes the Auto classes know the models, once."""
    if _registered:
        return
    _registered.append(True)
    from . import modeling_fastcrammedbert as modeling

    for auto, name in MODELS.items():
        getattr(transformers, auto).register(FastCrammedBertConfig, getattr(modeling, name), exist_ok=True)
