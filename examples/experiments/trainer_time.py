"""How many steps a second general distillation makes, the whole training loop with its data: as it is, with steps that are recorded as
CUDA graphs, and compiled.

    python examples/experiments/trainer_time.py --model DIR --text train.txt

A line of JSON for each way, as it is measured, so that what is there counts if the time is over. Loss and cosine are means over the steps that were
timed: ways of the same kind and batch see the same texts in the same order from the same weights, so that they have to agree but for rounding.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, TrainerCallback

from hf_fff import DistillationArguments, DistillationTrainer, convert_ffn_to_fff
from hf_fff.surgery.text import read_texts
from hf_fff.training import TokenisedTexts
from hf_fff.training.progress import tell_progress
from hf_fff.training.trainer import own_parameters

WAYS = [  # what replaces the FFNs, the way, texts a step, steps before those that are timed, steps that are
    ("8x8", "plain", 192, 150, 60),
    ("8x8", "graphs", 192, 150, 60),
    ("8x8", "graphs", 384, 150, 60),
    ("mlp:72", "plain", 192, 150, 60),
    ("mlp:72", "graphs", 192, 150, 60),
    ("none", "plain", 192, 150, 60),
    ("none", "graphs", 192, 150, 60),
    ("8x8", "graphs", 768, 150, 60),
    ("8x8", "compile", 192, 150, 60),
    ("8x8", "compile + graphs", 192, 150, 60),
    ("8x8", "compile, reduce-overhead", 192, 150, 60),
]


class Clock(TrainerCallback):
    """Seconds of the steps after the first ones."""

    def __init__(self, first: int) -> None:
        self.first, self.begun, self.seconds = first, 0.0, 0.0

    def on_step_end(self, args, state, control, **_):
        if state.global_step in (self.first, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.begun, self.seconds = time.perf_counter(), time.perf_counter() - self.begun


def timed(dense, data, tokenizer, fff, way, rows, first, steps) -> dict:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the converted model is not calibrated")
        student = convert_ffn_to_fff(dense, fff, seed=0)
    own_parameters(student)
    clock = Clock(first)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            student,
            DistillationArguments(
                folder,
                max_steps=first + steps,
                per_device_train_batch_size=rows,
                save_strategy="no",
                logging_steps=first,
                disable_tqdm=True,
                dataloader_num_workers=3 if torch.cuda.is_available() else 0,
                bf16=torch.cuda.is_available(),
                torch_compile="compile" in way,
                torch_compile_mode="reduce-overhead" if "reduce" in way else None,
                cuda_graphs="graphs" in way,
            ),
            teacher=dense,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        tell_progress(trainer)
        begun = time.perf_counter()
        trainer.train()
    logs = [row for row in trainer.state.log_history if "cosine" in row]
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "steps_a_second": round(steps / clock.seconds, 2),
        "whole_seconds": round(time.perf_counter() - begun, 1),
        "loss": round(logs[0]["loss"], 5),
        "cosine": round(logs[0]["cosine"], 5),
        "memory_gb": round(memory / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=40_000, help="texts to take")
    parser.add_argument("--seconds", type=float, default=90, help="after which no further way is begun")
    parser.add_argument("--first", type=int, help="steps that are not timed")
    parser.add_argument("--steps", type=int, help="steps that are")
    args = parser.parse_args()
    begun = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = AutoModel.from_pretrained(args.model, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = TokenisedTexts(read_texts(args.text)[: args.texts], tokenizer, 128)
    facts = {"device": torch.cuda.get_device_name() if device == "cuda" else device, "torch": torch.__version__}
    for fff, way, rows, first, steps in WAYS:
        if time.monotonic() - begun > args.seconds:
            break
        told = {"fff": fff, "way": way, "batch_size": rows}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            told |= timed(dense, data, tokenizer, fff, way, rows, args.first or first, args.steps or steps)
        except Exception as error:  # whatever a compiler says: the other ways are still to be timed
            told["error"] = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps({**told, **facts}), flush=True)


if __name__ == "__main__":
    main()
