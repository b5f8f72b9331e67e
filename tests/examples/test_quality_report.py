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
    usual |= {
        "learning_rate": 5e-4,
        "fff_learning_rate": 1e-3 if fff == "mlp:72" else 3e-4,
        "eval_cosine": 0.95,
        "eval_loss": 0.6,
    }
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
    alone, both = sorted(cells(table, "8x8"), key=lambda row: row[6])
    assert (alone[6], both[6]) == ("1", "2") and both[7] == "0.951 ± 0.001" and both[8] == "51 %" and alone[8] == "30 %"
    assert both[-1] == "0.951, reached" and alone[-1] == "0.951, missed" and both[-2] == "5.0 ± 0.0"
    assert cells(table, "mlp:72")[0][8] == "40 %" and both[2] == "Adam, 0.0005" and report.longer([]) == ""
    rows.append(long_run("8x8", 0, 0.96, muon=True))  # of which there is no floor
    assert ["Muon, 0.0005", ""] in [[row[2], row[8]] for row in cells(report.longer(rows), "8x8")]


def test_what_the_command_made_is_a_run():
    """By the options of the command; the rate of trees as the package has it."""
    command = (
        "hf-fff distill MODEL OUT --text a.txt --fff 8x8 --steps 80 --batch-size 384 --learning-rate 1e-3 --crop 0.5"
    )
    row = {
        "command": f"{command} --calibration-steps 9 --muon",
        "fff": "8x8",
        "steps": 80,
        "device": "a GPU",
        "torch": "2",
    }
    row |= {"rows": 90, "held_out": 10, "whole_seconds": 100.0, "seconds": 70.0, "loss": 0.6, "cosine": 0.95}
    found = report.as_a_run({**row, "distilled": scores(0.951)})
    want = {"run": "long", "batch_size": 384, "crop": 0.5, "muon": True, "texts": 100, "calibration_seconds": 30.0}
    assert {name: found[name] for name in want} == want
    assert found["fff_learning_rate"] == pytest.approx(3.75e-4) and found["eval_cosine"] == 0.95
    plain = report.as_a_run({**row, "command": f"{command} --calibration-steps 9", "distilled": scores(0.951)})
    assert plain["fff_learning_rate"] == pytest.approx(7.5e-4) and not plain["muon"]
    assert cells(report.longer([found, long_run("none", 0, 0.90)]), "8x8")[0][2] == "Muon, 0.001"


def test_what_was_tried():
    """What differs from the usual is told, the best first."""
    usual = {
        "run": "tried",
        "fff": "8x8",
        "batch_size": 384,
        "steps": 1000,
        "muon": False,
        "plain_steps": False,
        "crop": 0.5,
    }
    usual |= {"learning_rate": 5e-4, "fff_learning_rate": 3.75e-4, "routing_gradient": 3.0, "hidden_weight": 0.5}
    usual |= {
        "depth_steps": 0.0,
        "routing_steps": 1.0,
        "eval_loss": 0.8,
        "eval_cosine": 0.93,
        "distilled": scores(0.92),
    }
    other = {"routing_gradient": 0.0, "depth_steps": 0.25, "eval_loss": 0.7}
    worse, first = {**usual, "run": "rates", "eval_loss": 0.1}, {**usual, **other, "input_routing_gradient": None}
    best, plain = cells(report.tried([usual, first, worse]), "8x8")
    assert best[3:5] == ["routing gradient 0, steps by depth, e = 0.25", "0.700"] and plain[3:5] == ["", "0.800"]


SIZES = ("1x16", "1x128", "8x128", "32x128")


