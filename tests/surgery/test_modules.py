"""Modules of no known family, by a pattern, and what holds a model: SentenceTransformer and CrossEncoder."""

import copy
import errno
import json
import warnings
from pathlib import Path

import pytest
import torch
from tiny import HEADS, same, tiny_bert, tiny_model
from torch import nn

from hf_fff import Calibration, load_fff, optimize, save_fff
from hf_fff import convert_ffn_to_fff as convert_and_warn
from hf_fff.layers import FFF, FeedforwardBlock


def convert(model, config="4x3", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return convert_and_warn(model, config, **options)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(16, 24), nn.Linear(24, 16, bias=False), nn.Linear(16, 24, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mix, self.norm, self.mlp = nn.Linear(16, 16), nn.LayerNorm(16), mlp

    def forward(self, x):
        x = x + self.mix(x).roll(1, 1)
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, kind="plain", seed=0):
        super().__init__()
        torch.manual_seed(seed)
        plain = lambda: nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 16))  # noqa: E731
        self.layers = nn.ModuleList([Layer(plain() if kind == "plain" else Gated()) for _ in range(3)])
        self.head = nn.Linear(16, 2)
        self.head.weight.requires_grad_(False)
        self.eval()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def inputs(rows=8, seed=0):
    return torch.randn(rows, 10, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_by_a_pattern(tmp_path, kind):
    model, x = Model(kind), inputs()
    state, want = copy.deepcopy(model.state_dict()), model(x)
    fast = convert(model, "4x3", ffn="layers.*.mlp")
    assert type(fast) is Model and torch.equal(model(x), want) and same(model.state_dict(), state)
    assert [type(layer.mlp) for layer in fast.layers] == [FeedforwardBlock] * 3 and not isinstance(
        model.layers[0].mlp, FeedforwardBlock
    )
    assert fast.layers[0].mix.weight is model.layers[0].mix.weight and fast.head.weight is model.head.weight
    assert fast.layers[1].mlp.ffn.config.activation == ("gelu" if kind == "plain" else "silu")
    rows = (model.layers[0].mlp[0] if kind == "plain" else model.layers[0].mlp.gate).weight
    assert (fast.layers[0].mlp.ffn.weight_in.unsqueeze(1) == rows).all(-1).any(1).all()  # the dense neurons
    save_fff(fast, tmp_path)
    loaded = load_fff(Model(kind, seed=1), tmp_path)
    assert torch.equal(loaded(x), fast(x)) and not torch.equal(fast(x), want)
    assert json.loads((tmp_path / "fff.json").read_text())["modules"]["layers.0.mlp"]["hidden_size"] == 16


def test_some_of_them():
    fast = convert(Model(), {0: "4x3", 2: "mlp:8"}, ffn="layers.*.mlp")
    assert [isinstance(layer.mlp, FeedforwardBlock) for layer in fast.layers] == [True, False, True]
    one = convert(Model(), "2x3", ffn="layers.1.mlp")
    assert [isinstance(layer.mlp, FeedforwardBlock) for layer in one.layers] == [False, True, False]
    with pytest.raises(ValueError, match="has layers 0 to 2"):
        convert(Model(), {3: "4x3"}, ffn="layers.*.mlp")


@pytest.mark.parametrize(
    "data", [inputs(200), [(part,) for part in inputs(200).split(50)], {"x": inputs(200)}], ids=type
)
@pytest.mark.parametrize("config", ["4x4", "mlp:12"])
def test_calibration(data, config):
    model = Model()
    plan = Calibration(data, steps=60, batch_tokens=512, learning_rate=1e-2, held_out=0.3, progress=False)
    fast = convert_and_warn(model, config, ffn="layers.*.mlp", calibration=plan)
    x = inputs(seed=1)
    with torch.no_grad():
        error = [float((m(x) - model(x)).square().mean()) for m in (fast, convert(model, "none", ffn="layers.*.mlp"))]
    assert error[0] < error[1] and all(v < 0.9 for v in fast.calibration_report.unexplained.values())
    assert fast.calibration_report.tokens == 2000


def test_a_transformers_model_of_another_kind():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    fast = convert(T5EncoderModel(config), "2x3", ffn="encoder.block.*.layer.1.DenseReluDense")
    assert isinstance(fast.encoder.block[1].layer[1].DenseReluDense.ffn, FFF)
    assert fast(torch.ones(1, 5, dtype=torch.long)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer.*.ffn", r"ffn='layer\.\*\.ffn' names no part of Model; likely: layers\.\*\.mlp$"),
        ("layers.*.norm", r"layers.0.norm, .* is a LayerNorm and no feedforward network.*it has none"),
        ("layers.*.mix", r"layers.0.mix, .* is a Linear and no feedforward network.*\(16\)"),
        ("layers", r"layers, .* is a ModuleList and no feedforward network.*\(16, 24\)"),
    ],
)
def test_patterns_that_name_no_ffn(pattern, message):
    with pytest.raises(ValueError, match=message):
        convert(Model(), ffn=pattern)


