"""Delta checkpoints: what is not the base's, put together with it again, and refused where that is another."""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command import run, unwrapped
from safetensors.torch import load_file, save_file
from task_rows import tiny_tokenizer
from tiny import HEADS, outputs, same, tiny_bert, tiny_inputs, tiny_model
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
)

import hf_fff
from hf_fff import FastBertForMaskedLM, FastBertForSequenceClassification, FastBertModel
from hf_fff.models.delta import WEIGHTS


def convert(model, config="2x3", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return hf_fff.convert_ffn_to_fff(model, config, **options)


@pytest.fixture
def base(tmp_path):
    """A dense model in a folder."""
    folder = tmp_path / "base"
    tiny_bert(HEADS["ForSequenceClassification"], num_labels=3).save_pretrained(folder)
    return folder


@pytest.fixture
def fast(base):
    return convert(BertForSequenceClassification.from_pretrained(base))


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_inputs(model))[0]


@pytest.mark.parametrize("load", [AutoModelForSequenceClassification, FastBertForSequenceClassification])
def test_round_trip(tmp_path, base, fast, load):
    fast.save_pretrained(tmp_path / "delta", delta=True)
    assert {p.name for p in (tmp_path / "delta").iterdir()} == {"config.json", WEIGHTS}
    kept = load_file(tmp_path / "delta" / WEIGHTS)
    parts = ("weight_in", "bias_in", "weight_out")
    assert {*kept} == {f"bert.encoder.layer.{i}.intermediate.{part}" for i in range(3) for part in parts}
    about = json.loads((tmp_path / "delta" / "config.json").read_text())["fff_delta"]
    assert about["version"] == 1 and about["base"] == str(base) and len(about["base_sha256"]) == 64
    loaded, info = load.from_pretrained(tmp_path / "delta", output_loading_info=True)
    assert type(loaded) is FastBertForSequenceClassification and not any(
        info[k] for k in ("missing_keys", "unexpected_keys")
    )
    assert same(outputs(loaded, tiny_inputs(fast)), outputs(fast, tiny_inputs(fast)))
    assert loaded.name_or_path == str(tmp_path / "delta") and not hasattr(loaded.config, "fff_delta")


def test_what_training_changed(tmp_path, fast):
    """Trained tensors are the delta's, in whichever module."""
    fast = copy.deepcopy(fast)
    with torch.no_grad():
        fast.classifier.bias.add_(1)
        fast.bert.encoder.layer[1].attention.self.query.weight.mul_(1.5)
    fast.save_pretrained(tmp_path / "delta", delta=True)
    kept = {*load_file(tmp_path / "delta" / WEIGHTS)}
    assert {name for name in kept if "intermediate" not in name} == {
        "classifier.bias",
        "bert.encoder.layer.1.attention.self.query.weight",
    }
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")
    assert torch.equal(logits(loaded), logits(fast))


def test_new_head(tmp_path):
    """A head that the base lacks, or has in another size, is the delta's."""
    bare = tmp_path / "bare"
    tiny_bert().save_pretrained(bare)
    for source, labels in ((bare, 5), (tmp_path / "other", 2)):
        if source != bare:
            tiny_bert(HEADS["ForSequenceClassification"], num_labels=4).save_pretrained(source)
        dense = BertForSequenceClassification.from_pretrained(source, num_labels=labels, ignore_mismatched_sizes=True)
        fast = convert(dense)
        folder = tmp_path / f"delta{labels}"
        fast.save_pretrained(folder, delta=True)
        assert "classifier.weight" in load_file(folder / WEIGHTS)
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        assert loaded.config.num_labels == labels and torch.equal(logits(loaded), logits(fast))


@pytest.mark.parametrize("trained", [False, True])
def test_tied_weights(tmp_path, trained):
    tiny_bert(HEADS["ForMaskedLM"]).save_pretrained(tmp_path / "base")
    fast = convert(HEADS["ForMaskedLM"].from_pretrained(tmp_path / "base"))
    if trained:
        with torch.no_grad():
            fast.bert.embeddings.word_embeddings.weight.add_(0.1)
    fast.save_pretrained(tmp_path / "delta", delta=True)
    kept = load_file(tmp_path / "delta" / WEIGHTS)
    assert sum(t.shape == (120, 32) for t in kept.values()) == trained
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "delta")
    assert type(loaded) is FastBertForMaskedLM
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert torch.equal(logits(loaded), logits(fast))


def test_number_formats(tmp_path, base, fast):
    """One that was saved in another format than the base's borrows nevertheless, and loads in that which is asked for."""
    half = copy.deepcopy(fast).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "delta", delta=str(base))
    assert all("intermediate" in name for name in load_file(tmp_path / "delta" / WEIGHTS))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits(loaded), logits(half))
    fast.save_pretrained(tmp_path / "delta32", delta=True)
    asked = AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta32", dtype=torch.bfloat16)
    assert asked.dtype == torch.bfloat16 and torch.equal(logits(asked), logits(half))


