"""Models inside OpenVINO: the operation against the oracle, whole models against torch, saving, wrong use."""

import copy
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from command import listing, run, unwrapped
from task_rows import WORDS, tiny_tokenizer
from tiny import HEADS, outputs, same, tiny_bert, tiny_inputs, tiny_model
from torch import nn

pytest.importorskip("openvino.frontend", reason="openvino is not installed")  # "openvino" is this folder, too

import openvino as ov

from hf_fff import FFF, convert_ffn_to_fff, fff_target_parameters, ops, optimize
from hf_fff import openvino as fff_openvino
from hf_fff.models import known_types
from hf_fff.openvino import graph as graphs
from hf_fff.openvino import library, quantise
from hf_fff.openvino import model as model_module
from hf_fff.openvino.embedding import Embedding
from hf_fff.ops import ACTIVATIONS, loader, packed_backend

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")

_FAST = ("bert", "roberta", "distilbert", "modernbert", "convbert")
ONE = {"INFERENCE_NUM_THREADS": 1}


@pytest.fixture(scope="module", autouse=True)
def extension():
    try:
        return fff_openvino.extension()
    except RuntimeError as error:
        if "compiler" in str(error):
            pytest.skip("needs a C++ compiler")
        raise


class OneLayer(nn.Module):
    """An FFF over embeddings, which looks like a model of transformers."""

    def __init__(self, fff, hidden, activation="gelu", vocab_size=500):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, model_type="bert", type_vocab_size=1)
        self.embedding = nn.Embedding(vocab_size, hidden)
        self.fff = FFF(hidden, {**dict(zip(("n_trees", "depth"), fff, strict=True)), "activation": activation})

    def set_attn_implementation(self, name):
        pass

    def forward(self, input_ids, attention_mask, return_dict=True):
        return {"last_hidden_state": self.fff(self.embedding(input_ids))}


