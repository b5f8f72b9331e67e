"""Rows of files, and the same encoded for a model: held compactly, padded batch by batch."""

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..surgery.text import read_texts

Row = dict[str, Any]
IGNORED = -100  # a label that counts for nothing, to torch and to transformers


def optional(module: str, distribution: str) -> Any:
    """A module of the extra ``train``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"this needs {distribution}, which is not installed: pip install hf-fff[train]") from error


# Reading


def read_rows(source: str | Path) -> list[Row]:
    """Rows of a local file, or of a data set of the Hub.

    Args:
        source: ``.tsv`` (a line of names, tabs, no quoting), ``.csv``, ``.jsonl`` (one object a line), ``.json`` (a list of
            objects), ``.txt`` (one paragraph a line, as ``{"text": ...}``) or ``.parquet``; or ``"NAME[:CONFIG]:SPLIT"`` of a
            data set of the Hub. The last two need the package ``datasets``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, one that is not what its name says, or one without rows.
    """
    path = Path(source)
    if not path.exists() and (hub := HUB.fullmatch(str(source))):
        rows = _of_datasets(hub[1], hub[2], split=hub[3])
    elif path.suffix not in _READERS:
        known = ", ".join(_READERS)
        raise ValueError(f"{source} is neither a file of a known kind ({known}) nor NAME[:CONFIG]:SPLIT of the Hub")
    else:
        try:
            rows = list(_READERS[path.suffix](path))
        except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no {path.suffix} file in UTF-8: {error}") from error
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


HUB = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?:([\w\[\]%+-]+)")


def _table(path: Path, **dialect: Any) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **dialect)
        names = next(reader, [])
        for values in filter(None, reader):
            if len(values) != len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(values)} fields, but the first line names {len(names)}"
                )
            yield dict(zip(names, values, strict=True))


def _objects(path: Path, values: Iterable[Any]) -> Iterator[Row]:
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise ValueError(f"{path}, row {number}: a row is an object, not {type(value).__name__}")
        yield value


def _json(path: Path) -> Iterator[Row]:
    values = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(values, list):
        raise ValueError(f"{path} must hold a list of objects, not {type(values).__name__}")
    return _objects(path, values)


def _json_lines(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        yield from _objects(path, (json.loads(line) for line in file if line.strip()))


def _of_datasets(*args: Any, **kwargs: Any) -> list[Row]:
    """Rows as the package ``datasets`` reads them; lists of classes, which are tags, by their names."""
    datasets = optional("datasets", "datasets")
    data = datasets.load_dataset(*args, **kwargs)
    names = {
        column: inner.names
        for column, feature in data.features.items()
        if isinstance(inner := getattr(feature, "feature", None), datasets.ClassLabel)
    }
    return [{**row, **{column: [tags[i] for i in row[column]] for column, tags in names.items()}} for row in data]


_READERS = {
    ".tsv": lambda path: _table(path, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".csv": _table,
    ".jsonl": _json_lines,
    ".json": _json,
    ".txt": lambda path: ({"text": text} for text in read_texts(path, max_chars=sys.maxsize)),
    ".parquet": lambda path: _of_datasets("parquet", data_files=str(path), split="train"),
}


@dataclass(frozen=True)
class Columns:
    """Which columns to read; what is not given is guessed from well-known names."""

    text: str | tuple[str, ...] | None = None
    label: str | None = None


# Encoded rows


class Ragged:
    """Lists of integers, held as one tensor of int32: as lists they would be ten times as large."""

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        parts = [torch.tensor(row, dtype=torch.int32) for row in rows]
        self._flat = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
        self.lengths = [len(part) for part in parts]
        self._ends = torch.tensor(self.lengths, dtype=torch.int64).cumsum(0).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[int]:
        index = range(len(self))[index]
        end = self._ends[index]
        return self._flat[end - self.lengths[index] : end].tolist()


class Encoded(Dataset[dict[str, Any]]):
    """Rows as a model takes them, not padded: ``data[i]`` is a dict of lists of integers, and of labels where there are any.

    Attributes:
        lengths: tokens of each item, so that items of similar length can be batched.
        rows: the raw rows. Of some tasks a row is no item or more than one: ``row_of[i]`` is the row of item i.
        labelled: whether there are labels.
        known: what the task needs beside to score it.
    """

    def __init__(
        self, columns: dict[str, Any], rows: list[Row], *, labelled: bool, row_of: list[int] | None = None, **known: Any
    ) -> None:
        self.columns = columns
        self.lengths: list[int] = columns["input_ids"].lengths
        self.rows, self.labelled, self.known = rows, labelled, known
        self.row_of = list(range(len(rows))) if row_of is None else row_of

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


class Collator:
    """Pads items, on the right, to a batch of tensors; labels of tokens are padded with -100."""

    def __init__(self, tokenizer: Any) -> None:
        self.padding = {
            "input_ids": tokenizer.pad_token_id or 0,
            "token_type_ids": tokenizer.pad_token_type_id,
            "labels": IGNORED,
        }

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name in items[0]:
            values = [torch.as_tensor(item[name]) for item in items]
            batch[name] = (
                torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=self.padding.get(name, 0))
                if values[0].ndim
                else torch.stack(values)
            )
        return batch


def unmasked(batch: dict[str, Tensor]) -> Tensor:
    """The ids before they were masked: the labels are what is hidden."""
    return torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])


class Masking:
    """Hides 15 % of a row's tokens, special ones excepted and at least one where there is any, behind the mask token.

    Raises:
        ValueError: the tokenizer has no mask token.
    """

    share = 0.15

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(f"the tokenizer {type(tokenizer).__name__} has no mask token, so it is for no masked LM")
        self.mask = tokenizer.mask_token_id
        self.special = torch.tensor(sorted({*tokenizer.all_special_ids, tokenizer.mask_token_id}))

    def __call__(self, ids: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and random numbers, ``[..., tokens]`` -> masked ids and labels. The lowest draws are hidden."""
        free = ~torch.isin(ids, self.special)
        count = (free.sum(-1, keepdim=True) * self.share).round().clamp_min(1)
        rank = draws.masked_fill(~free, 2.0).argsort(-1).argsort(-1)
        hidden = free & (rank < count)
        return ids.masked_fill(hidden, self.mask), ids.masked_fill(~hidden, IGNORED)
