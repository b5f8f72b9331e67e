"""From a model's folder and rows to a trained one: head, conversion, training, scores. What is interrupted goes on where it stopped."""

import json
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, EarlyStoppingCallback, set_seed
from transformers.utils import logging

from ..config import LayersLike
from ..files import atomic_folder
from ..memory import memory_explained
from ..surgery import Calibration, convert_ffn_to_fff
from ..surgery.folder import ModelFolder
from ..surgery.record import read_record, record_of, write_record
from ..tasks import Columns, Encoded, evaluate, get_task
from ..tasks.data import Row
from ..tasks.kinds import Task, class_of
from .arguments import FinetuningArguments
from .checkpoints import last_checkpoint
from .data import StreamedPieces, TextPieces, TextStream, calibration_batches
from .finetuning import FinetuningTrainer
from .objectives import get_objective
from .processes import check_processes
from .progress import tell_progress
from .work import OPTIONS, START, check_folders, check_trees, check_work, digest

_FREE = {  # what may be another when a training goes on: it changes nothing, or a checkpoint tells whether it does
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("output_dir", "report_to", "run_name", "disable_tqdm", "save_total_limit"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "log_level"),
}
_STREAM_SAMPLE = 4096  # texts of a stream that are calibrated on at most


@dataclass(frozen=True)
class TrainingRows:
    """What is trained on.

    Args:
        task: a name of ``objectives.OBJECTIVES``.
        rows: as ``hf_fff.tasks.read_rows`` gives them, with labels; of "mlm" also a ``TextStream``.
        evaluation: the same, to evaluate on.
        columns: which columns to read; guessed where they are not given.
        sources: what a stream is of, for the record.
    """

    task: str
    rows: Sequence[Row] | TextStream
    evaluation: Sequence[Row] = ()
    columns: Columns | None = None
    sources: Sequence[str] = ()


@dataclass
class TrainingReport:
    """What was done, and what it gave: ``scores`` on the rows to evaluate on, of the model that is kept. ``cut`` counts the rows that
    were longer than the model takes, in both sets."""

    task: str
    rows: int | None
    evaluated: int
    steps: int
    seconds: float
    loss: float
    scores: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    cut: int = 0
    new_head: bool = False


