"""The fast feedforward operator: ``torch.ops.hf_fff.fff`` and its differentiable sibling.

This folder and ``kernels/`` know neither models nor transformers: whoever wants the operator alone can lift them out.
"""

import ctypes
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import packed_backend, torch_backend
from ._schema import ACTIVATIONS, ROWS, depth_of, library
from .functions import add_bias, fff, fff_packed, fff_train, pack
from .loader import Status, load, no_gpu, setting, status

__all__ = [
    "ACTIVATIONS",
    "ROWS",
    "Status",
    "add_bias",
    "backend",
    "depth_of",
    "fff",
    "fff_packed",
    "fff_train",
    "has_native",
    "isa",
    "load",
    "no_gpu",
    "pack",
    "status",
    "way",
]


_LIBRARIES = ("cpu", "cuda")  # devices that have a native library, which has their name


def _fallback(name: str, home: ModuleType = torch_backend) -> Any:
    """The kernel of last resort: load the device's native library on the first call, else compute in PyTorch.

    A library that loads registers itself for its device, so that later calls never come here: waiting for the first use
    costs the hot path nothing, and works wherever the operator is called from (export, pickle, compile).
    """
    operator = getattr(torch.ops.hf_fff, name).default
    in_torch = getattr(home, name)

    def kernel(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        device = x.device.type
        if home is packed_backend and device != "cpu":
            raise ValueError(f"hf_fff::{name} is for the CPU, and got a tensor on {x.device}")
        if device in _LIBRARIES and not has_native(device) and load(device).loaded:
            return operator(x, *args, **kwargs)
        if device == "cuda" and (on_gpu := _triton()):
            return getattr(on_gpu, name)(x, *args, **kwargs)
        return in_torch(x, *args, **kwargs)

    return kernel


def _backward_dense(grad_y: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the CUDA kernels call for wide layers: Triton between matrix products, or PyTorch alone."""
    device = grad_y.device.type
    on_gpu = _triton() if device == "cuda" else None
    with torch.autocast(device, enabled=False):  # which may be on where backward() is called
        return (on_gpu or torch_backend).fff_backward(grad_y, *args, **kwargs)


@cache
def _triton() -> ModuleType | None:
    """The Triton kernels, if they work here: tried once, on a few numbers."""
    if setting() == "torch":
        return None
    try:
        from . import triton_backend

        triton_backend.try_out()
    except Exception as error:  # whatever it is: Triton wants a driver, a C compiler, Python's headers
        warnings.warn(
            f"hf_fff: the Triton kernels do not work here, the slower PyTorch code is used: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return triton_backend


def has_native(device: str = "cpu") -> bool:
    """Whether a native library has registered its kernels for this device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("hf_fff::fff", device.upper())


def backend(device: str = "cpu") -> str:
    """``"native"``, ``"triton"`` or ``"torch"``: what a call on this device runs, loading the native library where there is one."""
    there = device == "cpu" or (device == "cuda" and torch.cuda.is_available())
    if has_native(device) or (there and load(device).loaded):
        return "native"
    return "triton" if there and device == "cuda" and _triton() else "torch"


def way(
    n_trees: int,
    depth: int,
    hidden: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    routing: bool = False,
) -> str | None:
    """How the CUDA kernels do a call on the current device (docs/kernel-cuda.md); None where they are not in use.

    Returns:
        "gather", "sorted", "tiles", "columns", "forest" or "plain" (forward), "tiles" or "conditional" (backward): only the nodes that tokens visit
        take part, and with tiles and forest their neighbours in small subtrees;
        "dense": all nodes do, in matrix products, and a mask drops the others, which is faster for wide layers.
    """
    if not torch.cuda.is_available() or backend("cuda") != "native":
        return None
    found = ctypes.CDLL(str(load("cuda").path)).hf_fff_cuda_way
    found.restype = ctypes.c_char_p
    found.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_int] * 3 + [ctypes.c_bool] * 2
    device = torch.cuda.get_device_properties()
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as cuda/fff.h counts them
    capability = 10 * device.major + device.minor
    facts = (kinds.index(dtype), capability, device.multi_processor_count)
    return found(tokens, hidden, n_trees, depth, *facts, backward, routing).decode()


def isa() -> str | None:
    """The instruction set that the native CPU kernel uses, such as ``"avx512"``; None without that kernel."""
    loaded = status("cpu")
    if loaded is None or not loaded.loaded:
        return None
    name = ctypes.CDLL(str(loaded.path)).hf_fff_cpu_isa
    name.restype = ctypes.c_char_p
    return name().decode()


for _name in ("fff", "fff_train", "fff_backward"):
    library.impl(_name, _fallback(_name), "CompositeExplicitAutograd")
library.impl("fff_backward_dense", _backward_dense, "CompositeExplicitAutograd")
library.impl("add_bias", torch.add, "CompositeExplicitAutograd")
for _name in ("pack", "fff_packed"):
    library.impl(_name, _fallback(_name, packed_backend), "CompositeExplicitAutograd")
