"""Finished cells of a measurement in a file."""

import json

import pytest
import torch

from hf_fff import FFFConfig
from hf_fff.bench import layer
from hf_fff.bench.kept import Kept
from hf_fff.bench.load import Load, Patience


def measured(values, patience):
    def measure():
        patience.loads.append(Load(0.5, 0.7, 0.1))
        return {"value": values.pop(0)}

    return measure


def test_cells_are_found_again(tmp_path):
    path, what, patience = tmp_path / "cells", {"rounds": 3}, Patience()
    first = Kept(path, what)
    assert first.cell(["a", 1], measured([10], patience), patience) == {"value": 10}
    with path.open("a") as file:
        file.write('{"cell": ["b", 1], "fou')  # interrupted in the middle of a line
    patience = Patience()
    begun = patience.begun
    again = Kept(path, what)
    assert again.cell(["a", 1], lambda: pytest.fail("measured again"), patience) == {"value": 10}
    assert patience.loads == [Load(0.5, 0.7, 0.1)] and patience.begun <= begun
    assert again.cell(["b", 1], measured([20], patience), patience) == {"value": 20}
    assert [json.loads(line).get("cell") for line in path.read_text().splitlines()] == [None, ["a", 1], ["b", 1]]
    again.done()
    assert not path.exists()


def test_another_measurement_begins_anew(tmp_path):
    path, patience = tmp_path / "cells", Patience()
    Kept(path, {"rounds": 3}).cell(["a"], measured([10], patience), patience)
    other = Kept(path, {"rounds": 4})
    assert other.cell(["a"], measured([30], patience), patience) == {"value": 30}
    assert len(path.read_text().splitlines()) == 2


def test_a_file_of_something_else_is_left_as_it_is(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text("# Notes\n")
    with pytest.raises(ValueError, match="notes.md holds something else than cells of a measurement"):
        Kept(path, {"rounds": 3})
    assert path.read_text() == "# Notes\n" and [p.name for p in tmp_path.iterdir()] == ["notes.md"]


def test_without_a_file():
    kept, patience = Kept(), Patience()
    assert kept.cell(["a"], measured([1], patience), patience) == {"value": 1}
    assert kept.cell(["a"], measured([2], patience), patience) == {"value": 2}
    kept.done()


def test_layers_go_on_where_they_were_interrupted(tmp_path, monkeypatch):
    timed = []

    def interleaved(candidates, **_):
        timed.append(len(candidates))
        if len(timed) == 2:
            raise KeyboardInterrupt
        return dict.fromkeys(candidates, 1e-6)

    monkeypatch.setattr(layer, "interleaved", interleaved)
    monkeypatch.setattr(layer, "turns", lambda candidates, **_: dict.fromkeys(candidates, 1e-6))
    torch.manual_seed(0)
    layers = [layer.random_layer(FFFConfig(1, 2), 8)]

    def bench():
        kept = Kept(tmp_path / "cells", {})
        return layer.bench_layers(layers, [1, 3], threads=[1], backward=False, rounds=3, kept=kept)

    with pytest.raises(KeyboardInterrupt):  # the second call of a cell is of the empty backward pass
        bench()
    timed[:] = [0, 0, 0]
    whole = bench()
    assert [row.tokens for row in whole] == [1, 3]
    count = len(timed)
    assert bench() == whole and len(timed) == count
