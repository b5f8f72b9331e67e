"""Finds a native kernel library, or compiles it, or says why PyTorch must do.

Order: ``HF_FFF_KERNEL_PATH``, the library that the wheel bundles, the cache, a compilation into the cache (or, where
the cache cannot be used, into a private temporary folder). Nothing here fails for want of a compiler: one warning a
process says why the slower path is taken. ``HF_FFF_BACKEND=native`` makes that an error, ``torch`` loads nothing, ``hub`` takes the kernel
that ``HF_FFF_KERNEL_REPO`` names, or it is an error.

The library for GPUs is compiled on first use for the GPUs that are there, and by ``build`` for any; on a machine that cannot run
it, it is built and not loaded.
"""

import atexit
import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

SETTINGS = ("auto", "native", "torch", "hub")
_PACKAGE = Path(__file__).resolve().parent.parent
_SOURCE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
_CPU_FEATURES = re.compile(r"avx2|fma|f16c|avx_vnni|avx512f|avx512_(bf16|vnni|fp16)|amx_\w+|asimd(dp)?|bf16|i8mm|sve2?")


@dataclass(frozen=True)
class Toolchain:
    """How sources become a library."""

    variables: tuple[str, ...]  # of the environment, that name a compiler; it may have options behind it
    names: tuple[str, ...]  # to look for otherwise
    where: str  # they were looked for, should none be found
    advice: str
    flags: tuple[str, ...]
    link: tuple[str, ...]
    flags_variable: str  # of the environment, that holds further flags
    timeout: float  # seconds that it may take
    takes: str  # what it usually takes
    version: str = ""  # what stands in the line of --version that tells it


