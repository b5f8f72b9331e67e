"""``hf-fff choose``."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Device,
    Json,
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
    check_out,
    columns_of,
    command_line,
    err,
    facts_of,
    how_to_open,
    load_kernels,
    out,
    read_data,
    read_text,
    reports_errors,
    resumable,
    table_of,
    working,
)

if TYPE_CHECKING:
    from ..choosing import Choice, Plan


@app.command()
@reports_errors
def choose(
    context: typer.Context,
    source: Source,
    output: Output,
    task: Annotated[str, typer.Option(help="classification, regression, tokens, qa, mlm, similarity or embeddings.")],
    keep: Annotated[
        float,
        typer.Option(
            help="Share of the dense model's main metric to keep; of mlm: its perplexity by that of what is chosen; of "
            "embeddings: the cosine to them."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Labelled rows to train on: .tsv, .csv, .json(l), .parquet, NAME:SPLIT; may be repeated."),
    ] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option(help="Rows to decide on; 20 % of the others by default. May be repeated.")
    ] = None,
    transfer: Annotated[
        list[str] | None, typer.Option(help="Inputs of the task without labels to train on; may be repeated.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to train on, one paragraph a line, for mlm, similarity, embeddings; may be repeated."),
    ] = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    candidates: Annotated[
        str,
        typer.Option(
            help="What to put in the place of the FFNs: none, mlp:WIDTH, trees x depth, both (4x8+mlp:64); comma-separated."
        ),
    ] = "none,mlp:32,mlp:128,1x11,4x9,8x8,8x8+mlp:152,32x6",
    engine: Annotated[str, typer.Option(help="What the model will run in: torch, or openvino, in int8.")] = "torch",
    budget: Annotated[
        float | None, typer.Option(min=1, help="Seconds for the whole search; 3600 by default. Steps come from it.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each candidate instead of a budget: reproducible.")
    ] = None,
    calibration_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps a layer of the calibration; with --steps, as many by default.")
    ] = None,
    batch_sizes: Annotated[
        str, typer.Option(help="Rows at once, of real lengths, when times are measured; all of them count alike.")
    ] = "1,32",
    every: Annotated[
        bool, typer.Option("--all", help="Train all candidates, not only until one keeps enough.")
    ] = False,
    mixed: Annotated[bool, typer.Option(help="Try different kinds in different layers, too.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Picture of the frontier to write, such as frontier.png.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows a step; 32 by default, 192 for similarity and embeddings.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens at which a row is cut; at least 32 for qa.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=256, help="Tokens to calibrate on at most.")] = 600_000,
    bf16: Annotated[bool, typer.Option(help="Train in bfloat16 where that is safe; for GPUs.")] = False,
    device: OnDevice = None,
    time_on: Annotated[
        Device | None, typer.Option(help="Where the model will run: times are measured there; --device by default.")
    ] = None,
    seed: Seed = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 1000,
    resume: Annotated[bool, typer.Option(help="Continue from OUT.work if it is there.")] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find the fastest model that keeps what the dense one knows, measured on your data and machine, and save it.

    Candidates are timed first. Then they are calibrated, distilled and measured on rows that they never saw, from the fastest on,
    until one keeps the asked share. For similarity and embeddings they are trained on the texts alone.

    If none keeps enough, the exit code is 1, OUT is not made, and what was trained stays in OUT.work: the same command with a lower
    --keep takes it, with a higher --budget or more --candidates goes on from it. An interrupted search goes on with the same command.
    """
    from ..choosing.engine import ENGINES

    if not 0 < keep <= 1:
        raise bad_option("--keep", ValueError(f"{keep} must lie above 0, and be 1 at most"))
    if engine not in ENGINES:
        raise bad_option("--engine", ValueError(f"{engine!r} is not known (allowed: {', '.join(ENGINES)})"))
    if engine == "openvino":
        if time_on not in (None, Device.cpu):
            raise bad_option("--time-on", ValueError(f"{time_on.value}: openvino runs on the CPU"))
        if lacking := [name for name in ("openvino", "nncf") if find_spec(name) is None]:
            told = "is not installed: pip install 'hf-fff[openvino]'"
            raise bad_option("--engine", ValueError(f"openvino needs {lacking[0]}, which {told}"))
    if steps is not None and budget is not None:
        raise bad_option("--budget", ValueError("and --steps say the same thing twice: give one of them"))
    if seed < 0:
        raise bad_option("--seed", ValueError(f"{seed} must be at least 0"))

    from ..choosing.plot import check_plot
    from ..config import FFFConfig

    names = tuple(name.strip() for name in candidates.split(",") if name.strip())
    try:
        if not names:
            raise ValueError("there are none")
        for name in names:
            FFFConfig.from_shorthand(name)
    except ValueError as error:
        raise bad_option("--candidates", error) from error
    try:
        sizes = tuple(int(size) for size in batch_sizes.split(","))
        if min(sizes) < 1:
            raise ValueError
    except ValueError as error:
        raise bad_option("--batch-sizes", ValueError(f"{batch_sizes!r} is not a list of positive numbers")) from error
    check_out(source, output, overwrite)
    if plot is not None:
        try:
            check_plot(plot)
        except ValueError as error:
            raise bad_option("--plot", error) from error

    from dataclasses import asdict

    import torch

    from ..bench.machine import summary
    from ..bench.model import load_model
    from ..choosing import EMBEDDERS, Plan, prepare
    from ..choosing import choose as search
    from ..choosing.plot import plot as draw
    from ..surgery.folder import ModelFolder
    from ..tasks import get_task
    from ..training import DistillationArguments, arguments_for

    try:
        kind = get_task(task)
    except ValueError as error:
        raise bad_option("--task", error) from error
    embedder = task in EMBEDDERS
    if text and not (embedder or task == "mlm"):
        raise bad_option("--text", ValueError(f"is for mlm, similarity and embeddings; {task} learns from --data"))
    if transfer and embedder:
        raise bad_option("--transfer", ValueError(f"is for tasks with a head; {task} learns from --text"))
    if not data and not text:
        raise bad_option("--data", ValueError("is needed" + (", or --text" if embedder or task == "mlm" else "")))
    if max_length < kind.least_length:
        raise bad_option("--max-length", ValueError(f"{max_length} must be at least {kind.least_length} for {task}"))
    check_device("--device", device, bf16=bf16)
    check_device("--time-on", time_on)

    def arguments(folder: Path, count: int) -> DistillationArguments:
        options: dict[str, Any] = {
            "output_dir": str(folder),
            "max_steps": count,
            "bf16": bf16,
            "seed": seed,
            "save_steps": save_steps,
            "save_total_limit": 2,
            "logging_steps": 10,
            "disable_tqdm": as_json,
            "use_cpu": device is Device.cpu,
            "dataloader_pin_memory": torch.cuda.is_available() and device is not Device.cpu,
        }
        if batch_size:
            options |= {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size}
        return arguments_for(None if embedder else task, **options)

    plan = Plan(
        keep=keep,
        candidates=names,
        steps=steps,
        calibration_steps=calibration_steps,
        **({} if budget is None else {"budget": budget}),
        batch_sizes=sizes,
        every=every,
        mixed=mixed,
        max_length=max_length,
        max_tokens=max_tokens,
        engine=engine,
        seed=seed,
    )
    rows = prepare(
        task,
        read_data("--data", data or []),
        held_out=read_data("--eval-data", eval_data or []),
        transfer=read_data("--transfer", transfer or []),
        texts=read_text(text),
        columns=columns_of(text_columns, label_column),
        seed=seed,
    )
    with working(), resumable(output.with_name(f"{output.name}.work")):
        folder = ModelFolder.find(source)
        load_kernels(device)
        choice = search(
            folder,
            output,
            rows,
            plan,
            arguments,
            time_on=time_on.value if time_on else None,
            resume=resume,
            overwrite=overwrite,
            tell=lambda words: err.print(words),
        )
        written = facts_of(load_model(str(output)), output) if choice.chosen else {}
    if plot is not None:
        draw(choice, plot)
    place = "cpu" if engine != "torch" else time_on.value if time_on else arguments(output, 1).device.type
    facts = {**summary(), "engine": engine, "time_on": place}
    if as_json:
        result = {
            "task": task,
            "metric": choice.metric,
            "keep": keep,
            "held_out": choice.rows,
            "machine": facts,
            "dense": {k: choice.dense[k] for k in ("score", "microseconds")},
            "candidates": [{"candidate": r.name, **asdict(r)} for r in choice.results],
            "frontier": [r.name for r in choice.frontier],
            "chosen": choice.chosen.name if choice.chosen else None,
            "work": str(choice.work) if choice.work else None,
            **written,
        }
        print(json.dumps(result, indent=2))
    else:
        _show(choice, ", ".join(f"{k} {v}" for k, v in facts.items()))
    if choice.chosen is None:
        raise RuntimeError("\n".join([_missed(choice, output), *_advice(choice, context, plan)]))
    if not as_json:
        out.print(
            f"{choice.chosen.name} keeps {_share(choice.chosen)} of the dense model's {choice.metric} in "
            f"{choice.chosen.relative:.2f} of its time: {output}",
            soft_wrap=True,
        )
        out.print(how_to_open(output), soft_wrap=True)
        if choice.chosen.in_engine is not None:
            export = f"hf-fff export {output} ENGINE --engine {engine} --precision int8 --text typical.txt"
            out.print(f"Inside {engine}, in int8, it keeps {choice.chosen.in_engine:.1%}: {export}", soft_wrap=True)


