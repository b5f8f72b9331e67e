"""``hf-fff bench layer`` and ``scaling``: what they print and write, and that wrong use times nothing. ``model``: tests/bench/test_model.py."""

import csv
import json

import pytest
import torch
from command import listing, run, unwrapped
from gpu_told import TOLD
from tiny import tiny_bert

from hf_fff import convert_ffn_to_fff, ops
from hf_fff.bench import cuda, layer, machine, scaling, shapes
from hf_fff.bench.load import Load

SMALL = ("--hidden-size", 16, "--tokens", "1,5", "--threads", 1, "--rounds", 3)


def test_layer(tmp_path):
    files = tmp_path / "a.csv", tmp_path / "a.png"
    options = (
        "--fff",
        "2x3,1x2",
        "--dtype",
        "float32,bfloat16",
        "--against",
        "mlp:7",
        "--csv",
        files[0],
        "--plot",
        files[1],
    )
    ran = run("bench", "layer", *SMALL, *options, "--json")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    cells = [(row["fff"], row["dtype"], row["tokens"]) for row in told["rows"]]
    assert cells == [(f, d, t) for f in ("2x3", "1x2") for d in ("float32", "bfloat16") for t in (1, 5)]
    assert {"cpu", "cores", "torch", "transformers", "date", "load", "seconds", "caches"} <= set(told) and told[
        "command"
    ] == "layer"
    assert all("mlp:7" in row["forward"] for row in told["rows"])
    lines = list(csv.DictReader(files[0].open()))
    packed = {"int8 rows", "bf16 rows"} if ops.backend() == "native" else set()
    assert {line["candidate"] for line in lines} == {"fff", "dense", "torch", "mlp:7", "masked", "routing", *packed}
    assert all(line["cpu"] == told["cpu"] and float(line["microseconds"]) > 0 for line in lines)
    assert files[1].read_bytes().startswith(b"\x89PNG") and len(listing(tmp_path)) == 2


def test_layer_prints_tables():
    table = run("bench", "layer", "--fff", "2x3", *SMALL, "--no-backward")
    assert table.exit_code == 0 and "microseconds" in table.stdout and "backward" not in table.stdout
    assert "cores" in table.stdout and "load average" in table.stdout


def test_numbers_fit_into_80_columns(monkeypatch):
    """And what was not measured is no number."""
    times = {"fff": 22222.2, "dense": 111111.4, "torch": 999999.0}
    rows = [
        layer.Row("8x8", 768, "float32", "random", n, tokens, 9, 4088, {f: n * t for f, t in times.items()}, loop, back, 0.0)
        for n, tokens, loop, back in (
            (1, 4096, {"fff": 4444.0, "dense": 33333.0}, {"fff": 66.66, "dense": 55.0, "masked": 555555.0, "torch": 7.0, "routing": 7.777}),
            (2, 1, {}, {}),
        )
    ]  # fmt: skip
    monkeypatch.setattr(layer, "bench_layers", lambda *a, **k: rows)
    shown = run("bench", "layer").stdout.splitlines()
    lines = [line.split() for line in shown]
    assert "4096 111111 999999 22222 5.0x 33333 4444 7.5x".split() in lines
    assert "4096 55 555555 7 66.7 0.8x 8334x 7.78 7.1x".split() in lines
    assert "1 222223 1999998 44444 5.0x - - -".split() in lines
    assert max(map(len, shown)) <= 80


def test_threads_are_compared(monkeypatch):
    rows = [
        layer.Row(
            "1x2", 8, "float32", "random", n, 512, 5, 7, {"fff": 8.0 / n, "dense": 9.0, "torch": 1.0}, {}, {}, None
        )
        for n in (1, 2)
    ]
    monkeypatch.setattr(layer, "bench_layers", lambda *a, **k: rows)
    assert "512 1 -> 2 2.00x 1.00x" in " ".join(run("bench", "layer", "--threads", "1,2").stdout.split())


def test_a_trained_layer_beside_a_random_one(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="not calibrated"):
        convert_ffn_to_fff(tiny_bert(), "1x2").save_pretrained(tmp_path / "fast")
    tokenizer.save_pretrained(tmp_path / "fast")
    (tmp_path / "text.txt").write_text("word1 word2 word3\nword4\n")
    options = (
        "--weights",
        f"{tmp_path / 'fast'}:1",
        "--inputs",
        tmp_path / "text.txt",
        "--tokens",
        3,
        "--threads",
        1,
        "--rounds",
        3,
    )
    ran = run("bench", "layer", *options, "--json")
    assert ran.exit_code == 0, ran.output
    rows = json.loads(ran.stdout)["rows"]
    assert [(row["weights"], row["fff"]) for row in rows] == [("layer 1 of fast", "1x2"), ("random", "1x2")]
    assert len({row["hidden_size"] for row in rows}) == 1