_TOOLCHAINS = {
    "c++": Toolchain(
        ("HF_FFF_CXX", "CXX"),
        ("c++", "g++", "clang++"),
        "none of c++, g++, clang++ is on PATH",
        "Install g++ or clang++",
        # No -march: the sources choose the instruction set when they run. They say themselves what is fused: see simd.h.
        ("-O3", "-ffp-contract=off", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden"),
        # Where a C++ runtime is linked statically, its names must not mix with those of torch's: they crash each other.
        ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-Wl,--no-as-needed,--exclude-libs=ALL",),
        "HF_FFF_CXXFLAGS",
        timeout=900,
        takes="about 25 s",
    ),
    "nvcc": Toolchain(
        ("HF_FFF_NVCC",),
        ("$CUDA_HOME/bin/nvcc", "$CUDA_PATH/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"),
        "neither in CUDA_HOME or CUDA_PATH, nor on PATH, nor in /usr/local/cuda",
        "Install the CUDA toolkit, or name its nvcc by HF_FFF_NVCC",
        ("-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-shared"),
        # The CUDA runtime is a static library, whose names must not mix with those of torch's.
        ("-Xlinker", "--no-as-needed,--exclude-libs=ALL"),
        "HF_FFF_NVCCFLAGS",
        timeout=3600,
        takes="some tens of seconds for each kind of GPU",
        version="release",
    ),
}

# The GPUs that kernels are compiled for. Code for one runs on later ones of its generation (86 on 87), and its PTX, which the driver
# compiles, on all later ones.
TARGETS = ("75", "80", "86", "89", "90", "100", "120")
_SPECIFIC = ("90a", "100a", "120a")  # code for one kind of GPU alone
_PTX = "+PTX"
_MACHINE = {"90": "90a"}  # there is no later 9.x: code for 9.0 may use what it alone has (wgmma)
_EVERYWHERE = (*TARGETS[:-1], TARGETS[-1] + _PTX)


@dataclass(frozen=True)
class Host:
    """The framework that a library is compiled against and loaded into."""

    name: str
    version: str  # a library serves the version that it was compiled against
    home: Path  # what include and lib lie in
    flags: tuple[str, ...]
    libraries: tuple[str, ...]  # for the linker
    open: Callable[[Path], None]
    lib: str = "lib"


def _torch() -> Host:
    # TORCH_TARGET_VERSION is torch 2.11's stable ABI.
    flags, home = ("-DTORCH_TARGET_VERSION=0x020b000000000000",), Path(torch.__file__).parent
    return Host("torch", torch.__version__, home, flags, ("-ltorch_cpu",), torch.ops.load_library)


def _torch_cuda() -> Host:
    # libtorch brings in libtorch_cuda where torch has it: so a torch for CPUs can build for GPUs.
    host = _torch()
    return replace(host, flags=(*host.flags, "-DUSE_CUDA"), libraries=(*host.libraries, "-ltorch"))


@dataclass(frozen=True)
class Library:
    """A kernel library: what it is compiled from, and the operator whose presence proves that it is the right one."""

    name: str
    sources: tuple[str, ...]  # relative to kernels_root(); may be patterns
    operator: str | None = None
    core: tuple[str, ...] = ()  # those of the sources that know no host: their objects serve other libraries too
    dispatch_key: str = "CPU"
    compiler: str = "c++"
    host: Callable[[], Host] = _torch
    required: bool = False  # nothing else can do its work: it is an error that it cannot be loaded
    otherwise: str = "the slower PyTorch code is"  # used

    @property
    def file_name(self) -> str:
        return f"libhf_fff_{self.name}.so"

    @property
    def tools(self) -> Toolchain:
        return _TOOLCHAINS[self.compiler]

    @property
    def for_gpus(self) -> bool:
        return self.compiler == "nvcc"

    def files(self) -> list[Path]:
        """Its sources.

        Raises:
            BuildError: one is missing.
        """
        found = {name: sorted(kernels_root().glob(name)) for name in self.sources}
        if missing := [str(kernels_root() / name) for name, paths in found.items() if not paths]:
            raise BuildError(f"the sources of the {self.name} library are not installed: {', '.join(missing)}")
        return [path for paths in found.values() for path in paths]


CORE = tuple(
    f"cpu/{n}.cpp" for n in ("avx512", "avx2", "baseline", "packed", "avx512_bf16", "fff")
)  # the longest first
LIBRARIES = {
    row.name: row
    for row in (
        Library("cpu", ("torch-ext/torch_binding_cpu.cpp", *CORE), "hf_fff::fff", CORE),
        Library("bench", ("torch-ext/bench_cpu.cpp", *CORE), "hf_fff_bench::fff_loop", CORE),
        Library(
            "cuda",
            ("torch-ext/torch_binding_cuda.cpp", "cuda/*.cu"),
            "hf_fff::fff",
            dispatch_key="CUDA",
            compiler="nvcc",
            host=_torch_cuda,
            otherwise="Triton kernels or PyTorch code are",
        ),
    )
}


@dataclass(frozen=True)
class Status:
    """What became of a library: where it came from if it is loaded, otherwise why it is not.

    One that was built for GPUs on a machine that cannot run it has a ``path`` and is not loaded.
    """

    library: str
    loaded: bool = False
    path: Path | None = None
    origin: str | None = (
        None  # "HF_FFF_KERNEL_PATH", "bundled", "cache", "built", "built (temporary)" or "hub: NAME@REVISION"
    )
    reason: str = ""
    build_seconds: float | None = None

    @property
    def backend(self) -> str:
        """``"native"`` or ``"torch"``."""
        return "native" if self.loaded else "torch"


class BuildError(RuntimeError):
    """The library cannot be had here; an ``OSError`` means that another folder may serve."""


@dataclass(frozen=True)
class _Compiler:
    command: tuple[str, ...]
    version: str
    targets: tuple[str, ...] = ()  # GPUs


_statuses: dict[str, Status] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # a child must not inherit a lock that some other thread held
    os.register_at_fork(after_in_child=_renew_lock)


def load(name: str = "cpu") -> Status:
    """Loads a library, the first time it is asked for; later calls return the same status.

    Raises:
        ValueError: ``HF_FFF_BACKEND`` or ``name`` is none of those known.
        RuntimeError: it cannot be loaded and is required, by itself or by ``HF_FFF_BACKEND=native`` or ``hub``.
    """
    library = _library(name)
    wanted = _wanted(library)
    if name not in _statuses:
        with _lock:
            if name not in _statuses:
                _statuses[name] = found = _find(library, wanted)
                if found.reason and (found.loaded or wanted == "auto"):
                    _warn(found)
    status = _statuses[name]
    if wanted in ("native", "hub") and not status.loaded:
        why = "" if library.required else f"HF_FFF_BACKEND={wanted}, but "
        raise RuntimeError(f"{why}the {name} library cannot be loaded: {status.reason}")
    return status


def status(name: str = "cpu") -> Status | None:
    """What happened to a library so far in this process; None if nobody asked for it. Loads nothing."""
    return _statuses.get(_library(name).name)


def build(name: str = "cpu", *, force: bool = False, output: Path | None = None, targets: Iterable[str] = ()) -> Status:
    """Compiles a library ahead of its first use, unless the cache has it already.

    Args:
        name: which library.
        force: compile even if the cache has it.
        output: a folder to put a copy in, for ``HF_FFF_KERNEL_PATH``.
        targets: GPUs that it is for, such as ``"90"``; all of ``TARGETS`` without.

    Returns:
        its status; not loaded, with a reason, if it could not be compiled or does not load. It has a ``path`` if it was compiled.

    Raises:
        ValueError: a target that is not known, or a library that is not for GPUs.
    """
    library = _library(name)
    wanted = check_targets(targets)
    if wanted and not library.for_gpus:
        raise ValueError(f"targets={','.join(wanted)} means nothing to the {name} library, which is not for GPUs")
    with _lock:
        try:
            targets = (wanted or _EVERYWHERE) if library.for_gpus else ()
            built = _cached_or_built(library, force=force, temporary=output is not None, targets=targets)
        except (OSError, BuildError) as error:
            return Status(name, reason=str(error))
        if built.loaded and (name not in _statuses or not _statuses[name].loaded):
            _statuses[name] = built
    if output is None or built.path is None:
        return built
    output = output.expanduser().absolute()
    output.mkdir(parents=True, exist_ok=True)
    copy = output / library.file_name
    _manifest(copy).unlink(missing_ok=True)
    for source, target in ((built.path, copy), (_manifest(built.path), _manifest(copy))):
        with tempfile.TemporaryDirectory(dir=output) as work:  # never write into a file that a process may have mapped
            os.replace(shutil.copy(source, work), target)
    return replace(built, path=copy)


def cpu_features() -> list[str]:
    """Instruction sets of this CPU that matter here, as Linux names them."""
    return [f for f in _cpu_flags().split() if _CPU_FEATURES.fullmatch(f)]


def describe() -> dict[str, Any]:
    """Everything that decides which library is used, and what was decided, for ``hf-fff env``. Loads nothing."""
    facts: dict[str, Any] = {
        "backend_setting": os.environ.get("HF_FFF_BACKEND") or "auto",
        "kernel_path": os.environ.get("HF_FFF_KERNEL_PATH") or None,
        "sources": str(kernels_root()),
        "cpu_features": cpu_features(),
        "libraries": {},
    }
    try:
        facts["cache"] = str(cache_dir())
    except OSError as error:
        facts["cache"] = f"none: {error}"
    for name, library in LIBRARIES.items():
        try:
            compiler = _compiler(library)
            command = shlex.join(compiler.command)
            row: dict[str, Any] = {"compiler": command, "version": compiler.version, "key": _key(library, compiler)}
        except (OSError, BuildError) as error:
            row = {"compiler": f"none: {error}"}
        if library.for_gpus:
            try:
                row["targets"] = targets_here()
            except BuildError as error:
                row["targets"], row["no_gpu"] = [], str(error)
        found = _statuses.get(name)
        row["status"] = "not loaded yet" if found is None else found.backend
        if found is not None:
            row.update(json.loads(json.dumps(asdict(found), default=str)))
        facts["libraries"][name] = row
    return facts


def kernels_root() -> Path:
    """Where the C++ sources lie: in the package (a wheel), or beside it (a checkout)."""
    inside = _PACKAGE / "_kernels"
    return inside if inside.is_dir() else _PACKAGE.parent / "kernels"


def cache_dir() -> Path:
    """``HF_FFF_CACHE``, or ``hf_fff`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    try:
        if chosen := os.environ.get("HF_FFF_CACHE"):
            return Path(chosen).expanduser().absolute()
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the standard says to ignore relative ones
        return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "hf_fff"
    except RuntimeError as error:  # an account without a home
        raise OSError(str(error)) from error


def check_targets(names: Iterable[str]) -> tuple[str, ...]:
    """GPUs to compile for, as ``"90"``, ``"sm_90"`` or ``"9.0"``, and with ``"+PTX"`` behind also for later ones: sorted, in the
    first form.

    Raises:
        ValueError: one is not known.
    """
    found: dict[str, str] = {}
    for name in names:
        plain, ptx = name.strip().lower().removeprefix("sm_").replace(".", ""), ""
        if plain.endswith(_PTX.lower()):
            plain, ptx = plain[: -len(_PTX)], _PTX
        if plain not in (*TARGETS, *_SPECIFIC) or (ptx and plain in _SPECIFIC):
            allowed = ", ".join(sorted((*TARGETS, *_SPECIFIC), key=_order))
            raise ValueError(
                f"target {name!r} is not supported (allowed: {allowed}; all but those with an a also with {_PTX})"
            )
        found[plain] = found.get(plain) or ptx
    return tuple(plain + found[plain] for plain in sorted(found, key=_order))


def _order(target: str) -> tuple[int, str]:
    return _number(target), target


def _number(target: str) -> int:
    return int(target.removesuffix(_PTX).rstrip("a"))


def no_gpu() -> str | None:
    """Why there is no GPU that torch can use; None where there is one."""
    if torch.cuda.is_available():
        return None
    if not (torch.version.cuda or torch.version.hip):
        return f"this PyTorch ({torch.__version__}) is built for CPUs alone."
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides them all."
    return (
        f"PyTorch ({torch.__version__}) finds none: there is none in this machine, or its driver is missing or older than "
        "this PyTorch wants (see nvidia-smi)."
    )


def targets_here() -> tuple[str, ...]:
    """What to compile for, so that every GPU here is served.

    Raises:
        BuildError: there is none, or one that cannot be served.
    """
    return tuple(sorted({_target_of(capability) for capability in _capabilities()}, key=_order))


def _capabilities() -> list[tuple[int, int]]:
    if why := no_gpu():
        raise BuildError(f"there is no GPU: {why}")
    if not torch.version.cuda:
        raise BuildError("the CUDA kernels are for GPUs of NVIDIA")
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def _target_of(capability: tuple[int, int]) -> str:
    major, minor = capability
    older = [target for target in TARGETS if _number(target) <= 10 * major + minor]
    if not older:
        raise BuildError(
            f"a GPU here is an sm_{major}{minor}, and kernels are for sm_{', sm_'.join(TARGETS)} and later"
        )
    return older[-1] if _number(older[-1]) // 10 == major else older[-1] + _PTX


def _serves(targets: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a library for these runs on a GPU."""
    number = 10 * capability[0] + capability[1]
    for target in targets:
        of = _number(target)
        exact, later = of == number, of < number and not target.endswith("a")
        if exact or (later and (target.endswith(_PTX) or of // 10 == capability[0])):
            return True
    return False


def _check_gpus(library: Library, targets: Iterable[str], toolkit: str) -> None:
    """Raises ``BuildError`` where the GPUs here cannot run what is compiled for ``targets`` by a compiler of that version."""
    if not library.for_gpus:
        return
    for major, minor in _capabilities():
        if not _serves(targets, (major, minor)):
            raise BuildError(f"it was built for sm_{', sm_'.join(targets)}, and a GPU here is an sm_{major}{minor}")
    release = re.search(r"release (\d+)", toolkit)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()  # such as 13000
    if release and driver and int(release[1]) > driver // 1000:
        raise BuildError(
            f"nvcc is of CUDA {release[1]}, and the driver knows CUDA up to {driver // 1000}.{driver % 1000 // 10}: update the driver, "
            "or name an older nvcc by HF_FFF_NVCC"
        )


def _library(name: str) -> Library:
    if name not in LIBRARIES:
        raise ValueError(f"library {name!r} is not known (allowed: {', '.join(LIBRARIES)})")
    return LIBRARIES[name]


def setting() -> str:
    value = os.environ.get("HF_FFF_BACKEND") or "auto"
    if value not in SETTINGS:
        raise ValueError(f"HF_FFF_BACKEND={value!r} is not known (allowed: {', '.join(SETTINGS)})")
    return value


def _wanted(library: Library) -> str:
    """``HF_FFF_BACKEND``, as far as it is about this library: the Hub has the CPU's alone."""
    if library.required:
        return "native"
    wanted = setting()
    return "auto" if wanted == "hub" and library.name != "cpu" else wanted


def _from_hub(library: Library) -> Status:
    from .hub_backend import load_from_hub

    try:
        path, origin = load_from_hub(library.dispatch_key)
    except (OSError, RuntimeError) as error:
        return Status(library.name, reason=str(error))
    return Status(library.name, loaded=True, path=path, origin=origin)


def _warn(status: Status) -> None:
    otherwise = LIBRARIES[status.library].otherwise
    what = "" if status.loaded else f"the native {status.library} library is not used, {otherwise}: "
    more = "" if status.loaded else "\n`hf-fff env` tells more; HF_FFF_BACKEND=torch silences this."
    warnings.warn(f"hf_fff: {what}{status.reason}{more}", RuntimeWarning, stacklevel=3)


def _find(library: Library, wanted: str) -> Status:
    if wanted == "torch":
        return Status(library.name, reason="HF_FFF_BACKEND=torch")
    if wanted == "hub":
        return _from_hub(library)
    if given := os.environ.get("HF_FFF_KERNEL_PATH"):
        path = Path(given).expanduser().absolute()
        if path.name not in {other.file_name for other in LIBRARIES.values() if other != library}:
            try:
                return _open(library, path / library.file_name if path.is_dir() else path, "HF_FFF_KERNEL_PATH")
            except (OSError, BuildError) as error:  # asked for this one: nothing else may take its place unseen
                advice = "Make it a file or a folder from `hf-fff build --output FOLDER`, or unset it."
                return Status(library.name, reason=f"HF_FFF_KERNEL_PATH={given} cannot be used: {error}. {advice}")
    problem = ""
    bundled = _PACKAGE / "_lib" / library.file_name
    if bundled.exists():
        try:
            return _open(library, bundled, "bundled")
        except (OSError, BuildError) as error:
            problem = f"; the bundled library cannot be used: {error}"
    try:
        return _cached_or_built(library)
    except (OSError, BuildError) as error:
        return Status(library.name, reason=f"{error}{problem}")


def _cached_or_built(
    library: Library, *, force: bool = False, temporary: bool = True, targets: tuple[str, ...] = ()
) -> Status:
    """``targets``: what is asked for ahead; without, the GPUs here are to be served."""
    here = () if targets or not library.for_gpus else targets_here()
    compiler = _compiler(library, targets or here)
    if here:
        _check_gpus(library, here, compiler.version)
    try:
        cache = cache_dir()
        folder = cache / "-".join((library.name, _key(library, compiler), *compiler.targets))
        for other in sorted(cache.glob(f"{library.name}-{_key(library, compiler)}-*")) if here else ():
            built_for = tuple(_read_manifest(other / library.file_name).get("targets", ()))
            if all(_serves(built_for, c) for c in _capabilities()) and _is_whole(other / library.file_name):
                folder, compiler = other, replace(compiler, targets=built_for)
                break
        return _cached_or_built_in(folder, library, compiler, force)
    except OSError as error:
        if not temporary:
            raise
        problem = f"the cache cannot be used ({error})"
    advice = "Set HF_FFF_CACHE to a folder that can be written to and executed from."
    try:
        folder = Path(tempfile.mkdtemp(prefix="hf_fff-"))
        atexit.register(_remove, folder, os.getpid())
        built = _build_in(folder, library, compiler, force)
    except OSError as error:
        raise BuildError(f"{problem}, nor can a temporary folder ({error}). {advice}") from error
    reason = f"{problem}; compiled the {library.name} library for this process alone. {advice}"
    return replace(built, origin="built (temporary)", reason=reason)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves it to its parent
        shutil.rmtree(folder, ignore_errors=True)


def _cached_or_built_in(folder: Path, library: Library, compiler: _Compiler, force: bool) -> Status:
    path = folder / library.file_name
    if not force and _is_whole(path):
        return _open_here(library, path, "cache", compiler)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock", timeout=library.tools.timeout + 30):
        if not _is_whole(path):
            path.unlink(missing_ok=True)
        elif not force:  # another process built it while this one waited
            return _open_here(library, path, "cache", compiler)
        return _build_in(folder, library, compiler, force)


def _build_in(folder: Path, library: Library, compiler: _Compiler, force: bool) -> Status:
    if hasattr(os, "ST_NOEXEC") and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise OSError(f"{folder} is on a file system mounted noexec")
    path = folder / library.file_name
    logger.info("hf_fff: compiling the %s library, once: this takes %s", library.name, library.tools.takes)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as work:
        fresh = Path(work) / library.file_name
        _compile(library, compiler, fresh, force)
        # A library counts only together with its manifest: a process that dies anywhere here leaves nothing that loads.
        # Renamed before it is loaded, since the dynamic linker knows libraries by the name they had then.
        _manifest(path).unlink(missing_ok=True)
        facts = {**_fingerprint(fresh), "sources": _source_digest(library), "compiler": compiler.version}
        if compiler.targets:
            facts["targets"] = compiler.targets
        os.replace(fresh, path)
        seconds = time.perf_counter() - start
        built = replace(_open_here(library, path, "built", compiler), build_seconds=round(seconds, 2))
        manifest = Path(work) / "manifest"
        host = library.host()
        manifest.write_text(json.dumps({**facts, host.name: host.version}, indent=2))
        os.replace(manifest, _manifest(path))
    return built


def _compile(library: Library, compiler: _Compiler, target: Path, force: bool = False) -> None:
    """``force``: objects of the core that another library left are not taken."""
    host, tools, sources = library.host(), library.tools, library.files()
    for_host = [*host.flags, f"-I{host.home / 'include'}"]
    own_flags = [
        *_words(tools.flags_variable),
        f"-I{kernels_root()}",
    ]  # the user's behind all others, which they may override
    codes = []
    for gpu in compiler.targets:
        number = gpu.removesuffix(_PTX)
        machine = _MACHINE.get(number, number)
        codes.append(f"arch=compute_{machine},code=sm_{machine}")
        if gpu.endswith(_PTX):
            codes.append(f"arch=compute_{number},code=compute_{number}")
    own_flags += [f"-gencode={code}" for code in dict.fromkeys(codes)]
    of_core = [*compiler.command, *tools.flags, *own_flags]
    compile_ = [*compiler.command, *tools.flags, *for_host, *own_flags]
    inputs, link = list(map(str, sources)), [f"-L{host.home / host.lib}", *tools.link, *host.libraries]
    if len(sources) > 1:  # each by itself, as many at a time as there are cores
        core = {kernels_root() / name for name in library.core}
        kept = _kept_objects(library, compiler) if core else None
        objects = [target.with_name(f"{i}.o") for i in range(len(sources))]
        commands, fresh = [], []
        for i, source in enumerate(sources):
            own = kept / f"{source.stem}.o" if kept and source in core else None
            if own and not force and _is_whole(own):
                objects[i] = own
                continue
            commands.append([*(of_core if own else compile_), "-c", str(source), "-o", str(objects[i])])
            fresh += [(objects[i], own)] if own else []
        _run(compiler, commands, target, tools.timeout)
        for made, own in fresh:
            _keep(made, own)
        inputs = list(map(str, objects))
    _run(compiler, [[*compile_, *inputs, "-o", str(target), *link]], target, tools.timeout)
    if not _looks_whole(target):
        raise BuildError(f"{compiler.command[0]} reported success and wrote no usable library")


def _kept_objects(library: Library, compiler: _Compiler) -> Path | None:
    """Where objects of the core lie for the next library; None where there is no place."""
    tools = library.tools
    parts = (tools.flags, _words(tools.flags_variable), compiler.command, compiler.version)
    try:
        return cache_dir() / f"core-{_digest(library, *parts)}"
    except OSError:
        return None


def _keep(made: Path, place: Path) -> None:
    """Copies an object, with a manifest as libraries have; without room for it, it is compiled again next time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as work:
            fresh, manifest = Path(shutil.copy(made, work)), Path(work) / "manifest"
            manifest.write_text(json.dumps(_fingerprint(fresh)))
            os.replace(fresh, place)
            os.replace(manifest, _manifest(place))
    except OSError as error:
        logger.debug("hf_fff: %s is not kept: %s", place, error)


def _run(compiler: _Compiler, commands: list[list[str]], target: Path, timeout: float) -> None:
    """Runs commands of the compiler side by side; when one fails or ``timeout`` seconds are over, none of them is left."""
    log, environment = target.with_suffix(".log"), {**os.environ, "LC_ALL": "C"}
    waiting, end = list(commands), time.monotonic() + timeout
    running: list[subprocess.Popen[bytes]] = []
    try:
        with log.open("wb") as out:  # a file: children that outlive a killed compiler would keep a pipe open
            while waiting or running:
                while waiting and len(running) < (os.cpu_count() or 1):
                    running.append(_start(waiting.pop(0), out, environment))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running[0].wait(0.05)
                if failed := next((p for p in running if p.poll()), None):
                    # A full disk is no fault of the compiler: let it raise OSError.
                    target.write_bytes(os.urandom(1 << 20))
                    lines = log.read_text(errors="replace").strip().splitlines()
                    last = "\n".join((["…"] if len(lines) > 12 else []) + lines[-12:])
                    raise BuildError(f"{compiler.command[0]} failed (exit status {failed.returncode}):\n{last}")
                running = [p for p in running if p.returncode is None]
                if running and time.monotonic() > end:
                    raise BuildError(f"{compiler.command[0]} took more than {timeout:.0f} s and was stopped")
    finally:
        for process in (p for p in running if p.returncode is None):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(command: list[str], out: IO[bytes], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    except OSError as error:
        raise BuildError(f"the compiler cannot be started: {error}") from error


def _open_here(library: Library, path: Path, origin: str, compiler: _Compiler) -> Status:
    """``_open``, if there are GPUs here that can run it."""
    try:
        _check_gpus(library, compiler.targets, compiler.version)
    except BuildError as error:
        return Status(library.name, path=path, origin=origin, reason=str(error))
    return _open(library, path, origin)


def _open(library: Library, path: Path, origin: str) -> Status:
    """Loads one file. Raises ``OSError`` if it is damaged or does not load, ``BuildError`` if it is the wrong one."""
    before = _statuses.get(library.name)
    if before is None or not before.loaded:  # twice in one process would register its operators twice
        if not path.is_file():
            raise OSError(f"{path} does not exist")
        if not _looks_whole(path) or (_manifest(path).exists() and not _is_whole(path)):
            raise OSError(f"{path} is damaged or no shared library")
        # Operators of another version may take other arguments, which torch does not check.
        facts = _read_manifest(path)
        if facts.get("sources") not in (None, _source_digest(library)):
            raise BuildError(f"{path} was built from the sources of another version")
        if "targets" in facts:
            _check_gpus(library, facts["targets"], facts.get("compiler", ""))
        library.host().open(path)
        if library.operator and not _has_kernel(library.operator, library.dispatch_key):
            raise BuildError(f"{path} registers no kernel of {library.operator} for {library.dispatch_key}")
    return Status(library.name, loaded=True, path=path, origin=origin)


def _has_kernel(operator: str, dispatch_key: str) -> bool:
    c = torch._C
    return c._dispatch_has_kernel(operator) and c._dispatch_has_kernel_for_dispatch_key(operator, dispatch_key)


def _manifest(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(_manifest(path).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _is_whole(path: Path) -> bool:
    """Whether the file is as its manifest describes it: loading a damaged library may kill the process (SIGBUS)."""
    try:
        return _fingerprint(path).items() <= _read_manifest(path).items()
    except OSError:
        return False


def _fingerprint(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _looks_whole(path: Path) -> bool:
    """The same, as far as a file without a manifest can tell: the table that ends an ELF file must be inside it."""
    if not path.is_file():
        return False
    if sys.platform == "darwin":
        return path.stat().st_size > 0
    with path.open("rb") as file:
        head = file.read(64)
    offset, size, count = (int.from_bytes(head[a:b], sys.byteorder) for a, b in ((40, 48), (58, 60), (60, 62)))
    return len(head) == 64 and head.startswith(b"\x7fELF") and offset + size * count <= path.stat().st_size


def _compiler(library: Library, targets: tuple[str, ...] = ()) -> _Compiler:
    if os.name != "posix":
        raise BuildError("the native library is compiled on Linux and macOS only")
    tools = library.tools
    candidates, where = [[os.path.expandvars(name)] for name in tools.names], tools.where
    if chosen := next((v for v in tools.variables if _words(v)), None):
        value = os.environ[chosen]
        candidates = [[value] if shutil.which(value) else _words(chosen)]  # CXX may hold options, "ccache g++"
        where = f"{chosen}={value}"
    command = next(([found, *rest] for name, *rest in candidates if (found := shutil.which(name))), None)
    if command is None:
        advice = f"{tools.advice}, or point HF_FFF_KERNEL_PATH at what `hf-fff build --output` made elsewhere."
        raise BuildError(f"no {library.compiler} compiler found ({where}). {advice}")
    try:
        told = subprocess.run(
            [*command, "--version"], check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = b""  # compiling will tell what is wrong with it
    lines = told.decode(errors="replace").splitlines()
    return _Compiler(tuple(command), next((li for li in lines if tools.version in li), "".join(lines[:1])), targets)


def _words(variable: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable}={os.environ[variable]!r} cannot be read: {error}") from error


def _key(library: Library, compiler: _Compiler) -> str:
    host, tools = library.host(), library.tools
    flags = (*tools.flags, *host.flags, *tools.link, *host.libraries, *_words(tools.flags_variable))
    return _digest(library, library.sources, flags, compiler.command, compiler.version, host.version)


def _digest(library: Library, *parts: Any) -> str:
    """Of its sources, this machine, and what else what is compiled depends on."""
    all_parts = (_source_digest(library), platform.machine(), _cpu_flags(), parts)
    return hashlib.sha256(repr(all_parts).encode(errors="surrogateescape")).hexdigest()[:16]


def _source_digest(library: Library) -> str:
    """Of all sources, but of those for GPUs where it is not for GPUs."""
    root, digest = kernels_root(), hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in _SOURCE_SUFFIXES and p.is_file()):
        if "cuda" in path.relative_to(root).as_posix() and not library.for_gpus:
            continue
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _cpu_flags() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:  # not Linux
        text = ""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()