def compiled(graph, threads=1, precision="f32"):
    properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    call = ov.Core().compile_model(graph, "CPU", properties)
    return lambda ids, mask: torch.from_numpy(call({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])


def ids_and_mask(rows, tokens, hidden_share=0.0):
    ids = torch.randint(500, (rows, tokens))
    return ids, (torch.rand(rows, tokens) >= hidden_share).long()


def from_oracle(layer, ids, path=None):
    x = layer.embedding(ids).flatten(0, 1)
    f = layer.fff
    y, _, _ = oracle.fff(x, f.weight_in, f.bias_in, f.weight_out, f.n_trees, f.config.activation, path)
    return torch.from_numpy(y).unflatten(0, ids.shape)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operation_is_the_definition(activation):
    layer = OneLayer((2, 3), 40, activation)
    ids, mask = ids_and_mask(3, 7)
    y = compiled(graphs.to_graph(layer)[0])(ids, mask)
    torch.testing.assert_close(y.double(), from_oracle(layer, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (2, 5), (5, 60)])
@pytest.mark.parametrize("kind", ["f32", "old bf16", "bf16", "int8"])
def test_hidden_tokens_are_left_out(rows, tokens, kind):
    """Zeros for them, and for the others the bits that they have alone, wherever hidden ones lie."""
    layer = OneLayer((2, 4), 33)
    graph, _ = graphs.to_graph(layer)
    if kind == "old bf16":
        weights_in_bf16(graph)
    elif kind != "f32":
        graphs.pack_rows(graph, kind)
    call = compiled(graph, 2, "f32" if kind == "f32" else "bf16")
    for share in (0.0, 0.3, 0.9, 1.0):
        ids, mask = ids_and_mask(rows, tokens, share)
        y, whole = call(ids, mask), call(ids, torch.ones_like(mask))
        assert torch.equal(y, whole * mask[..., None])


def weights_in_bf16(graph):
    """As graphs before packed rows have them."""
    for node in graphs.operations(graph):
        for index in (1, 2, 3):
            values = torch.tensor(node.input_value(index).get_node().get_data()).bfloat16().view(torch.uint16).numpy()
            constant = ov.op.Constant(ov.Tensor(values, values.shape, ov.Type.bf16), shared_memory=False)
            node.input(index).replace_source_output(constant.output(0))
        node.validate_and_infer_types()


def test_weights_in_bf16():
    layer = OneLayer((1, 5), 64)
    graph, _ = graphs.to_graph(layer)
    weights_in_bf16(graph)
    ids, mask = ids_and_mask(4, 30)
    with torch.no_grad():
        for p in layer.parameters():  # what is looked up stays as it was rounded
            p.copy_(p.bfloat16())
    y = compiled(graph)(ids, mask)
    x = layer.embedding(ids)
    f = layer.fff
    _, path, _ = torch.ops.hf_fff.fff_train(x, f.weight_in, f.bias_in, f.weight_out, 1, "gelu")
    want = from_oracle(layer, ids, path.flatten(0, 1))
    close = (y.double() - want).abs().amax(-1) < 0.02 * want.abs().max()
    assert close.float().mean() > 0.95  # the others: a logit near zero


@pytest.mark.parametrize("rows", ops.ROWS)
@pytest.mark.parametrize(
    ("shape", "hidden", "activation"), [((1, 8), 64, "gelu"), ((3, 4), 33, "silu"), ((5, 3), 130, "relu")]
)
def test_packed_rows_are_the_definition(shape, hidden, activation, rows):
    """As tests/ops/test_packed.py bounds the operator of PyTorch; and its bits, where rows are integers."""
    layer = OneLayer(shape, hidden, activation)
    ids, mask = ids_and_mask(3, 17)
    graph, _ = graphs.to_graph(layer)
    graphs.pack_rows(graph, rows)
    (node,) = graphs.operations(graph)
    weights = [w.detach() for w in layer.fff.parameters()]
    packed = ops.pack(*weights, shape[0], rows)
    assert node.get_type_name() == "PackedFFF" and np.array_equal(
        node.input_value(1).get_node().get_data(), packed.numpy()
    )
    y = compiled(graph)(ids, mask).flatten(0, 1)
    x = layer.embedding(ids).flatten(0, 1)
    want, _ = oracle.fff_packed(x, *weights, shape[0], rows, activation)
    errors = np.abs(oracle.array(y) - want).max(-1) / np.abs(want).max(-1)
    assert (errors > (2e-2 if rows == "int8" else 4e-3)).sum() <= len(errors) // 8
    assert torch.equal(y, ops.fff_packed(x, packed, activation))


def test_what_is_no_packed_layer_is_refused():
    graph, _ = graphs.to_graph(OneLayer((2, 3), 40))
    graphs.pack_rows(graph, "int8")
    (node,) = graphs.operations(graph)
    packed = node.input_value(1).get_node().get_data()
    for wrong, message in ((packed[:-64], "not as long as its header says"), (packed[1:], "does not start")):
        node.input(1).replace_source_output(ov.op.Constant(np.array(wrong), shared_memory=False).output(0))
        with pytest.raises(RuntimeError, match=message):
            node.validate_and_infer_types()
    other, _ = graphs.to_graph(OneLayer((2, 3), 41))
    graphs.pack_rows(other, "int8")
    node.input(1).replace_source_output(graphs.operations(other)[0].input_value(1))
    with pytest.raises(RuntimeError, match="is for a last dimension of 41"):
        node.validate_and_infer_types()


@pytest.mark.parametrize("rows", ["f32", *ops.ROWS])
def test_threads_and_batches_change_no_bit(rows):
    layer = OneLayer((1, 8), 64)
    graph, _ = graphs.to_graph(layer)
    if rows != "f32":
        graphs.pack_rows(graph, rows)
    one, two = compiled(graph, 1), compiled(graph, 2)
    ids, mask = ids_and_mask(8, 64)
    assert torch.equal(one(ids, mask), two(ids, mask))
    assert torch.equal(one(ids, mask)[3:4, :9], two(ids[3:4, :9], mask[3:4, :9]))


def test_no_thread_pool_of_its_own(extension):
    content = extension.read_bytes()
    assert b"libtbb" in content
    assert b"libgomp" not in content and b"libiomp" not in content


def close_where_visible(found, want, mask, tolerance=2e-5):
    assert list(found.keys()) == [k for k in want if torch.is_tensor(want[k])]
    for name, value in found.items():
        a, b = value, want[name]
        if a.shape[: mask.ndim] == mask.shape:
            a, b = a[mask.bool()], b[mask.bool()]
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "2x3") for family in ("bert", "roberta", "distilbert", "modernbert", "convbert")),
        ("bert", "mlp:8"),
        ("bert", "none"),
        ("bert", "2x3+mlp:8"),
        *(
            pytest.param(f, k, marks=pytest.mark.full)
            for f in ("modernbert", "squeezebert")
            for k in ("mlp:8", "none", "2x3+mlp:8")
        ),
        *(pytest.param(f, "2x3", marks=pytest.mark.full) for f in known_types() if f not in _FAST),
    ],
)
def test_families_and_kinds(family, kind):
    model = convert_ffn_to_fff(tiny_model(family), kind)
    made = fff_openvino.compile(model, "f32", ov_config=ONE)
    assert (made.operations > 0) == kind.startswith("2x3")
    for rows, tokens, padding in ((3, 9, 3), (1, 5, 1), (4, 24, 18)):
        batch = {k: v for k, v in tiny_inputs(model, rows, tokens).items() if k in made._inputs}
        batch["attention_mask"][-1, tokens - padding :] = 0
        found = made(**batch)
        assert all(v.isfinite().all() for v in found.values())  # of hidden tokens too
        close_where_visible(found, outputs(model, batch), batch["attention_mask"])


