"""Rounded rows: what the packed layers give, from the usual operators, with gradients that pass the rounding."""

import pytest
import torch

from hf_fff import FFF, FFFConfig, ops, rounded_rows
from hf_fff.layers import PackedFFF
from hf_fff.ops.packed_backend import packed_path, scales

SHAPES = [("1x11", 96), ("8x8", 64), ("3x4", 40), ("7x0", 33), ("5x2", 1)]


def layer(shorthand, hidden, activation="gelu", seed=0):
    """As after training: rows of different sizes, one of zeros."""
    torch.manual_seed(seed)
    fff = FFF(hidden, FFFConfig.from_shorthand(shorthand, activation=activation))
    with torch.no_grad():
        for weight in (fff.weight_in, fff.weight_out):
            weight.mul_(torch.rand(len(weight), 1) * 4)
            weight[-1] = 0
    return fff


def tokens(count, hidden):
    x = torch.randn(count, hidden) * (1 + 20 * (torch.rand(hidden) > 0.9))  # a few large columns, as a BERT has them
    x[0] = 0
    return x


def rounded(t):
    up, down = scales(t)
    return torch.round(t * up) * down


@pytest.mark.parametrize("rows", ops.ROWS)
@pytest.mark.parametrize(("shorthand", "hidden"), SHAPES)
def test_it_gives_what_the_packed_layer_gives(shorthand, hidden, rows):
    fff, x = layer(shorthand, hidden), tokens(300, hidden)
    packed, paths = PackedFFF.of(fff, rows), []
    fff.watch = paths.append
    with torch.no_grad(), rounded_rows(fff, rows):
        y, want = fff(x), packed(x)
    same = (paths[0] == packed_path(x, packed.packed, "gelu")[1]).flatten(1).all(1)
    assert same.float().mean() > 0.98 and paths[0].dtype == torch.int32
    # A factor that lies between two integers may become the other one.
    bound = 2e-2 if rows == "int8" else 1e-2
    error = (y - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-6)
    assert error[same].median() < 1e-5 and error[same].max() < bound
    with torch.no_grad():
        assert hidden == 1 or not torch.allclose(fff(x)[same], want[same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations(activation):
    fff, x = layer("3x4", 40, activation), tokens(200, 40)
    with torch.no_grad(), rounded_rows(fff):
        error = (fff(x) - PackedFFF.of(fff)(x)).norm(dim=-1)
    assert error.median() < 1e-5 * fff(x).norm(dim=-1).median()


def test_shapes_and_dtypes():
    fff = layer("3x4", 40)
    with rounded_rows(fff):
        x = tokens(6, 40)
        y = fff(x)
        for shape in ((40,), (0, 40), (2, 3, 40)):
            part = x[1] if shape == (40,) else x[: 6 if len(shape) > 2 else 0].view(shape)
            assert fff(part).shape == shape
        assert torch.equal(fff(x.view(2, 3, 40)).view(6, 40), y) and torch.allclose(fff(x[1]), y[1], atol=1e-6)
        x[2, 7] = torch.inf
        assert fff(x)[2].isnan().all() and fff(x)[[0, 1, 3, 4, 5]].isfinite().all()
    for dtype in (torch.bfloat16, torch.float64):
        other = FFF(40, "3x4", dtype=dtype)
        other.load_state_dict(fff.state_dict())
        with rounded_rows(other), torch.no_grad():
            z = other(tokens(6, 40).to(dtype))
        assert z.dtype == dtype and z.isfinite().all()


def test_gradients_pass_the_rounding():
    """They are those of a layer that holds the rounded numbers."""
    fff, x = layer("3x4", 40), tokens(50, 40).requires_grad_()
    fff.config = FFFConfig(3, 4, routing_gradient=3.0)
    grad = torch.randn(50, 40)
    with rounded_rows(fff):
        fff(x).backward(grad)
    other, held = layer("3x4", 40), rounded(x.detach()).requires_grad_()
    other.config = fff.config
    with torch.no_grad():
        for weight in (other.weight_in, other.weight_out):
            weight.copy_(rounded(weight))
    other(held).backward(grad)
    pairs = [
        (x.grad, held.grad),
        *zip((p.grad for p in fff.parameters()), (p.grad for p in other.parameters()), strict=True),
    ]
    for have, want in pairs:
        assert want.abs().max() > 0 and torch.allclose(have, want, rtol=1e-5, atol=1e-6)


def test_it_is_on_within_alone():
    fff, x = layer("3x4", 40), tokens(20, 40)
    y = fff(x)
    with rounded_rows(fff, "bf16"):
        coarse = fff(x)
        with rounded_rows(fff, "int8"):
            assert not torch.equal(fff(x), coarse)
            with rounded_rows(fff, None):
                assert fff.rows == "int8"
        assert torch.equal(fff(x), coarse)
        with pytest.raises(RuntimeError, match="gone wrong"), rounded_rows(fff):
            raise RuntimeError("gone wrong")
        assert fff.rows == "bf16"
    assert torch.equal(fff(x), y) and fff.rows is None
    with rounded_rows(torch.nn.Linear(2, 2), None):
        pass


def test_wrong_use():
    with (
        pytest.raises(ValueError, match=r"rows='int4' is not known \(allowed: int8, bf16, None\)"),
        rounded_rows(layer("3x4", 40), "int4"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="rows='int8' is of trees, and there are none in this Linear"),
        rounded_rows(torch.nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.gpu
def test_on_a_gpu():
    fff, x = layer("8x8", 64), tokens(300, 64)
    with torch.no_grad(), rounded_rows(fff):
        want = fff(x)
        error = (fff.cuda()(x.cuda()).cpu() - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-6)
    assert error.median() < 1e-5 and error.quantile(0.98) < 2e-2
    fff(x.cuda()).sum().backward()
    assert fff.weight_in.grad.isfinite().all() and fff.weight_in.grad.abs().max() > 0
