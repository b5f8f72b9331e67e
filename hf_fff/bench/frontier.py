"""Trees against the rival that counts: a dense MLP that fits as well, in int8 inside OpenVINO.

The engine runs in a process of its own, which takes turns with the trees' loops in this one: there is one thread pool at work at a time. The
trees are timed inside the engine too, as they are deployed, and so is a call that does nothing.
"""

import pickle
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import FFF, PackedFFF
from . import machine, process
from .kept import Kept
from .layer import Layer, check_outputs, check_packed, dense_layer, packed_layers, set_threads, tree_loops
from .load import Patience
from .timing import turns

EMPTY = "empty call"  # of the engine: one token goes through nothing but a ReLU
ENGINES = {"openvino": ("openvino", "nncf")}  # and the packages that each needs

_LIMIT = 8.0  # seconds for the rounds of a cell, if three are done by then
_PAUSE = 0.03  # seconds until the threads of the other process have gone to sleep: OpenMP's wait busily at first
_EXAMPLES, _EXAMPLE_TOKENS = 32, 64  # inputs that int8 looks at


@dataclass(frozen=True)
class Row:
    """Microseconds a call. ``fff`` has rows of float32, ``int8 rows`` and ``bf16 rows`` are packed, ``mlp:WIDTH`` is in int8.

    ``loop`` runs inside the library, without Python around the call (empty where there is no such library); ``engine`` is called from
    Python, inside OpenVINO.
    """

    fff: str
    hidden_size: int
    weights: str
    threads: int
    tokens: int
    visited: int  # neurons that a call's tokens use together, out of ``nodes``
    nodes: int
    loop: dict[str, float]
    engine: dict[str, float]
    others: float | None  # cores that other processes kept busy meanwhile


def missing(engine: str) -> str | None:
    """Why an engine cannot be used, or None.

    Raises:
        ValueError: it is not known.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not known (allowed: {', '.join(ENGINES)})")
    if package := machine.missing(ENGINES[engine]):
        return f"{package} is not installed: pip install 'hf-fff[openvino]'"
    return None


def bench_frontier(
    layers: Sequence[Layer],
    tokens: Sequence[int],
    *,
    threads: Sequence[int] | None = None,
    against: Mapping[str, int] | None = None,
    rounds: int = 15,
    patience: Patience | None = None,
    kept: Kept | None = None,
) -> list[Row]:
    """Times float32 layers at every number of tokens, and MLPs in int8 beside them.

    Args:
        threads: numbers of them; as torch has it without.
        against: names and widths of the MLPs.

    Raises:
        RuntimeError: outputs are wrong, or the engine's process ended.
        ValueError: a layer knows fewer hidden states than are asked for.
    """
    torch.manual_seed(0)
    before = torch.get_num_threads()
    numbers, patience, kept = list(threads or [before]), patience or Patience(), kept or Kept()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="hf-fff-frontier-") as place, torch.no_grad():
        given = Path(place) / "given"
        given.write_bytes(pickle.dumps((list(layers), dict(against or {}))))
        command = process.command(__name__, str(given), threads=max(numbers))
        try:
            with process.served(command, "OpenVINO") as server:
                for (i, layer), count in product(enumerate(layers), tokens):
                    cell = partial(_cell, layer, i, server, count, numbers, list(against or {}), rounds, patience)
                    key = (layer.fff.config.shorthand, layer.weights, count)
                    rows += [Row(**record) for record in kept.cell(key, cell, patience)]
        finally:
            torch.set_num_threads(before)
    return rows


def _cell(
    layer: Layer,
    number: int,
    server: process.Server,
    tokens: int,
    threads: Sequence[int],
    widths: Sequence[str],
    rounds: int,
    patience: Patience,
) -> list[dict[str, Any]]:
    """One layer at one number of tokens, with each number of threads."""
    fff, x = layer.fff, layer.inputs(tokens)
    visited, packed = check_outputs(fff, x[0]), packed_layers(fff)
    check_packed(fff, packed, x[0])
    kinds = ["fff", *(f"{rows} rows" for rows in ("int8", "bf16")), *widths, EMPTY]
    candidates: dict[tuple[int, str, str], Callable[[int], float]] = {}
    for n in threads:
        candidates |= {(n, "loop", name): run for name, run in tree_loops(fff, x, packed).items()}
        candidates |= {(n, "engine", name): partial(server.ask, number, tokens, n, name) for name in kinds}
    measured, load = patience.measure(
        max(threads),
        lambda: turns(candidates, rounds=rounds, limit=_LIMIT, before=_set_threads, order=random.Random(0)),
        children=[server.process.pid],
    )
    rows = []
    for n in threads:
        of: dict[str, dict[str, float]] = {"loop": {}, "engine": {}}
        for (m, where, name), seconds in sorted(measured.items()):
            if m == n:
                of[where][name] = seconds * 1e6
        size = (fff.config.shorthand, fff.hidden_size, layer.weights, n, tokens, visited, fff.config.nodes)
        rows.append(asdict(Row(*size, of["loop"], of["engine"], load.others)))
    return rows


def _set_threads(key: tuple[int, str, str]) -> None:
    set_threads(key[:2])


def versions(engine: str) -> dict[str, str]:
    return {package: version(package) for package in ENGINES[engine]}


def as_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def as_lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line a time, for a table of values."""
    size = ("fff", "hidden_size", "weights", "threads", "tokens", "visited", "nodes")
    return [
        {**{n: getattr(row, n) for n in size}, "where": where, "candidate": name, "microseconds": t, "a_token": t / row.tokens}
        for row in rows
        for where, of in (("loop", row.loop), ("openvino", row.engine))
        for name, t in of.items()
    ]  # fmt: skip


