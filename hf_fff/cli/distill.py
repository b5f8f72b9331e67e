"""``hf-fff distill``."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Device,
    Json,
    Kind,
    LabelColumn,
    OnDevice,
    Output,
    Overwrite,
    Seed,
    Source,
    TextColumns,
    app,
    bad_option,
    check_device,
    check_use,
    columns_of,
    facts_of,
    how_to_open,
    load_kernels,
    out,
    read_data,
    read_text,
    reports_errors,
    resumable,
    working,
)


class PackedRows(str, Enum):
    int8 = "int8"
    bf16 = "bf16"


@app.command()
@reports_errors
def distill(
    source: Source,
    output: Output,
    fff: Kind,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the training.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="Unlabelled text, one paragraph a line; may be repeated.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="classification, regression, tokens, qa or mlm, for which SRC is finetuned; general without."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Labelled rows of the task: .tsv, .csv, .json(l), .parquet, or NAME:SPLIT; may be repeated."),
    ] = None,
    transfer: Annotated[
        list[str] | None, typer.Option(help="Inputs of the task without labels (.txt too); may be repeated.")
    ] = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for the calibration before it.")] = 300,
    calibration_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps a layer instead of a budget: reproducible.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=256, help="Tokens to calibrate on at most.")] = 600_000,
    calibration_batch: Annotated[
        int,
        typer.Option(
            min=64,
            help="Tokens a step of the calibration; from 4096 on its rate is twice as high. More of them suit a GPU.",
        ),
    ] = 1024,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows a step; 192 by default, 32 with a task.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="For all but what replaces the FFNs; 4e-4 by default, 2e-4 with a task, twice that with --muon, less in under 500 steps."
        ),
    ] = None,
    fff_learning_rate: Annotated[
        float | None,
        typer.Option(
            help="For what replaces the FFNs; by default 0.75 times the other for trees, for MLPs 6 times and with a task 2.5 times, half of that with --muon."
        ),
    ] = None,
    muon: Annotated[
        bool,
        typer.Option(
            "--muon",
            help="Take the steps of attention's matrices by Muon, and double the learning rate where none is given; for GPUs.",
        ),
    ] = False,
    rows: Annotated[
        PackedRows | None,
        typer.Option(help="Train trees with rows rounded as they are packed later, which is meant to lose less."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens at which an input is cut.")] = 128,
    crop: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the batches whose texts are cropped at random; without --task."),
    ] = 0.0,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16 where that is safe; for GPUs.")] = False,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="Record steps on a GPU as CUDA graphs, the calibration's too: small models train two to three times as fast.",
        ),
    ] = False,
    device: OnDevice = None,
    seed: Seed = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 1000,
    resume: Annotated[bool, typer.Option(help="Continue from the work folder if there is one.")] = True,
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, removed in the end; OUT.work by default.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert, calibrate, and train the whole model to give what the dense one gives.

    Without --task that is the dense model's hidden states and embeddings, on any --text; with it, the logits of its head, on
    labelled --data, copies of them with other tokens, and --transfer inputs. For mlm, --text is the data. `accelerate launch -m hf_fff
    distill …` trains on several GPUs, which share the rows of a step.
    """
    check_use(fff, source, output, overwrite)
    for option, rate in (("--learning-rate", learning_rate), ("--fff-learning-rate", fff_learning_rate)):
        if rate is not None and not rate > 0:
            raise bad_option(option, ValueError(f"{rate} must be above 0"))
    of_task = {"--transfer": transfer, "--text-columns": text_columns, "--label-column": label_column}
    if rows and "x" not in fff:
        raise bad_option("--rows", ValueError(f"{rows.value} is of trees, and --fff {fff} has none"))
    _check_data(task, text, data, crop, of_task)

    from dataclasses import asdict

    import torch

    from ..surgery import Calibration
    from ..surgery.folder import ModelFolder
    from ..training import TaskRows, arguments_for, distil_folder, get_objective

    if task:
        try:
            get_objective(task)
        except ValueError as error:
            raise bad_option("--task", error) from error
    check_device("--device", device, bf16=bf16)
    work = work or output.with_name(f"{output.name}.work")
    given = {
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "learning_rate": learning_rate,
        "fff_learning_rate": fff_learning_rate,
        "packed_rows": rows and rows.value,
    }
    options: dict[str, Any] = {
        **{name: value for name, value in given.items() if value is not None},
        "output_dir": str(work),
        "max_steps": steps,
        "crop": crop,
        "cuda_graphs": graphs,
        "muon": muon,
        "bf16": bf16,
        "seed": seed,
        "save_steps": save_steps,
        "save_total_limit": 2,
        "logging_steps": 10,
        "disable_tqdm": as_json,
        "dataloader_num_workers": 3 if torch.cuda.is_available() and device is not Device.cpu else 0,  # GPUs wait
        "use_cpu": device is Device.cpu,
        "dataloader_pin_memory": torch.cuda.is_available() and device is not Device.cpu,
    }
    arguments = arguments_for(task, **options)
    _share(arguments)
    trained_on: Any
    if task:
        labelled = read_data("--data", data or []) + read_data("--text", [str(path) for path in text or []])
        others = read_data("--transfer", transfer or [])
        trained_on = TaskRows(task, labelled, others, columns_of(text_columns, label_column))
    else:
        trained_on = read_text(text)
    plan = Calibration(
        None,
        budget=budget,
        steps=calibration_steps,
        max_tokens=max_tokens,
        batch_tokens=calibration_batch,
        learning_rate=4e-3 if calibration_batch >= 4096 else 2e-3,
        seed=seed,
        progress=not as_json,
        cuda_graphs=graphs,
    )
    with working(), resumable(work):
        folder = ModelFolder.find(source)
        load_kernels(device)
        model = distil_folder(
            folder,
            output,
            fff,
            trained_on,
            arguments,
            calibration=plan,
            max_length=max_length,
            resume=resume,
            overwrite=overwrite,
        )
    if arguments.process_index:
        return
    report = model.distillation_report
    result = {
        **facts_of(model, output),
        "distillation": asdict(report),
    }
    if as_json:
        print(json.dumps(result, indent=2))
        return
    out.print(f"{type(model).__name__} in {output}: {_told(report)}", soft_wrap=True)
    out.print(how_to_open(output), soft_wrap=True)


