"""Models as ONNX files that any runtime opens: each FFF is an operation of the domain ``hf_fff``, defined in the file itself by
standard operations. `docs/onnx.md`.
"""

from .model import export, operations

__all__ = ["export", "operations"]
