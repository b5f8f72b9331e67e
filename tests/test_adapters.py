"""PEFT on converted models: adapters train, save, load, merge, and are what the kernel reads."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tiny import HEADS, tiny_bert, tiny_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification

from hf_fff import convert_ffn_to_fff, fff_target_parameters, fff_usage, ops
from hf_fff.layers import FFF

peft = pytest.importorskip("peft", reason="the package peft is not installed")


def converted(model, fff="2x3"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return convert_ffn_to_fff(model, fff, init="random").double()


@pytest.fixture
def model():
    return converted(tiny_bert(HEADS["ForSequenceClassification"], num_labels=3))


def config(model, **options):
    usual = {"target_modules": ["query", "value"], "target_parameters": fff_target_parameters(model), "r": 4}
    return peft.LoraConfig(**{**usual, **options})


def adapted(model, **options):
    return peft.get_peft_model(copy.deepcopy(model), config(model, **options)).eval()


def filled(model, **options):
    """With adapters that change something; fresh ones are zero."""
    return adapted(model, init_lora_weights=False, **options)


def logits(model, seed=0):
    with torch.no_grad():
        return model(**tiny_inputs(model, seed=seed)).logits


def train(model, steps=40, lr=0.02):
    """The losses, and the parameters that got gradients."""
    batch = tiny_inputs(model, rows=6)
    batch["labels"] = torch.tensor([0, 1, 2, 2, 1, 0])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses, moved = [], set()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        moved |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, moved


def test_names(model):
    names = fff_target_parameters(model)
    assert names == [
        f"bert.encoder.layer.{i}.intermediate.{part}" for i in range(3) for part in ("weight_in", "weight_out")
    ]
    with_adapters = adapted(model)
    assert fff_target_parameters(with_adapters) == names
    assert fff_target_parameters(adapted(model, target_parameters=None, modules_to_save=["intermediate"])) == names
    with pytest.raises(ValueError, match="BertForSequenceClassification holds no FFF"):
        fff_target_parameters(tiny_bert(HEADS["ForSequenceClassification"]))


@pytest.mark.parametrize("model_type", ["modernbert", "albert", "distilbert", "mobilebert", "squeezebert"])
def test_other_families(model_type):
    """Gated, shared, stacked and channels-first networks have other names, and shared ones only one."""
    model = converted(tiny_model(model_type))
    names = fff_target_parameters(model)
    shapes = {name: model.get_parameter(name).shape for name in names}
    assert {*shapes.values()} == {torch.Size([30, 32])}
    with_adapters = filled(model, target_modules=[])
    assert sum("lora_A" in name for name, _ in with_adapters.named_parameters()) == len(names)
    batch = {k: v for k, v in tiny_inputs(model).items() if k != "token_type_ids"}
    with torch.no_grad():
        want = with_adapters(**batch).last_hidden_state
        assert (want - model(**batch).last_hidden_state).abs().max() > 1e-3
        torch.testing.assert_close(with_adapters.merge_and_unload()(**batch).last_hidden_state, want)


# how: what LoraConfig is given, and what then gets gradients in a layer beside attention's adapters
WAYS = {
    "on FFFs and attention": ({}, {"intermediate.base_layer.lora_A", "intermediate.lora_B"}),
    "on FFFs alone": ({"target_modules": []}, {"intermediate.base_layer.lora_B", "intermediate.lora_A"}),
    "on attention alone": ({"target_parameters": None}, {"query.lora_A", "value.lora_B"}),
    "FFFs whole": (
        {"target_parameters": None, "modules_to_save": ["intermediate"]},
        {f"intermediate.modules_to_save.default.{n}" for n in ("weight_in", "bias_in", "weight_out")},
    ),
}


@pytest.mark.parametrize(("options", "gradients"), WAYS.values(), ids=WAYS)
def test_train_save_load_merge(tmp_path, model, options, gradients):
    before = logits(model)
    trained = adapted(model, **options)
    assert torch.equal(logits(trained), before)
    losses, moved = train(trained.train())
    trained.eval()
    assert losses[-1] < 0.3 * losses[0]
    for layer in range(3):
        for part in gradients:
            assert any(f"layer.{layer}." in name and part in name for name in moved), part
    base = {name for name, _ in model.named_parameters()}
    assert not any(name.removeprefix("base_model.model.") in base for name in moved)  # the base is frozen
    want = logits(trained)
    assert (want - before).abs().max() > 0.1

    trained.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), want, rtol=0, atol=0)

    trained.merge_adapter()
    torch.testing.assert_close(logits(trained), want)
    trained.unmerge_adapter()
    torch.testing.assert_close(logits(trained), want)
    with trained.disable_adapter():
        torch.testing.assert_close(logits(trained), before)

    merged = trained.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(logits(merged), want)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(logits(again), want)
    assert torch.equal(logits(model), before)  # which nobody touched


class Calls(TorchDispatchMode):
    """The matrices that the operator is called with."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.hf_fff.fff.default, torch.ops.hf_fff.fff_train.default):
            self.weights.append((args[1].clone(), args[3].clone()))
        return function(*args, **(kwargs or {}))


