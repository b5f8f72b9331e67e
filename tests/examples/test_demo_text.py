"""The demo's sentences are clean and disjoint, and the machine's own text is English prose."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from machine_text import machine_text  # noqa: E402

MINIMUM = {"everyday_eval": 640, "everyday_calibrate": 1200}


def _lines(name: str) -> list[str]:
    """Return the lines of one of the demo's text files."""
    return (EXAMPLES / "data" / f"{name}.txt").read_bytes().decode("utf-8").split("\n")[:-1]


def _words(line: str) -> list[str]:
    """Return the words of a line, without case and punctuation."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", line.lower())


def _six_word_sequences(lines: list[str]) -> set[tuple[str, ...]]:
    """Return every run of six words within the lines."""
    return {tuple(words[i : i + 6]) for words in (_words(line) for line in lines) for i in range(len(words) - 5)}


@pytest.mark.parametrize("name", MINIMUM)
def test_everyday_file_is_clean(name: str) -> None:
    """Each file is ASCII text with enough lines, none empty, padded or repeated."""
    raw = (EXAMPLES / "data" / f"{name}.txt").read_bytes()
    lines = _lines(name)
    assert raw.isascii() and raw.endswith(b"\n") and b"\r" not in raw and b"\t" not in raw
    assert len(lines) >= MINIMUM[name]
    assert all(line and line == " ".join(line.split()) for line in lines)
    assert all(2 <= len(line.split()) <= 60 for line in lines)
    assert len({" ".join(_words(line)) for line in lines}) == len(lines)


@pytest.mark.parametrize("name", MINIMUM)
def test_everyday_file_is_varied(name: str) -> None:
    """Sentences differ in length, form and beginning, and few word runs come back."""
    lines = _lines(name)
    lengths = [len(line.split()) for line in lines]
    assert sum(n <= 5 for n in lengths) > 20 and sum(n >= 25 for n in lengths) > 20
    assert sum(line.endswith("?") for line in lines) > 50
    runs = [tuple(_words(line)[i : i + 6]) for line in lines for i in range(len(_words(line)) - 5)]
    assert len(set(runs)) > 0.99 * len(runs)
    assert len({tuple(_words(line)[:3]) for line in lines}) > 0.85 * len(lines)


def test_everyday_files_are_disjoint() -> None:
    """No sentence, and no run of six words, is in both files."""
    evaluation, calibration = (_lines(name) for name in MINIMUM)
    keys = {" ".join(_words(line)) for line in evaluation}
    assert not keys & {" ".join(_words(line)) for line in calibration}
    assert not _six_word_sequences(evaluation) & _six_word_sequences(calibration)


@pytest.fixture(scope="module")
def pieces() -> list[str]:
    """Return a small harvest of the machine's own text."""
    return machine_text(60_000)


def test_machine_text_is_deterministic_and_limited() -> None:
    """The same seed gives the same distinct pieces, within the limit; another seed, others."""
    first = machine_text(20_000, seed=3)
    assert first == machine_text(20_000, seed=3)
    assert first != machine_text(20_000, seed=4)
    assert len(set(first)) == len(first) > 50
    assert 0.9 * 20_000 < sum(map(len, first)) <= 20_000
    assert machine_text(0) == []


def test_machine_text_reads_as_prose(pieces: list[str]) -> None:
    """Pieces are whole sentences of a fair length, single ones and paragraphs, without markup."""
    assert all(6 <= len(piece.split()) <= 80 for piece in pieces)
    assert all(piece[-1] in ".?!" and (piece[0].isupper() or piece[0] == '"') for piece in pieces)
    assert not [piece for piece in pieces if re.search(r">>>|``|\*\*|https?:|[_{}<>|=\\]", piece)]
    several = sum(bool(re.search(r"[.?!] [A-Z]", piece)) for piece in pieces)
    assert 0.2 * len(pieces) < several < 0.8 * len(pieces)


def test_machine_text_holds_no_evaluation_sentence(pieces: list[str]) -> None:
    """The evaluation sentences do not leak into the calibration text."""
    text = " ".join(" ".join(_words(piece)) for piece in pieces)
    keys = [" ".join(_words(line)) for line in _lines("everyday_eval")]
    assert not [key for key in keys if len(key.split()) > 3 and f" {key} " in f" {text} "]
