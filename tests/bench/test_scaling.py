"""The benchmark over sizes: which trees, what memory permits, what is skipped. No test here asserts a speed."""

import pytest
import torch

from hf_fff import FFFConfig
from hf_fff.bench import machine, scaling, shapes


@pytest.mark.parametrize("name", scaling.NAMES)
def test_the_deepest_tree_with_at_most_as_many_neurons(name):
    _, inner, config = scaling.dimensions(name)
    assert config.n_trees == 1 and config.nodes <= inner < FFFConfig(1, config.depth + 1).nodes


def test_known_sizes():
    assert scaling.dimensions("bert-tiny") == (128, 512, FFFConfig(1, 8))
    assert scaling.dimensions("bert-base") == (768, 3072, FFFConfig(1, 10))
    assert scaling.dimensions("paper") == (768, 4095, FFFConfig(1, 11))
    assert scaling.dimensions("gpt-3") == (12288, 49152, FFFConfig(1, 14))
    assert scaling.bytes_needed("bert-tiny") == 8 * 128 * (512 + 511)
    with pytest.raises(ValueError, match=r"size 'gpt-5' is not known \(allowed: paper, bert-tiny"):
        scaling.dimensions("gpt-5")


def test_what_a_row_says():
    row = scaling.Row(
        "paper", 768, 4095, "1x11", 1, 1, dense=1000.0, measured=4.0, visited=12, bandwidth=25.0, others=None
    )
    assert row.speedup == 250 and row.theory == 341.25
    reading = (12 * 2 * 768 * 4 + 2 * 768 * 4) / 25e9  # rows of both matrices, the input, the output
    assert row.roofline == pytest.approx(1000e-6 / reading)
    assert row.record()["theory"] == row.theory and row.record()["tokens"] == 1


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SIZES, "tiny", shapes.Size(8, 20, 1, 2))
    monkeypatch.setattr(scaling, "BUFFERS", (1,))


def test_rows(tiny):
    found = scaling.bench_scaling(["tiny"], [1, 5], threads=[1], rounds=3)
    assert [(r.name, r.fff, r.threads, r.tokens) for r in found.rows] == [("tiny", "1x3", 1, 1), ("tiny", "1x3", 1, 5)]
    assert found.rows[0].visited == 4 and all(r.dense > 0 and r.measured > 0 and r.bandwidth > 0 for r in found.rows)
    assert [(b["mb"], b["threads"]) for b in found.bandwidth] == [(1, 1)] and found.skipped == {}


def test_calls_from_python_stand_in_for_the_loops(tiny, monkeypatch):
    monkeypatch.setattr(scaling, "time_loops", lambda *_: {})
    (row,) = scaling.bench_scaling(["tiny"], [2], threads=[1], rounds=3).rows
    assert row.dense > 0 and row.measured > 0


def test_what_memory_does_not_hold_is_skipped(tiny, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 10_000_000)
    found = scaling.bench_scaling(["tiny", "bert-large"], [1], threads=[1], rounds=3)
    assert {row.name for row in found.rows} == {"tiny"}
    assert found.skipped == {"bert-large": "needs 0.1 GB, and 0.0 GB are free"}


def test_bandwidth_is_bytes_over_the_faster_way(monkeypatch):
    def times(calls, **_):
        return {key: 2e-6 if key[1][0] == "sum" else 1e-6 for key in calls}

    monkeypatch.setattr(scaling, "interleaved", times)
    tensors = [torch.zeros(10, 100), torch.zeros(10, 100)]
    assert scaling.read_bandwidth({"a": tensors}, [1, 2]) == {
        (1, "a"): pytest.approx(8.0),
        (2, "a"): pytest.approx(8.0),
    }
