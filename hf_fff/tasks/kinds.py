"""The tasks, one class each. A new one is a class and a row of ``TASKS``.

Where its rows are not one encoded text each, a class says what its items are.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from . import metrics
from .data import IGNORED, Collator, Columns, Encoded, Masking, Ragged, Row

_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
)
_SINGLES = (("sentence",), ("text",))
_CHUNK = 1024  # texts that are tokenised at once


class Task:
    """Reads and scores one text, or a pair of texts, a row.

    Attributes:
        name: as in ``TASKS``.
        auto_class: loads a model with the head that is wanted.
        heads: how the names of architectures end that have it; () where any will do.
        main_metric: the one to choose by; higher is better.
        gap_metric: the one by which to tell what share of a gap between two models a third one closes.
        text_columns: what is looked for where no columns are given, the first that is there.
        label_columns: the same.
        text_counts: how many text columns there may be.
        least_length: the smallest ``max_length`` that makes sense.
        of_words: whether a text is a list of words.
    """

    name: ClassVar[str]
    auto_class: ClassVar[Any]
    heads: ClassVar[tuple[str, ...]] = ()
    main_metric: ClassVar[str]
    text_columns: ClassVar[tuple[tuple[str, ...], ...]] = (*_PAIRS, *_SINGLES)
    label_columns: ClassVar[tuple[str, ...]] = ("label", "labels", "score")
    text_counts: ClassVar[Sequence[int]] = (1, 2)
    least_length: ClassVar[int] = 4
    of_words: ClassVar[bool] = False

    @property
    def gap_metric(self) -> str:
        return self.main_metric

    # Encoding

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        config: Any,
        *,
        max_length: int = 128,
        columns: Columns | None = None,
        seed: int = 0,
    ) -> Encoded:
        """Encodes rows for a model of ``config``.

        Args:
            max_length: what is longer is cut (a context of "qa" goes into several items), also at what model and tokenizer
                take at most.
            columns: guessed from well-known names where they are not given. Rows without labels are for distillation.
            seed: of what "mlm" masks.

        Raises:
            ValueError: no rows, no such columns, a text that is none, or a label that is not allowed.
        """
        if not rows:
            raise ValueError("there are no rows")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < self.least_length:
            raise ValueError(f"max_length={max_length!r} must be an integer of at least {self.least_length}")
        max_length = self.longest(max_length, tokenizer, config)
        text, label = self._columns(rows, columns or Columns())
        self._check_texts(rows, text)
        return self._encode(list(rows), tokenizer, config, max_length, text, label, seed)

    def longest(self, max_length: int, tokenizer: Any, config: Any) -> int:
        """At how many tokens rows are cut: ``max_length``, or what model and tokenizer take at most."""
        limits = (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
        return min([max_length, *(limit for limit in limits if limit)])

    def cut(self, data: Encoded, tokenizer: Any, longest: int, columns: Columns | None = None) -> list[int]:
        """Which rows were cut at ``longest`` tokens, counted from 1."""
        text, _ = self._columns(data.rows, columns or Columns())
        full = [i for i, length in enumerate(data.lengths) if length >= longest]
        if not full:
            return []
        texts = [[data.rows[i][name] for i in full] for name in text]
        whole = tokenizer(*texts, truncation=False, verbose=False, is_split_into_words=self.of_words)["input_ids"]
        return [i + 1 for i, ids in zip(full, whole, strict=True) if len(ids) > longest]

    def _columns(self, rows: Sequence[Row], wanted: Columns) -> tuple[tuple[str, ...], str | None]:
        """The columns of texts, and of labels if there are any."""
        found = list(rows[0])
        text = (wanted.text,) if isinstance(wanted.text, str) else wanted.text
        if text is None:
            text = next((names for names in self.text_columns if {*names} <= {*found}), None)
        if text is None:
            known = ", ".join("+".join(names) for names in self.text_columns)
            raise ValueError(f"none of the columns {found} is known to hold texts ({known}): name them")
        if len(text) not in self.text_counts:
            allowed = " or ".join(map(str, self.text_counts))
            raise ValueError(f"{self.name} wants {allowed} text column(s), not {len(text)}: {', '.join(text)}")
        label = wanted.label
        if label is not None and not self.label_columns:
            raise ValueError(f"{self.name} reads no labels, so there is no use for the column {label!r}")
        if label is None:
            label = next((name for name in self.label_columns if name in found and name not in text), None)
        for name in (*text, *([label] if label else [])):
            if name not in found:
                raise ValueError(f"there is no column {name!r}; the columns are {found}")
        if label is not None and all(row.get(label) in (None, "") for row in rows):
            label = None
        return tuple(text), label

    def _check_texts(self, rows: Sequence[Row], text: tuple[str, ...]) -> None:
        for number, row in enumerate(rows, 1):
            for name in text:
                if not isinstance(row.get(name), str):
                    raise ValueError(f"row {number}: {name}={row.get(name)!r} is no text")

    def _encode(
        self,
        rows: list[Row],
        tokenizer: Any,
        config: Any,
        max_length: int,
        text: tuple[str, ...],
        label: str | None,
        seed: int,
    ) -> Encoded:
        encoded = tokenised(tokenizer, [[row[name] for row in rows] for name in text], max_length)
        if label is not None:
            encoded["labels"] = [
                self.label(row.get(label), f"row {number}: {label}", config) for number, row in enumerate(rows, 1)
            ]
        return Encoded(encoded, rows, labelled=label is not None)

    def label(self, value: Any, place: str, config: Any) -> Any:
        """The label that ``value`` stands for; ``place`` is for messages."""
        raise NotImplementedError

    def collator(self, tokenizer: Any) -> Collator:
        """Makes batches of items."""
        return Collator(tokenizer)

    # Models

    def check_model(self, model: Any) -> None:
        """Looks at a model or its config.

        Raises:
            ValueError: it has not the head that the task wants.
        """
        config = getattr(model, "config", model)
        names = [type(model).__name__] if config is not model else list(config.architectures or [])
        if self.heads and not any(name.endswith(self.heads) for name in names):
            told = ", ".join(names) or f"a {config.model_type!r} model of no known architecture"
            raise ValueError(f"{told} has no head for {self.name}: that needs one of …{', …'.join(self.heads)}")

    def outputs(self, model: Any, batch: dict[str, Tensor], data: Encoded, indices: Sequence[int]) -> list[Tensor]:
        """What the model decides for each item of a batch, in float32: here the logits of a row, ``[labels]``."""
        return list(_run(model, batch).logits.float())

    # Scores

    def reduce(self, output: Tensor, item: dict[str, Any]) -> Tensor:
        """What is kept of an item's output until all are there."""
        return output

    def compare(self, have: Tensor, want: Tensor) -> Tensor:
        """What is kept of an item's output beside the teacher's: here agreement and divergence, ``[decisions, 2]``."""
        return metrics.agreement(have, want)

    def agreement(self, compared: list[Tensor]) -> dict[str, float]:
        """What all of them say together."""
        agree, kl = torch.cat(compared).double().mean(0).tolist()
        return {"agreement": agree, "kl": kl}

    def score(self, outputs: Sequence[Tensor], data: Encoded) -> dict[str, float]:
        """Metrics of what ``reduce`` kept of each item, in the order of the data."""
        raise NotImplementedError


