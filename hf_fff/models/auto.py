"""Makes transformers' Auto classes know the Fast ones."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedModel,
)
from transformers.models.bert import modeling_bert as bert

from .fastbert import modeling_fastbert as fastbert
from .fastbert.configuration_fastbert import FastBertConfig

# (Auto class, dense class, Fast class)
_HEADS = [
    (AutoModel, bert.BertModel, fastbert.FastBertModel),
    (AutoModelForPreTraining, bert.BertForPreTraining, fastbert.FastBertForPreTraining),
    (AutoModelForMaskedLM, bert.BertForMaskedLM, fastbert.FastBertForMaskedLM),
    (
        AutoModelForNextSentencePrediction,
        bert.BertForNextSentencePrediction,
        fastbert.FastBertForNextSentencePrediction,
    ),
    (
        AutoModelForSequenceClassification,
        bert.BertForSequenceClassification,
        fastbert.FastBertForSequenceClassification,
    ),
    (AutoModelForMultipleChoice, bert.BertForMultipleChoice, fastbert.FastBertForMultipleChoice),
    (AutoModelForTokenClassification, bert.BertForTokenClassification, fastbert.FastBertForTokenClassification),
    (AutoModelForQuestionAnswering, bert.BertForQuestionAnswering, fastbert.FastBertForQuestionAnswering),
]

FAST_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {dense: fast for _, dense, fast in _HEADS}


def register() -> None:
    """Registers configs, tokenizers and models; doing it again changes nothing."""
    AutoConfig.register(FastBertConfig.model_type, FastBertConfig, exist_ok=True)
    AutoTokenizer.register(FastBertConfig, fast_tokenizer_class=BertTokenizer, exist_ok=True)
    for auto, _, fast in _HEADS:
        auto.register(FastBertConfig, fast, exist_ok=True)