def _share(result: Any) -> str:
    """With its standard error, where there is one."""
    if result.share is None:
        return ""
    return f"{result.share:.1%}" + ("" if result.error is None else f" ± {100 * result.error:.1f}")


def _missed(choice: "Choice", output: Path) -> str:
    best = choice.best
    if best is None:
        return f"no candidate is faster than the dense model: {output} was not made"
    return (
        f"no candidate that is faster than the dense model keeps {choice.keep:.1%} of its {choice.metric}: {output} was not made. "
        f"The best is {best.name} with {_share(best)} in {best.relative:.2f} of its time"
    )


def _advice(choice: "Choice", context: typer.Context, plan: "Plan") -> list[str]:
    """What may be done with the candidates that were trained."""
    if choice.work is None:
        return []
    told = [f"What was trained is kept in {choice.work} (remove it if you want none of it)."]
    again: dict[str, Any] = {} if context.params["resume"] else {"resume": True}  # else it would start anew
    share = choice.best.share if choice.best else None
    if share and (keep := math.floor(1000 * share) / 1000) > 0:
        told += ["To take the best of it:", "    " + command_line(context, keep=keep, **again)]
    if plan.steps is None:
        more = command_line(context, budget=round(2 * plan.budget), **again)
        told += ["To train it further, a higher --budget than before, which counts what was spent:", "    " + more]
    return told


