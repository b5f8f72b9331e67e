"""Calibration: does it fit, is it reproducible, what does it take, and does the report tell the truth?"""

import gc
import itertools
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny import HEADS, same, tiny_bert
from transformers import AutoModel, AutoTokenizer

from hf_fff import Calibration, convert_ffn_to_fff
from hf_fff.graphs import StepGraphs
from hf_fff.layers import FFF
from hf_fff.models import FAMILIES
from hf_fff.surgery import calibration
from hf_fff.surgery import text as text_module
from hf_fff.surgery.calibration import _dense_layer, _Layers, _pieces
from hf_fff.surgery.text import as_batches, in_random_order, read_texts

PLAN = Calibration(None, steps=60, batch_tokens=512, learning_rate=1e-2, held_out=0.3, progress=False)


def random_ids(rows=600, tokens=16, seed=0):
    return torch.randint(5, 120, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def plan(data=None, **options):
    return replace(PLAN, **{"data": random_ids() if data is None else data, **options})


def fit(model, config="4x4", **options):
    return convert_ffn_to_fff(model, config, calibration=plan(**options))


def test_fits_better_than_a_constant_and_better_with_more_steps():
    model = tiny_bert()
    long, short = fit(model).calibration_report, fit(model, steps=1).calibration_report
    assert long.steps == 60 and long.tokens == 9600 and long.seconds > long.collect_seconds > 0
    assert list(long.unexplained) == [0, 1, 2]
    for layer, unexplained in long.unexplained.items():
        assert 0 < unexplained < min(0.95, short.unexplained[layer])
        assert short.unexplained[layer] < 1.05


@pytest.mark.parametrize("config", ["4x4", {0: "1x6", 2: "4x3"}], ids=str)
def test_the_report_tells_the_truth(tmp_path, config):
    """Weighted unexplained variance on fresh text, of the model as saved, with plain torch."""
    model = tiny_bert()
    fast = fit(model, config, data=random_ids(1500))
    fast.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for layer, reported in fast.calibration_report.unexplained.items():
        block = model.encoder.layer[layer]
        dense_seen, seen = (watch(m, layer, random_ids(600, seed=1)) for m in (model, loaded))
        residual = dense_seen["residual"]
        wanted = residual - seen["x"]  # what brings the stream back to the dense model's
        error = seen["residual"] - residual
        weight = block.output.LayerNorm.weight.detach() / residual.std(-1, keepdim=True)
        fresh = float((error * weight).square().sum() / ((wanted - wanted.mean((0, 1))) * weight).square().sum())
        assert fresh == pytest.approx(reported, rel=0.2)


def watch(model, layer, ids, **inputs):
    """What enters a layer's FFN (x) and leaves it (y), and the residual stream after it."""
    block, seen = model.encoder.layer[layer], {}
    hooks = [
        block.intermediate.register_forward_pre_hook(lambda m, a: seen.update(x=a[0])),
        block.output.dense.register_forward_hook(lambda m, a, out: seen.update(y=out)),
        block.output.LayerNorm.register_forward_pre_hook(lambda m, a: seen.update(residual=a[0])),
    ]
    with torch.no_grad():
        model(ids, **inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_an_outlier_dimension_does_not_drown_the_others():
    """One dimension with nearly all of the variance, which the LayerNorm after it takes back."""
    model = tiny_bert()
    with torch.no_grad():
        for block in model.encoder.layer:
            block.output.dense.weight[3] *= 1000
            block.output.LayerNorm.weight[3] *= 1e-3
    for layer in range(3):  # each alone: after others it would also be measured by what they missed
        assert fit(model, {layer: "4x4"}).calibration_report.unexplained[layer] < 0.95


def test_same_seed_same_bits():
    model = tiny_bert()
    one = fit(model, steps=8)
    torch.manual_seed(99)
    other = fit(model, steps=8)
    assert same(one.state_dict(), other.state_dict())
    assert one.calibration_report.unexplained == other.calibration_report.unexplained
    assert not same(one.state_dict(), fit(model, steps=8, seed=1).state_dict())


def test_the_global_generator_is_left_alone():
    model = tiny_bert()
    state = torch.get_rng_state()
    fit(model, steps=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def slow_clock(monkeypatch):
    """Time goes on by a hundredth of a second at each look: budgets mean the same on any machine."""
    ticks = itertools.count()
    monkeypatch.setattr(calibration, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 100))


def test_budget_gives_steps(slow_clock):
    model = tiny_bert()
    fast = fit(model, {1: "1x2"}, steps=None, budget=0.5)
    report = fast.calibration_report
    assert report.steps > 50
    again = fit(model, {1: "1x2"}, steps=report.steps, max_tokens=report.tokens)
    assert same(again.state_dict(), fast.state_dict())
    with pytest.warns(UserWarning, match=r"budget of 0.01 seconds allows 0 steps a layer, .* it takes 50"):
        assert fit(model, {1: "1x2"}, steps=None, budget=0.01).calibration_report.steps == 50


def test_budget_limits_the_text(slow_clock):
    pieces = [{"input_ids": part} for part in random_ids(2000).split(16)]
    tokens = [
        fit(tiny_bert(), {1: "1x1"}, data=pieces, steps=None, budget=b).calibration_report.tokens for b in (0.4, 0.8)
    ]
    assert 256 <= tokens[0] < tokens[1] < 32_000


def test_the_controls_fit_too():
    """An MLP as wide as the dense network starts as that network; none explains nothing; both say so."""
    model = tiny_bert()
    whole = fit(model, {1: "mlp:64"}, steps=1)
    assert whole.calibration_report.unexplained[1] < 1e-3
    fast = fit(model, {0: "mlp:8", 1: "none"}, steps=60)
    unexplained = fast.calibration_report.unexplained
    assert 0.05 < unexplained[0] < fit(model, {0: "mlp:8"}, steps=1).calibration_report.unexplained[0]
    assert unexplained[1] == pytest.approx(1, abs=0.05)
    wide = fit(model, {1: "mlp:80"}, steps=1)  # wider than the dense network
    assert wide.calibration_report.unexplained[1] < 1e-3


def test_trees_and_an_mlp_fit_better_than_either():
    left = {}
    for config in ("4x3", "mlp:8", "4x3+mlp:8"):
        left[config] = fit(tiny_bert(), config, steps=150).calibration_report.unexplained
    assert all(left["4x3+mlp:8"][i] < min(left["4x3"][i], left["mlp:8"][i]) for i in range(3))
    start = [fit(tiny_bert(), {1: c}, steps=1).calibration_report.unexplained[1] for c in ("mlp:64", "4x3+mlp:64")]
    assert max(start) < 1e-3  # trees begin with outputs of zero, so that it starts as the MLP does


def test_none_is_the_best_constant():
    model = tiny_bert()
    fast = fit(model, {0: "none"}, steps=1)
    seen = watch(model, 0, random_ids())
    weight = seen["residual"].std(-1, keepdim=True) ** -2
    mean = (seen["y"] * weight).sum((0, 1)) / weight.sum()
    assert torch.allclose(fast.encoder.layer[0].output.dense.bias, mean, atol=0.05 * float(seen["y"].std()))


@pytest.mark.parametrize("config", ["mlp:8", "none", "2x3+mlp:4", {0: "mlp:8", 1: "none", 2: "2x3"}], ids=str)
def test_budget_of_the_controls(slow_clock, config):
    report = fit(tiny_bert(), config, steps=None, budget=0.5).calibration_report
    assert report.steps >= 1 and list(report.unexplained) == [0, 1, 2]


# --- what it may be given -------------------------------------------------------------------------------------------

TEXTS = [
    "The river had risen in the night.",
    "Nobody knew why the lamps were lit, and nobody asked.",
    "A red kite turned above the fields while we waited for the bus to Wells, which was late again.",
    "Yes.",
    "",
    "  \n",
]


@pytest.fixture(scope="module")
def tokenizer(minilm_path):
    return AutoTokenizer.from_pretrained(minilm_path)


def batches(data, tokenizer=None, max_length=128, batch_tokens=64):
    return as_batches(data, lambda: tokenizer, max_length=max_length, batch_tokens=batch_tokens)


def count(batch):
    return int(batch["attention_mask"].sum())


def test_texts(tokenizer):
    got = batches(TEXTS * 3, tokenizer)
    assert sum(map(count, got)) == 3 * sum(len(tokenizer(t)["input_ids"]) for t in TEXTS if t.strip())
    assert all(b["input_ids"].numel() <= 64 and b["input_ids"].shape == b["attention_mask"].shape for b in got)
    assert not any(b["token_type_ids"].any() for b in got)
    assert sum(b["input_ids"].numel() for b in got) < 1.2 * sum(map(count, got))  # little padding
    assert all(b["input_ids"].shape[1] <= 6 for b in batches(TEXTS, tokenizer, max_length=6))
    one = batches(iter(TEXTS), tokenizer)
    assert sum(map(count, one)) * 3 == sum(map(count, got))


@pytest.mark.parametrize("kind", [tuple, list])
def test_pairs(tokenizer, kind):
    got = batches([kind((TEXTS[0], TEXTS[2])), kind((TEXTS[3], "")), TEXTS[1]], tokenizer)
    want = tokenizer(TEXTS[0], TEXTS[2])
    rows = [row for b in got for row in zip(b["input_ids"], b["token_type_ids"], b["attention_mask"], strict=True)]
    assert len(rows) == 3
    ids, segments, mask = max(rows, key=lambda row: int(row[2].sum()))
    assert ids[mask.bool()].tolist() == want["input_ids"] and segments[mask.bool()].tolist() == want["token_type_ids"]
    assert segments.any()


def test_tensors():
    ids = random_ids(10, 16)
    for data in (ids, {"input_ids": ids}):
        got = batches(data)
        assert [b["input_ids"].shape for b in got] == [(4, 16), (4, 16), (2, 16)]
        assert torch.equal(torch.cat([b["input_ids"] for b in got]), ids)
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(10), "text": ["a"] * 10}
    got = batches([data, data], max_length=8)
    assert len(got) == 4 and got[0].keys() == {"input_ids", "attention_mask"} and got[0]["input_ids"].shape == (8, 8)


def test_from_texts(tokenizer, minilm_path):
    model = tiny_bert(vocab_size=len(tokenizer))
    for texts in (TEXTS * 12, [(a, b) for a in TEXTS for b in TEXTS[:4]]):
        given = fit(model, "2x3", data=texts, tokenizer=tokenizer, steps=3)
        assert given.calibration_report.tokens >= 256
        model.name_or_path = minilm_path
        assert same(fit(model, "2x3", data=texts, steps=3).state_dict(), given.state_dict())
    short = convert_ffn_to_fff(model, "2x3", calibration=plan(data=TEXTS * 12, steps=1))
    assert short.calibration_report.tokens == 12 * sum(len(tokenizer(t)["input_ids"]) for t in TEXTS if t.strip())


def test_segments_reach_the_model():
    model, ids = tiny_bert(), random_ids()
    segments = torch.zeros_like(ids)
    plain = fit(model, data={"input_ids": ids, "token_type_ids": segments}, steps=2)
    assert same(plain.state_dict(), fit(model, data=ids, steps=2).state_dict())
    assert not same(
        plain.state_dict(), fit(model, data={"input_ids": ids, "token_type_ids": segments + 1}, steps=2).state_dict()
    )


def test_padding_does_not_enter():
    model, ids = tiny_bert(), random_ids(64, 12)
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    padded = {"input_ids": ids * mask, "attention_mask": mask}
    other = {"input_ids": torch.where(mask.bool(), ids, 77), "attention_mask": mask}
    fast = fit(model, "2x3", data=padded, steps=4)
    assert fast.calibration_report.tokens == 64 * 8
    assert same(fit(model, "2x3", data=other, steps=4).state_dict(), fast.state_dict())


def test_what_is_collected():
    """What the second layer has to learn, once the first is converted (here with any weights)."""
    model, ids = tiny_bert(), random_ids(64, 12)
    with pytest.warns(UserWarning, match="not calibrated"):
        fast = convert_ffn_to_fff(model, "2x3")
    mask = (torch.rand(64, 12, generator=torch.Generator().manual_seed(0)) < 0.7).long()
    mask[:, 0] = 1
    data = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        pieces, tokens = _pieces(model, batches(data, batch_tokens=120), plan(data), float("inf"))
        assert tokens == int(mask.sum()) and len(pieces) == 7
        dense_layers, fast_layers = (_Layers(m, FAMILIES["bert"]) for m in (model, fast))
        layers = []
        for i in (0, 1):
            layers.append(_dense_layer(dense_layers, fast_layers, [i], 0, pieces))
            for piece in pieces:
                piece.dense, piece.fast = piece.ahead, fast_layers.run(piece, i, piece.fast)
    shown = mask.bool()
    for i, got in enumerate(layers):
        dense_seen, seen = watch(model, i, ids, attention_mask=mask), watch(fast, i, ids, attention_mask=mask)
        residual = dense_seen["residual"][shown]
        assert len(got.x) == len(got.y) == len(got.weight) == tokens
        assert torch.allclose(got.x.float() * got.x_scale + got.x_mean, seen["x"][shown], atol=2e-2)
        assert torch.allclose(got.y.float() * got.y_scale + got.y_mean, residual - seen["x"][shown], atol=2e-2)
        weight = 1 / residual.std(-1)
        assert torch.allclose(got.weight, weight / weight.square().mean().sqrt(), rtol=1e-4)
        size = got.y_scale * model.encoder.layer[i].output.LayerNorm.weight.detach().abs()
        assert torch.allclose(size, size[0].expand_as(size), rtol=1e-3)  # one for all: errors count gamma
    assert torch.equal(dense_seen["y"][shown] + dense_seen["x"][shown], residual)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *fast.modules()])
    assert not any("forward" in vars(m) for m in [*model.modules(), *fast.modules()])


