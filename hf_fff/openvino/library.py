"""The operation FFF as a library that OpenVINO loads: compiled on first use against the headers of the installed wheel."""

import ctypes
import sys
from pathlib import Path
from types import ModuleType

from ..ops import loader
from ..ops.loader import BuildError, Host, Library

OPERATION = "hf_fff.1"  # OPENVINO_OP in kernels/openvino/extension.cpp
_NAME = "openvino"


def engine() -> ModuleType:
    """The package openvino.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import openvino

        openvino.Core  # noqa: B018  # a folder of that name on the path is importable too
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"OpenVINO cannot be imported ({error}): install it with `pip install 'hf-fff[openvino]'`"
        ) from error
    return openvino


def engine_version() -> str:
    """Such as ``"2026.4.1"``."""
    return str(engine().get_version()).partition("-")[0]


def _host() -> Host:
    try:
        home = _home()
    except ImportError as error:
        raise BuildError(str(error)) from error
    names = [p.name for base in ("libopenvino", "libtbb") for p in sorted((home / "libs").glob(f"{base}.so.*"))[:1]]
    # By their full names, since wheels have no links without the version; macOS looks symbols up when it loads.
    libraries = () if sys.platform == "darwin" else tuple(f"-l:{name}" for name in names)
    return Host("openvino", engine_version(), home, (), libraries, _open, lib="libs")


def _open(path: Path) -> None:
    """Raises where the library is for another version: its objects would not fit the engine's."""
    installed = engine_version()  # loads the engine's own libraries, which ours then finds
    library = ctypes.CDLL(str(path))
    try:
        told = library.hf_fff_openvino_version
    except AttributeError as error:
        raise BuildError(f"{path} is no OpenVINO extension of hf_fff") from error
    told.restype = ctypes.c_char_p
    if (made_for := told().decode()) != installed:
        raise BuildError(f"{path} was compiled for OpenVINO {made_for}, and {installed} is installed")


loader.LIBRARIES[_NAME] = Library(
    _NAME, ("openvino/extension.cpp", *loader.CORE), core=loader.CORE, host=_host, required=True
)


def extension() -> Path:
    """The library, for ``openvino.Core().add_extension``; compiled if it has to be.

    Raises:
        ImportError: OpenVINO is not installed.
        RuntimeError: there is no library that fits, and none can be compiled.
    """
    engine()
    try:
        path = loader.load(_NAME).path
    except RuntimeError as error:
        raise RuntimeError(f"{error}{_hint()}") from error
    assert path is not None
    return path


def build(output: str | Path | None = None, *, force: bool = False) -> Path:
    """Compiles the library ahead of its first use.

    Args:
        output: a folder to put a copy in. Where ``HF_FFF_KERNEL_PATH`` names that folder, no compiler is needed; the version of
            OpenVINO must be the same.
        force: compile even if the cache has it.

    Raises:
        ImportError: OpenVINO is not installed.
        RuntimeError: it cannot be compiled.
    """
    engine()
    status = loader.build(_NAME, force=force, output=None if output is None else Path(output))
    if status.path is None:
        raise RuntimeError(f"the {_NAME} library cannot be built: {status.reason}{_hint()}")
    return status.path


def _home() -> Path:
    return Path(engine().__file__).parent  # type: ignore[arg-type]


def _hint() -> str:
    home = _home()
    if (home / "include" / "openvino" / "openvino.hpp").is_file():
        return ""
    return f"\n{home} holds no C++ headers; those of PyPI's wheels do: `pip install openvino`."
