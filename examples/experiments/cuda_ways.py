"""The ways of the CUDA kernels against each other and against dense layers, on one GPU: ``python cuda_ways.py OUT.jsonl [forward] [backward] [few]``.

Medians of interleaved calls, the second-level cache overwritten before each, in microseconds. `hf-fff bench cuda` measures what users
get, and checks it; this is for choosing between ways (docs/kernel-cuda.md). ``HF_FFF_CUDA_WAY`` forces one.
"""

import json
import os
import random
import statistics
import sys
import time
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from hf_fff import ops

HIDDEN, BF16, F32 = 768, torch.bfloat16, torch.float32
TOKENS = (131072, 16384, 2048)
# The paper's, and what is between.
LADDER = ((1, 11), (2, 10), (4, 9), (8, 8), (16, 7), (32, 6), (64, 5), (128, 4), (512, 2))
FORWARD = [
    *((k, d, BF16, t) for k, d in LADDER for t in TOKENS),
    *((1, 11, BF16, t) for t in (32768, 8192, 4096)),
    *((k, d, F32, t) for k, d in ((1, 11), (8, 8)) for t in TOKENS[:2]),
]
BACKWARD = [
    *((k, d, BF16, t) for t in TOKENS for k, d in LADDER),
    *((k, d, F32, 131072) for k, d in ((1, 11), (8, 8))),
]
# Batches of short texts, as in finetuning
FEW = [
    (hidden, k, d, dtype, t)
    for hidden in (HIDDEN, 384)
    for k, d in ((8, 8), (32, 6), (128, 4), (512, 2))
    for dtype in (BF16, F32)
    for t in (16, 64, 256, 1024)
]


WAYS_BACK = {"conditional": "plain", "tiles": "tiles", "masked": "dense"}


def medians(calls, rounds=11, limit=0.3):
    other = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for call in [*calls.values()] * 2:
        call()
    torch.cuda.synchronize()
    marks, names, begin = {name: [] for name in calls}, list(calls), time.monotonic()
    for done in range(rounds):
        if done >= 3 and time.monotonic() - begin > limit:
            break
        random.shuffle(names)
        for name in names:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)  # until all of the call is queued
            other.zero_()
            start.record()
            calls[name]()
            end.record()
            marks[name].append((start, end))
        torch.cuda.synchronize()
    return {n: round(1e3 * statistics.median(a.elapsed_time(b) for a, b in m), 1) for n, m in marks.items()}


@contextmanager
def forced(way):
    os.environ["HF_FFF_CUDA_WAY"] = way
    try:
        yield
    finally:
        del os.environ["HF_FFF_CUDA_WAY"]


def by(way, call):
    def run():
        with forced(way):
            return call()

    return run


def layer(n_trees, depth, dtype, hidden=HIDDEN):
    nodes = n_trees * (2 ** (depth + 1) - 1)
    options = {"device": "cuda", "dtype": dtype}
    return (
        torch.randn(nodes, hidden, **options) / 28,
        torch.randn(nodes, **options),
        torch.randn(nodes, hidden, **options),
    )


def dense(dtype):
    shapes = ((3072, HIDDEN), (3072,), (HIDDEN, 3072), (HIDDEN,))
    return [(torch.randn(*s, device="cuda", dtype=dtype) / 40).requires_grad_() for s in shapes]


def mlp(x, a, b, c, d):
    return F.linear(F.gelu(F.linear(x, a, b)), c, d)


def main(path, sections=("forward", "backward")):
    assert ops.backend("cuda") == "native", ops.load("cuda").reason
    with open(path, "a") as file:
        for n_trees, depth, dtype, tokens in FORWARD if "forward" in sections else ():
            x, weights, reference = (
                torch.randn(tokens, HIDDEN, device="cuda", dtype=dtype),
                layer(n_trees, depth, dtype),
                dense(dtype),
            )
            calls = {"dense:3072": lambda x=x, p=reference: mlp(x, *p), "copy": x.clone}
            ways = ("gather", "sorted", "tiles") if n_trees == 1 else ("gather", "columns", "forest", "dense")
            for way in ways:
                call = by(way, lambda x=x, w=weights, k=n_trees: torch.ops.hf_fff.fff(x, *w, k, "gelu"))
                calls[way] = call
            with torch.no_grad():
                tell(file, "forward", n_trees, depth, dtype, tokens, medians(calls))
        for n_trees, depth, dtype, tokens in BACKWARD if "backward" in sections else ():
            x, g = torch.randn(2, tokens, HIDDEN, device="cuda", dtype=dtype)
            weights, leaves = layer(n_trees, depth, dtype), [x.clone().requires_grad_(), *dense(dtype)]
            _, tree_path, logits = torch.ops.hf_fff.fff_train(x, *weights, n_trees, "gelu")
            y = mlp(*leaves)

            def back(*routing, a=(g, x, *weights, tree_path, logits, n_trees, "gelu")):
                return torch.ops.hf_fff.fff_backward(*a, *routing)

            calls = {
                "dense:3072": lambda y=y, of=leaves, g=g: torch.autograd.grad(y, of, g, retain_graph=True),
                **{name: by(way, back) for name, way in WAYS_BACK.items()},
                **{f"{name}, routing": by(way, lambda back=back: back(3.0, 1.0)) for name, way in WAYS_BACK.items()},
            }
            if dtype == F32 or not serves_tiles(n_trees, depth):
                del calls["tiles"], calls["tiles, routing"]
            tell(file, "backward", n_trees, depth, dtype, tokens, medians(calls))
        for hidden, n_trees, depth, dtype, tokens in FEW if "few" in sections else ():
            x, g = torch.randn(2, tokens, hidden, device="cuda", dtype=dtype)
            given = (*layer(n_trees, depth, dtype, hidden), n_trees, "gelu")
            _, tree_path, logits = torch.ops.hf_fff.fff_train(x, *given)
            back = (g, x, *given[:3], tree_path, logits, *given[3:])
            ops_of = {
                "forward": lambda x=x, a=given: torch.ops.hf_fff.fff(x, *a),
                "backward": lambda a=back: torch.ops.hf_fff.fff_backward(*a),
                "backward, routing": lambda a=back: torch.ops.hf_fff.fff_backward(*a, 3.0, 1.0),
            }
            calls = {
                f"{name}, {way}": by(way, call)
                for name, call in ops_of.items()
                for way in ("automatic", "gather" if name == "forward" else "tiles", "dense")
            }
            tell(file, "few", n_trees, depth, dtype, tokens, medians(calls, limit=0.05), hidden)


def serves_tiles(n_trees, depth):
    return depth < 12 and n_trees << max(0, depth - 5) <= 256


def tell(file, section, n_trees, depth, dtype, tokens, us, hidden=HIDDEN):
    about = {"section": section, "fff": f"{n_trees}x{depth}", "dtype": str(dtype)[6:], "tokens": tokens, "us": us}
    line = json.dumps(about | {"hidden": hidden, "device": torch.cuda.get_device_name(), "torch": torch.__version__})
    print(line, flush=True)
    file.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ("forward", "backward"))
