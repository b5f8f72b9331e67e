"""What else the machine did while something was measured: on a shared machine a figure is worth what its neighbours left."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_IDLE = (3, 4)  # fields of the first line of /proc/stat: idle, and idle while a disk works
_WINDOW = 1.0  # seconds over which the neighbours are looked at before something is measured
SLACK = 0.15  # cores that others may take without being in the way


def _clocks(children: Sequence[int] = ()) -> tuple[float, float] | None:
    """Seconds that all cores worked since the machine started, and those of this process and of ``children``; None where nothing
    tells."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        own = [Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split() for pid in children]
    except OSError:
        return None
    ticks = sum(int(word) for i, word in enumerate(words) if i not in _IDLE)  # "steal" counts: another guest's work
    second = os.sysconf("SC_CLK_TCK")
    return ticks / second, time.process_time() + sum(int(w[11]) + int(w[12]) for w in own) / second


@dataclass
class Load:
    """Load averages of a minute, ``before`` and ``after``, and how many cores other processes kept busy on average in between
    (None where the system does not tell)."""

    before: float | None = None
    after: float | None = None
    others: float | None = None

    def busy(self, threads: int) -> bool:
        """Whether the others took of the cores that ``threads`` need."""
        return self.others is not None and self.others > max(0, (os.cpu_count() or 1) - threads) + SLACK


def _average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@contextmanager
def watched(children: Sequence[int] = ()) -> Iterator[Load]:
    """Fills in a ``Load`` while the block runs; ``children`` are processes that are no others."""
    load, first, start = Load(_average()), _clocks(children), time.perf_counter()
    yield load
    last, wall = _clocks(children), time.perf_counter() - start
    load.after = _average()
    if first and last and wall > 0:
        load.others = round(max(0.0, (last[0] - first[0]) - (last[1] - first[1])) / wall, 2)


@dataclass
class Patience:
    """Waits until others leave the cores alone, and measures again what they disturbed, as long as ``seconds`` are left for both."""

    seconds: float = 0.0
    loads: list[Load] = field(default_factory=list)  # of what was kept
    spent: float = 0.0  # of the seconds
    begun: float = field(default_factory=lambda: time.monotonic())

    @property
    def measuring(self) -> float:
        """Seconds since it began, without those that patience took."""
        return time.monotonic() - self.begun - self.spent

    def measure(self, threads: int, run: Callable[[], T], children: Sequence[int] = ()) -> tuple[T, Load]:
        """What ``run`` gave while the others did the least, and what they did; ``children`` are processes that work for it."""
        kept: tuple[T, Load] | None = None
        while True:
            self._wait(threads)
            start = time.monotonic()
            with watched(children) as load:
                result = run()
            if kept is None or (load.others or 0.0) < (kept[1].others or 0.0):
                kept = result, load
            if not load.busy(threads) or self.seconds <= 0:
                self.loads.append(kept[1])
                return kept
            self._spend(time.monotonic() - start)

    def _wait(self, threads: int) -> None:
        while self.seconds > 0:
            with watched() as load:
                time.sleep(_WINDOW)
            if not load.busy(threads):
                return
            self._spend(_WINDOW)

    def _spend(self, seconds: float) -> None:
        self.seconds -= seconds
        self.spent += seconds


def worst(loads: list[Load]) -> Load:
    """The first and the last load average, and the most that others took in between."""
    others = [load.others for load in loads if load.others is not None]
    return Load(loads[0].before, loads[-1].after, max(others) if others else None) if loads else Load()
