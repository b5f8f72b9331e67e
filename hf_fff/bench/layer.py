"""One FFF layer against torch's Linear-GELU-Linear of as many neurons, on random data, outputs checked first."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..config import FFFConfig
from ..layers import FFF
from ..ops import loader, torch_backend
from .timing import interleaved

_INPUTS = 64  # different inputs that take turns, so that the paths differ from call to call


@dataclass(frozen=True)
class Row:
    """Microseconds a call. ``loop`` columns are timed in a loop inside a library, without Python around the call."""

    tokens: int
    dense: float
    fff: float
    dense_loop: float | None
    fff_loop: float | None
    backward_masked: float | None
    backward_fff: float | None
    backward_routing: float | None


def bench_layer(
    config: FFFConfig, hidden_size: int, tokens: Sequence[int], *, backward: bool = True, rounds: int = 15
) -> list[Row]:
    """Times ``FFF(x)`` and the dense layer, the bare operations, and the backward passes (all gradients).

    ``backward_masked`` is the backward pass of the reference code's training: the dense layer with a mask.

    Raises:
        RuntimeError: the outputs are not what the definition says.
    """
    torch.manual_seed(0)
    fff = FFF(hidden_size, config)
    dense = nn.Sequential(nn.Linear(hidden_size, config.nodes), nn.GELU(), nn.Linear(config.nodes, hidden_size))
    with torch.no_grad():
        return [_row(fff, dense, count, backward, rounds) for count in tokens]


def _row(fff: FFF, dense: nn.Sequential, tokens: int, backward: bool, rounds: int) -> Row:
    c = fff.config
    inputs = torch.randn(max(2, min(_INPUTS, 16384 // tokens)), tokens, fff.hidden_size)
    weights = (fff.weight_in, fff.bias_in, fff.weight_out)
    _check(fff, inputs[0])
    backwards: dict[str, float | None] = {"masked": None, "fff": None, "routing": None}
    if backward:
        backwards.update({n: t * 1e6 for n, t in _backward(fff, inputs[0], rounds).items()})
    turn = [0]

    def next_input() -> Tensor:
        turn[0] = (turn[0] + 1) % len(inputs)
        return inputs[turn[0]]

    forward = interleaved({"dense": lambda: dense(next_input()), "fff": lambda: fff(next_input())}, rounds=rounds)
    loops: dict[str, float | None] = {"dense": None, "fff": None}
    if ops.backend() == "native" and loader.load("bench").loaded:
        bench = torch.ops.hf_fff_bench
        fff_args = (inputs, *(w.detach() for w in weights), fff.n_trees, c.depth)
        dense_args = (inputs, dense[0].weight, dense[0].bias, dense[2].weight, dense[2].bias)
        repeats = {n: max(3, int(0.02 / max(t, 1e-6))) for n, t in forward.items()}
        runs: dict[str, list[float]] = {"dense": [], "fff": []}
        for _ in range(rounds):
            runs["dense"].append(bench.dense_loop(*dense_args, repeats["dense"]))
            runs["fff"].append(bench.fff_loop(*fff_args, repeats["fff"]))
        loops = {n: float(torch.tensor(v).median()) * 1e6 for n, v in runs.items()}
    return Row(
        tokens,
        *(forward[n] * 1e6 for n in ("dense", "fff")),
        *(loops[n] for n in ("dense", "fff")),
        *(backwards[n] for n in ("masked", "fff", "routing")),
    )


def _check(fff: FFF, x: Tensor) -> None:
    """The visited path is consistent with its logits, and the output is the sum along it, both in float64."""
    c = fff.config
    y, path, _ = ops.fff_train(x, fff.weight_in, fff.bias_in, fff.weight_out, fff.n_trees, c.activation)
    rows = path.long() + torch.arange(fff.n_trees).unsqueeze(-1) * c.tree_nodes
    z = torch.einsum("th,tkdh->tkd", x.double(), fff.weight_in[rows].double()) + fff.bias_in[rows].double()
    act = torch_backend.activation_functions(c.activation)[0]
    expected = torch.einsum("tkd,tkdh->th", act(z), fff.weight_out[rows].double())
    wrong_turns = ((path[..., 1:] == 2 * path[..., :-1] + 2) != (z[..., :-1] > 0)) & (z[..., :-1].abs() > 1e-4)
    near = torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-5)
    if wrong_turns.any() or not near or not torch.equal(y, fff(x)):
        raise RuntimeError("the layer's output is wrong: nothing was timed")


def _backward(fff: FFF, x: Tensor, rounds: int) -> dict[str, float]:
    c = fff.config
    weights = [w.detach() for w in (fff.weight_in, fff.bias_in, fff.weight_out)]
    grad_y = torch.randn_like(x)
    _, path, logits = ops.fff_train(x, *weights, fff.n_trees, c.activation)
    rows = (path.long() + torch.arange(fff.n_trees).unsqueeze(-1) * c.tree_nodes).flatten(1)
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    with torch.enable_grad():
        every = F.linear(leaves[0], leaves[1], leaves[2])
        mask = torch.zeros_like(every).scatter_(1, rows, 1.0)
        y = (torch_backend.activation_functions(c.activation)[0](every) * mask) @ leaves[3]
    arguments = (grad_y, x, *weights, path, logits, fff.n_trees, c.activation)
    masked = torch.autograd.grad(y, leaves, grad_y, retain_graph=True)
    ours = torch.ops.hf_fff.fff_backward(*arguments)
    for name, a, b in zip(("x", "weight_in", "bias_in", "weight_out"), ours, masked, strict=True):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())):
            raise RuntimeError(f"the gradient of {name} is wrong: nothing was timed")
    return interleaved(
        {
            "masked": lambda: torch.autograd.grad(y, leaves, grad_y, retain_graph=True),
            "fff": lambda: torch.ops.hf_fff.fff_backward(*arguments),
            "routing": lambda: torch.ops.hf_fff.fff_backward(*arguments, 3.0, 1.0),
        },
        rounds=max(3, rounds // 3),
    )


def as_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
