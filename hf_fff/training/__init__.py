"""Recipes: subclasses of transformers.Trainer."""

from .distillation import (
    DistillationArguments,
    DistillationReport,
    DistillationTrainer,
    TokenisedTexts,
    distil_folder,
    distil_texts,
)

__all__ = [
    "DistillationArguments",
    "DistillationReport",
    "DistillationTrainer",
    "TokenisedTexts",
    "distil_folder",
    "distil_texts",
]
