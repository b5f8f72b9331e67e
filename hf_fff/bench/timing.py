"""Interleaved timing: the machine's mood changes, ratios within one process and one minute mean something."""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

FEWEST = 3  # rounds, however long they take


def interleaved(
    candidates: Mapping[K, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
    order: random.Random | None = None,
    before: Callable[[K], object] = lambda _: None,
    limit: float = float("inf"),
) -> dict[K, float]:
    """Median seconds a call of each candidate, called from Python: ``turns`` of a loop around it."""
    loops = {key: _loop(call) for key, call in candidates.items()}
    return turns(loops, rounds=rounds, seconds=seconds, order=order, before=before, limit=limit)


def _loop(call: Callable[[], object]) -> Callable[[int], float]:
    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return run


def turns(
    candidates: Mapping[K, Callable[[int], float]],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
    order: random.Random | None = None,
    before: Callable[[K], object] = lambda _: None,
    limit: float = float("inf"),
) -> dict[K, float]:
    """Median seconds a call; candidates take turns, ``rounds`` times, for about ``seconds`` each.

    Args:
        candidates: each makes as many calls as it is told, and returns the seconds that one of them took.
        order: draws who comes first, anew in every round, so that nobody always follows the same one; as given without it.
        before: called with a candidate's key before each of its turns, off the clock: where threads are set.
        limit: seconds after which no new round begins, once ``FEWEST`` were made.
    """
    calls = {}
    for key, run in candidates.items():
        before(key)
        run(1)
        calls[key] = max(1, int(seconds / max(run(1), 1e-7)))
    times: dict[K, list[float]] = {key: [] for key in candidates}
    queue = list(candidates.items())
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST and time.perf_counter() - begin > limit:
            break
        if order is not None:
            order.shuffle(queue)
        for key, run in queue:
            before(key)
            times[key].append(run(calls[key]))
    return {key: statistics.median(values) for key, values in times.items()}
