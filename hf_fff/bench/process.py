"""Processes that measure by turns: two thread pools in one process spoil each other's timings."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any


def command(module: str, *words: str, threads: int) -> tuple[list[str], dict[str, str]]:
    """The command that runs a module, and its environment. Threads wait for work as they do by default, awake for some milliseconds: if
    they slept at once, small products would take a multiple of their time."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    }
    environment |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return [sys.executable, "-m", module, *words], environment


def last_line(text: str) -> str:
    """What an error ends with."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "its process ended")


class Server:
    """A process that answers questions, a line of JSON each; its first line says that it is ready.

    Attributes:
        cold_start: seconds until it was.

    Raises:
        RuntimeError: it ended; its last word is told.
    """

    def __init__(self, told: tuple[list[str], Mapping[str, str]], name: str, errors: Any) -> None:
        self.name, self.errors, start = name, errors, time.perf_counter()
        self.process = subprocess.Popen(
            told[0], env=told[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
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
            raise RuntimeError(f"the process of {self.name} ended: {last_line(self.errors.read())}")
        return json.loads(line)


@contextmanager
def served(told: tuple[list[str], Mapping[str, str]], name: str) -> Iterator[Server]:
    """A server while the block runs."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        server = Server(told, name, errors)
        try:
            yield server
        finally:
            assert server.process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended, which is told already
                server.process.stdin.close()
            try:
                server.process.wait(10)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


def answers() -> Callable[[Any], None]:
    """In a server: how it answers. What a library prints from now on is no answer."""
    file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda value: print(json.dumps(value), file=file, flush=True)


def questions() -> Iterator[list[Any]]:
    """In a server: what it is asked, until nobody asks any more."""
    yield from map(json.loads, sys.stdin)
