"""Output folders, and files in them, that appear whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raises ``FileExistsError`` where ``path`` cannot become an output folder."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"the output {path} exists and is no folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"the output folder {path} exists and is not empty (--overwrite replaces it)")
    if path.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise FileExistsError(f"the output folder {path} is or holds the current folder")
    parent = next(p for p in path.resolve().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"the output {path} cannot be made: {parent} is not a folder that can be written to")


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder beside ``path`` to write into; it takes the place of ``path`` when the block ends without an error, and is
    removed otherwise, with ``path`` as it was.

    Raises:
        FileExistsError: ``path`` is a file, or not empty and ``overwrite`` is not set.
    """
    check_output(path, overwrite=overwrite)
    path = path.resolve()
    parents = [p for p in path.parents if not p.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = work / "new", work / "old"
    new.mkdir()
    try:
        yield new
        _readable(new)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not path.exists():
            for parent in parents:
                with suppress(OSError):
                    parent.rmdir()


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """A fresh folder to write files into. When the block ends without an error they move into ``folder``, which is made if need be
    and keeps what else is in it; otherwise they are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as work:
        yield Path(work)
        _readable(Path(work))
        for path in Path(work).iterdir():
            path.replace(folder / path.name)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write one file to, which then takes the place of ``path``."""
    with atomic_files(path.parent) as work:
        yield work / path.name


def settle(folder: Path) -> None:
    """Gives the files of a folder their rights, and has the disk hold them and their names: after that, renaming the folder is safe even
    where the power fails."""
    _readable(folder)
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Has the disk hold a file, or the names in a folder, where the system can do that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder, on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _readable(folder: Path) -> None:
    """Gives files the rights of any new file: safetensors writes weights that nobody else can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o666 & ~mask))


def disk_is_full(error: BaseException) -> bool:
    """Whether there was no room, on the disk or in what an account may use of it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