def test_kinds_by_layer():
    """Beside what stands in all layers and uses as much; a layer that is not named keeps its FFN; other ways do not count."""

    def run(fff, cosine, **told):
        usual = {"run": "tried", "fff": fff, "muon": True, "eval_loss": 0.8, "eval_cosine": cosine}
        return {**usual, "calibrated": scores(0.5), "distilled": scores(cosine), **told}

    rows = [run("8x8", 0.93), run("0=24x8,1-3=4x8,4=8x8,5=4x8", 0.92), run("1-5=none", 0.91), run("none", 0.9)]
    rows += [run("8x8", 0.99, muon=False), run("8x8", 0.98, fff_fall=2.0, eval_loss=0.1)]
    times = {"8x8": dict.fromkeys(SIZES, 36.94), "1-5=none": {**dict.fromkeys(SIZES, 30.0), "8x128": 12.34}}
    clocks = [{"cpu": "a CPU", "isa": "avx512", "threads": 2, "microseconds_a_token": {"an engine": times}}]
    assert report.mixed(rows, clocks) == ""  # what each layer is worth is not known
    layer = {"run": "layers", "calibration_steps": 5, "texts": 1000}
    rows += [{**layer, "fff": f"{i}=none", "calibrated": scores(0.6 + i / 10)} for i in range(2)]
    text = report.mixed(rows, clocks)
    assert "| without the FFN of layer | 0 | 1 |" in text and "| cosine, sentences | 0.600 | 0.700 |" in text
    (tree,), (mix,), (one,) = (cells(text, fff) for fff in ("8x8", rows[1]["fff"], "1-5=none"))
    assert (
        tree[1:] == ["72 (4.7 %)", "0.500", "0.800", "0.930", "0.930", "0.700", *["36.9"] * 4]
        and mix[7:] == [""] * 4
        and one[7:] == ["30.0", "30.0", "12.3", "30.0"]
        and mix[1] == tree[1]
        and text.index(rows[1]["fff"] + " | 72") < text.index("| 8x8 |")
    )
    assert one[1] == "256 (16.7 %)" and not cells(text, "none") and not report.mixed(rows[:1] + rows[-2:], clocks)
    assert "half of the layers" not in text
    halves = {"0-2=none,3-5=mlp:224": (0.8, 0.9), "0-1=none,2-3=mlp:224,4=none,5=mlp:224": (0.75, 0.85)}
    rows += [
        {"run": "halves", "fff": fff, "calibrated": scores(first), "distilled": scores(then)}
        for fff, (first, then) in halves.items()
    ]
    text = " ".join(report.mixed(rows, clocks).split())
    assert "0.800 calibrated and 0.900 distilled, in 2, 3 and 5" in text and "0.750 and 0.850; of neighbours" in text


def test_the_models_of_the_commands():
    row = {
        "device": "a GPU",
        "whole_seconds": 90.0,
        "fff": "8x8",
        "steps": 80,
        "cosine": 0.94,
        "rows": 990,
        "held_out": 10,
    }
    first = {**row, "command": "hf-fff distill MODEL OUT", "distilled": scores(0.951)}
    other = {**row, "command": "hf-fff distill MODEL OTHER", "fff": "2x3", "rows": 1990}
    other["distilled"] = {"unseen_short": {"cosine": 0.5, "neighbours": 0.4}}
    text = report.by_command([first, other])
    assert "\nhf-fff distill MODEL OUT\nhf-fff distill MODEL OTHER\n" in text and "1,000 and 2,000 such lines" in text
    reached = ["80", "1.5", "0.951", "0.851", "0.700", "0.951", "0.700", "0.940", "0.951, reached"]
    assert cells(text, "8x8")[0][1:] == reached and text.count("## As anybody makes one") == 1
    assert cells(text, "2x3")[0][1:] == ["80", "1.5", "0.500", "", "0.400", "", "", "0.940", ""]


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


def test_what_inputs_give():
    told = {"calibration_steps": 3, "calibration_batch": 64, "max_tokens": 9000, "device": "cpu"}
    rows = [{"fff": "dense", "scores": {"accuracy": 0.8}}]
    for alone, accuracy in ((False, 0.75), (True, 0.5)):
        found = {"accuracy": accuracy, "agreement": accuracy + 0.1}
        rows.append({**told, "fff": "8x8", "first_text_alone": alone, "calibrated": found})
    text = report.task_inputs(rows)
    assert cells(text, "8x8") == [["8x8", "pairs", "75.0", "85.0"], ["8x8", "single texts", "50.0", "60.0"]]
    assert "3 steps of 64 tokens a layer, 9,000 tokens" in text and cells(text, "the teacher")[0][2] == "80.0"
    assert report.task_inputs(rows[:1]) == "" and report.task_frozen(rows) == ""
    after = {"accuracy": 0.76, "agreement": 0.9}
    frozen = {**rows[1], "freeze": True, "seed": 0, "steps": 7, "batch_size": 4, "distilled": after}
    again = report.task_frozen([*rows, frozen])
    assert cells(again, "8x8") == [["8x8", "75.0", "85.0", "76.0", "95.0 %", "90.0"]] and "7 steps of 4 rows" in again
    assert report.task_inputs([*rows, frozen]) == text  # which is of calibration alone


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
    assert report.masked_words_kept(rows)["8x8"] == pytest.approx([0.8 / 1.1, 0.7 / 1.1])
    muon = [{**row(fff, 0, loss), "muon": True} for fff, loss in (("none", 3.8), ("8x8", 3.2))]
    table = report.masked_words(rows + muon)  # of which no FFN with Muon is the floor
    assert [line[5] for line in cells(table, "8x8")] == ["68 ± 6 %", "50 %", "75 %"] and "Muon, 0.001, a GPU" in table
