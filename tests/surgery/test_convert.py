"""convert_ffn_to_fff: what changes, what stays, and what is refused."""

import copy
import warnings

import pytest
import torch
from tiny import HEADS, outputs, same, tiny_bert, tiny_inputs
from transformers import BertModel, FNetConfig, FNetModel

from hf_fff import Calibration, FFFConfig, convert_ffn_to_fff
from hf_fff.layers import FFF, OutputBias
from hf_fff.surgery.dense import DenseNeurons
from hf_fff.surgery.initialise import init_from_dense

NOT_CALIBRATED = "ignore:the converted model is not calibrated"
pytestmark = pytest.mark.filterwarnings(NOT_CALIBRATED)


def calibration(**options):
    ids = torch.randint(5, 120, (40, 12), generator=torch.Generator().manual_seed(0))
    return Calibration(ids, **{"steps": 2, "batch_tokens": 128, "progress": False, **options})


PLANS = {"plain": lambda: None, "calibrated": calibration}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification"])
def test_the_input_model_is_unchanged(head, plan):
    model = tiny_bert(HEADS[head])
    batch = tiny_inputs(model)
    state, want, config = copy.deepcopy(model.state_dict()), outputs(model, batch), model.config.to_json_string()
    modules = [(name, type(m)) for name, m in model.named_modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    fast = convert_ffn_to_fff(model, "4x3", calibration=PLANS[plan]())
    assert same(model.state_dict(), state) and same(outputs(model, batch), want)
    assert model.config.to_json_string() == config and not hasattr(model.config, "fff")
    assert [(name, type(m)) for name, m in model.named_modules()] == modules
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())
    assert not same(outputs(fast, batch), want)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("head", HEADS)
def test_the_rest_is_shared(head, plan):
    model = tiny_bert(HEADS[head])
    fast = convert_ffn_to_fff(model, "4x3", target_layers=[0, 2], calibration=PLANS[plan]())
    theirs, shared = dict(model.named_parameters(remove_duplicate=False)), 0
    for name, p in fast.named_parameters(remove_duplicate=False):
        fitted = any(f"layer.{i}.output.dense.bias" in name for i in (0, 2))
        if ".intermediate." in name and "layer.1." not in name:
            assert all(p is not other and p.data_ptr() != other.data_ptr() for other in theirs.values()), name
        elif fitted and plan == "calibrated":
            assert (
                p is not theirs[name] and p.data_ptr() != theirs[name].data_ptr() and not torch.equal(p, theirs[name])
            )
        else:
            assert p is theirs[name], name
            shared += 1
    assert shared > 30
    assert not any(t.is_meta for t in (*fast.parameters(), *fast.buffers()))
    assert all(b is dict(model.named_buffers())[name] for name, b in fast.named_buffers())


def test_config_of_the_result():
    model = tiny_bert(HEADS["ForSequenceClassification"], num_labels=4, id2label={i: f"l{i}" for i in range(4)})
    model.name_or_path = "somewhere"
    fast = convert_ffn_to_fff(model, "4x3")
    assert fast.config.model_type == "fastbert" and fast.name_or_path == "somewhere"
    assert fast.config.id2label == model.config.id2label and fast.classifier.out_features == 4
    mine, theirs = fast.config.to_dict(), model.config.to_dict()
    own = {"fff", "model_type", "architectures", "_name_or_path"}
    assert {k: v for k, v in mine.items() if k not in own} == {k: v for k, v in theirs.items() if k not in own}
    assert model.config.id2label is not fast.config.id2label


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new", "silu"])
def test_activation_of_the_model(activation):
    model = tiny_bert(hidden_act=activation)
    for config in ("4x3", {"n_trees": 4, "depth": 3}, {0: "4x3"}):
        fast = convert_ffn_to_fff(model, config)
        assert fast.encoder.layer[0].intermediate.config.activation == activation
        assert fast.config.fff_layers[0].activation == activation
    assert convert_ffn_to_fff(model, FFFConfig(4, 3, "relu")).encoder.layer[0].intermediate.config.activation == "relu"


