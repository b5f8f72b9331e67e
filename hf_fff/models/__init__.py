"""The Fast<Family> models: transformers' own classes with fast feedforward networks inside."""

from .auto import FAST_CLASSES, register
from .families import FAMILIES, FFNInterface

__all__ = ["FAMILIES", "FAST_CLASSES", "FFNInterface", "register"]
