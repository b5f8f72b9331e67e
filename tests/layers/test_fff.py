"""The FFF module."""

import copy
import pickle

import oracle
import pytest
import torch
from torch import nn

from hf_fff import FFF, FFFConfig, ops
from hf_fff.layers import OutputBias


def test_parameters():
    layer = FFF(24, "3x4")
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight_in": (93, 24),
        "bias_in": (93,),
        "weight_out": (93, 24),
    }
    assert all(type(p) is nn.Parameter and p.requires_grad and p.is_contiguous() for p in layer.parameters())
    assert list(layer.state_dict()) == ["weight_in", "bias_in", "weight_out"]
    assert not list(layer.children()) and not list(layer.buffers())


@pytest.mark.parametrize("config", ["3x4", FFFConfig(3, 4), {"n_trees": 3, "depth": 4}], ids=["text", "config", "dict"])
def test_config_in_all_forms(config):
    assert FFF(8, config).config == FFFConfig(3, 4)


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("shape", ["1x0", "1x6", "5x3"])
def test_forward_is_the_definition(shape, activation):
    torch.manual_seed(0)
    config = FFFConfig.from_shorthand(shape, activation=activation)
    layer = FFF(24, config).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    y = layer(x)
    want, _, _ = oracle.fff(x.flatten(0, 1), *layer.parameters(), config.n_trees, activation)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert abs(oracle.array(y).reshape(14, 24) - want).max() < 1e-12
    with torch.no_grad():
        assert torch.allclose(layer(x), y, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_other_types(dtype, bound):
    torch.manual_seed(0)
    layer = FFF(24, "4x3", dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = torch.randn(9, 24).to(dtype)
    path = ops.fff_train(x, *layer.parameters(), 4, "gelu")[1]
    want, _, _ = oracle.fff(x, *layer.parameters(), 4, path=path.numpy())
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype
    assert abs(oracle.array(y) - want).max() <= bound * abs(want).max()


def test_memory_alignment_changes_no_bit():
    """Tensors of a safetensors file lie anywhere."""
    torch.manual_seed(0)
    layer = FFF(50, "3x4")
    x = torch.randn(30, 50)
    want = layer(x)
    for offset in (1, 3, 8):
        for p in layer.parameters():
            room = torch.empty(p.numel() + offset)
            room[offset:] = p.data.flatten()
            p.data = room[offset:].view_as(p)
        assert torch.equal(layer(x), want)


def test_routing_options_reach_the_gradient():
    torch.manual_seed(0)
    x = torch.randn(30, 16)
    grads = []
    for routing in ({"routing_gradient": 0.0}, {}, {"routing_temperature": 0.5}):
        torch.manual_seed(1)
        layer = FFF(16, FFFConfig(2, 3, **routing))
        layer(x).square().sum().backward()
        grads.append(layer.weight_in.grad)
    assert not torch.equal(grads[0], grads[1]) and not torch.equal(grads[1], grads[2])


def test_repr():
    assert repr(FFF(768, "1x11")) == "FFF(768, 1x11, gelu, uses 12 of 4095 neurons)"
    assert "64x5, relu, uses 384 of 4032" in repr(nn.Sequential(FFF(8, FFFConfig(64, 5, "relu"))))


def test_device_and_dtype():
    layer = FFF(8, "2x3", device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    assert layer(torch.empty(2, 5, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 8)
    with torch.device("meta"):
        assert FFF(8, "2x3").weight_in.is_meta and OutputBias(8).bias.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.zeros(1, 8, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("hidden_size", [0, -1, 1.0, "8", None, True])
def test_bad_hidden_size(hidden_size):
    with pytest.raises(ValueError, match=f"hidden_size={hidden_size!r}"):
        FFF(hidden_size, "1x3")


def test_bad_config_and_input():
    with pytest.raises(ValueError, match="8y8"):
        FFF(8, "8y8")
    with pytest.raises((RuntimeError, ValueError), match="hidden|agree"):
        FFF(8, "1x3")(torch.zeros(2, 9))


def test_first_values():
    torch.manual_seed(0)
    layer = FFF(64, "8x5")
    assert layer.weight_in.abs().max() <= 64**-0.5 and layer.weight_out.abs().max() <= 48**-0.5
    assert all(p.std() > 0.5 * p.abs().max() for p in layer.parameters())
    assert 0.01 < layer(torch.randn(200, 64)).std() < 1
    torch.manual_seed(0)
    again = FFF(64, "8x5")
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


def test_state_dict_copy_pickle():
    layer, other = FFF(8, "2x3"), FFF(8, "2x3")
    x = torch.randn(4, 8)
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x)) and same.config == layer.config
    with pytest.raises(RuntimeError, match="weight_in"):
        FFF(8, "2x4").load_state_dict(layer.state_dict())


def test_output_bias():
    layer = OutputBias(8, dtype=torch.float64)
    assert list(layer.state_dict()) == ["bias"] and not layer.bias.any() and layer.bias.dtype == torch.float64
    with torch.no_grad():
        layer.bias.copy_(torch.arange(8))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(layer(x), x + torch.arange(8))
    layer.reset_parameters()
    assert not layer.bias.any()
