"""Trees beside MLPs inside OpenVINO, with tiny shapes; no test here asserts a speed."""

import json
from contextlib import nullcontext
from importlib import import_module
from importlib.metadata import version

import oracle
import pytest
import torch
from command import run, unwrapped

from hf_fff import FFFConfig, ops
from hf_fff.bench import frontier, kept, layer, machine, page
from hf_fff.bench.load import Patience

TREES = ["fff", "int8 rows", "bf16 rows"]


@pytest.fixture
def openvino():
    pytest.importorskip("nncf", reason="nncf is not installed")
    pytest.importorskip("openvino.frontend", reason="openvino is not installed")
    return import_module("openvino")


class Engine:
    """Answers as the engine's process does, and remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self.process = type("Process", (), {"pid": 1})

    def ask(self, *question):
        self.asked.append(question)
        return 0.001 * question[2]  # seconds: as many milliseconds as there are threads


@torch.no_grad()
def test_rows(monkeypatch):
    monkeypatch.setattr(frontier, "tree_loops", lambda fff, x, packed: {"fff": lambda repeats: 2e-6})
    server, fff = Engine(), layer.random_layer(FFFConfig(2, 3), 16)
    records = frontier._cell(fff, 4, server, 5, [1, 2], ["mlp:7"], 3, Patience())
    rows = [frontier.Row(**record) for record in json.loads(json.dumps(records))]
    assert [(row.threads, row.fff, row.tokens, row.nodes) for row in rows] == [(1, "2x3", 5, 30), (2, "2x3", 5, 30)]
    for row in rows:
        assert row.loop == {"fff": 2.0}
        assert row.engine == dict.fromkeys([*TREES, "mlp:7", frontier.EMPTY], pytest.approx(1000 * row.threads))
    assert {question[:4] for question in server.asked} == {
        (4, 5, n, name) for n in (1, 2) for name in [*TREES, "mlp:7", frontier.EMPTY]
    }
    lines = frontier.as_lines(rows)
    assert lines[0]["microseconds"] == 2 and lines[0]["a_token"] == 0.4 and lines[-1]["where"] == "openvino"


def test_layers_of_the_engine(openvino):
    """Against the oracle, and the MLP against itself in float32: it is int8, and no other layer."""
    torch.manual_seed(0)
    fff, x = layer.random_layer(FFFConfig(2, 3), 16).fff, torch.randn(6, 16)
    expected = torch.from_numpy(oracle.fff(x, fff.weight_in, fff.bias_in, fff.weight_out, 2, "gelu")[0])
    core = openvino.Core()

    def called(graph):
        return torch.from_numpy(core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0])

    assert torch.allclose(called(frontier.tree_graph(fff, "f32")).double(), expected.double(), atol=1e-5)
    mlp = layer.dense_layer(fff, 7).eval()
    with torch.no_grad():
        wanted = mlp(x)
        graph = frontier.mlp_graph(mlp, [torch.randn(8, 16) for _ in range(4)])
    kinds = [node.get_type_name() for node in graph.get_ordered_ops()]
    assert kinds.count("MatMul") == 2 and kinds.count("FakeQuantize") >= 2
    error = (called(graph) - wanted).norm() / wanted.norm()
    assert 0 < error < 0.1


@pytest.mark.full
def test_command(openvino, tmp_path):
    ran = run(
        "bench", "layer", "--engine", "openvino", "--fff", "2x3", "--hidden-size", 16, "--against", "mlp:7", "--tokens", "1,5", "--threads", 1,
        "--rounds", 3, "--keep", tmp_path / "cells", "--json",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert told["command"] == "frontier" and set(told["versions"]) == {"openvino", "nncf"}
    assert [row["tokens"] for row in told["rows"]] == [1, 5] and not (tmp_path / "cells").exists()
    for row in told["rows"]:
        assert set(row["engine"]) == {*TREES, "mlp:7", frontier.EMPTY} and min(row["engine"].values()) > 0
        assert set(row["loop"]) == (set(TREES) if ops.backend() == "native" else set())


def test_used_wrongly(monkeypatch):
    monkeypatch.setattr(frontier, "bench_frontier", lambda *a, **k: pytest.fail("timed"))
    monkeypatch.setattr(machine, "version", lambda name: "1")
    for options, message in (
        (["--engine", "tvm"], "engine 'tvm' is not known (allowed: openvino)"),
        (["--engine", "openvino", "--dtype", "bfloat16"], "takes layers of float32"),
    ):
        ran = run("bench", "layer", *options)
        assert ran.exit_code == 2 and message in unwrapped(ran.stderr) and ran.stdout == "", ran.output
    monkeypatch.setattr(machine, "version", version)
    monkeypatch.setitem(frontier.ENGINES, "openvino", ("no-such-package",))
    ran = run("bench", "layer", "--engine", "openvino")
    assert ran.exit_code == 2 and "pip install 'hf-fff[openvino]'" in unwrapped(ran.stderr)


def frontier_row(fff, threads, tokens, loop, int8, mlp, others=0.0):
    engine = {
        "fff": 90.0,
        "int8 rows": int8,
        "bf16 rows": 70.0,
        "mlp:107": mlp,
        "mlp:3072": 600.0,
        frontier.EMPTY: 10.0,
    }
    size = {
        "fff": fff,
        "hidden_size": 768,
        "weights": "random",
        "threads": threads,
        "tokens": tokens,
        "visited": 9,
        "nodes": 4095,
    }
    loops = {"fff": 50.0, "int8 rows": loop, "bf16 rows": 40.0}
    return {**size, "loop": loops, "engine": engine, "others": others}


def test_page():
    machine = {
        "cpu": "Some CPU", "cores": 2, "threads": 2, "isa": "avx512", "caches": {}, "torch": "2", "transformers": "5", "python": "3", "hf_fff": "0",
        "date": "a day", "load": {"before": 0, "after": 0, "others": 0}, "seconds": 7, "versions": {"openvino": "1"},
    }  # fmt: skip
    rows = [
        frontier_row("1x11", 2, 128, 20.0, 30.0, 46.0),
        frontier_row("1x11", 2, 1024, 400.0, 500.0, 266.0),
        frontier_row("1x11", 2, 16, 4.0, 12.0, 8.0, others=1.0),
    ]
    text = "\n".join(page.frontier_page({**machine, "rows": rows}))
    # 20 µs of 128 tokens; 36 is the MLP less the call
    assert "| 1x11 | int8 rows, in a loop | 0.25 * | 0.156 (1.80x) | 0.391 (0.64x) |" in text
    assert "| 1x11 | int8 rows, OpenVINO | 0.75 (0.67x) * | 0.234 (1.53x) | 0.488 (0.53x) |" in text
    assert "| 1x11 | mlp:107, less the call | less than the call * | 0.281 | 0.25 |" in text
    assert (
        "trees are ahead of their MLP: 1x11 at 128 tokens; they are not: 1x11 at 1024." in text
    )  # at 16 it was disturbed
    assert "| 1x11 | int8 rows | 50.0x * | 20.0x | 1.2x |" in text and "| 1x11 | float32 rows | 6.7x *" in text
    assert "| 1x11 | 0.25, goal 0.3 **reached** * | 0.156, goal 0.2 **reached** | 0.391, goal 0.15 |" in text


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    """A cell that was finished is not measured again."""
    asked = []

    def cell(of, number, server, tokens, *_):
        asked.append(tokens)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [frontier_row("2x3", 1, tokens, 1.0, 1.0, 1.0)]

    monkeypatch.setattr(frontier, "_cell", cell)
    monkeypatch.setattr(frontier.process, "served", lambda *a: nullcontext())
    layers = [layer.random_layer(FFFConfig(2, 3), 16)]

    def bench():
        return frontier.bench_frontier(layers, [1, 5], kept=kept.Kept(tmp_path / "cells", {"a": 1}))

    with pytest.raises(KeyboardInterrupt):
        bench()
    assert [row.tokens for row in bench()] == [1, 5] and asked == [1, 5, 5]
