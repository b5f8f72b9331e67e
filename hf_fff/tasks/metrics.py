"""Scores of lists of predictions; those that scikit-learn or scipy know are theirs. All are shares of 1."""

import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import optional

_NEIGHBOURS = 10
_BLOCK = 1024  # rows of a matrix of similarities that are in memory at once


def classification(predicted: Sequence[int], wanted: Sequence[int], classes: int) -> dict[str, float]:
    """Accuracy, F1 (of two classes that of class 1, else the mean of all that occur), Matthews' correlation."""
    sklearn = optional("sklearn.metrics", "scikit-learn")
    average = {"average": "binary"} if classes == 2 else {"average": "macro"}
    return {
        "accuracy": float(sklearn.accuracy_score(wanted, predicted)),
        "f1": float(sklearn.f1_score(wanted, predicted, zero_division=0.0, **average)),
        "mcc": float(sklearn.matthews_corrcoef(wanted, predicted)),
    }


def regression(predicted: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    """Correlations with what is all the same are 0: it tells nothing."""
    stats = optional("scipy.stats", "scipy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one is constant, which gives NaN
        found = {name: float(getattr(stats, f"{name}r")(predicted, wanted)[0]) for name in ("spearman", "pearson")}
    error = [(a - b) ** 2 for a, b in zip(predicted, wanted, strict=True)]
    return {**{name: 0.0 if value != value else value for name, value in found.items()}, "mse": sum(error) / len(error)}


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities as (type, first, last) from BIO tags, as conlleval reads them: an I- that continues nothing of its type starts
    one. A tag that has neither prefix, and is not "O", is an entity of one word."""
    found: set[tuple[str, int, int]] = set()
    open_type, start = None, 0
    for i, tag in enumerate([*tags, "O"]):
        kind = tag[2:] if tag.startswith(("B-", "I-")) else None
        if open_type is not None and not (tag.startswith("I-") and kind == open_type):
            found.add((open_type, start, i - 1))
            open_type = None
        if kind is None and tag != "O":
            found.add((tag, i, i))
        elif kind is not None and open_type is None:
            open_type, start = kind, i
    return found


def entities(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro F1 of entities, which count only if type and both ends are right; accuracy of words."""
    right = found = there = hits = words = 0
    for have, want in zip(predicted, wanted, strict=True):
        a, b = spans(have), spans(want)
        right, found, there = right + len(a & b), found + len(a), there + len(b)
        hits += sum(x == y for x, y in zip(have, want, strict=True))
        words += len(want)
    precision, recall = right / max(found, 1), right / max(there, 1)
    f1 = 2 * right / max(found + there, 1)
    return {"f1": f1, "precision": precision, "recall": recall, "accuracy": hits / max(words, 1)}


def best_span(logits: Tensor, longest: int) -> tuple[float, int, int]:
    """``[2, tokens]`` -> the best sum of a start's and an end's logit, and both of them."""
    sums = logits[0].unsqueeze(1) + logits[1]
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(longest - 1)
    sums = sums.masked_fill(~allowed, -torch.inf)
    best = int(sums.argmax())
    return float(sums.flatten()[best]), best // len(sums), best % len(sums)


def normalised(answer: str) -> str:
    """As SQuAD 1.1 compares answers: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answers(predicted: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD 1.1's exact match and F1 of words, each the best over the answers that are right."""

    def f1(a: str, b: str) -> float:
        x, y = normalised(a).split(), normalised(b).split()
        return 2 * (Counter(x) & Counter(y)).total() / max(len(x) + len(y), 1)

    pairs = list(zip(predicted, wanted, strict=True))
    exact = sum(any(normalised(a) == normalised(b) for b in right) for a, right in pairs)
    return {
        "f1": sum(max(f1(a, b) for b in right) for a, right in pairs) / len(pairs),
        "exact_match": exact / len(pairs),
    }


def agreement(have: Tensor, want: Tensor) -> Tensor:
    """Logits ``[classes]`` or ``[decisions, classes]`` of student and teacher -> ``[decisions, 2]``: whether the best is the
    same, and the divergence KL(teacher || student) in nats."""
    have, want = have.reshape(-1, have.shape[-1]), want.reshape(-1, want.shape[-1])
    kl = F.kl_div(have.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return torch.stack([(have.argmax(-1) == want.argmax(-1)).float(), kl], 1)


def embeddings(have: Tensor, want: Tensor) -> dict[str, float]:
    """``[texts, H]`` each -> cosines, and the share of nearest neighbours that are found."""
    cosine = F.cosine_similarity(have.double(), want.double(), dim=-1)
    result = {"cosine": float(cosine.mean()), "cosine_p5": float(cosine.quantile(0.05))}
    if len(have) > _NEIGHBOURS + 1:
        result["neighbours"] = neighbours_found(have, want, _NEIGHBOURS)
    return result


def neighbours_found(have: Tensor, want: Tensor, count: int) -> float:
    """Which share of the ``count`` nearest to each row in ``want`` are so in ``have``, by cosine, the row itself left out."""
    found = 0
    have, want = (F.normalize(t.double(), dim=-1) for t in (have, want))
    for start in range(0, len(have), _BLOCK):
        nearest = []
        for t in (have, want):
            block = t[start : start + _BLOCK] @ t.T
            rows = torch.arange(len(block))
            block[rows, rows + start] = -torch.inf
            nearest.append(block.topk(count).indices)
        found += int((nearest[0].unsqueeze(2) == nearest[1].unsqueeze(1)).sum())
    return found / (len(have) * count)
