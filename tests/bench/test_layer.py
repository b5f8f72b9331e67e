"""The benchmark of one layer: it checks before it times. No test here asserts a speed."""

import json

import oracle
import pytest
import torch
from tiny import tiny_bert

from hf_fff import FFF, FFFConfig, convert_ffn_to_fff, ops
from hf_fff.bench import layer
from hf_fff.bench.load import Patience
from hf_fff.ops import loader

PASSES = {"forward": {"fff", "torch", "dense", "mlp:5"}, "backward": {"fff", "routing", "torch", "masked", "dense"}}


def bench(config, hidden=16, tokens=(8,), dtype=torch.float32, **options):
    return layer.bench_layers([layer.random_layer(config, hidden, dtype)], tokens, **{"rounds": 3, **options})


@pytest.mark.parametrize("dtype", list(layer.DTYPES))
def test_rows(dtype):
    rows = bench(FFFConfig(2, 3), 16, [1, 6], layer.DTYPES[dtype], threads=[1], against={"mlp:5": 5})
    assert [(row.tokens, row.threads) for row in rows] == [(1, 1), (6, 1)]
    assert {(row.fff, row.hidden_size, row.dtype, row.weights, row.nodes) for row in rows} == {
        ("2x3", 16, dtype, "random", 30)
    }
    looped = ops.backend() == "native" and dtype == "float32"
    passes = PASSES | {"forward": PASSES["forward"] | ({"int8 rows", "bf16 rows"} if looped else set())}
    for row in rows:
        assert {name: set(getattr(row, name)) for name in passes} == passes
        assert all(t > 0 for name in passes for t in getattr(row, name).values())
        assert set(row.loop) == (passes["forward"] - {"torch"} if looped else set())
        assert row.overhead == (pytest.approx(row.forward["fff"] - row.loop["fff"]) if looped else None)
        assert row.best == (row.loop or row.forward)
    assert json.loads(json.dumps(layer.as_records(rows)))[1]["tokens"] == 6


@pytest.mark.skipif(ops.backend() != "native", reason="the native CPU kernel is not available")
def test_wrong_packed_rows_are_not_timed():
    measured, other = (layer.random_layer(FFFConfig(2, 3), 16).fff for _ in range(2))
    x = torch.randn(50, 16)
    with torch.no_grad():
        layer.check_packed(measured, layer.packed_layers(measured), x)
        with pytest.raises(RuntimeError, match="the outputs of int8 rows are wrong"):
            layer.check_packed(measured, layer.packed_layers(other), x)


def test_threads_take_turns(monkeypatch):
    """Nothing is computed with two threads here."""
    before, seen = torch.get_num_threads(), []

    def take_turns(candidates, *, before, **_):
        for key in candidates:
            before(key)
            seen.append((key, torch.get_num_threads()))
        return {key: float(key[0]) for key in candidates}

    monkeypatch.setattr(layer, "interleaved", take_turns)
    monkeypatch.setattr(layer, "turns", take_turns)
    rows = bench(FFFConfig(1, 2), 8, [3, 4], threads=[1, 2])
    assert [(r.tokens, r.threads, r.forward["fff"]) for r in rows] == [
        (3, 1, 1e6),
        (3, 2, 2e6),
        (4, 1, 1e6),
        (4, 2, 2e6),
    ]
    assert all(key[0] == threads for key, threads in seen) and {key[1] for key, _ in seen} > {"fff", "dense", "masked"}
    assert torch.get_num_threads() == before


def test_backward_is_optional():
    (row,) = bench(FFFConfig(1, 2), 8, [3], backward=False)
    assert row.backward == {} and row.forward["dense"] > 0


def test_neurons_that_are_visited():
    """Counted by the oracle."""
    fff = FFF(9, FFFConfig(3, 4))
    x = torch.randn(20, 9)
    path = oracle.fff(x, fff.weight_in, fff.bias_in, fff.weight_out, 3)[1]
    want = {(tree, node) for token in path for tree, nodes in enumerate(token) for node in nodes}
    with torch.no_grad():
        assert layer.check_outputs(fff, x) == len(want)


def test_lines():
    row = layer.Row(
        "1x2", 8, "float32", "random", 1, 4, 5, 7, {"fff": 2.0, "dense": 6.0}, {"fff": 1.0, "dense": 5.0}, {}, None
    )
    lines = layer.as_lines([row])
    assert [(n["pass"], n["candidate"], n["microseconds"], n["ratio"]) for n in lines] == [
        ("forward", "fff", 2.0, 1.0), ("forward", "dense", 6.0, 3.0), ("loop", "fff", 1.0, 1.0), ("loop", "dense", 5.0, 5.0),
    ]  # fmt: skip


def test_thread_scaling():
    def row(threads, tokens, fff, dense, loop=None):
        times = {"fff": fff, "dense": dense}
        return layer.Row("1x2", 8, "float32", "random", threads, tokens, 5, 7, times, loop or {}, {}, None)

    rows = [row(1, 8, 8.0, 9.0), row(2, 8, 4.0, 6.0), row(1, 9, 1.0, 1.0, {"fff": 6.0, "dense": 8.0}),
            row(2, 9, 1.0, 1.0, {"fff": 4.0, "dense": 4.0}), row(1, 7, 1.0, 1.0)]  # fmt: skip
    told = layer.thread_scaling(rows)
    assert [(t["tokens"], t["threads"], t["faster"], t["dense"]) for t in told] == [
        (8, "1 -> 2", 2.0, 1.5),
        (9, "1 -> 2", 1.5, 2.0),
    ]


