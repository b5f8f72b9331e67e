"""What a measurement was made on."""

import os
import platform
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


def summary() -> dict[str, Any]:
    """The few facts that stand beside every figure."""
    backend = ops.backend()  # first: it loads the library, which alone knows its instruction set
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": ops.isa() or "-",
        "backend": backend,
        "torch": torch.__version__,
        "hf_fff": __version__,
    }


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
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "backend": {"cpu": ops.backend("cpu"), "isa": ops.isa()},
        "kernels": loader.describe(),
    }


def facts() -> dict[str, Any]:
    """What every output of a measurement begins with: ``summary``, and what else somebody needs to make it again."""
    return {
        **summary(),
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
