"""Interleaved timing, and what stands beside a figure."""

import json

import torch

from hf_fff import __version__
from hf_fff.bench import machine, timing


def test_candidates_take_turns():
    calls = []
    times = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=5, seconds=1e-6)
    assert set(times) == {"a", "b"} and all(t > 0 for t in times.values())
    # two calls each to find out how often, then turns
    turns = [name for i, name in enumerate(calls[4:]) if i == 0 or name != calls[4:][i - 1]]
    assert turns == ["a", "b"] * 5


def test_the_median_is_returned(monkeypatch):
    clock = iter([0.0, 1.0, *[t for i, d in enumerate((5.0, 1.0, 9.0)) for t in (10.0 * i, 10.0 * i + d)]])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.interleaved({"a": lambda: None}, rounds=3, seconds=1.0) == {"a": 5.0}


def test_summary_and_report():
    facts = machine.summary()
    assert facts["torch"] == torch.__version__ and facts["hf_fff"] == __version__
    assert facts["cpu"] == machine.cpu_name() != "" and facts["backend"] in ("native", "torch")
    report = json.loads(json.dumps(machine.report()))
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert set(report["packages"]) >= {"torch", "transformers", "safetensors"}
    assert report["packages"]["kernels"]  # a version, or that it is not installed