def train_folder(
    source: ModelFolder,
    output: Path,
    data: TrainingRows,
    args: FinetuningArguments,
    *,
    fff: LayersLike | None = None,
    calibration: Calibration | None = None,
    max_length: int = 128,
    truncate: bool = True,
    patience: int | None = None,
    from_scratch: bool = False,
    resume: bool = True,
    overwrite: bool = False,
) -> Any:
    """Trains the model of a folder for a task, and writes another folder, which appears whole or not at all.

    ``args.output_dir`` is the work folder: it holds the start and the checkpoints, stays where it is when the training is interrupted,
    and is removed in the end. With ``resume``, one that is there already is continued. Under ``accelerate launch`` all processes call
    this; the first one converts and writes.

    Args:
        source: dense or converted, with any head: one that does not fit the task, or its labels, is replaced by a new one.
        data: rows, and others to evaluate on.
        fff: converts a dense model first.
        calibration: of that conversion; its ``data`` is replaced by the inputs of the task. None leaves it uncalibrated.
        max_length: tokens at which a row is cut; texts of "mlm" go into several rows instead, and contexts of "qa" into windows.
        truncate: whether rows may be cut; else one that is too long is an error.
        patience: how many evaluations without a better ``args.metric_for_best_model`` end the training.
        from_scratch: of "mlm": takes config and tokenizer alone, with new weights.

    Returns:
        The model, with its ``training_report``.

    Raises:
        ValueError: as ``Task.encode`` and ``convert_ffn_to_fff``; ``args.packed_rows`` and no trees; labels that are missing, all the same, or in the rows to evaluate on
            alone; a metric that the task does not have; the work folder was made with another model, other data or arguments, or is none;
            as ``SafeCheckpoints``, which refuses steps of another number of rows.
        FileExistsError: the output exists and is not empty, and ``overwrite`` is not set.
        FloatingPointError: the loss is not finite.
        RuntimeError: out of memory.
    """
    check_processes(args)
    work = Path(str(args.output_dir))
    check_folders(source, output, work, overwrite=overwrite)
    get_objective(data.task)
    kind = get_task(data.task)
    tokenizer = AutoTokenizer.from_pretrained(source.transformer)
    config, new_head = _config_for(kind, source, data)
    longest = kind.longest(max_length, tokenizer, config)
    train, evaluation, cut = _encoded(kind, data, tokenizer, config, longest, args.seed, truncate)
    if args.process_index == 0 and cut:
        warnings.warn(f"{cut} rows are longer than {longest} tokens, and are cut there", stacklevel=2)
    check_trees(args, getattr(config, "fff_layers", {}) if fff is None else fff)
    options = _options(source, data, args, fff, calibration, longest, from_scratch)
    first = args.process_index == 0
    with args.main_process_first(local=False):
        if not check_work(work, options, resume=resume or not first, doing="training"):
            if not first:
                raise RuntimeError("the first process, which begins, has failed")
            begun = _load(kind, source, config, from_scratch, args.seed).to(args.device)
            _check_metric(kind, begun, data, tokenizer, args, longest)
            with (
                atomic_folder(work, overwrite=True) as new,
                memory_explained("calibrating", "the calibration's max_tokens or the maximal length of the inputs"),
            ):
                begun = _converted(begun, kind, data, tokenizer, args, fff, calibration, longest)
                begun.save_pretrained(new / START)
                write_record(new / START, record_of(source, begun))
                (new / OPTIONS).write_text(json.dumps(options, indent=2), encoding="utf-8")
    # Loaded even if it was just made: so what is interrupted and what is not start alike.
    model = kind.auto_class.from_pretrained(work / START, dtype=torch.float32)
    start = time.monotonic()
    advice = "the batch size (per_device_train_batch_size) or the maximal length of the inputs"
    with memory_explained("training", advice):
        trainer = FinetuningTrainer(
            model,
            args,
            task=kind.name,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=[EarlyStoppingCallback(patience)] if patience else [],
        )
        tell_progress(trainer, "training", ("loss", f"eval_{kind.main_metric}"))
        checkpoint = last_checkpoint(work)
        done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        scores = trainer.evaluate() if evaluation is not None else {}
    report = TrainingReport(
        task=kind.name,
        rows=len(train) if hasattr(train, "__len__") else None,
        evaluated=len(data.evaluation),
        steps=done.global_step,
        seconds=time.monotonic() - start,
        loss=done.training_loss,
        scores={name: scores[f"eval_{name}"] for name in _names(scores)},
        best_step=trainer.state.best_global_step if args.load_best_model_at_end else None,
        cut=cut,
        new_head=new_head,
    )
    state = trainer.accelerator.get_state_dict(
        trainer.model_wrapped
    )  # by all processes, which may each hold a part of it
    if first:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(work / "final", state_dict=state)
    with args.main_process_first(local=False):
        if first:
            _write(kind, source, output, work, tokenizer, report, options, args, overwrite=overwrite)
    trained = kind.auto_class.from_pretrained(output)
    trained.training_report = report
    return trained


def _write(
    kind: Task,
    source: ModelFolder,
    output: Path,
    work: Path,
    tokenizer: Any,
    report: TrainingReport,
    options: Mapping[str, Any],
    args: FinetuningArguments,
    *,
    overwrite: bool,
) -> None:
    """The output: the model in the number format of its source, tokenizer, a record of how it was made, with no paths of this machine,
    and tensorboard's logs."""
    trained = kind.auto_class.from_pretrained(work / "final", dtype=torch.float32)
    dtype = getattr(AutoConfig.from_pretrained(source.transformer), "dtype", None) or torch.float32
    earlier, begun = read_record(source.root), read_record(work / START)  # a source that was converted says how
    how: dict[str, Any] = {
        name: part for name, part in earlier.items() if name in ("base", "calibration", "distillation")
    }
    how |= {name: part for name, part in begun.items() if name == "calibration"}
    recipe = {name: value for name, value in options.items() if name != "weights"} | {
        "rows": [Path(name).name for name in options["rows"]] if isinstance(options["rows"], list) else options["rows"],
        "arguments": {k: v for k, v in options["arguments"].items() if not isinstance(v, dict) and "/" not in str(v)},
        "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "fff_learning_rate": args.rates_of(getattr(trained.config, "fff_layers", {}).values()),
    }
    with atomic_folder(output, overwrite=overwrite) as new:
        trained.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype).save_pretrained(new)
        tokenizer.save_pretrained(new)
        if (work / "runs").is_dir():
            shutil.copytree(work / "runs", new / "runs")
        write_record(new, {**record_of(source, trained), **how, "training": asdict(report), "recipe": recipe})
    shutil.rmtree(work)


