"""What binds a layer on this CPU: what it reads from which cache, by valgrind, and how fast this machine gives rows of a tree's size.

    python examples/experiments/cpu_counters.py --out cpu_counters.jsonl

loop.cpp is compiled with the C++ core and run on one thread. *layer*: valgrind's cachegrind counts instructions and lines that the first- and the
second-level cache of this machine miss (64 bytes each, caches simulated without prefetching, which changes when a line comes but not whether); two numbers of calls,
subtracted, so that making the layer does not count; what it takes, `hf-fff bench layer` tells. *rows*: dot products with rows of 3 KB in any order, out of
more and more memory, the best of short runs. A line of JSON each. perf is used where the machine lets it count (most virtual ones do not).
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

from hf_fff.bench.machine import caches, summary

KERNELS = Path(__file__).parents[2] / "kernels"
LAYERS = [*((1, 11, 768, tokens) for tokens in (1, 8, 128, 512, 4096)), (8, 8, 768, 1024), (32, 6, 768, 1024)]
ROW = 3072
SIZES_MB = (0.024, 0.384, 1, 4, 12, 24, 64)
AHEAD = (0, 2)
EVENTS = ("instructions", "L1-dcache-load-misses", "cache-misses")


def built(folder: Path) -> Path:
    """The loop; the driver alone may reorder sums, the core is compiled as it always is."""
    common = ["g++", "-std=c++20", "-O3", "-ffp-contract=off", "-g", f"-I{KERNELS}"]
    sources = [*sorted((KERNELS / "cpu").glob("*.cpp")), Path(__file__).with_name("loop.cpp")]
    for source in sources:
        own = ["-march=native", "-ffast-math"] if source.stem == "loop" else []
        subprocess.run([*common, *own, "-c", source, "-o", folder / f"{source.stem}.o"], check=True)
    subprocess.run(["g++", *(folder / f"{s.stem}.o" for s in sources), "-o", folder / "loop"], check=True)
    return folder / "loop"


def told(command: list[str | Path], **options: object) -> dict[str, object]:
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout))


def cache_options() -> list[str]:
    """This machine's first and second level, of eight ways, for cachegrind; its last level is our second."""
    sizes = {level: int(size.removesuffix("K")) * 1024 for level, size in caches().items()}
    ways = {"L1": 8 if sizes["L1"] % (8 * 4096) == 0 else 12, "L2": 8 if sizes["L2"] & (sizes["L2"] - 1) == 0 else 16}
    return [f"--D1={sizes['L1']},{ways['L1']},64", f"--LL={sizes['L2']},{ways['L2']},64", "--I1=32768,8,64"]


def counted(loop: Path, layer: list[str], calls: int) -> dict[str, int]:
    """Instructions, and lines that are missed by the first and the second level, of a whole process."""
    words = ["valgrind", "--tool=cachegrind", "--cache-sim=yes", "--cachegrind-out-file=/dev/null", *cache_options()]
    run = subprocess.run([*words, loop, "layer", *layer, str(calls)], check=True, capture_output=True, text=True)
    names = {"instructions": "I +refs", "L1": "D1 +misses", "L2": "LLd misses"}
    found = {}
    for name, pattern in names.items():
        match = re.search(rf"{pattern}: +([\d,]+)", run.stderr)
        if match is None:
            raise RuntimeError(f"valgrind did not tell {name}: {run.stderr[-500:]}")
        found[name] = int(match[1].replace(",", ""))
    return found


def perf_counts(loop: Path, layer: list[str], calls: int) -> dict[str, int] | None:
    """The machine's own counters, or None where it has none for us."""
    words = ["perf", "stat", "-x", ",", "-e", ",".join(EVENTS), loop, "layer", *layer, str(calls)]
    try:
        run = subprocess.run(words, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    cells = [line.split(",") for line in run.stderr.splitlines() if line.count(",") > 2]
    found = {cell[2].partition(":")[0]: int(cell[0]) for cell in cells if cell[0].isdecimal()}
    return found if set(found) == set(EVENTS) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["f32", "int8", "bf16"])
    parser.add_argument("--seconds", type=float, default=1.5, help="of each size of memory")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, options.out.open("a") as file:
        loop = built(Path(place))

        def write(line: dict[str, object]) -> None:
            print(line, flush=True)
            file.write(json.dumps({**summary(), "caches": caches(), **line}) + "\n")
            file.flush()

        for ahead in AHEAD:
            for mb in SIZES_MB:
                words = [loop, "rows", str(ROW), str(int(mb * 1e6)), str(ahead), str(options.seconds)]
                rate = told(words)["gb_per_second"]
                write({"run": "rows", "row_bytes": ROW, "mb": mb, "ahead": ahead, "gb_per_second": rate})
        for rows in options.rows:
            for *size, tokens in LAYERS:
                layer = [rows, *map(str, size), str(tokens)]
                calls = max(1, 1024 // tokens)
                few, many = (counted(loop, layer, n) for n in (calls, 3 * calls))
                a_token = {name: (many[name] - few[name]) / (2 * calls * tokens) for name in few}
                line = {
                    "run": "layer",
                    "fff": f"{size[0]}x{size[1]}",
                    "hidden_size": size[2],
                    "rows": rows,
                    "tokens": tokens,
                }
                line |= {"instructions": a_token["instructions"], "l1_miss_kb": a_token["L1"] * 64 / 1000}
                line |= {"l2_miss_kb": a_token["L2"] * 64 / 1000, "perf": perf_counts(loop, layer, calls)}
                write(line)


if __name__ == "__main__":
    main()
