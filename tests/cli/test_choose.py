"""``hf-fff choose``: on a task that needs the FFN, the candidate wins that can hold all of it; and wrong use writes nothing."""

import json
import shlex

import pytest
import torch
from command import listing, run, unwrapped
from task_rows import tiny_tokenizer
from tiny import HEADS, tiny_bert
from transformers import AutoModelForSequenceClassification

from hf_fff.bench.model import Timing
from hf_fff.choosing import search
from hf_fff.tasks import get_task
from hf_fff.training import DistillationArguments

TIMES = {"dense": 1.0, "none": 0.5, "mlp:4": 0.6, "2x2": 0.7, "mlp:64": 1.5}


def pairs(count, seed):
    """Whether the number of the first word is odd; the second one is there to mislead."""
    draws = torch.randint(0, 40, (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"sentence1": f"word{a}", "sentence2": f"word{b}", "label": a % 2} for a, b in draws]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model of one layer and four neurons that solves it, and that is trained to say "no" to everything where its FFN gives
    its mean: so nothing can be as good without one, and an MLP of four neurons can be the same."""
    torch.set_num_threads(1)
    model = tiny_bert(
        HEADS["ForSequenceClassification"], num_labels=2, intermediate_size=4, num_hidden_layers=1, hidden_size=16
    )
    task, tokenizer = get_task("classification"), tiny_tokenizer()
    data = task.encode(pairs(1600, 1), tokenizer, model.config)
    batch = task.collator(tokenizer)([data[i] for i in range(len(data))])
    cut = [False]
    hook = model.bert.encoder.layer[0].output.dense.register_forward_hook(
        lambda _, __, y: y.mean((0, 1), keepdim=True).expand_as(y) if cut[0] else None
    )
    steps = 150
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        draw = torch.randint(0, len(data), (128,))
        rows, loss = {k: v[draw] for k, v in batch.items()}, 0.0
        for cut[0], labels in ((False, rows["labels"]), (True, torch.zeros_like(rows["labels"]))):
            loss = loss + model(**rows | {"labels": labels}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    hook.remove()
    folder = tmp_path_factory.mktemp("model") / "dense"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def timed(monkeypatch):
    def time_models(models, workloads, **_):
        return [Timing(w.name, w.tokens, {name: TIMES.get(name, 0.6) for name in models}) for w in workloads]

    monkeypatch.setattr(search, "time_models", time_models)
    monkeypatch.setattr(search, "busy", lambda: None)


def choose(dense, output, data, *options):
    usual = ("--task", "classification", "--data", data, "--keep", 0.9, "--candidates", "2x2,none,mlp:64,mlp:4")
    usual += ("--steps", 4, "--calibration-steps", 150, "--batch-sizes", "1,4", "--device", "cpu", "--no-mixed")
    return run("choose", dense, output, *usual, *options)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "train.jsonl", pairs(400, 2))


def test_choose(dense, data, tmp_path):
    before = listing(tmp_path)
    result = choose(dense, tmp_path / "fast", data, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["chosen"] == "mlp:4" and told["layers"] == {"0": "mlp:4"} and told["metric"] == "accuracy"
    assert told["dense"]["score"] == 1 and told["held_out"] == 80
    found = {c["candidate"]: c for c in told["candidates"]}
    assert list(found) == ["none", "mlp:4", "2x2", "mlp:64"]  # by time
    assert 0.3 < found["none"]["share"] < 0.7
    assert 0.9 <= found["mlp:4"]["share"] == found["mlp:4"]["score"] and found["mlp:4"]["steps"] == 4
    notes = {"2x2": "not trained: slower than what is chosen", "mlp:64": "slower than the dense model: skipped"}
    assert {name: found[name]["note"] for name in notes} == notes
    assert all(found[name]["share"] is None for name in notes)
    # eight groups of ten rows: at chance, accuracy has a standard error of about sqrt(1/4/80)
    assert 0.02 < found["none"]["error"] < 0.12
    assert told["frontier"] == ["none", "mlp:4"]
    assert {k: v for k, v in listing(tmp_path).items() if not k.startswith("fast")} == before  # no work folder
    fast = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert {c.shorthand for c in fast.config.fff_layers.values()} == {"mlp:4"}
    assert (tmp_path / "fast" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    # on rows that are new to all: the model that was written is the one that was measured
    task, rows = get_task("classification"), pairs(300, 3)
    encoded = task.encode(rows, tiny_tokenizer(), fast.config)
    with torch.no_grad():
        batch = task.collator(tiny_tokenizer())([encoded[i] for i in range(len(encoded))])
        logits = fast(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert sum(int(p) == r["label"] for p, r in zip(logits.argmax(-1), rows, strict=True)) / 300 > 0.85


def test_choose_goes_on_where_it_was_interrupted(dense, data, tmp_path, monkeypatch):
    assert choose(dense, tmp_path / "whole", data).exit_code == 0
    distil, calls = search.distil_folder, []

    def interrupted(source, output, config, *args, **options):
        calls.append(config)
        if len(calls) == 2:
            raise RuntimeError("the power is gone")
        return distil(source, output, config, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(search, "distil_folder", interrupted)
        result = choose(dense, tmp_path / "fast", data)
    assert result.exit_code == 1 and "the power is gone" in result.stderr and not (tmp_path / "fast").exists()
    kept = listing(tmp_path / "fast.work")
    result = choose(dense, tmp_path / "fast", data, "--seed", 1)
    assert result.exit_code == 2 and "made with other options" in unwrapped(result.stderr)
    assert listing(tmp_path / "fast.work") == kept
    monkeypatch.setattr(search, "distil_folder", lambda *a, **k: (calls.append(a[2]), distil(*a, **k)))
    assert choose(dense, tmp_path / "fast", data).exit_code == 0
    assert calls == ["none", "mlp:4", "mlp:4"] and not (tmp_path / "fast.work").exists()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "fast")]
    assert weights[0] == weights[1]


def test_nothing_keeps_enough(dense, data, tmp_path):
    """What to type next is printed, and finds what was trained."""
    eval_data = write(tmp_path / "eval data.jsonl", pairs(60, 4))
    options = ("--eval-data", eval_data, "--candidates", "none", "--plot", tmp_path / "frontier.png", "--no-resume")
    result = choose(dense, tmp_path / "fast", data, *options)
    assert result.exit_code == 1 and not (tmp_path / "fast").exists()
    told = unwrapped(result.stderr)
    output = tmp_path / "fast"
    assert f"than the dense model keeps 90.0% of its accuracy: {output} was not made. The best is none with " in told
    assert "in 0.50 of its time" in told and f"What was trained is kept in {output}.work" in told
    shown = unwrapped(result.stdout)
    assert "accuracy on 60 held-out rows" in shown and "keeps too little" in shown and "1.00" in shown
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"  # what it was is asked for
    (command,) = (line for line in result.stderr.splitlines() if line.strip().startswith("hf-fff choose"))
    trained = (output.with_name("fast.work") / "models" / "none-4" / "model.safetensors").read_bytes()
    result = run(*shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert "calibrating" not in result.stderr and not output.with_name("fast.work").exists()
    assert (output / "model.safetensors").read_bytes() == trained


def test_a_higher_budget_goes_on(dense, data, tmp_path):
    options = ("--task", "classification", "--data", data, "--keep", 0.9, "--candidates", "none", "--device", "cpu")
    first = run("choose", dense, tmp_path / "fast", *options, "--budget", 1)
    assert first.exit_code == 1, first.output
    known = json.loads((tmp_path / "fast.work" / "search.json").read_text())["results"]["none"]
    (command,) = (line for line in first.stderr.splitlines() if "--budget 2" in line)
    result = run(*shlex.split(command)[1:], "--json")
    assert result.exit_code == 1 and "calibrating" not in result.stderr
    told = json.loads(result.stdout)
    assert told["candidates"][0]["steps"] >= known["steps"] + 50 and told["chosen"] is None
    assert told["work"] == str(tmp_path / "fast.work")


def test_choose_for_embeddings(dense, tmp_path):
    """General distillation, on texts; all rows are unlike those that are held out."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"word{i} word{i * 7 % 100} word{i * 3 % 90}" for i in range(100)))
    options = ("--task", "embeddings", "--text", text, "--candidates", "mlp:4", "--batch-size", 16, "--json")
    usual = ("--keep", 0.9, "--steps", 2, "--calibration-steps", 100, "--batch-sizes", 2)
    result = run("choose", dense, tmp_path / "fast", *usual, *options)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["metric"] == "cosine" and told["held_out"] == 20 and told["dense"]["score"] == pytest.approx(1)
    assert told["chosen"] == "mlp:4" and told["candidates"][0]["error"] is None  # too few rows to tell


