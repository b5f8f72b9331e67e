"""What is trained on: texts without labels, whole or in pieces, or the mix of rows from which a task is distilled."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..tasks import Encoded, get_task
from ..tasks.data import HUB, Masking, Ragged, optional, unmasked
from ..tasks.kinds import tokenised
from .objectives import get_objective

_REPLACED = 0.15  # of the tokens, in the copies of labelled rows
_BATCH_TOKENS = 4096  # of inputs to calibrate on
_CHUNK = 256  # texts that are tokenised at once
_STREAMED: dict[str, tuple[str, dict[str, Any]]] = {  # by the names of datasets' readers
    ".txt": ("text", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}


def check_rows(name: str, data: Any, least: int) -> None:
    """Raises ``ValueError`` where a data set is empty or smaller than a batch; one without length is not looked at."""
    if data is None or not hasattr(data, "__len__") or isinstance(data, Mapping):
        return
    if not len(data):
        raise ValueError(f"{name} is empty")
    if len(data) < least:
        raise ValueError(f"{name} has {len(data)} rows, fewer than one batch, which has {least}")


class ByLength(Sampler[int]):
    """Rows of similar length together, in an order that depends on seed and epoch alone: so resuming finds it again."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class TokenisedTexts(Dataset[dict[str, list[int]]]):
    """Texts as rows of ids, not padded.

    Args:
        max_length: longer texts are cut.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, max_length: int) -> None:
        self._columns = tokenised(tokenizer, [list(texts)], max_length)
        self.lengths: list[int] = self._columns["input_ids"].lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {name: rows[index] for name, rows in self._columns.items()}


class Cropping:
    """A collator of batches of which a share is cropped: each row to a run of its tokens, which begins at random, and is as long for
    all rows of the batch, between a quarter of the longest and all of it. The first and the last token of a row, BERT's [CLS] and
    [SEP], stay. So a text that comes again is another one, and a batch of short rows needs no more padding than before.

    Draws from torch's generator, which the trainers seed by the epoch and the rows.

    Args:
        collate: what makes a batch of the rows.
        share: of the batches, from 0 to 1.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], share: float) -> None:
        self._collate, self._share = collate, share

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        longest = max(len(row["input_ids"]) for row in rows)
        if float(torch.rand(())) >= self._share:
            return self._collate(list(rows))
        length = int(torch.randint(max(3, longest // 4), max(3, longest) + 1, ()))
        return self._collate([_cropped(row, length) for row in rows])


def _cropped(row: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A row of at most so many tokens: the first one, a run of those between, and the last one."""
    tokens = len(row["input_ids"])
    if tokens <= length:
        return dict(row)
    start = 1 + int(torch.randint(tokens - length + 1, ()))
    places = [0, *range(start, start + length - 2), tokens - 1]

    def part(values: Any) -> Any:
        return values[places] if isinstance(values, Tensor) else [values[i] for i in places]

    whole = {name for name, values in row.items() if hasattr(values, "__len__") and len(values) == tokens}
    return {name: part(values) if name in whole else values for name, values in row.items()}


def pieces(tokenizer: Any, texts: Iterable[str], max_length: int) -> Iterator[dict[str, list[int]]]:
    """Rows of ids: a text that is longer than ``max_length`` tokens goes into several, so that nothing of it is lost.

    Raises:
        ValueError: the tokenizer is a slow one.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"long texts need a fast tokenizer, which {type(tokenizer).__name__} is not")
    filled = (text for text in texts if text.strip())
    while chunk := list(islice(filled, _CHUNK)):
        encoded = tokenizer(chunk, truncation=True, max_length=max_length, return_overflowing_tokens=True)
        encoded.pop("overflow_to_sample_mapping", None)
        for values in zip(*encoded.values(), strict=True):
            yield dict(zip(encoded, values, strict=True))


class TextPieces(Dataset[dict[str, list[int]]]):
    """Texts in ``pieces``, all in memory.

    Raises:
        ValueError: no text in them; as ``pieces``.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Any, max_length: int) -> None:
        rows = list(pieces(tokenizer, texts, max_length))
        if not rows:
            raise ValueError("there is no text to train on")
        self._columns = {name: Ragged(row[name] for row in rows) for name in rows[0]}
        self.lengths: list[int] = self._columns["input_ids"].lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {name: rows[index] for name, rows in self._columns.items()}


class TextStream:
    """Texts of files (.txt, a paragraph a line; .csv, .tsv, .json(l), .parquet) or of data sets of the Hub ("NAME[:CONFIG]:SPLIT"),
    read as they are wanted, by ``datasets``; each pass is in another order, of what fits into a buffer.

    Args:
        column: of the texts; "text" or "sentence" by default.
        seed, buffer: of the order; ``buffer=1`` keeps that of the sources.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: ``datasets`` is not installed, sources of an unknown kind, or no such column.
    """

    def __init__(
        self, sources: Sequence[str], column: str | None = None, *, seed: int = 0, buffer: int = 10_000
    ) -> None:
        datasets = optional("datasets", "datasets")
        parts = []
        for source in sources:
            path, hub = Path(source), HUB.fullmatch(source)
            if path.suffix in _STREAMED and (path.exists() or not hub):
                if not path.is_file():
                    raise FileNotFoundError(2, "there is no file", source)
                kind, options = _STREAMED[path.suffix]
                part = datasets.load_dataset(kind, data_files=source, split="train", streaming=True, **options)
            elif hub:
                part = datasets.load_dataset(hub[1], hub[2], split=hub[3], streaming=True)
            else:
                known = ", ".join(_STREAMED)
                raise ValueError(
                    f"{source} is neither a file of a known kind ({known}) nor NAME[:CONFIG]:SPLIT of the Hub"
                )
            first = next(iter(part), None)
            if first is None:
                raise ValueError(f"{source} has no rows")
            name = column or next((n for n in ("text", "sentence") if n in first), None)
            if name not in first:
                raise ValueError(f"{source}: there is no column {name or 'text'!r}; the columns are {list(first)}")
            if not isinstance(first[name], str):
                raise ValueError(f"{source}: {name}={first[name]!r} is no text")
            parts.append(
                part.select_columns(name).rename_column(name, "text") if name != "text" else part.select_columns(name)
            )
        self._rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        if buffer > 1:
            self._rows = self._rows.shuffle(seed=seed, buffer_size=buffer)

    def set_epoch(self, epoch: int) -> None:
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[str]:
        return (row["text"] for row in self._rows if row["text"])


class StreamedPieces(IterableDataset[dict[str, list[int]]]):
    """Texts in ``pieces``, made as they are wanted; ``texts`` may have a ``set_epoch``, which says how many passes there were."""

    def __init__(self, texts: Iterable[str], tokenizer: Any, max_length: int) -> None:
        self._texts, self._tokenizer, self._max_length = texts, tokenizer, max_length

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._texts, "set_epoch"):
            self._texts.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return pieces(self._tokenizer, self._texts, self._max_length)


class TaskMix(Dataset[dict[str, Any]]):
    """The rows from which a task is distilled: a quarter labelled ones; a quarter copies of them in which 15 % of the tokens
    are replaced by others of the labelled rows, drawn as often as they occur there; half transfer rows, which are inputs of
    the same form. Without transfer rows, half and half of the first two. Copies and transfer rows have no labels: what they
    are to give, the teacher says.

    Of ``"mlm"`` all rows are alike, and other tokens are masked each time.

    A row depends on ``seed`` and its number alone. Rows come in passes, so that each is seen as often as the others.

    Args:
        length: how many rows to give.

    Raises:
        ValueError: no labels in ``labelled``, no rows, a task without logits.
    """

    def __init__(
        self,
        task: str,
        labelled: Encoded,
        tokenizer: Any,
        length: int,
        *,
        transfer: Encoded | None = None,
        seed: int = 0,
    ) -> None:
        self._objective, self._seed = get_objective(task), seed
        check_rows("the labelled data", labelled, 1)
        check_rows("the transfer data", transfer, 1)
        if length < 1:
            raise ValueError(f"length={length!r} must be at least 1: as many rows as the training takes")
        if not labelled.labelled:
            raise ValueError(f"the data to distil {task!r} on has no labels; what has none is transfer data")
        self._special = np.array(tokenizer.all_special_ids)
        self.masked_share = Masking.share if task == "mlm" else None  # of a row's tokens, at most; one in any case
        self._masking = Masking(tokenizer) if task == "mlm" else None
        if self._masking and transfer is not None:
            raise ValueError("of 'mlm' all rows are alike, transfer rows too: give all of them as the labelled data")
        if not self._masking:
            self._unigrams = np.array([i for ids in labelled.columns["input_ids"] for i in ids], dtype=np.int32)
            self._unigrams = self._unigrams[~np.isin(self._unigrams, self._special)]
        pattern: list[tuple[str, Encoded]]  # of what row i is, by i modulo the pattern's length
        if self._masking:
            pattern = [("masked", labelled)]
        else:
            pattern = [("labelled", labelled), ("replaced", labelled)]
            pattern += [] if transfer is None else [("transfer", transfer)] * 2
        orders = {
            kind: _passes(len(data), torch.Generator().manual_seed(seed + number))
            for number, (kind, data) in enumerate(dict(pattern).items())
        }
        self._rows = [(*pattern[i % len(pattern)], next(orders[pattern[i % len(pattern)][0]])) for i in range(length)]
        self.lengths = [data.lengths[number] for _, data, number in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        kind, data, number = self._rows[index]
        row = data[number]
        if kind == "labelled":
            return row
        if kind == "transfer":
            return row | self._objective.unlabelled(len(row["input_ids"]))
        generator = np.random.default_rng((self._seed, index % len(self)))
        draws = generator.random(len(row["input_ids"]))
        if self._masking:
            whole = unmasked({name: torch.tensor(row[name]) for name in ("input_ids", "labels")})
            masked, labels = self._masking(whole, torch.from_numpy(draws))
            return row | {"input_ids": masked.tolist(), "labels": labels.tolist()}
        ids = np.array(row["input_ids"])
        replaced = (draws < _REPLACED) & ~np.isin(ids, self._special)
        if replaced.any():
            ids[replaced] = generator.choice(self._unigrams, int(replaced.sum()))
        return row | {"input_ids": ids.tolist()} | self._objective.unlabelled(len(ids))


def _passes(rows: int, generator: torch.Generator) -> Iterator[int]:
    """Row numbers without end, in passes of all of them."""
    while True:
        yield from torch.randperm(rows, generator=generator).tolist()


def calibration_batches(
    task: str, labelled: Encoded, transfer: Encoded | None, tokenizer: Any, max_tokens: int
) -> list[dict[str, Tensor]]:
    """Inputs of the task as the model meets them, without labels, to calibrate on: labelled and transfer rows by turns, in the
    order in which they come, until there are ``max_tokens`` tokens; padded in batches of similar length."""
    by_turns = zip_longest(
        *([(data, i) for i in range(len(data))] for data in (labelled, transfer) if data is not None)
    )
    rows, tokens = [], 0
    for data, i in (place for turn in by_turns for place in turn if place is not None):
        if tokens >= max_tokens:
            break
        rows.append((data, i))
        tokens += data.lengths[i]
    rows.sort(key=lambda place: place[0].lengths[place[1]])
    collate, names = get_task(task).collator(tokenizer), get_objective(task).labels
    batches: list[dict[str, Tensor]] = []
    while rows:
        count = max(1, _BATCH_TOKENS // rows[-1][0].lengths[rows[-1][1]])
        part, rows = [data[i] for data, i in rows[-count:]], rows[:-count]
        batches.append(collate([{k: v for k, v in row.items() if k not in names} for row in part]))
    return batches
