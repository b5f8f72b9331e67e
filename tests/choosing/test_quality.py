"""What is kept, against scores that are computed here, and how sure that is."""

import math

import numpy as np
import pytest
import torch
from task_rows import rows_of
from tiny import HEADS, outputs, tiny_bert

from hf_fff.choosing import HeldOut, Quality
from hf_fff.tasks import Columns


def held_out(task, rows, tokenizer, model):
    return HeldOut(task, rows, tokenizer, model.config, max_length=48, columns=Columns())


def logits(model, item):
    """Of one row alone, so without padding."""
    inputs = {k: torch.tensor([item[k]]) for k in ("input_ids", "attention_mask", "token_type_ids")}
    return outputs(model, inputs)


def test_accuracy_and_its_groups(tokenizer):
    model = tiny_bert(HEADS["ForSequenceClassification"], num_labels=3)
    held = held_out("classification", rows_of("classification", 74), tokenizer, model)
    quality = held.measure(model, model)
    items = [held.all[i] for i in range(74)]
    right = [int(logits(model, item)["logits"].argmax()) == item["labels"] for item in items]
    assert quality.value == pytest.approx(np.mean(right)) and held.metric == "accuracy"
    # seven groups of ten and eleven rows; together they are all rows
    assert [len(group) for group in held.groups] == [11] * 4 + [10] * 3
    ids = sorted(group[i]["input_ids"] for group in held.groups for i in range(len(group)))
    assert ids == sorted(item["input_ids"] for item in items)
    sizes = [len(group) for group in held.groups]
    assert np.average(quality.groups, weights=sizes) == pytest.approx(quality.value)


def test_perplexity(tokenizer):
    """Of masked tokens the share is the dense model's perplexity by the other's."""
    dense, other = (tiny_bert(HEADS["ForMaskedLM"], seed=seed) for seed in (0, 1))
    held = held_out("mlm", rows_of("mlm", 12), tokenizer, dense)
    perplexity = {}
    for name, model in (("dense", dense), ("other", other)):
        loss, count = 0.0, 0
        for i in range(len(held.all)):
            item = held.all[i]
            log = logits(model, item)["logits"][0].double().log_softmax(-1)
            for place, label in enumerate(item["labels"]):
                if label != -100:
                    loss, count = loss - float(log[place, label]), count + 1
        perplexity[name] = math.exp(loss / count)
    kept = held.measure(other, dense).share(held.measure(dense, dense))
    assert kept == pytest.approx(perplexity["dense"] / perplexity["other"], rel=1e-4)
    assert held.metric == "exp(-loss)" and held.groups == []


@pytest.mark.parametrize("task", ["classification", "regression", "embeddings"])
def test_distances_of_outputs(tokenizer, task):
    """Of few rows all of them, of many some; no labels are looked at."""
    head, classes = {
        "classification": ("ForSequenceClassification", 3),
        "regression": ("ForSequenceClassification", 1),
    }.get(task, ("Model", 2))
    dense, other = (tiny_bert(HEADS[head], seed=seed, num_labels=classes) for seed in (0, 1))
    held = held_out(task, rows_of("mlm" if task == "embeddings" else task, 150), tokenizer, dense)
    assert len(held.all) == 150 and len(held.some) == 128
    told = []
    for i in range(128):
        have, want = (logits(model, held.some[i]) for model in (other, dense))
        if task == "embeddings":
            a, b = (out["last_hidden_state"][0].mean(0) for out in (have, want))
            told.append(1 - float(torch.cosine_similarity(a, b, dim=0)))
        elif task == "regression":
            told.append(float((have["logits"] - want["logits"]).square()))
        else:
            q, p = (out["logits"][0].double().log_softmax(-1) for out in (have, want))
            told.append(float((p.exp() * (p - q)).sum()))
    assert held.distance(other, dense) == pytest.approx(np.mean(told), rel=1e-4)
    assert held.distance(dense, dense) == pytest.approx(0, abs=1e-6)
    few = held_out(task, rows_of("mlm" if task == "embeddings" else task, 20), tokenizer, dense)
    assert few.some is few.all


def test_cosine(tokenizer):
    dense, other = tiny_bert(seed=0), tiny_bert(seed=1)
    held = held_out("embeddings", rows_of("mlm", 20), tokenizer, dense)
    means = [
        [logits(model, held.all[i])["last_hidden_state"][0].double().mean(0) for i in range(len(held.all))]
        for model in (dense, other)
    ]
    expected = np.mean([float(a @ b / a.norm() / b.norm()) for a, b in zip(*means, strict=True)])
    assert held.measure(dense, dense).value == pytest.approx(1)
    assert held.measure(other, dense).value == pytest.approx(expected, abs=1e-5)


def test_rank_correlation(tokenizer):
    stats = pytest.importorskip("scipy.stats")
    model = tiny_bert()
    rows = [r | {"score": (7 * n) % 5} for n, r in enumerate(rows_of("classification", 30))]
    for row in rows:
        del row["label"]
    held = held_out("similarity", rows, tokenizer, model)
    means = {}
    for row in rows:
        for name in ("sentence1", "sentence2"):
            ids = torch.tensor([tokenizer(row[name])["input_ids"]])
            means[row[name]] = outputs(model, {"input_ids": ids})["last_hidden_state"][0].double().mean(0)
    cosines = [torch.cosine_similarity(means[r["sentence1"]], means[r["sentence2"]], dim=0).item() for r in rows]
    expected = stats.spearmanr(cosines, [r["score"] for r in rows])[0]
    assert held.measure(model, model).value == pytest.approx(expected, abs=1e-3)


def test_the_error_is_that_of_the_difference():
    dense, other = Quality(0.8, (0.7, 0.8, 0.9, 0.8, 0.8)), Quality(0.6, (0.5, 0.6, 0.7, 0.6, 0.7))
    assert other.share(dense) == pytest.approx(0.75)
    # differences -.2, -.2, -.2, -.2, -.1: standard deviation .0447, by the root of 5: .02
    assert other.error(dense) == pytest.approx(0.02 / 0.8)
    assert dense.error(dense) == 0  # what both have in common is no error
    assert Quality(0.6, (0.5, 0.6, 0.7, 0.6)).error(Quality(0.8, (0.7, 0.8, 0.9, 0.8))) is None


def test_the_error_is_about_what_it_is():
    """Against the spread of the share over 400 draws of 2000 rows, of which the models are right on 80 and 72 %."""
    generator = np.random.default_rng(0)
    shares, errors = [], []
    for _ in range(400):
        a = generator.random(2000) < 0.8
        b = np.where(generator.random(2000) < 0.9, a, ~a)
        both = [Quality(float(x.mean()), tuple(x.reshape(20, 100).mean(1).tolist())) for x in (a, b)]
        shares.append(both[1].share(both[0]))
        errors.append(both[1].error(both[0]))
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.15)


def test_rows_without_labels(tokenizer):
    model = tiny_bert(HEADS["ForSequenceClassification"], num_labels=3)
    rows = [{k: r[k] for k in ("sentence1", "sentence2")} for r in rows_of("classification", 5)]
    with pytest.raises(ValueError, match="have no labels, by which classification is measured"):
        held_out("classification", rows, tokenizer, model)