def test_a_layer_makes_good_what_those_before_it_missed():
    """Fitted one after the other, layers end nearer to the dense model than each fitted on the dense model's inputs."""
    model, ids = tiny_bert(num_hidden_layers=4), random_ids(2000)
    together = fit(model, "1x3", data=ids)
    apart = convert_ffn_to_fff(model, "1x3", calibration=plan(ids, steps=1))
    for i in range(4):
        alone = fit(model, {i: "1x3"}, data=ids)
        apart.encoder.layer[i].load_state_dict(alone.encoder.layer[i].state_dict())
    fresh = random_ids(500, seed=1)
    with torch.no_grad():
        error = [float((m(fresh)[0] - model(fresh)[0]).square().mean()) for m in (together, apart)]
    assert error[0] < error[1]


def test_batches_in_which_all_is_padding():
    model, ids = tiny_bert(), random_ids(64, 12)
    full = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    empty = [{k: torch.zeros_like(v) for k, v in full[0].items()}] * 30
    report = fit(model, "2x3", data=empty + full, steps=4).calibration_report
    assert report.tokens == 64 * 12 and all(v < 1.5 for v in report.unexplained.values())


def test_single_rows():
    """Mappings of one short row each, as from a data set, fit like the same rows in one tensor."""
    model, ids = tiny_bert(), random_ids(1200, 8)
    whole = fit(model, data=ids).calibration_report
    rows = fit(model, data=[{"input_ids": row.unsqueeze(0)} for row in ids]).calibration_report
    for layer, unexplained in rows.unexplained.items():
        assert unexplained < 1.1 * whole.unexplained[layer]


