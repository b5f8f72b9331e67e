"""The benchmark of one layer: it checks before it times. No test here asserts a speed."""

import json

import pytest
import torch

from hf_fff import FFFConfig, ops
from hf_fff.bench import layer


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
