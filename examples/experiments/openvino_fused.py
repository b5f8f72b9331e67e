"""What it gives that the operation FFF adds the residual and does the layer norm itself, inside OpenVINO.

    python examples/experiments/openvino_fused.py --out openvino_fused.jsonl                       # a block of its own
    python examples/experiments/openvino_fused.py --models bert-base minilm --out openvino_fused.jsonl   # int8 models

Random weights. A block is a layer norm, an FFF on what it gives, the output bias, the residual and the layer norm behind. One copy stays as it
is, in the other the operation does what follows it (hf_fff.openvino.graph.fuse_norms). Both take turns in random order, in one process and one pool of threads.
A line of JSON for each batch: milliseconds, medians over the turns of the least of a turn's calls, and the median over the turns of the ratio.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import openvino
import torch
from torch import nn

from hf_fff import FFF
from hf_fff.bench.machine import summary
from hf_fff.bench.model import random_models
from hf_fff.exporting import complete, inputs_of
from hf_fff.openvino.graph import fuse_norms, pack_rows, to_graph
from hf_fff.openvino.model import OpenVINOModel
from hf_fff.openvino.quantise import quantised

HIDDEN = {"bert-base": 768, "minilm": 384}


class Block(nn.Module):
    """What an encoder's layer has behind attention, over embeddings; looks like a model of transformers."""

    def __init__(self, hidden, kind):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=4096, model_type="bert", type_vocab_size=1)
        self.embedding, self.before, self.norm = nn.Embedding(4096, hidden), nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.fff, self.bias = FFF(hidden, kind), nn.Parameter(torch.randn(hidden))
        for part in (self.before, self.norm):
            for p in part.parameters():
                nn.init.normal_(p)

    def set_attn_implementation(self, name):
        pass

    def forward(self, input_ids, attention_mask, return_dict=True):
        x = self.before(self.embedding(input_ids))
        return {"last_hidden_state": self.norm(self.fff(x) + self.bias + x)}


def batch_of(shape, vocabulary):
    rows, tokens = map(int, shape.split("x"))
    ids = torch.randint(vocabulary, (rows, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def variants(model, precision, rows, properties):
    """The number of norms that are fused, and the model unfused and fused."""
    graph, kind = to_graph(model)
    if precision == "int8":
        batch = complete(batch_of("2x128", model.config.vocab_size), inputs_of(model))
        graph = quantised(graph, [{name: t.numpy() for name, t in batch.items()}])
    if rows != "f32":
        pack_rows(graph, rows)
    facts = {"precision": precision, "rows": rows, "outputs": kind, "model_class": type(model).__name__}
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
    parser.add_argument(
        "--models", nargs="*", choices=list(HIDDEN), help="whole int8 models of these sizes; without, blocks of both"
    )
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
    about = {"threads": options.threads, "processor_time": options.processor_time, "openvino": openvino.get_version()}
    for size in options.models or HIDDEN:
        for kind in options.kinds:
            for rows in options.rows:
                if options.models:
                    (model,) = random_models(size, [kind], {"": torch.float32}).values()
                else:
                    model = Block(HIDDEN[size], kind)
                precision = "int8" if options.models else "f32"
                count, plain, fused = variants(model, precision, rows, properties)
                models = {"plain": plain, "fused": fused}
                for shape in options.shapes:
                    batch = batch_of(shape, model.config.vocab_size)
                    calls = {
                        n: max(1, int(options.seconds / (min(timed(m, batch, 3, clock)) / 1e3)))
                        for n, m in models.items()
                    }
                    turns = {name: [] for name in models}
                    for _ in range(options.rounds):
                        for name in random.sample(list(models), len(models)):
                            turns[name].append(min(timed(models[name], batch, calls[name], clock)))
                    ratios = sorted(a / b for a, b in zip(turns["plain"], turns["fused"], strict=True))
                    far = float((plain(**batch)[0] - fused(**batch)[0]).abs().max())
                    line = {"what": "model" if options.models else "block", "size": size, "kind": kind, "rows": rows}
                    line |= {"norms": count, "batch": shape}
                    line |= {name: statistics.median(of) for name, of in turns.items()}
                    line |= {"faster": statistics.median(ratios)}
                    line |= {"quarters": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]], "difference": far}
                    print(line, flush=True)
                    with options.out.open("a") as file:
                        file.write(json.dumps({**summary(), **line, **about}) + "\n")


if __name__ == "__main__":
    main()
