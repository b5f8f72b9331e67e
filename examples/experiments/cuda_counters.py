"""Hardware counters of every kernel of a layer's forward and backward pass: ``python cuda_counters.py OUT.csv [CASE ...]``.

A case is FFF:DTYPE:TOKENS, such as 1x11:bfloat16:131072. Calls Nsight Compute (``ncu``) on itself, which replays each kernel with cold
caches and the clocks as they are, and keeps of its table: time, bytes from and to the memory and the second-level cache, how busy the two
and the multiprocessors' pipes were, and which of those was the busiest.
"""

import csv
import io
import subprocess
import sys
from pathlib import Path

CASES = ("1x11:bfloat16:131072", "1x11:float32:131072", "8x8:bfloat16:131072")
PIPES = "breakdown:sm__throughput.avg.pct_of_peak_sustained_elapsed"
COUNTERS = {
    "us": "gpu__time_duration.sum",
    "read_mb": "dram__bytes_read.sum",
    "written_mb": "dram__bytes_write.sum",
    "l2_mb": "lts__t_bytes.sum",
    "dram_pct": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_pct": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_pct": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_pct": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_pct": "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
    "warps_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
SCALE = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6}
SCALE |= {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}


def work(cases):
    """What is counted: one call of each pass, after one that is not."""
    import torch

    from hf_fff import ops
    from hf_fff.layers import FFF

    assert ops.backend("cuda") == "native", ops.load("cuda").reason
    torch.manual_seed(0)
    for case in cases:
        name, dtype, tokens = case.split(":")
        options = {"device": "cuda", "dtype": getattr(torch, dtype)}
        fff = FFF(768, name, **options).requires_grad_(False)
        x, grad = torch.randn(2, int(tokens), 768, **options)
        weights = (fff.weight_in, fff.bias_in, fff.weight_out)
        for counted in (False, True):
            torch.cuda.synchronize()
            if counted:
                torch.cuda.profiler.start()
                torch.cuda.nvtx.range_push(f"{case} forward")
            _, path, logits = torch.ops.hf_fff.fff_train(x, *weights, fff.n_trees, "gelu")
            if counted:
                torch.cuda.nvtx.range_pop()
                torch.cuda.nvtx.range_push(f"{case} backward")
            torch.ops.hf_fff.fff_backward(grad, x, *weights, path, logits, fff.n_trees, "gelu")
            torch.cuda.synchronize()
            if counted:
                torch.cuda.nvtx.range_pop()
                torch.cuda.profiler.stop()


def rows_of(text):
    """ncu's raw page: names, units, then a line a kernel."""
    start = text.index('"ID"')
    names, units, *lines = csv.reader(io.StringIO(text[start:]))
    for line in lines:
        if len(line) != len(names):
            continue
        row, unit = dict(zip(names, line, strict=True)), dict(zip(names, units, strict=True))

        def number(name, row=row, unit=unit):
            value = row.get(name, "").replace(",", "")
            return float(value) * SCALE.get(unit.get(name, ""), 1.0) if value and value != "n/a" else None

        told = {"pass": next((v for n, v in row.items() if "Push/Pop_Range" in n or "Push/Pop Range" in n), "")}
        told["kernel"] = row["Kernel Name"].split("(")[0].split("::")[-1][:60]
        told |= {short: number(name) for short, name in COUNTERS.items()}
        pipes = {
            n: number(n)
            for n in row
            if ".pct_of_peak_sustained_elapsed" in n and n.startswith(("breakdown:", "sm__", "idc__"))
        }
        pipes = {n: v for n, v in pipes.items() if v is not None and n not in COUNTERS.values()}
        busiest = max(pipes, key=lambda n: pipes[n], default="")
        told["busiest"] = busiest.split(".")[-4] if busiest.startswith("breakdown:") else busiest.split(".")[0]
        told["busiest_pct"] = pipes.get(busiest)
        yield told


def main(out, cases):
    command = ["ncu", "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off", "--nvtx"]
    command += ["--metrics", ",".join([*COUNTERS.values(), PIPES]), sys.executable, __file__, "--work", *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    Path(out).with_suffix(".raw.txt").write_text(done.stdout + done.stderr)
    if '"ID"' not in done.stdout:
        sys.exit(f"ncu gave no table: {(done.stdout + done.stderr)[-600:]}")
    rows = list(rows_of(done.stdout))
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({n: f"{v:.4g}" if isinstance(v, float) else v for n, v in row.items()})
    print(Path(out).read_text())


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(sys.argv[2:])
    else:
        main(sys.argv[1], sys.argv[2:] or CASES)
