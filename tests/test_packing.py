"""``optimize``: models with packed trees; and that nothing else keeps a copy of the weights that could be stale."""

import copy
import pickle
import warnings

import oracle
import pytest
import torch
from tiny import HEADS, outputs, tiny_bert, tiny_inputs, tiny_model
from torch import nn

import hf_fff
from hf_fff import FFF, optimize, packing
from hf_fff import convert_ffn_to_fff as convert_and_warn
from hf_fff.layers import LINEARS, PackedFFF, PackedLinear, PackedMLP
from hf_fff.layers.linear import why_not
from hf_fff.models import known_types


def convert(model, config="4x3", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return convert_and_warn(model, config, **options)


def near(a, b, bound=0.1):
    """In the median of the tokens: a turn near a tie makes a large error in trees as narrow as these."""
    errors = [(a[k] - b[k]).norm(dim=-1) / b[k].norm(dim=-1) for k in b if b[k].is_floating_point()]
    return all(e.median() <= bound for e in errors)


@pytest.mark.parametrize("rows", hf_fff.ops.ROWS)
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_a_converted_model(head, rows):
    model = convert(tiny_bert(HEADS[head])).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    fast, batch = optimize(model, rows=rows), tiny_inputs(model)
    assert type(fast) is type(model) and not any(m.training for m in fast.modules())
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert sum(isinstance(m, PackedFFF) for m in fast.modules()) == 3 and not any(
        isinstance(m, FFF) for m in fast.modules()
    )
    assert near(outputs(fast, batch), outputs(model.eval(), batch))
    own = dict(model.named_parameters())
    shared = dict(fast.named_parameters())
    assert shared and all(p is own[n] for n, p in shared.items()) and not any("weight_in" in n for n in shared)


def test_controls_stay():
    model = convert(tiny_bert(), {0: "4x3+mlp:8", 1: "mlp:8", 2: "none"})
    fast = optimize(model)
    assert sum(isinstance(m, PackedFFF) for m in fast.modules()) == 1
    assert sum(type(m).__name__ in ("MLP", "NoFFN") for m in fast.modules()) == 3
    assert near(outputs(fast, tiny_inputs(model)), outputs(model, tiny_inputs(model)))


@pytest.mark.parametrize("family", ["albert", "distilbert", "modernbert", "mobilebert"])
def test_other_families(family):
    model = convert(tiny_model(family))
    fast, batch = optimize(model, rows="bf16"), tiny_inputs(model)
    batch = {k: v for k, v in batch.items() if k != "token_type_ids"}
    assert near(outputs(fast, batch), outputs(model, batch))
    assert len({id(m) for m in fast.modules() if isinstance(m, PackedFFF)}) == len(
        {id(m) for m in model.modules() if isinstance(m, FFF)}
    )


def test_any_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.ffn = nn.Linear(16, 16), FFF(16, "2x3")

        def forward(self, x):
            return self.ffn(self.a(x))

    net, x = Net(), torch.randn(5, 16)
    fast = optimize(net)
    assert fast.a.weight is net.a.weight and (fast(x) - net(x)).norm() < 0.1 * net(x).norm()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_the_same_and_are_not_saved_either(make, tmp_path):
    model = optimize(convert(tiny_bert()))
    other, batch = make(model), tiny_inputs(model)
    a, b = outputs(model, batch), outputs(other, batch)
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(RuntimeError, match="save the model that was optimized"):
        other.save_pretrained(tmp_path / "out")


def test_saving_is_refused_before_anything_is_written(tmp_path):
    model = convert(tiny_bert(HEADS["ForSequenceClassification"]))
    fast = optimize(model)
    for saves in (fast, fast.base_model):
        with pytest.raises(RuntimeError, match="save the model that was optimized"):
            saves.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "in")
    loaded = optimize(type(model).from_pretrained(tmp_path / "in"))
    a, b = outputs(fast, tiny_inputs(model)), outputs(loaded, tiny_inputs(model))
    assert all(torch.equal(a[k], b[k]) for k in a)
    loaded.load_state_dict(fast.state_dict())


