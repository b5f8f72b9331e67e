"""MiniLM calibrated on text files and, with --distil-steps, distilled on them: cosine to the original on unseen text, as JSON.

    python examples/experiments/calibrate_minilm.py --model DIR --text calibrate.txt --unseen unseen.txt --fff 8x8

Each text file has one paragraph a line; nothing of the unseen one may be in the other.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from hf_fff import Calibration, convert_ffn_to_fff
from hf_fff.surgery.text import as_batches, read_texts
from hf_fff.training import DistillationArguments, distil_texts


@torch.no_grad()
def embeddings(model, batches):
    model.eval()
    rows = []
    for batch in batches:
        batch = {k: v.to(model.device) for k, v in batch.items()}
        mask = batch["attention_mask"].unsqueeze(-1)
        rows.append(F.normalize((model(**batch)[0].float() * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(rows)


def fidelity(dense, fast, tokenizer, unseen):
    """Mean and 5 % quantile of the cosine to the original's embeddings, for each set of texts."""
    result = {}
    for name, texts in unseen.items():
        batches = as_batches(texts, lambda: tokenizer, max_length=128, batch_tokens=8192)
        cosine = (embeddings(dense, batches) * embeddings(fast, batches)).sum(1)
        result[f"cosine {name}"] = [round(float(cosine.mean()), 4), round(float(cosine.quantile(0.05)), 4)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--unseen", type=Path, nargs="+", required=True)
    parser.add_argument("--fff", default="8x8")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--budget", type=float, default=300)
    parser.add_argument("--max-tokens", type=int, default=600_000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--distil-steps", type=int, default=0, help="of 64 texts; 0: calibration alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = AutoModel.from_pretrained(args.model, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [text for path in args.text for text in read_texts(path)]
    plan = Calibration(
        texts,
        tokenizer=tokenizer,
        budget=args.budget,
        steps=args.steps,
        max_tokens=args.max_tokens,
        batch_tokens=args.batch_tokens,
        learning_rate=args.learning_rate,
        seed=args.seed,
        progress=False,
    )
    begin = time.monotonic()
    fast = convert_ffn_to_fff(dense, args.fff, calibration=plan)
    report = fast.calibration_report
    result = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("text", "unseen")}}
    result |= {"seconds": round(time.monotonic() - begin, 1), "tokens": report.tokens, "steps": report.steps}
    result["unexplained"] = {i: round(v, 3) for i, v in report.unexplained.items()}
    unseen = {path.stem: read_texts(path)[:2000] for path in args.unseen}
    result |= fidelity(dense, fast, tokenizer, unseen)
    if args.distil_steps:
        with tempfile.TemporaryDirectory() as folder:
            training = DistillationArguments(
                folder,
                max_steps=args.distil_steps,
                per_device_train_batch_size=64,
                save_strategy="no",
                logging_steps=500,
                disable_tqdm=True,
                bf16=device == "cuda",
                seed=args.seed,
            )
            distil_texts(fast, dense, texts, tokenizer, training)
        report = fast.distillation_report
        result |= {"distil_seconds": round(report.seconds, 1)}
        result |= {f"distilled {k}": v for k, v in fidelity(dense, fast, tokenizer, unseen).items()}
    result["device"] = torch.cuda.get_device_name() if device == "cuda" else device
    result["torch"] = torch.__version__
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
