"""FastBERT's models, under the names by which they are imported elsewhere."""

from ..classes import FastBertForMaskedLM as FastBertForMaskedLM
from ..classes import FastBertForMultipleChoice as FastBertForMultipleChoice
from ..classes import FastBertForNextSentencePrediction as FastBertForNextSentencePrediction
from ..classes import FastBertForPreTraining as FastBertForPreTraining
from ..classes import FastBertForQuestionAnswering as FastBertForQuestionAnswering
from ..classes import FastBertForSequenceClassification as FastBertForSequenceClassification
from ..classes import FastBertForTokenClassification as FastBertForTokenClassification
from ..classes import FastBertModel as FastBertModel
from ..classes import FastBertPreTrainedModel as FastBertPreTrainedModel