@pytest.mark.parametrize(
    "head", ["ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM", "ForPreTraining", "ForMultipleChoice"]
)
def test_heads(head):
    model = convert_ffn_to_fff(tiny_bert(HEADS[head]), "2x3")
    batch = tiny_inputs(model)
    found, want = fff_openvino.compile(model, "f32", ov_config=ONE)(**batch), outputs(model, batch)
    assert list(found.keys()) == list(want)
    close_where_visible(found, want, batch["attention_mask"])
    name = next(iter(want))
    assert getattr(found, name) is found[name]


def test_a_dense_model_works_and_warns():
    model = tiny_bert()
    with pytest.warns(UserWarning, match="holds no FFF"):
        made = fff_openvino.compile(model, "f32", ov_config=ONE)
    close_where_visible(
        made(**tiny_inputs(model)), outputs(model, tiny_inputs(model)), tiny_inputs(model)["attention_mask"]
    )


def test_the_torch_model_stays_as_it_was_and_is_not_looked_at_again():
    model, batch = convert_ffn_to_fff(tiny_bert(), "2x3"), tiny_inputs(tiny_bert())
    model.train()
    before, state = outputs(model.eval(), batch), copy.deepcopy(model.state_dict())
    model.train()
    made = fff_openvino.compile(model, "f32", ov_config=ONE)
    found = made(**batch)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert same(model.state_dict(), state) and same(outputs(model.eval(), batch), before)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert same(dict(made(**batch)), dict(found))


def test_half_precision_models_are_computed_in_float32():
    model = convert_ffn_to_fff(tiny_bert(), "2x3").bfloat16()
    batch = tiny_inputs(model)
    found = fff_openvino.compile(model, "f32", ov_config=ONE)(**batch)
    assert model.dtype == torch.bfloat16
    close_where_visible(found, outputs(model.float(), batch), batch["attention_mask"])


