"""The benchmark of training steps: what it times, and what it tells. No test here asserts a speed."""

import csv
import json

import pytest
import torch
from command import run

from hf_fff.bench import shapes, train

SMALL = {"size": "bert-nano", "rows": 2, "tokens": 8, "bf16": False, "device": "cpu", "seed": 0}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(shapes.SIZES, "bert-nano", shapes.Size(16, 32, 2, 2))


def test_systems():
    names = [s.name for s in train.systems(["1x3", "mlp:8", "2x2+mlp:4", "none"])]
    assert names == ["dense", "1x3", "1x3 + routing", "mlp:8", "2x2+mlp:4", "2x2+mlp:4 + routing", "none"]
    with pytest.raises(ValueError, match="8y8"):
        train.systems(["8y8"])


@pytest.mark.parametrize("system", train.systems(["2x2", "mlp:8"]), ids=lambda s: s.name)
def test_a_step_trains(system):
    training = train.Training(system, **SMALL)
    before = [p.clone() for p in training.model.parameters()]
    training.step()
    moved = [not torch.equal(p, b) for p, b in zip(training.model.parameters(), before, strict=True)]
    assert all(moved) and training.model.training and bool(training._loss.isfinite())
    assert (training.dead is None) == (system.name in ("dense", "mlp:8"))
    assert training.dead is None or 0 <= training.dead < 1


@pytest.mark.parametrize("kind", ["2x2", "2x2+mlp:4"])
@pytest.mark.parametrize("routing", [False, True])
def test_the_routing_gradient_is_on_or_off(kind, routing):
    model = train.Training(train.System(kind, routing), **SMALL).model
    gradients = {ffn.config.routing_gradient for ffn in model.modules() if hasattr(ffn, "watch")}
    assert len(gradients) == 1 and (gradients.pop() > 0) is routing


def test_a_loss_that_is_not_finite(monkeypatch):
    honest = train.convert_ffn_to_fff

    def broken(*args, **kwargs):
        model = honest(*args, **kwargs)
        with torch.no_grad():
            model.classifier.bias.fill_(float("nan"))
        return model

    monkeypatch.setattr(train, "convert_ffn_to_fff", broken)
    with pytest.raises(RuntimeError, match="the loss of 2x2 is not finite"):
        train.Training(train.System("2x2"), **SMALL)


def test_command(tmp_path):
    size = ("--size", "bert-tiny", "--fff", "mlp:8", "--batch", "2x8", "--rounds", 3, "--csv", tmp_path / "a.csv")
    ran = run("bench", "train", *size, "--json")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert [row["model"] for row in told["rows"]] == ["dense", "mlp:8"]
    assert told["rows"][0]["times_as_fast"] == 1 and all(row["peak_mb"] > 50 for row in told["rows"])
    assert told["command"] == "train" and {"cpu", "load", "torch", "date"} <= set(told)
    lines = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(lines) == 2 and all(float(line["milliseconds"]) > 0 for line in lines)


def test_command_prints_a_table():
    ran = run("bench", "train", "--size", "bert-nano", "--fff", "1x3", "--batch", "2x8", "--rounds", 3, "--no-memory")
    assert ran.exit_code == 0 and "1x3 + routing" in ran.stdout and "x dense" in ran.stdout