def test_max_tokens():
    model = tiny_bert()
    pieces = [{"input_ids": part} for part in random_ids().split(32)]
    assert fit(model, steps=1, data=pieces, max_tokens=1000).calibration_report.tokens == 1024
    assert fit(model, steps=1, max_length=8).calibration_report.tokens == 4800


def test_heads():
    for head in ("ForMaskedLM", "ForMultipleChoice"):
        report = fit(tiny_bert(HEADS[head]), "2x3", steps=2).calibration_report
        assert report.tokens == 9600


def test_an_interruption_leaves_the_input_model_as_it_was():
    model = tiny_bert().train()

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.encoder.layer[2].output.dense.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        fit(model)
    hook.remove()
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "calibration data is empty"),
        (iter([]), ValueError, "calibration data is empty"),
        (["", " \n"], ValueError, "all of its texts are blank"),
        ([("", " ")], ValueError, "all of its texts are blank"),
        ("one text", TypeError, "must be texts or tensors, not str"),
        (7, TypeError, "must be texts or tensors, not int"),
        ([7], TypeError, "texts, pairs of texts or tensors, found int"),
        (["a", None], TypeError, "found NoneType"),
        ([("a", "b", "c")], TypeError, "found tuple"),
        (torch.zeros(7, dtype=torch.long), ValueError, r"input_ids \[rows, tokens\].*found \[7\]"),
        (torch.zeros(0, 7, dtype=torch.long), ValueError, r"found \[0, 7\]"),
        ({}, ValueError, "need input_ids.*found NoneType"),
        ([{"attention_mask": torch.ones(2, 2)}], ValueError, "need input_ids"),
        ([{"input_ids": [1, 2, 3]}], ValueError, "need input_ids.*found list"),
        (random_ids(15, 16), ValueError, "has 240 tokens; at least 256"),
        ({"input_ids": random_ids(), "attention_mask": torch.zeros(600, 16)}, ValueError, "has 0 tokens"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_bad_data(data, error, message):
    with pytest.raises(error, match=message):
        fit(tiny_bert(), data=data, tokenizer=object())


def test_no_tokenizer():
    model = tiny_bert()
    model.name_or_path = "/nowhere/at/all"
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from '/nowhere/at/all'.*Calibration.tokenizer"):
        fit(model, data=["a text"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": None}, "budget=None"),
        ({"budget": 0}, "budget=0"),
        ({"budget": -1.0}, "budget=-1"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"steps": True}, "steps=True"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"batch_tokens": -5}, "batch_tokens=-5"),
        ({"held_out": 0}, "held_out=0"),
        ({"held_out": 1.0}, "held_out=1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Calibration(["a"], **options)


def test_read_texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one\n\n  two  \n" + "x" * 50 + "\n", encoding="utf-8")
    assert read_texts(file, max_chars=20) == ["one", "two", "x" * 20]
    for content, message in ((b"", "no text in it"), (b" \n\n", "no text in it"), (b"\xff\xfe\x00", "not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_texts(file)
    with pytest.raises(FileNotFoundError):
        read_texts(tmp_path / "none")


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["4x4", "mlp:8", "none", "2x3+mlp:4"])
def test_recorded_steps_are_the_same(monkeypatch, config):
    """On a GPU the steps of a layer are recorded as a CUDA graph."""
    made = []

    class Watched(StepGraphs):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    class Plain:
        def __init__(self, parameters):
            pass

        def step(self, inputs, run):
            run(inputs)

    reports = []
    for way in (Watched, Plain):
        monkeypatch.setattr(calibration, "StepGraphs", way)
        reports.append(fit(tiny_bert().cuda(), config, cuda_graphs=True).calibration_report)
    assert len(made) == 3 and all(bool(one.recorded) == (config != "none") for one in made)
    for layer, unexplained in reports[0].unexplained.items():
        assert unexplained == pytest.approx(reports[1].unexplained[layer], rel=0.02)


def test_the_data_of_a_layer_is_freed_at_once():
    """It may be gigabytes, and nobody says when the garbage collector comes."""
    tokens, hidden = 300, 8
    x, y, one, zero = torch.randn(tokens, hidden), torch.randn(tokens, hidden), torch.ones(hidden), torch.zeros(hidden)
    data = calibration._Layer(x, y, torch.ones(tokens), zero, one, zero, one)
    fit = calibration._Fit(data, FFF(hidden, "2x3"), None, Calibration(["a text"], batch_tokens=64))
    fit.run(2, lambda unexplained: None)
    seen = weakref.ref(data.x)
    gc.disable()
    try:
        del x, data, fit
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("pairs", [False, True])
def test_little_of_much_text(tokenizer, pairs):
    """No more is encoded than is wanted, and whoever wants less gets the beginning of what others get."""
    texts = [f"text number {i}" for i in range(40)]
    data, encoded = [(t, t) for t in texts] if pairs else texts, []

    class Counting:
        def __call__(self, *columns, **options):
            encoded.extend(columns[0])
            return tokenizer(*columns, **options)

        pad = tokenizer.pad

    def batches(chunk):
        encoded.clear()
        with mock.patch.object(text_module, "_CHUNK", chunk):
            yield from in_random_order(data, Counting, max_length=64, batch_tokens=32, seed=3)

    few = list(itertools.islice(batches(10), 2))
    assert len(encoded) == 10
    whole = list(batches(10))
    assert sorted(encoded) == sorted(texts)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(few, whole, strict=False))
    assert sum(len(b["input_ids"]) for b in whole) == sum(len(b["input_ids"]) for b in batches(100)) == 40