def test_choose_different_kinds_for_different_layers(tmp_path, monkeypatch):
    """With all of the dense neurons in all layers nothing is lost; what mixed ones keep, lies between that and nothing."""
    monkeypatch.setitem(TIMES, "mlp:64", 0.8)
    tiny_bert().save_pretrained(tmp_path / "embedder")
    tiny_tokenizer().save_pretrained(tmp_path / "embedder")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"word{i} word{i * 7 % 100} word{i * 3 % 90}" for i in range(100)))
    given = (
        "--task",
        "embeddings",
        "--text",
        text,
        "--candidates",
        "none,mlp:64",
        "--batch-size",
        16,
        "--device",
        "cpu",
    )
    given += ("--keep", 0.995, "--steps", 2, "--calibration-steps", 200, "--batch-sizes", 2, "--json")
    result = run("choose", tmp_path / "embedder", tmp_path / "fast", *given)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    found = {c["candidate"]: c for c in told["candidates"]}
    mixed = [c for c in found.values() if c["layers"]]
    assert [list(c["layers"].values()).count("mlp:64") for c in mixed] == [2] and told["chosen"] == "mlp:64"
    assert found["none"]["share"] < mixed[0]["share"] < found["mlp:64"]["share"] and mixed[0]["steps"] == 2


