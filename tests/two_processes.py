"""Trainings for ``accelerate launch``: on two processes, and the same on one; under FSDP2."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from resuming import Plain
from tiny import HEADS, tiny_bert
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

from hf_fff import DistillationArguments, DistillationTrainer, convert_ffn_to_fff
from hf_fff.training import RoutingMetrics

STEPS = 6


def rows(count=64, tokens=9, seed=0):
    """All of one length, so that the halves of a step weigh alike."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 120, (count, tokens), generator=g).tolist()
    return [{"input_ids": row, "attention_mask": [1] * tokens, "labels": i % 2} for i, row in enumerate(ids)]


def trainers(folder, shares, **options):
    """Functions that make trainings of 16 rows a step, in two accumulated parts, of which each process takes its ``1/processes``; ``shares`` is
    how many processes' parts this one takes."""
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 4 * shares, "gradient_accumulation_steps": 2}
    usual |= {"logging_steps": 1, "save_steps": 100, "learning_rate": 1e-3, "disable_tqdm": True, "use_cpu": True}
    usual |= {"report_to": "none", "ddp_find_unused_parameters": False, **options}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def plain(*callbacks):
        model = convert_ffn_to_fff(tiny_bert(HEADS["ForSequenceClassification"], **dropout), "2x3")
        args = TrainingArguments(output_dir=str(Path(folder) / "plain"), **usual)
        t = Plain(model, args, train_dataset=rows(), callbacks=[RoutingMetrics(), *callbacks])
        t.model_accepts_loss_kwargs = (
            False  # BERT's classifier takes them, and does not heed them: see docs/training.md
        )
        return t

    def distillation(*callbacks):
        student, teacher = convert_ffn_to_fff(tiny_bert(), "2x3"), tiny_bert()
        args = DistillationArguments(output_dir=str(Path(folder) / "distillation"), **usual)
        return DistillationTrainer(student, args, teacher=teacher, train_dataset=rows(), callbacks=list(callbacks))

    return {"plain": plain, "distillation": distillation}


def rate(t):
    """What a training came to."""
    digest = hashlib.sha256()
    for value in t.model.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    logs = [row for row in t.state.log_history if "loss" in row]
    metrics = {k: v for k, v in logs[-1].items() if k.startswith(("dead", "visit"))}
    return {"losses": [row["loss"] for row in logs], "weights": digest.hexdigest(), "metrics": metrics}


class Ask(TrainerCallback):
    """One process alone is asked to end."""

    def on_step_end(self, args, state, control, **_):
        if args.process_index == 1 and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def main(folder):
    torch.set_num_threads(1)
    told = {"ended at": {}}
    for name, make in trainers(folder, 1).items():
        t = make()
        t.train()
        unused = getattr(t.model_wrapped, "find_unused_parameters", None)
        told[name] = {**rate(t), "unused": unused}
        t = make(Ask())
        try:
            t.train()
        except KeyboardInterrupt:
            told["ended at"][name] = t.state.global_step
        t = make()
        t.train(resume_from_checkpoint=str(Path(folder) / name / f"checkpoint-{told['ended at'].get(name)}"))
        told[f"{name} continued"] = rate(t)
    place = Path(folder) / f"{t.args.process_index}.json"
    place.write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch's threads abort about one process in ten where the interpreter takes itself down


def sharded(folder):
    """Trained under FSDP2, continued from a checkpoint, saved."""
    told = {}
    for name, checkpoint in (("whole", None), ("continued", f"{folder}/plain/checkpoint-3")):
        t = trainers(folder, 2, use_cpu=False, save_steps=3)["plain"]()
        t.train(resume_from_checkpoint=checkpoint)
        told[name] = [row["loss"] for row in t.state.log_history if "loss" in row]
    assert all(isinstance(p, DTensor) for p in t.model.parameters())
    t.save_model(f"{folder}/saved")
    if t.args.process_index == 0:
        Path(folder, "sharded.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    (sharded if sys.argv[2:] else main)(sys.argv[1])
