"""Masked words: one teacher, students of it, and processes that wait for the one that makes the teacher."""

import sys
from pathlib import Path

import pytest
from task_rows import tiny_tokenizer
from tiny import HEADS, tiny_bert

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "experiments"))

import masked_words as experiment
from runs import results


def call(monkeypatch, folder, *options):
    tiny_bert(HEADS["ForMaskedLM"]).save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))[:12]
    lines = [" ".join(words[(i + j) % len(words)] for j in range(4 + i % 5)) for i in range(80)]
    for name, some in (("text", lines[:60]), ("unseen", lines[60:])):
        (folder / f"{name}.txt").write_text("\n".join(some) + "\n")
    given = ["--model", folder / "model", "--text", folder / "text.txt", "--unseen", folder / "unseen.txt"]
    given += ["--work", folder / "work", "--results", folder / "results.jsonl", "--students", "2x3-0", "none-1"]
    given += ["--teacher-steps", 1, "--teacher-batch-size", 4, "--calibration-steps", 2, "--calibration-batch", 512]
    given += ["--max-tokens", 600, "--steps", 2, "--batch-size", 4, "--limit", 60, *options]
    monkeypatch.setattr(sys, "argv", ["masked_words.py", *map(str, given)])
    experiment.main()
    return results(folder / "results.jsonl")


@pytest.mark.full
def test_a_teacher_and_its_students(tmp_path, monkeypatch):
    found = call(monkeypatch, tmp_path)
    assert [(row["fff"], row["seed"]) for row in found] == [("dense", 0), ("2x3", 0), ("none", 1)]
    assert "loss" in found[0]["scores"] and all("distilled" in row for row in found[1:])


def test_who_waits_for_the_teacher_ends_in_time(tmp_path, monkeypatch):
    claims = tmp_path / "claims"
    experiment.claimed(claims, ("teacher", 1))  # by another process, which is still at it
    assert call(monkeypatch, tmp_path, "--claims", claims, "--seconds", 0) == []
