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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..exporting import complete
from ..layers import FFF
from ..layers.linear import why_not
from ..ops import ROWS
from ..packing import optimize
from . import machine, process
from .kept import Kept
from .load import Patience
from .model import Workload, load_model, random_ids, real_rows
from .timing import FEWEST

ENGINES: dict[str, tuple[str, ...]] = {  # and the packages that each needs
    "torch-f32": (),
    "torch-packed": (),  # torch-f32 with the trees of hf_fff.optimize
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
_REST = 0.05  # seconds after a turn, in which its threads, which stay awake for a while, come to rest: libgomp's within 10 ms, ONNX Runtime's within 40
_LIMIT = 60.0  # seconds for the rounds of a workload, once FEWEST are made
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
    if package := machine.missing(ENGINES[engine]):
        return f"{package} is not installed"
    return why_not(engine.rpartition("-")[2]) if engine.startswith("torch-packed-") else None


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
    kept: Kept | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> tuple[list[Served], list[dict[str, Any]]]:
    """Measures all systems.

    Args:
        sources: models by name: a folder, or what makes one with random weights.
        texts: typical ones for int8, and for the fidelity; random ids without them.
        rows: of trees, as ``hf_fff.openvino.compile`` knows them; packed ones in torch have these, or where they are not packed those
            of the linears, or int8.

    Returns:
        What was found of each system; and for each workload its name, visible tokens a batch, and the load beside it.

    Raises:
        RuntimeError: a system's process ended; its message is told.
    """
    threads = threads or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    patience, kept, order = patience or Patience(), kept or Kept(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="hf-fff-serve-") as place, ExitStack() as stack:
        root = Path(place)
        folders = {name: _folder(root / "models" / str(i), source) for i, (name, source) in enumerate(sources.items())}
        torch.save([list(map(dict, w.batches)) for w in work], root / "work.pt")
        (root / "texts.json").write_text(json.dumps(list(texts)), encoding="utf-8")
        told = {"root": str(root), "threads": threads, "rows": rows}
        servers: dict[System, process.Server] = {}
        for i, system in enumerate(systems):
            tell(f"making {system.name}")
            own = {
                **told,
                "engine": system.engine,
                "source": str(folders[system.model]),
                "made": str(root / "made" / str(i)),
            }
            if not system.engine.startswith("torch"):  # which is made of the folder as it is
                _finish(own, system.name)
            servers[system] = stack.enter_context(process.served(_command(own, "serve"), system.name))
        found = [Served(s, cold_start=servers[s].cold_start) for s in systems]
        facts = []
        for number, workload in enumerate(work):
            tell(f"timing {workload.name}")
            cell = partial(_cell, number, workload, servers, rounds, threads, order, patience)
            told_of = kept.cell([workload.name], cell, patience)
            facts.append(told_of["facts"])
            for name in ("seconds", "p95"):
                for served, value in zip(found, told_of[name], strict=True):
                    getattr(served, name)[workload.name] = value
        if texts:
            _compare(found, servers)
        for served in found:
            served.peak_memory = servers[served.system].ask("memory")
    return found, facts


def _cell(
    number: int,
    workload: Workload,
    servers: Mapping[System, process.Server],
    rounds: int,
    threads: int,
    order: random.Random,
    patience: Patience,
) -> dict[str, Any]:
    """Seconds of a batch for each system, and what is to be known beside them."""
    calls = {s: max(1, int(_SECONDS / min(server.ask("time", number, 2)))) for s, server in servers.items()}
    pids = [server.process.pid for server in servers.values()]
    times: dict[System, list[list[float]]] = {s: [] for s in servers}
    others, begin = [], time.monotonic()

    def turn() -> dict[System, list[float]]:
        return {s: servers[s].ask("time", number, calls[s]) for s in order.sample(list(servers), len(servers))}

    for done in range(rounds):
        if done >= FEWEST and time.monotonic() - begin > _LIMIT:
            break
        result, load = patience.measure(threads, turn, children=pids)
        others.append(load.others)
        for system, values in result.items():
            times[system].append(values)
    count = len(workload.batches)
    every = [sorted(t for values in turns for t in values) for turns in times.values()]
    known = [o for o in others if o is not None]
    return {
        "seconds": [statistics.median(map(statistics.median, turns)) / count for turns in times.values()],
        "p95": [values[min(len(values) - 1, int(0.95 * len(values)))] / count for values in every],
        "facts": {
            "workload": workload.name,
            "tokens": workload.tokens / count,
            "others": statistics.median(known) if known else None,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
    }


def _compare(found: Sequence[Served], servers: Mapping[System, process.Server]) -> None:
    teacher = next((s for s in found if s.system.engine == EAGER), None)
    if teacher is None:
        return
    want = torch.tensor(servers[teacher.system].ask("vectors"))
    for served in found:
        vectors = want if served is teacher else torch.tensor(servers[served.system].ask("vectors"))
        if vectors.shape == want.shape:
            served.cosine = float(nn.functional.cosine_similarity(vectors, want, dim=-1).mean())


_TRAININGS = ("general", "long")  # runs of quality_minilm.py


def fidelities(path: Path) -> dict[str, dict[str, Any]]:
    """What distilled models keep of the original on unseen sentences, by kind: from lines of JSON as ``examples/experiments/quality_minilm.py`` prints
    them. Of the training that most kinds have had, the longest of several, so that they compare: ``"training"`` says which. Means over seeds; of runs with
    several rates, of those that kept the most.

    Raises:
        ValueError: a line is not of that form, or none is of a training ("general" or "long").
    """
    trainings: dict[tuple[Any, ...], dict[str, dict[str, list[Mapping[str, float]]]]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            if told["run"] in _TRAININGS:
                steps, texts = told["steps"], told.get("batch_size") or 0
                training = (
                    steps * texts,
                    steps,
                    texts,
                    told.get("texts") or 0,
                    bool(told.get("muon")),
                    told.get("crop") or 0.0,
                )
                units = not told.get("plain_steps")
                if "mlp" in told["fff"]:  # which trains without where its line says so
                    units = told.get("mlp_units", units)
                rates = json.dumps([units, *(told.get(n) for n in ("learning_rate", "fff_learning_rate"))])
                kept = {name: float(told["distilled"]["unseen_short"][name]) for name in ("cosine", "neighbours")}
                trainings.setdefault(training, {}).setdefault(told["fff"], {}).setdefault(rates, []).append(kept)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold lines of quality_minilm.py: {error!r}") from error
    if not trainings:
        raise ValueError(f"{path} has no lines of the runs {' and '.join(_TRAININGS)}")

    def mean(of: Sequence[Mapping[str, float]], name: str) -> float:
        return statistics.fmean(kept[name] for kept in of)

    training, runs = max(trainings.items(), key=lambda item: (len(item[1]), item[0]))
    named = f"{training[1]} steps of {training[2]} texts"
    best = {kind: max(of.values(), key=lambda kept: mean(kept, "cosine")) for kind, of in runs.items()}
    found = {
        k: {"cosine": mean(of, "cosine"), "neighbours": mean(of, "neighbours"), "runs": len(of), "training": named}
        for k, of in best.items()
    }
    return {"dense": {"cosine": 1.0, "neighbours": 1.0, "runs": 0, "training": named}, **found}


def records(
    found: Sequence[Served],
    facts: Sequence[Mapping[str, Any]],
    trained: bool,
    fidelity: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """A line for each system and workload, with its ratios (above 1 is faster) to the first model in OpenVINO int8 and in torch.

    Args:
        fidelity: what distilled models of the same shapes keep, by model.
    """
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
            of = (fidelity or {}).get(served.system.model)
            row |= {f"distilled_{name}": of and of[name] for name in ("cosine", "neighbours", "runs", "training")}
            rows.append(row)
    return rows


def _folder(place: Path, source: str | Callable[[], Any]) -> str | Path:
    if isinstance(source, str):
        return source
    source().save_pretrained(place)
    return place


# The processes


def _command(told: Mapping[str, Any], what: str) -> tuple[list[str], dict[str, str]]:
    return process.command(__name__, what, json.dumps(told), threads=told["threads"])


def _finish(told: Mapping[str, Any], name: str) -> None:
    """Makes what a system's process serves, in a process of its own, whose memory nobody counts."""
    words, environment = _command(told, "make")
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{name} cannot be made: {process.last_line(ran.stderr)}")


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
        linears = engine.removeprefix("torch-packed-") if engine != "torch-packed" else None
        rows = told["rows"] if told["rows"] in ROWS else linears or "int8"
        if linears or any(isinstance(m, FFF) for m in model.modules()):
            model = optimize(model, rows, linears)
    elif engine == "torchao-int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return lambda batch: model(**batch)[0]


@torch.no_grad()
def _serve(told: Mapping[str, Any]) -> None:
    answer, call = process.answers(), _opened(told)
    root = Path(told["root"])
    work = torch.load(root / "work.pt", weights_only=True)
    if not bool(call(work[0][0]).isfinite().all()):
        raise RuntimeError("its output is not finite")
    gc.collect()
    answer("ready")
    for what, *given in process.questions():
        if what == "time":
            batches, times = work[given[0]], []
            for _ in range(given[1]):
                start = time.perf_counter()
                for batch in batches:
                    call(batch)
                times.append(time.perf_counter() - start)
            time.sleep(_REST)
            answer(times)
        elif what == "memory":
            answer(peak_memory())
        else:
            answer(_vectors(call, _examples(root, told["source"])))


def peak_memory() -> int | None:
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
    warnings.simplefilter("ignore")
    if what == "make":
        _make(told)
    else:
        _serve(told)


if __name__ == "__main__":
    main()
