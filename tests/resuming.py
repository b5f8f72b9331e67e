"""A training to be killed and to go on, in this process or in one of its own."""

import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file
from task_rows import tiny_tokenizer
from tiny import HEADS, tiny_bert
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from hf_fff import convert_ffn_to_fff
from hf_fff.training import RoutingMetrics, SafeCheckpoints, last_checkpoint

STEPS = 14  # 5 an epoch


class Plain(SafeCheckpoints, Trainer):
    pass


def rows(count=40, tokens=10, seed=0):
    ids = torch.randint(5, 105, (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row} for row in ids.tolist()]


def trainer(folder, data=None, model=None, config="2x3", callbacks=(), **options):
    """Of masked words: dropout and masking draw, rows are shuffled, the rate falls."""
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 8, "logging_steps": 1, "save_steps": 2}
    usual |= {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 3, "disable_tqdm": True}
    usual |= {"use_cpu": True, "report_to": "none", "eval_strategy": "steps", "eval_steps": 5}
    if model is None:
        model = convert_ffn_to_fff(tiny_bert(HEADS["ForMaskedLM"]), config)
    return Plain(
        model,
        TrainingArguments(output_dir=str(folder), **{**usual, **options}),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(16, seed=1),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm_probability=0.25),
        callbacks=[RoutingMetrics(), *callbacks],
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def losses(state):
    return [(row["step"], row[name]) for row in state.log_history for name in ("loss", "eval_loss") if name in row]


class Kill(TrainerCallback):
    """At a step, before or after its checkpoint; tells the steps that were made."""

    def __init__(self, told, event=None, step=None):
        self.told, self.event, self.step = told, event, step

    def at(self, event, state):
        if (event, state.global_step) == (self.event, self.step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **_):
        with self.told.open("a") as file:
            file.write(f"{state.global_step}\n")
        self.at("step", state)

    def on_save(self, args, state, control, **_):
        self.at("save", state)


def run(folder, event=None, step=None, **options):
    """Goes on from the last checkpoint, and leaves the weights and the losses in the end."""
    torch.set_num_threads(1)
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    t = trainer(folder, callbacks=[Kill(folder / "steps", event, step)], **options)
    checkpoint = last_checkpoint(folder)
    t.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    kept = {name: value.clone() for name, value in t.model.state_dict().items()}
    save_file(kept, folder / "end.safetensors")
    (folder / "losses.json").write_text(json.dumps(losses(t.state)))
