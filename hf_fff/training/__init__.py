"""Recipes: subclasses of transformers.Trainer."""

from .arguments import DistillationArguments, FinetuningArguments, arguments_for
from .checkpoints import SafeCheckpoints, last_checkpoint
from .data import StreamedPieces, TaskMix, TextPieces, TextStream, TokenisedTexts
from .distil import DistillationReport, distil_task, distil_texts
from .finetuning import FinetuningTrainer, MaskingCollator, set_routing_gradient
from .objectives import get_objective
from .routing import RoutingMetrics
from .settings import PRESETS, finetuning_arguments, parse_settings, preset, read_settings
from .train import TrainingReport, TrainingRows, train_folder
from .trainer import DistillationTrainer
from .work import TaskRows, distil_folder

__all__ = [
    "PRESETS",
    "DistillationArguments",
    "DistillationReport",
    "DistillationTrainer",
    "FinetuningArguments",
    "FinetuningTrainer",
    "MaskingCollator",
    "RoutingMetrics",
    "SafeCheckpoints",
    "StreamedPieces",
    "TaskMix",
    "TaskRows",
    "TextPieces",
    "TextStream",
    "TokenisedTexts",
    "TrainingReport",
    "TrainingRows",
    "arguments_for",
    "distil_folder",
    "distil_task",
    "distil_texts",
    "finetuning_arguments",
    "get_objective",
    "last_checkpoint",
    "parse_settings",
    "preset",
    "read_settings",
    "set_routing_gradient",
    "train_folder",
]
