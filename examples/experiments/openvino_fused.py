"""What it gives that the operation FFF adds the residual and does the layer norm itself, inside OpenVINO: int8 models with random weights, by turns.

    python examples/experiments/openvino_fused.py --out openvino_fused.jsonl

A model of a size and kind is quantised once; one copy stays as it is, in the other the operation does what follows it (hf_fff.openvino.graph.fuse_norms). Both
take turns in random order, in one process and one pool of threads. A line of JSON for each batch: milliseconds, medians of
all calls, and the median over the turns of the ratio.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import openvino
import torch

from hf_fff.bench.machine import summary
from hf_fff.bench.model import random_models
from hf_fff.exporting import complete, inputs_of
from hf_fff.openvino.graph import fuse_norms, pack_rows, to_graph
from hf_fff.openvino.model import OpenVINOModel
from hf_fff.openvino.quantise import quantised


def batch_of(shape, vocabulary):
    rows, tokens = map(int, shape.split("x"))
    ids = torch.randint(vocabulary, (rows, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def variants(model, rows, properties):
    """The model unfused and fused; the same one twice where there is nothing to fuse."""
    batch = complete(batch_of("2x128", model.config.vocab_size), inputs_of(model))
    graph, kind = to_graph(model)
    graph = quantised(graph, [{name: t.numpy() for name, t in batch.items()}])
    if rows != "f32":
        pack_rows(graph, rows)
    facts = {"precision": "int8", "rows": rows, "outputs": kind, "model_class": type(model).__name__}
    fused = graph.clone()
    count = fuse_norms(fused)
    return count, *(OpenVINOModel(g, facts, model.config, None, None, properties) for g in (graph, fused))


def timed(model, batch, calls, clock):
    times = []
    for _ in range(calls):
        start = clock()
        model(**batch)
        times.append(1e3 * (clock() - start))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["bert-base", "minilm"])
    parser.add_argument("--kinds", nargs="+", default=["1x11", "8x8"])
    parser.add_argument("--rows", nargs="+", default=["int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processor-time", action="store_true", help="of the process, which others do not lengthen: for one thread"
    )
    parser.add_argument("--shapes", nargs="+", default=["1x16", "1x128", "8x128"])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    clock = time.process_time if options.processor_time else time.perf_counter
    properties = {"INFERENCE_NUM_THREADS": options.threads}
    for size in options.sizes:
        for kind in options.kinds:
            for rows in options.rows:
                (model,) = random_models(size, [kind], {"": torch.float32}).values()
                count, plain, fused = variants(model, rows, properties)
                models = {"plain": plain, "fused": fused}
                for shape in options.shapes:
                    batch = batch_of(shape, model.config.vocab_size)
                    calls = {
                        n: max(1, int(options.seconds / (min(timed(m, batch, 3, clock)) / 1e3)))
                        for n, m in models.items()
                    }
                    times = {name: [] for name in models}
                    for _ in range(options.rounds):
                        for name in random.sample(list(models), len(models)):
                            times[name].append(timed(models[name], batch, calls[name], clock))
                    turns = {name: [statistics.median(of) for of in turns] for name, turns in times.items()}
                    ratios = sorted(a / b for a, b in zip(turns["plain"], turns["fused"], strict=True))
                    far = float((plain(**batch)[0] - fused(**batch)[0]).abs().max())
                    line = {"size": size, "kind": kind, "rows": rows, "norms": count, "batch": shape}
                    line |= {name: statistics.median(of) for name, of in turns.items()}
                    line |= {
                        "faster": statistics.median(ratios),
                        "quarters": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
                    }
                    line |= {"difference": far}
                    print(line, flush=True)
                    with options.out.open("a") as file:
                        file.write(
                            json.dumps(
                                {
                                    **summary(),
                                    **line,
                                    "threads": options.threads,
                                    "processor_time": options.processor_time,
                                    "openvino": openvino.get_version(),
                                }
                            )
                            + "\n"
                        )


if __name__ == "__main__":
    main()
