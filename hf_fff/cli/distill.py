"""``hf-fff distill``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Json,
    Kind,
    Output,
    Overwrite,
    Seed,
    Source,
    app,
    bad_option,
    check_use,
    facts_of,
    out,
    reports_errors,
)


@app.command()
@reports_errors
def distill(
    source: Source,
    output: Output,
    fff: Kind,
    text: Annotated[list[Path], typer.Option(help="Unlabelled text, one paragraph a line; may be repeated.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of the training.")],
    budget: Annotated[float, typer.Option(min=1, help="Seconds for the calibration before it.")] = 300,
    calibration_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps a layer instead of a budget: reproducible.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Paragraphs a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="For all but what replaces the FFNs.")] = 3e-4,
    fff_learning_rate: Annotated[float, typer.Option(help="For what replaces the FFNs.")] = 1e-3,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens at which a paragraph is cut.")] = 128,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16 where that is safe; for GPUs.")] = False,
    seed: Seed = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 1000,
    resume: Annotated[bool, typer.Option(help="Continue from the work folder if there is one.")] = True,
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, removed in the end; OUT.work by default.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert, calibrate, and train the whole model to give the dense one's hidden states and embeddings."""
    check_use(fff, text, output, overwrite)
    for option, rate in (("--learning-rate", learning_rate), ("--fff-learning-rate", fff_learning_rate)):
        if not rate > 0:
            raise bad_option(option, ValueError(f"{rate} must be above 0"))

    import sys
    from contextlib import redirect_stdout
    from dataclasses import asdict

    import torch

    from .. import ops
    from ..surgery import Calibration
    from ..surgery.folder import ModelFolder
    from ..surgery.text import read_texts
    from ..training import DistillationArguments, distil_folder

    folder = ModelFolder.find(source)
    texts = [t for path in text for t in read_texts(path)]
    ops.load()
    arguments = DistillationArguments(
        output_dir=str(work or output.with_name(f"{output.name}.work")),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=learning_rate,
        fff_learning_rate=fff_learning_rate,
        bf16=bf16,
        seed=seed,
        save_steps=save_steps,
        save_total_limit=2,
        logging_steps=50,
        disable_tqdm=as_json,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    plan = Calibration(texts, budget=budget, steps=calibration_steps, seed=seed, progress=not as_json)
    with redirect_stdout(sys.stderr):  # where the Trainer tells how it goes on
        model = distil_folder(
            folder,
            output,
            fff,
            texts,
            arguments,
            calibration=plan,
            max_length=max_length,
            resume=resume,
            overwrite=overwrite,
        )
    report = model.distillation_report
    result = {
        **facts_of(model, output),
        "distillation": asdict(report),
    }
    if as_json:
        print(json.dumps(result, indent=2))
        return
    out.print(
        f"{type(model).__name__} in {output}: cosine to the dense model's embeddings {report.cosine_before:.4f} calibrated, "
        f"{report.cosine:.4f} distilled ({report.steps} steps on {report.rows} paragraphs, {report.held_out} held out, "
        f"{report.seconds:.0f} s)",
        soft_wrap=True,
    )
