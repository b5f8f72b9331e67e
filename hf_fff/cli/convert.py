"""``hf-fff convert``."""

import json
import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Json,
    Kind,
    Output,
    Overwrite,
    RemoteCode,
    Seed,
    Source,
    app,
    bad_option,
    check_use,
    err,
    facts_of,
    how_to_open,
    load_kernels,
    out,
    read_text,
    reports_errors,
    table_of,
    working,
)


class Init(str, Enum):
    dense = "dense"
    random = "random"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _parse_layers(text: str | None) -> list[int] | None:
    """``"0-2,5"`` -> ``[0, 1, 2, 5]``."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise bad_option("--layers", ValueError(f"{text!r} is not a list of layers such as 0,2,4 or 0-3"))
        layers.extend(span)
    return layers


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
    delta: Annotated[bool, typer.Option(help="Save only what is not the source's, with a reference to it.")] = False,
    remote_code: RemoteCode = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a dense model's feedforward networks into fast ones, and save the model."""
    target_layers = _parse_layers(layers)
    check_use(fff, source, output, overwrite)
    if steps is not None and not text:
        raise bad_option("--steps", ValueError("are of the calibration, which needs --text"))

    if delta and remote_code:
        raise bad_option("--delta", ValueError("needs hf_fff to be opened, which --remote-code is to do without"))

    import warnings

    import torch

    from ..surgery import Calibration
    from ..surgery.folder import ModelFolder, convert_folder

    texts = read_text(text)
    with working(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the converted model is not calibrated")  # told below
        folder = ModelFolder.find(source)
        load_kernels()
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
            delta=folder.name_of_transformer(source) if delta else None,
            remote_code=remote_code,
            overwrite=overwrite,
        )
    if not texts:
        err.print(
            "the model is not calibrated, and has lost what its FFNs knew: give --text, or use hf-fff distill",
            style="yellow",
        )
    report = getattr(model, "calibration_report", None)
    configs = model.config.fff_layers
    result = {
        **facts_of(model, output),
        "calibration": vars(report) if report else None,
    }
    if delta:
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        result["bytes"] = {
            "delta": sum(p.stat().st_size for p in output.rglob("fff_delta.safetensors")),
            "whole": whole,
        }
    if as_json:
        print(json.dumps(result, indent=2))
        return
    table = table_of("layer", "FFF", "neurons used", "of", "unexplained", title=f"{type(model).__name__} in {output}")
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
        if poor := [str(i) for i, value in report.unexplained.items() if value >= 1]:
            err.print(
                f"layers {', '.join(poor)} fit no better than a constant would: more --text, and more --steps or --budget, are needed",
                style="yellow",
            )
    if delta:
        sizes = [f"{result['bytes'][name] / 1e6:.1f} MB" for name in ("delta", "whole")]
        out.print(f"The delta has {sizes[0]}, the whole weights would have {sizes[1]}.", soft_wrap=True)
    out.print(how_to_open(output), soft_wrap=True)