def test_twice():
    with pytest.raises(ValueError, match="already converted"):
        convert(convert(Model(), ffn="layers.*.mlp"), ffn="layers.*.mlp")


def test_what_cannot_be_saved_or_loaded(tmp_path):
    with pytest.raises(ValueError, match="no feedforward network of this Model is converted"):
        save_fff(Model(), tmp_path)
    with pytest.raises(FileNotFoundError):
        load_fff(Model(), tmp_path)
    save_fff(convert(Model(), ffn="layers.*.mlp"), tmp_path)
    with pytest.raises(ValueError, match="this Linear has no layers.0.mlp, layers.1.mlp, layers.2.mlp"):
        load_fff(nn.Linear(2, 2), tmp_path)
    recipe = json.loads((tmp_path / "fff.json").read_text())
    (tmp_path / "fff.json").write_text(json.dumps({**recipe, "version": 2}))
    with pytest.raises(ValueError, match="version=2; this hf_fff reads 1"):
        load_fff(Model(), tmp_path)
    (tmp_path / "fff.json").write_text(json.dumps(recipe))
    with pytest.raises(RuntimeError, match="layers.0.mix"):
        load_fff(
            nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"mlp": m.mlp}) for m in Model().layers)}), tmp_path
        )


def test_packed_modules_are_not_saved(tmp_path):
    fast = optimize(convert(Model(), ffn="layers.*.mlp"))
    with pytest.raises(ValueError, match="is packed: save the module that was optimized"):
        save_fff(fast, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    fast, folder = convert(Model(), ffn="layers.*.mlp"), tmp_path / "new" / "folder"
    save_fff(fast, folder)
    (folder / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(before) == {"fff.json", "model.safetensors", "notes.txt"}
    assert {p.stat().st_mode & 0o044 for p in folder.iterdir()} == {(folder / "notes.txt").stat().st_mode & 0o044}

    def full(module, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_fff.surgery.modules.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        save_fff(convert(Model(seed=1), "2x3", ffn="layers.*.mlp"), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    other = convert(Model(seed=1), "2x3", ffn="layers.*.mlp")
    save_fff(other, folder)
    assert torch.equal(load_fff(Model(), folder)(inputs()), other(inputs())) and (folder / "notes.txt").is_file()


# --- what holds a model ---------------------------------------------------------------------------------------------

TEXTS = ["A red kite turned above the fields.", "Nobody knew why the lamps were lit, and nobody asked."]


def test_sentence_transformer(minilm_path, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    dense = sentence_transformers.SentenceTransformer(
        str(minilm_path), device="cpu", prompts={"query": "find: "}, similarity_fn_name="dot"
    )
    want = dense.encode(TEXTS)
    plan = Calibration(TEXTS * 20, steps=1, progress=False)
    fast = convert_and_warn(dense, {5: "4x3"}, calibration=plan)
    assert type(fast) is type(dense) and (dense.encode(TEXTS) == want).all()
    assert fast.prompts["query"] == "find: " and fast.similarity_fn_name == "dot" and len(fast) == len(dense)
    assert 5 in fast.calibration_report.unexplained
    got = fast.encode(TEXTS, prompt_name="query")
    assert not (fast.encode(TEXTS) == want).all()
    fast.save_pretrained(str(tmp_path))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert type(loaded[0].auto_model).__name__ == "FastBertModel"
    assert (loaded.encode(TEXTS, prompt_name="query") == got).all() and loaded.similarity_fn_name == "dot"


def test_cross_encoder(minilm_path, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    folder = tmp_path / "dense"
    tiny_bert(HEADS["ForSequenceClassification"], num_labels=1, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dense = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[1])]
    want = dense.predict(pairs)
    fast = convert(dense)
    assert (
        type(fast) is type(dense) and (dense.predict(pairs) == want).all() and not (fast.predict(pairs) == want).all()
    )
    fast.save_pretrained(str(tmp_path / "fast"))
    loaded = sentence_transformers.CrossEncoder(str(tmp_path / "fast"), device="cpu")
    assert type(loaded.model).__name__ == "FastBertForSequenceClassification"
    assert same(loaded.model.state_dict(), fast.model.state_dict())
    # Not to the bit: a product's last one may depend on where in memory its weights begin, which differs between files and copies.
    assert loaded.predict(pairs) == pytest.approx(fast.predict(pairs), rel=1e-6)


def test_a_module_with_two_models():
    two = nn.ModuleList([tiny_bert(), tiny_model("roberta")])
    with pytest.raises(ValueError, match="no known feedforward networks in ModuleList"):
        convert(two)