class Classification(Task):
    name = "classification"
    auto_class = transformers.AutoModelForSequenceClassification
    heads = ("ForSequenceClassification",)
    main_metric = "accuracy"

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        config = getattr(model, "config", model)
        if config.num_labels < 2:
            raise ValueError(f"num_labels={config.num_labels} is one number, not classes: the task is regression")
        if config.problem_type not in (None, "single_label_classification"):
            raise ValueError(f"problem_type={config.problem_type!r} is not supported (single_label_classification is)")

    def label(self, value: Any, place: str, config: Any) -> int:
        return class_of(value, place, config)

    def score(self, outputs: Sequence[Tensor], data: Encoded) -> dict[str, float]:
        """``accuracy``, ``f1`` (of two classes that of class 1, else the mean of all) and ``mcc``, Matthews' correlation."""
        logits = torch.stack(list(outputs))
        return metrics.classification(logits.argmax(-1).tolist(), data.columns["labels"], logits.shape[-1])


class Regression(Task):
    name = "regression"
    auto_class = transformers.AutoModelForSequenceClassification
    heads = ("ForSequenceClassification",)
    main_metric = "spearman"
    label_columns = ("score", "label", "labels")

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        config = getattr(model, "config", model)
        if config.num_labels != 1:
            raise ValueError(f"num_labels={config.num_labels} are classes, not a number: the task is classification")

    def label(self, value: Any, place: str, config: Any) -> float:
        return number_of(value, place)

    def compare(self, have: Tensor, want: Tensor) -> Tensor:
        return torch.cat([have, want])

    def agreement(self, compared: list[Tensor]) -> dict[str, float]:
        """There are no classes to agree on: ``agreement`` is Spearman's correlation, ``mse`` has its place beside it."""
        have, want = torch.stack(compared).double().unbind(1)
        told = metrics.regression(have.tolist(), want.tolist())
        return {"agreement": told["spearman"], "teacher_mse": told["mse"]}

    def score(self, outputs: Sequence[Tensor], data: Encoded) -> dict[str, float]:
        """``spearman``, ``pearson``, ``mse``."""
        return metrics.regression(torch.cat(list(outputs)).double().tolist(), data.columns["labels"])


