"""Fast feedforward networks (arXiv 2311.10770): trees of neurons of which a token visits one path.

``fff`` is the layer as a function, differentiable; ``layers.FFF`` the same for ``kernelize``. ``pack`` makes frozen weights smaller, for
inference by ``fff_packed``. The files beside this one are those of ``hf_fff/ops``: ``hf-fff build --kernel-layout`` puts them here.
"""

from . import layers
from ._ops import ops
from ._schema import ACTIVATIONS, ROWS, library
from .functions import fff, fff_packed, fff_train, pack
from .torch_backend import fff_backward as _in_torch

library.impl("fff_backward_dense", _in_torch, "CompositeExplicitAutograd")  # what the CUDA kernels call for wide layers

__all__ = ["ACTIVATIONS", "ROWS", "fff", "fff_packed", "fff_train", "layers", "ops", "pack"]
