"""``hf-fff train``: each task is learnt and its model opens by the Auto class; wrong use writes nothing; what is interrupted goes on."""

import json
import sys

import pytest
import torch
from command import listing, run, unwrapped
from task_rows import WORDS, learnable, rows_of, tiny_tokenizer
from tiny import tiny_bert
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import hf_fff
from hf_fff import FinetuningTrainer

OF = {"classify": "classification", "regress": "regression", "tokens": "tokens", "qa": "qa", "mlm": "mlm"}
AUTO = {
    "classify": AutoModelForSequenceClassification,
    "regress": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "qa": AutoModelForQuestionAnswering,
    "mlm": AutoModelForMaskedLM,
}


def write(path, rows):
    if path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(str(v) for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def encoder(tmp_path):
    """A tiny BERT without a head, with its tokenizer."""
    folder = tmp_path / "encoder"
    tiny_bert(initializer_range=0.1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def train(command, model, out, data, *options, **settings):
    usual = {"max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 2, "report_to": "none"}
    given = [word for name, value in {**usual, **settings}.items() for word in ("--set", f"{name}={value}")]
    return run("train", command, model, "--data", data, "--out", out, "--device", "cpu", "--json", *given, *options)


@pytest.mark.parametrize(
    ("command", "fff", "least"),
    [("classify", "2x3", 0.8), ("regress", None, 0.6), ("tokens", "2x3", 0.6), ("qa", None, 0.5), ("mlm", "2x3", 0.6)],
)
def test_it_learns(encoder, tmp_path, command, fff, least):
    """Chance is 0.5, 0, 0, 0.14 and 0.1."""
    data, others = (
        write(tmp_path / f"{name}.jsonl", learnable(OF[command], count, seed))
        for name, count, seed in (("data", 400, 0), ("others", 60, 1))
    )
    before = listing(encoder)
    converted = ("--fff", fff, "--calibration-steps", 3) if fff else ()
    result = train(
        *(command, encoder, tmp_path / "out", data, "--eval", others, *converted),
        max_steps=200,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        eval_strategy="no",
    )
    assert result.exit_code == 0, result.output
    assert listing(encoder) == before and not (tmp_path / "out.work").exists()
    told = json.loads(result.stdout)
    metric = {"classify": "accuracy", "regress": "spearman", "mlm": "accuracy"}.get(command, "f1")
    assert told["training"]["scores"][metric] > least and told["training"]["steps"] == 200
    assert told["layers"] == ({str(i): fff for i in range(3)} if fff else {})
    model = AUTO[command].from_pretrained(tmp_path / "out")
    assert type(model).__name__.startswith("FastBertFor" if fff else "BertFor")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 105
    record = json.loads((tmp_path / "out" / "hf_fff.json").read_text())
    assert record["recipe"]["arguments"]["learning_rate"] == 3e-3 and ("calibration" in record) == bool(fff)
    if command != "qa":  # long enough alone
        scores = run("eval", tmp_path / "out", "--task", OF[command], "--data", others, "--json", "--device", "cpu")
        assert json.loads(scores.stdout)["model"]["metrics"][metric] == pytest.approx(
            told["training"]["scores"][metric]
        )


def test_a_converted_model_stays_one(encoder, tmp_path):
    assert run("convert", encoder, tmp_path / "fast", "--fff", "mlp:4", "--layers", "0,1").exit_code == 0
    data = write(tmp_path / "data.tsv", rows_of("classification", 24))
    result = train("classify", tmp_path / "fast", tmp_path / "out", data)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layers"] == {"0": "mlp:4", "1": "mlp:4"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    old = hf_fff.models.fast_class(type(tiny_bert())).from_pretrained(tmp_path / "fast")
    key = next(name for name, _ in old.named_parameters() if name.endswith("weight_in"))
    trained = dict(model.bert.named_parameters())[key]
    assert not torch.equal(trained, dict(old.named_parameters())[key]) and model.config.num_labels == 3
    result = train("classify", tmp_path / "fast", tmp_path / "again", data, "--fff", "2x3")
    assert result.exit_code == 2 and "already converted" in unwrapped(result.stderr)


@pytest.mark.parametrize("labels", [["1", "2", "10"], ["no", "yes", "maybe"], ["0", "1", "2"]])
def test_labels(model, tmp_path, labels):
    """Those of the rows, numbers by value; a head that knows them is kept."""
    rows = [{"text": WORDS[i % 50], "label": labels[i % 3]} for i in range(24)]
    result = train("classify", model, tmp_path / "out", write(tmp_path / "data.tsv", rows))
    assert result.exit_code == 0, result.output
    known = labels == ["0", "1", "2"]  # as LABEL_0 is
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    wanted = [f"LABEL_{i}" for i in range(3)] if known else labels if labels[0] == "1" else sorted(labels)
    assert [config.id2label[i] for i in range(3)] == wanted
    assert json.loads(result.stdout)["training"]["new_head"] == (not known)


def test_the_best_model_and_patience(encoder, tmp_path):
    rows = learnable("classification", 48)
    data, others = write(tmp_path / "data.jsonl", rows), write(tmp_path / "o.jsonl", learnable("classification", 30, 1))
    result = train(
        *("classify", encoder, tmp_path / "out", data, "--eval", others, "--best", "accuracy", "--patience", 2),
        max_steps=60,
        eval_steps=2,
        learning_rate=1e-9,  # nothing gets better
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["training"]
    assert told["best_step"] == 2 and told["steps"] == 6


def test_presets_files_and_settings(encoder, tmp_path):
    """The last to say so says; all of it is in the record."""
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-4\nweight_decay: 0.5\nmax_steps: 3\n")
    data = write(tmp_path / "data.tsv", rows_of("classification", 24))
    options = ("--preset", "crammed-finetune", "--config", tmp_path / "a.yaml", "--set", "weight_decay=0.25")
    result = run("train", "classify", encoder, "--data", data, "--out", tmp_path / "out", "--device", "cpu", *options)
    assert result.exit_code == 0, result.output
    arguments = json.loads((tmp_path / "out" / "hf_fff.json").read_text())["recipe"]["arguments"]
    wanted = {"learning_rate": 1e-4, "weight_decay": 0.25, "max_steps": 3, "adam_epsilon": 1e-6}
    assert {name: arguments.get(name) for name in wanted} == wanted
    assert "training: 100%" in result.stderr and "{" not in result.output
    assert "FastBert" not in result.stdout and "AutoModelForSequenceClassification.from_pretrained" in result.stdout


def test_it_goes_on_where_it_was_interrupted(encoder, tmp_path, monkeypatch):
    data = tmp_path / "data.txt"
    data.write_text("\n".join(row["text"] for row in rows_of("mlm", 40)))
    options, settings = ("--fff", "2x3", "--calibration-steps", 2), {"max_steps": 13, "save_steps": 4}
    assert train("mlm", encoder, tmp_path / "whole", data, *options, **settings).exit_code == 0
    save = FinetuningTrainer._save_checkpoint

    def interrupted(self, *args):
        save(self, *args)
        if self.state.global_step == 8:
            raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(FinetuningTrainer, "_save_checkpoint", interrupted)
        result = train("mlm", encoder, tmp_path / "out", data, *options, **settings)
    assert result.exit_code == 1 and "the same command goes on from there" in unwrapped(result.stderr)
    work = tmp_path / "out.work"
    kept = listing(work)
    tiny_bert(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    for model, changed, told in (
        (tmp_path / "other", {}, "weights: "),
        (encoder, {"learning_rate": 1e-2}, "arguments: "),
    ):
        result = train("mlm", model, tmp_path / "out", data, *options, **{**settings, **changed})
        assert result.exit_code == 2 and f"made with other options ({told}" in unwrapped(result.stderr), result.output
    result = train("mlm", encoder, tmp_path / "out", data, *options, **settings, per_device_train_batch_size=4)
    assert result.exit_code == 2 and "rows of a step is 8 there, 4 now" in unwrapped(result.stderr), result.output
    assert listing(work) == kept and not (tmp_path / "out").exists()
    result = train("mlm", encoder, tmp_path / "out", data, *options, "--resume", **settings)
    assert result.exit_code == 0, result.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_rows_that_are_too_long(encoder, tmp_path):
    rows = [{"text": " ".join(WORDS[: 5 + 30 * (i % 3)]), "label": i % 2} for i in range(24)]
    data = write(tmp_path / "data.tsv", rows)
    with pytest.warns(UserWarning, match="8 rows are longer than 64 tokens, and are cut there"):
        result = train("classify", encoder, tmp_path / "out", data, "--max-length", 512)
    assert json.loads(result.stdout)["training"]["cut"] == 8
    result = train("classify", encoder, tmp_path / "no", data, "--max-length", 512, "--no-truncate")
    assert result.exit_code == 2 and "8 rows are longer than 64 tokens, the first is row 3" in unwrapped(result.stderr)
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.work").exists()


def test_from_scratch(encoder, tmp_path):
    data = write(tmp_path / "data.jsonl", learnable("mlm", 30))
    options = ("--from-scratch", "--fff", "1x2", "--preset", "crammed-pretrain")
    result = train("mlm", encoder, tmp_path / "out", data, *options, learning_rate=1e-9)
    assert result.exit_code == 0, result.output
    new = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(new).__name__ == "FastBertForMaskedLM" and new.config.hidden_size == 32
    old = AutoModelForMaskedLM.from_pretrained(encoder).bert.embeddings.word_embeddings.weight
    assert not torch.allclose(new.bert.embeddings.word_embeddings.weight, old, atol=0.01)


WRONG = {
    "fff": (["--fff", "9"], "--fff"),
    "setting": (["--set", "learning_rat=1"], "did you mean learning_rate"),
    "value": (["--set", "max_steps=few"], "a whole number"),
    "preset": (["--preset", "crammed"], "allowed: crammed-finetune, crammed-pretrain"),
    "no config": (["--config", "{0}/nowhere.yaml"], "--config"),
    "best of nothing": (["--best", "f1"], "needs something to evaluate on (--eval)"),
    "patience with nothing": (["--patience", "2"], "needs something to evaluate on (--eval)"),
    "best of another": (
        ["--best", "rouge", "--eval", "{0}/data.tsv"],
        "best='rouge' is no metric of classification (allowed: accuracy",
    ),
    "column": (["--text-columns", "a"], "there is no column 'a'; the columns are ['sentence1', 'sentence2', 'label']"),
    "label column": (["--label-column", "verdict"], "there is no column 'verdict'; the columns are ['sentence1'"),
    "labels of nothing": (
        ["--eval", "{0}/bare.tsv"],
        "the evaluation data has no labels: none of the columns ['sentence1', 'sentence2']",
    ),
    "new label": (["--eval", "{0}/wrong.tsv"], "the evaluation data: row 1: label='7' is no label (allowed: 0 to 2"),
    "no evaluation": (["--eval", "{0}/none.tsv"], "none.tsv has no rows"),
    "length": (["--max-length", "3"], "--max-length"),
    "rows": (["--set", "packed_rows=int8"], "packed_rows='int8' is of trees, and there are none in the model"),
    "seed": (["--seed", "-1"], "--seed"),
    "work in the output": (["--work", "{0}/out/work"], "lies in the output"),
    "work in the source": (["--work", "{0}/dense/work"], "lies in the source"),
    "no work folder": (["--work", "{0}/precious"], "is no work folder of a training"),
}


@pytest.mark.parametrize("name", WRONG)
def test_used_wrongly(model, tmp_path, name):
    options, message = WRONG[name]
    rows = rows_of("classification", 24)
    write(tmp_path / "data.tsv", rows)
    write(tmp_path / "wrong.tsv", [{**row, "label": 7} for row in rows])
    write(tmp_path / "bare.tsv", [{k: row[k] for k in ("sentence1", "sentence2")} for row in rows])
    (tmp_path / "none.tsv").write_text("sentence1\tsentence2\tlabel\n")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("ten years of work")
    before = listing(tmp_path)
    result = train("classify", model, tmp_path / "out", tmp_path / "data.tsv", *(o.format(tmp_path) for o in options))
    assert result.exit_code == 2 and message.replace(" ", "") in unwrapped(result.stderr).replace(" ", "")
    assert listing(tmp_path) == before and result.stdout == ""


@pytest.mark.parametrize(
    ("command", "rows", "message"),
    [
        (
            "classify",
            [{"text": "word1", "label": v} for v in ("0.5", "1.25", "3")],
            "holds numbers, such as 0.5, not classes",
        ),
        ("classify", [{"text": "word1", "label": "a"}] * 9, "holds nothing but ['a']: no two classes"),
        ("classify", [{"text": "word1"}] * 9, "the training data has no labels: none of the columns ['text'] is known"),
        ("tokens", [{"tokens": ["word1"], "tags": [i % 2]} for i in range(9)], "holds numbers, not tags such as O"),
        ("regress", [{"text": "word1", "score": "much"}] * 9, "the training data: row 1: score='much' is no number"),
        ("tokens", [{"tokens": ["word1"], "tags": ["O", "B-x"]}] * 9, "must be a list of 1 tags"),
        ("tokens", [{"words": ["word1"], "tags": ["O"]}] * 9, "columns ['words', 'tags'] is known to hold texts"),
        ("qa", [{"question": "word1", "context": "word2", "answers": "x"}] * 9, "is no list of answers"),
    ],
)
def test_rows_of_another_kind(encoder, tmp_path, command, rows, message):
    data = write(tmp_path / "data.jsonl", rows)
    result = train(command, encoder, tmp_path / "out", data)
    assert result.exit_code == 2 and message in unwrapped(result.stderr), result.output
    assert not (tmp_path / "out.work").exists()


def test_a_stream(encoder, tmp_path):
    pytest.importorskip("datasets")
    data = tmp_path / "data.txt"
    data.write_text("\n\n".join(row["text"] for row in learnable("mlm", 60)))
    result = train("mlm", encoder, tmp_path / "out", data, "--stream", "--fff", "1x2", "--calibration-steps", 2)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["training"]["rows"] is None
    assert json.loads((tmp_path / "out" / "hf_fff.json").read_text())["recipe"]["rows"] == ["data.txt"]
    result = train("mlm", encoder, tmp_path / "no", data, "--stream", max_steps=-1)
    assert result.exit_code == 2 and "has no end: give --set max_steps=N" in unwrapped(result.stderr)


def test_a_stream_without_its_package(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "data.txt").write_text("word1 word2")
    result = train("mlm", encoder, tmp_path / "out", tmp_path / "data.txt", "--stream")
    assert result.exit_code == 2 and "needs datasets, which is not installed" in unwrapped(result.stderr)


def test_a_loss_that_is_not_finite(encoder, tmp_path):
    data = write(tmp_path / "data.tsv", rows_of("classification", 24))
    result = train("classify", encoder, tmp_path / "out", data, learning_rate=1e30, max_grad_norm=0, save_steps=1)
    assert result.exit_code == 1 and "not finite" in unwrapped(result.stderr), result.output
    assert not (tmp_path / "out").exists()
