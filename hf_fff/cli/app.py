"""The commands."""

import json
import re
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from safetensors import SafetensorError

from .. import __version__

app = typer.Typer(
    name="hf-fff",
    help="Fast feedforward networks for BERT-like models: convert, calibrate, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

# Paths and compilers' messages are printed as they are: rich would take "[final]" for a style and ":100:" for an emoji.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)

F = TypeVar("F", bound=Callable[..., Any])
Source = Annotated[str, typer.Argument(metavar="SRC", help="Folder of a dense model, or a repository of the Hub.")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
Kind = Annotated[
    str, typer.Option(help="Trees x depth, such as 8x8 (depth D visits D + 1 neurons a tree); mlp:WIDTH; none.")
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an output folder that is not empty.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def reports_errors(command: F) -> F:
    """Errors become one line on stderr and exit code 1; a traceback helps nobody who mistyped a path."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, RuntimeError, FloatingPointError, SafetensorError) as error:
            err.print(f"error: {error}", style="red")
            raise typer.Exit(1) from error

    return wrapped  # type: ignore[return-value]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _bad(option: str, error: Exception) -> typer.BadParameter:
    return typer.BadParameter(str(error), param_hint=f"'{option}'")


def _parse_layers(text: str | None) -> list[int] | None:
    """``"0-2,5"`` -> ``[0, 1, 2, 5]``."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise _bad("--layers", ValueError(f"{text!r} is not a list of layers such as 0,2,4 or 0-3"))
        layers.extend(span)
    return layers


def _table(*names: str, **options: Any) -> Table:
    """Where it is too narrow, text is folded, not cut off."""
    return Table(*(Column(name, overflow="fold") for name in names), **options)


def _check_use(fff: str, text: list[Path], output: Path, overwrite: bool) -> None:
    """What can be told from the options alone."""
    from ..config import FFFConfig
    from ..files import check_output

    try:
        FFFConfig.from_shorthand(fff)
    except ValueError as error:
        raise _bad("--fff", error) from error
    for path in text:
        if not path.is_file():
            raise _bad("--text", ValueError(f"{path} is not a file"))
    try:
        check_output(output, overwrite=overwrite)
    except OSError as error:
        raise _bad("OUT", error) from error


class Init(str, Enum):
    dense = "dense"
    random = "random"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _facts(model: Any, output: Path) -> dict[str, Any]:
    """What ``--json`` tells of any model that was written."""
    return {
        "output": str(output),
        "model_class": type(model).__name__,
        "layers": {str(i): c.shorthand for i, c in model.config.fff_layers.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@app.command()
@reports_errors
def convert(
    source: Source,
    output: Output,
    fff: Kind,
    layers: Annotated[str | None, typer.Option(help="Layers to convert, such as 0,2,4 or 0-3; all by default.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Unlabelled text to calibrate on, one paragraph a line; may be repeated.")
    ] = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for the calibration.")] = 300,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps a layer instead of a budget: reproducible.")] = None,
    max_tokens: Annotated[int, typer.Option(min=256, help="Tokens of the text to use at most.")] = 600_000,
    init: Annotated[Init, typer.Option(help="First values: from the dense neurons, or random.")] = Init.dense,
    seed: Seed = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format to save in; the source's by default.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a dense model's feedforward networks into fast ones, and save the model."""
    target_layers = _parse_layers(layers)
    _check_use(fff, text or [], output, overwrite)

    import torch

    from .. import ops
    from ..surgery import Calibration
    from ..surgery.folder import ModelFolder, convert_folder
    from ..surgery.text import read_texts

    folder = ModelFolder.find(source)
    texts = [t for path in text or [] for t in read_texts(path)]
    ops.load()  # a bad HF_FFF_BACKEND is told now, not after minutes of collecting
    plan = Calibration(texts, budget=budget, steps=steps, max_tokens=max_tokens, seed=seed, progress=not as_json)
    model = convert_folder(
        folder,
        output,
        fff,
        target_layers=target_layers,
        init=init.value,
        calibration=plan if texts else None,
        seed=seed,
        dtype=getattr(torch, dtype.value) if dtype else None,
        overwrite=overwrite,
    )
    report = getattr(model, "calibration_report", None)
    configs = model.config.fff_layers
    result = {
        **_facts(model, output),
        "calibration": vars(report) if report else None,
    }
    if as_json:
        print(json.dumps(result, indent=2))
        return
    table = _table("layer", "FFF", "neurons used", "of", "unexplained", title=f"{type(model).__name__} in {output}")
    for i, c in configs.items():
        unexplained = f"{report.unexplained[i]:.3f}" if report else "not calibrated"
        table.add_row(str(i), c.shorthand, str(c.active_nodes), str(c.nodes), unexplained)
    out.print(table)
    if report:
        out.print(
            f"{report.tokens} tokens, {report.steps} steps a layer, {report.seconds:.0f} s "
            f"(the same again: --steps {report.steps} --max-tokens {report.tokens} --seed {seed})",
            soft_wrap=True,  # to be copied
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
    _check_use(fff, text, output, overwrite)
    for option, rate in (("--learning-rate", learning_rate), ("--fff-learning-rate", fff_learning_rate)):
        if not rate > 0:
            raise _bad(option, ValueError(f"{rate} must be above 0"))

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
        **_facts(model, output),
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


@app.command()
@reports_errors
def env(as_json: Json = False) -> None:
    """Say what is installed, which kernels run, and why."""
    from ..bench.machine import report

    facts = report()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = _table("what", "value", show_header=False)
    for key, value in _flatten(facts):
        table.add_row(key, value)
    out.print(table)


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for k, v in value.items() for row in _flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list):
        return [(prefix, " ".join(map(str, value)))]
    return [(prefix, "" if value is None else str(value))]


@app.command()
@reports_errors
def build(
    output: Annotated[Path | None, typer.Option(help="Folder to put the library in, for HF_FFF_KERNEL_PATH.")] = None,
    force: Annotated[bool, typer.Option(help="Build even if there is one already.")] = False,
    as_json: Json = False,
) -> None:
    """Build the CPU kernel now instead of on its first use."""
    from dataclasses import asdict

    from ..ops import loader

    status = loader.build("cpu", force=force, output=output)
    if as_json:
        print(json.dumps(asdict(status), indent=2, default=str))
    elif status.loaded:
        out.print(f"{status.path} ({status.origin})", soft_wrap=True)
    if not status.loaded:
        raise RuntimeError(status.reason)


@bench_app.command("layer")
@reports_errors
def bench_layer(
    fff: Annotated[str, typer.Option(help="Trees x depth.")] = "1x11",
    hidden_size: Annotated[int, typer.Option(min=1, help="Size of input and output.")] = 768,
    tokens: Annotated[str, typer.Option(help="Token counts, comma-separated.")] = "1,8,128,512,4096",
    backward: Annotated[bool, typer.Option(help="Time the backward passes too.")] = True,
    rounds: Annotated[int, typer.Option(min=3, help="Turns that the candidates take.")] = 15,
    as_json: Json = False,
) -> None:
    """Time one FFF layer against torch's Linear-GELU-Linear of as many neurons."""
    from ..config import FFFConfig

    try:
        config = FFFConfig.from_shorthand(fff)
    except ValueError as error:
        raise _bad("--fff", error) from error
    try:
        counts = [int(t) for t in tokens.split(",")]
        if min(counts) < 1:
            raise ValueError
    except ValueError as error:
        raise _bad("--tokens", ValueError(f"{tokens!r} is not a list of positive numbers")) from error

    from ..bench.layer import as_records
    from ..bench.layer import bench_layer as run
    from ..bench.machine import summary

    rows = run(config, hidden_size, counts, backward=backward, rounds=rounds)
    if as_json:
        print(json.dumps({"fff": fff, "hidden_size": hidden_size, **summary(), "rows": as_records(rows)}, indent=2))
        return
    title = f"{fff} against dense {config.nodes}, hidden size {hidden_size}, float32: microseconds a call"
    names = (
        "tokens",
        "dense",
        "FFF(x)",
        "x",
        "dense, loop",
        "fff, loop",
        "x",
        "backward: masked dense",
        "fff",
        "x",
        "+ routing",
    )
    caption = ", ".join(f"{k} {v}" for k, v in summary().items())
    table = _table(*names, title=title, caption=caption, box=SIMPLE_HEAD, padding=0)  # fits into 80 columns
    for row in rows:
        table.add_row(
            str(row.tokens),
            *_triple(row.dense, row.fff),
            *_triple(row.dense_loop, row.fff_loop),
            *_triple(row.backward_masked, row.backward_fff),
            _number(row.backward_routing),
        )
    out.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _triple(slow: float | None, fast: float | None) -> tuple[str, str, str]:
    ratio = (
        "-" if slow is None or fast is None else f"{slow / fast:.0f}x" if slow > 10 * fast else f"{slow / fast:.1f}x"
    )
    return _number(slow), _number(fast), ratio
