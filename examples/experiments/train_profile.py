"""Where a step of training goes on one GPU: ``python train_profile.py OUT [BATCH ...]``; ``KINDS=dense,1x11`` chooses.

BERT-base as `hf-fff bench cuda` trains it (bfloat16 autocast, float32 weights, fused AdamW), with and without the routing gradient. For each
kind: milliseconds of a step by the clock, until Python has queued it, and that the GPU is busy; then the kernels and the operators of it,
which torch's profiler counts. A layer alone, with so few tokens that only queueing takes time, follows.
"""

import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hf_fff import FFFConfig, ops
from hf_fff.bench.model import random_models
from hf_fff.layers import FFF

KINDS = tuple(os.environ.get("KINDS", "dense,1x11,8x8,none").split(","))
TOP = 30


def stepper(model, rows, tokens):
    ids = torch.randint(model.config.vocab_size, (rows, tokens), device="cuda")
    mask, target = torch.ones_like(ids), torch.randn(rows, tokens, model.config.hidden_size, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = (model(input_ids=ids, attention_mask=mask)[0].float() - target).square().mean()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        return forward, backward

    return step


def timed(step, rounds):
    """Medians in ms: whole; queued; queued up to the loss; queued from there to the gradients. And the least of the first."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        forward, backward = step()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begin, queued - begin, forward - begin, backward - forward))
    return [*(1e3 * statistics.median(column) for column in zip(*found, strict=True)), 1e3 * min(found)[0]]


def profiled(step, steps=2):
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    rows = found.key_averages()
    on_cpu = torch.autograd.DeviceType.CPU
    kernels = [r for r in rows if r.device_type != on_cpu and not getattr(r, "is_user_annotation", False)]
    operators = [r for r in rows if r.device_type == on_cpu]
    kernels = sorted(((r.self_device_time_total / steps, r.count / steps, r.key) for r in kernels), reverse=True)
    operators = sorted(((r.self_cpu_time_total / steps, r.count / steps, r.key) for r in operators), reverse=True)
    return kernels, operators


def table(title, rows, file, shown):
    for number, text in enumerate(
        [title, *(f"  {us:9.0f} us {count:7.1f}x  {name[:110]}" for us, count, name in rows)]
    ):
        print(text, file=file)
        if number <= shown:
            print(text[:130], flush=True)


def microseconds(call, rounds=300):
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(found)


def layer_alone(tokens=64):
    """Microseconds of queueing a layer's forward and backward pass, and the operators without autograd."""
    x = torch.randn(tokens, 768, device="cuda", requires_grad=True)
    grad = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16)
    dense = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)).cuda()
    layers = {"dense": dense}
    for name in ("1x11", "8x8"):
        for routing in (3.0, 0.0):
            config = replace(FFFConfig.from_shorthand(name), routing_gradient=routing)
            layers[name + (" routing" if routing else "")] = FFF(768, config, device="cuda")

    for name, layer in layers.items():
        parts = [[], []]
        for _ in range(200):
            layer.zero_grad()
            x.grad = None
            torch.cuda.synchronize()
            begin = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                y = layer(x)
            middle = time.perf_counter()
            y.backward(grad)
            parts[0].append(middle - begin), parts[1].append(time.perf_counter() - middle)
        told = [f"{1e6 * statistics.median(p):.0f}" for p in parts]
        print(f"layer {name}: forward {told[0]} us, backward {told[1]} us of queueing", flush=True)
    for name in ("1x11", "8x8"):
        fff = FFF(768, name, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        weights = (fff.weight_in, fff.bias_in, fff.weight_out, fff.n_trees, "gelu")
        tokens_in = x.detach().bfloat16()
        _, path, logits = torch.ops.hf_fff.fff_train(tokens_in, *weights)
        back = torch.ops.hf_fff.fff_backward.default
        args = (grad, tokens_in, *weights[:3], path, logits, *weights[3:])
        with torch.no_grad():
            told = {
                "fff": microseconds(lambda a=(tokens_in, *weights): torch.ops.hf_fff.fff.default(*a)),
                "fff_train": microseconds(lambda a=(tokens_in, *weights): torch.ops.hf_fff.fff_train.default(*a)),
                "fff_backward": microseconds(lambda a=args, b=back: b(*a)),
                "fff_backward, routing": microseconds(lambda a=args, b=back: b(*a, 3.0, 1.0)),
                "a cast": microseconds(lambda w=fff.weight_in: w.float()),
                "an empty tensor": microseconds(lambda w=fff.weight_in: torch.empty_like(w)),
            }
        print(f"operators {name}: " + ", ".join(f"{n} {us:.0f} us" for n, us in told.items()), flush=True)


def main(out, batches):
    assert ops.backend("cuda") == "native", ops.load("cuda").reason
    torch.manual_seed(0)
    layer_alone()
    models = {n.split()[0]: m for n, m in random_models("bert-base", KINDS, {"float32": torch.float32}).items()}
    with (Path(out) / "train_profile.txt").open("w", buffering=1) as file:
        for name in KINDS:
            model = models.pop(name).cuda().train()
            for routing in (True, False) if name == "1x11" else (None,):
                if routing is False:
                    for layer in model.modules():
                        if isinstance(layer, FFF):
                            layer.config = replace(layer.config, routing_gradient=0.0)
                label = name + (" without routing" if routing is False else "")
                for batch in batches:
                    step = stepper(model, *map(int, batch.split("x")))
                    for _ in range(3):
                        step()
                    whole, queued, forward, backward, least = timed(step, 20)
                    kernels, operators = profiled(step)
                    busy, launches = sum(k[0] for k in kernels) / 1e3, sum(k[1] for k in kernels)
                    print(
                        f"{label} {batch}: {whole:.2f} ms (least {least:.2f}); queued in {queued:.2f} (forward {forward:.2f}, backward {backward:.2f}); "
                        f"GPU busy {busy:.2f} with {launches:.0f} kernels and copies",
                        flush=True,
                    )
                    show = name == "1x11" or (batch == batches[0] and routing is None and name == "dense")
                    table(f"kernels of {label} {batch}", kernels, file, TOP if show else 0)
                    table(f"operators of {label} {batch}", operators, file, TOP if show and batch == batches[0] else 0)
                    del step
            del model
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["32x128", "64x128"])
