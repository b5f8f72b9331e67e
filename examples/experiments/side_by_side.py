"""Processes of one experiment side by side, which share its runs: on a GPU several small trainings together do more than one after the other.

    python examples/experiments/side_by_side.py --gpus 0 1 --at-once 5 --seconds 500 pretrain_small.py --model DIR ... --results FILE

Starts SCRIPT, a file of this folder, ``at_once`` times for each GPU with the options that follow it, ``--claims`` (a fresh folder) and
``--seconds`` (what is left for it); what they print goes to logs, of which the end is printed where one fails. What still runs half a minute
after the seconds are over is ended. GPUs are numbered as PyTorch does, among those that CUDA_VISIBLE_DEVICES shows; without any, ``--gpus 0``
starts ``at_once`` processes on the CPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
GRACE = 30  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="numbers of those to use")
    parser.add_argument("--at-once", type=int, default=4, help="processes on each GPU")
    parser.add_argument("--seconds", type=float, default=1e6)
    parser.add_argument("script")
    parser.add_argument("options", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.at_once < 1:
        parser.error(f"--at-once {args.at_once} leaves nothing to start")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    for gpu in args.gpus:
        if gpu < 0 or (visible and gpu >= len(visible)):
            parser.error(
                f"--gpus {gpu} is none of the {len(visible)} that CUDA_VISIBLE_DEVICES={','.join(visible)} shows"
            )

    deadline = time.monotonic() + args.seconds
    folder = Path(tempfile.mkdtemp(prefix="side-by-side-"))
    count = len(args.gpus) * args.at_once
    threads = str(max(1, (os.cpu_count() or 1) // count))
    running = []
    for number in range(count):
        gpu = args.gpus[number % len(args.gpus)]
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        environment["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
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