def test_what_was_disturbed_is_kept_with_what_disturbed_it():
    class Busy(Patience):
        def measure(self, threads, run):
            result, load = super().measure(threads, run)
            load.others = 1.5
            return result, load

    (row,) = bench(FFFConfig(1, 2), 8, [3], backward=False, patience=Busy())
    assert row.others == 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from task_rows import tiny_tokenizer

    path = tmp_path_factory.mktemp("trained") / "fast"
    with pytest.warns(UserWarning, match="not calibrated"):
        fast = convert_ffn_to_fff(tiny_bert(), {0: "2x3", 1: "mlp:4", 2: "1x2"})
    fast.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path, fast.eval()


TEXTS = ["word1 word2 word3", "word4", "word5 word6"]


def test_a_trained_layer_and_the_states_it_meets(folder):
    path, fast = folder
    trees = [m for m in fast.modules() if isinstance(m, FFF)]
    for source, tree in ((f"{path}:0", trees[0]), (f"{path}:2", trees[1]), (str(path), trees[1])):
        found = layer.trained_layer(source, TEXTS)
        assert torch.equal(found.fff.weight_in, tree.weight_in) and found.fff.config == tree.config
        assert found.weights == f"layer {0 if tree is trees[0] else 2} of fast"
    states = layer.trained_layer(f"{path}:0", TEXTS).states
    lone = layer.trained_layer(f"{path}:0", TEXTS[1:2]).states
    before = len(layer.trained_layer(f"{path}:0", TEXTS[:1]).states)
    assert torch.allclose(states[before : before + len(lone)], lone)  # one after the other, none padded
    rows = layer.bench_layers([layer.trained_layer(f"{path}:0", TEXTS)], [2], rounds=3)
    assert rows[0].weights == "layer 0 of fast" and rows[0].fff == "2x3"


def test_trained_layers_that_are_not_there(folder, tmp_path):
    path, _ = folder
    with pytest.raises(ValueError, match=r"layer 1 of .* is no tree \(those that are: 0, 2\)"):
        layer.trained_layer(f"{path}:1", TEXTS)
    tiny_bert().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="has no trees"):
        layer.trained_layer(str(tmp_path / "dense"), TEXTS)
    with pytest.raises(ValueError, match="500 tokens are more than the"):
        layer.bench_layers([layer.trained_layer(str(path), TEXTS)], [500], rounds=3)


def spoiled(change):
    honest = ops.fff_train

    def train(*args, **kwargs):
        y, path, logits = honest(*args, **kwargs)
        return change(y, path, logits)

    return train


@pytest.mark.parametrize(
    "change",
    [
        lambda y, path, logits: (y + 1e-2, path, logits),
        lambda y, path, logits: (y, torch.cat([path[..., :1], 3 - path[..., 1:2], path[..., 2:]], -1), logits),
    ],
    ids=["output", "path"],
)
def test_a_wrong_output_is_not_timed(monkeypatch, change):
    monkeypatch.setattr(ops, "fff_train", spoiled(change))
    monkeypatch.setattr(layer, "interleaved", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="output is wrong: nothing was timed"):
        bench(FFFConfig(2, 2))


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    honest, calls = ops.fff_train, []

    def train(*args):
        y, path, logits = honest(*args)
        calls.append(args)
        return y, path, logits + (len(calls) > 1)  # the first call is that of the check of the output

    monkeypatch.setattr(ops, "fff_train", train)
    monkeypatch.setattr(layer, "interleaved", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="the gradient of x is wrong: nothing was timed"):
        bench(FFFConfig(2, 2))


def test_without_the_library_of_loops(monkeypatch):
    """The rest is measured all the same."""
    load = loader.load
    monkeypatch.setattr(loader, "load", lambda name="cpu": loader.Status(name) if name == "bench" else load(name))
    (row,) = bench(FFFConfig(1, 2), 8, [3], backward=False)
    assert row.loop == {} and row.forward["dense"] > 0 and row.forward["fff"] > 0


@pytest.mark.parametrize("dtype", list(layer.DTYPES))
@pytest.mark.parametrize("shape", ["1x0", "1x5", "7x2"])
def test_other_shapes_and_many_tokens(monkeypatch, shape, dtype):
    """That the checks accept what is right; nothing is timed."""
    monkeypatch.setattr(layer, "interleaved", lambda candidates, **_: dict.fromkeys(candidates, 2e-3))
    monkeypatch.setattr(layer, "time_loops", lambda *_: {(1, "fff"): 1e-3})
    (row,) = bench(FFFConfig.from_shorthand(shape), 33, [2_000], layer.DTYPES[dtype], threads=[1])
    assert row.loop == {"fff": 1e3} and row.backward["masked"] == row.forward["fff"] == 2e3
