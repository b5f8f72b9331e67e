"""Interleaved timing: the machine's mood changes, ratios within one process and one minute mean something."""

import random
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
    order: random.Random | None = None,
) -> dict[str, float]:
    """Median seconds a call of each candidate; all of them take turns, ``rounds`` times, for about ``seconds`` each. ``order``
    draws who comes first, anew in every round, so that nobody always follows the same one; as given without it."""
    calls = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        calls[name] = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    turns = list(candidates.items())
    for _ in range(rounds):
        if order is not None:
            order.shuffle(turns)
        for name, call in turns:
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}
