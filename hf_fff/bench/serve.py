"""Models as they are deployed on a CPU, against each other: one process a system, which take turns in random order.

Two thread pools in one process spoil each other's timings, so each system, a model in an engine, is made in a process that ends,
and served from files by another one, which waits while its neighbours are timed.
"""

import gc
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..exporting import complete
from ..layers.linear import why_not
from ..ops import ROWS
from ..packing import optimize
from .load import Patience
from .model import Workload, load_model, random_ids, real_rows

ENGINES: dict[str, tuple[str, ...]] = {  # and the packages that each needs
    "torch-f32": (),
    "torch-bf16": (),
    "torch-packed-bf16": (),  # hf_fff.optimize(linears=...)
    "torch-packed-int8": (),
    "torchao-int8": ("torchao",),
    "onnxruntime-int8": ("onnxruntime", "onnx", "onnxscript"),
    "openvino-bf16": ("openvino",),
    "openvino-int8": ("openvino", "nncf"),
}
PEER, EAGER = "openvino-int8", "torch-f32"  # ratios are to the first model in these
MIXED = "mixed"
# Tokens of 32 everyday sentences (every 24th of examples/data/everyday_eval.txt, in BERT's tokens), for models without texts.
LENGTHS = (
    15, 13, 18, 17, 38, 7, 15, 15, 21, 40, 15, 16, 19, 16, 14, 22, 12, 13, 23, 19, 13, 20, 15, 16, 18, 10, 13, 19, 12, 17, 17, 13,
)  # fmt: skip
_TOKENS = 512  # in a workload, where few batches allow it: trees are not timed on a handful of paths
_SECONDS = 0.2  # of a turn
_SAMPLES = 300  # batches or texts that int8 looks at


@dataclass(frozen=True)
class System:
    """A model, by its name, in an engine."""

    model: str
    engine: str

    @property
    def name(self) -> str:
        return f"{self.engine} {self.model}"


@dataclass
class Served:
    """What was measured of a system. Seconds are of a batch, by workload.

    Attributes:
        seconds: medians over the turns.
        p95: of all single calls.
        cold_start: seconds from the start of a process, Python and imports included, to its first answer.
        peak_memory: bytes that the process had in memory at most; None where the system does not tell.
        cosine: mean, over texts, to the first model's output in torch float32; None with random weights.
    """

    system: System
    seconds: dict[str, float] = field(default_factory=dict)
    p95: dict[str, float] = field(default_factory=dict)
    cold_start: float = 0.0
    peak_memory: int | None = None
    cosine: float | None = None


def missing(engine: str) -> str | None:
    """Why an engine is left out, or None.

    Raises:
        ValueError: it is not known.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not known (allowed: {', '.join(ENGINES)})")
    for package in ENGINES[engine]:
        try:
            version(package)
        except PackageNotFoundError:
            return f"{package} is not installed"
    return why_not(engine.rpartition("-")[2]) if engine.startswith("torch-packed") else None


def versions() -> dict[str, str]:
    """Of the engines that are installed."""
    found = {}
    for name in sorted({package for packages in ENGINES.values() for package in packages}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def mixed_ids(vocab_size: int, lengths: Sequence[int] = LENGTHS, *, seed: int = 0) -> Workload:
    """One padded batch of random ids with the lengths of real sentences."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Workload(MIXED, [{"input_ids": ids * mask, "attention_mask": mask}])


