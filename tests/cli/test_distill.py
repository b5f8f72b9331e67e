"""``hf-fff distill``: what it writes, that it goes on where it stopped, and that wrong use writes nothing."""

import json
import signal

import pytest
import torch
from command import deliver, listing, run, unwrapped
from safetensors.torch import load_file
from task_rows import rows_of, tiny_tokenizer
from tiny import HEADS, tiny_bert
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_fff import convert_ffn_to_fff
from hf_fff.training import DistillationTrainer, work


def distill(model, text, output, *options):
    usual = (
        "--fff",
        "2x3",
        "--text",
        text,
        "--steps",
        6,
        "--calibration-steps",
        3,
        "--batch-size",
        16,
        "--device",
        "cpu",
        "--json",
    )
    return run("distill", model, output, *usual, *options)


def test_distill(model, text, tmp_path):
    before = listing(tmp_path)
    result = distill(model, text, tmp_path / "fast", "--steps", 40)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["layers"] == {"0": "2x3", "1": "2x3", "2": "2x3"} and told["distillation"]["steps"] == 40
    assert told["distillation"]["cosine_before"] < told["distillation"]["cosine"] < 1
    assert {k: v for k, v in listing(tmp_path).items() if not k.startswith("fast")} == before  # the work folder is gone
    fast = AutoModel.from_pretrained(tmp_path / "fast")
    assert type(fast).__name__ == "FastBertModel" and len(fast.config.fff_layers) == 3
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast").classifier.weight
    assert torch.equal(head, AutoModelForSequenceClassification.from_pretrained(model).classifier.weight)
    assert (tmp_path / "fast" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_distill_by_muon(model, text, tmp_path):
    steps = ["--steps", 6, "--batch-size", 8, "--save-steps", 2, "--learning-rate", 1e-3]
    assert distill(model, text, tmp_path / "fast", *steps, "--muon").exit_code == 0
    assert distill(model, text, tmp_path / "usual", *steps).exit_code == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("usual", "fast")]
    name = next(name for name in weights[0] if name.endswith("layer.0.attention.self.query.weight"))
    assert not torch.equal(*(of[name] for of in weights))
    assert json.loads((tmp_path / "fast" / "hf_fff.json").read_text())["recipe"]["muon"] is True


def test_distill_for_packed_rows(model, text, tmp_path):
    result = distill(model, text, tmp_path / "fast", "--steps", 40, "--rows", "int8")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["distillation"]
    assert told["packed_rows"] == "int8" and told["cosine_before"] < told["cosine"] < 1
    record = json.loads((tmp_path / "fast" / "hf_fff.json").read_text())
    assert record["recipe"]["packed_rows"] == "int8"
    assert distill(model, text, tmp_path / "usual", "--steps", 40).exit_code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("usual", "fast")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(("stop", "how"), [(2, ()), (6, ()), (2, ("--muon",))])  # 6: with nothing left to train
