"""hf_fff: fast feedforward networks (arXiv 2311.10770) for BERT-like models of Hugging Face transformers.

Importing it registers the Fast classes, so that ``AutoModel.from_pretrained`` loads converted models. Names are imported
when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .models import register as _register

if TYPE_CHECKING:
    from .config import FFFConfig as FFFConfig
    from .layers import FFF as FFF
    from .models.fastbert.configuration_fastbert import FastBertConfig as FastBertConfig
    from .models.fastbert.modeling_fastbert import FastBertForMaskedLM as FastBertForMaskedLM
    from .models.fastbert.modeling_fastbert import FastBertForMultipleChoice as FastBertForMultipleChoice
    from .models.fastbert.modeling_fastbert import (
        FastBertForNextSentencePrediction as FastBertForNextSentencePrediction,
    )
    from .models.fastbert.modeling_fastbert import FastBertForPreTraining as FastBertForPreTraining
    from .models.fastbert.modeling_fastbert import FastBertForQuestionAnswering as FastBertForQuestionAnswering
    from .models.fastbert.modeling_fastbert import (
        FastBertForSequenceClassification as FastBertForSequenceClassification,
    )
    from .models.fastbert.modeling_fastbert import FastBertForTokenClassification as FastBertForTokenClassification
    from .models.fastbert.modeling_fastbert import FastBertModel as FastBertModel
    from .models.usage import fff_usage as fff_usage
    from .surgery import Calibration as Calibration
    from .surgery import convert_ffn_to_fff as convert_ffn_to_fff
    from .training import DistillationArguments as DistillationArguments
    from .training import DistillationTrainer as DistillationTrainer

_FASTBERT = "models.fastbert.modeling_fastbert"
_HOME = {
    "FFF": "layers",
    "FFFConfig": "config",
    "Calibration": "surgery",
    "convert_ffn_to_fff": "surgery",
    "fff_usage": "models.usage",
    "DistillationArguments": "training",
    "DistillationTrainer": "training",
    "FastBertConfig": "models.fastbert.configuration_fastbert",
    "FastBertModel": _FASTBERT,
    "FastBertForPreTraining": _FASTBERT,
    "FastBertForMaskedLM": _FASTBERT,
    "FastBertForNextSentencePrediction": _FASTBERT,
    "FastBertForSequenceClassification": _FASTBERT,
    "FastBertForMultipleChoice": _FASTBERT,
    "FastBertForTokenClassification": _FASTBERT,
    "FastBertForQuestionAnswering": _FASTBERT,
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_register()