# Data


def _encoded(
    kind: Task, data: TrainingRows, tokenizer: Any, config: Any, longest: int, seed: int, truncate: bool
) -> tuple[Any, Encoded | None, int]:
    """What to train and to evaluate on, and how many rows were cut. All that is wrong with the data is told here."""

    def encode(rows: Sequence[Row], name: str) -> tuple[Encoded, int]:
        try:
            encoded = kind.encode(rows, tokenizer, config, max_length=longest, columns=data.columns, seed=seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not encoded.labelled:
            raise ValueError(
                f"{name} has no labels: none of the columns {list(rows[0])} is known to hold them "
                f"({', '.join(kind.label_columns)}), or it is empty; --label-column names it"
            )
        cut = kind.cut(encoded, tokenizer, longest, data.columns)
        if cut and not truncate:
            raise ValueError(
                f"{name}: {len(cut)} rows are longer than {longest} tokens, the first is row {cut[0]}: "
                "leave --no-truncate out, so that they are cut, or raise --max-length as far as the model goes"
            )
        return encoded, len(cut)

    cut = 0
    if isinstance(data.rows, TextStream):
        train: Any = StreamedPieces(data.rows, tokenizer, longest)
    elif kind.name == "mlm":
        train = TextPieces(_texts(kind, data.rows, data.columns), tokenizer, longest)
    else:
        train, cut = encode(data.rows, "the training data")
    if not data.evaluation:
        return train, None, cut
    evaluation, more = encode(data.evaluation, "the evaluation data")
    return train, evaluation, cut + more


def _texts(kind: Task, rows: Sequence[Row], columns: Columns | None) -> list[str]:
    """The texts of rows, of "mlm"; pairs one after the other."""
    names, _ = kind._columns(rows, columns or Columns())
    kind._check_texts(rows, names)
    return [row[name] for row in rows for name in names]


def _sample(kind: Task, data: TrainingRows, tokenizer: Any, config: Any, longest: int, seed: int) -> Encoded:
    """Rows to calibrate on, encoded."""
    rows, columns = data.rows, data.columns
    if isinstance(rows, TextStream):
        rows, columns = [{"text": text} for text in islice(iter(rows), _STREAM_SAMPLE)], None
    return kind.encode(rows, tokenizer, config, max_length=longest, columns=columns, seed=seed)


# Models


def _config_for(kind: Task, source: ModelFolder, data: TrainingRows) -> tuple[Any, bool]:
    """The source's config with what the head needs, and whether the head is a new one."""
    config = AutoConfig.from_pretrained(source.transformer)
    fits = any(name.endswith(kind.heads) for name in config.architectures or [])
    if kind.name == "regression":
        new = not fits or config.num_labels != 1
        config.num_labels, config.problem_type = 1, "regression"
        return config, new
    if kind.name not in ("classification", "tokens"):
        return config, not fits
    names = _labels(kind, data.rows, data.columns)  # type: ignore[arg-type]
    if fits and _knows(kind, config, names):
        return config, False
    if fits:
        warnings.warn(
            f"the head of {source.root.name} is for other labels than {names}: it gets a new one", stacklevel=3
        )
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.problem_type = None
    return config, True


def _labels(kind: Task, rows: Sequence[Row], columns: Columns | None) -> list[str]:
    """The labels that occur, in order: numbers by value, "O" before other tags."""
    if not rows:
        raise ValueError("the training data is empty")
    _, column = kind._columns(rows, columns or Columns())
    found: Iterable[Any] = (row.get(column) for row in rows) if column else ()
    if kind.name == "tokens":
        found = (tag for tags in found if isinstance(tags, list) for tag in tags)
    names = {str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in found if v not in (None, "")}
    numbers = all(re.fullmatch(r"[-+]?\d+(\.\d*)?", name) for name in names)
    if numbers and any("." in name for name in names):
        raise ValueError(
            f"the column {column!r} holds numbers, such as {min(names)}, not classes: the task is regression"
        )
    if numbers and names and kind.name == "tokens":
        raise ValueError(f"the column {column!r} holds numbers, not tags such as O and B-person: entities need names")
    if column and len(names) < 2:
        raise ValueError(
            f"the column {column!r} of the training data holds nothing but {sorted(names)}: no two classes"
        )
    return sorted(names, key=lambda name: (name != "O", int(name) if numbers else 0, name))


def _knows(kind: Task, config: Any, names: Sequence[str]) -> bool:
    if kind.name == "tokens" and all(config.id2label[i] == f"LABEL_{i}" for i in range(config.num_labels)):
        return False
    try:
        kind.check_model(config)
        for name in names:
            class_of(name, "", config)
    except ValueError:
        return False
    return True


def _load(kind: Task, source: ModelFolder, config: Any, from_scratch: bool, seed: int) -> Any:
    """The model in float32; what its folder has no weights for, as a new head, depends on the seed."""
    set_seed(seed)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a table of what is new
    try:
        if from_scratch:
            return kind.auto_class.from_config(config, dtype=torch.float32)
        return kind.auto_class.from_pretrained(
            source.transformer, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(verbosity)


def _converted(
    model: Any,
    kind: Task,
    data: TrainingRows,
    tokenizer: Any,
    args: FinetuningArguments,
    fff: LayersLike | None,
    calibration: Calibration | None,
    longest: int,
) -> Any:
    if fff is None:
        return model
    if calibration is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the converted model is not calibrated")
            return convert_ffn_to_fff(model, fff, init="random", seed=args.seed)
    sample = _sample(kind, data, tokenizer, model.config, longest, args.seed)
    inputs = calibration_batches(kind.name, sample, None, tokenizer, calibration.max_tokens)
    plan = replace(calibration, data=inputs, tokenizer=tokenizer, max_length=longest)
    return convert_ffn_to_fff(model, fff, calibration=plan, seed=args.seed)


def _check_metric(
    kind: Task, model: Any, data: TrainingRows, tokenizer: Any, args: FinetuningArguments, longest: int
) -> None:
    """Scores two rows: a package that scoring wants may be missing, and so may be the metric to choose by."""
    if not data.evaluation:
        return
    few = kind.encode(data.evaluation[:2], tokenizer, model.config, max_length=longest, columns=data.columns)
    names = {"loss", *evaluate(model, kind, few, tokenizer)}
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted not in names:
        raise ValueError(f"best={wanted!r} is no metric of {kind.name} (allowed: {', '.join(sorted(names))})")


def _names(scores: Mapping[str, float]) -> list[str]:
    """Of the metrics, without times and what the trees did."""
    other = re.compile(r"runtime|\w+_per_second|agreeing_paths_\d+")
    names = [name.removeprefix("eval_") for name in scores if name.startswith("eval_")]
    return [name for name in names if not other.fullmatch(name)]


# Resuming


def _options(
    source: ModelFolder,
    data: TrainingRows,
    args: FinetuningArguments,
    fff: LayersLike | None,
    calibration: Calibration | None,
    longest: int,
    from_scratch: bool,
) -> dict[str, Any]:
    """What a work folder is told by: who goes on must give the same."""
    usual = FinetuningArguments(output_dir=str(args.output_dir), use_cpu=args.use_cpu).to_dict()
    given = {k: v for k, v in args.to_dict().items() if k not in _FREE and v != usual.get(k)}
    columns = data.columns or Columns()
    text = [columns.text] if isinstance(columns.text, str) else list(columns.text or ())
    plan = calibration and {name: getattr(calibration, name) for name in ("budget", "steps", "max_tokens")}
    options = {
        "weights": source.weights_digest(),
        "config": digest(
            [json.dumps(AutoConfig.from_pretrained(source.transformer).to_dict(), sort_keys=True, default=str)]
        ),
        "fff": fff if fff is None or isinstance(fff, str) else str(fff),
        "calibration": plan if fff is not None else None,
        "from_scratch": from_scratch,
        "task": data.task,
        "rows": list(data.sources) if isinstance(data.rows, TextStream) else digest(map(repr, data.rows)),
        "evaluation": digest(map(repr, data.evaluation)),
        "columns": {"text": text, "label": columns.label},
        "max_length": longest,
        "seed": args.seed,
        "arguments": given,
    }
    return dict(json.loads(json.dumps(options, default=str)))
