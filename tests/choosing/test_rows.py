"""What is trained on and what is decided on are not the same."""

import pytest

from hf_fff.choosing import prepare
from hf_fff.tasks import Columns


def pair(n, other="b", **more):
    return {"sentence1": f"a{n}", "sentence2": f"{other}{n}", **more}


def test_a_fifth_is_held_out():
    rows = [pair(n, label=n % 2) for n in range(50)]
    data = prepare("classification", rows)
    assert len(data.held_out) == 10 and len(data.train.rows) == 40
    assert sorted([*data.held_out, *data.train.rows], key=str) == sorted(rows, key=str)
    assert data.held_out == prepare("classification", rows).held_out != prepare("classification", rows, seed=1).held_out


def test_what_decides_is_not_trained_on():
    """Not with another label, and not as a transfer row either."""
    rows = [pair(n, label=0) for n in range(6)]
    decide = [pair(2, label=1), pair(9, label=1)]
    other = [{"question1": "a9", "question2": "b9"}, {"question1": "a9", "question2": "x"}]
    data = prepare("classification", rows, held_out=decide, transfer=other)
    assert data.held_out == decide and [r["sentence1"] for r in data.train.rows] == ["a0", "a1", "a3", "a4", "a5"]
    assert data.train.transfer == other[1:]
    with pytest.raises(ValueError, match="nothing to train on, but what is held out"):
        prepare("classification", decide, held_out=decide)


def test_named_columns():
    rows = [{"a": "x", "b": "y", "label": 0}, {"a": "x", "b": "z", "label": 0}]
    data = prepare("classification", rows, held_out=rows[:1], columns=Columns(("a", "b")))
    assert data.train.rows == rows[1:]


def test_texts_of_masked_language_models_are_rows():
    data = prepare("mlm", [{"text": "a"}], texts=["b", " ", "c"], held_out=[{"text": "c"}])
    assert data.train.rows == [{"text": "a"}, {"text": "b"}]


def test_embeddings():
    data = prepare("embeddings", [pair(1)], texts=["c", "d", ""], held_out=[pair(1, "c"), {"text": "d"}])
    assert data.train == ["b1", "c"] and data.held_out == [{"text": "a1"}, {"text": "c1"}, {"text": "d"}]
    data = prepare("embeddings", [], texts=[f"text {n}" for n in range(30)])
    assert len(data.held_out) == 6 and len(data.train) == 24
    assert not {row["text"] for row in data.held_out} & set(data.train)


def test_similarity_trains_on_texts_and_decides_by_scores():
    rows = [pair(n, score=n) for n in range(10)]
    data = prepare("similarity", rows, texts=["t", rows[0]["sentence1"]])
    assert len(data.held_out) == 2 and all("score" in row for row in data.held_out)
    held = {row[k] for row in data.held_out for k in ("sentence1", "sentence2")}
    every = {"t", *(row[k] for row in rows for k in ("sentence1", "sentence2"))}
    assert set(data.train) == every - held
    assert prepare("similarity", [], held_out=rows, texts=["t", "a3"]).train == ["t"]
    with pytest.raises(ValueError, match="no pairs with scores"):
        prepare("similarity", [], texts=["t"])


def test_what_is_no_text():
    with pytest.raises(ValueError, match=r"none of the columns \['words'\] is known to hold texts"):
        prepare("embeddings", [{"words": "a"}])
    with pytest.raises(ValueError, match="there are no rows"):
        prepare("classification", [])
    with pytest.raises(ValueError, match="task='translation' is not known"):
        prepare("translation", [{"text": "a"}])
