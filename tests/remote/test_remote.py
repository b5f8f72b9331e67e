"""Models that open where there is no hf_fff, by the file that lies beside their weights: the same outputs and gradients."""

import ast
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import sentence_transformers
import torch
from command import run, unwrapped
from safetensors.torch import load_file, save_file
from task_rows import tiny_tokenizer
from tiny import HEADS, tiny_bert, tiny_inputs, tiny_model
from transformers import AutoModelForSequenceClassification

import hf_fff
from hf_fff.models import known_types
from hf_fff.remote import remote_code, save_remote_code

ROOT = Path(hf_fff.__file__).parent.parent

# Blocks hf_fff wherever it is installed, and opens what it is told to.
_WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "hf_fff":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if "block" in sys.argv:
    sys.meta_path.insert(0, Blocker())
    try:
        import hf_fff
        raise SystemExit("hf_fff can be imported")
    except ImportError:
        pass

import torch, transformers
from pathlib import Path

torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    given = torch.load(folder / "given.pt")
    auto = getattr(transformers, given["auto"])
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    batch = given["batch"]
    out = model(**batch)
    got = {"out": out[0].detach(), "class": type(model).__name__}
    out[0].double().square().mean().backward()
    got["grads"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if folder.name in ("bert", "modernbert"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got["autocast"] = model(**batch)[0]
        got["half"] = model.to(torch.bfloat16)(**batch)[0].detach()
    module = sys.modules[type(model).__module__]
    got["ops"] = getattr(module.ops, "__name__", "")
    torch.save(got, folder / "got.pt")
"""


def convert(model, config="2x3", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return hf_fff.convert_ffn_to_fff(model, config, **options)


def put(folder, model, auto="AutoModel"):
    model.save_pretrained(folder)
    save_remote_code(model, folder)
    batch = tiny_inputs(model)
    if "token_type_ids" not in model.forward.__code__.co_varnames:
        del batch["token_type_ids"]
    torch.save({"auto": auto, "batch": batch}, folder / "given.pt")
    return model.eval(), batch


def open_all(folder, *, block):
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _WITHOUT, str(folder), *(["block"] if block else [])]
    told = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    return {place.name: torch.load(place / "got.pt") for place in folder.iterdir()}


def autos(head):
    return "AutoModel" if head == "Model" else f"AutoModel{head}"


def crammed(head):
    sizes = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = hf_fff.FastCrammedBertConfig(**sizes, fff="2x3", initializer_range=0.2, classifier_hidden_size=24)
    return getattr(hf_fff, f"FastCrammedBert{head}")(config)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """All families, all heads of BERT, controls and layers of several kinds: what was saved, and what it gives elsewhere."""
    folder = tmp_path_factory.mktemp("remote") / "models"
    folder.mkdir()
    saved = {kind: put(folder / kind, convert(tiny_model(kind))) for kind in known_types()}
    for head in HEADS:
        if head != "Model":
            saved[head] = put(folder / head, convert(tiny_bert(HEADS[head])), autos(head))
    others = {
        "mixed": {0: "4x3", 2: hf_fff.FFFConfig(2, 5, "relu")},
        "controls": {0: "mlp:8", 1: "none", 2: "1x6+mlp:4"},
    }
    for name, config in others.items():
        saved[name] = put(folder / name, convert(tiny_bert(), config))
    for head in ("Model", "ForMaskedLM", "ForSequenceClassification"):
        saved[f"crammed{head}"] = put(folder / f"crammed{head}", crammed(head), autos(head))
    return saved, open_all(folder, block=True)


NAMES = [*known_types(), *(head for head in HEADS if head != "Model"), "mixed", "controls"]
NAMES += [f"crammed{head}" for head in ("Model", "ForMaskedLM", "ForSequenceClassification")]


@pytest.mark.parametrize("name", NAMES)
def test_without_hf_fff(opened, name):
    (model, batch), got = opened[0][name], opened[1][name]
    assert got["class"] == type(model).__name__ and got["ops"] == "ops"
    out = model(**batch)[0]
    torch.testing.assert_close(got["out"], out, rtol=0, atol=1e-5)
    model.zero_grad()
    out.double().square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == got["grads"].keys()
    for n, grad in grads.items():
        torch.testing.assert_close(got["grads"][n], grad, rtol=1e-3, atol=1e-5 * (1 + float(grad.abs().max())))


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_without_hf_fff_in_other_formats(opened, name):
    """In bfloat16 a logit near zero may send a token another way; most go the same."""
    (model, batch), got = opened[0][name], opened[1][name]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert _near(got["autocast"], model(**batch)[0])
    half = convert(tiny_model(name)).eval().to(torch.bfloat16)
    half.load_state_dict({n: t.to(torch.bfloat16) for n, t in model.state_dict().items()})
    assert _near(got["half"], half(**batch)[0])


def _near(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    return float(((a - b).float().abs() < 0.1).float().mean()) > 0.8


def test_kernels_where_hf_fff_is_installed(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    model, batch = put(folder / "bert", convert(tiny_bert()))
    got = open_all(folder, block=False)["bert"]
    assert got["ops"] == "hf_fff.ops"
    assert torch.equal(got["out"], model(**batch)[0])  # the same kernels, so the same bits


def test_an_older_hf_fff_has_no_kernel_for_the_bias(monkeypatch):
    """The file may be newer than the package that is installed."""
    module = types.ModuleType("modeling_fastbert")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look
    monkeypatch.delattr(hf_fff.ops, "add_bias")
    exec(remote_code(convert(tiny_bert())), module.__dict__)
    assert module.ops is hf_fff.ops
    layer, x = module.OutputBias(5), torch.randn(3, 5)
    torch.nn.init.normal_(layer.bias)
    assert torch.equal(layer(x), x + layer.bias)


def test_with_hf_fff_imported_nothing_changes(tmp_path):
    model = convert(tiny_bert(HEADS["ForSequenceClassification"], num_labels=3))
    model.save_pretrained(tmp_path / "m")
    save_remote_code(model, tmp_path / "m")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert type(loaded) is hf_fff.FastBertForSequenceClassification


@pytest.mark.parametrize("kind", [*known_types(), "crammed"])
def test_the_file_stands_alone(kind):
    """It imports nothing but Python's own, torch and transformers, and hf_fff where that can fail."""
    tree = ast.parse(remote_code(crammed("Model") if kind == "crammed" else convert(tiny_model(kind))))
    tried = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for top in (name.split(".")[0] for name in names):
            assert top in {*sys.stdlib_module_names, "torch", "transformers"} or (top == "hf_fff" and node in tried)


def test_what_it_is_made_of_has_not_changed(tmp_path):
    """What was saved stays, and is named in the config."""
    model = convert(tiny_bert())
    model.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    place = save_remote_code(model, tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    assert place == tmp_path / "modeling_fastbert.py" and place.read_text() == remote_code(model)
    autos = after.pop("auto_map")
    assert after == before and autos["AutoConfig"] == "modeling_fastbert.FastBertConfig"
    assert autos["AutoModel"] == "modeling_fastbert.FastBertModel" and "AutoModelForCausalLM" not in autos


_AGAIN = (
    _WITHOUT.split("import torch")[0]
    + """
import torch
from transformers import AutoModelForSequenceClassification as Auto
from transformers import AutoTokenizer
from sentence_transformers import SentenceTransformer

source, output, embedder, damaged = sys.argv[2:]
model = Auto.from_pretrained(source, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
batch = tokenizer(["word1 word2", "word3"], padding=True, return_tensors="pt")
model.save_pretrained(output)
again = Auto.from_pretrained(output, trust_remote_code=True)
assert torch.equal(model(**batch).logits, again(**batch).logits)
print(SentenceTransformer(embedder, device="cpu", trust_remote_code=True).encode(["word1 word2"]).tolist())
try:
    Auto.from_pretrained(damaged, trust_remote_code=True)
except ValueError as error:
    print(error)
"""
)


def test_commands_and_what_follows(tmp_path):
    """A folder that the command made: its tokenizer, saving again, an embedder, and weights that do not fit."""
    dense = tmp_path / "dense"
    tiny_bert(HEADS["ForSequenceClassification"], num_labels=3).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    assert run("convert", dense, tmp_path / "fast", "--fff", "2x3", "--remote-code").exit_code == 0
    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu").save(str(tmp_path / "embedder"))
    result = run("convert", tmp_path / "embedder", tmp_path / "fast-embedder", "--fff", "2x3", "--remote-code")
    assert result.exit_code == 0, result.output
    assert run("convert", dense, tmp_path / "damaged", "--fff", "2x3", "--remote-code").exit_code == 0
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    del weights["bert.encoder.layer.1.intermediate.bias_in"]
    save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})

    places = [tmp_path / name for name in ("fast", "again", "fast-embedder", "damaged")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", _AGAIN, "block", *map(str, places)]
    told = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    assert (tmp_path / "again" / "modeling_fastbert.py").exists()
    embedded, error = told.stdout.strip().splitlines()
    want = sentence_transformers.SentenceTransformer(str(tmp_path / "fast-embedder"), device="cpu").encode(
        ["word1 word2"]
    )
    torch.testing.assert_close(torch.tensor(json.loads(embedded)), torch.from_numpy(want), rtol=0, atol=1e-5)
    assert "1 missing (bert.encoder.layer.1.intermediate.bias_in)" in error


def test_what_there_is_no_code_for(tmp_path):
    with pytest.raises(ValueError, match="no remote code for a model of BertConfig"):
        remote_code(tiny_bert())
    tiny_bert().save_pretrained(tmp_path / "dense")
    both = run("convert", tmp_path / "dense", tmp_path / "out", "--fff", "2x3", "--remote-code", "--delta")
    assert both.exit_code == 2 and "needs hf_fff to be opened" in unwrapped(both.stderr)
    assert not (tmp_path / "out").exists()
