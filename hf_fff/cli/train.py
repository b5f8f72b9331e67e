"""``hf-fff train classify | regress | tokens | qa | mlm``."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Device,
    Json,
    LabelColumn,
    OnDevice,
    Overwrite,
    Seed,
    TextColumns,
    app,
    bad_option,
    check_device,
    check_out,
    columns_of,
    facts_of,
    how_to_open,
    load_kernels,
    out,
    read_data,
    reports_errors,
    resumable,
    working,
)

train = typer.Typer(
    help="Finetune dense and converted models, or pretrain them: transformers' Trainer, on Accelerate.",
    no_args_is_help=True,
)
app.add_typer(train, name="train")

TASKS = {
    "classify": ("classification", "Finetune to classify texts, or pairs of texts."),
    "regress": ("regression", "Finetune to give texts, or pairs of texts, a number."),
    "tokens": ("tokens", "Finetune to tag words, as in named entities."),
    "qa": ("qa", "Finetune to find the answer to a question in a text."),
}

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a dense or converted model, or a repository of the Hub.")
]
Data = Annotated[
    list[str],
    typer.Option(
        help="Rows to train on: .tsv, .csv, .json(l), .parquet, or NAME[:CONFIG]:SPLIT of the Hub; may be repeated."
    ),
]
Texts = Annotated[list[str], typer.Option(help="As of the others, or .txt with a paragraph a line; may be repeated.")]
Evaluation = Annotated[list[str] | None, typer.Option("--eval", help="Rows to evaluate on; may be repeated.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Fff = Annotated[
    str | None,
    typer.Option(
        help="Convert a dense MODEL first: trees x depth, such as 8x8; mlp:WIDTH; both, such as 4x8+mlp:64; none."
    ),
]
Preset = Annotated[
    str | None, typer.Option(help="crammed-finetune or crammed-pretrain: the arguments of arXiv 2311.10770.")
]
Config = Annotated[Path | None, typer.Option(help="YAML file of TrainingArguments, before which --preset is read.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="One of TrainingArguments, as name=value, read last; may be repeated."),
]
Best = Annotated[str | None, typer.Option(help="Metric of --eval by which the best model is kept, not the last one.")]
Patience = Annotated[
    int | None,
    typer.Option(min=1, help="Evaluations without a better one that end the training; by --best or the task's metric."),
]
MaxLength = Annotated[int, typer.Option(min=4, help="Tokens at which a row is cut.")]
Truncate = Annotated[bool, typer.Option(help="Whether rows may be cut.")]
Budget = Annotated[float, typer.Option(min=1, help="Seconds for the calibration after --fff.")]
CalibrationSteps = Annotated[int | None, typer.Option(min=1, help="Steps a layer instead of a budget: reproducible.")]
MaxTokens = Annotated[int, typer.Option(min=256, help="Tokens to calibrate on at most.")]
Resume = Annotated[bool, typer.Option(help="Continue from the work folder if there is one.")]
Work = Annotated[Path | None, typer.Option(help="Folder for checkpoints, removed in the end; OUT.work by default.")]


def _add(name: str, task: str, told: str) -> None:
    @train.command(name, help=told)
    @reports_errors
    def command(
        model: Model,
        data: Data,
        out: Out,
        evaluation: Evaluation = None,
        fff: Fff = None,
        preset: Preset = None,
        config: Config = None,
        settings: Set = None,
        best: Best = None,
        patience: Patience = None,
        text_columns: TextColumns = None,
        label_column: LabelColumn = None,
        max_length: MaxLength = 128,
        truncate: Truncate = True,
        budget: Budget = 300,
        calibration_steps: CalibrationSteps = None,
        max_tokens: MaxTokens = 600_000,
        device: OnDevice = None,
        seed: Seed = 0,
        resume: Resume = True,
        work: Work = None,
        overwrite: Overwrite = False,
        as_json: Json = False,
    ) -> None:
        _train(task, **{name: value for name, value in locals().items() if name != "task"})


for _name, (_task, _told) in TASKS.items():
    _add(_name, _task, _told)


@train.command()
@reports_errors
def mlm(
    model: Model,
    data: Texts,
    out: Out,
    evaluation: Evaluation = None,
    fff: Fff = None,
    from_scratch: Annotated[
        bool, typer.Option(help="Begin with new weights: of MODEL, config and tokenizer are taken alone.")
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(help="Read --data as it is wanted, not into memory; wants max_steps, and the package datasets."),
    ] = False,
    preset: Preset = None,
    config: Config = None,
    settings: Set = None,
    best: Best = None,
    patience: Patience = None,
    text_columns: TextColumns = None,
    max_length: MaxLength = 128,
    truncate: Truncate = True,
    budget: Budget = 300,
    calibration_steps: CalibrationSteps = None,
    max_tokens: MaxTokens = 600_000,
    device: OnDevice = None,
    seed: Seed = 0,
    resume: Resume = True,
    work: Work = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train on masked words: further, or with --from-scratch. Texts longer than --max-length go into several rows."""
    _train("mlm", **locals())


