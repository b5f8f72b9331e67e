"""PackedFFF: the module."""

import copy
import io
import pickle

import pytest
import torch

from hf_fff import FFF
from hf_fff.layers import PackedFFF
from hf_fff.ops import ROWS


@pytest.fixture
def fff():
    torch.manual_seed(0)
    return FFF(40, "3x4")


@pytest.mark.parametrize("rows", ROWS)
def test_one_buffer_and_nothing_else(fff, rows):
    layer = PackedFFF.of(fff, rows)
    assert not list(layer.parameters()) and [n for n, _ in layer.named_buffers()] == ["packed"]
    assert layer.packed.dtype == torch.uint8 and not layer.training and layer.rows == rows
    assert "40, 3x4, gelu, rows=" in repr(layer)
    x = torch.randn(2, 5, 40)
    with torch.no_grad():
        want, y = fff(x), layer(x)
    assert (
        y.shape == x.shape and (y - want).norm(dim=-1).median() < 0.05 * want.norm(dim=-1).median()
    )  # but for turns near a tie


def test_copies(fff):
    layer, x = PackedFFF.of(fff), torch.randn(7, 40)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x)) and other.packed.data_ptr() != layer.packed.data_ptr()


def test_state_dict(fff):
    layer, other, x = PackedFFF.of(fff), PackedFFF.of(FFF(40, "3x4")), torch.randn(7, 40)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    damaged = layer.state_dict()["packed"].clone()
    damaged[-1] ^= 1
    with pytest.raises(RuntimeError, match="it is damaged"):
        other.load_state_dict({"packed": damaged})
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(PackedFFF.of(fff, "bf16").state_dict())
    assert torch.equal(other(x), layer(x))


def test_types_and_devices(fff):
    layer, x = PackedFFF.of(fff), torch.randn(7, 40)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(layer.to(dtype)(x.to(dtype)).float(), layer(x.to(dtype).float()).to(dtype).float())
    assert layer.packed.dtype == torch.uint8
    with pytest.raises(ValueError, match="cannot be of torch.float32"):
        layer.type(torch.float32)
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="cannot be on cuda"):
            layer.cuda()


def test_is_not_trained(fff):
    layer, x = PackedFFF.of(fff), torch.randn(7, 40)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        layer.train()(x)
    layer.eval()
    y = layer(x.requires_grad_())  # without no_grad: many forget it
    with pytest.raises(RuntimeError, match="it is for inference"):
        y.sum().backward()


def test_bad_arguments(fff):
    with pytest.raises(ValueError, match="rows='fp4' is not known"):
        PackedFFF.of(fff, "fp4")
    packed = PackedFFF.of(fff).packed
    with pytest.raises(ValueError, match="is 3x4, and config 3x5"):
        PackedFFF(packed, FFF(40, "3x5").config)
    with pytest.raises(ValueError, match="not as long"):
        PackedFFF(packed[:-64], fff.config)
    with torch.no_grad():
        fff.bias_in[3] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        PackedFFF.of(fff)