def int8(kind="2x3", **options):
    pytest.importorskip("nncf", reason="nncf is not installed")
    model = convert_ffn_to_fff(tiny_bert(initializer_range=0.1), kind)
    texts = [" ".join(WORDS[(i + 7 * j) % 100] for j in range(4 + i % 9)) for i in range(40)]
    return model, fff_openvino.compile(model, texts=texts, tokenizer=tiny_tokenizer(), ov_config=ONE, **options)


@pytest.fixture(scope="module")
def quantised_model():
    torch.manual_seed(0)
    return int8(rows="int8")[1]


def types_of(made):
    return {
        n.get_rt_info()["runtimePrecision"].astype(str) for n in made.compiled.get_runtime_model().get_ordered_ops()
    }


def test_int8_products_and_close_outputs():
    model, made = int8("none")  # without decisions, that fall otherwise
    batch = tiny_inputs(model, 6, 12)
    assert any("8" in kind for kind in types_of(made))
    found, want = made(**batch).last_hidden_state, outputs(model, batch)["last_hidden_state"]
    visible = batch["attention_mask"].bool()
    assert torch.nn.functional.cosine_similarity(found[visible], want[visible], dim=-1).mean() > 0.98
    assert not torch.equal(found, want)


def int8_weights(graph):
    """Of matrix products, as they are stored."""
    for product in graph.get_ops():
        if product.get_type_name() == "MatMul":
            node = product.input_value(1).get_node()
            while node.get_type_name() in ("Multiply", "Subtract", "Convert", "FakeQuantize"):
                node = node.input_value(0).get_node()
            if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.i8:
                yield node.get_data().astype(int)


def test_weights_of_7_bits_without_vnni(monkeypatch, tmp_path):
    """No sum of two products leaves 16 bits then; who opens a model of the other kind on such a machine is told."""
    most = {}
    for has in (True, False):
        monkeypatch.setattr(model_module, "has_vnni", lambda has=has: has)
        _, made = int8("none")
        most[has] = [np.abs(weights).max() for weights in int8_weights(made._graph)]
        made.save_pretrained(tmp_path / str(has))
    assert len(most[True]) == 13 and set(most[True]) <= {127, 128} and set(most[False]) <= {63, 64}
    assert fff_openvino.load(tmp_path / "False", ov_config=ONE).precision == "int8"
    with pytest.warns(UserWarning, match="was made for a CPU with VNNI, which this one lacks"):
        fff_openvino.load(tmp_path / "True", ov_config=ONE)


