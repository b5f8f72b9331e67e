"""The benchmark of deployed models: real processes with tiny models; no test here asserts a speed."""

import csv
import io
import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from command import run, unwrapped
from task_rows import WORDS, tiny_tokenizer
from tiny import tiny_bert

from hf_fff import convert_ffn_to_fff
from hf_fff.bench import load, page, process, serve
from hf_fff.bench.serve import Served, System

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def test_engines_that_are_missing(monkeypatch):
    assert serve.missing("torch-f32") is None
    monkeypatch.setitem(serve.ENGINES, "torchao-int8", ("no-such-package",))
    assert serve.missing("torchao-int8") == "no-such-package is not installed"
    with pytest.raises(ValueError, match="engine 'tvm' is not known .allowed: torch-f32"):
        serve.missing("tvm")


def test_workloads():
    work = serve.workloads(["1x16", "8x128", "mixed"], 100)
    assert [w.name for w in work] == ["1x16", "8x128", "mixed"]
    assert [len(w.batches) for w in work] == [4, 1, 1]  # few tokens go through several paths
    batch = work[2].batches[0]
    assert batch["attention_mask"].sum(1).tolist() == list(serve.LENGTHS) and work[2].tokens == sum(serve.LENGTHS)
    texts = [" ".join(WORDS[: 1 + i % 7]) for i in range(40)]
    (real,) = serve.workloads(["mixed"], 100, texts=texts, tokenizer=tiny_tokenizer())
    assert real.name == "mixed" and real.batches[0]["input_ids"].shape[0] == 32
    assert 0 < real.batches[0]["attention_mask"].float().mean() < 1


def served(model, engine, seconds, **facts):
    return Served(System(model, engine), {"w": seconds}, {"w": 2 * seconds}, **facts)


def test_records():
    found = [
        served("dense", "torch-f32", 1.0),
        served("dense", "openvino-int8", 0.25, cold_start=3.0, peak_memory=5_000_000),
        served("none", "openvino-int8", 0.1),
        served("8x8", "openvino-int8", 0.2, cosine=0.9),
    ]
    rows = serve.records(found, [{"workload": "w", "tokens": 7, "others": 0.5}], trained=False)
    assert [r["to_torch"] for r in rows] == [1, 4, 10, 5]
    assert [r["to_openvino"] for r in rows] == [0.25, 1, pytest.approx(2.5), 1.25]
    assert [r["share_of_the_limit"] for r in rows] == [None, pytest.approx(0.4), 1, 0.5]
    assert rows[1]["cold_start"] == 3 and rows[1]["peak_mb"] == 5 and rows[3]["cosine"] == 0.9
    assert {r["weights"] for r in rows} == {"random"} and rows[0]["milliseconds"] == 1000 and rows[0]["p95"] == 2000
    rows = serve.records(found[3:], [{"workload": "w"}], trained=True)
    assert rows[0]["to_torch"] is None and rows[0]["to_openvino"] == 1 and rows[0]["weights"] == "trained"


def quality_line(fff, cosine, run="general", **told):
    kept = {"unseen_short": {"cosine": cosine, "neighbours": cosine - 0.25}}
    return json.dumps({"run": run, "fff": fff, "steps": 9, "batch_size": 4, "distilled": kept, **told})


def test_what_distilled_models_keep(tmp_path):
    """Means over seeds, of the rates that kept the most; other runs do not count, nor do trainings that fewer kinds have had."""
    lines = [
        quality_line("8x8", 0.5),
        quality_line("8x8", 0.75, learning_rate=1),
        quality_line("8x8", 0.875, learning_rate=1),
    ]
    lines += [quality_line("8x8", 1.0, run="rates"), quality_line("none", 0.375), json.dumps({"run": "calibration"})]
    lines += [quality_line("none", 0.875, run="long", steps=99, batch_size=8)]
    (tmp_path / "lines").write_text("\n".join(lines))
    found = serve.fidelities(tmp_path / "lines")
    assert (
        found["8x8"] == {"cosine": 0.8125, "neighbours": 0.5625, "runs": 2, "training": "9 steps of 4 texts"}
        and found["none"]["runs"] == 1
    )
    assert found["dense"]["cosine"] == 1 and set(found) == {"dense", "8x8", "none"}
    longer = [quality_line("8x8", 0.9375, run="long", steps=99, batch_size=8)]
    (tmp_path / "lines").write_text("\n".join(lines + longer))
    assert (
        serve.fidelities(tmp_path / "lines")["8x8"]["cosine"] == 0.9375
    )  # as many kinds have had it, and it is the longer one
    rows = serve.records(
        [served("8x8", "openvino-int8", 1.0), served("1x11", "openvino-int8", 1.0)], [{"workload": "w"}], False, found
    )
    assert [r["distilled_cosine"] for r in rows] == [0.8125, None] and rows[0]["distilled_runs"] == 2
    for wrong, message in (
        ("{", "does not hold lines"),
        ("[]", "does not hold lines"),
        (lines[3], "no lines of the run"),
    ):
        (tmp_path / "lines").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            serve.fidelities(tmp_path / "lines")