def test_other_types_of_numbers():
    model = convert(tiny_bert()).bfloat16()
    fast, batch = optimize(model), tiny_inputs(model)
    y = outputs(fast, batch)["last_hidden_state"]
    assert y.dtype == torch.bfloat16
    assert near({"y": y.float()}, {"y": outputs(model, batch)["last_hidden_state"].float()})
    wide = copy.deepcopy(fast).to(torch.float32)
    assert near(outputs(wide, batch), outputs(copy.deepcopy(model).float(), batch), 0.2)
    assert y.dtype == outputs(fast, batch)["last_hidden_state"].dtype


def test_training_is_refused():
    model = optimize(convert(tiny_bert()))
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()(**tiny_inputs(model))
    y = model.eval()(**tiny_inputs(model)).last_hidden_state
    with pytest.raises(RuntimeError, match="it is for inference"):
        y.sum().backward()


def test_bad_arguments():
    model = convert(tiny_bert())
    with pytest.raises(ValueError, match="rows='int4' is not known"):
        optimize(model, rows="int4")
    with pytest.raises(ValueError, match="no FFF layers in this BertModel: convert_ffn_to_fff"):
        optimize(tiny_bert())
    with pytest.raises(ValueError, match="packed already"):
        optimize(optimize(model))
    with pytest.raises(ValueError, match="not a module"):
        optimize("a folder")
    with pytest.raises(ValueError, match="meta"):
        optimize(convert(tiny_bert()).to("meta"))
    ffn = next(m for m in model.modules() if isinstance(m, FFF))
    ffn.weight_in = nn.Parameter(ffn.weight_in.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight_in is a Tensor of torch.int8: quantised"):
        optimize(model)


def test_what_holds_a_model():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from task_rows import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    inner = convert(tiny_bert(vocab_size=len(tokenizer)))
    module = nn.Module()
    module.auto_model = inner
    holder = sentence_transformers.SentenceTransformer(modules=[nn.Identity(), module])
    fast = optimize(holder)
    assert type(fast) is type(holder) and fast[1].auto_model is not inner
    assert any(isinstance(m, PackedFFF) for m in fast.modules()) and any(isinstance(m, FFF) for m in holder.modules())
    for save in (fast.save, fast.save_pretrained, fast[1].auto_model.save_pretrained):
        with pytest.raises(RuntimeError, match="save the model that was optimized"):
            save("nowhere")


# ---- freshness: layers that train keep no copy of their weights -------------------------------------------------------------


def _fused_adamw(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def _data(layer):
    layer.weight_in.data.mul_(-1)
    layer.weight_out.data[3] = 7


def _load(layer):
    layer.load_state_dict(FFF(24, "3x4").state_dict())


def _in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight_out.mul_(2)
        layer.bias_in.add_(1)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("change", [_fused_adamw, _data, _load, _in_inference_mode])
def test_changes_are_seen_at_once(change, inference):
    layer, x = FFF(24, "3x4"), torch.randn(6, 24)
    guard = torch.inference_mode if inference else torch.no_grad

    def check():
        with guard():
            ys, packed = [layer(x), layer(x)], optimize(layer_in_a_module(layer))[0](x)
        want, _, _ = oracle.fff(x, *layer.parameters(), 3)
        want_packed, _ = oracle.fff_packed(x, *layer.parameters(), 3, "int8")
        assert all(abs(oracle.array(y) - want).max() < 1e-4 * abs(want).max() for y in ys)
        assert abs(oracle.array(packed) - want_packed).max() < 0.03 * abs(want_packed).max()
        return ys[0].clone()

    before = check()
    change(layer)
    assert not torch.equal(check(), before)


def layer_in_a_module(layer):
    return nn.Sequential(layer)


def test_peft_target_parameters():
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("ffn", FFF(24, "3x4"))
    x = torch.randn(6, 24)
    plain = model(x)
    config = peft.LoraConfig(
        r=2, target_parameters=["ffn.weight_in", "ffn.weight_out"], target_modules=[], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        first, again = adapted(x), adapted(x)
    assert torch.equal(first, again) and not torch.allclose(first, plain)
    with pytest.raises(ValueError, match="merge_and_unload"):
        optimize(adapted)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora" in name:
                p.data.mul_(2)
        assert not torch.equal(adapted(x), first)
        merged = adapted.merge_and_unload()
        ffn = merged.ffn
        want, _, _ = oracle.fff(x, ffn.weight_in, ffn.bias_in, ffn.weight_out, 3)
        assert abs(oracle.array(merged(x)) - want).max() < 1e-4 * abs(want).max()
        packed, _ = oracle.fff_packed(x, ffn.weight_in, ffn.bias_in, ffn.weight_out, 3, "int8")
        assert abs(oracle.array(optimize(merged)(x)) - packed).max() < 0.03 * abs(packed).max()


# ---- what is dense ------------------------------------------------------------------------------------------------------------


def can(kind):
    if why := why_not(kind):
        pytest.skip(f"no products of {kind} here: {why}")


@pytest.mark.parametrize("linears", LINEARS)
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_linears(head, linears):
    can(linears)
    model = convert(tiny_bert(HEADS[head]), {0: "4x3", 1: "mlp:8", 2: "2x3+mlp:8"}).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    fast, batch = optimize(model, linears=linears), tiny_inputs(model)
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    kinds = [type(m) for m in fast.modules()]
    assert nn.Linear not in kinds and kinds.count(PackedFFF) == 2 and kinds.count(PackedMLP) == 2
    assert kinds.count(PackedLinear) == 4 + sum(type(m) is nn.Linear for m in model.modules())
    a, b = outputs(fast, batch), outputs(model.eval(), batch)
    assert near(a, b) and not any(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize("linears", LINEARS)
def test_linears_of_a_dense_model(linears):
    can(linears)
    model = tiny_bert()
    assert near(outputs(optimize(model, linears=linears), tiny_inputs(model)), outputs(model, tiny_inputs(model)), 0.05)


@pytest.mark.parametrize(
    "family",
    [
        "modernbert",
        *(pytest.param(f, marks=pytest.mark.full) for f in known_types() if f not in ("bert", "modernbert")),
    ],
)
def test_linears_of_other_families(family):
    can("int8")
    model = convert(tiny_model(family))
    batch = {k: v for k, v in tiny_inputs(model).items() if k != "token_type_ids"}
    assert near(outputs(optimize(model, "bf16", "int8"), batch), outputs(model, batch), 0.2)


def test_copies_with_linears_are_not_saved_either(tmp_path):
    can("int8")
    model = convert(tiny_bert())
    fast, batch = optimize(model, linears="int8"), tiny_inputs(model)
    first = outputs(fast, batch)  # what is made at the first call is no part of copies and states
    other = optimize(convert(tiny_bert(seed=1)), linears="int8")
    other.load_state_dict(fast.state_dict())
    for same in (copy.deepcopy(fast), other):
        assert all(torch.equal(v, first[k]) for k, v in outputs(same, batch).items())
    with pytest.raises(RuntimeError, match="save the model that was optimized"):
        fast.save_pretrained(tmp_path / "out")
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fast.train()(**batch)


def test_linears_that_cannot_be(monkeypatch):
    model = convert(tiny_bert())
    with pytest.raises(ValueError, match=r"linears='int4' is not known \(allowed: int8, bf16, None\)"):
        optimize(model, linears="int4")
    monkeypatch.setattr(packing, "why_not", lambda kind: "no such products")
    with pytest.raises(RuntimeError, match="linears='bf16' does not work here: no such products"):
        optimize(model, linears="bf16")
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="query.weight is not finite"):
        optimize(model, linears="int8")