def test_cpus_with_vnni(monkeypatch):
    monkeypatch.setattr(quantise.platform, "machine", lambda: "x86_64")
    for features, has in (
        (["avx2"], False),
        (["avx512f", "avx512_vnni"], True),
        (["avx_vnni"], True),
        (["amx_int8"], True),
    ):
        monkeypatch.setattr(quantise, "cpu_features", lambda features=features: features)
        assert quantise.has_vnni() == has
    monkeypatch.setattr(quantise.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(quantise, "cpu_features", list)
    assert quantise.has_vnni()


def test_products_that_stay_in_float32(tmp_path):
    _, made = int8("none", keep=["encoder.layer.0.*", "*.1.attention.output.dense"])
    quantised = {
        node.get_friendly_name().removeprefix("__module.model.").partition("/")[0]
        for node in made._graph.get_ops()
        if node.get_type_name() == "MatMul"
        and any(port.get_node().get_type_name() == "FakeQuantize" for port in node.input_values())
    }
    assert not any(name.startswith("encoder.layer.0.") for name in quantised)
    assert "encoder.layer.1.attention.output.dense" not in quantised
    assert {"encoder.layer.1.attention.self.query", "encoder.layer.2.attention.output.dense"} <= quantised
    made.save_pretrained(tmp_path / "m")
    kept = json.loads((tmp_path / "m" / "fff_openvino.json").read_text())["keep"]
    assert kept == ["encoder.layer.0.*", "*.1.attention.output.dense"]
    assert fff_openvino.load(tmp_path / "m", ov_config=ONE).precision == "int8"


@pytest.mark.parametrize(
    ("precision", "rows", "want"), [("f32", "auto", "f32"), ("bf16", "auto", "bf16"), ("f32", "int8", "int8")]
)
def test_rows(precision, rows, want):
    """Whole models against torch's with the same rows, hidden tokens skipped in both or not."""
    model = convert_ffn_to_fff(tiny_bert(), "2x3")
    made = fff_openvino.compile(model, precision, rows=rows, ov_config=ONE)
    kinds = {n.get_type_name() for n in graphs.operations(made._graph)}
    assert (made.rows, made.operations, kinds) == (want, 3, {"FFF" if want == "f32" else "PackedFFF"})
    if precision == "f32":
        batch = tiny_inputs(model, 4, 15)
        like = model if want == "f32" else optimize(model, want)
        close_where_visible(made(**batch), outputs(like, batch), batch["attention_mask"])


@pytest.mark.parametrize(("vnni", "want"), [(True, "int8"), (False, "bf16")])
def test_rows_that_go_with_int8_attention(vnni, want, monkeypatch, tmp_path):
    """By the CPU that will run it, which is this one where none is named; and as they were named."""
    _, made = int8(vnni=vnni)
    made.save_pretrained(tmp_path / "m")
    assert made.rows == want and json.loads((tmp_path / "m" / "fff_openvino.json").read_text())["rows"] == want
    assert {packed_rows(node).rows for node in graphs.operations(made._graph)} == {want}
    monkeypatch.setattr(model_module, "has_vnni", lambda: vnni)
    assert int8()[1].rows == want and int8(rows="f32")[1].rows == "f32"


def packed_rows(node):
    return packed_backend.read_header(torch.tensor(node.input_value(1).get_node().get_data()), whole=True)


def test_int8_attention_with_rows_of_int8(quantised_model):
    nodes = graphs.operations(quantised_model._graph)
    assert quantised_model.rows == "int8" and len(nodes) == 3
    headers = [packed_rows(node) for node in nodes]
    assert {(h.rows, h.n_trees, h.depth) for h in headers} == {("int8", 2, 3)}


def test_shared_layers_are_packed_once():
    model = convert_ffn_to_fff(tiny_model("albert"), "2x3")
    made = fff_openvino.compile(model, "f32", rows="int8", ov_config=ONE)
    nodes = graphs.operations(made._graph)
    assert len(nodes) > 1 and len({n.input_value(1).get_node().get_friendly_name() for n in nodes}) == 1
    batch = {k: v for k, v in tiny_inputs(model).items() if k in made._inputs}
    close_where_visible(made(**batch), outputs(optimize(model), batch), batch["attention_mask"])


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_saved_and_loaded_gives_the_same_bits(precision, quantised_model, tmp_path):
    made = quantised_model
    if precision == "f32":
        how = Embedding((("Pooling", {"pooling_mode": "cls"}), ("Normalize", {})), 20)
        model = convert_ffn_to_fff(tiny_bert(), "2x3")
        made = fff_openvino.compile(model, "f32", tokenizer=tiny_tokenizer(), embedding=how, ov_config=ONE)
    made.save_pretrained(tmp_path / "a" / "out")
    names = {p.name for p in (tmp_path / "a" / "out").iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "config.json", "tokenizer.json", "fff_openvino.json"} <= names
    loaded = fff_openvino.load(tmp_path / "a" / "out", ov_config=ONE)
    for rows, tokens in ((1, 3), (4, 17)):
        batch = tiny_inputs(tiny_bert(), rows, tokens)
        assert same(dict(made(**batch)), dict(loaded(**batch)))
    assert (loaded.precision, loaded.operations, loaded.embedding) == (precision, 3, made.embedding)
    assert loaded.rows == precision
    if precision == "int8":  # to lines of the caches, wherever they lie in the file
        starts = [n.input_value(1).get_node().get_data().ctypes.data for n in graphs.operations(loaded._graph)]
        assert [start % 64 for start in starts] == [0] * 3
    texts = [WORDS[3], " ".join(WORDS[:9])]
    assert np.array_equal(made.encode(texts), loaded.encode(texts))
    loaded.save_pretrained(tmp_path / "b")  # and again
    assert same(dict(fff_openvino.load(tmp_path / "b", ov_config=ONE)(**batch)), dict(made(**batch)))


def test_an_output_folder_that_exists_stays_as_it_is(quantised_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"):
        quantised_model.save_pretrained(tmp_path)
    quantised_model.tokenizer, kept = SimpleNamespace(save_pretrained=lambda folder: 1 / 0), quantised_model.tokenizer
    with pytest.raises(ZeroDivisionError):
        quantised_model.save_pretrained(tmp_path, overwrite=True)
    quantised_model.tokenizer = kept
    assert listing(tmp_path) == before
    quantised_model.save_pretrained(tmp_path, overwrite=True)
    assert "file" not in listing(tmp_path)


def test_threads_call_at_once(quantised_model):
    batches = [tiny_inputs(tiny_bert(), rows, 12, seed=rows) for rows in range(1, 7)]
    want, found = [dict(quantised_model(**b)) for b in batches], {}

    def work(i):
        for _ in range(10):
            found[i] = dict(quantised_model(**batches[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(same(found[i], want[i]) for i in range(len(batches)))


@pytest.mark.parametrize("calls", [3000, pytest.param(100_000, marks=pytest.mark.full)])
def test_calls_use_no_memory(calls, quantised_model):
    """The same shapes again and again, and results that nobody keeps."""
    batches = [tiny_inputs(tiny_bert(), rows, 16) for rows in (1, 8)]

    def resident(count):
        for i in range(count):
            quantised_model(**batches[i % 2])
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident(200)
    assert resident(calls) - before < 8 << 20  # 3000 results are 27 MB


def test_encode_is_that_of_sentence_transformers(minilm_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(minilm_path), device="cpu")
    texts = ["A plane is taking off.", "Cats.", "", "word " * 300, "An air plane takes off, and nobody knows where to."]
    with pytest.warns(UserWarning, match="holds no FFF"):
        made = fff_openvino.compile(model, "f32")
    assert made.embedding == Embedding.of_folder(minilm_path, minilm_path) or made.embedding.max_length == 256
    want = model.encode(texts, batch_size=2)
    np.testing.assert_allclose(made.encode(texts, batch_size=2), want, atol=1e-5)
    np.testing.assert_allclose(made.encode(texts[0]), want[0], atol=1e-5)
    assert made.encode([]).shape == (0, 384)


def test_pooling_from_a_folder(tmp_path):
    types = ["Transformer", "Pooling", "Normalize"]
    rows = [{"idx": i, "path": f"{i}_x" if i else "", "type": f"a.b.{t}"} for i, t in enumerate(types)]
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    (tmp_path / "1_x").mkdir()
    (tmp_path / "1_x" / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_max_tokens": true}')
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    how = Embedding.of_folder(tmp_path, tmp_path)
    tokens, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    want = torch.stack(
        [torch.cat([tokens[0, 0], tokens[0, :2].amax(0)]), torch.cat([tokens[1, 1], tokens[1, 1:].amax(0)])]
    )
    torch.testing.assert_close(how.pooled(tokens, mask), want / want.norm(dim=-1, keepdim=True))
    assert how.prompted("x", None, "query") == "q: x"
    with pytest.raises(ValueError, match="prompt_name='other' is not known"):
        how.prompted("x", None, "other")
    with pytest.raises(ValueError, match="'Dense'"):
        Embedding((("Dense", {}),)).pooled(tokens, mask)
    with pytest.raises(ValueError, match="pooling_mode='lasttoken'"):
        Embedding((("Pooling", {"pooling_mode": "lasttoken"}),)).pooled(tokens, mask)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.tensor([[5, 120]])}, "input_ids has the value 120; the model knows 0 to 119"),
        ({"input_ids": torch.tensor([[-1]])}, "input_ids has the value -1"),
        ({"input_ids": torch.tensor([5, 6])}, r"it must be \[rows, tokens\] of integers"),
        ({"input_ids": torch.zeros(1, 2)}, "of integers"),
        ({"input_ids": torch.zeros(0, 2).long()}, "with something in it"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)}, r"attention_mask is \[1, 3\]"),
        (
            {"input_ids": torch.ones(1, 1).long(), "token_type_ids": torch.full((1, 1), 2)},
            "token_type_ids has the value 2",
        ),
    ],
)
def test_wrong_inputs(batch, message, quantised_model):
    with pytest.raises(ValueError, match=message):
        quantised_model(**batch)