# The engine's process


def mlp_graph(mlp: nn.Sequential, examples: Sequence[Tensor]) -> Any:
    """A dense layer quantised as models are: by NNCF after training, in the engine's int8."""
    from ..openvino.library import engine
    from ..openvino.quantise import quantised

    hidden = examples[0].shape[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = engine().convert_model(mlp, example_input=torch.zeros(2, hidden), input=[-1, hidden])
    graph.inputs[0].get_tensor().set_names({"x"})
    return quantised(graph, [{"x": x.numpy()} for x in examples])


def tree_graph(fff: FFF, rows: str) -> Any:
    """A layer alone as an operation of the engine: rows of "f32", "int8" or "bf16"."""
    from openvino import opset13
    from openvino.utils.node_factory import NodeFactory

    from ..openvino.library import engine, extension

    openvino, factory = engine(), NodeFactory()
    factory.add_extension(str(extension()))
    x = opset13.parameter([-1, fff.hidden_size], np.float32, name="x")
    activation = {"activation": fff.config.activation}
    if rows == "f32":
        weights = [openvino.op.Constant(w.detach().numpy()) for w in (fff.weight_in, fff.bias_in, fff.weight_out)]
        told = {"n_trees": fff.n_trees, **activation}
        node = factory.create("FFF", [x.output(0), *(w.output(0) for w in weights)], told)
    else:
        packed = openvino.op.Constant(PackedFFF.of(fff, rows).packed.numpy())
        node = factory.create("PackedFFF", [x.output(0), packed.output(0)], activation)
    return openvino.Model([node.output(0)], [x])


def _empty_graph(hidden: int) -> Any:
    from openvino import opset13

    from ..openvino.library import engine

    x = opset13.parameter([-1, hidden], np.float32, name="x")
    return engine().Model([opset13.relu(x).output(0)], [x])


class _Engine:
    """Compiles a layer for a shape when it is first asked for."""

    def __init__(self, layers: Sequence[Layer], widths: Mapping[str, int]) -> None:
        from ..openvino.library import engine

        self.layers, self.core = list(layers), engine().Core()
        has_bf16 = "BF16" in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if has_bf16 else "f32"}
        self.graphs: dict[tuple[int, str], Any] = {}
        self.wanted: dict[tuple[int, str], Callable[[Tensor], Tensor]] = {}
        self.compiled: dict[tuple[int, str], Any] = {}  # of one cell: (threads, name) -> inference request
        self.cell: tuple[int, int] = (-1, 0)
        self.inputs: dict[str, list[Any]] = {}
        for width_name, width in widths.items():
            for i, layer in enumerate(layers):
                twin = next((k for k in range(i) if layers[k].fff.hidden_size == layer.fff.hidden_size), None)
                if twin is not None:
                    self.graphs[i, width_name] = self.graphs[twin, width_name]
                    self.wanted[i, width_name] = self.wanted[twin, width_name]
                    continue
                torch.manual_seed(0)
                mlp = dense_layer(layer.fff, width).eval()
                examples = torch.randn(_EXAMPLES, _EXAMPLE_TOKENS, layer.fff.hidden_size)
                self.graphs[i, width_name], self.wanted[i, width_name] = mlp_graph(mlp, list(examples)), mlp
        for i, layer in enumerate(layers):
            for rows, name in (("f32", "fff"), ("int8", "int8 rows"), ("bf16", "bf16 rows")):
                self.graphs[i, name], self.wanted[i, name] = tree_graph(layer.fff, rows), layer.fff
            self.graphs[i, EMPTY], self.wanted[i, EMPTY] = _empty_graph(layer.fff.hidden_size), torch.relu

    def time(self, number: int, tokens: int, threads: int, name: str, calls: int) -> float:
        """Seconds a call."""
        if self.cell != (number, tokens):
            self.cell, self.compiled = (number, tokens), {}
            from ..openvino.library import engine

            arrays = [x.numpy() for x in self.layers[number].inputs(tokens)]
            every = {"": arrays, EMPTY: [x[:1].copy() for x in arrays]}
            self.inputs = {n: [engine().Tensor(x, shared_memory=True) for x in of] for n, of in every.items()}
        inputs = self.inputs.get(name) or self.inputs[""]
        if (threads, name) not in self.compiled:
            self.compiled[threads, name] = self._request(number, threads, name, inputs[0].data)
        request = self.compiled[threads, name]
        time.sleep(_PAUSE)
        _infer(request, inputs[0])
        start = time.perf_counter()
        for i in range(calls):
            _infer(request, inputs[i % len(inputs)])
        return (time.perf_counter() - start) / calls

    def _request(self, number: int, threads: int, name: str, x: Any) -> Any:
        graph = self.graphs[number, name].clone()
        graph.reshape(list(x.shape))  # known sizes are what an engine does best with
        properties = {**self.properties, "INFERENCE_NUM_THREADS": threads}
        request = self.core.compile_model(graph, "CPU", properties).create_infer_request()
        found = torch.from_numpy(request.infer([x])[0])
        wanted = self.wanted[number, name](torch.from_numpy(x))
        error = ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)).tolist()
        if not statistics.median(error) < 0.1:  # near ties trees take other paths
            raise RuntimeError(f"the outputs of {name} in the engine are wrong: nothing was timed")
        return request


def _infer(request: Any, x: Any) -> None:
    """The shortest way that Python has: 8 µs for nothing, where arrays as arguments take 31."""
    request.set_input_tensor(0, x)
    request.infer(share_inputs=True, share_outputs=True)


@torch.no_grad()
def main() -> None:
    warnings.simplefilter("ignore")
    answer = process.answers()
    torch.set_num_threads(1)
    layers, widths = pickle.loads(Path(sys.argv[1]).read_bytes())
    engine = _Engine(layers, widths)
    answer("ready")
    for question in process.questions():
        answer(engine.time(*question))


if __name__ == "__main__":
    main()
