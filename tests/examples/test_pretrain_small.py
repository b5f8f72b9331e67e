"""The pretraining experiment: full rows, runs and times on a CPU, and a page of what was measured."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from task_rows import WORDS, tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM

from hf_fff import FastBertConfig, FastBertForMaskedLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "experiments"))

import pretrain_small as experiment
from runs import append, results


@pytest.fixture
def words(tmp_path):
    """A tokenizer and texts of several lengths."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    lines = [" ".join(WORDS[(7 * i + j) % 100] for j in range(3 + i % 20)) for i in range(120)]
    for name, part in (("text", lines), ("unseen", lines[::4])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    return [
        *("--tokenizer", tmp_path / "tokenizer", "--text", tmp_path / "text.txt", "--unseen", tmp_path / "unseen.txt"),
        *("--results", tmp_path / "results.jsonl", "--cache", tmp_path / "cache"),
    ]


def call(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["pretrain_small.py", *map(str, options)])
    experiment.main()


def test_rows_are_full(tmp_path):
    """Every token is there, in order, with a separator behind each text and the class token before each row."""
    tokenizer, place = tiny_tokenizer(), tmp_path / "text.txt"
    place.write_text("word1 word2\n\nword3\nword4 word5 word6 word7\n")
    ids = experiment.packed(tokenizer, [place], 5, tmp_path / "cache")
    sep, one = tokenizer.sep_token_id, tokenizer.convert_tokens_to_ids("word1")
    want = [[one, one + 1, sep, one + 2], [sep, one + 3, one + 4, one + 5]]
    assert np.array_equal(ids[:, 1:], want) and (ids[:, 0] == tokenizer.cls_token_id).all()
    known = SimpleNamespace(vocab_size=tokenizer.vocab_size)  # which cannot tokenise anything
    assert np.array_equal(experiment.packed(known, [place], 5, tmp_path / "cache"), ids)
    place.write_text("word1")
    with pytest.raises(SystemExit, match="do not fill a row of 5"):
        experiment.packed(tokenizer, [place], 5, tmp_path / "cache")


def test_quick(words, tmp_path, monkeypatch, capsys):
    """Runs of each kind, with and without the routing gradient; what is there is not made again; times; a page."""
    options = (*words, "--quick", "--fff", "1x3")
    call(monkeypatch, *words, "--quick", "--fff", "dense", "1x3")
    found = results(tmp_path / "results.jsonl")
    assert [(row["fff"], row["routing_gradient"]) for row in found] == [("dense", None), ("1x3", 3.0), ("1x3", 0.0)]
    for row in found:
        assert [step for step, _ in row["curve"]] == [4, 8] and row["unseen"] == row["curve"][-1][1]
        assert 3 < row["held_out"] < 6  # of 128 words at random: 4.9
        assert ("dead_nodes" in row) == (row["fff"] == "1x3")
    assert found[0]["parameters"] > found[1]["parameters"]
    call(monkeypatch, *options, "--time")
    times = results(tmp_path / "results.jsonl")[len(found) :]
    assert len(times) == 2 and all(row["run"] == "time" and row["milliseconds"] > 0 for row in times)
    call(monkeypatch, *options)
    assert len(results(tmp_path / "results.jsonl")) == len(found) + len(times)
    page = tmp_path / "page.md"
    call(monkeypatch, *words, "--quick", "--report", "--page", page)
    assert len([line for line in page.read_text().splitlines() if line.startswith("| ")]) == 4
    assert (tmp_path / "page.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        call(monkeypatch, *words, "--steps", 10, "--evaluations", 4)
    assert "--steps 10 must be a multiple of --evaluations 4" in capsys.readouterr().err


def test_logits_of_masked_words_alone():
    """Their loss, and its gradients, are those of the whole model."""
    config = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (8, 32), generator=draw)
    labels = ids.where(torch.rand(8, 32, generator=draw) < 0.25, -100)
    for base, made in (
        (BertForMaskedLM, BertConfig(**config)),
        (FastBertForMaskedLM, FastBertConfig(**config, fff="2x3")),
    ):
        model = experiment.of_masked_words(base)(made)
        gradients = []
        for forward in (model, partial(base.forward, model)):
            model.zero_grad()
            loss = forward(ids, labels=labels).loss
            loss.backward()
            gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(gradients[0]) == len(gradients[1]) > 20
        for ours, whole in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)