def test_page_of_equal_fidelity(tmp_path):
    """A tree against the smallest MLP that keeps as much, or the one that keeps most; random weights are marked in every row."""
    quality = {"mlp:72": 0.92, "mlp:224": 0.94, "8x8": 0.93, "32x6": 0.95, "1x11": 0.91}
    seconds = {"mlp:72": 0.02, "mlp:224": 0.04, "8x8": 0.025, "32x6": 0.08, "1x11": 0.016}
    fidelity = {
        kind: {"cosine": c, "neighbours": c / 2, "runs": 1, "training": "9 steps of 4 texts"}
        for kind, c in quality.items()
    }
    found = [served("dense", "openvino-int8", 0.1), *(served(kind, "openvino-int8", s) for kind, s in seconds.items())]
    rows = serve.records(found, [{"workload": "w", "others": 0.0, "load": 0.0}], False, fidelity)
    told = {
        "cpu": "Some CPU", "cores": 2, "threads": 2, "isa": "avx512", "caches": {}, "torch": "2", "transformers": "5", "python": "3", "hf_fff": "0",
        "date": "a day", "load": {"before": 0, "after": 0, "others": 0}, "seconds": 7, "versions": {}, "size": "minilm", "tree_rows": "int8",
        "rounds": 3, "left_out": {}, "rows": rows,
    }  # fmt: skip
    (tmp_path / "serve-minilm.json").write_text(json.dumps({**told, "command": "serve"}))  # no serve.json beside it
    (written,) = page.write_pages(tmp_path)
    assert written.name == "serve.md"
    lines = written.read_text().splitlines()
    assert "from `serve-minilm.json`" in lines[2] and (tmp_path / "serve.png").is_file()
    assert "| openvino-int8 | 8x8 | random: speed alone | 25 ms, **4.00x** | 0.930 | 0.465 |" in lines
    assert any("after general distillation, 9 steps of 4 texts, in float32" in line for line in lines)
    assert "| openvino-int8 | dense | random: speed alone | 100 ms, **1.00x** | - | - |" in lines
    assert "| openvino-int8 | 8x8 (0.930) | mlp:224 (0.940) | 1.60x ahead |" in lines
    assert "| openvino-int8 | 32x6 (0.950) | mlp:224 (0.940: keeps less) | 0.50x |" in lines
    assert "| openvino-int8 | 1x11 (0.910) | mlp:72 (0.920) | 1.25x ahead |" in lines


class Fake:
    """A server that answers from a list of seconds a call, and remembers who was asked."""

    asked: ClassVar = []

    def __init__(self, told, name, errors):
        self.name, self.cold_start = name, 1.5
        self.process = SimpleNamespace(pid=0, stdin=io.StringIO(), wait=lambda seconds: 0)

    def ask(self, what, number=0, count=0):
        self.asked.append((what, self.name))
        return {"time": [0.1] * (count - 1) + [0.3], "memory": 99}[what]


def test_turns_are_in_random_order(monkeypatch):
    monkeypatch.setattr(process, "Server", Fake)
    monkeypatch.setattr(serve, "_finish", lambda *a: None)
    monkeypatch.setattr(load, "_clocks", lambda children=(): None)
    Fake.asked.clear()
    systems = [System(name, "torch-f32") for name in "abc"]
    found, facts = serve.bench_serve(dict.fromkeys("abc", "x"), systems, [serve.random_ids(1, 4, 9)], rounds=30)
    timed = [name for what, name in Fake.asked if what == "time"][3:]
    turns = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(turns) == 30 and all(len({*turn}) == 3 for turn in turns) and len({*turns}) == 6
    # calls of a turn: 0.2 s by the fastest of two; medians over four batches a call
    assert found[0].seconds == {"1x4": pytest.approx((0.1 + 0.3) / 2 / 4)} and found[0].p95 == {"1x4": 0.3 / 4}
    assert found[0].peak_memory == 99 and found[0].cold_start == 1.5 and found[0].cosine is None
    assert facts[0]["workload"] == "1x4" and facts[0]["tokens"] == 4 and facts[0]["others"] is None


