"""Metrics against hand-computed values, scikit-learn, scipy, and brute force."""

import math
import sys

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from hf_fff.tasks import metrics


@pytest.mark.parametrize("classes", [2, 4])
def test_classification(classes):
    g = np.random.default_rng(0)
    a, b = (g.integers(0, classes, 300).tolist() for _ in range(2))
    b = [x if i % 3 else y for i, (x, y) in enumerate(zip(a, b, strict=True))]
    told = metrics.classification(a, b, classes)
    table = np.zeros((classes, classes))
    for have, want in zip(a, b, strict=True):
        table[want, have] += 1
    f1 = 2 * table.diagonal() / (table.sum(0) + table.sum(1))
    assert told["accuracy"] == pytest.approx(table.trace() / 300)
    assert told["f1"] == pytest.approx(f1[1] if classes == 2 else f1.mean())
    assert told["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(b, a))
    if classes == 2:
        assert told["mcc"] == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_one_class_that_is_never_chosen():
    assert metrics.classification([0, 0, 0], [0, 1, 0], 2) == {"accuracy": pytest.approx(2 / 3), "f1": 0.0, "mcc": 0.0}


def test_regression():
    g = np.random.default_rng(0)
    a = g.normal(size=50).round(1)  # with ties
    b = a + g.normal(size=50)
    told = metrics.regression(a.tolist(), b.tolist())
    ranks = [scipy.stats.rankdata(v) for v in (a, b)]
    assert told["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert told["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert told["mse"] == pytest.approx(((a - b) ** 2).mean())
    assert metrics.regression([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == {
        "spearman": 0,
        "pearson": 0,
        "mse": pytest.approx(5 / 3),
    }


@pytest.mark.parametrize(
    ("tags", "want"),
    [
        ("O O", []),
        ("B-x I-x O", [("x", 0, 1)]),
        ("B-x B-x", [("x", 0, 0), ("x", 1, 1)]),
        ("I-x I-x O I-y", [("x", 0, 1), ("y", 3, 3)]),  # conlleval: an I- that continues nothing starts a span
        ("B-x I-y I-y", [("x", 0, 0), ("y", 1, 2)]),
        ("O B-x I-x B-y I-y", [("x", 1, 2), ("y", 3, 4)]),
        ("B-x O I-x", [("x", 0, 0), ("x", 2, 2)]),
        ("B-a-b I-a-b", [("a-b", 0, 1)]),
        ("NOUN NOUN O VERB", [("NOUN", 0, 0), ("NOUN", 1, 1), ("VERB", 3, 3)]),
        ("B-x NOUN I-x", [("x", 0, 0), ("NOUN", 1, 1), ("x", 2, 2)]),
        ("", []),
    ],
)
def test_spans(tags, want):
    assert metrics.spans(tags.split()) == set(want)


def test_entities():
    wanted = ["B-x I-x O B-y", "O O", "B-x O O", "I-y I-y B-y"]
    predicted = ["B-x I-x O B-x", "O B-x", "B-x I-x O", "B-y I-y I-y"]
    # found: x01 (right), x3; x1; x01; y02 = 5; there: x01, y3; x0; y01, y2 = 5; one right
    told = metrics.entities([p.split() for p in predicted], [w.split() for w in wanted])
    assert told == {"f1": 0.2, "precision": 0.2, "recall": 0.2, "accuracy": pytest.approx((3 + 1 + 2 + 1) / 12)}
    told = metrics.entities([["O", "O"]], [["B-x", "O"]])
    assert told == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 0.5}
    told = metrics.entities([["B-x", "B-y", "O"]], [["B-x", "O", "O"]])
    assert told["precision"] == 0.5 and told["recall"] == 1 and told["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("The  Denver Broncos!", "denver broncos"),
        ("an apple, a pear", "apple pear"),
        ("Theatre and anthem", "theatre and anthem"),
        ("U.S.-led", "usled"),
        ("a", ""),
    ],
)
def test_normalised(answer, want):
    assert metrics.normalised(answer) == want


def test_answers():
    predicted = ["the cat sat", "Dogs", "", "a b c"]
    wanted = [["cat sat down", "cat"], ["dogs.", "cats"], ["x"], ["b b c d"]]
    # the cat sat / cat sat down: 2 of 2 and 3 words; / cat: 1 of 2 and 1. "a b c" is "b c": 2 of 2 and 4
    told = metrics.answers(predicted, wanted)
    assert told["exact_match"] == 0.25
    assert told["f1"] == pytest.approx((4 / 5 + 1 + 0 + 4 / 6) / 4)


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("longest", [1, 3, 30])
def test_best_span(tokens, longest):
    for seed in range(20):
        logits = torch.randn(2, tokens, generator=torch.Generator().manual_seed(seed))
        spans = [(s, e) for s in range(tokens) for e in range(s, min(tokens, s + longest))]
        want = max(spans, key=lambda span: float(logits[0, span[0]] + logits[1, span[1]]))
        value, *span = metrics.best_span(logits, longest)
        assert tuple(span) == want and value == pytest.approx(float(logits[0, want[0]] + logits[1, want[1]]))


@pytest.mark.parametrize("shape", [(5,), (7, 5)])
def test_agreement(shape):
    have, want = torch.randn(2, *shape)
    told = metrics.agreement(have, want)
    for row, h, w in zip(told, have.reshape(-1, 5).double(), want.reshape(-1, 5).double(), strict=True):
        p, q = (t.exp() / t.exp().sum() for t in (w, h))
        assert row[0] == float(int(h.argmax()) == int(w.argmax()))
        assert float(row[1]) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    assert metrics.agreement(want, want).tolist() == [[1, 0]] * len(told)


def nearest(rows, count):
    rows = [[float(v) for v in row] for row in rows]

    def cosine(a, b):
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(x * x for x in b))

    others = [[j for j in range(len(rows)) if j != i] for i in range(len(rows))]
    return [set(sorted(js, key=lambda j: -cosine(rows[i], rows[j]))[:count]) for i, js in enumerate(others)]


@pytest.mark.parametrize("block", [1, 16, 1000])
def test_embeddings(monkeypatch, block):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    want = torch.randn(43, 6) * torch.rand(43, 1)
    have = want + 0.3 * torch.randn(43, 6)
    told = metrics.embeddings(have, want)
    pairs = list(zip(nearest(have, 10), nearest(want, 10), strict=True))
    assert told["neighbours"] == pytest.approx(sum(len(a & b) for a, b in pairs) / 430) and 0.3 < told["neighbours"] < 1
    cosines = np.array([float(a @ b / a.norm() / b.norm()) for a, b in zip(have.double(), want.double(), strict=True)])
    assert told["cosine"] == pytest.approx(cosines.mean()) and told["cosine_p5"] == pytest.approx(
        np.quantile(cosines, 0.05)
    )
    same = metrics.embeddings(3 * want, want)
    assert same["neighbours"] == 1 and same["cosine"] == pytest.approx(1)
    assert "neighbours" not in metrics.embeddings(have[:11], want[:11])


def test_what_is_not_installed(monkeypatch):
    for module in ("sklearn.metrics", "scipy.stats"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: metrics.classification([0], [0], 2), lambda: metrics.regression([0.0], [0.0])):
        with pytest.raises(ValueError, match=r"not installed: pip install hf-fff\[train\]"):
            call()
