"""Files of tensors: read without running code and without filling the memory, written one tensor at a time."""

import json
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, from ``model.safetensors`` or ``pytorch_model.bin``, memory-mapped where the format allows it.

    Raises:
        ValueError: there are none; the file is damaged; it wants to run code; it holds other things than tensors.
    """
    path = next((p for name in ("model.safetensors", "pytorch_model.bin") if (p := folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"there are no weights in {folder}: neither model.safetensors nor pytorch_model.bin")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} holds no dict of tensors, but {type(found).__name__}")
    if strange := [str(k) for k, v in found.items() if not isinstance(k, str) or not isinstance(v, Tensor)]:
        raise ValueError(f"{path} holds other things than tensors: {listed(strange)}")
    return found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    zipped = zipfile.is_zipfile(path)  # the format since torch 1.6
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if (bad := archive.testzip()) is not None:
                    raise ValueError(f"{path} is damaged: the checksum of {bad} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        why = str(error).split("\n")[0].removesuffix(".")
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise ValueError(
                f"{path} wants to run code when it is read, and was not: it holds more than tensors"
            ) from error
        raise ValueError(f"{path} cannot be read as weights alone: {why}") from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, zlib.error, LookupError) as error:
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged: {first}") from error


def listed(names: Iterable[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    every = sorted(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


@dataclass(frozen=True)
class Entry:
    """A tensor to write, which is made when its turn comes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def write_safetensors(path: Path, entries: Iterable[Entry]) -> None:
    """Writes a safetensors file with one tensor in memory at a time.

    Data start at a multiple of 64 bytes, and tensors that keep it there come first: a memory-mapped file can be used as it is.
    """
    order = sorted(entries, key=lambda e: (e.bytes % 64 != 0, -e.dtype.itemsize))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in order:
        header[e.name] = {"dtype": DTYPES[e.dtype], "shape": list(e.shape), "data_offsets": [at, at + e.bytes]}
        at += e.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for e in order:
            tensor = e.make()
            assert tensor.shape == e.shape and tensor.dtype == e.dtype, e.name
            file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
