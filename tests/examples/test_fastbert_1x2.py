"""The experiment's results: appended whole, never measured twice, and reported as they are."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "experiments"))

import fastbert_1x2 as experiment
from runs import append, results

SCORES = {"dense": 0.9, "1x2": 0.8, "none": 0.7}


def row(fff, seed=0, quick=False, task="sst2"):
    metrics = {"accuracy": SCORES[fff] + 0.02 * seed, "f1": 0.5, "spearman": 0.5}
    told = {
        "scores": metrics,
        "calibration_steps": 1000,
        "seconds": 10.0,
        "device": "cpu",
        "torch": "2",
        "bf16": False,
        "graphs": False,
    }
    return {"model": "m", "task": task, "fff": fff, "seed": seed, "limit": 64, "quick": quick} | told


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["fastbert_1x2.py", *map(str, words)])
    experiment.main()


def test_what_is_there_is_left(path, monkeypatch, tmp_path):
    asked = []

    def run(args, task, fff, seed):
        asked.append((task, fff, seed))
        return {"scores": {"accuracy": 0.5}}

    monkeypatch.setattr(experiment, "run", run)
    append(path, row("dense", quick=True))
    append(path, row("none"))  # not quick: of another experiment
    path.write_bytes(path.read_bytes() + b'{"model": "m", "ta')  # whoever wrote this was killed
    options = (
        "--model",
        "m",
        "--data",
        tmp_path,
        "--results",
        path,
        "--tasks",
        "sst2",
        "--fff",
        "dense",
        "none",
        "--quick",
    )
    call(monkeypatch, *options)
    assert asked == [("sst2", "none", 0)]
    call(monkeypatch, *options)
    assert len(asked) == 1
    rows = results(path)
    assert [r["fff"] for r in rows] == ["dense", "none", "none"]
    assert len(path.read_text().splitlines()) == 4 and json.loads(path.read_text().splitlines()[-1]) == rows[-1]


def test_the_page(path, monkeypatch, tmp_path):
    append(path, row("dense", 2) | {"limit": 32})  # of another experiment
    for fff in SCORES:
        for seed in (0, 1):
            append(path, row(fff, seed))
    append(path, row("dense", quick=True, task="mrpc"))  # which is none of it
    page = tmp_path / "page.md"
    call(monkeypatch, "--results", path, "--report", "--page", page)
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert lines[0] == "| | neurons used | seeds | SST-2, accuracy | kept |"
    assert lines[2:] == [
        "| dense | all | 2 | 0.910 ± 0.014 | 1.00 |",
        "| 1x2 | 3 | 2 | 0.810 ± 0.014 | 0.50 |",
        "| none | 0 | 2 | 0.710 ± 0.014 | 0.00 |",
    ]
    assert (tmp_path / "page.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="no runs"):
        call(monkeypatch, "--results", tmp_path / "nothing.jsonl", "--report", "--page", page)
