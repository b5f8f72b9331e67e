"""Running out of memory, told so that one knows what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ON_THE_CPU = ("DefaultCPUAllocator", "not enough memory")


@contextmanager
def memory_explained(doing: str, advice: str) -> Iterator[None]:
    """Turns what torch raises when memory is out, on a GPU or not, into a ``RuntimeError`` that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not out and not any(words in str(error) for words in _ON_THE_CPU):
            raise
        first = str(error).strip().split("\n")[0]
        raise RuntimeError(f"out of memory while {doing}: lower {advice}" + (f" ({first})" if first else "")) from error
