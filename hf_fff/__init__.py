"""hf_fff: fast feedforward networks (arXiv 2311.10770) for BERT-like models of Hugging Face transformers.

Importing it registers the Fast classes, so that ``AutoModel.from_pretrained`` loads converted models. Names are imported
when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _early  # noqa: F401 - before what takes long to import
from ._version import __version__
from .models import class_names, known_types, register

if TYPE_CHECKING:
    from .adapters import fff_target_parameters as fff_target_parameters
    from .config import FFFConfig as FFFConfig
    from .layers import FFF as FFF
    from .models import FFNInterface as FFNInterface
    from .models import register_family as register_family
    from .models.usage import fff_usage as fff_usage
    from .modes import rounded_rows as rounded_rows
    from .packing import optimize as optimize
    from .surgery import Calibration as Calibration
    from .surgery import convert_ffn_to_fff as convert_ffn_to_fff
    from .surgery import load_fff as load_fff
    from .surgery import save_fff as save_fff
    from .training import DistillationArguments as DistillationArguments
    from .training import DistillationTrainer as DistillationTrainer
    from .training import FinetuningArguments as FinetuningArguments
    from .training import FinetuningTrainer as FinetuningTrainer

_HOME = {
    "FFF": "layers",
    "FFFConfig": "config",
    "FFNInterface": "models",
    "Calibration": "surgery",
    "convert_ffn_to_fff": "surgery",
    "fff_target_parameters": "adapters",
    "fff_usage": "models.usage",
    "load_fff": "surgery",
    "optimize": "packing",
    "register_family": "models",
    "rounded_rows": "modes",
    "save_fff": "surgery",
    "DistillationArguments": "training",
    "FinetuningArguments": "training",
    "FinetuningTrainer": "training",
    "DistillationTrainer": "training",
}

# The architecture of UltraFastBERT, which transformers does not have
_CRAMMED = {
    "FastCrammedBertConfig": "configuration_fastcrammedbert",
    **dict.fromkeys(
        (
            "FastCrammedBertModel",
            "FastCrammedBertPreTrainedModel",
            "FastCrammedBertForMaskedLM",
            "FastCrammedBertForSequenceClassification",
        ),
        "modeling_fastcrammedbert",
    ),
}
_HOME |= {name: f"models.fastcrammedbert.{file}" for name, file in _CRAMMED.items()}

# Fast<Family>Config, Fast<Family>Model and the heads of all families
_CLASSES = [name for model_type in known_types() for name in class_names(model_type)]

__all__ = ["__version__", *_HOME, *_CLASSES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME and not name.startswith("Fast"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME.get(name, 'models.classes')}", __name__), name)
    if name in _HOME:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register()