def _show(choice: "Choice", caption: str) -> None:
    from rich.box import SIMPLE_HEAD

    sizes = list(choice.dense["microseconds"])
    names = ("candidate", "steps", choice.metric, "kept, %", *(f"µs, {size}" for size in sizes), "time", "")
    title = f"{choice.metric} on {choice.rows} held-out rows, microseconds a token at batches of so many rows"
    told = table_of(*names, title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    told.add_row(
        "dense",
        "",
        f"{choice.dense['score']:.4f}",
        "100",
        *(f"{choice.dense['microseconds'][size]:.3g}" for size in sizes),
        "1.00",
        "",
    )
    for r in choice.results:
        error = "" if r.error is None else f" ± {100 * r.error:.1f}"
        told.add_row(
            r.name,
            "" if r.share is None else str(r.steps),
            "" if r.score is None else f"{r.score:.4f}",
            "" if r.share is None else f"{100 * r.share:.1f}{error}",
            *(f"{r.microseconds[size]:.3g}" for size in sizes),
            f"{r.relative:.2f}",
            ", ".join(filter(None, [r.note, "on the frontier" if r in choice.frontier else ""])),
        )
    out.print(told)
    out.print(
        "kept: the share of the dense model's, ± one standard error of the difference, from random groups of the rows; time: "
        "by the dense model's, the geometric mean over the batch sizes",
        soft_wrap=False,
    )
