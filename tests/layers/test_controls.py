"""The controls: a dense MLP against the definition in NumPy, and nothing at all."""

import numpy as np
import oracle
import pytest
import torch

from hf_fff import FFF, FFFConfig
from hf_fff.layers import MLP, NoFFN, TreesAndMLP, feedforward


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_mlp_is_the_definition(activation):
    mlp = MLP(7, FFFConfig(kind="mlp", width=5, activation=activation)).double()
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    w_in, b_in, w_out = (oracle.array(p) for p in (mlp.weight_in, mlp.bias_in, mlp.weight_out))
    act = np.vectorize(oracle.ACTIVATIONS[activation])
    expected = act(oracle.array(x) @ w_in.T + b_in) @ w_out
    assert np.allclose(oracle.array(mlp(x)), expected, rtol=1e-12)


def test_none_gives_zeros_and_no_gradient():
    none = NoFFN(7)
    x = torch.randn(2, 3, 7, requires_grad=True)
    y = none(x)
    assert y.shape == x.shape and not y.any() and not y.requires_grad and not list(none.parameters())


def test_one_way_to_make_each_kind():
    kinds = {"2x3": FFF, "mlp:5": MLP, "none": NoFFN, "2x3+mlp:5": TreesAndMLP}
    for text, kind in kinds.items():
        module = feedforward(8, FFFConfig.from_shorthand(text), dtype=torch.bfloat16)
        assert type(module) is kind and module.config.shorthand == text and module.hidden_size == 8
        assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    with pytest.raises(ValueError, match="an FFF is of kind='tree', not 'mlp'"):
        FFF(8, "mlp:5")
