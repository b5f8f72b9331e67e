"""What a training step takes beside the dense model's: forward of the student and its teacher, backward, AdamW; bf16 autocast.

    python examples/experiments/step_time.py --model DIR

The variants take turns; medians, as one line of JSON. On a GPU 8x8 is also timed with PyTorch's kernels in the place of Triton's.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModel

from hf_fff import convert_ffn_to_fff, ops
from hf_fff.ops import torch_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModel.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    ids = torch.randint(1000, 20_000, (args.rows, args.tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = ["dense", "none", "mlp:72", "mlp:224", "1x11", "4x9", "8x8", "32x6"]
    students = {k: copy.deepcopy(teacher if k == "dense" else convert_ffn_to_fff(teacher, k)).train() for k in kinds}
    optimizers = {k: torch.optim.AdamW(s.parameters(), lr=1e-5, fused=True) for k, s in students.items()}

    def step(kind):
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                want = teacher(**batch, output_hidden_states=True).hidden_states
            have = students[kind](**batch, output_hidden_states=True).hidden_states
            loss = sum((a.float() - b.float()).square().mean() for a, b in zip(have, want, strict=True))
        optimizers[kind].zero_grad()
        loss.backward()
        optimizers[kind].step()

    def timed(kind):
        begin = time.perf_counter()
        step(kind)
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    variants = dict.fromkeys(kinds)
    if ops.backend(device) == "triton":
        variants["8x8, PyTorch kernels"] = torch_backend
    times = {v: [] for v in variants}
    mine = ops._triton
    for number in range(args.rounds + 3):
        for variant, backend in variants.items():
            ops._triton = (lambda backend=backend: backend) if backend else mine
            took = timed(variant.split(",")[0])
            if number >= 3:
                times[variant].append(took)
    result = {v: round(statistics.median(t), 2) for v, t in times.items()}
    facts = {"rows": args.rows, "tokens": args.tokens, "device": device, "torch": torch.__version__}
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    print(json.dumps({**facts, "milliseconds": result}), flush=True)


if __name__ == "__main__":
    main()
