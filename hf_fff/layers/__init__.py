"""Modules that know no model: import only torch and the operator."""

from .fff import FFF, OutputBias

__all__ = ["FFF", "OutputBias"]
