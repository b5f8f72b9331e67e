"""Layers of the package ``fastfeedforward`` (arXiv 2308.14711), whose nodes only decide and whose leaves only compute."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import FFFConfig
from ..layers import FFF
from ..ops.torch_backend import activation_functions
from .tensors import listed

_TENSORS = ("node_weights", "node_biases", "w1s", "b1s", "w2s")
_OTHERS = {"b2s", "depth", "node_usage", "leaf_usage"}


def fff_from_fastfeedforward(state_dict: Mapping[str, Tensor], prefix: str = "", activation: str = "relu") -> FFF:
    """A layer of ours that computes what a ``fastfeedforward.FFF`` with leaves of one neuron computes in evaluation.

    Its nodes become neurons without output, its leaves the last level of a tree of the same depth. Where the leaves have output biases, another
    level holds those: neurons that are always 1, below each leaf two of the same. A layer that trains on is one of ours, in which
    nodes may learn to contribute.

    Args:
        state_dict: its tensors, or those of a model that has it under ``prefix``, such as "encoder.ffn.".
        activation: that of its leaves, which the state dict does not tell.

    Returns:
        An FFF in the dtype of the tensors; at a logit of exactly zero, where its source goes right, it goes left.

    Raises:
        ValueError: tensors that are missing, superfluous or do not fit each other; leaves of more than one neuron; an output of
            another size than the input, which our layers do not have.
    """
    found = {name.removeprefix(prefix): t.detach() for name, t in state_dict.items() if name.startswith(prefix)}
    missing, strange = set(_TENSORS) - set(found), set(found) - {*_TENSORS, *_OTHERS}
    if missing or strange:
        problems = [f"{what}: {listed(n)}" for what, n in (("missing", missing), ("superfluous", strange)) if n]
        raise ValueError(f"no layer of fastfeedforward under prefix={prefix!r}: {'; '.join(problems)}")
    decisions, leaves, width = _sizes(found)
    size = found["w1s"].shape[1]
    if width != 1:
        raise ValueError(
            f"the leaves have {width} neurons each (w1s {list(found['w1s'].shape)}): a leaf of an FFF here is one neuron, and a "
            "node adds its own to the sum, so that wider leaves cannot be said by it (allowed: 1)"
        )
    if found["w2s"].shape[2] != size:
        raise ValueError(f"the output of {found['w2s'].shape[2]} is not of the input's size {size}, as it must be here")
    biases = found.get("b2s")
    biased = biases is not None and bool(biases.any())
    depth = leaves.bit_length() - 1 + biased
    fff = FFF(size, FFFConfig(n_trees=1, depth=depth, activation=activation), dtype=found["w1s"].dtype)
    with torch.no_grad():
        for parameter in fff.parameters():
            parameter.zero_()
        here = slice(decisions, decisions + leaves)
        fff.weight_in[:decisions] = found["node_weights"]
        fff.bias_in[:decisions] = found["node_biases"][:, 0]
        # A node of zeros alone sends all tokens right there.
        never = ~found["node_weights"].any(1) & (found["node_biases"][:, 0] == 0)
        fff.bias_in[:decisions][never] = 1
        fff.weight_in[here] = found["w1s"][..., 0]
        fff.bias_in[here] = found["b1s"][:, 0]
        fff.weight_out[here] = found["w2s"][:, 0]
        if biased:
            assert biases is not None
            act, _ = activation_functions(fff.config.activation)
            fff.bias_in[here.stop :] = 1
            fff.weight_out[here.stop :] = (biases / act(torch.ones_like(biases))).repeat_interleave(2, 0)
    return fff


def _sizes(found: dict[str, Any]) -> tuple[int, int, int]:
    """Nodes that decide, leaves, and neurons of a leaf."""
    shapes = {name: tuple(found[name].shape) for name in (*_TENSORS, "b2s") if name in found}
    first = shapes["w1s"]
    if len(first) == 3 and len(shapes["w2s"]) == 3 and first[0] & (first[0] - 1) == 0 and first[0]:
        leaves, size, width = first
        wanted = {
            "node_weights": (leaves - 1, size),
            "node_biases": (leaves - 1, 1),
            "w1s": first,
            "b1s": (leaves, width),
            "w2s": (leaves, width, shapes["w2s"][2]),
            "b2s": (leaves, shapes["w2s"][2]),
        }
        if all(wanted[name] == shape for name, shape in shapes.items()):
            return leaves - 1, leaves, width
    told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    raise ValueError(f"these tensors do not fit each other: {told}")
