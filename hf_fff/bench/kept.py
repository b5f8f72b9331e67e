"""Finished cells of a measurement, kept in a file as they come: what is interrupted loses one cell."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import atomic_file
from .load import Load, Patience


class Kept:
    """Lines of JSON: the first says what is measured, and one follows for each finished cell. A file of the same measurement is gone on with, one of
    another is begun anew.

    Args:
        path: the file; without one, nothing is kept.
        what: options, machine and versions: all on which figures depend.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path | None = None, what: Mapping[str, Any] | None = None) -> None:
        self.path, self.cells = path, dict[str, Any]()
        if path is None:
            return
        head = json.dumps({"what": what}, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
        if lines != [""] and not lines[0].startswith('{"what": '):
            raise ValueError(f"{path} holds something else than cells of a measurement, and is left as it is")
        if lines[:1] == [head]:
            for line in lines[1:-1]:  # behind the last line break there is nothing, or what was not written to its end
                cell = json.loads(line)
                self.cells[json.dumps(cell["cell"])] = cell
        with atomic_file(path) as new:
            new.write_text(
                "".join(line + "\n" for line in [head, *map(json.dumps, self.cells.values())]), encoding="utf-8"
            )

    def cell(self, key: Sequence[Any], measure: Callable[[], Any], patience: Patience) -> Any:
        """What ``measure`` returns, which JSON must be able to hold, or what it returned before the interruption."""
        told = self.cells.get(json.dumps(list(key)))
        if told is not None:
            patience.loads += [Load(**load) for load in told["loads"]]
            patience.begun -= told["seconds"]
            return told["found"]
        loads, begin, spent = len(patience.loads), time.monotonic(), patience.spent
        found = measure()
        if self.path is not None:
            seconds = time.monotonic() - begin - (patience.spent - spent)
            cell = {"cell": list(key), "found": found, "loads": [asdict(load) for load in patience.loads[loads:]]}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**cell, "seconds": seconds}) + "\n")
        return found

    def done(self) -> None:
        """All is told elsewhere."""
        if self.path is not None:
            sys.stdout.flush()  # else it may not be, where a disk is full
            self.path.unlink(missing_ok=True)
