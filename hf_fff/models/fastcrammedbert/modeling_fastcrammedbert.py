"""FastCrammedBert: norms before each part, no biases outside the FFFs and norms, scaled sinusoidal positions, a norm at the end."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...layers import feedforward
from ..delta import DeltaMixin
from ..fast import FastModelMixin
from .configuration_fastcrammedbert import FastCrammedBertConfig

__all__ = [
    "FastCrammedBertForMaskedLM",
    "FastCrammedBertForSequenceClassification",
    "FastCrammedBertModel",
    "FastCrammedBertPreTrainedModel",
]

_HIDDEN = -10000.0  # added to the scores of padding, as in training; a row of padding alone still gives numbers


def position_table(length: int, size: int) -> Tensor:
    """``[length, size]``: sines in even columns, cosines in odd ones."""
    rates = torch.exp(torch.arange(0, size, 2).float() * (-math.log(10000.0) / size))
    angles = torch.arange(length).float().unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


class FastCrammedBertEmbeddings(nn.Module):
    def __init__(self, config: FastCrammedBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_scale = nn.Parameter(torch.full((1,), config.hidden_size**-0.5))
        table = position_table(config.max_position_embeddings, config.hidden_size)
        self.register_buffer("position_table", table, persistent=False)
        self.position_table: Tensor
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.warned = False

    def forward(self, words: Tensor) -> Tensor:
        """``[rows, tokens, hidden_size]`` of words alone -> with their positions."""
        known, length = len(self.position_table), words.shape[1]
        if length > known and not self.warned:
            self.warned = True
            warnings.warn(
                f"inputs of {length} tokens are longer than the {known} that the model was trained on "
                "(max_position_embeddings)",
                stacklevel=2,
            )
        table = self.position_table[:length]
        if length > known:
            table = position_table(length, words.shape[2]).to(words)
        return self.dropout(self.norm(words + self.position_scale * table))


class FastCrammedBertAttention(nn.Module):
    def __init__(self, config: FastCrammedBertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.head_size = size // config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.output = nn.Linear(size, size, bias=False)
        self.is_causal = False

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        heads = (*x.shape[:-1], -1, self.head_size)
        q, k, v = (part(x).view(heads).transpose(1, 2) for part in (self.query, self.key, self.value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.head_size**-0.5, **kwargs)
        return self.output(y.reshape(x.shape)), weights


class FastCrammedBertLayer(GradientCheckpointingLayer):
    def __init__(self, config: FastCrammedBertConfig, index: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(size, eps=eps)
        self.attention = FastCrammedBertAttention(config)
        self.ffn_norm = nn.LayerNorm(size, eps=eps)
        self.ffn = feedforward(size, config.fff_layers[index])
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        y, _ = self.attention(self.attention_norm(x), attention_mask, **kwargs)
        x = x + self.dropout(y)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class FastCrammedBertPreTrainedModel(DeltaMixin, FastModelMixin, PreTrainedModel):
    """Base of all FastCrammedBert classes."""

    config_class = FastCrammedBertConfig
    config: FastCrammedBertConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["FastCrammedBertEmbeddings", "FastCrammedBertLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": FastCrammedBertLayer,
        "attentions": FastCrammedBertAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FastCrammedBertEmbeddings):
            size = self.config.hidden_size
            init.constant_(module.position_scale, size**-0.5)
            init.copy_(module.position_table, position_table(self.config.max_position_embeddings, size))


class FastCrammedBertModel(FastCrammedBertPreTrainedModel):
    """The encoder. It knows no token types; ``last_hidden_state`` has been through the final norm."""

    def __init__(self, config: FastCrammedBertConfig) -> None:
        super().__init__(config)
        self.embeddings = FastCrammedBertEmbeddings(config)
        self.layers = nn.ModuleList([FastCrammedBertLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """``input_ids`` ``[rows, tokens]`` or ``inputs_embeds`` ``[rows, tokens, hidden_size]``; ``attention_mask`` is 1 at tokens
        and 0 at padding, ``[rows, tokens]``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embeddings(self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        if attention_mask is not None:
            attention_mask = ((1 - attention_mask.to(x.dtype)) * _HIDDEN)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(x))


class FastCrammedBertForMaskedLM(FastCrammedBertPreTrainedModel):
    """The encoder, and a decoder without bias or transform before it."""

    _tied_weights_keys = {"decoder.weight": "encoder.embeddings.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: FastCrammedBertConfig) -> None:
        super().__init__(config)
        self.encoder = FastCrammedBertModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """As the encoder's; ``labels`` ``[rows, tokens]`` are -100 where they do not count."""
        out = self.encoder(input_ids, attention_mask, inputs_embeds, return_dict=True, **kwargs)
        logits = self.decoder(out.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions)


class FastCrammedBertPooler(nn.Module):
    def __init__(self, config: FastCrammedBertConfig) -> None:
        super().__init__()
        self.pooling = config.classifier_pooling
        self.dense = nn.Linear(config.hidden_size, config.classifier_hidden_size)
        given = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if given is None else given)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """``[rows, tokens, hidden_size] -> [rows, classifier_hidden_size]``."""
        if self.pooling == "zero_index":
            pooled = hidden[:, 0]
        elif self.pooling == "avg_masked" and attention_mask is not None:
            mask = attention_mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        else:
            pooled = hidden.mean(1)
        return self.dropout(torch.tanh(self.dense(pooled)))


class FastCrammedBertForSequenceClassification(FastCrammedBertPreTrainedModel):
    """The encoder, pooled as ``config.classifier_pooling`` says, and a classifier with one hidden layer."""

    def __init__(self, config: FastCrammedBertConfig) -> None:
        super().__init__(config)
        labels: Any = config.num_labels
        self.num_labels = labels
        self.encoder = FastCrammedBertModel(config)
        self.pooler = FastCrammedBertPooler(config)
        self.classifier = nn.Linear(config.classifier_hidden_size, labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As the encoder's; ``labels`` as in transformers' BERT, of which ``config.problem_type`` tells the kind."""
        out = self.encoder(input_ids, attention_mask, inputs_embeds, return_dict=True, **kwargs)
        logits = self.classifier(self.pooler(out.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )
