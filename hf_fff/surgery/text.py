"""Unlabelled inputs for calibration: texts, pairs of texts or tensors, as batches of tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = dict[str, Tensor]
_CHUNK = 16_384  # texts that are encoded at once, of which those of similar length are batched together


def as_batches(data: Any, tokenizer: Any, *, max_length: int, batch_tokens: int) -> list[Batch]:
    """Batches of about ``batch_tokens`` tokens, inputs of similar length together.

    Args:
        data: texts, pairs of texts (encoded as pairs, segment ids included), a tensor of ids ``[rows, tokens]``, a mapping of
            tensors as a model takes it, or an iterable of such mappings.
        tokenizer: wanted for texts only; called with no argument, it returns the tokenizer.

    Raises:
        ValueError: there is nothing in it.
        TypeError: it is something else.
    """
    if isinstance(data, Tensor):
        data = {"input_ids": data}
    if isinstance(data, Mapping):
        return _split(data, max_length, batch_tokens)
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise TypeError(f"calibration data must be texts or tensors, not {type(data).__name__}")
    items = data if isinstance(data, Sequence) else list(data)
    if not items:
        raise ValueError("the calibration data is empty: give some texts")
    if isinstance(items[0], Mapping):
        return [batch for item in items for batch in _split(item, max_length, batch_tokens)]
    return list(_encode(_texts(items), tokenizer(), max_length, batch_tokens))


def in_random_order(data: Any, tokenizer: Any, *, max_length: int, batch_tokens: int, seed: int) -> Iterator[Batch]:
    """The batches of ``as_batches``, in a random order. Texts are encoded as they are wanted, 16,384 at a time: whoever takes
    little of much text does not wait for all of it, and takes the same as whoever takes more.

    Raises:
        ValueError, TypeError: as ``as_batches``.
    """
    if not isinstance(data, Sequence) or isinstance(data, str) or not data or isinstance(data[0], Mapping):
        yield from shuffled(as_batches(data, tokenizer, max_length=max_length, batch_tokens=batch_tokens), seed)
        return
    texts, known = _texts(shuffled(data, seed)), tokenizer()
    for start in range(0, len(texts), _CHUNK):
        batches = _encode(texts[start : start + _CHUNK], known, max_length, batch_tokens)
        yield from shuffled(list(batches), seed + start)


def _split(batch: Mapping[str, Tensor], max_length: int, batch_tokens: int) -> list[Batch]:
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"calibration tensors need input_ids [rows, tokens] with something in it, found {shape}")
    rows = max(1, batch_tokens // min(ids.shape[1], max_length))
    kept = {k: v[:, :max_length] for k, v in batch.items() if isinstance(v, Tensor) and v.shape[:2] == ids.shape}
    return [{k: v[i : i + rows] for k, v in kept.items()} for i in range(0, len(ids), rows)]


def _is_text(item: Any) -> bool:
    if isinstance(item, str):
        return bool(item.strip())
    if isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(part, str) for part in item):
        return any(part.strip() for part in item)
    raise TypeError(f"calibration data must be texts, pairs of texts or tensors, found {type(item).__name__}")


def _texts(items: Sequence[Any]) -> list[Any]:
    """Those that are not blank."""
    texts = [item for item in items if _is_text(item)]
    if not texts:
        raise ValueError("the calibration data is empty: all of its texts are blank")
    return texts


def _encode(texts: Sequence[Any], tokenizer: Any, max_length: int, batch_tokens: int) -> Iterator[Batch]:
    """The batches of texts that are not blank."""
    encoded: list[tuple[int, dict[str, list[int]]]] = []
    for start in range(0, len(texts), 1024):
        part = texts[start : start + 1024]
        pairs = [isinstance(t, (tuple, list)) for t in part]
        groups = [[t for t, p in zip(part, pairs, strict=True) if p is kind] for kind in (False, True)]
        for group, is_pair in zip(groups, (False, True), strict=True):
            if not group:
                continue
            columns = [[t[0] for t in group], [t[1] for t in group]] if is_pair else [group]
            out = tokenizer(*columns, truncation=True, max_length=max_length)
            encoded.extend((len(out["input_ids"][i]), {k: out[k][i] for k in out}) for i in range(len(group)))
    encoded.sort(key=lambda pair: pair[0])
    rows: list[dict[str, list[int]]] = []
    for length, row in encoded:
        if rows and length * (len(rows) + 1) > batch_tokens:
            yield dict(tokenizer.pad(rows, return_tensors="pt"))
            rows = []
        rows.append(row)
    yield dict(tokenizer.pad(rows, return_tensors="pt"))


def read_texts(path: Any, max_chars: int = 2000) -> list[str]:
    """Paragraphs of a UTF-8 text file, one a line; longer lines are cut at ``max_chars`` characters.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as ``open`` does.
        ValueError: the file is empty or no UTF-8 text.
    """
    try:
        with open(path, encoding="utf-8") as file:
            texts = [line.strip()[:max_chars] for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not texts:
        raise ValueError(f"{path} has no text in it")
    return texts


def shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]
