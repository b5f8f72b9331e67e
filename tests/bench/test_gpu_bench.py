"""The benchmark of the GPU, on the CPU with a clock that stands in for the GPU's: it checks before it times. No test here asserts a speed."""

import json
import statistics
import time

import pytest
import torch
from gpu_told import RATES, TOLD

from hf_fff import ops
from hf_fff.bench import cuda, page, plot, shapes
from hf_fff.ops import torch_backend

PLAN = cuda.Plan(
    fff=("2x3", "1x2"), hidden_size=16, tokens=(5, 70), backward_tokens=(70,), graph_tokens=(5,), dense=(24, 31), narrow=(4,),
    size="tiny", batches=("2x3",), kinds=("dense", "2x3", "none"), training=(("tiny", "2x3"),), rounds=3, limit=0.0,
)  # fmt: skip


class Host(cuda.Gpu):
    """The CPU in the place of a GPU."""

    def __init__(self):
        self.device = torch.device("cpu")

    def synchronize(self):
        pass

    def times(self, calls, *, rounds, limit):
        return {name: statistics.median(self.once(call) for _ in range(3)) for name, call in calls.items()}

    def once(self, call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def capture(self, call):
        return call

    def allocated(self):
        return 1_000_000

    def peak(self, run):
        run()
        return 3_000_000

    def free(self):
        pass

    def rates(self):
        return RATES


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(shapes.SIZES, "tiny", shapes.Size(8, 20, 1, 2))
    monkeypatch.setattr(cuda, "masked_backend", lambda: torch_backend)


def measure(*sections, **changes):
    told = cuda.bench_cuda(cuda.replace(PLAN, **changes), sections, gpu=Host())
    return json.loads(json.dumps(told))


def test_all_sections():
    told = measure(*cuda.SECTIONS)
    assert told["failed"] == {} and told["stopped"] == [] and told["rates"] == RATES and told["hidden_size"] == 16
    cells = [(row["section"], row["dtype"], row["work"]) for row in told["rows"]]
    assert cells == [
        *(("forward", dtype, tokens) for dtype in PLAN.dtypes for tokens in ("5", "70")),
        *(("backward", dtype, "70") for dtype in PLAN.dtypes),
        *(("graph", "bfloat16", "5"), ("model", "bfloat16", "2x3"), ("train", "bfloat16 autocast", "tiny 2x3")),
    ]
    for row in told["rows"]:
        assert row["left_out"] == {} and all(s > 0 for s in row["seconds"].values())
    forward, backward, graph, model, train = ({r["section"]: r for r in told["rows"]}[s] for s in cuda.SECTIONS)
    plain = {n for n in forward["seconds"] if "fused" not in n}
    dense = {"dense:24", "dense:31", "mlp:4"}
    assert plain == {"copy", "2x3", "1x2", "2x3 masked", "1x2 masked", *dense, *(f"{n} tf32" for n in dense)}
    ours = {f"{fff}{way}{routing}" for fff in PLAN.fff for way in ("", " masked") for routing in ("", " routing")}
    rivals = {"copy", *(f"dense:{n}{behind}" for n in (24, 31) for behind in ("", " tf32"))}
    assert set(backward["seconds"]) == ours | rivals
    assert {n for n in graph["seconds"] if "fused" not in n} == {"copy", "dense:24", "2x3", "1x2"}
    assert set(model["seconds"]) == {f"{kind}{graph}" for kind in PLAN.kinds for graph in ("", " graph")}
    assert set(train["seconds"]) == set(model["seconds"]) and train["peak_mb"] == dict.fromkeys(PLAN.kinds, 2.0)
    assert forward["checks"]["2x3"]["error"] < 1e-5 and forward["checks"]["2x3"]["agreeing"] == 1.0
    assert 10 < forward["checks"]["2x3"]["visited"] <= 30
    assert set(backward["checks"]["1x2 routing"]) == {"x", "weight_in", "bias_in", "weight_out"}


class Wrong:
    """The operators, with an error in one output."""

    def __init__(self, output):
        self.output = output

    def fff(self, *args):
        return torch_backend.fff(*args) * (1.1 if self.output == "y" else 1)

    def fff_train(self, *args):
        y, path, logits = torch_backend.fff_train(*args)
        return y, path.flip(0) if self.output == "path" else path, logits


@pytest.mark.parametrize(("output", "message"), [("y", "the output of it is wrong"), ("path", "turns the wrong way")])
def test_wrong_outputs_are_not_timed(output, message):
    (fff,) = cuda._layers(cuda.replace(PLAN, fff=("1x6",)), "float32", Host()).values()
    x = torch.randn(70, 16)
    assert cuda.check_forward("it", fff, x, torch_backend)["error"] < 1e-5
    with pytest.raises(cuda.Wrong, match=f"{message}, at 70 tokens"):
        cuda.check_forward("it", fff, x, Wrong(output))


@pytest.mark.parametrize("wrong", ["x", "weight_in", "bias_in", "weight_out"])
def test_wrong_gradients_are_not_timed(monkeypatch, wrong):
    (fff,) = cuda._layers(cuda.replace(PLAN, fff=("2x3",)), "float32", Host()).values()
    x, grad_y = torch.randn(2, 70, 16)
    _, path, logits = ops.fff_train(x, *cuda._weights(fff))
    assert max(cuda.check_backward("it", fff, grad_y, x, path, logits, (3.0, 1.0)).values()) < 1e-5
    honest, at = torch.ops.hf_fff.fff_backward, ("x", "weight_in", "bias_in", "weight_out").index(wrong)

    def dishonest(*args):
        grads = list(honest(*args))
        grads[at] = grads[at] * 1.01
        return grads

    monkeypatch.setattr(torch.ops.hf_fff, "fff_backward", dishonest)
    with pytest.raises(cuda.Wrong, match=f"the gradient of {wrong} of it is wrong .relative error 0.01"):
        cuda.check_backward("it", fff, grad_y, x, path, logits)


def test_a_section_that_fails_keeps_the_others(monkeypatch):
    def wrong(*_):
        raise RuntimeError("the output of 2x3 is wrong\nand more")

    monkeypatch.setattr(cuda, "check_forward", wrong)
    told = measure("forward", "graph")
    assert told["failed"] == {"forward": "the output of 2x3 is wrong"}
    assert [row["section"] for row in told["rows"]] == ["graph"]


def trees(call):
    """Of an operator with its arguments; None of anything else."""
    return next((a for a in getattr(call, "args", ()) if isinstance(a, int)), None)


@pytest.mark.parametrize("section", ["forward", "backward", "graph"])
def test_what_is_wrong_is_told_and_the_others_are_timed(monkeypatch, section):
    def wrong(name, fff, *_):
        if fff.config.shorthand == "2x3":
            raise cuda.Wrong(f"{name} is wrong")
        return {}

    monkeypatch.setattr(cuda, "check_forward", wrong)
    monkeypatch.setattr(cuda, "check_backward", wrong)
    host = Host()
    if section == "graph":
        host.capture = lambda call: (lambda: 2 * call()) if trees(call) == 2 else call
    told = json.loads(json.dumps(cuda.bench_cuda(cuda.replace(PLAN, dtypes=("float32",)), [section], gpu=host)))
    timed = {name for row in told["rows"] for name in row["seconds"]}
    assert "1x2" in timed and "2x3" not in timed and "dense:24" in timed
    what = "2x3 gives something else in a CUDA graph, at 5 tokens" if section == "graph" else "2x3 is wrong"
    assert what in told["failed"][section]


def test_time_is_over():
    told = measure("forward", "graph", seconds=0.0)
    assert told["rows"] == [] and told["stopped"] == ["forward", "graph"] and told["failed"] == {}


def test_a_candidate_that_does_not_run_is_left_out(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cuda, "_dense_backward", lambda *_: full)
    (row, _) = measure("backward")["rows"]
    assert row["left_out"] == dict.fromkeys(("dense:24", "dense:31"), "CUDA out of memory.")
    assert "2x3" in row["seconds"] and "dense:24" not in row["seconds"]


def test_quick_is_a_part():
    whole, quick = cuda.Plan(), cuda.Plan().quick()
    for name in ("fff", "tokens", "backward_tokens", "graph_tokens", "dense", "batches"):
        assert set(getattr(quick, name)) < set(getattr(whole, name))
    assert 131072 in quick.tokens and quick.rounds < whole.rounds and quick.limit < whole.limit
    assert cuda.replace(PLAN, fff=("4x9",)).quick().fff == ("4x9",)


def test_the_dense_layer_is_the_faster_of_two():
    seconds = {"dense:3": 3.0, "dense:3 fused": 2.0, "dense:3 tf32": 1.5, "mlp:1": 4.0}
    assert cuda.best(seconds, "dense:3") == 2.0 and cuda.best(seconds, "dense:3", " tf32") == 1.5
    assert cuda.best(seconds, "mlp:1") == 4.0 and cuda.best(seconds, "mlp:2") is None


def test_least_bytes():
    config = cuda.FFFConfig(1, 11)
    assert cuda.bytes_a_token("forward", config, 768, "bfloat16", 1000, 4095) == 2 * (1536 + 4095 * 1537 / 1000)
    backward = cuda.bytes_a_token("backward", config, 768, "float32", 1000, 4095)
    assert backward == 4 * (3 * 768 + 2 * 4095 * 1537 / 1000) + 8 * 12


def test_lines():
    forward, backward, routing = cuda.lines(TOLD)
    assert (forward["section"], forward["tokens"], forward["fff"], forward["routing"]) == (
        "forward",
        131072,
        "1x11",
        False,
    )
    ratios = {n: round(forward[n], 9) for n in ("dense:3072", "masked", "mlp:12", "copy")}
    assert ratios == {"dense:3072": 8.0, "masked": 12.0, "mlp:12": 0.6, "copy": 0.4}
    assert forward["bytes_a_token"] == pytest.approx(3072 + 4095 * 1537 * 2 / 131072)
    assert forward["share"] == pytest.approx(forward["bytes_a_token"] * 131072 / 2.5e-4 / 2e12)
    assert forward["error"] == 0.004 and forward["agreeing"] == 0.999 and forward["microseconds"] == pytest.approx(250)
    assert (forward["way"], backward["way"], routing["way"]) == ("tiles", None, "dense")
    assert backward["error"] == 0.002 and backward["masked"] == pytest.approx(8) and backward["agreeing"] is None
    assert (
        routing["routing"] and routing["masked"] == pytest.approx(1.8) and routing["dense:3072"] == pytest.approx(0.8)
    )
    assert len(plot.csv_lines(cuda.lines(TOLD))) == 4


def test_page(tmp_path):
    (tmp_path / "cuda-layer.json").write_text(json.dumps(TOLD))
    (written,) = page.write_pages(tmp_path)
    text = written.read_text()
    assert written.name == "cuda-layer.md" and {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert "# How fast this is on a GPU: Some GPU" in text and "2000 GB/s" in text and "(cuda-layer.png)" in text
    assert "FFFs in CUDA kernels; a day. It took 77 s." in text
    for line in (
        "| **1x11** | 250 µs |",
        "| against dense:3072 | 8.00x |",
        "| against masked | 12x |",
        "| dense:3072 fused | 2 ms (124%) |",  # 2 * 2 * 131072 * 768 * 3072 operations
        "| dense:3072 | 4 ms (124%) |",
        "| copy | 100 µs |",
        "| 1x11 | 131072 | tiles | 3168 | 83 % | 4.0e-03 | 99.90% |",
        "| **1x11, routing gradient** | 5 ms |",
        "| 1x11 bfloat16, forward, 131072 tokens | dense:3072 | 8x | 8.00x | yes |",
        "| 1x11 bfloat16, backward, 131072 tokens | dense:3072 | 3x | 4.00x | yes |",
        "| 8x8 | 3.2 ms | 1.25x | 94% | yes |",
        "| 8x8 graph | 1.8 ms | 1.11x | 56% | no |",
        "| bert-base 32x128 | 8x8 | 40 ms | 1.25x | 4000 MB |",
        "Left out: mlp:256 (forward, bfloat16, 131072): CUDA out of memory.",
        "**train failed**: it was late",
        "There was no time for all of graph.",
    ):
        assert line in text.splitlines(), line


def test_a_page_without_layers_has_no_picture(tmp_path):
    (tmp_path / "cuda-model.json").write_text(json.dumps({**TOLD, "rows": TOLD["rows"][2:]}))
    (written,) = page.write_pages(tmp_path)
    assert "png" not in written.read_text() and not list(tmp_path.glob("*.png"))


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(ops, "no_gpu", lambda: "there is none in this machine")
    with pytest.raises(RuntimeError, match="`hf-fff bench cuda` needs a GPU: there is none"):
        cuda.Gpu()


@pytest.mark.gpu
def test_on_a_gpu():
    """Every section once, tiny."""
    told = cuda.bench_cuda(PLAN, gpu=cuda.Gpu())
    assert told["failed"] == {} and {row["section"] for row in told["rows"]} == set(cuda.SECTIONS)
    assert all(row["left_out"] == {} for row in told["rows"] if row["section"] != "model") and all(
        rate > 0 for rate in told["rates"].values()
    )
