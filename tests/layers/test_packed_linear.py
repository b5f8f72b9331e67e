"""PackedLinear and PackedMLP: the modules."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_fff.layers import LINEARS, MLP, PackedLinear, PackedMLP, linear

kinds = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(linear.why_not(kind)), reason=f"no products of {kind} here"))
    for kind in LINEARS
]


def error(found, want):
    return ((found - want).norm(dim=-1) / want.norm(dim=-1)).max()


@pytest.fixture
def dense():
    return nn.Linear(96, 40)


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (2, 5, 96), (2, 3, 4, 96)])
def test_near_the_dense_layer(dense, kind, shape):
    x = torch.randn(shape)
    y = PackedLinear(dense.weight, dense.bias, kind)(x)
    assert y.dtype == x.dtype and y.shape == (*shape[:-1], 40)
    assert 0 < error(y, dense(x)) < 0.02


@pytest.mark.parametrize("kind", kinds)
def test_products_are_those_of_rounded_numbers(dense, kind):
    x, weight = torch.randn(6, 96), dense.weight.detach()
    if kind == "bf16":
        want = (x.bfloat16().double() @ weight.bfloat16().double().T) + dense.bias.bfloat16().double()
        tolerance = {"atol": 1e-2, "rtol": 1e-2}  # what comes is rounded, too
    else:
        scale, token = (t.abs().amax(1, keepdim=True) / 127 for t in (weight, x))
        whole = torch.round(x / token).double() @ torch.round(weight / scale).double().T
        want = whole * token * scale.T + dense.bias
        tolerance = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(PackedLinear(weight, dense.bias, kind)(x).double(), want, **tolerance)


def test_an_int8_token_is_the_same_alone(dense):
    if linear.why_not("int8"):
        pytest.skip("no products of int8 here")
    layer, x = PackedLinear(dense.weight, None, "int8"), torch.randn(5, 96)
    x[2] *= 1000
    assert torch.equal(layer(x)[:2], layer(x[:2]))


@pytest.mark.parametrize("kind", kinds)
def test_zeros_and_what_is_not_finite(kind):
    layer = PackedLinear(torch.zeros(4, 8), torch.arange(4.0), kind)
    x = torch.zeros(3, 8)
    assert torch.equal(layer(x), torch.arange(4.0).expand(3, 4))
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    y = PackedLinear(torch.ones(4, 8), None, kind)(x)
    assert y[0].isfinite().all() and not y[1:].isfinite().any()


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_of_numbers(dense, kind, dtype):
    layer, x = PackedLinear(dense.weight, dense.bias, kind), torch.randn(3, 96)
    y = layer(x.to(dtype))
    assert y.dtype == dtype and error(y.float(), dense(x)) < 0.03
    assert error(copy.deepcopy(layer).to(dtype)(x), dense(x)) < 0.03


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_and_states(dense, kind, make):
    layer, x = PackedLinear(dense.weight, dense.bias, kind), torch.randn(3, 96)
    y = layer(x)
    assert torch.equal(make(layer)(x), y)
    other = PackedLinear(torch.randn(40, 96), torch.randn(40), kind)
    assert not torch.equal(other(x), y)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)


def test_states_of_another_kind_are_refused(dense):
    layer = PackedLinear(dense.weight, dense.bias, "int8")
    with pytest.raises(RuntimeError, match="scale"):
        layer.load_state_dict(PackedLinear(dense.weight, dense.bias, "bf16").state_dict())


@pytest.mark.parametrize("kind", kinds)
def test_use_that_is_refused(dense, kind):
    layer, x = PackedLinear(dense.weight, dense.bias, kind), torch.randn(3, 96, requires_grad=True)
    with pytest.raises(RuntimeError, match="it is for inference"):
        layer(x).sum().backward()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        layer.train()(x)


@pytest.mark.parametrize("kind", kinds)
def test_any_strides(kind):
    weight, x = torch.randn(96, 40), torch.randn(96, 5, 2)
    y = PackedLinear(weight.T, None, kind)(x.permute(2, 1, 0))
    assert torch.equal(y, PackedLinear(weight.T.contiguous(), None, kind)(x.permute(2, 1, 0).contiguous()))
    assert error(y, x.permute(2, 1, 0) @ weight) < 0.02


@pytest.mark.parametrize("kind", kinds)
def test_a_small_network(kind):
    mlp, x = MLP(32, "mlp:24"), torch.randn(4, 7, 32)
    assert 0 < error(PackedMLP(mlp, kind)(x), mlp(x)) < 0.03


def test_machines_without_such_products(monkeypatch):
    linear.why_not.cache_clear()
    monkeypatch.setattr(PackedLinear, "product", lambda self, x: x[:, :16] * 0)
    assert "products of int8 are wrong on this CPU" in linear.why_not("int8")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "no bfloat16 products" in linear.why_not("bf16")
    linear.why_not.cache_clear()