def expected_weights(with_adapters, base):
    """Each layer's base matrices plus its adapters' products, from PEFT's definition alone: W + alpha / r * B A."""
    state = {name: p.detach() for name, p in with_adapters.named_parameters()}
    for i in range(3):
        at = f"base_model.model.bert.encoder.layer.{i}.intermediate."
        fff = base.bert.encoder.layer[i].intermediate
        for inner, weight in (("base_layer.", fff.weight_in), ("", fff.weight_out)):
            a, b = (state[f"{at}{inner}lora_{x}.default.weight"] for x in "AB")
            yield weight + 8 / 4 * b @ a


@pytest.mark.parametrize("grad", [True, False])
def test_the_operator_reads_the_adapted_weights(model, grad):
    """Now, not those of an earlier call: the operator is given the sum each time."""
    with_adapters = filled(model)
    if ops.load("cpu").loaded:
        assert ops.backend() == "native"
    for _ in range(2):
        with torch.set_grad_enabled(grad), Calls() as calls:
            with_adapters(**tiny_inputs(model))
        got = [w for pair in calls.weights for w in pair]
        # the wrapper of weight_in is the inner one
        for have, want in zip(got, expected_weights(with_adapters, model), strict=True):
            torch.testing.assert_close(have, want)
        with torch.no_grad():
            for name, p in with_adapters.named_parameters():
                if "lora_B" in name:
                    p.add_(torch.randn_like(p))
            for fff in (m for m in [*model.modules(), *with_adapters.modules()] if isinstance(m, FFF)):
                fff.weight_in.mul_(1.01)


def test_gradients_are_those_of_the_sum(model):
    """Of B: dL/dW A^T alpha / r, with dL/dW from a plain model that holds the sum."""
    with_adapters = filled(model, target_modules=[]).train()
    plain = copy.deepcopy(model).train()
    with torch.no_grad():
        sums = expected_weights(with_adapters, model)
        for layer in plain.bert.encoder.layer:
            layer.intermediate.weight_in.copy_(next(sums))
            layer.intermediate.weight_out.copy_(next(sums))
    for m in (with_adapters, plain):
        m.eval()
        m(**tiny_inputs(model), labels=torch.tensor([0, 1, 2])).loss.backward()
    layer = with_adapters.base_model.model.bert.encoder.layer[1].intermediate
    for wrapper, name in ((layer, "weight_out"), (layer.base_layer, "weight_in")):
        grad = getattr(plain.bert.encoder.layer[1].intermediate, name).grad
        a = wrapper.lora_A["default"].weight
        torch.testing.assert_close(wrapper.lora_B["default"].weight.grad, 2 * grad @ a.T)


def test_two_adapters(model):
    with_adapters = filled(model)
    first = logits(with_adapters)
    with_adapters.add_adapter("other", config(with_adapters, init_lora_weights=False))
    assert torch.equal(logits(with_adapters), first)
    with_adapters.set_adapter("other")
    second = logits(with_adapters)
    assert (first - second).abs().max() > 1e-3
    with_adapters.set_adapter("default")
    assert torch.equal(logits(with_adapters), first)
    with_adapters.base_model.set_adapter(["default", "other"])
    both = logits(with_adapters)
    torch.testing.assert_close(logits(with_adapters.merge_and_unload(adapter_names=["default", "other"])), both)


def test_adapter_on_other_parameters_is_refused(model):
    with_adapters = filled(model)
    some = fff_target_parameters(model)[:2]
    with pytest.raises(ValueError, match="all adapters must target the same set of parameters"):
        with_adapters.add_adapter("other", config(model, target_parameters=some))


def test_single_layers(model):
    some = [name for name in fff_target_parameters(model) if "layer.1." in name]
    with_adapters = filled(model, target_modules=[], target_parameters=some)
    names = [name for name, p in with_adapters.named_parameters() if p.requires_grad]
    assert len(names) == 4 and all("layer.1.intermediate" in name for name in names)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_peft_refuses_on_parameters(model, options):
    with pytest.raises(ValueError, match=f"does not work with {next(iter(options))}"):
        adapted(model, **options)
    adapted(model, target_parameters=None, **options)  # beside FFFs it is welcome


def test_vectors_are_refused(model):
    with pytest.raises(ValueError, match="1 dimensional Parameter"):
        adapted(model, target_parameters=["intermediate.bias_in"])


