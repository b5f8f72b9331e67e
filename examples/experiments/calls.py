"""What many calls do: memory over 100,000 of them, calls after weights changed in place, and two models by turns.

    python examples/experiments/calls.py --out calls.jsonl

One thread. A line of JSON each: *memory*, resident MB before and after; *in place*, microseconds of the second call after one weight was changed through `.data`,
and of a second call without that; *two models*, microseconds of a call where two layers take turns, and of each of them alone twice. Of times the least of many, of the
processor, since others use the machine.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from hf_fff import FFF, convert_ffn_to_fff, optimize
from hf_fff import openvino as fff_openvino
from hf_fff.bench.machine import summary


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def tiny_model() -> BertModel:
    config = BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
    )
    return convert_ffn_to_fff(BertModel(config, add_pooling_layer=False).eval(), "2x3")


def memory(count: int):
    """Of processes that do nothing but call: a layer, packed layers, and a model inside OpenVINO."""
    layer, x = FFF(64, "2x3").eval(), torch.randn(300, 64)
    model = tiny_model()
    ids = torch.randint(200, (4, 16))
    inside = fff_openvino.compile(model, "f32", rows="int8", ov_config={"INFERENCE_NUM_THREADS": 1})
    packed = {rows: optimize(torch.nn.Sequential(layer), rows) for rows in ("int8", "bf16")}
    calls = {"FFF": lambda: layer(x)}
    calls |= {f"optimize, {rows} rows": partial(module, x) for rows, module in packed.items()}
    calls["a model inside OpenVINO"] = lambda: inside(ids)
    for name, call in calls.items():
        for _ in range(count // 10):
            call()
        before = resident()
        for _ in range(count):
            call()
        yield {"run": "memory", "of": name, "calls": count, "mb_before": before, "mb_after": resident()}


def least(call, before=lambda: None, rounds: int = 400) -> float:
    """Microseconds of the processor: the lowest decile, which others do not lengthen much. ``before`` is not timed."""
    times = []
    for _ in range(rounds):
        before()
        start = time.process_time()
        call()
        times.append(1e6 * (time.process_time() - start))
    return statistics.quantiles(times, n=10)[0]


def changed_in_place(hidden: int, tokens: int):
    layer, x = FFF(hidden, "1x11").eval(), torch.randn(tokens, hidden)

    def change():
        layer.weight_in.data[0, 0].add_(1e-3)
        layer(x)

    times = {
        name: least(partial(layer, x), before) for name, before in (("before", partial(layer, x)), ("after", change))
    }
    return {"run": "in place", "hidden_size": hidden, "tokens": tokens, **times}


def two_models(hidden: int, tokens: int):
    first, second = (FFF(hidden, "1x11").eval() for _ in range(2))
    x = torch.randn(tokens, hidden)

    def by_turns():
        first(x)
        second(x)

    def alone():
        first(x)
        first(x)

    times = {call.__name__: least(call) / 2 for call in (by_turns, alone)}
    return {"run": "two models", "hidden_size": hidden, "tokens": tokens, **times}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    with options.out.open("a") as file:

        def write(line):
            print(line, flush=True)
            file.write(json.dumps({**summary(), **line}) + "\n")
            file.flush()

        for tokens in (1, 8, 128, 512):
            for measure in (changed_in_place, two_models):
                write(measure(768, tokens))
        for line in memory(options.count):
            write(line)


if __name__ == "__main__":
    main()