class Tokens(Task):
    """Tags of words: the first of a word's tokens carries its label. ``data.known["words"]`` holds, for each row, where the
    words start that have a token, and which words these are."""

    name = "tokens"
    auto_class = transformers.AutoModelForTokenClassification
    heads = ("ForTokenClassification",)
    main_metric = "f1"
    text_columns = (("tokens",),)
    label_columns = ("tags", "ner_tags", "labels")
    text_counts = (1,)
    of_words = True

    def _check_texts(self, rows: Sequence[Row], text: tuple[str, ...]) -> None:
        for number, row in enumerate(rows, 1):
            words = row.get(text[0])
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise ValueError(f"row {number}: {text[0]}={words!r} is no list of words")

    def _encode(
        self,
        rows: list[Row],
        tokenizer: Any,
        config: Any,
        max_length: int,
        text: tuple[str, ...],
        label: str | None,
        seed: int,
    ) -> Encoded:
        _check_fast(tokenizer, self.name)
        if label is not None and all(config.id2label[i] == f"LABEL_{i}" for i in range(config.num_labels)):
            raise ValueError("the model's id2label has no tags such as O and B-person: entities need them")
        tags = None if label is None else [self._tags(n, row, text[0], label, config) for n, row in enumerate(rows, 1)]
        columns: dict[str, list[Any]] = {}
        starts: list[tuple[list[int], list[int]]] = []
        for part in _chunks(rows):
            encoded = tokenizer(
                [row[text[0]] for row in part], is_split_into_words=True, truncation=True, max_length=max_length
            )
            for number in range(len(part)):
                of = encoded.word_ids(number)
                first = [i for i, word in enumerate(of) if word is not None and (i == 0 or of[i - 1] != word)]
                starts.append((first, [of[i] for i in first]))
            for name, values in encoded.items():
                columns.setdefault(name, []).extend(values)
        known: dict[str, Any] = {"words": starts}
        if tags is not None:
            names = [config.id2label[i] for i in range(config.num_labels)]
            columns["labels"] = []
            for ids, (first, words), row_tags in zip(columns["input_ids"], starts, tags, strict=True):
                labels = [IGNORED] * len(ids)
                for i, word in zip(first, words, strict=True):
                    labels[i] = row_tags[word]
                columns["labels"].append(labels)
            known |= {"tags": tags, "names": names}
        return Encoded({k: Ragged(v) for k, v in columns.items()}, rows, labelled=tags is not None, **known)

    def _tags(self, number: int, row: Row, text: str, label: str, config: Any) -> list[int]:
        tags = row.get(label)
        if not isinstance(tags, list) or len(tags) != len(row[text]):
            count = len(tags) if isinstance(tags, list) else repr(tags)
            raise ValueError(
                f"row {number}: {label} must be a list of {len(row[text])} tags, one a word; found {count}"
            )
        return [class_of(tag, f"row {number}: {label}", config) for tag in tags]

    def outputs(self, model: Any, batch: dict[str, Tensor], data: Encoded, indices: Sequence[int]) -> list[Tensor]:
        """``[words, labels]``."""
        logits = _run(model, batch).logits
        starts = [torch.tensor(data.known["words"][i][0], dtype=torch.long, device=logits.device) for i in indices]
        return [row[first].float() for row, first in zip(logits, starts, strict=True)]

    def score(self, outputs: Sequence[Tensor], data: Encoded) -> dict[str, float]:
        """``f1``, ``precision`` and ``recall`` of entities, and ``accuracy`` of words. A word that was cut off, or that the
        tokenizer makes nothing of, counts as one that is tagged "O"."""
        names: list[str] = data.known["names"]
        outside = names.index("O") if "O" in names else 0
        predicted, wanted = [], []
        for output, (_, words), tags in zip(outputs, data.known["words"], data.known["tags"], strict=True):
            row = [outside] * len(tags)
            for word, tag in zip(words, output.argmax(-1).tolist(), strict=True):
                row[word] = tag
            predicted.append([names[i] for i in row])
            wanted.append([names[i] for i in tags])
        return metrics.entities(predicted, wanted)