def test_which_layers():
    model = tiny_bert()
    fast = convert_ffn_to_fff(model, "4x3", target_layers=(2, 1))
    assert list(fast.config.fff_layers) == [1, 2]
    assert [isinstance(layer.intermediate, FFF) for layer in fast.encoder.layer] == [False, True, True]
    assert [isinstance(layer.output.dense, OutputBias) for layer in fast.encoder.layer] == [False, True, True]
    fast = convert_ffn_to_fff(model, {0: "4x3", 2: FFFConfig(1, 5)}, calibration=calibration())
    assert fast.encoder.layer[0].intermediate.config.shorthand == "4x3"
    assert fast.encoder.layer[2].intermediate.config.shorthand == "1x5"
    assert not isinstance(fast.encoder.layer[1].intermediate, FFF)
    assert set(fast.calibration_report.unexplained) == {0, 2}
    # before the first converted layer, nothing differs
    batch = tiny_inputs(model)
    dense = outputs(model, batch, output_hidden_states=True)
    late = outputs(convert_ffn_to_fff(model, "4x3", target_layers=[2]), batch, output_hidden_states=True)
    equal = [torch.equal(late[f"hidden_states.{i}"], dense[f"hidden_states.{i}"]) for i in range(4)]
    assert equal == [True, True, True, False]


@pytest.mark.parametrize("shape", ["1x3", "8x3", "4x6", "1x7"])  # fewer and more nodes than dense neurons
def test_nodes_are_dense_neurons(shape):
    model = tiny_bert()
    fast = convert_ffn_to_fff(model, shape)
    for dense, block in zip(model.encoder.layer, fast.encoder.layer, strict=True):
        fff = block.intermediate
        equal = (fff.weight_in.unsqueeze(1) == dense.intermediate.dense.weight).all(-1)
        assert (equal.sum(1) == 1).all()
        neurons = equal.float().argmax(1)
        assert torch.equal(fff.bias_in, dense.intermediate.dense.bias[neurons])
        ratio = fff.weight_out / dense.output.dense.weight.T[neurons]
        assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4)
        counts = torch.bincount(neurons, minlength=64)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("shape", ["1x5", "8x3", "32x4"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_size_of_the_output(shape, activation):
    model = tiny_bert(hidden_act=activation)
    fast = convert_ffn_to_fff(model, shape)
    for dense, block in zip(model.encoder.layer, fast.encoder.layer, strict=True):
        norm = dense.attention.output.LayerNorm
        x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(5)) * norm.weight + norm.bias
        with torch.no_grad():
            want = dense.output.dense(dense.intermediate(x))
            got = block.output.dense(block.intermediate(x))
        assert 0.5 < got.std(0).norm() / want.std(0).norm() < 2


def test_a_dense_layer_without_biases():
    torch.manual_seed(0)
    fff = FFF(8, "2x2")
    dense_in, dense_out = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False)
    dense = DenseNeurons(dense_in.weight, dense_in.bias, dense_out.weight.T, dense_out.bias)
    init_from_dense(fff, dense, torch.nn.LayerNorm(8), torch.Generator().manual_seed(0))
    assert not fff.bias_in.any() and fff.weight_out.any()


def test_random_init():
    model = tiny_bert()
    fast = convert_ffn_to_fff(model, "4x3", init="random")
    fff = fast.encoder.layer[0].intermediate
    assert not (fff.weight_in.unsqueeze(1) == model.encoder.layer[0].intermediate.dense.weight).all(-1).any()
    assert fff.weight_in.abs().max() <= 32**-0.5 and fff.weight_in.std() > 0
    assert not torch.equal(fff.weight_in, fast.encoder.layer[1].intermediate.weight_in)
    assert fast.encoder.layer[0].output.dense.bias is model.encoder.layer[0].output.dense.bias


@pytest.mark.parametrize("init", ["dense", "random"])
def test_seeds(init):
    model = tiny_bert()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one = convert_ffn_to_fff(model, "4x3", init=init).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert same(convert_ffn_to_fff(model, "4x3", init=init).state_dict(), one)
    assert not same(convert_ffn_to_fff(model, "4x3", init=init, seed=1).state_dict(), one)


def test_warns_when_not_calibrated():
    model = tiny_bert()
    with pytest.warns(UserWarning, match="not calibrated: it has lost what its FFNs knew") as caught:
        convert_ffn_to_fff(model, "4x3")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_ffn_to_fff(model, "4x3", calibration=calibration())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("training", [False, True])