def test_wrong_models_and_options(monkeypatch):
    model = convert_ffn_to_fff(tiny_bert(), "2x3")
    with pytest.raises(ValueError, match=r"precision='int4' is not known \(allowed: int8, bf16, f32\)"):
        fff_openvino.compile(model, "int4")
    with pytest.raises(ValueError, match=r"rows='int4' is not known \(allowed: auto, int8, bf16, f32\)"):
        fff_openvino.compile(model, "f32", rows="int4")
    for precision, keep, message in (
        ("f32", ["encoder.*"], r"keep=\['encoder.*'\] is for int8, and precision='f32'"),
        ("int8", "encoder.*", r"keep='encoder.\*' must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            fff_openvino.compile(model, precision, keep=keep)
    with pytest.raises(ValueError, match="vnni=False is for int8, and precision='bf16'"):
        fff_openvino.compile(model, "bf16", vnni=False)
    with pytest.raises(ValueError, match=r"keep='\*.ffn' names no module .*encoder.layer.0.attention.self.query"):
        quantise.products(graphs.to_graph(model)[0], ["*.key", "*.ffn"])
    with pytest.raises(ValueError, match="needs texts="):
        fff_openvino.compile(model)
    with pytest.raises(ValueError, match="needs tokenizer="):
        fff_openvino.compile(model, texts=["word1"])
    with pytest.raises(ValueError, match="dtype=torch.float64"):
        fff_openvino.compile(copy.deepcopy(model).double(), "f32")
    with pytest.raises(ValueError, match="this is a Linear"):
        fff_openvino.compile(nn.Linear(2, 2), "f32")
    monkeypatch.setitem(__import__("sys").modules, "nncf", None)
    with pytest.raises(ImportError, match=r"hf-fff\[openvino\]"):
        quantise.quantised(None, [])
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ImportError, match=r"hf-fff\[openvino\]"):
        fff_openvino.compile(model, "f32")


def test_adapters_are_merged_first():
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    model = convert_ffn_to_fff(tiny_bert(HEADS["ForSequenceClassification"]), "2x3", init="random")
    config = {"target_modules": ["query"], "target_parameters": fff_target_parameters(model)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config, init_lora_weights=False)).eval()
    batch = tiny_inputs(model)
    want = outputs(adapted, batch)["logits"]
    with pytest.raises(ValueError, match=r"adapted by PEFT .*: merge_and_unload\(\) gives the model to compile"):
        fff_openvino.compile(adapted, "f32")
    merged = fff_openvino.compile(adapted.merge_and_unload(), "f32", ov_config=ONE)
    torch.testing.assert_close(merged(**batch).logits, want, rtol=0, atol=1e-3)


