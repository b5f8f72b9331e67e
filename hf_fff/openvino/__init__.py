"""Models inside OpenVINO: int8 or bf16 attention by the engine, FFFs by the kernels of ``kernels/cpu``, on the engine's threads.

``compile`` makes one of a torch model, ``load`` opens what its ``save_pretrained`` wrote. `docs/openvino.md`.
"""

from .library import build, extension
from .model import OpenVINOModel, compile, load

__all__ = ["OpenVINOModel", "build", "compile", "extension", "load"]
