"""Processes of one experiment side by side, which share its runs: on a GPU several small trainings together do more than one after the other.

    python examples/experiments/side_by_side.py --gpus 0 1 --at-once 5 --seconds 500 pretrain_small.py --model DIR ... --results FILE

Starts SCRIPT, a file of this folder, ``at_once`` times on each GPU with the options that follow it, ``--claims`` (a fresh folder) and
``--seconds`` (what is left for it); what they print goes to logs, of which the end is printed where one fails. What still runs half a minute
after the seconds are over is ended. On a machine without GPUs, ``--gpus`` without a number starts ``at_once`` processes.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runs import on_gpu

HERE = Path(__file__).parent
GRACE = 30  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="*", default=[0], help="numbers of those to use, as of run_queue.py")
    parser.add_argument("--at-once", type=int, default=4, help="processes on each GPU")
    parser.add_argument("--seconds", type=float, default=1e6)
    parser.add_argument("script")
    parser.add_argument("options", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.at_once < 1:
        parser.error(f"--at-once {args.at_once} leaves nothing to start")
    if len(set(args.gpus)) < len(args.gpus) or min(args.gpus, default=0) < 0:
        parser.error(f"--gpus {' '.join(map(str, args.gpus))} must be different numbers of at least 0")

    deadline = time.monotonic() + args.seconds
    folder = Path(tempfile.mkdtemp(prefix="side-by-side-"))
    places = (args.gpus or [None]) * args.at_once
    threads = str(max(1, (os.cpu_count() or 1) // len(places)))
    running = []
    for number, gpu in enumerate(places):
        environment = {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads, **os.environ}
        if gpu is not None:
            environment |= on_gpu(gpu)
        if importlib.util.find_spec("hf_fff") is None:  # not installed: the one that lies here
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(HERE.parents[1]), environment.get("PYTHONPATH")])
            )
        command = [sys.executable, str(HERE / args.script), *args.options]
        command += ["--claims", str(folder / "claims"), "--seconds", str(args.seconds)]
        log = folder / f"{number}.txt"
        with log.open("w") as file:
            running.append((subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment), log))
    failed = 0
    for process, log in running:
        try:
            code = process.wait(max(1.0, deadline + GRACE - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            failed += 1
            print(f"{args.script} ended with {code}:\n{log.read_text()[-1500:]}", file=sys.stderr, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
