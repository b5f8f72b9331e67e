"""The frontier of quality and time: is a tree ahead only where it is faster than an MLP that keeps as much?"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "experiments"))

import frontier

COSINES = {"none": 0.90, "mlp:72": 0.92, "mlp:224": 0.94, "1x11": 0.91, "8x8": 0.93, "32x6": 0.95}


def timed(**trees):
    took = {"dense": 100.0, "none": 40.0, "mlp:72": 50.0, "mlp:224": 60.0}
    return frontier.Timed("an engine", "a machine", "1x16", took | trees)


@pytest.mark.parametrize(
    ("tree", "microseconds", "cell", "ratio"),
    [
        ("1x11", 40.0, "**1.12x (mlp:72 1.25x)**", 45 / 40),  # an MLP between none and mlp:72 would take 45
        ("1x11", 44.0, "1.02x (mlp:72 1.14x)", 45 / 44),  # within what times are known to
        ("1x11", 47.0, "0.96x (mlp:72 1.06x)", 45 / 47),  # faster than mlp:72, which is better, too
        ("8x8", 61.0, "0.90x (mlp:224 0.98x)", 55 / 61),
        ("32x6", 80.0, "dense 1.25x", None),
    ],
)
def test_verdict(tree, microseconds, cell, ratio):
    found = frontier.verdict(tree, timed(**{tree: microseconds}), COSINES)
    assert found[0] == cell and found[1] == pytest.approx(ratio)


def test_what_noise_makes_counts_for_nothing():
    """None was measured at 48, and a tree, which has more to do, at 42."""
    noisy = frontier.Timed("an engine", "a machine", "1x16", timed(**{"1x11": 42.0}).took | {"none": 48.0})
    assert frontier.noise(noisy) == pytest.approx(48 / 42 - 1) and frontier.noise(timed()) == frontier.LEVEL
    cell, ratio = frontier.verdict("1x11", timed(**{"1x11": 42.0}), COSINES, level=0.08)
    assert cell == "1.07x (mlp:72 1.19x)" and ratio == pytest.approx(45 / 42)


def run(kind, steps, cosine, loss, **fields):
    usual = {"run": "general", "fff": kind, "steps": steps, "batch_size": 192, "calibration_steps": 1000}
    usual |= {"learning_rate": 4e-4, "fff_learning_rate": 3e-4, "eval_loss": loss}
    return {**usual, **fields, "distilled": {"unseen_short": {"cosine": cosine}}}


def test_qualities_are_of_one_recipe():
    """The longest by which enough was trained; of several ways that of the least loss on held-out training text."""
    rows = [run(kind, 3000, 0.9, 1.0) for kind in ("none", "mlp:72", "mlp:224", "8x8", "1x11")]
    rows += [run("8x8", 3000, 0.95, 1.1, plain_steps=True), run("8x8", 3000, 0.92, 1.0)]
    rows += [run("8x8", 3000, 0.99, 0.5, routing_gradient=0.0)]  # an experiment, which is no way to train one
    (only,) = frontier.trainings([*rows, run("8x8", 9000, 0.99, 0.5, run="long")])
    assert only.title == "After 3000 steps of 192 texts (seeds: 1 to 2)"
    assert only.kept["8x8"] == [0.9, 0.92] and only.kept["none"] == [0.9] and only.means["8x8"] == 0.91
    rows += [run(k, 9000, 0.97, 0.5, run="long", crop=0.5) for k in ("none", "mlp:72", "mlp:224", "8x8")]
    (only,) = frontier.trainings(rows)
    assert only.title == "After 9000 steps of 192 texts, 50 % of the batches cropped (seeds: 1)"
    assert sorted(only.kept) == ["8x8", "mlp:224", "mlp:72", "none"]


def test_shorter_trainings_and_calibration_alone():
    kinds = ("none", "mlp:72", "mlp:224", "8x8", "4x8+mlp:36")
    before = {"calibrated": {"unseen_short": {"cosine": 0.8}}, "calibration_batch": 8192, "seed": 0}
    rows = [run(kind, 3000, 0.95, 1.0) for kind in kinds]
    rows += [run(kind, 1000, 0.9, 1.0, run="tried", muon=True, **before) for kind in kinds]
    rows += [run("8x8", 1000, 0.91, 0.9, run="tried", muon=True, **before)]  # of the same calibrated model
    rows += [run("1x11", 3000, 0.95, 1.0, **before | {"calibration_batch": 4096})]
    titles = [
        "After 3000 steps of 192 texts (seeds: 1)",
        "After 1000 steps of 192 texts, Muon for attention (seeds: 1 to 2)",
    ]
    titles += ["Calibrated alone, 1000 steps of 8192 tokens a layer (seeds: 1)"]
    every = frontier.trainings(rows)
    assert [training.title for training in every] == titles
    assert every[2].kept == {kind: [0.8] for kind in kinds} and every[1].kept["8x8"] == [0.9, 0.91]
    text = frontier.table([timed(**{"8x8": 55.0, "4x8+mlp:36": 52.0})], every, {"8x8": 0.5})
    assert "| 8x8 | 55.0 (1.82x) | 0.950 | 0.905 ± 0.007 | 0.800 | 50 % |" in text


def test_trees_ahead_are_counted_engine_by_engine():
    training = frontier.Training("After all", {kind: [kept] for kind, kept in COSINES.items()})
    slow = {("an engine", "a machine"): [timed(**{"8x8": 44.0, "1x11": 50.0, "32x6": 70.0})]}
    every = frontier.judged(slow | {("another", "a machine"): [timed(**{"8x8": 56.0})]}, training)
    assert [(j.place, j.tree, j.compared) for j in every] == [
        ("a machine, an engine", "1x11", 1),
        ("a machine, an engine", "8x8", 1),
        ("a machine, an engine", "32x6", 0),  # no MLP keeps as much
        ("a machine, another", "8x8", 1),
    ]
    assert [j.ahead for j in every] == [{}, {"1x16": pytest.approx(55 / 44)}, {}, {}]
    told = frontier.summary(training, every)
    assert "| a machine, an engine | 1 | 2 | 8x8 (1x16 1.25x) |" in told
    assert "| a machine, another | 0 | 1 | nowhere |" in told
    cells = frontier.cell_by_cell(training, every)
    assert "| a machine, an engine | 8x8 | **1.25x (mlp:224 1.36x)** |" in cells
