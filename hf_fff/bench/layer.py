"""FFF layers against torch's Linear-GELU-Linear and against a plain PyTorch FFF, outputs and gradients checked first.

Random weights and inputs are the worst case for caches, since every path is as likely as any other; ``trained_layer`` takes
a layer of a converted model and the hidden states that it meets.
"""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..config import FFFConfig
from ..layers import FFF, PackedFFF
from ..ops import loader, torch_backend
from ..ops.packed_backend import packed_path
from .kept import Kept
from .load import Patience
from .model import load_model
from .timing import interleaved, turns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DENSE = "dense"  # as many neurons as the FFF has

_INPUTS = 64  # different inputs that take turns, so that the paths differ from call to call
_STATES = 16384  # hidden states, at most, that those are cut from
_CHECKED = 256  # tokens of an input whose outputs are compared
_LIMIT = 6.0  # seconds for the rounds of one table cell, if three are done by then
# dtype -> relative and absolute error of outputs, and the logit below which another child is no mistake
_TOLERANCE = {torch.float32: (1e-4, 1e-5, 1e-4), torch.bfloat16: (2e-2, 2e-2, 3e-2)}

Key = tuple[int, str]  # threads, candidate


@dataclass(frozen=True)
class Layer:
    """What is measured: an FFF, where its weights are from, and the hidden states that it meets, ``[states, hidden]``, or None:
    random ones."""

    fff: FFF
    weights: str = "random"
    states: Tensor | None = None

    def inputs(self, tokens: int) -> Tensor:
        """``[inputs, tokens, hidden]``, used in turn.

        Raises:
            ValueError: there are fewer states than ``tokens``.
        """
        count = max(2, min(_INPUTS, _STATES // tokens))
        weight = self.fff.weight_in
        if self.states is None:
            return torch.randn(count, tokens, self.fff.hidden_size).to(weight.dtype)
        count = min(count, len(self.states) // tokens)
        if not count:
            raise ValueError(
                f"{tokens} tokens are more than the {len(self.states)} that the texts have: give more text"
            )
        return self.states[: count * tokens].view(count, tokens, -1).to(weight.dtype)


@dataclass(frozen=True)
class Row:
    """Microseconds a call of each candidate. ``fff`` is what is measured, ``dense`` has as many neurons, ``torch`` is the same FFF
    gathered row by row in PyTorch, ``int8 rows`` and ``bf16 rows`` (of a float32 layer) are packed ones; in ``backward`` (all gradients) ``masked`` is how the reference code trains, the dense
    layer with a mask, and ``routing`` is the FFF with the routing gradient.

    ``forward`` and ``backward`` are called from Python, ``loop`` runs inside a library (empty where it cannot).
    """

    fff: str
    hidden_size: int
    dtype: str
    weights: str
    threads: int
    tokens: int
    visited: int  # neurons that a call's tokens use together, out of ``nodes``
    nodes: int
    forward: dict[str, float]
    loop: dict[str, float]
    backward: dict[str, float]
    others: float | None  # cores that other processes kept busy meanwhile

    @property
    def overhead(self) -> float | None:
        """What a call from Python takes beyond the operation."""
        return self.forward["fff"] - self.loop["fff"] if "fff" in self.loop else None

    @property
    def best(self) -> dict[str, float]:
        """``loop`` where there is one: what the operation takes; otherwise ``forward``."""
        return self.loop or self.forward


def random_layer(config: FFFConfig, hidden_size: int, dtype: torch.dtype = torch.float32) -> Layer:
    return Layer(FFF(hidden_size, config, dtype=dtype))


def trained_layer(source: str, texts: Sequence[str], *, max_length: int = 128, most: int = _STATES) -> Layer:
    """A layer of a converted model, with the hidden states that it meets on ``texts``, one after the other.

    Args:
        source: ``FOLDER`` or ``FOLDER:LAYER``; without a layer, the middle one of the converted.

    Raises:
        ValueError: there is no such model, no such layer, or it is no tree.
    """
    from transformers import AutoTokenizer

    from ..surgery.folder import ModelFolder

    folder, _, number = source.rpartition(":") if source.rpartition(":")[2].isdecimal() else (source, "", "")
    model = load_model(folder)
    # In the order of the layers, which is that of the modules; where layers share one, it is named once.
    layers = [i for i, c in getattr(model.config, "fff_layers", {}).items() if c.has_trees]
    found = [module for module in model.modules() if isinstance(module, FFF)]
    trees = dict(zip(layers, found, strict=False)) if len(layers) == len(found) else dict(enumerate(found))
    if not trees:
        raise ValueError(f"{folder} has no trees: convert it first (hf-fff convert)")
    index = int(number) if number else list(trees)[len(trees) // 2]
    if index not in trees:
        raise ValueError(f"layer {index} of {folder} is no tree (those that are: {', '.join(map(str, trees))})")
    states: list[Tensor] = []
    fff = trees[index]
    handle = fff.register_forward_pre_hook(lambda _, args: states.append(args[0].detach().flatten(0, -2)))
    tokenizer = AutoTokenizer.from_pretrained(ModelFolder.find(folder).transformer)
    with torch.no_grad():
        for text in texts:  # one by one: no padding
            model(**tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt"))
            if sum(map(len, states)) >= most:
                break
    handle.remove()
    return Layer(fff.requires_grad_(False), f"layer {index} of {Path(folder).name}", torch.cat(states)[:most])


def with_dtype(layer: Layer, dtype: torch.dtype) -> Layer:
    """A copy of its weights in another dtype; inputs follow."""
    return replace(layer, fff=copy.deepcopy(layer.fff).to(dtype))


def bench_layers(
    layers: Sequence[Layer],
    tokens: Sequence[int],
    *,
    threads: Sequence[int] | None = None,
    against: Mapping[str, int] | None = None,
    backward: bool = True,
    rounds: int = 15,
    patience: Patience | None = None,
    kept: Kept | None = None,
) -> list[Row]:
    """Times every layer at every number of tokens; all candidates with all numbers of threads take turns.

    Args:
        threads: numbers of them; as torch has it without.
        against: names and widths of further dense layers.
        kept: where finished cells go, and from where those of an interrupted run come.

    Raises:
        RuntimeError: outputs or gradients are not what the definition says.
        ValueError: a layer knows fewer hidden states than are asked for.
    """
    torch.manual_seed(0)
    before = torch.get_num_threads()
    numbers, patience, kept = list(threads or [before]), patience or Patience(), kept or Kept()
    try:
        with torch.no_grad():
            rows: list[Row] = []
            for layer in layers:
                widths = {DENSE: layer.fff.config.nodes, **(against or {})}
                dense = {name: dense_layer(layer.fff, width) for name, width in widths.items()}
                for count in tokens:

                    def cell(layer: Layer = layer, dense: Any = dense, count: int = count) -> list[dict[str, Any]]:
                        of = _Cell(layer, dense, count, numbers, backward, rounds)
                        measured, load = patience.measure(max(numbers), of.measure)
                        return [asdict(of.row(n, measured, load.others)) for n in numbers]

                    key = (layer.fff.config.shorthand, str(layer.fff.weight_in.dtype), layer.weights, count)
                    rows += [Row(**record) for record in kept.cell(key, cell, patience)]
            return rows
    finally:
        torch.set_num_threads(before)


def dense_layer(fff: FFF, width: int) -> nn.Sequential:
    h, dtype = fff.hidden_size, fff.weight_in.dtype
    return nn.Sequential(nn.Linear(h, width, dtype=dtype), nn.GELU(), nn.Linear(width, h, dtype=dtype))


def packed_layers(fff: FFF) -> dict[str, PackedFFF]:
    """A float32 layer with rows of fewer bytes, where the kernels are there."""
    if fff.weight_in.dtype != torch.float32 or ops.backend() != "native":
        return {}
    return {f"{rows} rows": PackedFFF.of(fff, rows) for rows in ops.ROWS}


def time_loops(
    fff: FFF,
    dense: Mapping[str, nn.Sequential],
    inputs: Tensor,
    threads: Sequence[int],
    rounds: int,
    limit: float,
    packed: Mapping[str, PackedFFF] | None = None,
) -> dict[Key, float]:
    """Median seconds of the bare operations, in a loop inside a library, without Python around the call; empty where that library
    cannot be had or does not know the dtype or the activation."""
    loops = tree_loops(fff, inputs, packed or {})
    if not loops:
        return {}
    for name, layer in dense.items():
        parts = (layer[0].weight, layer[0].bias, layer[2].weight, layer[2].bias)
        loops[name] = partial(torch.ops.hf_fff_bench.dense_loop, inputs, *parts)
    candidates = {(n, name): run for n, (name, run) in product(threads, loops.items())}
    return turns(candidates, rounds=rounds, limit=limit, before=set_threads)


def tree_loops(fff: FFF, inputs: Tensor, packed: Mapping[str, PackedFFF]) -> dict[str, Callable[[int], float]]:
    """A layer and packed copies of it in loops inside the library: repeats -> seconds a call. Empty where there is no such library,
    or it does not know the dtype or the activation."""
    c = fff.config
    fits = inputs.dtype == torch.float32 and c.activation == "gelu"
    if not fits or ops.backend() != "native" or not loader.load("bench").loaded:
        return {}
    bench, weights = torch.ops.hf_fff_bench, (fff.weight_in, fff.bias_in, fff.weight_out)
    loops: dict[str, Callable[[int], float]] = {
        "fff": lambda repeats: bench.fff_loop(inputs, *weights, fff.n_trees, c.depth, max(repeats, 3))
    }
    return loops | {name: partial(bench.fff_packed_loop, inputs, of.packed) for name, of in packed.items()}


def set_threads(key: Key) -> None:
    torch.set_num_threads(key[0])


class _Cell:
    """One layer at one number of tokens."""

    def __init__(
        self,
        layer: Layer,
        dense: Mapping[str, nn.Sequential],
        tokens: int,
        threads: Sequence[int],
        backward: bool,
        rounds: int,
    ) -> None:
        self.layer, self.dense, self.tokens, self.threads, self.rounds = layer, dict(dense), tokens, threads, rounds
        self.inputs = layer.inputs(tokens)
        self.visited = check_outputs(layer.fff, self.inputs[0])
        self.packed = packed_layers(layer.fff)
        check_packed(layer.fff, self.packed, self.inputs[0])
        self.backwards = _backwards(layer.fff, dense[DENSE], self.inputs[0]) if backward else {}

    def measure(self) -> dict[str, dict[Key, float]]:
        """Seconds: pass -> (threads, candidate) -> median."""
        fff, turn = self.layer.fff, [0]
        weights = (fff.weight_in, fff.bias_in, fff.weight_out)

        def x() -> Tensor:
            turn[0] = (turn[0] + 1) % len(self.inputs)
            return self.inputs[turn[0]]

        calls: dict[str, Callable[[], object]] = {
            "fff": partial(_on_next, fff, x),
            "torch": lambda: torch_backend.fff(x(), *weights, fff.n_trees, fff.config.activation),
            **{name: partial(_on_next, layer, x) for name, layer in (self.packed | self.dense).items()},
        }
        # Whoever follows a dense layer finds a cold cache: in random order, everybody does as often.
        options: dict[str, Any] = {"limit": _LIMIT, "before": set_threads, "order": random.Random(0)}
        return {
            "forward": interleaved(self._by_threads(calls), rounds=self.rounds, **options),
            "loop": time_loops(fff, self.dense, self.inputs, self.threads, self.rounds, _LIMIT, self.packed),
            "backward": interleaved(self._by_threads(self.backwards), rounds=max(3, self.rounds // 3), **options),
        }

    def _by_threads(self, calls: Mapping[str, Callable[[], object]]) -> dict[Key, Callable[[], object]]:
        return {(n, name): call for n, (name, call) in product(self.threads, calls.items())}

    def row(self, threads: int, measured: Mapping[str, Mapping[Key, float]], others: float | None) -> Row:
        fff = self.layer.fff
        times = {kind: {name: s * 1e6 for (n, name), s in of.items() if n == threads} for kind, of in measured.items()}
        dtype = str(fff.weight_in.dtype).removeprefix("torch.")
        size = (fff.config.shorthand, fff.hidden_size, dtype, self.layer.weights, threads, self.tokens)
        return Row(*size, self.visited, fff.config.nodes, times["forward"], times["loop"], times["backward"], others)


def _on_next(layer: Callable[[Tensor], Tensor], x: Callable[[], Tensor]) -> Tensor:
    return layer(x())


def check_outputs(fff: FFF, x: Tensor) -> int:
    """The visited path is consistent with its logits, and the output is the sum along it, both in float64; where PyTorch's FFF
    takes the same path, it gives the same output.

    Returns:
        How many neurons the tokens of ``x`` visit together.

    Raises:
        RuntimeError: that is not so.
    """
    c = fff.config
    relative, absolute, near_zero = _TOLERANCE[x.dtype]
    weights = (fff.weight_in, fff.bias_in, fff.weight_out)
    y, path, _ = ops.fff_train(x, *weights, fff.n_trees, c.activation)
    some = slice(None, None, max(1, len(x) // _CHECKED))
    turns_taken = path[some]
    z, expected = _on_path(fff, x[some], turns_taken)
    went_right = turns_taken[..., 1:] == 2 * turns_taken[..., :-1] + 2
    wrong_turns = (went_right != (z[..., :-1] > 0)) & (z[..., :-1].abs() > near_zero)
    size = max(1.0, float(expected.abs().max()))

    def near(a: Tensor) -> Tensor:
        return torch.isclose(a.double(), expected, rtol=relative, atol=absolute * size).all(-1)

    plain, other, _ = torch_backend.fff_train(x[some], *weights, fff.n_trees, c.activation)
    same = (other == turns_taken).flatten(1).all(1)
    if wrong_turns.any() or not near(y[some]).all() or not near(plain)[same].all() or not torch.equal(y, fff(x)):
        raise RuntimeError("the layer's output is wrong: nothing was timed")
    return int(_rows(fff, path).unique().numel())


def _rows(fff: FFF, path: Tensor) -> Tensor:
    """Of the nodes of a path, among those of all trees."""
    return path.long() + torch.arange(fff.n_trees).unsqueeze(-1) * fff.config.tree_nodes


def _on_path(fff: FFF, x: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[T, K, D+1]`` and output ``[T, H]`` of a layer on given paths, in float64."""
    of = _rows(fff, path)
    z = torch.einsum("th,tkdh->tkd", x.double(), fff.weight_in[of].double()) + fff.bias_in[of].double()
    act = torch_backend.activation_functions(fff.config.activation)[0]
    return z, torch.einsum("tkd,tkdh->th", act(z), fff.weight_out[of].double())


def check_packed(fff: FFF, packed: Mapping[str, PackedFFF], x: Tensor) -> None:
    """A packed layer gives what PyTorch makes of its rows, and nearly what the layer gives on the path that it takes: near ties
    it takes another.

    Raises:
        RuntimeError: that is not so.
    """
    x = x[:: max(1, len(x) // _CHECKED)]
    for name, layer in packed.items():
        y, path = packed_path(x, layer.packed, fff.config.activation)
        expected = _on_path(fff, x, path)[1]
        error = ((y - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).median()
        # A few large columns of real hidden states make coarse integers: a tenth for one token or another. Wrong rows give 1.
        if not (error < 0.2 and torch.allclose(layer(x), y, rtol=1e-2, atol=1e-3 * float(y.abs().max()))):
            raise RuntimeError(
                f"the outputs of {name} are wrong (median relative error {error:.3f}): nothing was timed"
            )


def _backwards(fff: FFF, dense: nn.Sequential, x: Tensor) -> dict[str, Callable[[], object]]:
    """Backward passes for all gradients, ready to be called.

    Raises:
        RuntimeError: the FFF's gradients are not those of a dense layer with a mask.
    """
    c = fff.config
    weights = [w.detach() for w in (fff.weight_in, fff.bias_in, fff.weight_out)]
    grad_y = torch.randn_like(x)
    _, path, logits = ops.fff_train(x, *weights, fff.n_trees, c.activation)
    rows = (path.long() + torch.arange(fff.n_trees).unsqueeze(-1) * c.tree_nodes).flatten(1)

    def masked(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, *weights)]
        with torch.enable_grad():
            every = F.linear(leaves[0], leaves[1], leaves[2])
            mask = torch.zeros_like(every).scatter_(1, rows, 1.0)
            y = (torch_backend.activation_functions(c.activation)[0](every) * mask) @ leaves[3]
        return y, leaves, grad_y.to(dtype)

    def gradients(y: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    arguments = (grad_y, x, *weights, path, logits, fff.n_trees, c.activation)
    ours, expected = torch.ops.hf_fff.fff_backward(*arguments), gradients(*masked(torch.float32))()
    relative, absolute = (1e-3, 1e-4) if x.dtype == torch.float32 else (3e-2, 1e-2)
    for name, a, b in zip(("x", "weight_in", "bias_in", "weight_out"), ours, expected, strict=True):
        if not torch.allclose(a.float(), b, rtol=relative, atol=absolute * float(b.abs().max())):
            raise RuntimeError(f"the gradient of {name} is wrong: nothing was timed")
    leaves = [x.detach().clone().requires_grad_(), *dense.parameters()]
    with torch.enable_grad():
        y = dense(leaves[0])
    return {
        "fff": lambda: torch.ops.hf_fff.fff_backward(*arguments),
        "routing": lambda: torch.ops.hf_fff.fff_backward(*arguments, 3.0, 1.0),
        "torch": lambda: torch_backend.fff_backward(*arguments),
        "masked": gradients(*masked(x.dtype)),
        DENSE: gradients(y, leaves, grad_y),
    }


def thread_scaling(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many times as fast more threads make what is measured and the dense layer, against the fewest."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.fff, row.hidden_size, row.dtype, row.weights, row.tokens), []).append(row)
    told = []
    for of in groups.values():
        first, *more = sorted(of, key=lambda row: row.threads)
        for row in more:
            times = {name: first.best[name] / row.best[name] for name in ("fff", DENSE)}
            size = {name: getattr(row, name) for name in ("fff", "hidden_size", "dtype", "weights", "tokens")}
            told.append(
                {**size, "threads": f"{first.threads} -> {row.threads}", "faster": times["fff"], "dense": times[DENSE]}
            )
    return told


def as_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{**asdict(row), "overhead": row.overhead} for row in rows]


def as_lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line a time, for a table of values; ``ratio`` is the time over that of the FFF in the same pass."""
    size = ("fff", "hidden_size", "dtype", "weights", "threads", "tokens", "visited", "nodes")
    return [
        {
            **{n: getattr(row, n) for n in size},
            "pass": kind,
            "candidate": name,
            "microseconds": t,
            "ratio": t / of["fff"],
        }
        for row in rows
        for kind, of in (("forward", row.forward), ("loop", row.loop), ("backward", row.backward))
        for name, t in of.items()
    ]