def test_finished_cells_are_kept_until_all_is_told(tmp_path, monkeypatch):
    """They are of the same measurement where the options are, but for those on which no figure depends."""
    file, heads = tmp_path / "cells", []
    monkeypatch.setattr(layer, "bench_layers", lambda *a, kept, **k: heads.append(file.read_text()) or [])
    for options in ((), ("--rounds", 4), ("--patience", 5)):
        ran = run("bench", "layer", "--keep", file, *options, "--json")
        assert ran.exit_code == 0 and not file.exists(), ran.output
    assert heads[0] == heads[2] != heads[1]

    def interrupted(*a, **k):
        raise RuntimeError("no more")

    monkeypatch.setattr(layer, "bench_layers", interrupted)
    assert run("bench", "layer", "--keep", file).exit_code == 1 and file.exists()


def test_scaling(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SIZES, "tiny", shapes.Size(8, 20, 1, 2))
    monkeypatch.setattr(scaling, "BUFFERS", (1,))
    files = tmp_path / "a.csv", tmp_path / "a.png"
    options = (
        "--sizes",
        "tiny",
        "--tokens",
        "1,5",
        "--threads",
        1,
        "--rounds",
        3,
        "--csv",
        files[0],
        "--plot",
        files[1],
    )
    ran = run("bench", "scaling", *options, "--json")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert [(row["name"], row["tokens"], row["theory"]) for row in told["rows"]] == [("tiny", 1, 5.0), ("tiny", 5, 5.0)]
    assert told["bandwidth"][0]["gb_per_second"] > 0 and told["load"] and told["cpu"]
    assert [line["fff"] for line in csv.DictReader(files[0].open())] == ["1x3", "1x3"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    table = run("bench", "scaling", *options)
    assert table.exit_code == 0 and "theory" in table.stdout and "GB/s" in table.stdout


def test_a_busy_machine_is_told(monkeypatch):
    monkeypatch.setattr(
        layer, "bench_layers", lambda *a, patience, **k: patience.loads.append(Load(1.0, 2.0, 1.7)) or []
    )
    ran = run("bench", "layer", "--json")
    assert "the machine was busy: other processes used up to 1.7" in unwrapped(ran.stderr)
    monkeypatch.setattr(
        layer, "bench_layers", lambda *a, patience, **k: patience.loads.append(Load(1.0, 2.0, 0.1)) or []
    )
    assert run("bench", "layer", "--json").stderr == ""


@pytest.mark.parametrize(("after", "busy"), [(9.0, True), (0.5, False), (None, False)])
def test_a_busy_machine_that_tells_only_its_load_average(monkeypatch, after, busy):
    def measure(*args, patience, **kwargs):
        patience.loads.append(Load(1.0, after, None))
        return []

    monkeypatch.setattr(layer, "bench_layers", measure)
    assert ("the machine was busy: load average 1.0" in unwrapped(run("bench", "layer", "--json").stderr)) is busy


def test_patience_is_passed_on(monkeypatch):
    given = []
    monkeypatch.setattr(layer, "bench_layers", lambda *a, patience, **k: given.append(patience.seconds) or [])
    run("bench", "layer", "--patience", 90, "--json")
    assert given == [90.0]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--tokens", v) for v in ("1,x", "0", "", "1,,2", "-3")]
    + [("--threads", v) for v in ("0", "1 2", "")]
    + [("--against", v) for v in ("3072", "mlp:0", "tree:3", "dense:3,,")]
    + [("--fff", v) for v in ("2y3", "8x8,mlp:72", "")]
    + [("--dtype", "int8"), ("--hidden-size", "0"), ("--rounds", "2"), ("--patience", "-1"), ("--inputs", "a.txt")]
    + [("--csv", "nowhere/a.csv"), ("--plot", "nowhere/a.png"), ("--plot", "a.doc")],
)
def test_layer_used_wrongly(monkeypatch, tmp_path, option, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layer, "bench_layers", lambda *a, **k: pytest.fail("timed"))
    result = run("bench", "layer", option, value)
    assert result.exit_code == 2 and option in unwrapped(result.stderr) and result.stdout == ""
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("option", "value"), [("--sizes", "bert-base,x"), ("--sizes", ""), ("--tokens", "0"), ("--plot", "a.doc")]
)
def test_scaling_used_wrongly(monkeypatch, option, value):
    monkeypatch.setattr(scaling, "bench_scaling", lambda *a, **k: pytest.fail("timed"))
    result = run("bench", "scaling", option, value)
    assert result.exit_code == 2 and option in unwrapped(result.stderr) and result.stdout == ""


