"""``hf-fff import``."""

import json
from typing import Annotated

import typer

from .common import (
    Json,
    Output,
    Overwrite,
    RemoteCode,
    app,
    check_out,
    err,
    facts_of,
    how_to_open,
    out,
    reports_errors,
    working,
)

import_app = typer.Typer(help="Make models of ours from checkpoints of other make.", no_args_is_help=True)
app.add_typer(import_app, name="import")


@import_app.command("ultrafastbert")
@reports_errors
def import_ultrafastbert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of such a checkpoint, or a repository of the Hub.")
    ],
    output: Output,
    remote_code: RemoteCode = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import a checkpoint of UltraFastBERT (arXiv 2311.10770): config.json with its weights and tokenizer.json."""
    check_out(source, output, overwrite)

    from ..checkpoints import ultrafastbert
    from ..surgery.folder import ModelFolder

    with working():
        model = ultrafastbert.import_ultrafastbert(
            ModelFolder.find(source), output, remote_code=remote_code, overwrite=overwrite
        )
    tokenizer = (output / "tokenizer.json").is_file()
    if not tokenizer:
        err.print("there is no tokenizer.json in the source, and so none in the output", style="yellow")
    if as_json:
        print(json.dumps({**facts_of(model, output), "tokenizer": tokenizer}, indent=2))
        return
    config = model.config
    out.print(
        f"{type(model).__name__} in {output}: {config.num_hidden_layers} layers of {config.fff_layers[0].shorthand}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        soft_wrap=True,
    )
    out.print(how_to_open(output), soft_wrap=True)
