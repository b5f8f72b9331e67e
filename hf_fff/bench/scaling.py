"""One layer from BERT-tiny's size to GPT-3's: the dense feedforward network against the deepest single tree with at most as many
neurons, the theoretical speedup, and what the machine's memory permits."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..config import FFFConfig
from ..layers import FFF
from . import machine
from .kept import Kept
from .layer import DENSE, Key, check_outputs, dense_layer, set_threads, time_loops
from .load import Patience
from .shapes import SIZES
from .timing import interleaved

# name -> hidden size, neurons of the dense layer, trees; the paper compares at BERT-base's size 1x11 with as many neurons
PAPER = "paper"
NAMES = ("bert-tiny", "bert-mini", "bert-medium", "bert-base", PAPER, "bert-large", "gpt-2-xl", "gpt-3-6.7b", "gpt-3")
BUFFERS = (1, 4, 16, 64, 256, 1024)  # MB

_INPUTS, _STATES = 64, 16384
_LIMIT = 4.0  # seconds for the rounds of a cell, if three are done by then
_SHARE = 0.8  # of the free memory that a size may take


@dataclass(frozen=True)
class Row:
    """Times in microseconds a call. ``roofline`` is the speedup at which the FFF would read the rows that its tokens visit, its
    inputs and outputs as fast as the machine reads the whole tree (``bandwidth``, GB/s), and do nothing else."""

    name: str
    hidden_size: int
    inner: int
    fff: str
    threads: int
    tokens: int
    dense: float
    measured: float
    visited: int
    bandwidth: float
    others: float | None

    @property
    def config(self) -> FFFConfig:
        return FFFConfig.from_shorthand(self.fff)

    @property
    def speedup(self) -> float:
        return self.dense / self.measured

    @property
    def theory(self) -> float:
        """Neurons of the dense layer over those that a token uses."""
        return self.inner / self.config.active_nodes

    @property
    def roofline(self) -> float:
        numbers = 2 * self.hidden_size * (self.visited + self.tokens)
        return self.dense * self.bandwidth * 1e3 / (4 * numbers)

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup, "theory": self.theory, "roofline": self.roofline}


@dataclass
class Scaling:
    rows: list[Row] = field(default_factory=list)
    bandwidth: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # size -> why


def dimensions(name: str) -> tuple[int, int, FFFConfig]:
    """Hidden size, neurons of the dense layer, trees.

    Raises:
        ValueError: the name is not known.
    """
    if name == PAPER:
        config = FFFConfig(1, 11)
        return SIZES["bert-base"].hidden, config.nodes, config
    if name not in SIZES:
        raise ValueError(f"size {name!r} is not known (allowed: {PAPER}, {', '.join(SIZES)})")
    size = SIZES[name]
    return size.hidden, size.inner, size.tree


def bytes_needed(name: str) -> int:
    """Of both layers' weights, float32."""
    hidden, inner, config = dimensions(name)
    return 4 * 2 * hidden * (inner + config.nodes)


def read_bandwidth(
    buffers: Mapping[str, Sequence[Tensor]], threads: Sequence[int], *, rounds: int = 9
) -> dict[Key, float]:
    """GB/s at which torch reads tensors from one end to the other and again, by ``(threads, name)``.

    A tensor is read by ``torch.sum``, and by ``torch.mv``, which is what a dense layer does with its weights for one token. The
    faster one counts: bandwidth is what there is, not what one of them makes of it. Small tensors include the start of the threads.
    """
    ways = {
        "sum": lambda tensors: [t.sum() for t in tensors],
        "mv": lambda tensors: [torch.mv(t, t[0]) for t in tensors],
    }
    calls = {
        (n, (way, name)): (lambda read=read, tensors=tensors: read(tensors))
        for n, (way, read), (name, tensors) in product(threads, ways.items(), buffers.items())
    }
    times = interleaved(calls, rounds=rounds, before=lambda key: torch.set_num_threads(key[0]), limit=_LIMIT)
    size = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in buffers.items()}
    return {
        (n, name): size[name] / min(times[n, (way, name)] for way in ways) / 1e9
        for n, name in product(threads, buffers)
    }


@torch.no_grad()
def bench_scaling(
    names: Sequence[str],
    tokens: Sequence[int],
    *,
    threads: Sequence[int] | None = None,
    rounds: int = 15,
    patience: Patience | None = None,
    kept: Kept | None = None,
) -> Scaling:
    """All sizes that the memory holds.

    Raises:
        ValueError: a name that is not known.
        RuntimeError: an output is wrong.
    """
    sizes = {name: dimensions(name) for name in names}
    torch.manual_seed(0)
    before = torch.get_num_threads()
    numbers, wait, kept, result = list(threads or [before]), patience or Patience(), kept or Kept(), Scaling()
    try:
        result.bandwidth = kept.cell(["bandwidth"], partial(_curve, numbers, rounds, wait), wait)
        for name in sizes:
            free, needed = machine.free_memory(), bytes_needed(name)
            if free is not None and needed > _SHARE * free:
                result.skipped[name] = f"needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
                continue
            cell = partial(_rows, name, tokens, numbers, rounds, wait)
            result.rows += [Row(**record) for record in kept.cell([name], cell, wait)]
    finally:
        torch.set_num_threads(before)
    return result


def _curve(threads: Sequence[int], rounds: int, patience: Patience) -> list[dict[str, Any]]:
    """The machine's bandwidth over how much is read."""
    curve = []
    for mb in BUFFERS:
        if (machine.free_memory() or 1 << 40) < mb << 21:
            continue
        buffer = {"buffer": [torch.ones(mb << 8, 1024)]}
        found, load = patience.measure(max(threads), partial(read_bandwidth, buffer, threads, rounds=rounds))
        curve += [{"mb": mb, "threads": n, "gb_per_second": found[n, "buffer"], "others": load.others} for n in threads]
    return curve


def _rows(
    name: str, tokens: Sequence[int], threads: Sequence[int], rounds: int, patience: Patience
) -> list[dict[str, Any]]:
    hidden, inner, config = dimensions(name)
    fff = FFF(hidden, config)
    dense = dense_layer(fff, inner)
    tree = {"tree": [fff.weight_in.detach(), fff.weight_out.detach()]}
    bandwidth, _ = patience.measure(max(threads), lambda: read_bandwidth(tree, threads, rounds=rounds))
    rows = []
    for count in tokens:
        x = torch.randn(max(2, min(_INPUTS, _STATES // count)), count, hidden)
        visited = check_outputs(fff, x[0])
        times, load = patience.measure(max(threads), partial(_times, fff, dense, x, threads, rounds))
        rows += [
            Row(name, hidden, inner, config.shorthand, n, count, times[n, DENSE] * 1e6, times[n, "fff"] * 1e6,
                visited, bandwidth[n, "tree"], load.others)
            for n in threads
        ]  # fmt: skip
    return [asdict(row) for row in rows]


def _times(fff: FFF, dense: Any, x: Tensor, threads: Sequence[int], rounds: int) -> dict[Key, float]:
    """Of the bare operations; without the library of loops, of calls from Python."""
    if loops := time_loops(fff, {DENSE: dense}, x, threads, rounds, _LIMIT):
        return loops
    turn = [0]

    def next_input() -> Tensor:
        turn[0] = (turn[0] + 1) % len(x)
        return x[turn[0]]

    calls = {"fff": lambda: fff(next_input()), DENSE: lambda: dense(next_input())}
    by_threads = {(n, of): call for n, (of, call) in product(threads, calls.items())}
    return interleaved(by_threads, rounds=rounds, before=set_threads, limit=_LIMIT)
