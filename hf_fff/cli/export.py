"""``hf-fff export``."""

import json
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, Output, Overwrite, Source, app, bad_option, check_out, out, read_text, reports_errors, working


class Engine(str, Enum):
    openvino = "openvino"


class Precision(str, Enum):
    int8 = "int8"
    bf16 = "bf16"
    f32 = "f32"


class Rows(str, Enum):
    auto = "auto"
    int8 = "int8"
    bf16 = "bf16"
    f32 = "f32"


@app.command()
@reports_errors
def export(
    source: Source,
    output: Output,
    engine: Annotated[Engine, typer.Option(help="What is to run the model.")] = Engine.openvino,
    precision: Annotated[
        Precision, typer.Option(help="Of attention and all that is dense; int8 needs --text.")
    ] = Precision.int8,
    rows: Annotated[Rows, typer.Option(help="Of the trees; auto: as --precision.")] = Rows.auto,
    text: Annotated[
        list[Path] | None, typer.Option(help="Typical texts for int8, one a line; may be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts that int8 looks at, at most.")] = 300,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model, converted or dense, for a CPU engine: hf_fff.openvino.load opens it."""
    if precision is Precision.int8 and not text:
        raise bad_option("--text", ValueError("int8 looks at some hundreds of typical texts: name a file of them"))
    check_out(source, output, overwrite)
    texts = read_text(text) or None

    from transformers import AutoTokenizer

    from .. import openvino
    from ..bench.model import load_model
    from ..openvino.embedding import Embedding
    from ..surgery.folder import ModelFolder, check_places

    start = time.perf_counter()
    with working():
        folder = ModelFolder.find(source)
        check_places(folder, output)
        try:
            openvino.extension()  # what is missing is told before anything slow
            made = openvino.compile(
                load_model(source),
                precision.value,
                rows=rows.value,
                texts=texts,
                tokenizer=AutoTokenizer.from_pretrained(folder.transformer),
                embedding=Embedding.of_folder(folder.root, folder.transformer),
                samples=samples,
            )
        except ImportError as error:
            raise RuntimeError(str(error)) from error
        made.save_pretrained(output, overwrite=overwrite)
    result = {
        "output": str(output),
        "model_class": made.model_class,
        "engine": engine.value,
        "precision": precision.value,
        "rows": made.rows,
        "operations": made.operations,
        "megabytes": round(sum(p.stat().st_size for p in output.rglob("*") if p.is_file()) / 1e6, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        out.print(
            f"{result['model_class']} in {output}: {precision.value}, {result['operations']} FFFs of {made.rows} rows, "
            f"{result['megabytes']} MB, {result['seconds']} s",
            soft_wrap=True,
        )
