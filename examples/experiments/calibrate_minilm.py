"""MiniLM calibrated on a text file, without distillation: cosine to the original on unseen text, as JSON.

    python examples/experiments/calibrate_minilm.py --model DIR --text calibrate.txt --unseen unseen.txt --fff 8x8

Each text file has one paragraph a line; nothing of the unseen one may be in the other.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from hf_fff import Calibration, convert_ffn_to_fff
from hf_fff.surgery.text import as_batches, read_texts


@torch.no_grad()
def embeddings(model, batches):
    model.eval()
    rows = []
    for batch in batches:
        batch = {k: v.to(model.device) for k, v in batch.items()}
        mask = batch["attention_mask"].unsqueeze(-1)
        rows.append(F.normalize((model(**batch)[0].float() * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(rows)


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
    for path in args.unseen:
        batches = as_batches(read_texts(path)[:2000], lambda: tokenizer, max_length=128, batch_tokens=8192)
        cosine = (embeddings(dense, batches) * embeddings(fast, batches)).sum(1)
        result[f"cosine {path.stem}"] = [round(float(cosine.mean()), 4), round(float(cosine.quantile(0.05)), 4)]
    result["device"] = torch.cuda.get_device_name() if device == "cuda" else device
    result["torch"] = torch.__version__
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
