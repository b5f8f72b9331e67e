"""A step of training, dense against converted: forward, backward and AdamW of a classifier with random weights on random ids, as a finetuning
is. Models take turns in one process; the peak of their memory is measured in a process of its own for each."""

import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification

from ..config import FFFConfig
from ..models.usage import fff_usage
from ..surgery import convert_ffn_to_fff
from .load import Patience
from .model import Workload, random_ids
from .process import last_line
from .serve import peak_memory
from .shapes import bert
from .timing import interleaved

DENSE = "dense"


@dataclass(frozen=True)
class System:
    """What is trained: ``fff`` is the shorthand of what takes the place of the FFNs, None for the dense model; ``routing`` whether trees get the
    routing gradient."""

    fff: str | None
    routing: bool = False

    @property
    def name(self) -> str:
        if self.fff is None:
            return DENSE
        return f"{self.fff} + routing" if self.routing else self.fff


def systems(kinds: Sequence[str]) -> list[System]:
    """The dense model, and each of ``kinds``: trees without and with the routing gradient.

    Raises:
        ValueError: a kind that is none.
    """
    found = [System(None)]
    for kind in kinds:
        config = FFFConfig.from_shorthand(kind)
        found += [System(kind, routing) for routing in ((False, True) if config.has_trees else (False,))]
    return found


@dataclass
class Trained:
    """Median seconds of a step; bytes that a training had in memory at most (on a GPU, of its tensors), None where nobody tells; the share
    of the nodes that no token of a batch visits, None without trees."""

    system: System
    seconds: float
    peak_memory: int | None
    dead: float | None


def bench_train(
    size: str,
    kinds: Sequence[str],
    rows: int,
    tokens: int,
    *,
    bf16: bool = False,
    device: str = "cpu",
    rounds: int = 5,
    seed: int = 0,
    memory: bool = True,
    patience: Patience | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> list[Trained]:
    """Measures the dense model and all kinds, in this order.

    Args:
        size: a name of ``shapes.SIZES``.
        bf16: under autocast; weights and the optimizer stay float32.
        memory: also the peak memory.

    Raises:
        ValueError: a size or a kind that is not known, rows longer than the model takes.
        RuntimeError: a loss is not finite; a process that measures memory ended.
    """
    options: dict[str, Any] = {
        "size": size,
        "rows": rows,
        "tokens": tokens,
        "bf16": bf16,
        "device": device,
        "seed": seed,
    }
    chosen = systems(kinds)
    peaks: dict[System, int | None] = {}
    for system in chosen if memory else []:  # before this process takes memory for the timings
        tell(f"memory of {system.name}")
        peaks[system] = _peak_of(system, options)
    trainings = {}
    for system in chosen:
        tell(f"making {system.name}")
        trainings[system] = Training(system, **options)
    tell("timing")
    times, _ = (patience or Patience()).measure(
        torch.get_num_threads(),
        partial(
            interleaved,
            {system: training.step for system, training in trainings.items()},
            rounds=rounds,
            order=random.Random(seed),
        ),
    )
    return [Trained(s, times[s], peaks.get(s), trainings[s].dead) for s in chosen]


class Training:
    """A model that is trained; ``step`` makes one, on one batch after the other."""

    def __init__(
        self, system: System, *, size: str, rows: int, tokens: int, bf16: bool, device: str, seed: int
    ) -> None:
        torch.manual_seed(seed)
        config = bert(size).config
        if tokens > config.max_position_embeddings:
            raise ValueError(
                f"rows of {tokens} tokens are longer than the model takes, {config.max_position_embeddings}"
            )
        self.model: Any = BertForSequenceClassification(config)
        if system.fff is not None:
            kind = FFFConfig.from_shorthand(system.fff)
            kind = kind if system.routing or not kind.has_trees else replace(kind, routing_gradient=0.0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the converted model is not calibrated")
                self.model = convert_ffn_to_fff(self.model, kind, init="random")
        self.model.to(device).train()
        self.device, self._bf16, self._next = torch.device(device), bf16, 0
        work: Workload = random_ids(rows, tokens, config.vocab_size, seed=seed)
        self._batches = [
            {
                **{name: value.to(device) for name, value in batch.items()},
                "labels": torch.arange(rows, device=device) % 2,
            }
            for batch in work.batches
        ]
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.step()
        if not bool(self._loss.isfinite()):
            raise RuntimeError(f"the loss of {system.name} is not finite: nothing was timed")

    def step(self) -> None:
        """Forward, backward, AdamW; waits for the GPU."""
        batch = self._batches[self._next % len(self._batches)]
        self._next += 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            self._loss = self.model(**batch).loss
        self._loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._loss = self._loss.detach()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def dead(self) -> float | None:
        """The mean over the layers."""
        usage = fff_usage(self.model, self._batches[:1])
        return sum(layer["dead"] for layer in usage.values()) / len(usage) if usage else None


def records(found: Sequence[Trained], rows: int, tokens: int) -> list[dict[str, Any]]:
    """A line for each system; ``times_as_fast`` is to the dense one."""
    dense = found[0].seconds
    return [
        {
            "model": one.system.name,
            "fff": one.system.fff,
            "routing": one.system.routing,
            "workload": f"{rows}x{tokens}",
            "milliseconds": 1e3 * one.seconds,
            "tokens_per_second": rows * tokens / one.seconds,
            "times_as_fast": dense / one.seconds,
            "peak_mb": None if one.peak_memory is None else one.peak_memory / 1e6,
            "dead": one.dead,
        }
        for one in found
    ]


def _peak_of(system: System, options: Mapping[str, Any]) -> int | None:
    told = {**options, "fff": system.fff, "routing": system.routing, "threads": torch.get_num_threads()}
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    root = str(Path(__file__).parents[2])  # as this process has found the package
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", __name__, json.dumps(told)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"the memory of {system.name} cannot be measured: {last_line(ran.stderr)}")
    peak: int | None = json.loads(ran.stdout.splitlines()[-1])
    return peak


def main() -> None:
    """Trains for three steps, and prints the peak of the memory."""
    told = json.loads(sys.argv[1])
    torch.set_num_threads(told.pop("threads"))
    warnings.simplefilter("ignore")
    training = Training(System(told.pop("fff"), told.pop("routing")), **told)
    for _ in range(2):
        training.step()
    cuda = training.device.type == "cuda"
    print(json.dumps(torch.cuda.max_memory_allocated(training.device) if cuda else peak_memory()))


if __name__ == "__main__":
    main()
