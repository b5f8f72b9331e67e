"""Layers of fastfeedforward with leaves of one neuron give what they gave there; others are refused."""

import numpy as np
import oracle
import pytest
import torch

from hf_fff.checkpoints.fastfeedforward import fff_from_fastfeedforward


def layer(depth=3, size=6, width=1, output=6, biases=True, seed=0, prefix=""):
    g = torch.Generator().manual_seed(seed)
    leaves = 2**depth
    shapes = {
        "node_weights": (leaves - 1, size),
        "node_biases": (leaves - 1, 1),
        "w1s": (leaves, size, width),
        "b1s": (leaves, width),
        "w2s": (leaves, width, output),
        "b2s": (leaves, output),
    }
    state = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    if not biases:
        state["b2s"].zero_()
    return {prefix + name: t for name, t in (state | {"depth": torch.tensor(depth)}).items()}


def reference(state, x, activation):
    """Its evaluation, one input at a time."""
    s = {name: t.numpy() for name, t in state.items()}
    rows = []
    for row in x.numpy():
        node, depth = 0, int(s["depth"])
        for _ in range(depth):
            node = 2 * node + 1 + int(row @ s["node_weights"][node] + s["node_biases"][node, 0] >= 0)
        leaf = node - (2**depth - 1)
        inside = [oracle.ACTIVATIONS[activation](z) for z in row @ s["w1s"][leaf] + s["b1s"][leaf]]
        rows.append(np.array(inside) @ s["w2s"][leaf] + s.get("b2s", np.zeros((leaf + 1, 1)))[leaf])
    return np.stack(rows)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_same_outputs(depth, biases, activation):
    state = layer(depth, biases=biases)
    fff = fff_from_fastfeedforward(state, activation=activation)
    assert fff.config.shorthand == f"1x{depth + biases}" and fff.weight_in.dtype == torch.float64
    x = torch.randn(50, 6, dtype=torch.float64)
    np.testing.assert_allclose(fff(x).detach().numpy(), reference(state, x, activation), rtol=0, atol=1e-12)


def test_within_a_model_and_without_biases():
    state = layer(prefix="blocks.1.ffn.") | {"head.weight": torch.zeros(2)}
    del state["blocks.1.ffn.b2s"], state["blocks.1.ffn.depth"]
    fff = fff_from_fastfeedforward(state, prefix="blocks.1.ffn.")
    bare = layer()
    del bare["b2s"]
    x = torch.randn(20, 6, dtype=torch.float64)
    np.testing.assert_allclose(fff(x).detach().numpy(), reference(bare, x, "relu"), rtol=0, atol=1e-12)


def test_nodes_of_zeros_go_right():
    state = layer()
    state["node_weights"].zero_()
    state["node_biases"].zero_()
    x = torch.randn(20, 6, dtype=torch.float64)
    want = reference(state, x, "relu")
    np.testing.assert_allclose(fff_from_fastfeedforward(state)(x).detach().numpy(), want, rtol=0, atol=1e-12)


BAD = {
    "wide leaves": (layer(width=4), r"the leaves have 4 neurons each \(w1s \[8, 6, 4\]\).*\(allowed: 1\)"),
    "another output": (layer(output=3), "the output of 3 is not of the input's size 6"),
    "missing": ({k: v for k, v in layer().items() if k != "w2s"}, "missing: w2s"),
    "superfluous": (layer() | {"master_node_weights": torch.zeros(1)}, "superfluous: master_node_weights"),
    "nothing": ({}, "missing: b1s, node_biases"),
    "shapes": (layer() | {"node_biases": torch.zeros(3, 1)}, r"do not fit each other: .*node_biases \[3, 1\]"),
    "no power of two": ({k: v[:3] if v.ndim else v for k, v in layer().items()}, "do not fit each other"),
}


@pytest.mark.parametrize(("state", "match"), BAD.values(), ids=BAD)
def test_refused(state, match):
    with pytest.raises(ValueError, match=match):
        fff_from_fastfeedforward(state)
