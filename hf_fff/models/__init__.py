"""The Fast<Family> models: transformers' own classes with fast feedforward networks inside."""

from .classes import class_names, fast_class, known_types, register, register_family
from .families import FAMILIES, FFN, FFNInterface

__all__ = ["FAMILIES", "FFN", "FFNInterface", "class_names", "fast_class", "known_types", "register", "register_family"]
