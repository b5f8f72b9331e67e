"""The benchmark of whole models: what it times, and that it looks before it times. No test here asserts a speed."""

import json
import random

import pytest
import torch
from command import run, unwrapped
from tiny import HEADS, tiny_bert

from hf_fff import convert_ffn_to_fff
from hf_fff.bench import model as bench
from hf_fff.bench import timing

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def pad(rows):
    """A collator written by hand: zeros behind."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {k: torch.tensor([row[k] + [0] * (longest - len(row[k])) for row in rows]) for k in rows[0]}


def rows_of(*lengths):
    return [
        {"input_ids": [n + 5] * length, "attention_mask": [1] * length, "labels": n} for n, length in enumerate(lengths)
    ]


def test_random_ids():
    work = bench.random_ids(3, 7, 50)
    assert work.name == "3x7" and all(b["input_ids"].shape == (3, 7) for b in work.batches)
    assert work.tokens == 21 * len(work.batches)
    assert min(int(b["input_ids"].min()) for b in work.batches) >= 0
    assert max(int(b["input_ids"].max()) for b in work.batches) < 50
    again, other = bench.random_ids(3, 7, 50), bench.random_ids(3, 7, 50, seed=1)
    assert torch.equal(work.batches[0]["input_ids"], again.batches[0]["input_ids"])
    assert not torch.equal(work.batches[0]["input_ids"], other.batches[0]["input_ids"])


def test_real_rows():
    """Every row comes as often as the others, with its own length, and without labels."""
    lengths = (2, 3, 5, 9)
    work = bench.real_rows(rows_of(*lengths), pad, 1)
    assert [b["input_ids"].shape[0] for b in work.batches] == [1] * 16 and work.name == "1"
    seen = [int(b["input_ids"][0, 0]) - 5 for b in work.batches]
    assert sorted(seen) == sorted([0, 1, 2, 3] * 4)
    assert all(b["input_ids"].shape[1] == lengths[n] for n, b in zip(seen, work.batches, strict=True))
    assert set(work.batches[0]) == {"input_ids", "attention_mask"} and work.tokens == 4 * sum(lengths)
    (batch,) = bench.real_rows(rows_of(*lengths), pad, 32).batches
    assert batch["input_ids"].shape == (32, 9) and int(batch["attention_mask"].sum()) == 8 * sum(lengths)


def test_what_is_told(monkeypatch):
    times = {"dense": 2.0, "fast": 0.5}
    monkeypatch.setattr(bench, "interleaved", lambda calls, **_: {name: times[name] for name in calls})
    dense = tiny_bert()
    models = {"dense": dense, "fast": convert_ffn_to_fff(dense, "2x3").train()}
    (timing,) = bench.time_models(models, [bench.Workload("w", bench.random_ids(2, 5, 100).batches[:1])])
    assert timing.tokens == 10 and timing.seconds == times
    assert timing.microseconds == {"dense": 200_000.0, "fast": 50_000.0}
    assert timing.ratios == {"dense": 1.0, "fast": 0.25}
    assert not models["fast"].training


def test_a_call_goes_through_all_batches():
    seen = []
    model = tiny_bert()
    model.register_forward_pre_hook(lambda _, args, named: seen.append(named["input_ids"]), with_kwargs=True)
    work = bench.random_ids(1, 4, 100)
    call = bench._call("m", model, work)
    seen.clear()
    call()
    assert len(seen) == len(work.batches)
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(seen, work.batches, strict=True))


def test_turns_are_in_random_order():
    calls = []
    names = ("a", "b", "c")
    told = timing.interleaved(
        {name: lambda name=name: calls.append(name) for name in names},
        rounds=40,
        seconds=1e-9,
        order=random.Random(0),
    )
    assert tuple(told) == names  # the results are in the order that was given
    turns = [tuple(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert len(turns) == 40 and all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) == 6


def test_what_is_not_finite_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "interleaved", lambda *a, **k: pytest.fail("timed"))
    broken = tiny_bert()
    with torch.no_grad():
        broken.embeddings.word_embeddings.weight[7] = float("nan")
    batches = [{"input_ids": torch.tensor([[7, 8]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}]
    with pytest.raises(RuntimeError, match="the output of broken is not finite: nothing was timed"):
        bench.time_models({"fine": tiny_bert(), "broken": broken}, [bench.Workload("w", batches)])


def test_what_a_model_does_not_take():
    for work, message in (
        (bench.random_ids(1, 65, 100), "rows of 65 tokens, and m takes at most 64"),
        (bench.random_ids(9, 30, 200), "and m knows 120 ids"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.time_models({"m": tiny_bert()}, [work])


def test_the_limit_of_each_dtype():
    dense = tiny_bert()
    models = {"d": dense, "t": convert_ffn_to_fff(dense, "1x2"), "n": convert_ffn_to_fff(dense, "none")}
    assert bench.limits(models) == dict.fromkeys("dtn", "n")
    mixed = convert_ffn_to_fff(dense, {0: "none", 1: "1x2"})
    assert bench.limits({"d": dense, "m": mixed}) == {}
    other = tiny_bert().to(torch.bfloat16)
    assert bench.limits({**models, "b": other}) == dict.fromkeys("dtn", "n")
    timing = bench.Timing("w", 1, {"d": 4.0, "t": 2.0, "n": 1.0})
    assert timing.shares(bench.limits(models)) == {"d": 0.25, "t": 0.5, "n": 1.0} and timing.shares({}) == {}


def test_random_models():
    models = bench.random_models(
        "bert-tiny", ["dense", "1x3", "none"], {"float32": torch.float32, "bfloat16": torch.bfloat16}
    )
    assert list(models) == [f"{k} {d}" for d in ("float32", "bfloat16") for k in ("dense", "1x3", "none")]
    for name, model in models.items():
        assert all(p.dtype == getattr(torch, name.split()[1]) for p in model.parameters()) and not model.training
    with pytest.raises(ValueError, match="size 'bert-huge' is not known"):
        bench.random_models("bert-huge", ["dense"], {})


def test_neurons_that_are_visited():
    model = convert_ffn_to_fff(tiny_bert(), "2x3").eval()
    work = bench.random_ids(1, 1, 100)
    assert bench.visited(model, work) == [8] * len(model.config.fff_layers)  # one token: a path in each tree
    more = bench.visited(model, bench.random_ids(4, 8, 100))
    assert all(8 < count <= 30 for count in more)
    assert bench.visited(tiny_bert(), work) == []


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForQuestionAnswering"])
def test_models_are_loaded_with_their_heads(tmp_path, head):
    dense = tiny_bert(HEADS[head])
    dense.save_pretrained(tmp_path / "dense")
    convert_ffn_to_fff(dense, "1x2").save_pretrained(tmp_path / "fast")
    assert type(bench.load_model(str(tmp_path / "dense"))) is type(dense)
    assert type(bench.load_model(str(tmp_path / "fast"))).__name__ == f"FastBert{head}"


@pytest.fixture
def folders(tmp_path):
    from task_rows import tiny_tokenizer

    dense = tiny_bert(HEADS["ForSequenceClassification"])
    models = {"dense": dense, "fast": convert_ffn_to_fff(dense, "1x2")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("word1 word2\nword3\n")
    return [str(tmp_path / name) for name in models]


def test_the_command(folders, tmp_path):
    result = run("bench", "model", *folders, "--batch", "1x3,2x8", "--rounds", 3, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [(row["workload"], row["tokens"]) for row in told["rows"]] == [("1x3", 12), ("2x8", 64)] and told["cpu"]
    for row in told["rows"]:
        assert list(row["seconds"]) == folders and row["ratios"][folders[0]] == 1
        assert row["microseconds"][folders[1]] == pytest.approx(1e6 * row["seconds"][folders[1]] / row["tokens"])
    result = run("bench", "model", *folders, "--batch", "1,4", "--text", tmp_path / "text.txt", "--rounds", 3)
    assert result.exit_code == 0 and "1.00x" in result.stdout and "microseconds a token" in result.stdout


def test_the_command_with_a_size(tmp_path):
    import csv

    files = tmp_path / "a.csv", tmp_path / "a.png"
    options = ("--fff", "1x3,none", "--dtype", "float32,bfloat16", "--batch", "1x3", "--rounds", 3)
    result = run("bench", "model", "--size", "bert-tiny", *options, "--csv", files[0], "--plot", files[1], "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert list(row["seconds"]) == [f"{k} {d}" for d in ("float32", "bfloat16") for k in ("dense", "1x3", "none")]
    assert set(json.loads(result.stdout)["visited"]) == {"workload", "1x3 float32", "1x3 bfloat16"}
    assert row["shares"]["none float32"] == row["shares"]["none bfloat16"] == 1
    lines = {line["model"]: line for line in csv.DictReader(files[0].open())}
    seconds = row["seconds"]["1x3 float32"]
    assert float(lines["1x3 float32"]["milliseconds"]) == pytest.approx(1e3 * seconds / 4)  # four batches a call
    assert files[1].read_bytes().startswith(b"\x89PNG")


WRONG = {
    "shape": (["--batch", "1x0"], 2, "'1x0' is not a list of ROWSxTOKENS"),
    "rows alone": (["--batch", "32"], 2, "'32' is not a list of ROWSxTOKENS"),
    "shape of text": (["--batch", "1x4", "--text", "{0}/text.txt"], 2, "is not a list of numbers of rows"),
    "text": (["--batch", "1", "--text", "{0}/nowhere.txt"], 2, "nowhere.txt"),
    "device": (["--device", "abacus"], 2, "'abacus' is no device"),
    "length": (["--batch", "1x65"], 2, "takes at most 64"),
    "model": (["{0}"], 2, "is no model"),
    "folders and a size": (["--size", "bert-tiny"], 2, "one of the two"),
    "plot": (["--plot", "a.doc"], 2, "must end in one of"),
}
ALONE = {
    "neither": ([], "give model folders, or --size"),
    "size": (["--size", "bert-huge"], "size 'bert-huge' is not known (allowed: bert-tiny"),
    "kind": (["--size", "bert-tiny", "--fff", "8y8"], "KxD"),
    "dtype": (["--size", "bert-tiny", "--dtype", "int4"], "'int4' is not known (allowed: float32, bfloat16)"),
    "text": (["--size", "bert-tiny", "--text", "a.txt", "--batch", "1"], "needs a model's tokenizer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_command_used_wrongly(folders, tmp_path, name):
    options, exit_code, message = WRONG[name]
    result = run("bench", "model", *folders, *(option.format(tmp_path) for option in options))
    assert result.exit_code == exit_code, result.output
    assert message.replace(" ", "") in unwrapped(result.stderr).replace(" ", ""), (
        result.output
    )  # a path may be cut in two


@pytest.mark.parametrize("name", ALONE)
def test_the_command_without_folders_used_wrongly(name):
    options, message = ALONE[name]
    result = run("bench", "model", *options)
    assert result.exit_code == 2 and message in unwrapped(result.stderr), result.output