@pytest.mark.parametrize(
    ("option", "value"),
    [("--tokens", v) for v in ("1,x", "0", "-3")]
    + [("--fff", v) for v in ("2y3", "8x8,mlp:72", "none")]
    + [("--only", v) for v in ("forward,sideways", "", "layer")]
    + [("--dtype", "int8"), ("--hidden-size", "0"), ("--rounds", "2"), ("--csv", "nowhere/a.csv"), ("--plot", "a.doc")],
)
def test_cuda_used_wrongly(monkeypatch, tmp_path, option, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cuda, "Gpu", lambda: pytest.fail("began"))
    result = run("bench", "cuda", option, value)
    assert result.exit_code == 2 and option in unwrapped(result.stderr) and result.stdout == ""
    assert listing(tmp_path) == {}


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(ops, "no_gpu", lambda: "there is none in this machine")
    result = run("bench", "cuda", "--quick", "--json")
    assert result.exit_code == 1 and result.stdout == ""
    assert "error: `hf-fff bench cuda` needs a GPU: there is none in this machine" in unwrapped(result.stderr)


@pytest.mark.parametrize("failed", [{}, {"train": "it was late"}])
def test_cuda(monkeypatch, tmp_path, failed):
    """What is measured is printed and written, whatever failed."""
    given = []

    def measure(plan, sections, *, gpu, tell):
        given.append((plan, sections, gpu))
        return {n: TOLD[n] for n in ("hidden_size", "size", "rounds", "rates", "rows", "stopped")} | {"failed": failed}

    monkeypatch.setattr(cuda, "Gpu", lambda: "a gpu")
    monkeypatch.setattr(cuda, "bench_cuda", measure)
    monkeypatch.setattr(machine, "gpu", lambda: TOLD["gpu"])
    options = ("--fff", "1x11,2x3", "--tokens", "7,9", "--only", "graph,train", "--dtype", "float32", "--rounds", 5)
    ran = run("bench", "cuda", *options, "--csv", tmp_path / "a.csv", "--json")
    assert ran.exit_code == (1 if failed else 0), ran.output
    told = json.loads(ran.stdout)
    assert told["rows"] == TOLD["rows"] and told["device"] == "Some GPU" and told["failed"] == failed
    assert told["line"] == "hf-fff bench cuda --fff 1x11,2x3 --tokens 7,9 --dtype float32 --only graph,train --rounds 5"
    ((plan, sections, gpu),) = given
    assert sections == ["graph", "train"] and gpu == "a gpu" and plan.fff == ("1x11", "2x3") and plan.rounds == 5
    assert plan.tokens == plan.backward_tokens == plan.graph_tokens == (7, 9) and plan.dtypes == ("float32",)
    assert len(list(csv.DictReader((tmp_path / "a.csv").open()))) == 3
    assert ("it was late" in ran.stderr) is bool(failed)
    assert "| **1x11** | 250 µs |" in run("bench", "cuda", "--quick").stdout and given[1][0] == cuda.Plan().quick()


def test_a_layer_that_is_wrong(monkeypatch):
    honest = ops.fff_train
    monkeypatch.setattr(ops, "fff_train", lambda *a: (honest(*a)[0] + 1, *honest(*a)[1:]))
    result = run("bench", "layer", "--fff", "2x3", "--hidden-size", 16, "--tokens", 4, "--json")
    assert result.exit_code == 1 and "output is wrong" in result.stderr and result.stdout == ""


def test_a_backend_without_loops(monkeypatch):
    monkeypatch.setattr(ops, "backend", lambda device="cpu": "torch")
    (row,) = json.loads(run("bench", "layer", "--fff", "1x2", *SMALL[:2], "--tokens", 2, *SMALL[4:], "--json").stdout)[
        "rows"
    ]
    assert row["loop"] == {} and row["overhead"] is None and torch.get_num_threads() >= 1
