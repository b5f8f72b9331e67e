"""What a measurement was made on."""

import os
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__, ops
from ..ops import loader

_PACKAGES = (
    "transformers",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "sentence-transformers",
    "peft",
    "openvino",
    "kernels",
)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        fields = {name.strip(): value.strip() for name, _, value in pairs}
        return f"{fields['model name']} (family {fields['cpu family']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def summary(device: str = "cpu") -> dict[str, Any]:
    """The few facts that stand beside every figure that was measured on that kind of device."""
    backend = ops.backend(device)  # first: it loads the library, which alone knows its instruction set
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": ops.isa() or "-",
        "backend": backend,
        "torch": torch.__version__,
        "hf_fff": __version__,
    }


def gpu() -> dict[str, Any] | None:
    """What is known of the GPU that torch uses; None where there is none."""
    if not torch.cuda.is_available():
        return None
    of = torch.cuda.get_device_properties()
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()  # such as 13000
    return {
        "name": of.name,
        "capability": f"{of.major}.{of.minor}",
        "memory_gib": round(of.total_memory / 2**30, 1),
        "l2_mib": round(getattr(of, "L2_cache_size", 0) / 2**20, 1),
        "multiprocessors": of.multi_processor_count,
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "driver": f"{driver // 1000}.{driver % 1000 // 10}" if driver else None,
    }


def gpu_line() -> str:
    """The same in words."""
    if (of := gpu()) is None:
        return "no GPU"
    others = f", the first of {of['count']}" if of["count"] > 1 else ""
    driver = f", a driver for CUDA up to {of['driver']}" if of["driver"] else ""
    return f"{of['name']}{others}, compute capability {of['capability']}, {of['memory_gib']} GiB{driver}"


# What `env` tells the way of: layers of BERT-base's size, in bfloat16, with as many tokens as a training step has
_LADDER, _TOKENS = ((1, 11), (4, 9), (8, 8), (32, 6), (64, 5), (128, 4), (512, 2)), 16384


def gpu_ways() -> dict[str, dict[str, str]]:
    """How the CUDA kernels compute layers of the paper's: pass -> KxD -> ``ops.way``; empty where they are not in use."""
    if _runs_on_gpu() != "native":
        return {}
    passes: dict[str, dict[str, bool]] = {
        "forward": {},
        "backward": {"backward": True},
        "backward with the routing gradient": {"backward": True, "routing": True},
    }
    return {
        name: {f"{k}x{d}": ops.way(k, d, 768, _TOKENS, torch.bfloat16, **of) or "" for k, d in _LADDER}
        for name, of in passes.items()
    }


def _runs_on_gpu() -> str | None:
    """As ``ops.backend`` says it; "nothing" where HF_FFF_BACKEND forbids what there is, and None without a GPU."""
    try:
        return ops.backend("cuda") if torch.cuda.is_available() else None
    except RuntimeError:  # `describe` tells why
        return "nothing"


def report() -> dict[str, Any]:
    """All that ``hf-fff env`` tells."""
    return {
        "hf_fff": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"torch": torch.__version__, **{p: _installed(p) or "not installed" for p in _PACKAGES}},
        "cpu": {
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": gpu_line(),
        "backend": {"cpu": ops.backend("cpu"), "isa": ops.isa(), "cuda": _runs_on_gpu()},
        "gpu_ways": gpu_ways(),
        "kernels": loader.describe(),
    }


def facts(device: str = "cpu") -> dict[str, Any]:
    """What every output of a measurement begins with: ``summary``, and what else somebody needs to make it again."""
    return {
        **summary(device),
        "cores": os.cpu_count(),
        "caches": caches(),
        "python": platform.python_version(),
        "transformers": _installed("transformers"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def caches() -> dict[str, str]:
    """Sizes of the first core's data caches as the system tells them, such as ``{"L1": "48K", "L2": "2048K"}``."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            sizes[f"L{level}"] = size
    return sizes


def free_memory() -> int | None:
    """Bytes that a process can have without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def missing(packages: Iterable[str]) -> str | None:
    """The first of some packages that is not installed, or None."""
    return next((package for package in packages if _installed(package) is None), None)