@pytest.mark.parametrize("model_type", ["roberta", "modernbert", "albert", "distilbert", "deberta-v2"])
def test_other_families(tmp_path, model_type):
    dense = tiny_model(model_type)
    dense.save_pretrained(tmp_path / "base")
    fast = convert(dense)
    fast.save_pretrained(tmp_path / "delta", delta=str(tmp_path / "base"))
    loaded = AutoModel.from_pretrained(tmp_path / "delta")
    batch = {k: v for k, v in tiny_inputs(fast).items() if k != "token_type_ids"}
    assert same(outputs(loaded, batch), outputs(fast, batch))


def test_partly_converted(tmp_path, base):
    fast = convert(BertForSequenceClassification.from_pretrained(base), {1: "2x3"})
    fast.save_pretrained(tmp_path / "delta", delta=True)
    assert all("layer.1." in name for name in load_file(tmp_path / "delta" / WEIGHTS))
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")), logits(fast))


def test_saved_again(tmp_path, base, fast):
    """A loaded delta knows its base; saved whole, it no longer needs it."""
    fast.save_pretrained(tmp_path / "delta", delta=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")
    loaded.save_pretrained(tmp_path / "again", delta=True)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["fff_delta"]["base"] == str(base)
    loaded.save_pretrained(tmp_path / "again")
    assert {p.name for p in (tmp_path / "again").iterdir()} == {"config.json", "model.safetensors"}
    shutil.rmtree(base)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(whole), logits(fast))


def test_base_elsewhere(tmp_path, base, fast):
    fast.save_pretrained(tmp_path / "delta", delta=True)
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"the base .*/base of the delta cannot be read: .*delta_base="):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")
    for load in (AutoModelForSequenceClassification, FastBertForSequenceClassification):
        loaded = load.from_pretrained(tmp_path / "delta", delta_base=str(tmp_path / "moved"))
        assert torch.equal(logits(loaded), logits(fast))


def test_same_base_in_another_file(tmp_path, base, fast):
    """What counts is what is in it."""
    fast.save_pretrained(tmp_path / "delta", delta=True)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")), logits(fast))


def _changed(folder, name, change):
    tensors = load_file(folder / name)
    save_file(change(tensors), folder / name, metadata={"format": "pt"})


OTHER_BASES = {
    "another seed": (
        lambda f: tiny_bert(HEADS["ForSequenceClassification"], 1, num_labels=3).save_pretrained(f),
        "hash",
    ),
    "one number": (
        lambda f: _changed(f, "model.safetensors", lambda t: t | {"classifier.bias": t["classifier.bias"] + 1e-6}),
        "its weights have another hash",
    ),
    "number format": (
        lambda f: tiny_bert(HEADS["ForSequenceClassification"], num_labels=3).half().save_pretrained(f),
        "hash",
    ),
    "no head": (lambda f: tiny_bert().save_pretrained(f), "it has no classifier.weight"),
    "sizes": (
        lambda f: tiny_bert(HEADS["ForSequenceClassification"], num_labels=3, hidden_size=16).save_pretrained(f),
        "it has no bert",
    ),
    "a family": (lambda f: tiny_model("roberta").save_pretrained(f), "must be a dense 'bert' model; it is a 'roberta'"),
    "a converted one": (
        lambda f: convert(tiny_bert()).save_pretrained(f),
        "must be a dense 'bert' model; it is a 'fastbert'",
    ),
}


@pytest.mark.parametrize(("change", "match"), OTHER_BASES.values(), ids=OTHER_BASES)
def test_base_that_differs(tmp_path, base, fast, change, match):
    fast.save_pretrained(tmp_path / "delta", delta=True)
    change(base)
    with pytest.raises(ValueError, match=match):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def _about(**fields):
    def change(path):
        config = path.parent / "config.json"
        settings = json.loads(config.read_text())
        settings["fff_delta"] |= fields
        config.write_text(json.dumps(settings))

    return change


