"""Recipes: subclasses of transformers.Trainer."""

from .arguments import DistillationArguments, arguments_for
from .checkpoints import SafeCheckpoints, last_checkpoint
from .data import TaskMix, TokenisedTexts
from .distil import DistillationReport, distil_task, distil_texts
from .objectives import get_objective
from .routing import RoutingMetrics
from .trainer import DistillationTrainer
from .work import TaskRows, distil_folder

__all__ = [
    "DistillationArguments",
    "DistillationReport",
    "DistillationTrainer",
    "RoutingMetrics",
    "SafeCheckpoints",
    "TaskMix",
    "TaskRows",
    "TokenisedTexts",
    "arguments_for",
    "distil_folder",
    "distil_task",
    "distil_texts",
    "get_objective",
    "last_checkpoint",
]
