"""The kernel of a repository of the Hub: only where ``HF_FFF_BACKEND=hub`` asks for it, and only the commit that
``HF_FFF_KERNEL_REPO=OWNER/NAME@COMMIT`` names. It is code, and runs; whoever sets the two variables trusts it."""

import os
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ._schema import library

_PINNED = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([0-9a-f]{40})", re.ASCII)
_OPERATORS = ("fff", "fff_train", "fff_backward", "pack", "fff_packed")


def asked_for() -> tuple[str, str]:
    """The repository, and its commit.

    Raises:
        ValueError: ``HF_FFF_KERNEL_REPO`` is not set, or pins no commit.
    """
    value = os.environ.get("HF_FFF_KERNEL_REPO", "")
    if not (found := _PINNED.fullmatch(value)):
        raise ValueError(
            f"HF_FFF_KERNEL_REPO={value!r} must be OWNER/NAME@COMMIT, with the 40 hexadecimal digits of a commit: a branch or a "
            "tag may become other code"
        )
    return found[1], found[2]


def load_from_hub(dispatch_key: str) -> tuple[Path, str]:
    """Fetches and loads the kernel that is asked for, and makes it the implementation of our operators.

    Args:
        dispatch_key: "CPU".

    Returns:
        its library's place, and where it is from.

    Raises:
        ValueError: as ``asked_for``.
        RuntimeError: the package kernels is not there, or cannot get it; it is no kernel of FFFs, or one of another version.
    """
    repo, revision = asked_for()
    kernels = kernels_package()
    try:
        module = _fetched(kernels, repo, revision, dispatch_key.lower())
    except (
        Exception
    ) as error:  # of many kinds: no network, no such repository, no build for this machine, a damaged file
        told = " ".join(str(error).split())
        raise RuntimeError(f"the kernel {repo}@{revision} cannot be had: {type(error).__name__}: {told}") from error
    path = _library_of(module)
    theirs = {name: _operator(module, name) for name in _OPERATORS}
    if path is None or (strange := [name for name, found in theirs.items() if _takes(found) != _takes(_ours(name))]):
        what = "it has no library" if path is None else f"its {strange[0]} takes other arguments than this hf_fff's"
        raise RuntimeError(f"{repo}@{revision} is no kernel of this version of hf_fff: {what}")
    for name, found in theirs.items():
        library.impl(name, found, dispatch_key)
    return path, f"hub: {repo}@{revision}"


def _fetched(kernels: Any, repo: str, revision: str, backend: str) -> ModuleType:
    from huggingface_hub import constants

    cache = Path(os.environ.get("KERNELS_CACHE") or constants.HF_HUB_CACHE)
    there = cache / f"kernels--{repo.replace('/', '--')}" / "snapshots" / revision
    # Offline, kernels 0.17 wants all files of a repository in the cache, where it puts those of one build alone.
    if constants.HF_HUB_OFFLINE and there.is_dir():
        found: ModuleType = kernels.get_local_kernel(there, backend=backend)
        return found
    got: ModuleType = kernels.get_kernel(repo, revision=revision, backend=backend, trust_remote_code=True)
    return got


def kernels_package() -> Any:
    """The package ``kernels`` of Hugging Face.

    Raises:
        RuntimeError: it is not installed. (Where a folder of that name lies in the current one, as in this project's own, the import
            alone succeeds and gives an empty namespace.)
    """
    try:
        version("kernels")
        module = import_module("kernels")
        assert callable(module.get_kernel)
    except (PackageNotFoundError, ImportError, AttributeError, AssertionError) as error:
        raise RuntimeError("the package kernels is not installed: pip install hf-fff[kernels]") from error
    return module


def _library_of(module: ModuleType) -> Path | None:
    return next(iter(sorted(Path(str(module.__file__)).parent.glob("*.so"))), None)


def _operator(module: ModuleType, name: str) -> Any:
    found = getattr(getattr(module, "ops", None), name, None)
    return getattr(found, "default", None)


def _ours(name: str) -> Any:
    return getattr(torch.ops.hf_fff, name).default


def _takes(operator: Any) -> str | None:
    """The schema without the namespace."""
    return str(operator._schema).split("::", 1)[-1] if operator is not None else None
