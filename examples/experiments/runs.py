"""What the experiments with a line of JSON a run share: reading and appending lines, and who does which run."""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

BEGIN = time.monotonic()  # before torch is imported, which may take a minute


class OutOfTime(Exception):
    """A run was not begun, since there is no time left for it."""


def make_runs(
    keys: Iterable[Mapping[str, Any]],
    run: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    path: Path,
    *,
    claims: Path | None = None,
    seconds: float = 1e9,
) -> int:
    """Makes the runs that have no result in ``path`` yet and that nobody else has claimed, one after the other, as long as one more would
    probably end within ``seconds`` from the start of the process. One that fails is told, and the next one is made.

    Args:
        keys: what tells a run from the others; its line is that and what ``run`` returns of it.
        run: may raise ``OutOfTime``, as the end of all.

    Returns:
        How many failed.
    """
    names: tuple[str, ...] = ()
    failed, longest = 0, 0.0
    for key in keys:
        if tuple(key) != names:
            names = tuple(key)
            done = {tuple(row.get(name) for name in names) for row in results(path)}
        if time.monotonic() - BEGIN + longest > seconds:
            break
        if tuple(key.values()) in done or not claimed(claims, key.values()):
            continue
        started = time.monotonic()
        try:
            append(path, {**key, **run(key)})
        except OutOfTime:
            break
        except Exception:
            traceback.print_exc()
            failed += 1
        longest = max(longest, 1.05 * (time.monotonic() - started))
    return failed


def results(path: Path) -> list[dict[str, Any]]:
    """The runs that are there; a line that was cut off is none."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(path: Path, row: Mapping[str, Any]) -> None:
    """In one write, on a line of its own: others may do so at the same time, and whoever dies leaves no half of one behind."""
    print(json.dumps(row), flush=True)
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (("\n" if torn else "") + json.dumps(row) + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def claimed(folder: Path | None, key: Iterable[Any]) -> bool:
    """Whether this process is the one to make a run. Processes side by side have a folder in common, in which the first to claim a run
    leaves a file; alone, without a folder, all runs are one's own."""
    if folder is None:
        return True
    name = "_".join(str(part) for part in key).replace("/", "-").replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def on_gpu(number: int) -> dict[str, str]:
    """What lets a process see one GPU alone, of those that this one sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": seen[number] if len(seen) > number and seen[number] else str(number)}


def by_layer(fff: str, layers: int) -> dict[int, str]:
    """What stands in which layer: one kind in all, or ``"0-2=12x8,3-5=4x8"``, where layers that are not named keep their FFN."""
    if "=" not in fff:
        return dict.fromkeys(range(layers), fff)
    found = {}
    for part in fff.split(","):
        places, _, kind = part.partition("=")
        first, last = int(places.split("-")[0]), int(places.split("-")[-1])
        if not 0 <= first <= last < layers:
            raise ValueError(f"{part!r} names no layers of {layers}")
        found |= dict.fromkeys(range(first, last + 1), kind)
    return found


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation, where there is more than one."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