def workloads(
    shapes: Sequence[str], vocab_size: int, *, texts: Sequence[str] = (), tokenizer: Any = None, seed: int = 0
) -> list[Workload]:
    """Random ids of ``ROWSxTOKENS``, of which few go through several batches; "mixed": 32 rows of real lengths, of ``texts``
    where there are some."""
    made = []
    for shape in shapes:
        if shape == MIXED and tokenizer is not None and texts:
            from ..tasks.data import Collator
            from ..training import TokenisedTexts

            real = real_rows(TokenisedTexts(list(texts), tokenizer, 128), Collator(tokenizer), 32, seed=seed)
            made.append(Workload(MIXED, real.batches))
        elif shape == MIXED:
            made.append(mixed_ids(vocab_size, seed=seed))
        else:
            rows, tokens = map(int, shape.split("x"))
            work = random_ids(rows, tokens, vocab_size, seed=seed)
            made.append(Workload(shape, work.batches[: max(1, _TOKENS // (rows * tokens))]))
    return made


def bench_serve(
    sources: Mapping[str, str | Callable[[], Any]],
    systems: Sequence[System],
    work: Sequence[Workload],
    *,
    texts: Sequence[str] = (),
    rows: str = "auto",
    threads: int | None = None,
    rounds: int = 9,
    seed: int = 0,
    patience: Patience | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> tuple[list[Served], list[dict[str, Any]]]:
    """Measures all systems.

    Args:
        sources: models by name: a folder, or what makes one with random weights.
        texts: typical ones for int8, and for the fidelity; random ids without them.
        rows: of trees, as ``hf_fff.openvino.compile`` knows them; packed ones in torch are of bf16 where these are not.

    Returns:
        What was found of each system; and for each workload its name, visible tokens a batch, and the load beside it.

    Raises:
        RuntimeError: a system's process ended; its message is told.
    """
    threads = threads or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    patience, order = patience or Patience(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="hf-fff-serve-") as place, ExitStack() as stack:
        root = Path(place)
        folders = {name: _folder(root / "models" / str(i), source) for i, (name, source) in enumerate(sources.items())}
        torch.save([list(map(dict, w.batches)) for w in work], root / "work.pt")
        (root / "texts.json").write_text(json.dumps(list(texts)), encoding="utf-8")
        told = {"root": str(root), "threads": threads, "rows": rows}
        servers: dict[System, _Server] = {}
        for i, system in enumerate(systems):
            tell(f"making {system.name}")
            own = {
                **told,
                "engine": system.engine,
                "source": str(folders[system.model]),
                "made": str(root / "made" / str(i)),
            }
            _finish(own, system.name)
            servers[system] = stack.enter_context(_served(own, system.name))
        found = [Served(s, cold_start=servers[s].cold_start) for s in systems]
        facts = []
        pids = [server.process.pid for server in servers.values()]
        for number, workload in enumerate(work):
            tell(f"timing {workload.name}")
            calls = {s: max(1, int(_SECONDS / min(servers[s].ask("time", number, 2)))) for s in systems}
            times: dict[System, list[list[float]]] = {s: [] for s in systems}
            others = []
            for _ in range(rounds):

                def turn(number: int = number, calls: Mapping[System, int] = calls) -> dict[System, list[float]]:
                    return {
                        s: servers[s].ask("time", number, calls[s]) for s in order.sample(list(systems), len(systems))
                    }

                result, load = patience.measure(threads, turn, children=pids)
                others.append(load.others)
                for system, values in result.items():
                    times[system].append(values)
            count = len(workload.batches)
            for served in found:
                turns = times[served.system]
                every = sorted(t for values in turns for t in values)
                served.seconds[workload.name] = statistics.median(map(statistics.median, turns)) / count
                served.p95[workload.name] = every[min(len(every) - 1, int(0.95 * len(every)))] / count
            known = [o for o in others if o is not None]
            facts.append(
                {
                    "workload": workload.name,
                    "tokens": workload.tokens / count,
                    "others": statistics.median(known) if known else None,
                    "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
                }
            )
        if texts:
            _compare(found, servers)
        for served in found:
            served.peak_memory = servers[served.system].ask("memory")
    return found, facts


def _compare(found: Sequence[Served], servers: Mapping["System", "_Server"]) -> None:
    teacher = next((s for s in found if s.system.engine == EAGER), None)
    if teacher is None:
        return
    want = torch.tensor(servers[teacher.system].ask("vectors"))
    for served in found:
        vectors = want if served is teacher else torch.tensor(servers[served.system].ask("vectors"))
        if vectors.shape == want.shape:
            served.cosine = float(nn.functional.cosine_similarity(vectors, want, dim=-1).mean())


def records(found: Sequence[Served], facts: Sequence[Mapping[str, Any]], trained: bool) -> list[dict[str, Any]]:
    """A line for each system and workload, with its ratios (above 1 is faster) to the first model in OpenVINO int8 and in torch."""
    first = found[0].system.model
    known = {s.system: s for s in found}
    rows = []
    for served in found:
        for fact in facts:
            name = fact["workload"]
            row = {
                "engine": served.system.engine,
                "model": served.system.model,
                "weights": "trained" if trained else "random",
                **fact,
                "milliseconds": 1e3 * served.seconds[name],
                "p95": 1e3 * served.p95[name],
            }
            for key, engine in (("to_openvino", PEER), ("to_torch", EAGER)):
                base = known.get(System(first, engine))
                row[key] = base.seconds[name] / served.seconds[name] if base else None
            none = known.get(System("none", served.system.engine))
            row["share_of_the_limit"] = none.seconds[name] / served.seconds[name] if none else None
            peak = None if served.peak_memory is None else served.peak_memory / 1e6
            row |= {"cold_start": served.cold_start, "peak_mb": peak, "cosine": served.cosine}
            rows.append(row)
    return rows


def _folder(place: Path, source: str | Callable[[], Any]) -> str | Path:
    if isinstance(source, str):
        return source
    source().save_pretrained(place)
    return place


# The processes


def _command(told: Mapping[str, Any], what: str) -> tuple[list[str], dict[str, str]]:
    n = str(told["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": n, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    return [sys.executable, "-m", __name__, what, json.dumps(told)], environment


def _finish(told: Mapping[str, Any], name: str) -> None:
    """Makes what a system's process serves, in a process of its own, whose memory nobody counts."""
    command, environment = _command(told, "make")
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{name} cannot be made: {_last(ran.stderr)}")


def _last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "its process ended")


class _Server:
    def __init__(self, told: Mapping[str, Any], name: str, errors: Any) -> None:
        command, environment = _command(told, "serve")
        self.name, self.errors, start = name, errors, time.perf_counter()
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        self._answer()
        self.cold_start = time.perf_counter() - start

    def ask(self, *question: Any) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # told below
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"the process of {self.name} ended: {_last(self.errors.read())}")
        return json.loads(line)


@contextmanager
def _served(told: Mapping[str, Any], name: str) -> Iterator[_Server]:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        server = _Server(told, name, errors)
        try:
            yield server
        finally:
            assert server.process.stdin is not None
            server.process.stdin.close()
            try:
                server.process.wait(10)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


def _model(source: str) -> Any:
    model = load_model(source)
    model.config.return_dict = True
    return model


def _examples(root: Path, source: str, samples: int = _SAMPLES) -> dict[str, Any]:
    """What int8 looks at: texts, or random ids as they are timed."""
    texts = json.loads((root / "texts.json").read_text(encoding="utf-8"))[:samples]
    if texts:
        from transformers import AutoTokenizer

        from ..surgery.folder import ModelFolder

        return {"texts": texts, "tokenizer": AutoTokenizer.from_pretrained(ModelFolder.find(source).transformer)}
    batches = [batch for of in torch.load(root / "work.pt", weights_only=True) for batch in of]
    small = min(batches, key=lambda b: abs(b["input_ids"].numel() - 256))  # neither tiny nor slow to look at
    return {"texts": [small]}


def _make(told: Mapping[str, Any]) -> None:
    """Writes what the system's process will open, where the model's own folder is not enough."""
    engine, source, root, made = told["engine"], told["source"], Path(told["root"]), Path(told["made"])
    torch.set_num_threads(told["threads"])
    if engine.startswith("openvino"):
        from .. import openvino

        precision = engine.partition("-")[2]
        options = _examples(root, source) if precision == "int8" else {}
        openvino.compile(_model(source), precision, rows=told["rows"], **options).save_pretrained(made)
    elif engine.startswith("onnxruntime"):
        from .. import onnx

        onnx.export(_model(source), made, engine.partition("-")[2])


def _opened(told: Mapping[str, Any]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A batch -> the first output."""
    engine, threads = told["engine"], told["threads"]
    torch.set_num_threads(threads)
    if engine.startswith("openvino"):
        from .. import openvino

        served = openvino.load(told["made"], ov_config={"INFERENCE_NUM_THREADS": threads})

        def call(batch: Mapping[str, Tensor]) -> Any:
            return served(**batch)[0]

        return call
    if engine.startswith("onnxruntime"):
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others are timed meanwhile
        session = runtime.InferenceSession(
            Path(told["made"]) / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        names = [port.name for port in session.get_inputs()]
        return lambda batch: torch.from_numpy(
            session.run(None, {k: v.numpy() for k, v in complete(batch, names).items()})[0]
        )
    model = _model(told["source"])
    if engine == "torch-bf16":
        model = model.bfloat16()
    elif engine.startswith("torch-packed"):
        rows = told["rows"] if told["rows"] in ROWS else "bf16"
        model = optimize(model, rows, engine.rpartition("-")[2])
    elif engine == "torchao-int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return lambda batch: model(**batch)[0]


@torch.no_grad()
def _serve(told: Mapping[str, Any], answers: Any) -> None:
    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    call = _opened(told)
    root = Path(told["root"])
    work = torch.load(root / "work.pt", weights_only=True)
    if not bool(call(work[0][0]).isfinite().all()):
        raise RuntimeError("its output is not finite")
    gc.collect()
    answer("ready")
    for line in sys.stdin:
        what, *given = json.loads(line)
        if what == "time":
            batches, times = work[given[0]], []
            for _ in range(given[1]):
                start = time.perf_counter()
                for batch in batches:
                    call(batch)
                times.append(time.perf_counter() - start)
            answer(times)
        elif what == "memory":
            answer(_peak_memory())
        else:
            answer(_vectors(call, _examples(root, told["source"])))


def _peak_memory() -> int | None:
    """Bytes of this process, or None. What getrusage tells begins with the memory of the process that started this one."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None


def _vectors(call: Callable[[Mapping[str, Tensor]], Tensor], given: Mapping[str, Any]) -> list[list[float]]:
    """For each text the mean of its visible tokens' first output, or the output of the text."""
    vectors: list[list[float]] = []
    for start in range(0, len(given["texts"]), 32):
        some = given["texts"][start : start + 32]
        batch = given["tokenizer"](some, padding=True, truncation=True, max_length=128, return_tensors="pt")
        out, mask = call(dict(batch)).float(), batch["attention_mask"][..., None]
        vectors += (out if out.ndim == 2 else (out * mask).sum(1) / mask.sum(1)).tolist()
    return vectors


def main() -> None:
    what, told = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    warnings.simplefilter("ignore")
    if what == "make":
        _make(told)
    else:
        _serve(told, answers)


if __name__ == "__main__":
    main()
