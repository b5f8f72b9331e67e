"""Runs what is in queue.txt and has no result yet, several runs side by side on each GPU, and appends results to a file.

    python examples/experiments/run_queue.py --model DIR --data DIR --results runs.jsonl --gpus 0 1 --at-once 4 --seconds 560

A line of the queue is a script of this folder with its options; ``{model}``, ``{data}`` and ``{work}`` stand for folders. A line that
ends in ``&&`` has to be done before those after it begin, up to the next empty line. Results are what the scripts print last, one JSON object a run, with the line as
``"line"``: give the file again and nothing is done twice. What is still running when the seconds are over is ended.
"""

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runs import on_gpu

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", type=Path, default=HERE / "queue.txt")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--work", default=tempfile.gettempdir(), help="where scripts keep teachers and calibrated models"
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="numbers of those to use")
    parser.add_argument("--at-once", type=int, default=4, help="runs on each GPU")
    parser.add_argument("--seconds", type=float, default=1e9)
    args = parser.parse_args()

    deadline = time.monotonic() + args.seconds
    done = (
        {json.loads(line)["line"] for line in args.results.read_text().splitlines()} if args.results.exists() else set()
    )
    lines = [line.strip() for line in args.queue.read_text().splitlines() if not line.startswith("#")]
    waiting: list[tuple[str, list[str]]] = []  # a line, and those that have to be done before
    first: list[str] = []
    for line in lines:
        name = line.removesuffix("&&").strip()
        if not line:
            first = []
        elif name not in done:
            waiting.append((name, list(first)))
            first += [name] if line.endswith("&&") else []
    running: dict[tuple[int, int], tuple[str, subprocess.Popen, Path]] = {}
    places = [(slot, gpu) for slot in range(args.at_once) for gpu in args.gpus]
    logs = Path(tempfile.mkdtemp(prefix="queue-"))

    def collect(place: tuple[int, int]) -> None:
        line, process, log = running.pop(place)
        found = [text for text in log.read_text().splitlines() if text.startswith('{"')]
        print(f"{process.returncode} {line} ({log})", flush=True)
        if process.returncode == 0 and found:
            done.add(line)
            result = {"line": line, "processes_a_gpu": args.at_once, **json.loads(found[-1])}
            with args.results.open("a") as file:
                file.write(json.dumps(result) + "\n")

    while (running or any(done.issuperset(entry[1]) for entry in waiting)) and time.monotonic() < deadline:
        for place in [p for p, (_, process, _) in running.items() if process.poll() is not None]:
            collect(place)
        for place in places:
            ready = next((entry for entry in waiting if done.issuperset(entry[1])), None)
            if place in running or ready is None:
                continue
            waiting.remove(ready)
            line = ready[0]
            script, *options = shlex.split(line)
            options = [o.format(model=args.model, data=args.data, work=args.work) for o in options]
            log = logs / f"{len(list(logs.iterdir()))}.txt"
            environment = {**os.environ, **on_gpu(place[1]), "OMP_NUM_THREADS": "2"}
            if importlib.util.find_spec("hf_fff") is None:  # not installed: the one that lies here
                paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
                environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            with log.open("w") as file:
                command = [sys.executable, str(HERE / script), *options]
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            running[place] = (line, process, log)
        time.sleep(0.5)
    for line, process, _ in running.values():
        process.terminate()
        print(f"ended unfinished: {line}", flush=True)


if __name__ == "__main__":
    main()
