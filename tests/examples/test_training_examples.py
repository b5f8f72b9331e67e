"""The examples of training: short enough to be copied, and they run."""

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import hf_fff  # noqa: F401  (registers the Fast classes)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
import pretrain_mlm  # noqa: E402


@pytest.mark.parametrize(
    ("example", "auto", "metric", "chance"),
    [
        (finetune, AutoModelForSequenceClassification, "eval_accuracy", 0.4),
        (pretrain_mlm, AutoModelForMaskedLM, "eval_accuracy", -1),
    ],
)
def test_quick(minilm_path, tmp_path, monkeypatch, capsys, example, auto, metric, chance):
    assert len(Path(example.__file__).read_text().splitlines()) < 80
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example", "--quick"])
    scores = example.main()
    out = {finetune: "finetuned", pretrain_mlm: "pretrained"}[example]
    assert type(auto.from_pretrained(tmp_path / out)).__name__.startswith("FastBertFor")
    assert scores[metric] > chance and f"FastBertFor{auto.__name__[12:]} in {out}" in capsys.readouterr().out