class QuestionAnswering(Task):
    """Spans of a context. A long context goes into several items that overlap; ``data.known["offsets"]`` holds, for each
    item, the first and last token of the context and where in it each of them starts and ends."""

    name = "qa"
    auto_class = transformers.AutoModelForQuestionAnswering
    heads = ("ForQuestionAnswering",)
    main_metric = "f1"
    text_columns = (("question", "context"),)
    label_columns = ("answers",)
    text_counts = (2,)
    least_length = 32
    longest_answer = 30  # tokens

    def _encode(
        self,
        rows: list[Row],
        tokenizer: Any,
        config: Any,
        max_length: int,
        text: tuple[str, ...],
        label: str | None,
        seed: int,
    ) -> Encoded:
        _check_fast(tokenizer, self.name)
        question, context = text
        answers = None if label is None else [_answers(n, row, context, label) for n, row in enumerate(rows, 1)]
        columns: dict[str, list[Any]] = {}
        offsets: list[tuple[int, list[tuple[int, int]]]] = []
        row_of: list[int] = []
        for number, part in enumerate(_chunks(rows)):
            encoded = tokenizer(
                _shortened([row[question].strip() for row in part], tokenizer, max_length // 2),
                [row[context] for row in part],
                truncation="only_second",
                max_length=max_length,
                stride=max_length // 4,  # a third where it fits is usual: 128 of 384
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            row_of += [_CHUNK * number + i for i in encoded.pop("overflow_to_sample_mapping")]
            for i, places in enumerate(encoded.pop("offset_mapping")):
                inside = [j for j, sequence in enumerate(encoded.sequence_ids(i)) if sequence == 1]
                first = inside[0] if inside else 0
                offsets.append((first, [tuple(places[j]) for j in inside]))
            for name, values in encoded.items():
                columns.setdefault(name, []).extend(values)
        ready: dict[str, Any] = {k: Ragged(v) for k, v in columns.items()}
        if answers is not None:
            spans = [_span(*answers[row][0], *places) for row, places in zip(row_of, offsets, strict=True)]
            ready |= {"start_positions": [s for s, _ in spans], "end_positions": [e for _, e in spans]}
        known = {"offsets": offsets, "answers": answers, "context": context}
        return Encoded(ready, rows, labelled=answers is not None, row_of=row_of, **known)

    def cut(self, data: Encoded, tokenizer: Any, longest: int, columns: Columns | None = None) -> list[int]:
        """None: a long context goes into several items."""
        return []

    def outputs(self, model: Any, batch: dict[str, Tensor], data: Encoded, indices: Sequence[int]) -> list[Tensor]:
        """``[2, tokens]``, logits of start and end."""
        out = _run(model, batch)
        logits = torch.stack([out.start_logits, out.end_logits], 1).float()
        return [row[:, : data.lengths[i]] for row, i in zip(logits, indices, strict=True)]

    def score(self, outputs: Sequence[Tensor], data: Encoded) -> dict[str, float]:
        """``f1`` and ``exact_match``, as of SQuAD 1.1."""
        best = [(-math.inf, "")] * len(data.rows)
        for output, row, (first, places) in zip(outputs, data.row_of, data.known["offsets"], strict=True):
            if not places:
                continue
            value, start, end = metrics.best_span(output[:, first : first + len(places)], self.longest_answer)
            if value > best[row][0]:
                best[row] = (value, data.rows[row][data.known["context"]][places[start][0] : places[end][1]])
        wanted = [[text for text, _ in row] for row in data.known["answers"]]
        return metrics.answers([text for _, text in best], wanted)


class MaskedLM(Task):
    name = "mlm"
    auto_class = transformers.AutoModelForMaskedLM
    heads = ("ForMaskedLM", "ForPreTraining")
    main_metric = "accuracy"
    label_columns = ()

    @property
    def gap_metric(self) -> str:
        return "loss"  # it tells designs apart sooner

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        if type(model).__name__.endswith("ForPreTraining"):
            raise ValueError(f"{type(model).__name__} gives no logits of its own: load it as a …ForMaskedLM")

    def _encode(
        self,
        rows: list[Row],
        tokenizer: Any,
        config: Any,
        max_length: int,
        text: tuple[str, ...],
        label: str | None,
        seed: int,
    ) -> Encoded:
        if seed < 0:
            raise ValueError(f"seed={seed!r} must be at least 0")
        masking = Masking(tokenizer)
        encoded = tokenised(tokenizer, [[row[name] for row in rows] for name in text], max_length)
        masked, labels = [], []
        rows_of_ids = encoded["input_ids"]
        for numbers in _chunks(range(len(rows_of_ids))):
            ids = [torch.tensor(rows_of_ids[number]) for number in numbers]
            draws = [torch.from_numpy(np.random.default_rng((seed, n)).random(rows_of_ids.lengths[n])) for n in numbers]
            # Padded with what is never masked
            hidden, wanted = masking(pad_sequence(ids, True, masking.mask), pad_sequence(draws, True))
            masked += [row[: len(i)].tolist() for row, i in zip(hidden, ids, strict=True)]
            labels += [row[: len(i)].tolist() for row, i in zip(wanted, ids, strict=True)]
        if all(i == IGNORED for row in labels for i in row):
            raise ValueError("there is no token to be masked in any row")
        return Encoded(encoded | {"input_ids": Ragged(masked), "labels": Ragged(labels)}, rows, labelled=True)

    def outputs(self, model: Any, batch: dict[str, Tensor], data: Encoded, indices: Sequence[int]) -> list[Tensor]:
        """``[masked tokens, vocabulary]``."""
        hidden = batch["labels"] != IGNORED
        logits = _run(model, batch).logits[hidden].float()  # [B, T, V] in float32 would be large
        return list(logits.split(hidden.sum(1).tolist()))

    def reduce(self, output: Tensor, item: dict[str, Any]) -> Tensor:
        """Negative log-likelihood, and whether the best guess was right: ``[masked tokens, 2]``."""
        labels = torch.tensor([i for i in item["labels"] if i != IGNORED], dtype=torch.long, device=output.device)
        return torch.stack(
            [F.cross_entropy(output, labels, reduction="none"), (output.argmax(-1) == labels).float()], 1
        )

    def score(self, outputs: Sequence[Tensor], data: Encoded) -> dict[str, float]:
        """``loss``, ``perplexity`` and ``accuracy`` of the masked tokens."""
        loss, accuracy = torch.cat(list(outputs)).double().mean(0).tolist()
        return {"accuracy": accuracy, "loss": loss, "perplexity": math.exp(min(loss, 700))}


class Embeddings(Task):
    """Mean-pooled embeddings, against those of a teacher. Items are the distinct texts of all text columns."""

    name = "embeddings"
    auto_class = transformers.AutoModel
    main_metric = "cosine"
    label_columns: ClassVar[tuple[str, ...]] = ()

    def _encode(
        self,
        rows: list[Row],
        tokenizer: Any,
        config: Any,
        max_length: int,
        text: tuple[str, ...],
        label: str | None,
        seed: int,
    ) -> Encoded:
        encoded = tokenised(tokenizer, [[row[name] for row in rows for name in text]], max_length)
        number: dict[tuple[int, ...], int] = {}  # texts that are the same to the model are one item
        first: list[int] = []  # where each item comes first
        item_of: list[int] = []
        for place, ids in enumerate(encoded["input_ids"]):
            item_of.append(number.setdefault(tuple(ids), len(number)))
            if len(number) > len(first):
                first.append(place)
        columns: dict[str, Any] = {k: Ragged(v[place] for place in first) for k, v in encoded.items()}
        width = len(text)
        known: dict[str, Any] = {"items": [tuple(item_of[i : i + width]) for i in range(0, len(item_of), width)]}
        if label is not None:
            known["targets"] = [number_of(row.get(label), f"row {n}: {label}") for n, row in enumerate(rows, 1)]
        row_of = [place // width for place in first]
        return Encoded(columns, rows, labelled=label is not None, row_of=row_of, **known)

    def outputs(self, model: Any, batch: dict[str, Tensor], data: Encoded, indices: Sequence[int]) -> list[Tensor]:
        """``[H]``, the mean of the visible tokens' last hidden states."""
        hidden = _run(model.base_model, batch).last_hidden_state.float()
        visible = batch["attention_mask"].unsqueeze(-1).float()
        return list((hidden * visible).sum(1) / visible.sum(1).clamp_min(1))

    def compare(self, have: Tensor, want: Tensor) -> Tensor:
        return torch.stack([have, want])

    def agreement(self, compared: list[Tensor]) -> dict[str, float]:
        """``cosine``, ``cosine_p5`` (below which lie 5 % of the texts), and ``neighbours``: which share of the teacher's ten
        nearest neighbours of a text, by cosine among all others, are the student's too. It is left out where a text has ten
        others or fewer."""
        return metrics.embeddings(*torch.stack(compared).unbind(1))

    def score(self, outputs: Sequence[Tensor], data: Encoded) -> dict[str, float]:
        return {}


class Similarity(Embeddings):
    """Mean-pooled embeddings whose cosine is to rank pairs as their scores do. Items are the distinct texts."""

    name = "similarity"
    main_metric = "spearman"
    text_columns = _PAIRS
    label_columns = ("score", "label", "labels")
    text_counts = (2,)

    def score(self, outputs: Sequence[Tensor], data: Encoded) -> dict[str, float]:
        """``spearman`` and ``pearson`` of the cosines with the scores."""
        a, b = torch.stack(list(outputs))[torch.tensor(data.known["items"])].double().unbind(1)
        told = metrics.regression(F.cosine_similarity(a, b, dim=-1).tolist(), data.known["targets"])
        return {name: told[name] for name in ("spearman", "pearson")}


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Classification(),
        Regression(),
        Tokens(),
        QuestionAnswering(),
        MaskedLM(),
        Similarity(),
        Embeddings(),
    )
}


def get_task(name: str) -> Task:
    """Raises ``ValueError`` for a task that is not known."""
    if name not in TASKS:
        raise ValueError(f"task={name!r} is not known (allowed: {', '.join(TASKS)})")
    return TASKS[name]


# What rows are made of


def class_of(value: Any, place: str, config: Any) -> int:
    """The number of a class that is given as name or, where names are no numbers themselves, as number."""
    if str(value) in config.label2id:
        return int(config.label2id[str(value)])
    number: int | None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is not None and all(_NUMBER.fullmatch(str(name)) for name in config.label2id):
        number = config.label2id.get(str(number))
    if number is None or not 0 <= number < config.num_labels or (isinstance(value, float) and value != int(value)):
        names = ", ".join(str(config.id2label[i]) for i in range(min(config.num_labels, 20)))
        more = ", …" if config.num_labels > 20 else ""
        raise ValueError(f"{place}={value!r} is no label (allowed: 0 to {config.num_labels - 1}, or {names}{more})")
    return number


def number_of(value: Any, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{place}={value!r} is no number")
    return number


def _answers(number: int, row: Row, context: str, label: str) -> list[tuple[str, int]]:
    """Texts and where they start, from a list of objects or, as in the Hub's SQuAD, from an object of lists."""
    value = row.get(label)
    if isinstance(value, dict):
        value = [
            {"text": text, "answer_start": start}
            for text, start in zip(value.get("text", []), value.get("answer_start", []), strict=False)
        ]
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"row {number}: {label}={value!r} is no list of answers (questions without one are not supported)"
        )
    found = []
    for answer in value:
        text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(start, int):
            raise ValueError(f"row {number}: {label} has {answer!r}, which is no object with text and answer_start")
        if not text or start < 0 or row[context][start : start + len(text)] != text:
            there = row[context][max(0, start) : max(0, start) + len(text)]
            raise ValueError(f"row {number}: {label} has {text!r} at answer_start={start}, where {there!r} is")
        found.append((text, start))
    return found


def _span(text: str, start: int, first: int, places: list[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of an answer; 0, which is [CLS], where not all of it lies in the window."""
    end = start + len(text)
    inside = [i for i, (a, b) in enumerate(places) if a < end and b > start]
    if not inside or places[inside[0]][0] > start or places[inside[-1]][1] < end:
        return 0, 0
    return first + inside[0], first + inside[-1]


def _shortened(texts: list[str], tokenizer: Any, tokens: int) -> list[str]:
    """Texts cut at a number of tokens, so that something else has a place beside them."""
    encoded = tokenizer(
        texts, add_special_tokens=False, truncation=True, max_length=tokens, return_offsets_mapping=True
    )
    return [
        text[: places[-1][1]] if len(places) == tokens else text
        for text, places in zip(texts, encoded["offset_mapping"], strict=True)
    ]


def _check_fast(tokenizer: Any, name: str) -> None:
    if not tokenizer.is_fast:
        raise ValueError(f"{name} needs a fast tokenizer, which {type(tokenizer).__name__} is not: it tells no offsets")


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))


def tokenised(tokenizer: Any, columns: list[list[str]], max_length: int) -> dict[str, Any]:
    """Texts, or pairs of texts, as columns of ids."""
    parts = [
        tokenizer(*chunk, truncation=True, max_length=max_length)
        for chunk in zip(*(_chunks(column) for column in columns), strict=True)
    ]
    return {name: Ragged(row for part in parts for row in part[name]) for name in parts[0]}


_NUMBER = re.compile(r"-?\d+")
_TARGETS = {"labels", "start_positions", "end_positions"}


def _run(model: Any, batch: dict[str, Tensor]) -> Any:
    return model(**{name: values for name, values in batch.items() if name not in _TARGETS})