def row(fff, routing, seed, end, **more):
    curve = [[step, 8 - (8 - end - 0.1 * seed) * step / 100] for step in range(25, 101, 25)]
    told = {"run": "main", "fff": fff, "routing_gradient": routing, "seed": seed, "quick": False, "curve": curve}
    told |= {"steps": 100, "rows": 8, "tokens": 16, "learning_rate": 1e-3, "device": "cpu", "torch": "2"}
    told |= {
        "layers": 6,
        "hidden_size": 384,
        "family": "esm",
        "units": fff == "1x3",
        "warmup": 10,
        "zero_outputs": False,
        "unseen": end + 0.1 * seed,
        "held_out": end,
    }
    told |= {
        "train_rows": 400,
        "unseen_rows": 9,
        "parameters": 20_000_000,
        "rate": None if fff == "dense" else 7.5e-4,
        "seconds": 10.0,
    }
    return told | {"training_curve": [[25, 8.0]]} | more


def test_the_page(tmp_path, monkeypatch):
    """Equal steps off the ends of the curves, equal seconds at the steps that each makes while the fastest makes all."""
    path, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    for seed in (0, 1):
        append(path, row("dense", None, seed, 4.0))
        append(path, row("1x3", 3.0, seed, 5.0, dead_nodes=0.25))
        append(path, row("none", None, seed, 6.0))
    append(path, row("dense", None, 0, 1.0, run="rates"))  # by which something was chosen
    append(path, row("1x3", 3.0, 1, 4.9, run="otherwise", zero_outputs=True, rate=1e-4))
    for fff, routing, ms in (("dense", None, 25.0), ("1x3", 3.0, 40.0), ("none", None, 20.0)):
        append(path, row(fff, routing, 0, 0.0, run="time", milliseconds=ms, windows=[0.9 * ms, 1.1 * ms]))
    call(monkeypatch, "--results", path, "--report", "--page", page)
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert lines[1:4] == [  # none makes all of its 100 steps in 2 s, dense 80 and 1x3 50
        "| dense | - | 1536 (100.0 %) | 20.0 M | - | 2 | 4.050 ± 0.071 | 100 % | 25.0 | 4.840 ± 0.057 | - |",
        "| none | - | 0 (0.0 %) | 20.0 M | - | 2 | 6.050 ± 0.071 | 0 % | 20.0 | 6.050 ± 0.071 | - |",
        "| 1x3 | 3 | 4 (0.3 %) | 20.0 M | 0.00075, in units | 2 | 5.050 ± 0.071 | 50 % | 40.0 | 6.525 ± 0.035 | 25.0 % |",
    ]
    assert "windows of one model differ by up to 22 % here" in page.read_text()
    assert lines[5:7] == [
        "| 1x3, seed 1 of the above | 3 | 0.00075 | yes | random | 5.100 |",
        "| 1x3 | 3 | 0.0001 | yes | at zero | 5.000 |",
    ]
    assert lines[8:] == ["| norms before, rotary positions | dense | 100 x 8 | 0.001 | - | - | 1.000 |"]
    assert "2.0 s" in page.read_text()
    with pytest.raises(SystemExit, match="no runs"):
        call(monkeypatch, "--results", tmp_path / "nothing.jsonl", "--report", "--page", page)


def test_the_page_of_runs_of_several_lengths(tmp_path, monkeypatch):
    """All seeds where the shortest ends, those that went on where they end."""
    path, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    for fff, end in (("dense", 4.0), ("none", 6.0)):
        append(path, row(fff, None, 0, end))
        curve = [[step, loss] for step, loss in row(fff, None, 1, end)["curve"] if step <= 50]
        append(path, row(fff, None, 1, end, curve=curve, steps=50, unseen=curve[-1][1]))
    call(monkeypatch, "--results", path, "--report", "--page", page)
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert "loss after 50 steps | recovered | seeds | after 100 steps" in lines[0]
    assert "not measured yet" in page.read_text() and "With one seed" not in page.read_text()
    assert lines[1:] == [
        "| dense | - | 1536 (100.0 %) | 20.0 M | - | 2 | 6.025 ± 0.035 | 100 % | 1 | 4.000 | 100 % | - |",
        "| none | - | 0 (0.0 %) | 20.0 M | - | 2 | 7.025 ± 0.035 | 0 % | 1 | 6.000 | 0 % | - |",
    ]