def test_mode_is_kept(training, plan):
    model = tiny_bert(HEADS["ForSequenceClassification"]).train(training)
    model.bert.embeddings.eval()
    fast = convert_ffn_to_fff(model, "4x3", calibration=PLANS[plan]())
    assert fast.training == model.training == training
    assert not fast.bert.embeddings.training and not model.bert.embeddings.training
    assert fast.bert.encoder.layer[0].intermediate.training == training
    assert model.bert.encoder.training == fast.bert.encoder.training == training


def test_frozen_parameters_stay_frozen():
    model = tiny_bert()
    model.embeddings.requires_grad_(False)
    fast = convert_ffn_to_fff(model, "4x3", calibration=calibration())
    assert not any(p.requires_grad for p in fast.embeddings.parameters())
    assert all(p.requires_grad for p in fast.encoder.parameters())


def test_under_no_grad():
    model = tiny_bert()
    with torch.no_grad():
        fast = convert_ffn_to_fff(model, "4x3", calibration=calibration())
    assert all(p.requires_grad for p in fast.parameters())
    want = convert_ffn_to_fff(model, "4x3", calibration=calibration())
    assert same(fast.state_dict(), want.state_dict())


def test_without_pooler():
    model = tiny_bert(add_pooling_layer=False)
    fast = convert_ffn_to_fff(model, "4x3")
    assert fast.pooler is None and "pooler_output" not in outputs(fast, tiny_inputs(fast))
    assert not any(p.is_meta for p in fast.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("plan", PLANS)
def test_other_types(dtype, plan):
    model = tiny_bert().to(dtype)
    fast = convert_ffn_to_fff(model, "4x3", calibration=PLANS[plan]())
    assert {p.dtype for p in fast.parameters()} == {dtype} and fast.dtype == dtype
    assert all(v.isfinite().all() for v in outputs(fast, tiny_inputs(fast)).values())


def test_the_result_trains():
    model = tiny_bert(HEADS["ForSequenceClassification"])
    fast = convert_ffn_to_fff(model, "4x3").train()
    fast(**tiny_inputs(fast), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad is not None for p in fast.parameters())


# --- what is refused ------------------------------------------------------------------------------------------------


def test_unknown_model_type():
    model = FNetModel(FNetConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, intermediate_size=32))
    with pytest.raises(ValueError, match=r"FNetModel .*'fnet'.*known families: bert, roberta, .*eurobert"):
        convert_ffn_to_fff(model, "4x3")


def test_unknown_class():
    class Mine(BertModel):
        pass

    with pytest.raises(ValueError, match="Mine has no fast class; of the family 'bert' there are: BertModel, "):
        convert_ffn_to_fff(tiny_bert(Mine), "4x3")
    for thing in (torch.nn.Linear(2, 2), None, "bert-base-uncased"):
        with pytest.raises(ValueError, match=f"no known feedforward networks in {type(thing).__name__}"):
            convert_ffn_to_fff(thing, "4x3")


def test_already_converted():
    fast = convert_ffn_to_fff(tiny_bert(), "4x3")
    with pytest.raises(ValueError, match="already converted .FastBertModel"):
        convert_ffn_to_fff(fast, "4x3")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("8y8", {}, "8y8"),
        (None, {}, "fff=None"),
        ("4x3", {"target_layers": [0, 3]}, "target_layers has 3; the model has layers 0 to 2"),
        ("4x3", {"target_layers": [-1]}, "target_layers has -1"),
        ("4x3", {"target_layers": []}, "target_layers is empty"),
        ({0: "4x3", 5: "4x3"}, {}, "config has 5; the model has layers 0 to 2"),
        ({0: "4x3"}, {"target_layers": [0]}, "twice"),
        ("4x3", {"init": "zeros"}, "init='zeros' is not known .allowed: dense, random"),
        ("4x3", {"calibration": []}, "empty"),
    ],
)
def test_bad_arguments(config, options, message):
    model = tiny_bert()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        convert_ffn_to_fff(model, config, **options)
    assert same(model.state_dict(), state)


def test_activation_that_the_operator_lacks():
    with pytest.raises(ValueError, match="activation='mish' is not known .*gelu, "):
        convert_ffn_to_fff(tiny_bert(hidden_act="mish"), "4x3")
    fast = convert_ffn_to_fff(tiny_bert(hidden_act="mish"), FFFConfig(4, 3, "silu"))
    assert fast.encoder.layer[0].intermediate.config.activation == "silu"
