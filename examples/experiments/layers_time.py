"""How long models with different kinds in different layers take beside uniform ones, on a CPU: random weights, MiniLM's shape, one line of JSON.

    python examples/experiments/layers_time.py none mlp:72 0-3=none,4-5=mlp:216 8x8 0-3=none,4-5=24x8 >> layers_time.jsonl

By the measurement of `hf-fff bench serve`: a process for each model in each engine, which take turns.
"""

import argparse
import json
import sys
import warnings
from functools import partial

import torch
from runs import by_layer

from hf_fff import FFFConfig, convert_ffn_to_fff
from hf_fff.bench import machine, serve
from hf_fff.bench.shapes import bert

SIZE = "minilm"


def make(kind: str):
    torch.manual_seed(0)
    model = bert(SIZE)
    if kind == "dense":
        return model
    kinds = by_layer(kind, model.config.num_hidden_layers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the converted model is not calibrated")
        return convert_ffn_to_fff(model, {i: FFFConfig.from_shorthand(k) for i, k in kinds.items()}, init="random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--engines", nargs="+", default=["openvino-int8", "torch-f32"])
    parser.add_argument("--batch", nargs="+", default=["1x16", "1x128", "8x128", "32x128"])
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    kinds = ["dense", *args.kinds]
    found, facts = serve.bench_serve(
        {kind: partial(make, kind) for kind in kinds},
        [serve.System(kind, engine) for kind in kinds for engine in args.engines],
        serve.workloads(args.batch, 30522),
        rows="int8",
        rounds=args.rounds,
        tell=partial(print, file=sys.stderr),
    )
    tokens = {fact["workload"]: fact["tokens"] for fact in facts}
    took = {engine: {} for engine in args.engines}
    for served in found:
        took[served.system.engine][served.system.model] = {
            name: round(1e6 * seconds / tokens[name], 2) for name, seconds in served.seconds.items()
        }
    print(json.dumps({**machine.facts(), "rounds": args.rounds, "microseconds_a_token": took}))


if __name__ == "__main__":
    main()