def test_distill_goes_on_where_it_was_interrupted(model, text, tmp_path, monkeypatch, stop, how):
    assert distill(model, text, tmp_path / "whole", "--save-steps", 2, *how).exit_code == 0
    save = DistillationTrainer._save_checkpoint

    def interrupted(self, *args):
        save(self, *args)
        if self.state.global_step == stop:
            raise RuntimeError("the power is gone")

    work = tmp_path / "checkpoints"
    options = ("--save-steps", 2, "--work", work, *how)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "_save_checkpoint", interrupted)
        result = distill(model, text, tmp_path / "fast", *options)
    assert result.exit_code == 1 and "the power is gone" in result.stderr and not (tmp_path / "fast").exists()
    assert f"What is done is kept in {work}: the same command goes on from there" in unwrapped(result.stderr)
    (work / "checkpoint-9").mkdir()  # one of which the last files were not written
    kept = listing(work)
    assert {"start", "options.json", f"checkpoint-{stop}"} <= set(kept)
    result = distill(model, text, tmp_path / "fast", *options, "--seed", 1)
    assert result.exit_code == 2 and "made with other options (seed: 0 there, 1 now)" in unwrapped(result.stderr)
    others = options[:-1] if how else (*options, "--muon")
    assert "muon: " in unwrapped(distill(model, text, tmp_path / "fast", *others).stderr)
    assert listing(work) == kept and not (tmp_path / "fast").exists()
    result = distill(model, text, tmp_path / "fast", *options)
    assert result.exit_code == 0 and not work.exists(), result.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "fast")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_distill_ends_the_step_where_it_is_interrupted(model, text, tmp_path, monkeypatch, sent, exit_code):
    """With a checkpoint of it, from which the same command goes on to the same result."""
    whole = distill(model, text, tmp_path / "whole", "--steps", 40)
    assert whole.exit_code == 0 and not json.loads(whole.stdout)["distillation"]["undone"]
    step = DistillationTrainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 3:
            deliver(sent)
        return step(self, *args)

    work = tmp_path / "fast.work"
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", interrupted)
        result = distill(model, text, tmp_path / "fast", "--steps", 40)
    assert result.exit_code == exit_code and "ending after this step" in result.stderr, result.output
    assert f"What is done is kept in {work}: the same command goes on from there" in unwrapped(result.stderr)
    assert {p.name for p in work.iterdir()} == {"start", "options.json", "checkpoint-4"}
    assert distill(model, text, tmp_path / "fast", "--steps", 40).exit_code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "fast")]
    assert weights[0] == weights[1]


def test_distill_anew(model, text, tmp_path):
    work = tmp_path / "fast.work"
    (work / "start").mkdir(parents=True)
    (work / "start" / "config.json").write_text("{}")
    (work / "options.json").write_text("{}")
    result = distill(model, text, tmp_path / "fast")
    assert result.exit_code == 2 and "--no-resume starts anew" in unwrapped(result.stderr)
    assert distill(model, text, tmp_path / "fast", "--no-resume").exit_code == 0 and not work.exists()


def test_the_output_of_distill_does_not_lie_in_its_work_folder(model, text, tmp_path):
    before = listing(tmp_path)
    result = distill(model, text, tmp_path / "work" / "fast", "--work", tmp_path / "work")
    assert result.exit_code == 2 and "lies in the work folder" in unwrapped(result.stderr)
    assert listing(tmp_path) == before


WRONG_DISTILLATION = {
    "fff": (["--fff", "9"], "--fff"),
    "text": (["--text", "nowhere.txt"], "--text"),
    "steps": (["--steps", "0"], "--steps"),
    "head": (["--task", "mlm"], "BertForSequenceClassification has no head for mlm"),
    "text with a task": (["--task", "classification"], "classification learns from --data"),
    "data without a task": (["--data", "x.tsv"], "is for a task"),
    "columns without a task": (["--text-columns", "a"], "is for a task"),
    "rate": (["--learning-rate", "0"], "--learning-rate"),
    "crop": (["--crop", "1.5"], "--crop"),
    "rows": (["--rows", "int8", "--fff", "mlp:8"], "int8 is of trees, and --fff mlp:8 has none"),
    "batch": (["--batch-size", "200"], "fewer than one batch, which has 200"),
    "work in the output": (["--work", "{0}/fast/work"], "lies in the output"),
    "output is the work": (["--work", "{0}/fast"], "is or lies in the output"),
    "work in the source": (["--work", "{0}/dense/work"], "lies in the source"),
    "work is another's": (["--work", "{0}/other"], "is no work folder"),
    "work is another's, anew": (["--work", "{0}/other", "--no-resume"], "is no work folder"),
}


@pytest.mark.parametrize("name", WRONG_DISTILLATION)
def test_distill_used_wrongly(model, text, tmp_path, name):
    options, message = WRONG_DISTILLATION[name]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("ten years of work")
    before = listing(tmp_path)
    result = distill(model, text, tmp_path / "fast", *(option.format(tmp_path) for option in options))
    assert result.exit_code == 2 and message in unwrapped(result.stderr), result.output
    assert listing(tmp_path) == before and result.stdout == ""


