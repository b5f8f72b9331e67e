"""The kernel as a project of Hugging Face's kernel-builder, with a build for this machine that ``kernels.get_local_kernel`` loads."""

import base64
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..files import atomic_folder
from ..ops import loader

NAME, VERSION, LICENCE = "fff", 0, "Apache-2.0"  # as in kernels/build.toml
# What of the sources is not the kernel's: another engine's binding, benchmarks and tests of hf_fff itself.
_NOT_THEIRS = ("openvino", "bench_*.cpp", "check*.c*", "__pycache__")
_SHARED = (
    "_schema.py",
    "functions.py",
    "packed_backend.py",
    "torch_backend.py",
)  # of hf_fff/ops; _ops.py is the builder's
_OPS = '''"""The operators of this build, in a namespace of their own."""

from pathlib import Path

import torch

torch.ops.load_library(str(Path(__file__).with_name("{library}")))
ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
'''


def variant() -> str:
    """The name of a build for this machine: one for torch 2.11 and later, by its stable ABI."""
    system = {"darwin": "darwin"}.get(sys.platform, "linux")
    machine = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return f"torch-stable-abi211-cpu-{machine}-{system}"


def write_layout(folder: Path, *, overwrite: bool = False) -> Path:
    """Writes the project, and ``build/VARIANT`` in it; returns the latter. The folder appears whole or not at all.

    ``build/VARIANT`` is what kernel-builder would make, except that the library is compiled by this machine's compiler, for its
    C library and later ones, and is no Python module.

    Raises:
        FileExistsError: the folder exists and is not empty, and ``overwrite`` is not set.
        RuntimeError: the library cannot be compiled.
    """
    with atomic_folder(folder, overwrite=overwrite) as new:
        shutil.copytree(loader.kernels_root(), new, ignore=shutil.ignore_patterns(*_NOT_THEIRS), dirs_exist_ok=True)
        package = new / "torch-ext" / NAME
        for name in _SHARED:
            shutil.copy(Path(loader.__file__).with_name(name), package / name)
        identifier = f"_{NAME}_cpu_{_digest(new)}"
        build = new / "build" / variant()
        shutil.copytree(package, build)
        library = f"{identifier}.so"
        (build / "_ops.py").write_text(_OPS.format(library=library, name=identifier), encoding="utf-8")
        _compile(identifier, build / library)
        _write_metadata(build, identifier)
    return folder / "build" / variant()


def _digest(folder: Path) -> str:
    """Eight digits that tell these sources from others."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return total.hexdigest()[:8]


def _compile(identifier: str, target: Path) -> None:
    host = loader._torch()
    ours = replace(host, flags=(*host.flags, f"-DHF_FFF_NAMESPACE={identifier}"))
    library = replace(loader.LIBRARIES["cpu"], host=lambda: ours)
    work = target.parent / "work"
    work.mkdir()
    loader._compile(library, loader._compiler(library), work / target.name)
    (work / target.name).replace(target)
    shutil.rmtree(work)


def _write_metadata(build: Path, identifier: str) -> None:
    metadata: Mapping[str, object] = {
        "name": NAME,
        "id": identifier,
        "version": VERSION,
        "license": LICENCE,
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": {name: _sha256(build / name) for name in _files(build)}},
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _sha256(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