def _train(
    task: str,
    *,
    model: str,
    data: list[str],
    out: Path,
    evaluation: list[str] | None,
    fff: str | None,
    preset: str | None,
    config: Path | None,
    settings: list[str] | None,
    best: str | None,
    patience: int | None,
    text_columns: str | None,
    max_length: int,
    truncate: bool,
    budget: float,
    calibration_steps: int | None,
    max_tokens: int,
    device: Device | None,
    seed: int,
    resume: bool,
    work: Path | None,
    overwrite: bool,
    as_json: bool,
    label_column: str | None = None,
    from_scratch: bool = False,
    stream: bool = False,
) -> None:
    _check_fff(fff)
    check_out(model, out, overwrite)
    check_device("--device", device)
    if seed < 0:
        raise bad_option("--seed", ValueError(f"{seed} must be at least 0"))

    from dataclasses import asdict

    import torch

    from ..surgery import Calibration
    from ..surgery.folder import ModelFolder
    from ..tasks import get_task
    from ..training import TextStream, TrainingRows, train_folder

    kind = get_task(task)
    if max_length < kind.least_length:
        raise bad_option("--max-length", ValueError(f"{max_length} must be at least {kind.least_length} for {task}"))
    chosen = _settings(preset, config, settings)
    if stream and chosen.get("max_steps", -1) < 1:
        raise bad_option("--stream", ValueError("has no end: give --set max_steps=N"))
    if patience and best is None:
        best = "loss" if task == "mlm" else kind.main_metric
    work = work or out.with_name(f"{out.name}.work")
    fixed: dict[str, Any] = {
        "output_dir": str(work),
        "seed": seed,
        "disable_tqdm": as_json,
        "use_cpu": device is Device.cpu,
    }
    if stream:  # else one process would read for all, in batches of one width
        fixed["accelerator_config"] = {"dispatch_batches": False}
    chosen.setdefault("report_to", "tensorboard" if find_spec("tensorboard") or find_spec("tensorboardX") else "none")
    chosen.setdefault("dataloader_pin_memory", torch.cuda.is_available() and device is not Device.cpu)
    arguments = _arguments(chosen, bool(evaluation), best, patience, fixed)
    rows = TrainingRows(
        task,
        _stream(TextStream, data, text_columns, seed) if stream else read_data("--data", data),
        read_data("--eval", evaluation or []),
        columns_of(text_columns, label_column),
        data if stream else (),
    )
    plan = Calibration(
        None, budget=budget, steps=calibration_steps, max_tokens=max_tokens, seed=seed, progress=not as_json
    )
    with working(), resumable(work):
        folder = ModelFolder.find(model)
        load_kernels(device)
        trained = train_folder(
            folder,
            out,
            rows,
            arguments,
            fff=fff,
            calibration=None if from_scratch else plan,
            max_length=max_length,
            truncate=truncate,
            patience=patience,
            from_scratch=from_scratch,
            resume=resume,
            overwrite=overwrite,
        )
    if arguments.process_index:
        return
    report = trained.training_report
    if as_json:
        print(json.dumps({**facts_of(trained, out), "training": asdict(report)}, indent=2))
        return
    _tell(trained, out, report)


def _check_fff(fff: str | None) -> None:
    from ..config import FFFConfig

    try:
        if fff is not None:
            FFFConfig.from_shorthand(fff)
    except ValueError as error:
        raise bad_option("--fff", error) from error


def _settings(preset_name: str | None, config: Path | None, settings: list[str] | None) -> dict[str, Any]:
    """What the last to say so says."""
    from ..training import parse_settings, preset, read_settings

    found: dict[str, Any] = {}
    steps: list[tuple[str, Any]] = [
        ("--preset", lambda: preset(preset_name) if preset_name else {}),
        ("--config", lambda: read_settings(config) if config else {}),
        ("--set", lambda: parse_settings(settings or [])),
    ]
    for option, read in steps:
        try:
            found |= read()
        except (ValueError, OSError) as error:
            raise bad_option(option, error) from error
    return found


def _arguments(
    settings: dict[str, Any], evaluates: bool, best: str | None, patience: int | None, fixed: dict[str, Any]
) -> Any:
    from ..training import finetuning_arguments

    try:
        return finetuning_arguments(settings, evaluates=evaluates, best=best, patience=patience, **fixed)
    except ImportError as error:  # of something that an argument wants
        raise bad_option("--set", error) from error


def _stream(stream: Any, sources: list[str], text_columns: str | None, seed: int) -> Any:
    try:
        return stream(sources, text_columns, seed=seed)
    except (ValueError, OSError) as error:
        raise bad_option("--data", error) from error


def _tell(model: Any, output: Path, report: Any) -> None:
    scores = ", ".join(f"{name} {value:.4f}" for name, value in report.scores.items()) or f"loss {report.loss:.4f}"
    rows = "a stream of" if report.rows is None else report.rows
    how = f"{report.steps} steps on {rows} rows"
    if report.evaluated:
        how += f", {report.evaluated} to evaluate on"
    if report.best_step:
        how += f", the best at step {report.best_step}"
    out.print(f"{type(model).__name__} in {output}: {scores} ({how}, {report.seconds:.0f} s)", soft_wrap=True)
    out.print(how_to_open(output), soft_wrap=True)