DAMAGES = {
    "truncated": (_truncate, f"{WEIGHTS} is damaged"),
    "a bit": (_flip, f"{WEIGHTS} of .* is damaged: its hash"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "gone": (Path.unlink, f"there is no {WEIGHTS} beside it"),
    "newer": (_about(version=2), r"fff_delta.version=2 of .* is not one that this hf_fff reads \(1\)"),
    "no version": (_about(version=None), "fff_delta.version=None"),
}


@pytest.mark.parametrize(("change", "match"), DAMAGES.values(), ids=DAMAGES)
def test_damaged(tmp_path, fast, change, match):
    fast.save_pretrained(tmp_path / "delta", delta=True)
    change(tmp_path / "delta" / WEIGHTS)
    with pytest.raises(ValueError, match=match):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")


def test_bad_saves(tmp_path, base, fast):
    fast.save_pretrained(tmp_path / "whole")
    before = {p: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    with pytest.raises(ValueError, match=r"holds whole weights \(model.safetensors\)"):
        fast.save_pretrained(tmp_path / "whole", delta=True)
    assert {p: p.read_bytes() for p in (tmp_path / "whole").iterdir()} == before
    with pytest.raises(ValueError, match="also given: max_shard_size"):
        fast.save_pretrained(tmp_path / "delta", delta=True, max_shard_size="1GB")
    with pytest.raises(ValueError, match="must be a dense 'bert' model"):
        fast.save_pretrained(tmp_path / "delta", delta=str(tmp_path / "whole"))
    with pytest.raises(ValueError, match="cannot be read"):
        fast.save_pretrained(tmp_path / "delta", delta=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="needs to know the dense model"):
        convert(tiny_bert()).save_pretrained(tmp_path / "delta", delta=True)
    with pytest.raises(ValueError, match="delta_base='x' means nothing"):
        FastBertModel.from_pretrained(tmp_path / "whole", delta_base="x")
    crammed = hf_fff.FastCrammedBertConfig(hidden_size=24, num_hidden_layers=1, vocab_size=9)
    with pytest.raises(ValueError, match="no dense counterpart"):
        hf_fff.FastCrammedBertModel(crammed).save_pretrained(tmp_path / "delta", delta=str(base))
    assert not (tmp_path / "delta").exists()


def test_command(tmp_path, base):
    tiny_tokenizer().save_pretrained(base)
    result = run("convert", base, tmp_path / "out", "--fff", "2x3", "--delta", "--json")
    assert result.exit_code == 0, result.output
    sizes = json.loads(result.stdout)["bytes"]
    assert sizes["delta"] == (tmp_path / "out" / WEIGHTS).stat().st_size < sizes["whole"]
    assert not (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "tokenizer.json").exists()
    assert run("convert", base, tmp_path / "whole", "--fff", "2x3").exit_code == 0
    loaded = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("out", "whole")]
    assert torch.equal(*map(logits, loaded))
    again = run("convert", base, tmp_path / "out", "--fff", "2x3", "--delta", "--overwrite")
    assert "The delta has 0.0 MB, the whole weights" in unwrapped(again.stdout)


_LOAD = """
import sys
import hf_fff
from transformers import AutoModel
print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)
"""


def test_in_a_fresh_program_by_a_relative_path(tmp_path, monkeypatch):
    """The base is told by its whole path, wherever the program runs that loads it."""
    monkeypatch.chdir(tmp_path)
    tiny_bert().save_pretrained("base")
    convert(BertModel.from_pretrained("base")).save_pretrained("delta", delta=True)
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "delta")]
    environment = {**os.environ, "PYTHONPATH": str(Path(hf_fff.__file__).parent.parent)}
    told = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=False
    )
    assert told.stdout.strip() == "FastBertModel", told.stderr


_FROM_THE_HUB = """
import json, sys, warnings
from pathlib import Path
import torch
from transformers import AutoModel
import hf_fff
from hf_fff.cli.app import app
from typer.testing import CliRunner

warnings.simplefilter("ignore")
torch.set_num_threads(1)
out = Path(sys.argv[1])
fast = hf_fff.convert_ffn_to_fff(AutoModel.from_pretrained("owner/name"), "2x3").eval()
fast.save_pretrained(out / "delta", delta=True)
result = CliRunner().invoke(app, ["convert", "owner/name", str(out / "command"), "--fff", "2x3", "--delta"])
assert result.exit_code == 0, result.output
ids = torch.arange(5, 15).unsqueeze(0)
for name in ("delta", "command"):
    about = json.loads((out / name / "config.json").read_text())["fff_delta"]
    print(about["base"], torch.equal(AutoModel.from_pretrained(out / name)(ids)[0], fast(ids)[0]))
"""


def test_base_of_the_hub(tmp_path):
    """By its name, from what the cache has."""
    place = tmp_path / "cache" / "models--owner--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    tiny_bert().save_pretrained(place / "snapshots" / ("0" * 40))
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(hf_fff.__file__).parent.parent)
    command = [sys.executable, "-c", _FROM_THE_HUB, str(tmp_path)]
    told = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.stdout.splitlines() == ["owner/name True"] * 2, told.stderr[-3000:]


def test_sentence_transformer(tmp_path, minilm_path):
    """A real embedder at 1x11: its delta is the FFFs alone."""
    from sentence_transformers import SentenceTransformer

    result = run("convert", minilm_path, tmp_path / "out", "--fff", "1x11", "--delta", "--json")
    assert result.exit_code == 0, result.output
    sizes = json.loads(result.stdout)["bytes"]
    print(sizes)
    fffs = 6 * 4095 * (2 * 384 + 1) * 4
    assert fffs < sizes["delta"] < fffs + 10_000 < 0.6 * sizes["whole"]
    kept = load_file(tmp_path / "out" / WEIGHTS)
    assert all(".intermediate." in name for name in kept)
    embedder = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert embedder.encode(["A sentence."]).shape == (1, 384)
