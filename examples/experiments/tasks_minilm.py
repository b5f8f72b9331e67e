"""A task: MiniLM finetuned for it, and what is kept when that teacher is converted and distilled; one line of JSON a run.

    python examples/experiments/tasks_minilm.py --model DIR --teacher OUT --task qa --train train.jsonl --report dev.jsonl --fff dense
    python examples/experiments/tasks_minilm.py --teacher OUT --task qa --train train.jsonl --report dev.jsonl --fff 8x8 --steps 2500

The first finetunes the teacher and saves it, the second makes a student of it. ``--task mlm`` takes text files. What is reported on
must not have been looked at for any choice.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments

from hf_fff import Calibration, FFFConfig, convert_ffn_to_fff
from hf_fff.surgery.text import shuffled
from hf_fff.tasks import evaluate, get_task, read_rows
from hf_fff.tasks.data import Columns, Masking, unmasked
from hf_fff.training import DistillationArguments, arguments_for, distil_task
from hf_fff.training.data import calibration_batches
from hf_fff.training.distil import split_rows

ON_GPU = {"bf16": True, "dataloader_num_workers": 2} if torch.cuda.is_available() else {"use_cpu": True}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rounded(scores):
    return {name: round(value, 4) for name, value in scores.items()}


def fresh_model(args, task, rows):
    """MiniLM with a head for the labels that there are."""
    config = AutoConfig.from_pretrained(args.model)
    if task.name in ("classification", "tokens"):
        labels = [row["tags"] if task.name == "tokens" else [row["label"]] for row in rows]
        names = sorted({str(name) for row in labels for name in row})
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    elif task.name == "regression":
        config.num_labels = 1
    torch.manual_seed(args.seed)
    return task.auto_class.from_pretrained(args.model, config=config, dtype=torch.float32).to(DEVICE)


def finetune(args, task, model, train, tokenizer):
    steps = args.teacher_steps or -1
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.teacher_batch_size,
            learning_rate=args.teacher_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            save_strategy="no",
            report_to="none",
            logging_steps=100,
            disable_tqdm=True,
            seed=args.seed,
            **ON_GPU,
        )
        collate = task.collator(tokenizer)
        if task.name == "mlm":
            collate = freshly_masked(collate, Masking(tokenizer))
        Trainer(model, arguments, train_dataset=train, data_collator=collate).train()


def freshly_masked(collate, masking):
    """Other words are hidden each time that a text comes."""

    def masked(items):
        batch = collate(items)
        batch["input_ids"], batch["labels"] = masking(unmasked(batch), torch.rand(batch["input_ids"].shape))
        return batch

    return masked


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="where the pretrained model is; for the teacher alone")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--name", help="of the task in the results")
    parser.add_argument("--task", required=True)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--report", type=Path, nargs="+", required=True)
    parser.add_argument("--transfer", type=Path, nargs="*", default=[])
    parser.add_argument("--fff", default="8x8", help="or dense: finetunes the teacher")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--limit", type=int, help="rows of each file at most")
    parser.add_argument("--report-limit", type=int, help="of the files to report on; --limit by default")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--teacher-steps", type=int)
    parser.add_argument("--teacher-batch-size", type=int, default=32)
    parser.add_argument("--teacher-learning-rate", type=float, default=1e-4)
    parser.add_argument("--calibration-steps", type=int, default=1000)
    parser.add_argument("--calibration-batch", type=int, default=4096, help="tokens a step")
    parser.add_argument("--max-tokens", type=int, default=400_000)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--fff-learning-rate", type=float)
    parser.add_argument("--plain-mlps", action="store_true", help="MLPs train in no units, as without a task; trees do")
    parser.add_argument("--routing-gradient", type=float, default=3.0)
    parser.add_argument("--first-text-alone", action="store_true", help="calibrate on single texts, not pairs")
    parser.add_argument("--freeze", action="store_true", help="train nothing but what replaces the FFNs")
    parser.add_argument(
        "--held-out-rows", type=int, help="to evaluate on in the training, at most; a tenth of all by default"
    )
    parser.add_argument("--muon", action="store_true", help="for a student's attention")
    parser.add_argument("--compile", action="store_true", help="the training step")
    parser.add_argument("--graphs", action="store_true", help="a student's training steps as CUDA graphs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data-seed", type=int, help="of the rows that are held out and of what mlm masks, --seed by default"
    )
    return parser


_ENCODED: dict[tuple, tuple] = {}  # a process may make several runs


def read(args: argparse.Namespace, task: Any, tokenizer: Any, config: Any) -> tuple[list, Any, Any, Any]:
    """Rows of the training files, and encoded: those to train on, those to choose on, those to report on."""
    seed = args.seed if args.data_seed is None else args.data_seed
    limits = (args.limit, args.report_limit, args.held_out_rows, args.max_length)
    key = (args.task, *map(str, args.train), "", *map(str, args.report), limits, seed)
    if key not in _ENCODED:
        rows = [row for path in args.train for row in read_rows(path)[: args.limit]]
        report = [row for path in args.report for row in read_rows(path)[: args.report_limit or args.limit]]
        train_rows, chosen_on = split_rows(rows, seed, 0.1)
        parts = (train_rows, chosen_on[: args.held_out_rows], report)
        encoded = (task.encode(part, tokenizer, config, max_length=args.max_length, seed=seed) for part in parts)
        _ENCODED[key] = (rows, *encoded)
    return _ENCODED[key]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the teacher or a student; what that gave."""
    task = get_task(args.task)
    if args.plain_mlps:
        DistillationArguments.units_of = lambda self, kind: self.fff_units and kind != "mlp"
    dense = args.fff == "dense"
    tokenizer = AutoTokenizer.from_pretrained(args.model if dense else args.teacher)
    if dense:
        few = [row for path in args.train for row in read_rows(path)[: args.limit]] if task.name != "mlm" else []
        teacher = fresh_model(args, task, few)
    else:
        teacher = task.auto_class.from_pretrained(args.teacher, dtype=torch.float32).to(DEVICE)
    rows, train, chosen_on, report = read(args, task, tokenizer, teacher.config)
    hidden = ("model", "teacher", "train", "report", "transfer", "data_seed")
    result = {k: v for k, v in vars(args).items() if k not in hidden}
    begin = time.monotonic()
    if dense:
        finetune(args, task, teacher, train, tokenizer)
        teacher.save_pretrained(args.teacher)
        tokenizer.save_pretrained(args.teacher)
        result["scores"] = rounded(evaluate(teacher, task, report, tokenizer, batch_size=64))
    else:
        transfer = None
        if args.transfer:
            unlabelled = shuffled([row for path in args.transfer for row in read_rows(path)[: args.limit]], args.seed)
            names = next(n for n in task.text_columns if {*n} <= {*rows[0]})
            found = (next(n for n in task.text_columns if {*n} <= {*row}) for row in unlabelled)
            unlabelled = [
                dict(zip(names, (row[n] for n in f), strict=True)) for row, f in zip(unlabelled, found, strict=True)
            ]
            columns = Columns(text=names)
            transfer = task.encode(unlabelled, tokenizer, teacher.config, max_length=args.max_length, columns=columns)
        inputs = calibration_batches(task.name, train, transfer, tokenizer, args.max_tokens)
        if args.first_text_alone:
            inputs = [row[n] for row in train.rows for n in task.text_columns[0] if n in row] or [
                next(v for v in row.values() if isinstance(v, str)) for row in train.rows
            ]
        plan = Calibration(
            inputs,
            tokenizer=tokenizer,
            steps=args.calibration_steps,
            max_tokens=args.max_tokens,
            max_length=args.max_length,
            batch_tokens=args.calibration_batch,
            learning_rate=4e-3,
            seed=args.seed,
            progress=False,
            cuda_graphs=args.graphs,
        )
        tree = "x" in args.fff
        config = FFFConfig.from_shorthand(args.fff, **({"routing_gradient": args.routing_gradient} if tree else {}))
        student = convert_ffn_to_fff(teacher, config, calibration=plan, seed=args.seed)
        result["unexplained"] = {str(i): round(v, 3) for i, v in student.calibration_report.unexplained.items()}
        measure = {"teacher": teacher, "batch_size": 64}
        result["calibrated"] = rounded(evaluate(student, task, report, tokenizer, **measure))
        if args.steps:
            rates = {"learning_rate": args.learning_rate, "fff_learning_rate": args.fff_learning_rate}
            rates |= {"per_device_train_batch_size": args.batch_size, "per_device_eval_batch_size": args.batch_size}
            if args.freeze:
                for name, p in student.named_parameters():
                    p.requires_grad_(any(part in name for part in ("weight_in", "bias_in", "weight_out")))
            with tempfile.TemporaryDirectory() as folder:
                arguments = arguments_for(
                    task.name,
                    output_dir=folder,
                    max_steps=args.steps,
                    save_strategy="no",
                    logging_steps=250,
                    disable_tqdm=True,
                    torch_compile=args.compile,
                    cuda_graphs=args.graphs,
                    muon=args.muon,
                    seed=args.seed,
                    **{k: v for k, v in rates.items() if v is not None},
                    **ON_GPU,
                )
                result |= {
                    "learning_rate": arguments.learning_rate,
                    "fff_learning_rate": arguments.rate_of(config.kind),
                    "batch_size": arguments.train_batch_size,
                }
                distil_task(
                    student, teacher, task.name, train, tokenizer, arguments, held_out=chosen_on, transfer=transfer
                )
            result["undone"] = student.distillation_report.undone
            result["held_out"] = round(student.distillation_report.score, 4)
            result["distilled"] = rounded(evaluate(student, task, report, tokenizer, **measure))
    result["seconds"] = round(time.monotonic() - begin, 1)
    result["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    result["torch"] = torch.__version__
    return result


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args())), flush=True)
