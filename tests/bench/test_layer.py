"""The benchmark of one layer: it checks before it times. No test here asserts a speed."""

import json

import pytest
import torch

from hf_fff import FFFConfig, ops
from hf_fff.bench import layer
from hf_fff.ops import loader


def test_rows():
    rows = layer.bench_layer(FFFConfig(2, 3), 16, [1, 6], rounds=3)
    assert [row.tokens for row in rows] == [1, 6]
    always = ("dense", "fff", "backward_masked", "backward_fff", "backward_routing")
    assert all(getattr(row, name) > 0 for row in rows for name in always)
    loops = [value for row in rows for value in (row.dense_loop, row.fff_loop)]
    assert all(v > 0 for v in loops) if ops.backend() == "native" else not any(loops)
    assert json.loads(json.dumps(layer.as_records(rows)))[1]["tokens"] == 6


def test_backward_is_optional():
    (row,) = layer.bench_layer(FFFConfig(1, 2), 8, [3], rounds=3, backward=False)
    assert row.backward_masked is None and row.backward_fff is None and row.dense > 0


def spoiled(change):
    honest = ops.fff_train

    def train(*args, **kwargs):
        y, path, logits = honest(*args, **kwargs)
        return change(y, path, logits)

    return train


@pytest.mark.parametrize(
    "change",
    [
        lambda y, path, logits: (y + 1e-2, path, logits),
        lambda y, path, logits: (y, torch.cat([path[..., :1], 3 - path[..., 1:2], path[..., 2:]], -1), logits),
    ],
    ids=["output", "path"],
)
def test_a_wrong_output_is_not_timed(monkeypatch, change):
    monkeypatch.setattr(ops, "fff_train", spoiled(change))
    monkeypatch.setattr(layer, "interleaved", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="output is wrong: nothing was timed"):
        layer.bench_layer(FFFConfig(2, 2), 16, [8], rounds=3)


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    honest, calls = ops.fff_train, []

    def train(*args):
        y, path, logits = honest(*args)
        calls.append(args)
        return y, path, logits + (len(calls) > 1)  # the first call is that of the check of the output

    monkeypatch.setattr(ops, "fff_train", train)
    monkeypatch.setattr(layer, "interleaved", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="the gradient of x is wrong: nothing was timed"):
        layer.bench_layer(FFFConfig(2, 2), 16, [8], rounds=3)


def test_without_the_library_of_loops(monkeypatch):
    """The rest is measured all the same."""
    load = loader.load
    monkeypatch.setattr(loader, "load", lambda name="cpu": loader.Status(name) if name == "bench" else load(name))
    (row,) = layer.bench_layer(FFFConfig(1, 2), 8, [3], rounds=3, backward=False)
    assert row.dense_loop is None and row.fff_loop is None and row.dense > 0 and row.fff > 0


@pytest.mark.parametrize("shape", ["1x0", "1x5", "7x2"])
def test_other_shapes_and_many_tokens(monkeypatch, shape):
    """That the checks accept what is right; nothing is timed."""
    times = {"dense": 1e-3, "fff": 2e-3, "masked": 3e-3, "routing": 4e-3}
    monkeypatch.setattr(layer, "interleaved", lambda candidates, **_: {name: times[name] for name in candidates})
    monkeypatch.setattr(ops, "backend", lambda device="cpu": "torch")
    (row,) = layer.bench_layer(FFFConfig.from_shorthand(shape), 33, [2_000])
    assert row == layer.Row(2_000, 1e3, 2e3, None, None, 3e3, 2e3, 4e3)