def test_an_fff_is_no_target_module(model):
    with pytest.raises(ValueError, match="Target module FFF.* is not supported"):
        adapted(model, target_modules=["intermediate"], target_parameters=None)


def test_all_linear_leaves_trees(model):
    with_adapters = adapted(model, target_modules="all-linear", target_parameters=None)
    names = [name for name, p in with_adapters.named_parameters() if p.requires_grad]
    assert sum("attention" in name for name in names) == 3 * 4 * 2
    assert not any("intermediate" in name for name in names)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_trees_stay(model, bias):
    """``bias=`` means what is called "bias", which the trees' ``bias_in`` is not."""
    with_adapters = adapted(model, bias=bias)
    trained = [name for name, p in with_adapters.named_parameters() if p.requires_grad and "lora" not in name]
    assert any("query.base_layer.bias" in name for name in trained)
    assert not any("bias_in" in name for name in trained)


def test_adapter_of_other_shapes(tmp_path, model):
    filled(model).save_pretrained(tmp_path)
    other = converted(tiny_bert(HEADS["ForSequenceClassification"], num_labels=3), "2x2")
    with pytest.raises(RuntimeError, match=r"size mismatch for .*intermediate"):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_adapter_of_fffs_on_a_dense_model(tmp_path, model):
    """PEFT warns, and loads what is left of it."""
    filled(model).save_pretrained(tmp_path)
    dense = tiny_bert(HEADS["ForSequenceClassification"], num_labels=3)
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        peft.PeftModel.from_pretrained(dense, tmp_path)


def test_what_is_saved_is_small(tmp_path, model):
    filled(model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_parameters"] == fff_target_parameters(model)
    numbers = sum(p.numel() for name, p in filled(model).named_parameters() if "lora" in name)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 8 * numbers + 10_000


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_opened_by_its_folder_alone(tmp_path, model, task_type):
    """The adapter's folder names the converted model that it is for, and the task or the class, which PEFT wants to be allowed."""
    model.save_pretrained(tmp_path / "fast")
    fast = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast", dtype=torch.float64)
    with_adapters = filled(fast, task_type=task_type)
    with_adapters.save_pretrained(tmp_path / "adapter")
    auto = peft.AutoPeftModelForSequenceClassification if task_type else peft.AutoPeftModel
    allowed = {} if task_type else {"import_allowlist": ["hf_fff.models.classes"]}
    opened = auto.from_pretrained(tmp_path / "adapter", dtype=torch.float64, **allowed)
    assert type(opened.base_model.model) is type(model)
    assert torch.equal(logits(opened.eval()), logits(with_adapters))


def test_merged_as_a_delta(tmp_path):
    """What was trained is the delta's, and the rest the dense model's; unmerged, it would be neither."""
    tiny_bert(HEADS["ForSequenceClassification"], num_labels=3).save_pretrained(tmp_path / "dense")
    fast = converted(HEADS["ForSequenceClassification"].from_pretrained(tmp_path / "dense")).float()
    with_adapters = filled(fast)
    with pytest.raises(ValueError, match=r"merge_and_unload\(\) gives the model to save as a delta"):
        with_adapters.base_model.model.save_pretrained(tmp_path / "delta", delta=str(tmp_path / "dense"))
    assert not (tmp_path / "delta").exists()
    merged = with_adapters.merge_and_unload()
    merged.save_pretrained(tmp_path / "delta", delta=str(tmp_path / "dense"))
    kept = {name.split(".", 4)[-1] for name in load_file(tmp_path / "delta" / "fff_delta.safetensors")}
    trees = {f"intermediate.{part}" for part in ("weight_in", "bias_in", "weight_out")}
    assert kept == {*trees, "attention.self.query.weight", "attention.self.value.weight"}
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")
    assert torch.equal(logits(again), logits(merged))


def test_checkpointed_activations(model):
    """Recomputed with the adapters in place."""
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        with_adapters = filled(model).train()
        if checkpointed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with_adapters.gradient_checkpointing_enable()
        for m in with_adapters.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0
        with_adapters(**tiny_inputs(model), labels=torch.tensor([0, 1, 2])).loss.backward()
        grads.append({n: p.grad for n, p in with_adapters.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("intermediate" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize(
    "options", [{}, {"target_parameters": None, "modules_to_save": ["intermediate"]}], ids=["lora", "saved"]
)
def test_usage_is_that_of_the_adapted_trees(model, options):
    wrapped = filled(model, **options)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    told = fff_usage(wrapped, [tiny_inputs(model)])
    assert set(told) == {0, 1, 2} and told != fff_usage(model, [tiny_inputs(model)])
    assert told == fff_usage(wrapped.merge_and_unload(), [tiny_inputs(model)])
