"""The commands on folders of other families than BERT."""

import json

import pytest
from command import run
from task_rows import rows_of, tiny_tokenizer
from tiny import tiny_model
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_fff.models import FAMILIES

# In the fast tests one of each way in which FFNs lie in a model
CHOICE = ["roberta", "distilbert", "modernbert", "albert", "deberta-v2", "megatron-bert"]
EACH = [pytest.param(family, marks=[] if family in CHOICE else pytest.mark.full) for family in FAMILIES]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows_of("classification", 60)))
    return path


@pytest.mark.parametrize("family", EACH)
def test_convert_distill_and_evaluate(family, rows, text, tmp_path):
    folder = tmp_path / "dense"
    tiny_model(family, "ForSequenceClassification", num_labels=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

    def done(*command):
        result = run(*command, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    usual = ("--fff", "2x3", "--steps", 6)
    told = done("convert", folder, tmp_path / "fast", *usual, "--text", text)
    assert set(told["layers"].values()) == {"2x3"}
    assert AutoModel.from_pretrained(tmp_path / "fast").config.model_type == f"fast{family}"
    for name, data in (("general", ("--text", text)), ("task", ("--task", "classification", "--data", rows))):
        options = ("--calibration-steps", 3, "--batch-size", 16, "--device", "cpu")
        done("distill", folder, tmp_path / name, *usual, *data, *options)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert type(model).__name__.startswith("Fast") and len(model.config.fff_layers) == 3
    told = done(
        "eval", tmp_path / "task", "--task", "classification", "--data", rows, "--teacher", folder, "--device", "cpu"
    )
    assert 0 <= told["model"]["metrics"]["agreement"] <= 1 and told["teacher"]["metrics"]["agreement"] == 1
    assert told["usage"]["0"]["depth"] == 3
