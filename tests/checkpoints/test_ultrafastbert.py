"""Imported checkpoints of UltraFastBERT give what the original's arithmetic gives; what does not fit is refused, and nothing left."""

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import crammed
import numpy as np
import pytest
import torch
from command import run, unwrapped
from safetensors import safe_open
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_fff
from hf_fff.checkpoints.ultrafastbert import import_ultrafastbert
from hf_fff.surgery.folder import ModelFolder

SIZES = {
    "1x4": {},
    "1x11, one layer": {"layers": 1, "depth": 11},
    "3x2": {"trees": 3, "depth": 2, "layers": 2},
    "4x0": {"trees": 4, "depth": 0, "heads": 1},
    "other sizes": {"size": 48, "heads": 3, "vocab": 70, "layers": 5, "depth": 3, "length": 9},
}


def inputs(vocab=70, rows=3, tokens=9, seed=0):
    ids = torch.randint(5, vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[1, 5:] = 0
    return ids, mask


def imported(source, output):
    import_ultrafastbert(ModelFolder.find(str(source)), output)
    return output


def distance(model, arch, state, ids, mask):
    """The largest differences of hidden states and logits to the restated arithmetic."""
    with torch.no_grad():
        hidden = model.encoder(ids, attention_mask=mask).last_hidden_state
        logits = model(ids, attention_mask=mask).logits
    want = crammed.reference(arch, state, ids, mask)
    return max(np.abs(got.double().numpy() - w).max() for got, w in zip((hidden, logits), want, strict=True))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_masked_words(tmp_path, sizes, file):
    arch = crammed.arch(**sizes)
    state = crammed.state_dict(arch)
    output = imported(crammed.write(tmp_path / "source", arch, state, file, tokenizer=False), tmp_path / "out")
    model, info = AutoModelForMaskedLM.from_pretrained(output, output_loading_info=True, dtype=torch.float64)
    assert type(model) is hf_fff.FastCrammedBertForMaskedLM
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert distance(model, arch, state, *inputs()) < 1e-6  # the table of positions is float32 in both
    assert distance(AutoModelForMaskedLM.from_pretrained(output), arch, state, *inputs()) < 1e-4
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "fastcrammedbert" and config["dtype"] == "float32"
    assert config["architectures"] == ["FastCrammedBertForMaskedLM"] and not config["tie_word_embeddings"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pooler", ["avg", "zero_index"])
def test_classifier(tmp_path, pooler, attention):
    arch = crammed.arch(labels=3, pooler=pooler)
    state = crammed.state_dict(arch)
    output = imported(crammed.write(tmp_path / "source", arch, state), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(
        output, dtype=torch.float64, attn_implementation=attention
    )
    assert distance(model, arch, state, *inputs()) < 1e-6


def test_mean_without_padding_is_a_switch(tmp_path):
    arch = crammed.arch(labels=2)
    output = imported(crammed.write(tmp_path / "source", arch, crammed.state_dict(arch)), tmp_path / "out")
    ids, mask = inputs()
    alone = ids[1:2, :5]

    def logits(**fields):
        model = AutoModelForSequenceClassification.from_pretrained(output, **fields)
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits[1], model(alone).logits[0]

    padded, short = logits()
    assert (padded - short).abs().max() > 1e-3  # as the original: the padding counts
    padded, short = logits(classifier_pooling="avg_masked")
    torch.testing.assert_close(padded, short, rtol=0, atol=1e-5)


def test_tied_decoder(tmp_path):
    """A decoder that is a copy of the embedding is one with it afterwards."""
    arch = crammed.arch()
    state = crammed.state_dict(arch, tied=True)
    output = imported(crammed.write(tmp_path / "source", arch, state), tmp_path / "out")
    model = AutoModelForMaskedLM.from_pretrained(output)
    assert model.decoder.weight is model.encoder.embeddings.word_embeddings.weight
    with safe_open(output / "model.safetensors", "pt") as file:
        assert "decoder.weight" not in file.keys()  # noqa: SIM118
    assert distance(model.double(), arch, state, *inputs()) < 1e-6


def test_number_format_stays(tmp_path):
    arch = crammed.arch()
    state = crammed.state_dict(arch, dtype=torch.float16)
    output = imported(crammed.write(tmp_path / "source", arch, state), tmp_path / "out")
    assert AutoModel.from_pretrained(output).dtype == torch.float16
    assert distance(AutoModelForMaskedLM.from_pretrained(output, dtype=torch.float64), arch, state, *inputs()) < 1e-6


def test_saved_again_is_the_same(tmp_path):
    arch = crammed.arch(labels=2)
    output = imported(crammed.write(tmp_path / "source", arch, crammed.state_dict(arch)), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(output)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    ids, mask = inputs()
    assert torch.equal(model(ids, attention_mask=mask).logits, again(ids, attention_mask=mask).logits)


def test_longer_than_trained(tmp_path):
    arch = crammed.arch(length=8)
    state = crammed.state_dict(arch)
    output = imported(crammed.write(tmp_path / "source", arch, state), tmp_path / "out")
    model = AutoModelForMaskedLM.from_pretrained(output, dtype=torch.float64)
    with pytest.warns(UserWarning, match="12 tokens are longer than the 8"):
        assert distance(model, arch, state, *inputs(tokens=12)) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs(tokens=12)[0])  # it has been told
        AutoModelForMaskedLM.from_pretrained(output)(inputs(tokens=8)[0])


def test_padding_alone_gives_numbers(tmp_path):
    arch = crammed.arch()
    state = crammed.state_dict(arch)
    output = imported(crammed.write(tmp_path / "source", arch, state), tmp_path / "out")
    ids, _ = inputs()
    assert (
        distance(AutoModelForMaskedLM.from_pretrained(output).double(), arch, state, ids, torch.zeros_like(ids)) < 1e-6
    )


@pytest.mark.parametrize("pad", [0, 3])
def test_tokenizer(tmp_path, pad):
    arch = crammed.arch()
    arch["embedding"]["pad_token_id"] = pad
    source = crammed.write(tmp_path / "source", arch, crammed.state_dict(arch))
    crammed.small_tokenizer(pad).save(str(source / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(imported(source, tmp_path / "out"))
    vocabulary = tokenizer.get_vocab()
    for name in ("pad", "cls", "sep", "mask"):
        assert getattr(tokenizer, f"{name}_token_id") == vocabulary[f"<{name}>"]
    batch = tokenizer(["word1 word2", "word3 <mask> word4 word5"], padding=True, return_tensors="pt")
    assert {*batch} == {"input_ids", "attention_mask"} and tokenizer.model_max_length == 16
    assert batch["input_ids"][0].tolist()[-2:] == [pad, pad] and batch["attention_mask"][0].tolist() == [
        1,
        1,
        1,
        1,
        0,
        0,
    ]
    assert (batch["input_ids"][1] == tokenizer.mask_token_id).sum() == 1
    AutoModelForMaskedLM.from_pretrained(tmp_path / "out")(**batch)


def test_trains(tmp_path):
    arch = crammed.arch(labels=2)
    output = imported(crammed.write(tmp_path / "source", arch, crammed.state_dict(arch)), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(output).train()
    ids, mask = inputs(rows=8)
    labels = (ids[:, 0] > 35).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        assert all(layer.ffn.weight_in.grad.abs().max() > 0 for layer in model.encoder.layers)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- bad input ------------------------------------------------------------------------------------------------------

BAD_FIELDS = {
    "intermed_type": "ff",
    "nonlin": "GELUglu",
    "use_bias": True,
    "decoder_bias": True,
    "final_norm": False,
    "skip_head_transform": False,
    "norm": "RMSNorm",
    "norm_eps": -1.0,
    "num_transformer_layers": 0,
    "hidden_size": "768",
    "intermed_size": 0,
    "intermed_depth": 40,
    "attention.qkv_bias": True,
    "attention.num_attention_heads": 5,
    "attention.rotary_embedding": True,
    "attention.causal_attention": True,
    "embedding.pos_embedding": "learned",
    "embedding.normalization": False,
    "embedding.vocab_size": True,
    "embedding.pad_token_id": 120,
    "embedding.embedding_dim": 16,
    "classification_head.pooler": "att",
    "classification_head.include_ff_layer": False,
    "classification_head.nonlin": "ReLU",
    "num_labels": None,
}


def refused(source, tmp_path, match):
    with pytest.raises(ValueError, match=match):
        imported(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and {p.name for p in tmp_path.iterdir()} <= {"source", "ran"}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_value_that_is_not_supported(tmp_path, field):
    arch = crammed.arch(labels=2)
    state = crammed.state_dict(arch)
    *above, name = field.split(".")
    place = arch[above[0]] if above else arch
    place[name] = BAD_FIELDS[field]
    ours = {"attention.num_attention_heads": "num_attention_heads", "intermed_depth": "depth"}
    refused(crammed.write(tmp_path / "source", arch, state), tmp_path, ours.get(field, field.replace(".", r"\.")))


@pytest.mark.parametrize("field", ["nonlin", "intermed_depth", "attention.qkv_bias", "classification_head.pooler"])
def test_field_that_is_missing(tmp_path, field):
    arch = crammed.arch(labels=2)
    state = crammed.state_dict(arch)
    *above, name = field.split(".")
    del (arch[above[0]] if above else arch)[name]
    refused(crammed.write(tmp_path / "source", arch, state), tmp_path, rf"arch\.{field} is missing")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "bert"}, "model_type=\"crammedBERT\" \\(found 'bert'\\)"),
        ({"model_type": "crammedBERT"}, 'an object "arch"'),
        ({"model_type": "fastcrammedbert", "fff": {"version": 1}}, "already converted"),
        ([], "no JSON object"),
    ],
)
def test_other_configs(tmp_path, config, match):
    arch = crammed.arch()
    refused(crammed.write(tmp_path / "source", arch, crammed.state_dict(arch), config=config), tmp_path, match)


def _without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


CHANGES = {
    "a layer less": (_without("encoder.layers.1.ffn.linear_in.bias"), "1 missing .*layers.1.ffn.linear_in.bias"),
    "more": (
        lambda s: s | {"encoder.layers.0.ffn.linear_out.bias": torch.zeros(32)},
        "1 superfluous .*linear_out.bias",
    ),
    "many more": (lambda s: s | {f"x{i}": torch.zeros(1) for i in range(9)}, "9 superfluous .*x5 and 3 more"),
    "a shape": (
        lambda s: s | {"encoder.layers.0.ffn.linear_in.weight": torch.zeros(30, 32)},
        r"1 of another shape .*linear_in.weight \[30, 32\] instead of \[31, 32\]",
    ),
    "no head": (_without("decoder.weight"), "neither decoder.weight nor head.weight"),
    "two heads": (lambda s: s | {"head.weight": torch.zeros(2, 24)}, "both decoder.weight and head.weight"),
    "another scale": (
        lambda s: s | {"encoder.layers.2.attn.self_attention.norm_factor": torch.tensor(0.5)},
        r"layers.2.attn.self_attention.norm_factor=0.5 .*\(allowed: 0.353553\)",
    ),
    "two dtypes": (lambda s: s | {"decoder.weight": s["decoder.weight"].half()}, "float16, torch.float32"),
    "integers": (lambda s: {k: v.to(torch.int8) if "factor" not in k else v for k, v in s.items()}, "int8"),
    "not finite": (lambda s: s | {"decoder.weight": s["decoder.weight"] * torch.nan}, "not finite: decoder.weight"),
    "no tensor": (lambda s: s | {"step": 3}, "other things than tensors: step"),
    "a list": (lambda s: list(s), "no dict of tensors, but list"),
}


@pytest.mark.parametrize(("change", "match"), CHANGES.values(), ids=CHANGES)
def test_weights_that_do_not_fit(tmp_path, change, match):
    arch = crammed.arch()
    refused(crammed.write(tmp_path / "source", arch, change(crammed.state_dict(arch))), tmp_path, match)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code(tmp_path, zipped):
    arch = crammed.arch()
    source = crammed.write(tmp_path / "source", arch, {})
    state = crammed.state_dict(arch) | {"trap": Trap(tmp_path / "ran")}
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(source, tmp_path, "wants to run code .* and was not")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(state))
    refused(source, tmp_path, "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


def test_format_before_torch_1_6(tmp_path):
    arch = crammed.arch()
    state = crammed.state_dict(arch)
    source = crammed.write(tmp_path / "source", arch, state)
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    model = AutoModelForMaskedLM.from_pretrained(imported(source, tmp_path / "out")).double()
    assert distance(model, arch, state, *inputs()) < 1e-6


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_truncated(tmp_path, file, keep):
    arch = crammed.arch()
    source = crammed.write(tmp_path / "source", arch, crammed.state_dict(arch), file)
    whole = (source / file).read_bytes()
    (source / file).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused(source, tmp_path, "damaged|cannot be read")


def test_flipped_bit(tmp_path):
    """Of a .bin the archive's checksums tell; safetensors has none of its data, but checks its header."""
    arch = crammed.arch()
    state = crammed.state_dict(arch)
    source = crammed.write(tmp_path / "source", arch, state)
    whole = bytearray((source / "pytorch_model.bin").read_bytes())
    at = whole.find(state["decoder.weight"].numpy().tobytes()[:64])
    whole[at + 9] ^= 4
    (source / "pytorch_model.bin").write_bytes(whole)
    refused(source, tmp_path, "damaged: the checksum of")
    (source / "pytorch_model.bin").unlink()
    crammed.write(source, arch, state, "model.safetensors")
    whole = bytearray((source / "model.safetensors").read_bytes())
    whole[20] ^= 128
    (source / "model.safetensors").write_bytes(whole)
    refused(source, tmp_path, "damaged")


def test_no_weights(tmp_path):
    arch = crammed.arch()
    source = crammed.write(tmp_path / "source", arch, {})
    (source / "pytorch_model.bin").unlink()
    refused(source, tmp_path, "no weights in .*neither model.safetensors nor pytorch_model.bin")


def test_tokenizer_that_does_not_fit(tmp_path):
    arch = crammed.arch()
    source = crammed.write(tmp_path / "source", arch, crammed.state_dict(arch))
    crammed.small_tokenizer(pad=2).save(str(source / "tokenizer.json"))
    refused(source, tmp_path, "<pad>=2, the config pad_token_id=0")
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace("<mask>", "[MASK]"))
    refused(source, tmp_path, "has no <mask>")
    (source / "tokenizer.json").write_text("{")
    refused(source, tmp_path, "is no tokenizer")


# --- the command ----------------------------------------------------------------------------------------------------


def test_command(tmp_path):
    arch = crammed.arch()
    source = crammed.write(tmp_path / "source", arch, crammed.state_dict(arch))
    result = run("import", "ultrafastbert", source, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["model_class"] == "FastCrammedBertForMaskedLM" and facts["layers"] == dict.fromkeys("012", "1x4")
    assert facts["tokenizer"]
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    again = run("import", "ultrafastbert", source, tmp_path / "out")
    assert again.exit_code == 2 and "--overwrite" in unwrapped(again.stderr)
    (source / "tokenizer.json").unlink()
    again = run("import", "ultrafastbert", source, tmp_path / "out", "--overwrite")
    assert again.exit_code == 0 and "no tokenizer.json" in again.stderr
    *_, opened = again.stdout.strip().splitlines()
    assert "AutoModelForMaskedLM" in opened and type(eval(opened.strip())) is hf_fff.FastCrammedBertForMaskedLM


def test_other_commands_take_it(tmp_path):
    arch = crammed.arch(labels=3)
    source = crammed.write(tmp_path / "source", arch, crammed.state_dict(arch))
    result = run("import", "ultrafastbert", source, tmp_path / "out", "--remote-code")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["auto_map"]["AutoModel"] == "modeling_fastcrammedbert.FastCrammedBertModel"
    assert (tmp_path / "out" / "modeling_fastcrammedbert.py").is_file()
    rows = [f"word{i} word{i + 1} word{2 * i}\t{i % 3}" for i in range(24)]
    (tmp_path / "rows.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    told = run("eval", tmp_path / "out", "--task", "classification", "--data", tmp_path / "rows.tsv", "--json")
    assert told.exit_code == 0, told.output


def test_export(tmp_path):
    arch = crammed.arch()
    output = imported(crammed.write(tmp_path / "source", arch, crammed.state_dict(arch)), tmp_path / "out")
    model = AutoModelForMaskedLM.from_pretrained(output).eval()
    ids, mask = inputs()
    with torch.no_grad():
        exported = torch.export.export(model, (ids, mask)).module()
        torch.testing.assert_close(exported(ids, mask).logits, model(ids, mask).logits)


_MEASURED = """
import sys, threading, time
from pathlib import Path
from hf_fff.checkpoints.ultrafastbert import import_ultrafastbert
from hf_fff.models.fastcrammedbert import modeling_fastcrammedbert
from hf_fff.surgery.folder import ModelFolder

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
import_ultrafastbert(ModelFolder.find(sys.argv[1]), Path(sys.argv[2]))
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_full_size(tmp_path):
    """755 MB pass through the memory tensor by tensor, the largest of which has 101 MB, and give the original's numbers."""
    arch = crammed.arch(layers=16, size=768, heads=12, depth=11, vocab=32768, length=128)
    state = crammed.state_dict(arch)
    source = crammed.write(tmp_path / "source", arch, state)
    size = (source / "pytorch_model.bin").stat().st_size
    assert 750e6 < size < 760e6
    command = [sys.executable, "-c", _MEASURED, str(source), str(tmp_path / "out")]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    peak = float(told.stdout.split()[-1])
    print(f"peak of memory that is not mapped: {peak:.0f} MiB for a file of {size / 2**20:.0f} MiB")
    assert peak < 200
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    ids, mask = inputs(vocab=32768, rows=2)
    assert distance(model, arch, state, ids, mask) < 1e-6
