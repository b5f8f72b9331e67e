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
from .functions import fff, fff_packed, fff_train, pack
from .loader import Status, load, setting, status

__all__ = [
    "ACTIVATIONS",
    "ROWS",
    "Status",
    "backend",
    "depth_of",
    "fff",
    "fff_packed",
    "fff_train",
    "has_native",
    "isa",
    "load",
    "pack",
    "status",
]


def _fallback(name: str, home: ModuleType = torch_backend) -> Any:
    """The kernel of last resort: load the device's native library on the first call, else compute in PyTorch.

    A library that loads registers itself for its device, so that later calls never come here: waiting for the first use
    costs the hot path nothing, and works wherever the operator is called from (export, pickle, compile).
    """
    operator = getattr(torch.ops.hf_fff, name).default
    in_torch = getattr(home, name)

    def kernel(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type == "cpu" and not has_native() and load("cpu").loaded:
            return operator(x, *args, **kwargs)
        if home is packed_backend and x.device.type != "cpu":
            raise ValueError(f"hf_fff::{name} is for the CPU, and got a tensor on {x.device}")
        if x.device.type == "cuda" and (on_gpu := _triton()):
            return getattr(on_gpu, name)(x, *args, **kwargs)
        return in_torch(x, *args, **kwargs)

    return kernel


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
    if has_native(device) or (device == "cpu" and load("cpu").loaded):
        return "native"
    return "triton" if device == "cuda" and torch.cuda.is_available() and _triton() else "torch"


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
for _name in ("pack", "fff_packed"):
    library.impl(_name, _fallback(_name, packed_backend), "CompositeExplicitAutograd")
