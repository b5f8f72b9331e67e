"""The kernel by itself, against the definition. kernel-builder runs it; the project's own tests are many more."""

import fff
import pytest
import torch
from torch.nn import functional as F


def layer(n_trees, depth, hidden, tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    nodes = n_trees * (2 ** (depth + 1) - 1)
    x = torch.randn(tokens, hidden, generator=generator)
    weight_in = torch.randn(nodes, hidden, generator=generator) / hidden**0.5
    bias_in = torch.randn(nodes, generator=generator) / 4
    weight_out = torch.randn(nodes, hidden, generator=generator)
    return [t.to(dtype) for t in (x, weight_in, bias_in, weight_out)]


def defined(x, weight_in, bias_in, weight_out, n_trees):
    """Token by token, tree by tree."""
    tree_nodes = weight_in.shape[0] // n_trees
    rows = []
    for token in x:
        y = torch.zeros_like(token)
        for tree in range(n_trees):
            node = 0
            while node < tree_nodes:
                row = tree * tree_nodes + node
                z = weight_in[row] @ token + bias_in[row]
                y = y + F.gelu(z) * weight_out[row]
                node = 2 * node + 1 + int(z > 0)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("shape", [(1, 0, 8, 3), (1, 6, 33, 20), (4, 3, 64, 150)])
def test_forward_and_gradients(shape):
    """In float64, where no decision depends on rounding."""
    leaves = [t.requires_grad_() for t in layer(*shape, torch.float64)]
    got, wanted = fff.fff(*leaves, shape[0]), defined(*leaves, shape[0])
    torch.testing.assert_close(got, wanted)
    weights = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad(y, leaves, weights) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    args = layer(4, 3, 64, 20, dtype)
    path = fff.fff_train(*args, 4, "gelu")[1]
    exact = [a.double() for a in args]
    assert fff.fff(*args, 4).dtype == dtype
    same = (path == fff.fff_train(*exact, 4, "gelu")[1]).flatten(1).all(1)  # near zero a decision may fall otherwise
    assert same.float().mean() > 0.5
    torch.testing.assert_close(fff.fff(*args, 4)[same].double(), defined(*exact, 4)[same], rtol=0.05, atol=0.05)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("rows", fff.ROWS)
def test_packed(rows):
    x, *weights = layer(2, 4, 64, 9, torch.float32)
    y = fff.fff_packed(x, fff.pack(*weights, 2, rows), "gelu")
    assert F.cosine_similarity(y, fff.fff(x, *weights, 2)).median() > 0.98


@pytest.mark.kernels_ci
def test_compiles_without_a_graph_break():
    args = layer(2, 3, 16, 5, torch.float32)
    compiled = torch.compile(lambda *a: fff.fff(*a, 2) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), fff.fff(*args, 2) * 2)


@pytest.mark.kernels_ci
def test_opcheck():
    args = layer(2, 3, 16, 5, torch.float32)
    torch.library.opcheck(fff.ops.fff.default, (*args, 2, "gelu"))
    torch.library.opcheck(fff.ops.fff_train.default, ([a.requires_grad_() for a in args] + [2, "gelu"]))
