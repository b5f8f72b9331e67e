"""What is compared on logits, against the definition: NumPy in float64, row by row, without padding."""

import copy

import numpy as np
import pytest
import torch
from tiny import HEADS, tiny_bert

from hf_fff.training.objectives import OBJECTIVES, get_objective

HEAD = {
    "classification": ("ForSequenceClassification", {"num_labels": 3}),
    "regression": ("ForSequenceClassification", {"num_labels": 1}),
    "tokens": ("ForTokenClassification", {"num_labels": 5}),
    "qa": ("ForQuestionAnswering", {}),
    "mlm": ("ForMaskedLM", {}),
}
LENGTHS = (9, 4, 7, 9)
NONE = -100
LABELS = {
    "classification": {"labels": [2, NONE, 0, 1]},
    "regression": {"labels": [0.3, float("nan"), -2.5, float("nan")]},
    "tokens": {"labels": [[NONE, 1, NONE, 4, 0, NONE, NONE, 2, NONE], [NONE] * 4, [0] * 7, [NONE] * 9]},
    "qa": {"start_positions": [3, NONE, 0, 8], "end_positions": [5, NONE, NONE, 8]},
    "mlm": {"labels": [[NONE, 100, NONE, 7, NONE, NONE, NONE, 2, NONE], [NONE] * 4, [NONE] * 6 + [9], [8] * 9]},
}


def batch(task, labelled=True):
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    inputs = {"input_ids": torch.randint(5, 120, mask.shape, generator=generator) * mask, "attention_mask": mask}
    if not labelled:
        return inputs
    for name, rows in LABELS[task].items():
        rows = [row + [NONE] * (9 - len(row)) if isinstance(row, list) else row for row in rows]
        inputs[name] = torch.tensor(rows)
    return inputs


def pair(task):
    head, options = HEAD[task]
    return [tiny_bert(HEADS[head], seed=seed, **options) for seed in (1, 2)]


def logits_alone(model, inputs):
    """For each row and each output that holds logits, what the model makes of the visible tokens alone."""
    model, found = copy.deepcopy(model).double(), []
    for ids, length in zip(inputs["input_ids"], LENGTHS, strict=True):
        with torch.no_grad():
            out = model(input_ids=ids[:length].unsqueeze(0))
        found.append({name: value[0].numpy() for name, value in out.items()})
    return found


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def decisions(task, row, have, want):
    """The logits of each decision that counts, and of each the label or None."""
    labels = {name: values[row] for name, values in LABELS[task].items()}
    known = [label for label in labels.get("labels", []) if label != NONE] if task in ("tokens", "mlm") else []
    if task == "classification":
        return [(have["logits"], want["logits"], labels["labels"])]
    if task == "qa":
        return [(have[f"{n}_logits"], want[f"{n}_logits"], labels[f"{n}_positions"]) for n in ("start", "end")]
    every = zip(have["logits"], want["logits"], labels["labels"], strict=True)
    return [d for d in every if d[2] != NONE or (task == "tokens" and not known)]


def oracle(task, row, have, want, temperature):
    if task == "regression":
        label, h, w = LABELS[task]["labels"][row], have["logits"][0], want["logits"][0]
        return [(h - w) ** 2, 1, 0, 0 if np.isnan(label) else (h - label) ** 2, 0 if np.isnan(label) else 1]
    total = np.zeros(5)
    for h, w, label in decisions(task, row, have, want):
        p, q = log_softmax(w / temperature), log_softmax(h / temperature)
        total += (np.sum(np.exp(p) * (p - q)), 1, h.argmax() == w.argmax(), 0, 0)
        if label != NONE:
            total += (0, 0, 0, -log_softmax(h)[label], 1)
    return total


@pytest.mark.parametrize("task", OBJECTIVES)
def test_against_the_definition(task):
    student, teacher = pair(task)
    inputs = batch(task)
    given = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        have, want = student(**given), teacher(**given)
    objective = get_objective(task)
    columns = torch.cat([objective.distances(have, want, inputs, 1.7), objective.label_losses(have, inputs)], 1)
    alone = [logits_alone(model, inputs) for model in (student, teacher)]
    for row in range(len(LENGTHS)):
        expected = oracle(task, row, alone[0][row], alone[1][row], 1.7)
        np.testing.assert_allclose(columns[row], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("task", OBJECTIVES)
def test_nothing_is_left_of_a_distance_to_itself(task):
    model, inputs = pair(task)[0], batch(task)
    out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    distance, counted, agreeing = OBJECTIVES[task].distances(out, out, inputs, 2.0).unbind(1)
    assert distance.abs().max() < 1e-6
    assert torch.equal(agreeing, torch.zeros(4) if task == "regression" else counted)


@pytest.mark.parametrize("task", OBJECTIVES)
def test_gradients_are_finite_where_labels_are_missing(task):
    student, teacher = pair(task)
    inputs = batch(task)
    given = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    have, want = student(**given), teacher(**given)
    objective = OBJECTIVES[task]
    (
        objective.distances(have, want, inputs, 2.0)[:, 0].sum() + objective.label_losses(have, inputs)[:, 0].sum()
    ).backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("task", OBJECTIVES)
def test_batches_without_labels(task):
    model, inputs = pair(task)[0], batch(task, labelled=False)
    out, objective = model(**inputs), OBJECTIVES[task]
    assert torch.equal(objective.label_losses(out, inputs), torch.zeros(4, 2))
    if task == "mlm":
        with pytest.raises(ValueError, match="no labels, which tell what is masked"):
            objective.distances(out, out, inputs, 2.0)
        return
    counted = objective.distances(out, out, inputs, 2.0)[:, 1]
    assert counted.tolist() == {"tokens": [*LENGTHS], "qa": [2] * 4}.get(task, [1] * 4)


@pytest.mark.parametrize("task", OBJECTIVES)
def test_what_stands_for_no_label_is_none(task):
    objective, out = OBJECTIVES[task], pair(task)[0](**batch(task, labelled=False))
    rows = [objective.unlabelled(9) for _ in LENGTHS]
    labels = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    assert set(labels) == set(LABELS[task])
    assert torch.equal(objective.label_losses(out, batch(task, labelled=False) | labels), torch.zeros(4, 2))


def test_the_factor_of_the_loss():
    assert {task: o.factor(3.0) for task, o in OBJECTIVES.items()} == {
        t: 1 if t == "regression" else 9 for t in OBJECTIVES
    }


@pytest.mark.parametrize("task", ["embeddings", "similarity", "cobol"])
def test_tasks_without_logits(task):
    with pytest.raises(
        ValueError, match=f"'{task}' has no logits to distil .allowed: classification, regression, tokens"
    ):
        get_objective(task)


@pytest.mark.gpu
@pytest.mark.parametrize("task", OBJECTIVES)
def test_a_gpu_is_not_waited_for(task):
    student, teacher = (model.cuda() for model in pair(task))
    inputs = {name: values.cuda() for name, values in batch(task).items()}
    given = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    have, want = student(**given), teacher(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        OBJECTIVES[task].distances(have, want, inputs, 2.0)
        OBJECTIVES[task].label_losses(have, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