def test_folders_that_cannot_be_loaded(quantised_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no fff_openvino.json"):
        fff_openvino.load(tmp_path)
    quantised_model.save_pretrained(tmp_path / "m")
    with pytest.raises(RuntimeError, match="FFF"):  # what an engine says that was not given the extension
        ov.Core().read_model(tmp_path / "m" / "openvino_model.xml")
    xml = tmp_path / "m" / "openvino_model.xml"
    text = xml.read_text()
    xml.write_text(text.replace('version="hf_fff.1"', 'version="hf_fff.7"'))
    with pytest.raises(ValueError, match=r"version 'hf_fff\.7'.*export the model again"):
        fff_openvino.load(tmp_path / "m")
    xml.write_text(text)
    facts = tmp_path / "m" / "fff_openvino.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "version": 3}))
    with pytest.raises(ValueError, match="a version that this hf_fff does not read"):
        fff_openvino.load(tmp_path / "m")


def test_a_folder_from_before_packed_rows(tmp_path):
    """Version 1: FFF with weights of bf16, no rows in its facts."""
    model = convert_ffn_to_fff(tiny_bert(), "2x3")
    made = fff_openvino.compile(model, "bf16", rows="f32", ov_config=ONE)
    weights_in_bf16(made._graph)
    made.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "fff_openvino.json"
    facts = {**json.loads(path.read_text()), "version": 1}
    del facts["rows"]
    path.write_text(json.dumps(facts))
    loaded, batch = fff_openvino.load(tmp_path / "m", ov_config=ONE), tiny_inputs(model)
    assert loaded.rows == "bf16" and loaded.operations == 3
    close_where_visible(loaded(**batch), outputs(model, batch), batch["attention_mask"], 0.1)


@pytest.fixture
def not_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "_statuses", {})
    monkeypatch.setenv("HF_FFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_FFF_KERNEL_PATH", raising=False)