def write(path, task, count, seed=0, columns=None):
    """Rows of a task as a file; ``columns`` gives them other names."""
    rows = [{(columns or {}).get(k, k): v for k, v in row.items()} for row in rows_of(task, count, seed)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = [list(rows[0]), *(row.values() for row in rows)]
        path.write_text("\n".join("\t".join(map(str, line)) for line in lines))
    return path


def distill_task(model, output, task, data, *options):
    usual = ("--fff", "2x3", "--steps", 6, "--calibration-steps", 3, "--batch-size", 16, "--device", "cpu", "--json")
    return run("distill", model, output, "--task", task, "--data", data, *usual, *options)


def test_distill_a_classifier_of_pairs(model, tmp_path, monkeypatch):
    """Data in two files, transfer rows with other names for the texts and with labels that mean nothing here."""
    seen = {}

    def convert(dense, config, *, calibration, seed):
        seen["data"] = calibration.data
        return convert_ffn_to_fff(dense, config, calibration=calibration, seed=seed)

    monkeypatch.setattr(work, "convert_ffn_to_fff", convert)
    data = [write(tmp_path / f"{n}.tsv", "classification", 30, columns={"label": "verdict"}) for n in (1, 2)]
    names = {"sentence1": "question1", "sentence2": "question2"}
    other = write(tmp_path / "other.tsv", "classification", 40, seed=1, columns=names)
    other.write_text(other.read_text().replace("\t2\n", "\tno label\n"))
    options = ["--data", data[1], "--transfer", other, "--label-column", "verdict", "--steps", 40]
    options += ["--text-columns", "sentence1,sentence2"]
    result = distill_task(model, tmp_path / "fast", "classification", data[0], *options)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["distillation"]
    assert (told["task"], told["metric"], told["rows"], told["held_out"]) == ("classification", "accuracy", 54, 6)
    assert told["steps"] == 40 and told["cosine_before"] < told["cosine"] < 1
    assert all(0 <= told[name] <= 1 for name in ("score_before", "score", "score_teacher"))
    assert sum(len(batch["input_ids"]) for batch in seen["data"]) == 94
    assert all(set(batch) == {"input_ids", "token_type_ids", "attention_mask"} for batch in seen["data"])
    assert all(bool(batch["token_type_ids"].any(1).all()) for batch in seen["data"])
    fast = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert type(fast).__name__ == "FastBertForSequenceClassification" and len(fast.config.fff_layers) == 3
    head = AutoModelForSequenceClassification.from_pretrained(model).classifier.weight
    assert not torch.equal(fast.classifier.weight, head) and (fast.classifier.weight - head).abs().max() < 0.1
    assert not (tmp_path / "fast.work").exists()


def test_what_distilling_a_task_tells(model, tmp_path):
    data = write(tmp_path / "data.tsv", "classification", 40)
    given = ("--fff", "none", "--task", "classification", "--data", data, "--steps", 2, "--calibration-steps", 1)
    result = run("distill", model, tmp_path / "fast", *given)
    assert "distilling: 100%" in result.stderr and "{" not in result.output  # no dicts, as the Trainer prints them
    shown = unwrapped(result.stdout)
    assert "accuracy 0." in shown and "of the dense model (2 steps on 36 rows, 4 held out" in shown


def test_distill_a_masked_language_model(text, tmp_path):
    tiny_bert(HEADS["ForMaskedLM"]).save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    more = write(tmp_path / "more.jsonl", "mlm", 30, seed=1)
    usual = ("--fff", "2x3", "--steps", 40, "--calibration-steps", 3, "--batch-size", 16, "--json", "--device", "cpu")
    result = run(
        "distill", tmp_path / "lm", tmp_path / "fast", "--task", "mlm", "--text", text, "--transfer", more, *usual
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["distillation"]
    assert (told["task"], told["metric"], told["rows"], told["held_out"]) == ("mlm", "accuracy", 138, 12)
    fast = AutoModelForMaskedLM.from_pretrained(tmp_path / "fast")
    assert type(fast).__name__ == "FastBertForMaskedLM"
    assert fast.get_output_embeddings().weight is fast.get_input_embeddings().weight


def test_distilling_a_task_goes_on_where_it_was_interrupted(model, tmp_path, monkeypatch):
    data, other = (write(tmp_path / f"{seed}.tsv", "classification", 40, seed=seed) for seed in (0, 1))
    options = ("--transfer", other, "--save-steps", 2)
    assert distill_task(model, tmp_path / "whole", "classification", data, *options).exit_code == 0
    save = DistillationTrainer._save_checkpoint

    def interrupted(self, *args):
        save(self, *args)
        if self.state.global_step == 4:
            raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "_save_checkpoint", interrupted)
        result = distill_task(model, tmp_path / "fast", "classification", data, *options)
    assert result.exit_code == 1 and "the power is gone" in result.stderr
    result = distill_task(model, tmp_path / "fast", "classification", data, "--save-steps", 2)
    assert result.exit_code == 2 and "made with other options (transfer: " in unwrapped(result.stderr)
    result = distill_task(model, tmp_path / "fast", "classification", data, *options)
    assert result.exit_code == 0, result.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "fast")]
    assert weights[0] == weights[1]


