"""The table of tasks: a teacher and its students for each seed, and what the page makes of them."""

import sys
import time
from pathlib import Path

import pytest
from task_rows import learnable, tiny_tokenizer
from tiny import tiny_bert

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "experiments"))

import quality_report
import tasks_table as experiment
from runs import OutOfTime, results


def call(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["tasks_table.py", *map(str, options)])
    experiment.main()


@pytest.mark.full
def test_a_teacher_and_its_students(tmp_path, monkeypatch):
    tiny_bert(initializer_range=0.1).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, seed in (("train", 0), ("dev", 1)):
        rows = learnable("classification", 60, seed)
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(experiment, "TASKS", {"sst2": ("classification", "train.tsv", "dev.tsv", [])})
    options = ["--model", tmp_path / "model", "--data", tmp_path, "--results", tmp_path / "results.jsonl"]
    options += ["--fff", "2x3", "none", "--seeds", 0, "--steps", 2, "--calibration-steps", 2, "--report-limit", 20]
    call(monkeypatch, *options, "--work", tmp_path / "work")
    found = results(tmp_path / "results.jsonl")
    assert [row["fff"] for row in found] == ["dense", "2x3", "none"]
    assert "accuracy" in found[0]["scores"] and all("agreement" in row["distilled"] for row in found[1:])
    assert all(row["name"] == "sst2" and row["report_limit"] == 20 for row in found)
    call(monkeypatch, *options, "--work", tmp_path / "work")
    assert len(results(tmp_path / "results.jsonl")) == 3
    options[options.index("--fff") + 1] = "1x3"
    call(
        monkeypatch, *options, "--work", tmp_path / "elsewhere"
    )  # where its teacher is not: it is made again, without another line
    assert [row["fff"] for row in results(tmp_path / "results.jsonl")] == ["dense", "2x3", "none", "1x3"]
    assert (tmp_path / "elsewhere" / "sst2-0.made").exists()


def test_the_order(tmp_path, monkeypatch):
    """Seed after seed, teachers a seed ahead of the students."""
    asked = []
    monkeypatch.setattr(experiment, "run", lambda args, name, fff, seed: asked.append((seed, fff)) or {"scores": {}})
    paths = ("--model", tmp_path, "--data", tmp_path, "--work", tmp_path / "work", "--results", tmp_path / "r.jsonl")
    call(monkeypatch, *paths, "--tasks", "sst2", "--fff", "8x8", "none", "--seeds", 0, 1)
    assert asked == [(0, "dense"), (1, "dense"), (0, "8x8"), (0, "none"), (1, "8x8"), (1, "none")]


def test_waiting_for_a_teacher(tmp_path):
    made, failed = tmp_path / "sst2-0.made", tmp_path / "sst2-0.failed"
    with pytest.raises(OutOfTime):
        experiment.wait_for(made, failed, True, time.monotonic() - 1)
    with pytest.raises(RuntimeError, match="there is no teacher sst2-0"):
        experiment.wait_for(made, failed, False, time.monotonic() + 60)
    failed.touch()
    with pytest.raises(RuntimeError, match="there is no teacher sst2-0"):
        experiment.wait_for(made, failed, True, time.monotonic() + 60)
    made.touch()
    experiment.wait_for(made, failed, True, time.monotonic() - 1)


def row(name, fff, seed, **scores):
    told = {
        "name": name,
        "fff": fff,
        "seed": seed,
        "limit": 100,
        "report_limit": 50,
        "steps": 600,
        "batch_size": 32,
        "device": "a GPU",
    }
    return told | {
        "calibration_steps": 400,
        "max_tokens": 400_000,
        "torch": "2",
        "scores" if fff == "dense" else "distilled": scores,
    }


def test_the_table():
    """Means and deviations over seeds; a share of the FFNs' contribution only where there is one beyond the noise."""
    rows = []
    for seed in (0, 1, 2):
        for fff, value in (("dense", 0.7), ("none", 0.5), ("8x8", 0.65)):
            more = {} if fff == "dense" else {"agreement": 0.9}
            rows.append(row("mnli", fff, seed, accuracy=value + 0.01 * seed, **more))
            rows.append(row("sst2", fff, seed, accuracy=0.9 + 0.01 * seed, **more))
            rows.append(row("mlm", fff, seed, loss=6 - 4 * (value + 0.01 * seed), **more))
    again = next(r for r in rows if (r["name"], r["fff"], r["seed"]) == ("sst2", "8x8", 1))
    again["calibrated"] = again["distilled"]  # whose training was undone
    rows.append(row("mnli", "8x8", 0, accuracy=0.1) | {"freeze": True})  # which is of another table
    text = quality_report.tasks(rows)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    same = " | 90.0 ± 0.0 % | 90.0 ± 0.0 % |"
    assert lines == [
        "| | dense | seeds | none | 8x8 | 8x8 recovered | none agreement | 8x8 agreement |",
        f"| masked words, loss | 3.160 ± 0.040 | 3 | 3.960 ± 0.040 | 3.360 ± 0.040 | 75 %{same}",
        f"| MNLI matched, accuracy | 71.0 ± 1.0 | 3 | 51.0 ± 1.0 | 66.0 ± 1.0 | 75 %{same}",
        f"| SST-2, accuracy | 91.0 ± 1.0 | 3 | 91.0 ± 1.0 | 91.0 ± 1.0 | -{same}",
    ]
    assert "each with a teacher of its own" in text and "71.8 % of the" in text
    assert "sst2 8x8 (1) (seed)" in text and "on 0 of the 0 tasks" in text  # there is no MLP here
    mlps = [row("mnli", "mlp:72", seed, accuracy=0.8 + 0.01 * seed, agreement=0.9) for seed in (0, 1, 2)]
    mlps += [row("sst2", "mlp:72", seed, accuracy=0.9 + 0.01 * seed, agreement=0.9) for seed in (0, 1, 2)]
    assert "mlp:72 is ahead of 8x8 on 1 of the 2 tasks, behind\non 0." in quality_report.tasks(rows + mlps)
    alone = quality_report.tasks([r for r in rows if not r["seed"]])  # of which nobody can tell
    assert "| MNLI matched, accuracy | 70.0 | 1 | 50.0 | 65.0 | - | 90.0 % | 90.0 % |" in alone
    one = [r for r in rows if r["fff"] != "dense" or not r["seed"]]  # students of one teacher
    assert "| MNLI matched, accuracy | 70.0 | 3 | 51.0 ± 1.0 | 66.0 ± 1.0 | 79 %" in quality_report.tasks(one)
    assert "all with the same teacher" in quality_report.tasks(one)
