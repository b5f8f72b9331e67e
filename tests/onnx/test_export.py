"""Models as ONNX files: in ONNX Runtime against PyTorch, in a process without hf_fff, int8, wrong use."""

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command import listing, run, unwrapped
from task_rows import tiny_tokenizer
from tiny import HEADS, outputs, same, tiny_bert, tiny_inputs, tiny_model
from torch import nn

pytest.importorskip("onnx.parser", reason="onnx is not installed")  # "onnx" is this folder, too
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnx
import onnxruntime as runtime
from onnx import TensorProto

from hf_fff import convert_ffn_to_fff, optimize
from hf_fff import onnx as fff_onnx
from hf_fff.models import known_types
from hf_fff.onnx import model as exporting

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def opened(path):
    """A call of the file in ONNX Runtime, on what it takes of a batch."""
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs, names = ([p.name for p in ports] for ports in (session.get_inputs(), session.get_outputs()))

    def call(batch):
        found = session.run(None, {name: batch[name].numpy() for name in inputs})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))

    call.inputs = inputs
    return call


def assert_close_where_visible(found, want, mask, tolerance=2e-5):
    assert list(found) == list(want)
    for name, value in found.items():
        a, b = value, want[name]
        assert a.isfinite().all()
        if a.shape[: mask.ndim] == mask.shape:
            a, b = a[mask.bool()], b[mask.bool()]
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def assert_same_as_torch(model, path):
    call = opened(path)
    for rows, tokens, padding in ((3, 9, 3), (1, 5, 1), (4, 24, 18), (1, 1, 0)):
        batch = {k: v for k, v in tiny_inputs(model, rows, tokens).items() if k in call.inputs}
        batch["attention_mask"].fill_(1)[-1, ..., tokens - padding :] = 0
        assert_close_where_visible(call(batch), outputs(model, batch), batch["attention_mask"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return convert_ffn_to_fff(tiny_bert(initializer_range=0.1), {0: "2x3", 1: "mlp:8", 2: "3x2+mlp:5"})


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("onnx") / "a" / "out"
    before, state = outputs(model, tiny_inputs(model)), copy.deepcopy(model.state_dict())
    assert fff_onnx.export(model.train(), place, tokenizer=tiny_tokenizer()) == place / "model.onnx"
    assert model.training and model.config._attn_implementation == "sdpa"
    assert same(model.state_dict(), state) and same(outputs(model.eval(), tiny_inputs(model)), before)
    return place


def test_a_model_of_several_kinds_is_what_it_is_in_torch(model, folder):
    assert_same_as_torch(model, folder / "model.onnx")


def test_files(folder):
    names = {p.name for p in folder.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert json.loads((folder / "config.json").read_text())["model_type"] == "fastbert"
    graph = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(graph)
    assert fff_onnx.operations(folder / "model.onnx") == 2
    assert sorted((f.domain, f.name) for f in graph.functions) == [
        ("hf_fff", "FFF_2x3_gelu"),
        ("hf_fff", "FFF_3x2_gelu"),
    ]
    axes = [[d.dim_param for d in port.type.tensor_type.shape.dim] for port in graph.graph.input]
    assert axes == [["batch_size", "sequence_length"]] * 3


def test_another_process_needs_onnxruntime_alone(model, folder, tmp_path):
    batch = tiny_inputs(model)
    np.savez(tmp_path / "in.npz", **{k: v.numpy() for k, v in batch.items()})
    code = f"""
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession({str(folder / "model.onnx")!r}, providers=["CPUExecutionProvider"])
found = session.run(None, dict(numpy.load({str(tmp_path / "in.npz")!r})))
numpy.save({str(tmp_path / "out.npy")!r}, found[0])
assert not {{"torch", "hf_fff", "onnx", "onnxscript"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)
    want = opened(folder / "model.onnx")(batch)["last_hidden_state"]
    assert np.array_equal(np.load(tmp_path / "out.npy"), want.numpy())


def test_int8_is_of_products_with_weights_outside_of_trees(model, folder, tmp_path):
    exporting._quantise(folder / "model.onnx", tmp_path / "model.onnx")
    graph, plain = onnx.load(tmp_path / "model.onnx"), onnx.load(folder / "model.onnx")
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("MatMulInteger") == 3 * 4 + 2 + 2 + 1  # query, key, value, output; the small MLPs; the pooler
    assert list(graph.functions) == list(plain.functions) and fff_onnx.operations(tmp_path / "model.onnx") == 2
    weights = {t.name: t.data_type for t in graph.graph.initializer}
    assert all(weights[name] == TensorProto.FLOAT for n in graph.graph.node if n.domain for name in n.input[1:])
    batch = tiny_inputs(model, 6, 12)
    found, want = opened(tmp_path / "model.onnx")(batch), outputs(model, batch)
    a, b = (t["last_hidden_state"][batch["attention_mask"].bool()] for t in (found, want))
    assert nn.functional.cosine_similarity(a, b, dim=-1).median() > 0.98 and not torch.equal(a, b)


def test_command_int8_and_a_head(tmp_path):
    model = convert_ffn_to_fff(
        tiny_bert(HEADS["ForSequenceClassification"], num_labels=4, initializer_range=0.1), "2x3"
    )
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(tmp_path / "m")
    result = run("export", tmp_path / "m", tmp_path / "out", "--engine", "onnx", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["operations"], told["rows"], told["precision"]) == (3, "f32", "int8")
    assert {"model.onnx", "config.json", "tokenizer.json"} <= set(listing(tmp_path / "out"))
    batch = tiny_inputs(model)
    assert opened(tmp_path / "out" / "model.onnx")(batch)["logits"].shape == (3, 4)
    for options, message in (
        (["--precision", "f32"], "not empty"),
        (["--precision", "bf16"], "bf16 is not for onnx (allowed: int8, f32)"),
        (["--rows", "int8"], "where trees are f32"),
        (["--text", tmp_path / "m" / "config.json"], "leave it out"),
    ):
        result = run("export", tmp_path / "m", tmp_path / "out", "--engine", "onnx", *options)
        assert result.exit_code == 2 and message in unwrapped(result.output)


@pytest.mark.full
@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering", "ForMultipleChoice"])
def test_heads(head, tmp_path):
    model = convert_ffn_to_fff(tiny_bert(HEADS[head]), "2x3")
    assert_same_as_torch(model, fff_onnx.export(model, tmp_path / "out"))


@pytest.mark.full
@pytest.mark.parametrize("family", known_types())
def test_families(family, tmp_path):
    model = convert_ffn_to_fff(tiny_model(family), "2x3")
    assert_same_as_torch(model, fff_onnx.export(model, tmp_path / "out"))


@pytest.mark.full
def test_16_bit_and_dense_models_and_weights_in_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_INLINE", 1000)
    model = tiny_bert().bfloat16()
    for precision in ("f32", "int8"):
        path = fff_onnx.export(model, tmp_path / precision, precision)
        batch = tiny_inputs(model)
        found, want = opened(path)(batch), outputs(copy.deepcopy(model).float(), batch)
        assert_close_where_visible(found, want, batch["attention_mask"], 2e-5 if precision == "f32" else 1.0)
        assert len({p.name for p in path.parent.iterdir()} - {"config.json"}) == 2
    assert (tmp_path / "f32" / "model.onnx_data").exists() and model.dtype == torch.bfloat16


def test_a_folder_that_exists_stays_as_it_is(model, folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"):
        fff_onnx.export(model, tmp_path)
    graph = __import__("onnx_ir").load(folder / "model.onnx")
    monkeypatch.setattr(exporting, "to_model", lambda model: graph)
    broken = SimpleNamespace(save_pretrained=lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fff_onnx.export(model, tmp_path, tokenizer=broken, overwrite=True)
    assert listing(tmp_path) == before
    fff_onnx.export(model, tmp_path, overwrite=True)
    assert {"model.onnx", "config.json"} == set(listing(tmp_path))


def test_wrong_models_and_options(model, tmp_path, monkeypatch):
    target = tmp_path / "out"
    with pytest.raises(ValueError, match=r"precision='bf16' is not known here \(allowed: f32, int8\)"):
        fff_onnx.export(model, target, "bf16")
    with pytest.raises(ValueError, match="dtype=torch.float64"):
        fff_onnx.export(copy.deepcopy(model).double(), target)
    with pytest.raises(ValueError, match="is packed: export the model that was optimized"):
        fff_onnx.export(optimize(model), target)
    with pytest.raises(ValueError, match="this is a Linear"):
        fff_onnx.export(nn.Linear(2, 2), target)
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match=r"torch.onnx cannot export this FastBertModel \(fastbert\): division by zero"):
        fff_onnx.export(model, target)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=rf"{package} cannot be imported .*hf-fff\[onnx\]"):
                fff_onnx.export(model, target)
    assert listing(tmp_path) in ([], {}, set())