def test_a_process_that_ends(tmp_path):
    with pytest.raises(RuntimeError, match=r"torch-f32 m ended: .*nowhere"):
        serve.bench_serve({"m": str(tmp_path / "nowhere")}, [System("m", "torch-f32")], [serve.random_ids(1, 4, 9)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    dense = tiny_bert(initializer_range=0.1)
    for name, model in {"dense": dense, "2x3": convert_ffn_to_fff(dense, "2x3")}.items():
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    texts = [" ".join(WORDS[(i + 7 * j) % 100] for j in range(4 + i % 9)) for i in range(40)]
    (root / "texts.txt").write_text("\n".join(texts))
    return root


def opened(folders, tmp_path, engine, model="2x3"):
    told = {"engine": engine, "source": str(folders / model), "root": str(tmp_path), "made": str(tmp_path / "made")}
    told |= {"threads": 1, "rows": "auto"}
    serve._make(told)
    return serve._opened(told)


@pytest.mark.parametrize(
    "engine",
    [
        "torch-packed",
        "torch-packed-bf16",
        "torch-packed-int8",
        pytest.param("onnxruntime-int8", marks=pytest.mark.full),
    ],
)
def test_engines_give_what_torch_does(folders, tmp_path, engine):
    if why := serve.missing(engine):
        pytest.skip(why)
    batch = {"input_ids": torch.arange(5, 45).view(4, 10), "attention_mask": torch.ones(4, 10, dtype=torch.long)}
    with torch.no_grad():
        found, want = (opened(folders, tmp_path, name)(batch) for name in (engine, "torch-f32"))
    assert not torch.equal(found, want)
    assert torch.nn.functional.cosine_similarity(found, want, dim=-1).median() > 0.98


def test_folders(folders, tmp_path):
    """Served from real processes: fidelity is that of the models, and a page is made of what is told."""
    pytest.importorskip("nncf", reason="nncf is not installed")
    files = ("--csv", tmp_path / "a.csv", "--plot", tmp_path / "a.png")
    options = ("--engines", "torch-f32,openvino-int8", "--batch", "1x4,mixed", "--rounds", 3, "--threads", 1)
    result = run(
        "bench",
        "serve",
        folders / "dense",
        folders / "2x3",
        "--text",
        folders / "texts.txt",
        *options,
        *files,
        "--json",
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    names = [(r["engine"], r["model"], r["workload"]) for r in told["rows"]]
    systems = [("torch-f32", "dense"), ("openvino-int8", "dense"), ("openvino-int8", "2x3")]
    assert names == [(*system, work) for system in systems for work in ("1x4", "mixed")]
    cosines = [r["cosine"] for r in told["rows"][::2]]
    assert cosines[0] == pytest.approx(1) and cosines[1] > 0.95 and cosines[2] < cosines[1]
    assert all(
        r["peak_mb"] > 50 and r["cold_start"] > 0 and r["p95"] >= 0 and r["weights"] == "trained" for r in told["rows"]
    )
    assert told["threads"] == 1 and told["size"] is None and told["load"]
    assert len(list(csv.DictReader((tmp_path / "a.csv").open()))) == 6
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "serve.json").write_text(result.stdout)
    (written,) = page.write_pages(tmp_path)
    text = written.read_text()
    assert written.name == "serve.md" and "openvino-int8" in text and "random weights" not in text


@pytest.mark.full
def test_random_weights():
    result = run(
        "bench", "serve", "--size", "bert-tiny", "--fff", "none", "--engines", "torch-f32,torch-bf16", "--fff-engines", "torch-f32",
        "--batch", "1x4", "--rounds", 3, "--threads", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    shown = unwrapped(result.stdout)
    assert "torch-bf16" in shown and "Weights are random" in shown and "none" in shown


WRONG = {
    "batch": (["--batch", "1x0"], "'1x0' is not a list of ROWSxTOKENS"),
    "engine": (["--engines", "tvm"], "engine 'tvm' is not known"),
    "other engine": (["--fff-engines", "tvm"], "engine 'tvm' is not known"),
    "no engine": (["--engines", ","], "none of them can be used"),
    "size": (["--size", "bert-huge"], "size 'bert-huge' is not known"),
    "kind": (["--fff", "8y8"], "KxD"),
    "length": (["--batch", "1x513"], "1x513 is longer than the models take"),
    "text": (["--text", "a.txt"], "needs a model's tokenizer"),
    "no text": (["dense"], "int8 looks at some hundreds"),
    "plot": (["--plot", "a.doc"], "must end in one of"),
    "keep": (["--keep", "nowhere/a"], "there is no folder nowhere"),
    "fidelity": (["--fidelity", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "fidelity of folders": (["dense", "--text", __file__, "--fidelity", __file__], "is for random weights"),
}


@pytest.mark.parametrize("name", WRONG)
def test_used_wrongly(name, monkeypatch):
    monkeypatch.setattr(serve, "bench_serve", lambda *a, **k: pytest.fail("timed"))
    options, message = WRONG[name]
    result = run("bench", "serve", *options)
    assert result.exit_code == 2 and message in unwrapped(result.stderr) and result.stdout == "", result.output


def test_an_engine_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setitem(serve.ENGINES, "torchao-int8", ("no-such-package",))
    monkeypatch.setattr(serve, "bench_serve", lambda sources, systems, *a, **k: ([], []))
    monkeypatch.setattr(serve, "records", lambda *a: [])
    result = run("bench", "serve", "--engines", "torch-f32,torchao-int8", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["left_out"] == {"torchao-int8": "no-such-package is not installed"}
