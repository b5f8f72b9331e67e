"""FastBERT: every head, saved and loaded again, and its manners as a transformers model."""

import copy
import fnmatch
import json
import pickle
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import HEADS, outputs, same, tiny_bert, tiny_inputs, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_fff
from hf_fff import FastBertConfig, FastBertForMaskedLM, FastBertForSequenceClassification, FastBertModel, FFFConfig
from hf_fff import convert_ffn_to_fff as convert_and_warn
from hf_fff.layers import FFF
from hf_fff.models.classes import model_classes

FFFS = ["1x11", "32x6"]
MIXED = {0: "4x3", 2: FFFConfig(2, 5, "relu")}  # and layer 1 dense
CONTROLS = {0: "mlp:8", 1: "none", 2: "2x3+mlp:4"}


def convert(model, config="4x3", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return convert_and_warn(model, config, **options)


def fast_tiny(head="Model", config="4x3", **fields):
    return convert(tiny_bert(HEADS[head], **fields), config)


def auto_class(head):
    return getattr(transformers, f"Auto{'ModelFor' + head.removeprefix('For') if head != 'Model' else 'Model'}")


def load_clean(auto, folder, **options):
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.mark.parametrize("config", [*FFFS, MIXED, CONTROLS], ids=[*FFFS, "mixed", "controls"])
@pytest.mark.parametrize("head", HEADS)
def test_save_and_load(tmp_path, head, config):
    fast = fast_tiny(head, config)
    assert type(fast) is getattr(hf_fff, f"FastBert{head}")
    batch = tiny_inputs(fast)
    want = outputs(fast, batch, output_hidden_states=True)
    fast.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "fastbert" and stored["fff"]["version"] == 1
    assert stored["architectures"] == [f"FastBert{head}"]
    for source in (auto_class(head), type(fast)):
        loaded = load_clean(source, tmp_path)
        assert type(loaded) is type(fast) and not loaded.training
        assert loaded.config.fff_layers == fast.config.fff_layers
        assert same(loaded.state_dict(), fast.state_dict())
        got = outputs(loaded, batch, output_hidden_states=True)
        assert got.keys() == want.keys() and all(torch.allclose(got[k], want[k], atol=1e-5) for k in want)
        # Bit for bit, once the weights lie in memory as they did: torch's matmul may round otherwise where a file's
        # tensors are not aligned, and does so for dense models too.
        assert same(outputs(copy.deepcopy(loaded), batch, output_hidden_states=True), want)


def test_mixed_layers_are_what_they_should_be():
    fast = fast_tiny(config=MIXED)
    kinds = [type(layer.intermediate).__name__ for layer in fast.encoder.layer]
    assert kinds == ["FFF", "BertIntermediate", "FFF"]
    assert fast.encoder.layer[2].intermediate.config == FFFConfig(2, 5, "relu")
    assert list(fast.config.fff_layers) == [0, 2]


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_shards(tmp_path, head):
    fast = fast_tiny(head, "32x6")
    fast.save_pretrained(tmp_path, max_shard_size="400KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and len(list(tmp_path.glob("*.safetensors"))) > 2
    batch = tiny_inputs(fast)
    loaded = load_clean(auto_class(head), tmp_path)
    assert same(loaded.state_dict(), fast.state_dict())
    assert same(outputs(copy.deepcopy(loaded), batch), outputs(fast, batch))


@pytest.mark.parametrize("head", HEADS)
def test_state_dict_names(head):
    """What is not the FFN keeps BERT's names."""
    dense = tiny_bert(HEADS[head])
    fast = convert(dense)
    before, after = set(dense.state_dict()), set(fast.state_dict())
    assert {k.rsplit(".", 1)[1] for k in after - before} == {"weight_in", "bias_in", "weight_out"}
    assert all(".intermediate." in k for k in after - before)
    assert all(".intermediate.dense." in k or k.endswith("output.dense.weight") for k in before - after)


def test_attention_implementations_agree(tmp_path):
    fast = fast_tiny(config="4x3")
    fast.save_pretrained(tmp_path)
    batch = tiny_inputs(fast)
    got = {}
    for name in ("eager", "sdpa"):
        loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == name
        got[name] = outputs(loaded, batch)["last_hidden_state"][batch["attention_mask"].bool()]
    assert torch.allclose(got["eager"], got["sdpa"], atol=1e-5)
    eager = convert(tiny_bert(attn_implementation="eager"))
    assert eager.config._attn_implementation == "eager"


def test_hidden_states_and_attentions():
    fast = fast_tiny(attn_implementation="eager")
    out = fast(**tiny_inputs(fast), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    assert all(h.shape == (3, 9, 32) for h in out.hidden_states) and out.attentions[0].shape == (3, 2, 9, 9)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


def test_layer_is_attention_then_fff():
    """One layer, by hand."""
    fast = fast_tiny()
    seen = {}
    block = fast.encoder.layer[1]
    block.attention.register_forward_hook(lambda m, a, out: seen.update(x=out[0] if isinstance(out, tuple) else out))
    hidden = fast(**tiny_inputs(fast), output_hidden_states=True).hidden_states
    x = seen["x"]
    y = block.output.LayerNorm(block.intermediate(x) + block.output.dense.bias + x)
    assert torch.allclose(hidden[2], y, atol=1e-6)


def gradients(model, batch):
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    fast = fast_tiny("ForMaskedLM", "2x3", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    batch = tiny_inputs(fast)
    want = gradients(fast, batch)
    calls = []
    fast.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        fast.enable_input_require_grads()
    got = gradients(fast, batch)
    assert len(calls) == 2  # forward, and again in backward
    assert want.keys() == got.keys() and all(torch.allclose(want[k], got[k], atol=1e-6) for k in want)


def test_chunked_feed_forward():
    fast = fast_tiny()
    batch = tiny_inputs(fast, tokens=8)
    chunked = convert(tiny_bert(chunk_size_feed_forward=4))
    assert all(torch.allclose(v, outputs(chunked, batch)[k], atol=1e-6) for k, v in outputs(fast, batch).items())


def test_every_parameter_gets_a_gradient():
    fast = fast_tiny("ForMaskedLM")
    assert all(g is not None for g in gradients(fast, tiny_inputs(fast)).values())


def test_a_step_lowers_the_loss():
    for head in ("ForMaskedLM", "ForSequenceClassification"):
        fast = fast_tiny(head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        batch = tiny_inputs(fast)
        batch["labels"] = batch["input_ids"] if head == "ForMaskedLM" else torch.tensor([0, 1, 1])
        optimizer = torch.optim.AdamW(fast.parameters(), lr=1e-3)
        losses = []
        for _ in range(4):
            loss = fast(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_resize_token_embeddings(tmp_path):
    fast = fast_tiny("ForMaskedLM")
    batch = tiny_inputs(fast)
    want = outputs(fast, batch)["logits"]
    fast.resize_token_embeddings(130)
    assert (
        fast.config.vocab_size == 130
        and fast.cls.predictions.decoder.weight is fast.bert.embeddings.word_embeddings.weight
    )
    assert torch.allclose(outputs(fast, batch)["logits"][..., :120], want, atol=1e-5)
    fast.save_pretrained(tmp_path)
    assert same(load_clean(AutoModelForMaskedLM, tmp_path).state_dict(), fast.state_dict())


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tmp_path, head, tied):
    fast = fast_tiny(head, tie_word_embeddings=tied)
    fast.save_pretrained(tmp_path)
    for model in (fast, load_clean(auto_class(head), tmp_path)):
        decoder = model.cls.predictions.decoder
        assert (decoder.weight is model.bert.embeddings.word_embeddings.weight) == tied
        assert not tied or decoder.bias is model.cls.predictions.bias
        assert (id(decoder.weight) in {id(p) for p in model.bert.parameters()}) == tied


def test_fsdp_plan():
    for head in ("Model", "ForSequenceClassification"):
        base = fast_tiny(head).base_model
        names = [name for name, _ in base.named_modules()]
        plan = base.config.base_model_fsdp_plan
        assert any(fnmatch.fnmatch("encoder.layer.0", key) for key in plan)
        for key in plan:
            assert any(fnmatch.fnmatch(name, key) for name in names), key


def test_half_precision(tmp_path):
    fast = fast_tiny("ForMaskedLM")
    batch = tiny_inputs(fast)
    want = outputs(fast, batch)["logits"]
    fast.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = load_clean(AutoModelForMaskedLM, tmp_path, dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        got = outputs(loaded, batch)["logits"]
        assert got.dtype == dtype and got.isfinite().all()
        # A rounded logit may send a token another way: most tokens, not all, are close
        off = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
        assert off.median() < 0.1
        loaded(**batch, labels=batch["input_ids"]).loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert outputs(fast, batch)["logits"].isfinite().all()


def test_saved_in_half_precision(tmp_path):
    fast = convert(tiny_bert().bfloat16())
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    fast.save_pretrained(tmp_path)
    loaded = load_clean(AutoModel, tmp_path)
    assert loaded.dtype == torch.bfloat16
    batch = tiny_inputs(fast)
    assert same(loaded.state_dict(), fast.state_dict())
    assert same(outputs(copy.deepcopy(loaded), batch), outputs(fast, batch))


def test_copy_and_pickle():
    fast = fast_tiny("ForSequenceClassification", MIXED)
    batch = tiny_inputs(fast)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert same(outputs(other, batch), outputs(fast, batch))
        assert other.config.fff_layers == fast.config.fff_layers
    assert copy.deepcopy(fast.config).to_dict() == fast.config.to_dict()


def test_compile():
    fast = fast_tiny()
    batch = tiny_inputs(fast)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(**batch).last_hidden_state, fast(**batch).last_hidden_state, atol=1e-5)


def test_from_config():
    torch.manual_seed(0)
    config = FastBertConfig(**tiny_bert().config.to_diff_dict() | {"fff": "8x3"})
    for auto in (AutoModel, AutoModelForSequenceClassification):
        model = auto.from_config(config).eval()
        layer = model.base_model.encoder.layer[1]
        assert isinstance(layer.intermediate, FFF) and layer.intermediate.config.shorthand == "8x3"
        assert not layer.output.dense.bias.any() and layer.intermediate.weight_in.std() > 0.01
        assert outputs(model, tiny_inputs(model))
    with torch.device("meta"):
        assert all(p.is_meta for p in FastBertModel(config).parameters())


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_first_values_after_the_meta_device(head):
    """As sharded training makes models: without memory, then with whatever was in it, then with first values."""
    config = FastBertConfig(**tiny_bert().config.to_diff_dict() | {"fff": CONTROLS})
    with torch.device("meta"):
        fast = getattr(hf_fff, f"FastBert{head}")(config)
    fast.to_empty(device="cpu")
    with torch.no_grad():
        for p in fast.parameters():
            p.fill_(float("nan"))
    fast.init_weights()
    assert all(p.isfinite().all() for p in fast.parameters())
    both = fast.base_model.encoder.layer[2].intermediate
    assert all(0.01 < part.weight_in.std() < 1 for part in (both.trees, both.mlp))
    assert not fast.base_model.encoder.layer[1].output.dense.bias.any()
    made = getattr(hf_fff, f"FastBert{head}").from_pretrained(None, config=config, state_dict={})
    assert all(p.isfinite().all() for p in made.parameters())


def test_first_values_are_the_familys_own():
    """ModernBERT gives a classifier its first values from the module around it."""
    fields = {k: v for k, v in tiny_model("modernbert").config.to_dict().items() if k != "model_type"}
    config = hf_fff.FastModernBertConfig(**fields | {"hidden_size": 400, "fff": "2x3"})  # its range is 0.2
    make = hf_fff.FastModernBertForSequenceClassification
    for fast in (make(config), make.from_pretrained(None, config=config, state_dict={})):
        assert fast.classifier.weight.detach().std().item() == pytest.approx(400**-0.5, rel=0.2)
        assert fast.model.layers[1].attn.Wo.weight.detach().std().item() == pytest.approx(0.2 / 6**0.5, rel=0.2)


def test_heads_are_registered():
    made = model_classes("bert")
    assert len(HEADS) == len(made)
    for head, dense in HEADS.items():
        fast = made[dense]
        assert fast is getattr(hf_fff, f"FastBert{head}") and issubclass(fast, dense)
        assert type(auto_class(head).from_config(FastBertConfig(**tiny_bert().config.to_diff_dict()))) is fast


def test_base_from_head_and_head_from_base(tmp_path):
    base = fast_tiny(config=MIXED)
    base.save_pretrained(tmp_path / "base")
    head, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    batch = tiny_inputs(base)
    assert same(outputs(copy.deepcopy(head.bert), batch), outputs(base, batch))
    head.save_pretrained(tmp_path / "head")
    again, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert set(info["unexpected_keys"]) <= {"classifier.weight", "classifier.bias"} and not info["missing_keys"]
    assert same(outputs(copy.deepcopy(again), batch), outputs(base, batch))


def test_new_number_of_labels(tmp_path):
    """Finetuning for another task: the classifier may differ, the FFNs stay."""
    fast = fast_tiny("ForSequenceClassification")
    fast.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    batch = tiny_inputs(fast)
    assert outputs(loaded, batch)["logits"].shape == (3, 5)
    assert same(loaded.bert.state_dict(), fast.bert.state_dict())


# --- config ---------------------------------------------------------------------------------------------------------


def test_config_takes_all_forms():
    tree = FFFConfig(8, 8)
    forms = ["8x8", tree, {"n_trees": 8, "depth": 8}, {"version": 1, "n_trees": 8, "depth": 8}, {0: "8x8", 1: tree}]
    for fff in forms:
        config = FastBertConfig(num_hidden_layers=2, fff=fff)
        assert config.fff_layers == {0: tree, 1: tree}
        assert config.fff == {"version": 1, **tree.to_dict()}
    mixed = FastBertConfig(num_hidden_layers=3, fff={2: "8x8"})
    assert mixed.fff == {"version": 1, "layers": {"2": tree.to_dict()}}
    assert FastBertConfig(num_hidden_layers=3, fff=mixed.fff).fff_layers == {2: tree}
    assert FastBertConfig(num_hidden_layers=3, fff={"version": 1, "layers": {}}).fff_layers == {}


def test_config_default():
    assert FastBertConfig().fff_layers == dict.fromkeys(range(12), FFFConfig(1, 11))
    assert FastBertConfig().model_type == "fastbert"


def test_config_takes_the_models_activation():
    assert FastBertConfig(fff="8x8", hidden_act="relu").fff_layers[0].activation == "relu"
    assert FastBertConfig(fff={0: "8x8"}, hidden_act="gelu_pytorch_tanh").fff_layers[0].activation == "gelu_new"
    assert FastBertConfig(fff=FFFConfig(8, 8), hidden_act="relu").fff_layers[0].activation == "gelu"
    with pytest.raises(ValueError, match="mish"):
        FastBertConfig(hidden_act="mish")


@pytest.mark.parametrize("fff", ["1x11", "8x8", {1: "8x8"}], ids=str)
def test_config_on_disk(tmp_path, fff):
    config = FastBertConfig(fff=fff)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["fff"] == config.fff
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FastBertConfig and loaded.to_json_string() == config.to_json_string()
    assert type(AutoConfig.for_model("fastbert", fff=fff)) is FastBertConfig


@pytest.mark.parametrize("fff", [None, 8, "8y8", "8x99", {}, ["8x8"], {"n_trees": 8}], ids=str)
def test_config_refuses(fff):
    with pytest.raises(ValueError, match=r"fff|depth"):
        FastBertConfig(fff=fff)


def test_fff_given_while_loading(tmp_path):
    fast = fast_tiny(config="4x3")
    fast.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, fff="8x8").fff_layers == dict.fromkeys(range(3), FFFConfig(8, 8))
    load_clean(AutoModel, tmp_path, fff="4x3")
    with pytest.raises((ValueError, RuntimeError), match=r"intermediate\.weight_in"):
        AutoModel.from_pretrained(tmp_path, fff="4x4")


# --- tokenizers and pipelines ---------------------------------------------------------------------------------------

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *[chr(c) for c in range(97, 123)],
    *[f"word{i}" for i in range(89)],
]


def write_vocab(folder):
    assert len(WORDS) == 120
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")


def test_tokenizer_from_vocab_alone(tmp_path):
    FastBertConfig().save_pretrained(tmp_path)
    write_vocab(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__.startswith("BertTokenizer")
    ids = tokenizer("word3 Word7", "a")
    assert ids["input_ids"] == [2, 34, 38, 3, 5, 3] and ids["token_type_ids"] == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("feature-extraction", "Model"),
        ("fill-mask", "ForMaskedLM"),
        ("text-classification", "ForSequenceClassification"),
        ("token-classification", "ForTokenClassification"),
    ],
)
def test_pipelines(tmp_path, task, head):
    fast_tiny(head).save_pretrained(tmp_path)
    write_vocab(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    result = transformers.pipeline(task, model=str(tmp_path), device="cpu")("a [MASK] word7")
    if task == "feature-extraction":
        assert torch.tensor(result).shape == (1, 5, 32)
    elif task == "token-classification":
        assert all(item["entity"].startswith("LABEL_") for item in result)
    else:
        assert len(result) == (5 if task == "fill-mask" else 1) and all(0 <= item["score"] <= 1 for item in result)


# --- checkpoints that do not fit ------------------------------------------------------------------------------------

ERRORS = (ValueError, RuntimeError)


@pytest.fixture
def saved(tmp_path):
    fast_tiny("ForSequenceClassification", {0: "4x3", 1: "4x3"}).save_pretrained(tmp_path)
    return tmp_path


def edit_weights(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder, edit):
    file = folder / "config.json"
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


def refuses(folder, message, **options):
    for auto in (AutoModel, AutoModelForSequenceClassification, FastBertForSequenceClassification):
        with pytest.raises(ERRORS, match=message):
            auto.from_pretrained(folder, **options)


LAYER = "bert.encoder.layer.1."
NAMES = ["intermediate.weight_in", "intermediate.bias_in", "intermediate.weight_out", "output.dense.bias"]


@pytest.mark.parametrize("name", NAMES)
def test_missing_tensor(saved, name):
    edit_weights(saved, lambda tensors: tensors.pop(LAYER + name))
    refuses(saved, rf"1 missing \(.*encoder\.layer\.1\.{name}")


@pytest.mark.parametrize(
    "options", [{}, {"ignore_mismatched_sizes": True}, {"ignore_mismatched_sizes": False}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_shape(saved, name, options):
    edit_weights(saved, lambda tensors: tensors.update({LAYER + name: torch.cat([tensors[LAYER + name]] * 2)}))
    refuses(saved, rf"1 of another shape \(.*encoder\.layer\.1\.{name}", **options)


def test_wrong_shape_elsewhere(saved):
    """As in transformers."""
    edit_weights(saved, lambda tensors: tensors.update({"classifier.bias": torch.zeros(5)}))
    with pytest.raises(RuntimeError, match=r"classifier\.bias.*ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(saved)
    AutoModelForSequenceClassification.from_pretrained(saved, ignore_mismatched_sizes=True)


def test_superfluous_fff(saved):
    """The config says that layer 1 is dense."""
    edit_config(saved, lambda values: values["fff"]["layers"].pop("1"))
    refuses(saved, r"missing \(.*layer\.1\.intermediate\.dense.*unexpected \(.*layer\.1\.intermediate\.bias_in")


def test_superfluous_tensor(saved):
    edit_weights(saved, lambda tensors: tensors.update({LAYER + "intermediate.weight_inner": torch.zeros(3)}))
    refuses(saved, r"1 unexpected \(.*layer\.1\.intermediate\.weight_inner")


@pytest.mark.parametrize("fff", ["4x4", "5x3"])
def test_another_tree(saved, fff):
    tree = FFFConfig.from_shorthand(fff).to_dict()
    edit_config(saved, lambda values: values["fff"]["layers"].update({"0": tree}))
    refuses(saved, r"3 of another shape \(.*layer\.0\.intermediate\.bias_in")


def test_dense_checkpoint_under_a_fast_config(tmp_path):
    dense = tiny_bert(HEADS["ForSequenceClassification"])
    dense.save_pretrained(tmp_path)
    with pytest.raises(ERRORS, match=r"missing \(.*unexpected \(.*convert_ffn_to_fff"):
        FastBertForSequenceClassification.from_pretrained(tmp_path)
    edit_config(
        tmp_path, lambda values: values.update(model_type="fastbert", fff={"version": 1, "n_trees": 8, "depth": 3})
    )
    refuses(tmp_path, r"missing \(.*unexpected \(.*convert_ffn_to_fff")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "fff.version=2 is newer.*update hf_fff"),
        ({"version": None}, "fff.version=None"),
        ({"forest": 3}, "'layers' and 'forest'.*contradict"),
        ({"n_trees": 8, "depth": 3}, "'layers' and 'depth', 'n_trees'.*contradict"),
        ({"layers": {"0": {"n_trees": 4, "depth": 3, "leaf": 1}}}, "unknown fff field.*'leaf'"),
        ({"layers": {"7": {"n_trees": 4, "depth": 3}}}, "7; the model has layers 0 to 2"),
        ({"layers": {"0": {"n_trees": 4, "depth": 3, "kind": "forest"}}}, "kind='forest'"),
        ({"layers": {"0": {"n_trees": 4, "depth": 3, "activation": "mish"}}}, "activation='mish'"),
    ],
)
def test_config_that_cannot_be(saved, change, message):
    edit_config(saved, lambda values: values["fff"].update(change))
    refuses(saved, message)
    with pytest.raises(ERRORS, match=message):
        AutoConfig.from_pretrained(saved)


def test_all_is_well_without_those_changes(saved):
    load_clean(AutoModelForSequenceClassification, saved)
    assert isinstance(FastBertForMaskedLM.from_pretrained(saved), FastBertForMaskedLM)
