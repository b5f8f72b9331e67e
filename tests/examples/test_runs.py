"""What experiments share: no run is made twice, by whoever; processes side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "experiments"))

import runs

HERE = Path(runs.__file__).parent


def test_lines_that_are_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    runs.append(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": ')  # whoever wrote this was killed
    runs.append(path, {"a": 2})
    assert runs.results(path) == [{"a": 1}, {"a": 2}] and runs.results(tmp_path / "none.jsonl") == []


def test_a_run_is_claimed_once(tmp_path):
    assert runs.claimed(None, ("mlp:72", 0)) and runs.claimed(None, ("mlp:72", 0))
    claims = tmp_path / "claims"
    assert runs.claimed(claims, ("mlp:72", None, 0)) and not runs.claimed(claims, ("mlp:72", None, 0))
    assert runs.claimed(claims, ("mlp:72", None, 1))


def test_make_runs(tmp_path, capsys):
    """Those that are not there, one after the other; one that fails is told and left."""
    path, keys = tmp_path / "results.jsonl", [{"kind": kind, "seed": 0} for kind in "abcd"]
    runs.append(path, {"kind": "b", "seed": 0, "score": 5})
    assert runs.claimed(tmp_path / "claims", ("c", 0))

    def run(key):
        if key["kind"] == "a":
            raise ValueError("what is wrong with a")
        return {"score": 7}

    assert runs.make_runs(keys, run, path, claims=tmp_path / "claims") == 1
    assert "what is wrong with a" in capsys.readouterr().err
    assert [row["kind"] for row in runs.results(path)] == ["b", "d"] and runs.results(path)[1]["score"] == 7
    assert runs.make_runs(keys, run, path, seconds=0) == 0 and len(runs.results(path)) == 2

    def too_late(key):
        raise runs.OutOfTime

    assert runs.make_runs(keys, too_late, path) == 0 and len(runs.results(path)) == 2


SCRIPT = """
import argparse, os, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from runs import make_runs
parser = argparse.ArgumentParser()
for name in ("--results", "--claims"):
    parser.add_argument(name, type=Path)
parser.add_argument("--seconds", type=float)
args = parser.parse_args()
keys = [dict(number=i) for i in range(20)]
run = lambda key: dict(gpu=os.environ.get("CUDA_VISIBLE_DEVICES"), there=1 / (key["number"] != {bad}))
sys.exit(make_runs(keys, run, args.results, claims=args.claims, seconds=args.seconds))
"""


@pytest.mark.parametrize(("gpus", "bad"), [((0, 1), -1), ((3,), -1), ((), 3)])
def test_side_by_side(tmp_path, monkeypatch, gpus, bad):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    script, path = tmp_path / "script.py", tmp_path / "results.jsonl"
    script.write_text(SCRIPT.format(here=str(HERE), bad=bad))
    command = [sys.executable, HERE / "side_by_side.py", "--gpus", *gpus, "--at-once", 2, "--seconds", 50]
    told = subprocess.run([*map(str, command), str(script), "--results", str(path)], capture_output=True, text=True)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["number"] for row in found) == [i for i in range(20) if i != bad]
    assert {row["gpu"] for row in found} <= ({str(gpu) for gpu in gpus} if gpus else {None})
    assert told.returncode == int(bad >= 0) and ("ZeroDivisionError" in told.stderr) == (bad >= 0)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (("--gpus", 1, 1, "--at-once", 2), "--gpus 1 1 must be different numbers"),
        (("--gpus", "--at-once", 0), "--at-once 0 leaves nothing"),
    ],
)
def test_side_by_side_of_nothing(options, wrong):
    command = [sys.executable, HERE / "side_by_side.py", *options, "script.py"]
    told = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert told.returncode == 2 and wrong in told.stderr


def test_what_stands_in_which_layer():
    assert runs.by_layer("mlp:72", 3) == {0: "mlp:72", 1: "mlp:72", 2: "mlp:72"}
    assert runs.by_layer("0=24x8,2-3=4x8+mlp:36", 6) == {
        0: "24x8",
        2: "4x8+mlp:36",
        3: "4x8+mlp:36",
    }  # 1, 4 and 5 keep their FFNs
    for wrong in ("3-2=8x8", "2-6=8x8"):
        with pytest.raises(ValueError, match="names no layers of 6"):
            runs.by_layer(wrong, 6)