def test_without_a_compiler_a_prebuilt_library_serves(not_loaded, extension, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_FFF_CXX", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="the openvino library cannot be loaded: no c.. compiler found"):
        fff_openvino.extension()
    loader._statuses.clear()
    monkeypatch.setenv("HF_FFF_KERNEL_PATH", str(extension.parent))
    assert fff_openvino.extension() == extension


def test_a_library_for_another_version(not_loaded, extension, monkeypatch):
    monkeypatch.setattr(library, "engine_version", lambda: "2031.0.0")
    monkeypatch.setenv("HF_FFF_KERNEL_PATH", str(extension.parent))
    with pytest.raises(RuntimeError, match="was compiled for OpenVINO .*, and 2031.0.0 is installed"):
        fff_openvino.extension()


def test_export_command(tmp_path):
    model = convert_ffn_to_fff(tiny_bert(HEADS["ForSequenceClassification"], num_labels=3), "2x3")
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(tmp_path / "m")
    result = run("export", tmp_path / "m", tmp_path / "out", "--precision", "bf16", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["operations"] == 3 and json.loads(result.stdout)["rows"] == "bf16"
    batch = tiny_inputs(model)
    loaded = fff_openvino.load(tmp_path / "out")
    assert loaded(**batch).logits.shape == (3, 3) and loaded.precision == "bf16"
    result = run("export", tmp_path / "m", tmp_path / "b", "--precision", "f32", "--rows", "int8")
    assert result.exit_code == 0 and "3 FFFs of int8 rows" in unwrapped(result.output)
    for options, message in (
        (["--rows", "f16"], "'auto', 'int8', 'bf16', 'f32'"),
        (["--precision", "int8"], "some hundreds of typical texts"),
        (["--precision", "f32"], "not empty"),
        (["--engine", "tvm"], "'openvino', 'onnx'"),
        (["--precision", "bf16", "--keep", "encoder.*"], "is for --precision int8"),
        (["--engine", "onnx", "--keep", "encoder.*"], "is not for onnx"),
        (["--engine", "onnx", "--no-vnni"], "is not for onnx"),
    ):
        result = run("export", tmp_path / "m", tmp_path / "out", *options)
        assert result.exit_code == 2 and message in unwrapped(result.output)