def _share(arguments: Any) -> None:
    """The rows of a step among the processes that there are, so that steps and rates stay what they are with one."""
    rows, processes = arguments.per_device_train_batch_size, arguments.world_size
    if rows % processes:
        raise bad_option("--batch-size", ValueError(f"{rows} rows a step cannot be shared by {processes} processes"))
    arguments.per_device_train_batch_size = rows // processes


def _told(report: Any) -> str:
    how = f"({report.steps} steps on {report.rows} rows, {report.held_out} held out, {report.seconds:.0f} s)"
    if report.packed_rows:
        how += f", all with trees of {report.packed_rows} rows"
    if report.undone:
        how += "; the steps had made it worse, so that this is the calibrated model: take more of them, or lower rates"
    if report.task is None:
        return (
            f"cosine to the dense model's embeddings {report.cosine_before:.4f} calibrated, {report.cosine:.4f} distilled "
            f"{how}"
        )
    return (
        f"{report.metric} {report.score_before:.4f} calibrated, {report.score:.4f} distilled, {report.score_teacher:.4f} of "
        f"the dense model {how}"
    )


def _check_data(task: str | None, text: Any, data: Any, crop: float, of_task: dict[str, Any]) -> None:
    """Which options go together."""
    if task is None:
        for option, value in {"--data": data, **of_task}.items():
            if value:
                raise bad_option(option, ValueError("is for a task: name it with --task"))
        if not text:
            raise bad_option("--text", ValueError("is needed, or --task and --data"))
    elif crop:
        raise bad_option(
            "--crop", ValueError(f"is for distillation without a task; what {task} gives is of whole inputs")
        )
    elif text and task != "mlm":
        raise bad_option("--text", ValueError(f"is for distillation without a task, or mlm; {task} learns from --data"))
    elif not data and not text:
        raise bad_option("--data", ValueError(f"is needed with --task {task}"))
