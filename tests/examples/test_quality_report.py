"""The page of qualities: what is a seed of what, what is recovered of what."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "experiments"))

import pytest
import quality_report as report


def scores(cosine, **fields):
    one = {"cosine": cosine, "cosine_p5": cosine - 0.1, "neighbours": 0.7}
    return {"unseen_short": one, "unseen_long": one, **fields}


def long_run(fff, seed, cosine, **fields):
    usual = {"run": "long", "fff": fff, "seed": seed, "steps": 9000, "batch_size": 384, "crop": 0.5, "texts": 1_000_000}
    usual |= {"learning_rate": 5e-4, "fff_learning_rate": 1e-3 if fff == "mlp:72" else 3e-4, "eval_cosine": 0.95}
    usual |= {"calibration_seconds": 60.0, "distillation_seconds": 240.0, "device": "a GPU"}
    return {**usual, **fields, "distilled": scores(cosine)}


def cells(table, name):
    return [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith(f"| {name} |")]


def test_longer_trainings():
    """Seeds of one recipe are told together, other rates are not; recovered is against no FFN of the same steps and texts."""
    rows = [long_run("none", 0, 0.90), long_run("8x8", 0, 0.95), long_run("8x8", 1, 0.952), long_run("mlp:72", 0, 0.94)]
    rows.append(long_run("8x8", 0, 0.93, fff_learning_rate=1e-4))
    rows.append(long_run("none", 0, 0.80, steps=4000))
    table = report.longer(rows)
    alone, both = sorted(cells(table, "8x8"), key=lambda row: row[5])
    assert (alone[5], both[5]) == ("1", "2") and both[6] == "0.951 ± 0.001" and both[7] == "51 %" and alone[7] == "30 %"
    assert both[-1] == "0.951, reached" and alone[-1] == "0.951, missed" and both[-2] == "5.0 ± 0.0"
    assert cells(table, "mlp:72")[0][7] == "40 %" and "one a GPU" in table
    assert report.longer([]) == ""


def test_the_model_of_the_command():
    row = {
        "command": "hf-fff distill MODEL OUT",
        "device": "a GPU",
        "whole_seconds": 90.0,
        "fff": "8x8",
        "cosine": 0.94,
    }
    text = report.by_command([{**row, "distilled": scores(0.951)}])
    assert "\nhf-fff distill MODEL OUT\n" in text and "In 1.5 minutes of one a GPU" in text
    assert cells(text, "8x8")[0][1:] == ["0.951", "0.851", "0.700", "0.951", "0.700", "0.940", "0.951, reached"]
    row |= {"fff": "2x3", "distilled": {"unseen_short": {"cosine": 0.5, "neighbours": 0.4}}}
    assert cells(report.by_command([row]), "2x3")[0][1:] == ["0.500", "", "0.400", "", "", "0.940", ""]


def test_packed_rows():
    """Of the longest runs alone; what rounding takes off, of each run by itself."""

    def run(steps, rows, plain, int8):
        packed = {"distilled_int8_rows": scores(int8), "distilled_bf16_rows": scores(plain)}
        return {
            "run": "rows", "fff": "8x8", "steps": steps, "batch_size": 192, "rows": rows, "distilled": scores(plain), **packed
        }  # fmt: skip

    rows = [
        run(3000, None, 0.93, 0.92),
        run(3000, None, 0.95, 0.93),
        run(3000, "int8", 0.94, 0.939),
        run(9, None, 0.1, 0.0),
    ]
    plain, trained = cells(report.packed(rows), "8x8")
    assert plain[1:7] == ["float32", "2", "0.9400 ± 0.0141", "0.9250 ± 0.0071", "0.9400 ± 0.0141", "0.0150 ± 0.0071"]
    assert trained[1:7] == ["int8", "1", "0.9400", "0.9390", "0.9400", "0.0010"] and report.packed([]) == ""


def test_masked_words():
    """Students belong to the teacher of as many steps on the same machine; the one that has most of them comes first."""

    def row(fff, seed, loss, device="a GPU"):
        told = {"name": "mlm", "fff": fff, "seed": seed, "teacher_steps": 9, "teacher_batch_size": 4, "device": device}
        found = {"loss": loss, "accuracy": 0.3, "agreement": 0.6}
        if fff == "dense":
            return told | {"scores": found}
        return told | {"steps": 5, "batch_size": 2, "learning_rate": 1e-3, "calibrated": found, "distilled": found}

    rows = [row("dense", 0, 3.0, "old"), row("none", 0, 5.0, "old"), row("8x8", 0, 4.0, "old")]
    rows += [row("dense", 0, 3.0), row("none", 0, 4.0), row("none", 1, 4.2), row("8x8", 0, 3.3), row("8x8", 1, 3.4)]
    first, second = cells(report.masked_words(rows), "8x8")
    assert first[2] == "2" and first[5:7] == ["68 ± 6 %", "70 %, missed"] and second[5] == "50 %"
    assert report.masked_words_kept(rows)["8x8"] == pytest.approx(0.75 / 1.1)
