"""Trees and an MLP side by side, against the definition of each in NumPy."""

import numpy as np
import oracle
import pytest
import torch
from tiny import tiny_bert, tiny_inputs, tiny_model

from hf_fff import FFFConfig, convert_ffn_to_fff, fff_target_parameters
from hf_fff.layers import TreesAndMLP

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def expected(layer, x):
    trees, mlp = layer.trees, layer.mlp
    act = np.vectorize(oracle.ACTIVATIONS[layer.config.activation])
    w_in, b_in, w_out = (oracle.array(p) for p in (mlp.weight_in, mlp.bias_in, mlp.weight_out))
    beside = act(oracle.array(x) @ w_in.T + b_in) @ w_out
    y, _ = oracle.fff(x, trees.weight_in, trees.bias_in, trees.weight_out, trees.n_trees, layer.config.activation)[:2]
    return y.reshape(x.shape) + beside


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_is_the_sum_of_both(activation):
    torch.manual_seed(0)
    config = FFFConfig(3, 2, activation, kind="tree+mlp", width=5)
    layer, x = TreesAndMLP(7, config).double(), torch.randn(6, 7, dtype=torch.float64)
    assert layer.config == config
    assert np.allclose(oracle.array(layer(x)), expected(layer, x), rtol=1e-10, atol=1e-12)
    assert layer(x.view(2, 3, 7)).shape == (2, 3, 7)


def test_gradients():
    torch.manual_seed(0)
    layer = TreesAndMLP(4, FFFConfig(2, 2, kind="tree+mlp", width=3, routing_gradient=0.0)).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-6)
    layer(x).square().sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None and p.grad.any()} == {
        f"{part}.{name}" for part in ("trees", "mlp") for name in ("weight_in", "bias_in", "weight_out")
    }


def test_only_of_its_kind():
    for text in ("2x3", "mlp:5", "none"):
        with pytest.raises(ValueError, match=r"a TreesAndMLP is of kind='tree\+mlp', not"):
            TreesAndMLP(8, text)


@pytest.mark.parametrize("family", ["albert", "modernbert", "mobilebert", "squeezebert"])
def test_in_other_families(tmp_path, family):
    """Shared by layers, gated, stacked, between convolutions."""
    model = convert_ffn_to_fff(tiny_model(family), "2x3+mlp:4").eval()
    assert sum(isinstance(m, TreesAndMLP) for m in model.modules())
    model.save_pretrained(tmp_path)
    loaded, batch = type(model).from_pretrained(tmp_path), tiny_inputs(model)
    assert {c.shorthand for c in loaded.config.fff_layers.values()} == {"2x3+mlp:4"}
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(loaded(**batch)[:1], model(**batch)[:1], strict=True))


def test_adapters_reach_both():
    peft = pytest.importorskip("peft")
    model = convert_ffn_to_fff(tiny_bert(), "2x3+mlp:4")
    names = fff_target_parameters(model)
    assert len(names) == 3 * 4 and {name.split(".")[-2] for name in names} == {"trees", "mlp"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], target_parameters=names))
    adapted(**tiny_inputs(model))[0].sum().backward()
    merged = adapted.merge_and_unload().encoder.layer[0].intermediate
    assert isinstance(merged, TreesAndMLP) and merged.config.shorthand == "2x3+mlp:4"
