"""FFF layers, models and training steps on one GPU, against dense layers, narrow ones, a masked dense layer and a copy of the input.

A call's time is what the GPU takes, between two events on its stream, without Python's: medians of rounds in which all candidates of a cell come in
another random order, with the second-level cache overwritten before each. Models and training steps are timed by the clock,
Python included. Outputs and gradients are checked against float64 on the same path before anything is timed.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import masking_utils

from .. import ops
from ..config import FFFConfig
from ..layers import FFF
from ..ops import torch_backend
from .layer import DTYPES
from .load import Patience
from .model import random_ids, random_models, time_models
from .timing import FEWEST, interleaved

SECTIONS = ("forward", "backward", "graph", "model", "train")

Call = Callable[[], object]
Cells = Iterator[Callable[[], "Cell"]]  # of a section; nothing is measured before one is called

_CHECKED = 1024  # tokens of an input whose outputs are compared
_NEAR_ZERO = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # a logit below which another child is no mistake
# dtype -> relative errors beyond which a result is wrong: of a token's output, of a gradient, and of one with the routing gradient,
# which compares subtrees that the token did not visit, and in which bfloat16 turns elsewhere
_WRONG = {torch.float32: (1e-4, 1e-3, 1e-2), torch.bfloat16: (3e-2, 3e-2, 0.3)}
_ROUTING = (3.0, 1.0)  # alpha and tau
_SLEEP = 1_000_000  # cycles that keep the GPU from a call until all of it is queued: about half a millisecond


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    fff: tuple[str, ...] = ("1x11", "4x9", "8x8", "32x6")
    hidden_size: int = 768
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    tokens: tuple[int, ...] = (128, 512, 2048, 16384, 131072)
    backward_tokens: tuple[int, ...] = (2048, 16384, 131072)
    graph_tokens: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    dense: tuple[int, ...] = (3072, 4095, 4096)  # 4095 is the paper's; of 4096 tensor cores make more
    # as many neurons as 1x11 uses, and those that fit a pretrained FFN about like trees do
    narrow: tuple[int, ...] = (12, 107, 256)
    size: str = "bert-base"
    batches: tuple[str, ...] = ("32x128", "256x128", "64x512")
    kinds: tuple[str, ...] = ("dense", "1x11", "8x8", "none")
    training: tuple[tuple[str, str], ...] = (
        ("bert-base", "32x128"),
        ("bert-base", "64x128"),
        ("minilm", "128x64"),
    )
    rounds: int = 30
    limit: float = 3.0  # seconds for the rounds of a cell, if three are done by then
    seconds: float = float("inf")  # after which no other cell is begun

    def quick(self) -> "Plan":
        """A part of it, that ends after about 90 seconds, done or not."""
        return replace(
            self,
            fff=tuple(f for f in self.fff if f in ("1x11", "8x8")) or self.fff[:2],
            tokens=self.tokens[-2:],
            backward_tokens=self.backward_tokens[-1:],
            graph_tokens=_ends(self.graph_tokens),
            dense=self.dense[:2],
            batches=_ends(self.batches),
            rounds=min(self.rounds, 15),
            limit=1.0,
            seconds=min(self.seconds, 90.0),
        )


def _ends(of: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys((of[0], of[-1])))


@dataclass
class Cell:
    """Candidates that took turns. ``work`` is a number of tokens, or ROWSxTOKENS.

    Candidates are named after what they are, "8x8", "dense:3072", "mlp:12" or "copy" (of the input), with a word behind: "masked" (the
    dense layer with a mask, as the reference code trains), "routing" (with the routing gradient), "fused" (the activation inside
    the matrix product, tanh GELU), "tf32", "graph" (recorded as a CUDA graph).
    """

    section: str
    work: str
    dtype: str
    seconds: dict[str, float] = field(default_factory=dict)
    checks: dict[str, dict[str, float]] = field(default_factory=dict)
    ways: dict[str, str | None] = field(default_factory=dict)  # what ``ops.way`` says of each FFF
    peak_mb: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # results, which nobody timed


class Wrong(RuntimeError):
    """A result that is not what the definition says."""


class Gpu:
    """The device, its clock and its memory.

    Raises:
        RuntimeError: there is none.
    """

    def __init__(self) -> None:
        if why := ops.no_gpu():
            raise RuntimeError(f"`hf-fff bench cuda` needs a GPU: {why}")
        self.device = torch.device("cuda")
        cache = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0)
        self._other = torch.empty(max(4 * cache, 1 << 28), dtype=torch.uint8, device=self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def times(self, calls: Mapping[str, Call], *, rounds: int, limit: float) -> dict[str, float]:
        """Median seconds that the GPU takes for each, with a cold cache, in random order; they were called before."""
        draw, names, begin = random.Random(0), list(calls), time.perf_counter()
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
        for done in range(rounds):
            if done >= FEWEST and time.perf_counter() - begin > limit:
                break
            draw.shuffle(names)
            for name in names:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(_SLEEP)
                self._other.zero_()
                start.record()
                calls[name]()
                end.record()
                marks[name].append((start, end))
            self.synchronize()
        return {name: statistics.median(a.elapsed_time(b) for a, b in of) / 1e3 for name, of in marks.items()}

    def capture(self, call: Call) -> Call:
        """The same call as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with _no_mask(), torch.cuda.graph(graph):
            kept = call()

        def replay() -> object:
            graph.replay()
            return kept

        return replay

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self, run: Call) -> int:
        """The most bytes that were allocated meanwhile."""
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def rates(self, *, size: int = 8192, copied: int = 1 << 29) -> dict[str, float]:
        """What the device reaches: GB/s of a copy (bytes read and written), TFLOP/s of a product of bfloat16 matrices."""
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        source = torch.zeros(copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
        _warm(self, calls)
        seconds = self.times(calls, rounds=15, limit=2.0)
        return {
            "copy_gb_per_second": 2 * copied / seconds["copy"] / 1e9,
            "matmul_tflops": 2 * size**3 / seconds["matmul"] / 1e12,
        }


def bench_cuda(
    plan: Plan,
    sections: Sequence[str] = SECTIONS,
    *,
    gpu: Gpu | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Measures the sections, one after the other. What fails is told, and keeps nothing else from being
    measured.

    Returns:
        ``rates`` of the device, ``rows`` (the cells), ``failed`` (section -> why), ``stopped``: the sections that time did not allow for, whole
        or in part.

    Raises:
        RuntimeError: there is no GPU.
    """
    gpu = gpu or Gpu()
    torch.manual_seed(0)
    measure = {"forward": _forward, "backward": _backward, "graph": _graph, "model": _model, "train": _train}
    cells: list[Cell] = []
    failed: dict[str, str] = {}
    stopped: list[str] = []
    end = time.monotonic() + plan.seconds
    with _precision("highest"):
        rates = gpu.rates()
        for section in sections:
            tell(f"{section} …")
            try:
                for cell in measure[section](plan, gpu):
                    if time.monotonic() > end:
                        stopped.append(section)
                        break
                    cells.append(cell())
                    if wrong := cells[-1].wrong:
                        failed[section] = "; ".join([*filter(None, [failed.get(section)]), *wrong])
                    gpu.free()
            except RuntimeError as error:  # what CUDA says
                failed[section] = "; ".join([*filter(None, [failed.get(section)]), _first_line(error)])
            if section in failed:
                tell(f"{section} failed: {failed[section]}")
            gpu.free()
    return {
        "hidden_size": plan.hidden_size,
        "size": plan.size,
        "rounds": plan.rounds,
        "rates": rates,
        "rows": [asdict(cell) for cell in cells],
        "failed": failed,
        "stopped": stopped,
    }


@contextmanager
def _no_mask() -> Iterator[None]:
    """While something is recorded, some versions of transformers make a mask even where there is no padding; attention with one is several times as slow."""
    masks: Any = masking_utils
    before = getattr(masks, "is_tracing", None)
    if before is None:
        yield
        return
    masks.is_tracing = lambda *_: False
    try:
        yield
    finally:
        masks.is_tracing = before


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """Of float32 matrix products: "highest", or "high", which is TF32 on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _with_tf32(call: Call) -> Call:
    def run() -> object:
        with _precision("high"):
            return call()

    return run


def _warm(gpu: Gpu, calls: Mapping[str, Call]) -> dict[str, str]:
    """Calls each twice; returns those that cannot run, and why."""
    left_out = {}
    for name, call in calls.items():
        try:
            call()
            call()
            gpu.synchronize()
        except RuntimeError as error:  # out of memory is one
            left_out[name] = _first_line(error)
    return left_out


def _timed(cell: Cell, calls: Mapping[str, Call], plan: Plan, gpu: Gpu) -> Cell:
    cell.left_out |= _warm(gpu, calls)
    calls = {name: call for name, call in calls.items() if name not in cell.left_out}
    cell.seconds |= gpu.times(calls, rounds=plan.rounds, limit=plan.limit)
    return cell


# Layers


def masked_backend() -> ModuleType:
    """The operator as a dense layer with a mask: in Triton where that works, else in PyTorch."""
    return ops._triton() or torch_backend


def _layers(plan: Plan, dtype: str, gpu: Gpu) -> dict[str, FFF]:
    made = {}
    for name in plan.fff:
        layer = FFF(plan.hidden_size, FFFConfig.from_shorthand(name), device=gpu.device, dtype=DTYPES[dtype])
        made[name] = layer.requires_grad_(False)
    return made


def _weights(fff: FFF) -> tuple[Any, ...]:
    """As the operators take them behind ``x``."""
    return fff.weight_in, fff.bias_in, fff.weight_out, fff.n_trees, fff.config.activation


def _doubles(fff: FFF) -> tuple[Tensor, Tensor, Tensor]:
    return fff.weight_in.double(), fff.bias_in.double(), fff.weight_out.double()


def _dense(width: int, hidden_size: int, dtype: torch.dtype, gpu: Gpu) -> nn.Sequential:
    options: dict[str, Any] = {"device": gpu.device, "dtype": dtype}
    return nn.Sequential(nn.Linear(hidden_size, width, **options), nn.GELU(), nn.Linear(width, hidden_size, **options))


def _fused(layer: nn.Sequential, x: Tensor) -> Tensor:
    first: Any = layer[0]
    return layer[2](torch._addmm_activation(first.bias, x, first.weight.t(), use_gelu=True))


def _dense_calls(names: Mapping[str, int], x: Tensor, gpu: Gpu) -> dict[str, Call]:
    """Linear-GELU-Linear of each width, and what torch has to make it faster."""
    calls: dict[str, Call] = {}
    for name, width in names.items():
        layer = _dense(width, x.shape[1], x.dtype, gpu).requires_grad_(False)
        calls[name] = partial(layer, x)
        fused = partial(_fused, layer, x)
        try:
            if relative_error(fused(), layer(x)) < 0.03:  # its GELU is the one with tanh
                calls[f"{name} fused"] = fused
        except RuntimeError:
            pass  # this torch, or this device, has none
    if x.dtype == torch.float32:
        calls |= {f"{name} tf32": _with_tf32(call) for name, call in calls.items()}
    return calls


def relative_error(of: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    expected = expected.double()
    return float((of.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def _copy(x: Tensor) -> Call:
    target = torch.empty_like(x)
    return lambda: target.copy_(x)


def _forward(plan: Plan, gpu: Gpu) -> Cells:
    for dtype in plan.dtypes:
        layers = _layers(plan, dtype, gpu)
        for tokens in plan.tokens:
            yield partial(_forward_cell, plan, gpu, layers, dtype, tokens)


@torch.no_grad()
def _forward_cell(plan: Plan, gpu: Gpu, layers: Mapping[str, FFF], dtype: str, tokens: int) -> Cell:
    widths = {f"dense:{n}": n for n in plan.dense} | {f"mlp:{n}": n for n in plan.narrow}
    x = torch.randn(tokens, plan.hidden_size, device=gpu.device, dtype=DTYPES[dtype])
    cell, calls = Cell("forward", str(tokens), dtype), {"copy": _copy(x), **_dense_calls(widths, x, gpu)}
    for name, fff in layers.items():
        for label, backend in ((name, torch.ops.hf_fff), (f"{name} masked", masked_backend())):
            if _is_right(cell, label, partial(check_forward, label, fff, x, backend)):
                calls[label] = partial(backend.fff, x, *_weights(fff))
        cell.ways[name] = _way(fff, x)
    return _timed(cell, calls, plan, gpu)


def _is_right(cell: Cell, name: str, check: Callable[[], dict[str, float]]) -> bool:
    """Keeps what a check says."""
    try:
        cell.checks[name] = check()
    except Wrong as error:
        cell.wrong.append(str(error))
        return False
    return True


def _way(fff: FFF, x: Tensor, **of: bool) -> str | None:
    return ops.way(fff.n_trees, fff.config.depth or 0, fff.hidden_size, len(x), x.dtype, **of)


def _graph(plan: Plan, gpu: Gpu) -> Cells:
    layers = _layers(plan, plan.dtypes[0], gpu)
    for tokens in plan.graph_tokens:
        yield partial(_graph_cell, plan, gpu, layers, tokens)


@torch.no_grad()
def _graph_cell(plan: Plan, gpu: Gpu, layers: Mapping[str, FFF], tokens: int) -> Cell:
    dtype = plan.dtypes[0]
    x = torch.randn(tokens, plan.hidden_size, device=gpu.device, dtype=DTYPES[dtype])
    calls = {"copy": _copy(x), **_dense_calls({f"dense:{n}": n for n in plan.dense[:1]}, x, gpu)}
    calls |= {name: partial(torch.ops.hf_fff.fff, x, *_weights(fff)) for name, fff in layers.items()}
    cell, captured = Cell("graph", str(tokens), dtype, ways={n: _way(fff, x) for n, fff in layers.items()}), {}
    for name, call in calls.items():
        try:
            want, replay = call(), gpu.capture(call)
        except RuntimeError as error:
            cell.left_out[name] = _first_line(error)
            continue
        if relative_error(_tensor(replay()), _tensor(want)) <= 1e-2:
            captured[name] = replay
        else:
            cell.wrong.append(f"{name} gives something else in a CUDA graph, at {tokens} tokens")
    return _timed(cell, captured, plan, gpu)


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _rows(fff: FFF, path: Tensor) -> Tensor:
    """Of the weights, for a path ``[T, K, D+1]``."""
    return path.long() + torch.arange(fff.n_trees, device=path.device).unsqueeze(-1) * fff.config.tree_nodes


def along_path(fff: FFF, x: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``[T, H]`` and logits ``[T, K, D+1]`` of the definition in float64, on a path that is given."""
    rows = _rows(fff, path)
    z = torch.einsum("th,tkdh->tkd", x.double(), fff.weight_in[rows].double()) + fff.bias_in[rows].double()
    act = torch_backend.activation_functions(fff.config.activation)[0]
    return torch.einsum("tkd,tkdh->th", act(z), fff.weight_out[rows].double()), z


def check_forward(name: str, fff: FFF, x: Tensor, backend: Any) -> dict[str, float]:
    """Compares some tokens with float64, on the path that they took.

    Returns:
        ``error``: the largest relative error of a token's output among those that took the path; ``agreeing``: the share of tokens whose
        path is the one of float64; ``visited``: neurons that all tokens use together.

    Raises:
        Wrong: a token turned the wrong way where its logit is not near zero, or its output is wrong.
    """
    y, (_, path, _) = backend.fff(x, *_weights(fff)), backend.fff_train(x, *_weights(fff))
    some = slice(None, None, max(1, len(x) // _CHECKED))
    errors, agreeing = [], []
    for xs, ys, paths in zip(
        x[some].split(64), y[some].split(64), path[some].split(64), strict=True
    ):  # rows are many bytes
        expected, z = along_path(fff, xs, paths)
        near = (z[..., :-1].abs() < _NEAR_ZERO[x.dtype]).flatten(1)
        went_right = (paths[..., 1:] == 2 * paths[..., :-1] + 2).flatten(1)
        if ((went_right != (z[..., :-1] > 0).flatten(1)) & ~near).any():
            raise Wrong(f"a token of {name} turns the wrong way, at {len(x)} tokens")
        error = (ys.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-300)
        elsewhere = ~(error <= _WRONG[x.dtype][0])
        if (elsewhere & ~near.any(1)).any():
            raise Wrong(f"the output of {name} is wrong, at {len(x)} tokens")
        errors.append(error[~elsewhere])
        own = torch_backend.fff_train(xs.double(), *_doubles(fff), fff.n_trees, fff.config.activation)[1]
        agreeing.append((own == paths).flatten(1).all(1))
    found = torch.cat(errors)
    return {
        "error": float(found.max()) if len(found) else 0.0,
        "agreeing": float(torch.cat(agreeing).double().mean()),
        "visited": int(_rows(fff, path).unique().numel()),
    }


def _backward(plan: Plan, gpu: Gpu) -> Cells:
    for dtype in plan.dtypes:
        layers = _layers(plan, dtype, gpu)
        for tokens in plan.backward_tokens:
            yield partial(_backward_cell, plan, gpu, layers, dtype, tokens)


@torch.no_grad()
def _backward_cell(plan: Plan, gpu: Gpu, layers: Mapping[str, FFF], dtype: str, tokens: int) -> Cell:
    masked = masked_backend()
    x, grad_y = torch.randn(2, tokens, plan.hidden_size, device=gpu.device, dtype=DTYPES[dtype])
    cell, calls = Cell("backward", str(tokens), dtype), {"copy": _copy(x)}
    dense = {f"dense:{width}": _dense_backward(width, x, grad_y, gpu) for width in plan.dense}
    calls |= dense
    if dtype == "float32":
        calls |= {f"{name} tf32": _with_tf32(call) for name, call in dense.items()}
    for name, fff in layers.items():
        weights = _weights(fff)
        _, path, logits = torch.ops.hf_fff.fff_train(x, *weights)
        arguments = (grad_y, x, *weights[:3], path, logits, *weights[3:])
        for suffix, routing in (("", (0.0, 1.0)), (" routing", _ROUTING)):
            if _is_right(
                cell, name + suffix, partial(check_backward, name + suffix, fff, grad_y, x, path, logits, routing)
            ):
                calls[name + suffix] = partial(torch.ops.hf_fff.fff_backward, *arguments, *routing)
            calls[f"{name} masked{suffix}"] = partial(masked.fff_backward, *arguments, *routing)
            cell.ways[name + suffix] = _way(fff, x, backward=True, routing=routing == _ROUTING)
    return _timed(cell, calls, plan, gpu)


def _dense_backward(width: int, x: Tensor, grad_y: Tensor, gpu: Gpu) -> Call:
    layer = _dense(width, x.shape[1], x.dtype, gpu)
    leaves = [x.detach().requires_grad_(), *layer.parameters()]
    with torch.enable_grad():
        y = layer(leaves[0])
    return lambda: torch.autograd.grad(y, leaves, grad_y, retain_graph=True)


@torch.no_grad()
def check_backward(
    name: str,
    fff: FFF,
    grad_y: Tensor,
    x: Tensor,
    path: Tensor,
    logits: Tensor,
    routing: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """Compares all gradients with those of the PyTorch backend in float64, on the same path.

    Returns:
        the relative error of each: ``x``, ``weight_in``, ``bias_in``, ``weight_out``.

    Raises:
        Wrong: one is wrong.
    """
    weights = _weights(fff)
    got = torch.ops.hf_fff.fff_backward(grad_y, x, *weights[:3], path, logits, *weights[3:], *routing)
    z = torch.empty(path.shape, dtype=torch.float64, device=x.device)
    weight_in, bias_in, weight_out = _doubles(fff)
    for piece in torch_backend.pieces(len(x), len(weight_in)):
        every = F.linear(x[piece].double(), weight_in, bias_in)
        z[piece] = every.gather(1, _rows(fff, path[piece]).flatten(1)).view_as(z[piece])
    want = torch_backend.fff_backward(
        grad_y.double(),
        x.double(),
        weight_in,
        bias_in,
        weight_out,
        path,
        z,
        fff.n_trees,
        fff.config.activation,
        *routing,
    )
    names = ("x", "weight_in", "bias_in", "weight_out")
    errors = {n: relative_error(a, b) for n, a, b in zip(names, got, want, strict=True)}
    limit = _WRONG[x.dtype][2 if routing[0] else 1]
    if wrong := [n for n, error in errors.items() if not error <= limit]:
        raise Wrong(
            f"the gradient of {wrong[0]} of {name} is wrong (relative error {errors[wrong[0]]:.2g}), at {len(x)} tokens"
        )
    return errors


# Models


def _model(plan: Plan, gpu: Gpu) -> Cells:
    dtype = plan.dtypes[0]
    models = random_models(plan.size, plan.kinds, {dtype: DTYPES[dtype]})
    models = {name.split()[0]: model.to(gpu.device).requires_grad_(False) for name, model in models.items()}
    for batch in plan.batches:
        yield partial(_model_cell, plan, gpu, models, batch)


@torch.no_grad()
def _model_cell(plan: Plan, gpu: Gpu, models: Mapping[str, Any], batch: str) -> Cell:
    rows, tokens = map(int, batch.split("x"))
    work = random_ids(rows, tokens, min(model.config.vocab_size for model in models.values()))
    (timing,) = time_models(models, [work], rounds=plan.rounds, limit=plan.limit, patience=Patience())
    seconds = {name: s / len(work.batches) for name, s in timing.seconds.items()}
    cell, calls = Cell("model", batch, plan.dtypes[0], seconds), {}
    ids = work.batches[0]["input_ids"].to(gpu.device)
    for name, model in models.items():
        try:
            calls[f"{name} graph"] = gpu.capture(partial(model, input_ids=ids))
        except RuntimeError as error:
            cell.left_out[f"{name} graph"] = _first_line(error)
    return _timed(cell, calls, plan, gpu)


def _train(plan: Plan, gpu: Gpu) -> Cells:
    for size, batch in plan.training:
        yield partial(_train_cell, plan, gpu, size, batch)


def _train_cell(plan: Plan, gpu: Gpu, size: str, batch: str) -> Cell:
    rows, tokens = map(int, batch.split("x"))
    models = random_models(size, plan.kinds, {"float32": torch.float32})
    cell, steps = Cell("train", f"{size} {batch}", "bfloat16 autocast"), {}
    for name in list(models):
        kind, before = name.split()[0], gpu.allocated()
        step = _step(models.pop(name).to(gpu.device).train(), rows, tokens, gpu)
        try:
            cell.peak_mb[kind] = (gpu.peak(partial(_twice, step)) - before) / 1e6
        except RuntimeError as error:
            cell.left_out[kind] = _first_line(error)
            continue
        steps[kind] = _finished(step, gpu)
        try:
            steps[f"{kind} graph"] = _finished(gpu.capture(step), gpu)
        except RuntimeError as error:
            cell.left_out[f"{kind} graph"] = _first_line(error)
    cell.seconds = interleaved(steps, rounds=plan.rounds, order=random.Random(0), limit=2 * plan.limit)
    return cell


def _finished(call: Call, gpu: Gpu) -> Call:
    def run() -> None:
        call()
        gpu.synchronize()

    return run


def _twice(call: Call) -> None:
    call()
    call()


def _step(model: Any, rows: int, tokens: int, gpu: Gpu) -> Call:
    """One step of training as it is done on a GPU: bfloat16 autocast, float32 weights, AdamW."""
    ids = torch.randint(model.config.vocab_size, (rows, tokens), device=gpu.device)
    target = torch.randn(rows, tokens, model.config.hidden_size, device=gpu.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=gpu.device.type == "cuda")

    def step() -> None:
        with torch.autocast(gpu.device.type, torch.bfloat16):
            states = model(input_ids=ids)[0]
            loss = (states.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# What the cells say


def best(seconds: Mapping[str, float], name: str, behind: str = "") -> float | None:
    """The faster of a dense layer and of the one with a fused activation."""
    found = [seconds[n] for n in (f"{name}{behind}", f"{name} fused{behind}") if n in seconds]
    return min(found) if found else None


def bytes_a_token(section: str, config: FFFConfig, hidden_size: int, dtype: str, tokens: int, visited: int) -> float:
    """What has to be moved from and to the memory, at least, if rows that several tokens visit are read once."""
    size, rows = DTYPES[dtype].itemsize, 2 * hidden_size + 1
    if section == "backward":
        own = 3 * hidden_size * size + 8 * config.active_nodes  # x, its gradient and that of y; path and logits
        return own + (visited + config.nodes) * rows * size / tokens  # rows are read, the gradients of all written
    return (2 * hidden_size + visited * rows / tokens) * size


def lines(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each FFF of each cell of a layer, with its rivals' times over its own: above 1 it is the faster.

    ``share`` is the part of the copy's bandwidth that the least bytes of a token would take in that time.
    """
    found = []
    for row in told["rows"]:
        seconds = row["seconds"]
        if row["section"] not in ("forward", "backward", "graph"):
            continue
        for name in seconds:
            shape, _, behind = name.partition(" ")
            if "x" not in shape or behind not in ("", "routing"):
                continue
            own, tokens = seconds[name], int(row["work"])
            rivals = {n: best(seconds, n) for n in dict.fromkeys(s.split()[0] for s in seconds) if "x" not in n}
            rivals["masked"] = seconds.get(f"{shape} masked{' routing' if behind else ''}")
            rivals |= {f"{n} tf32": best(seconds, n, " tf32") for n in rivals}
            check = row["checks"].get(name, {})
            config = FFFConfig.from_shorthand(shape)
            size = bytes_a_token(
                row["section"],
                config,
                told["hidden_size"],
                row["dtype"],
                tokens,
                int(check.get("visited", config.nodes)),
            )
            found.append(
                {
                    **{n: row[n] for n in ("section", "dtype")},
                    "tokens": tokens,
                    "fff": shape,
                    "routing": behind == "routing",
                    "microseconds": 1e6 * own,
                    **{n: s / own for n, s in rivals.items() if s is not None},
                    "bytes_a_token": size,
                    "share": size * tokens / own / 1e9 / told["rates"]["copy_gb_per_second"],
                    "error": max((v for n, v in check.items() if n not in ("agreeing", "visited")), default=None),
                    "agreeing": check.get("agreeing"),
                    "way": row["ways"].get(name),
                }
            )
    return found