WRONG = {
    "candidate": (["--candidates", "none,9"], "fff='9' is not of the form"),
    "no candidates": (["--candidates", " ,"], "there are none"),
    "keep": (["--keep", "0"], "--keep"),
    "keep too much": (["--keep", "1.01"], "1.01 must lie above 0, and be 1 at most"),
    "engine": (["--engine", "onnx"], "'onnx' is not known (allowed: torch, openvino)"),
    "task": (["--task", "translation"], "task='translation' is not known"),
    "text": (["--text", "{0}/train.jsonl"], "classification learns from --data"),
    "steps and budget": (["--budget", "9"], "the same thing twice"),
    "batch sizes": (["--batch-sizes", "1,x"], "'1,x' is not a list of positive numbers"),
    "data": (["--data", "{0}/nowhere.tsv"], "--data"),
    "eval data": (["--eval-data", "{0}/nowhere.tsv"], "--eval-data"),
    "all held out": (["--eval-data", "{0}/train.jsonl"], "nothing to train on"),
    "no labels": (["--eval-data", "{0}/bare.jsonl"], "have no labels"),
    "transfer": (["--transfer", "{0}/other.jsonl"], "transfer row 1 is not of the form"),
    "label": (["--eval-data", "{0}/wrong.jsonl"], "label=7 is no label (allowed: 0 to 1"),
    "head": (["--task", "regression"], "are classes, not a number"),
    "plot": (["--plot", "{0}/frontier.doc"], "must end in one of .png"),
    "plot's folder": (["--plot", "{0}/nowhere/a.png"], "there is no folder"),
    "seed": (["--seed", "-1"], "--seed"),
    "output": (["--keep", "0.5"], "lies in the source"),
}


@pytest.mark.parametrize("name", WRONG)
def test_choose_used_wrongly(dense, data, tmp_path, name):
    options, message = WRONG[name]
    write(tmp_path / "bare.jsonl", [{k: r[k] for k in ("sentence1", "sentence2")} for r in pairs(9, 5)])
    write(tmp_path / "wrong.jsonl", [r | {"label": 7} for r in pairs(9, 5)])
    write(tmp_path / "other.jsonl", [{"text": "word1"}])
    before = listing(tmp_path), listing(dense)
    output = dense / "fast" if name == "output" else tmp_path / "fast"
    result = choose(dense, output, data, *(option.format(tmp_path) for option in options))
    assert result.exit_code == 2 and message in unwrapped(result.stderr), result.output
    assert (listing(tmp_path), listing(dense)) == before and result.stdout == ""


def test_choose_without_data(dense, tmp_path):
    for task, told in (("classification", "is needed"), ("mlm", "is needed, or --text")):
        result = run("choose", dense, tmp_path / "fast", "--task", task, "--keep", 0.9)
        assert result.exit_code == 2 and told in unwrapped(result.stderr)


def test_a_plot_without_matplotlib(dense, data, tmp_path, monkeypatch):
    from hf_fff.bench import plot

    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    result = choose(dense, tmp_path / "fast", data, "--plot", tmp_path / "a.png")
    assert result.exit_code == 2 and "pip install hf-fff[bench]" in unwrapped(result.stderr)
    assert not (tmp_path / "fast").exists()


def test_several_processes_are_refused(model, tmp_path, monkeypatch):
    """A search measures times."""
    monkeypatch.setattr(DistillationArguments, "world_size", 2)
    data = write(tmp_path / "data.jsonl", pairs(40, 0))
    result = choose(model, tmp_path / "fast", data)
    assert result.exit_code == 2 and "there are 2 processes, and a search measures times: start one" in unwrapped(
        result.stderr
    )
    assert not (tmp_path / "fast.work").exists()
