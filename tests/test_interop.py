"""Converted models under what else is done to models: quantised attention, other number formats, other places."""

import copy
import warnings

import accelerate
import pytest
import torch
from tiny import HEADS, tiny_bert, tiny_inputs
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from hf_fff import convert_ffn_to_fff, fff_target_parameters
from hf_fff.layers import FFF

PARTS = ("weight_in", "bias_in", "weight_out")


@pytest.fixture
def model():
    """Hidden size 64, below which bitsandbytes has no 4-bit gradients."""
    dense = tiny_bert(HEADS["ForSequenceClassification"], num_labels=3, hidden_size=64, initializer_range=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return convert_ffn_to_fff(dense, "2x3", init="random").eval()


@pytest.fixture
def folder(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model):
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits


def trees(model):
    return [m for m in model.modules() if isinstance(m, FFF)]


def assert_trees_are(model, original, dtype=torch.float32):
    """Plain parameters, with the values that were saved."""
    assert len(trees(model)) == len(trees(original)) == 3
    for one, other in zip(trees(model), trees(original), strict=True):
        for part in PARTS:
            parameter = getattr(one, part)
            assert type(parameter) is nn.Parameter and torch.equal(parameter, getattr(other, part).to(dtype)), part


def load(folder, **options):
    return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


# --- quantisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("loaded", [False, True], ids=["quantize_", "from_pretrained"])
def test_torchao(model, folder, name, loaded):
    """Linear layers are quantised, FFFs stay as they are; the rest of the arithmetic too: a plain model with the weights that
    the quantised ones stand for gives the same."""
    quantization = pytest.importorskip("torchao.quantization", reason="the package torchao is not installed")
    config = getattr(quantization, name)()
    if loaded:
        from transformers import TorchAoConfig

        quantised = load(folder, quantization_config=TorchAoConfig(config))
    else:
        quantised = copy.deepcopy(model)
        quantization.quantize_(quantised, config)
    assert_trees_are(quantised, model)
    plain = copy.deepcopy(model)
    changed = 0
    for name_of, module in quantised.named_modules():
        if (
            isinstance(module, nn.Linear)
            and hasattr(module.weight, "dequantize")
            and type(module.weight) is not nn.Parameter
        ):
            plain.get_submodule(name_of).weight = nn.Parameter(module.weight.dequantize())
            changed += 1
    assert changed >= 3 * 4
    error = (logits(quantised) - logits(plain)).abs().max()
    assert error < (1e-4 if name == "Int8WeightOnlyConfig" else 0.2)


def test_torchao_does_not_take_trees(model):
    """Who asks for it by a filter is told, and not left with a model that is quantised in part."""
    quantization = pytest.importorskip("torchao.quantization", reason="the package torchao is not installed")
    with pytest.raises(AssertionError, match="requires module to have"):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda m, _: isinstance(m, FFF))


@pytest.mark.parametrize("how", ["torchao", "bitsandbytes"])
def test_quantised_weights_are_no_delta(tmp_path, model, folder, how):
    """A delta borrows from the dense model, which has none of them."""
    pytest.importorskip(how, reason=f"the package {how} is not installed")
    if how == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    else:
        model = load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")
    with pytest.raises(ValueError, match="the model is quantised: save the delta of the model that it was quantised"):
        model.save_pretrained(tmp_path / "delta", delta=str(folder))
    assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(model, folder, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    # Where it computes with packed weights on a CPU, it wants multiples of 32 outputs, which a classifier has not.
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["classifier"])
    quantised = load(folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    assert sum(isinstance(m, kind) for m in quantised.modules()) >= 3 * 4
    assert_trees_are(quantised, model, torch.bfloat16)
    half = copy.deepcopy(model).to(torch.bfloat16)
    cosine = torch.cosine_similarity(logits(quantised).float(), logits(half).float())
    assert cosine.min() > 0.8  # of three logits, with attention in a few bits


def test_qlora(tmp_path, model, folder):
    """Attention in 4 bits and frozen, adapters on it and on FFFs in bfloat16: the loss falls, the base stays, and the saved adapters
    give the same on the base loaded anew."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["classifier"]
    )

    def base():
        return load(folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")

    quantised = base()
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in quantised.modules()) >= 3 * 4
    names = fff_target_parameters(quantised)
    settings = peft.LoraConfig(target_modules=["query", "value"], target_parameters=names, r=4)
    adapted = peft.get_peft_model(quantised, settings).train()
    batch = tiny_inputs(model, rows=6)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 0.01)
    losses, moved = [], set()
    for _ in range(40):
        loss = adapted(**batch, labels=labels).loss
        loss.backward()
        moved |= {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    for part in ("intermediate.base_layer.lora_B", "intermediate.lora_B", "query.lora_B"):
        assert sum(part in name for name in moved) == 3
    assert_trees_are(adapted, model, torch.bfloat16)
    trained = logits(adapted.eval())
    assert trained.isfinite().all() and (trained - logits(base())).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()), trained)


# --- number formats and places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_number_formats(model, folder, dtype):
    """Changed in place or while loading, it is the same model, and near the original."""
    changed = {
        torch.bfloat16: lambda m: m.bfloat16(),
        torch.float16: lambda m: m.half(),
        torch.float64: lambda m: m.double(),
    }
    moved = changed[dtype](copy.deepcopy(model))
    loaded = load(folder, dtype=dtype)
    assert_trees_are(moved, model, dtype)
    assert_trees_are(loaded, model, dtype)
    assert torch.equal(logits(moved), logits(loaded)) and logits(moved).dtype == dtype
    cosine = torch.cosine_similarity(logits(moved).float(), logits(model))
    assert cosine.min() > (0.9 if dtype == torch.bfloat16 else 0.999)


def test_meta(model):
    """Shapes without numbers."""
    want = logits(model)
    meta = copy.deepcopy(model).to("meta")
    out = meta(torch.zeros(3, 9, dtype=torch.long, device="meta")).logits
    assert out.device.type == "meta" and out.shape == want.shape


PLACES = {
    "bert.embeddings": "cpu",
    "bert.encoder.layer.0": "disk",
    "bert.encoder.layer.1": "cpu",
    "bert.encoder.layer.2": "disk",
    "bert.pooler": "cpu",
    "classifier": "cpu",
}


@pytest.mark.parametrize("device_map", ["auto", "cpu", PLACES], ids=["auto", "cpu", "disk"])
def test_device_map(tmp_path, model, folder, device_map):
    if torch.cuda.is_available() and device_map == "auto":
        pytest.skip("a GPU rounds otherwise")
    loaded = load(folder, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert torch.equal(logits(loaded), logits(model))


def test_offload(tmp_path, model):
    """Weights that come from memory or a disk for each call."""
    want = logits(model)
    on_disk = accelerate.disk_offload(copy.deepcopy(model), str(tmp_path), execution_device=torch.device("cpu"))
    in_memory = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    for offloaded in (on_disk, in_memory):
        assert all(t.weight_in.device.type == "meta" for t in trees(offloaded))
        for _ in range(2):
            assert torch.equal(logits(offloaded), want)


def test_empty_then_filled(folder, model):
    with accelerate.init_empty_weights():
        empty = AutoModelForSequenceClassification.from_config(model.config)
    filled = accelerate.load_checkpoint_and_dispatch(empty, str(folder), device_map={"": "cpu"}).eval()
    assert torch.equal(logits(filled), logits(model))
