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


def test_the_median_is_returned():
    taken = iter([50.0, 1.0, 5.0, 1.0, 9.0])  # the first two are no turns
    assert timing.turns({"a": lambda calls: next(taken)}, rounds=3, seconds=1.0) == {"a": 5.0}


def test_a_call_is_timed_from_outside(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 11.0, 0.0, *(t for _ in range(3) for t in (20.0, 26.0))])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.interleaved({"a": lambda: None}, rounds=3, seconds=2.0) == {"a": 3.0}  # two calls a turn


def test_what_comes_before_a_turn_is_off_the_clock():
    told = []
    timing.turns(
        {k: lambda calls, k=k: told.append(k) or 1.0 for k in "ab"}, rounds=4, before=lambda k: told.append(k.upper())
    )
    assert "".join(told) == "AaaBbb" + 4 * "AaBb"


def test_the_limit_ends_the_rounds_but_not_before_three(monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(seconds))  # a second passes at each look
    calls = []
    timing.turns({"a": lambda n: calls.append(n) or 1.0}, rounds=20, limit=0.0)
    assert len(calls) == 2 + timing.FEWEST
    calls.clear()
    timing.turns({"a": lambda n: calls.append(n) or 1.0}, rounds=20, limit=3.5)
    assert len(calls) == 2 + timing.FEWEST + 3  # looked at before the fourth and each after it: 1, 2, 3, 4 s


def test_summary_and_report():
    facts = machine.summary()
    assert facts["torch"] == torch.__version__ and facts["hf_fff"] == __version__
    assert facts["cpu"] == machine.cpu_name() != "" and facts["backend"] in ("native", "torch")
    report = json.loads(json.dumps(machine.report()))
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert set(report["packages"]) >= {"torch", "transformers", "safetensors"}
    assert report["packages"]["kernels"]  # a version, or that it is not installed
