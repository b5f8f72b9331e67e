"""A BERT of BERT-base's shape inside OpenVINO against PyTorch: one process per system, which take turns.

    python examples/experiments/openvino_speed.py --out openvino_speed.jsonl

Two thread pools in one process ruin both's timings, so each system has a process of its own, and waits while another one is
timed. Weights are random: nothing here looks at quality. "padded" is a batch of 32 texts of 8 to 66 tokens, 37 on average.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

SHAPES = ("1x16", "1x128", "8x128", "32x128", "padded")
SYSTEMS = ("torch:dense:f32", *(f"openvino:{kind}:int8" for kind in ("dense", "none", "1x11", "8x8", "mlp:72")))


def inputs(shape):
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, tokens = (32, 66) if shape == "padded" else map(int, shape.split("x"))
    batch = {"input_ids": torch.randint(1000, 30000, (rows, tokens), generator=generator)}
    mask = torch.ones_like(batch["input_ids"])
    for row, length in enumerate(torch.linspace(8, 66, rows).int().tolist() if shape == "padded" else ()):
        mask[row, length:] = 0
    return {**batch, "attention_mask": mask}


def work(system, threads, layers):
    """Makes a system's model, then answers each line, a shape and a number of calls, by their seconds."""
    import torch
    from transformers import BertConfig, BertModel

    import hf_fff
    from hf_fff import openvino as fff_openvino

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    engine, rest = system.split(":", 1)
    kind, precision = rest.rsplit(":", 1)
    model = BertModel(BertConfig(num_hidden_layers=layers)).eval()
    if kind != "dense":
        model = hf_fff.convert_ffn_to_fff(model, kind, init="random")
    if engine == "openvino":
        generator = torch.Generator().manual_seed(1)
        ids = [{"input_ids": torch.randint(1000, 30000, (4, 64), generator=generator)} for _ in range(4)]
        call = fff_openvino.compile(model, precision, texts=ids, ov_config={"INFERENCE_NUM_THREADS": threads})
    else:
        call = model
    print(json.dumps("ready"), flush=True)
    with torch.no_grad():
        for line in sys.stdin:
            shape, count = line.split()
            batch = inputs(shape)
            times = []
            for _ in range(int(count)):
                start = time.perf_counter()
                call(**batch)
                times.append(time.perf_counter() - start)
            print(json.dumps(times), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.threads, options.layers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    own = ["--threads", str(options.threads), "--layers", str(options.layers)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    workers = {}
    for system in options.systems:  # one after the other, since making them takes memory and all cores
        workers[system] = subprocess.Popen([sys.executable, __file__, "--work", system, *own], **pipes)
        while (line := workers[system].stdout.readline()) and line.strip() != '"ready"':
            pass

    def timed(system, shape, count):
        workers[system].stdin.write(f"{shape} {count}\n")
        workers[system].stdin.flush()
        return json.loads(workers[system].stdout.readline())

    order = random.Random(0)
    for shape in options.shapes:
        calls = {s: max(1, min(20, int(0.2 / min(timed(s, shape, 2))))) for s in workers}
        times = {s: [] for s in workers}
        load = []
        for _ in range(options.rounds):
            for system in order.sample(sorted(workers), len(workers)):
                load.append(os.getloadavg()[0])
                times[system].append(statistics.median(timed(system, shape, calls[system])))
        reference = times[options.systems[0]]
        for system, values in times.items():
            row = {
                "shape": shape,
                "system": system,
                "ms": 1000 * statistics.median(values),
                "least_ms": 1000 * min(values),
            }
            row["ratio"] = statistics.median(reference) / statistics.median(values)
            row["least_ratio"] = min(reference) / min(values)
            row |= {"load": round(statistics.median(load), 1), "threads": options.threads, "layers": options.layers}
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    main()