WRONG_TASK = {
    "name": (["--task", "translation"], "has no logits to distil (allowed: classification"),
    "file": (["--data", "{0}/nowhere.tsv"], "--data"),
    "kind of file": (["--transfer", "{0}/dense"], "--transfer"),
    "column": (["--label-column", "verdict"], "there is no column 'verdict'"),
    "texts": (["--text-columns", "a,b"], "there is no column 'a'"),
    "transfer": (["--transfer", "{0}/text.txt"], "transfer row 1 is not of the form of the labelled rows"),
    "label": (["--data", "{0}/wrong.tsv"], "label='7' is no label (allowed: 0 to 2"),
    "head": (["--task", "regression"], "num_labels=3 are classes, not a number"),
    "gpu": (["--device", "cuda"], "no GPU"),
    "length": (["--max-length", "2"], "--max-length=2"),
    "cropped": (["--crop", "0.5"], "is for distillation without a task"),
}


@pytest.mark.parametrize("name", WRONG_TASK)
def test_distill_a_task_used_wrongly(model, text, tmp_path, name):
    if name == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options, message = WRONG_TASK[name]
    data = write(tmp_path / "data.tsv", "classification", 40)
    (tmp_path / "wrong.tsv").write_text("sentence1\tsentence2\tlabel\n" + "word1\tword2\t7\n" * 40)
    before = listing(tmp_path)
    given = (option.format(tmp_path) for option in options)
    result = distill_task(model, tmp_path / "fast", "classification", data, *given)
    assert result.exit_code == 2 and message in unwrapped(result.stderr), result.output
    assert listing(tmp_path) == before and result.stdout == ""


def test_distill_out_of_memory(model, text, tmp_path, monkeypatch):
    def convert(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(work, "convert_ffn_to_fff", convert)
    before = listing(tmp_path)
    result = distill(model, text, tmp_path / "fast")
    assert result.exit_code == 1 and listing(tmp_path) == before
    assert "out of memory while calibrating: lower the calibration's --max-tokens" in unwrapped(result.stderr)


def test_distill_wants_data(model, tmp_path):
    for options, message in (
        (["--task", "classification"], "is needed with --task classification"),
        ([], "is needed, or"),
    ):
        result = run("distill", model, tmp_path / "fast", "--fff", "2x3", "--steps", 2, *options)
        assert result.exit_code == 2 and message in unwrapped(result.stderr)


@pytest.mark.parametrize("command", ["distill", "choose"])
def test_bf16_is_for_gpus(model, text, tmp_path, command):
    more = ("--fff", "none", "--steps", 2) if command == "distill" else ("--task", "embeddings", "--keep", 0.9)
    result = run(command, model, tmp_path / "out", "--text", text, *more, "--bf16", "--device", "cpu")
    assert result.exit_code == 2 and "leave it out" in unwrapped(result.stderr)
    assert not (tmp_path / "out").exists()
