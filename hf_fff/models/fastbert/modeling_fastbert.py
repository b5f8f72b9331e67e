"""FastBERT: transformers' own BERT classes, with the FFNs replaced as the config says."""

from transformers.models.bert import modeling_bert as bert

from ..fast import FastModelMixin
from .configuration_fastbert import FastBertConfig


class FastBertPreTrainedModel(FastModelMixin, bert.BertPreTrainedModel):
    """Base of all FastBERT classes."""

    config: FastBertConfig
    config_class = FastBertConfig


class FastBertModel(FastBertPreTrainedModel, bert.BertModel):
    """The bare encoder: hidden states and the pooled output."""


class FastBertForPreTraining(FastBertPreTrainedModel, bert.BertForPreTraining):
    """Masked language modelling and next sentence prediction."""


class FastBertForMaskedLM(FastBertPreTrainedModel, bert.BertForMaskedLM):
    """Masked language modelling."""


class FastBertForNextSentencePrediction(FastBertPreTrainedModel, bert.BertForNextSentencePrediction):
    """Next sentence prediction."""


class FastBertForSequenceClassification(FastBertPreTrainedModel, bert.BertForSequenceClassification):
    """Classification or regression of texts and pairs of texts."""


class FastBertForMultipleChoice(FastBertPreTrainedModel, bert.BertForMultipleChoice):
    """Choice among several continuations."""


class FastBertForTokenClassification(FastBertPreTrainedModel, bert.BertForTokenClassification):
    """A label for each token."""


class FastBertForQuestionAnswering(FastBertPreTrainedModel, bert.BertForQuestionAnswering):
    """Extractive question answering."""
