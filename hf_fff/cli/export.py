"""``hf-fff export``."""

import json
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json, Output, Overwrite, Source, app, bad_option, check_out, out, read_text, reports_errors, working

if TYPE_CHECKING:
    from ..surgery.folder import ModelFolder


class Engine(str, Enum):
    openvino = "openvino"
    onnx = "onnx"


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
    engine: Annotated[
        Engine, typer.Option(help="What is to run the model; trees are fast in openvino.")
    ] = Engine.openvino,
    precision: Annotated[
        Precision,
        typer.Option(help="Of attention and all that is dense; int8 in openvino needs --text, onnx has no bf16."),
    ] = Precision.int8,
    rows: Annotated[
        Rows,
        typer.Option(help="Of the trees; auto: as --precision, but bf16 beside int8 without VNNI, and f32 in onnx."),
    ] = Rows.auto,
    text: Annotated[
        list[Path] | None, typer.Option(help="Typical texts for int8 in openvino, one a line; may be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts that int8 looks at, at most.")] = 300,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Modules whose products stay in float32 beside int8 in openvino, such as 'encoder.layer.0.*'; may be repeated."
        ),
    ] = None,
    vnni: Annotated[
        bool | None,
        typer.Option(
            "--vnni/--no-vnni",
            help="Whether the CPU that will run int8 in openvino has VNNI or AMX; by default what this one has. Without, weights have 7 bits.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model, converted or dense, for an engine: hf_fff.openvino.load opens it, or any runtime of ONNX."""
    if engine is Engine.onnx:
        if precision is Precision.bf16:
            raise bad_option("--precision", ValueError("bf16 is not for onnx (allowed: int8, f32)"))
        if rows in (Rows.int8, Rows.bf16):
            raise bad_option("--rows", ValueError(f"{rows.value} is not for onnx, where trees are f32"))
        if text:
            raise bad_option(
                "--text", ValueError("is not for onnx, whose int8 finds ranges when it runs: leave it out")
            )
        if keep:
            raise bad_option("--keep", ValueError("is not for onnx: leave it out"))
        if vnni is not None:
            raise bad_option("--vnni/--no-vnni", ValueError("is not for onnx: leave it out"))
    elif keep and precision is not Precision.int8:
        raise bad_option("--keep", ValueError("is for --precision int8"))
    elif vnni is not None and precision is not Precision.int8:
        raise bad_option("--vnni/--no-vnni", ValueError("is for --precision int8"))
    elif precision is Precision.int8 and not text:
        raise bad_option("--text", ValueError("int8 looks at some hundreds of typical texts: name a file of them"))
    check_out(source, output, overwrite)
    texts = read_text(text) or None

    from ..surgery.folder import ModelFolder, check_places

    start = time.perf_counter()
    with working():
        folder = ModelFolder.find(source)
        check_places(folder, output)
        try:
            if engine is Engine.onnx:
                facts = _to_onnx(source, folder, output, precision, overwrite)
            else:
                facts = _to_openvino(
                    source, folder, output, precision, rows, texts, samples, keep or [], vnni, overwrite
                )
        except ImportError as error:
            raise RuntimeError(str(error)) from error
    result = {
        "output": str(output),
        "model_class": facts["model_class"],
        "engine": engine.value,
        "precision": precision.value,
        "rows": facts["rows"],
        "operations": facts["operations"],
        "megabytes": round(sum(p.stat().st_size for p in output.rglob("*") if p.is_file()) / 1e6, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        out.print(
            f"{result['model_class']} in {output}: {precision.value}, {result['operations']} FFFs of {result['rows']} rows, "
            f"{result['megabytes']} MB, {result['seconds']} s",
            soft_wrap=True,
        )


def _to_openvino(
    source: str,
    folder: "ModelFolder",
    output: Path,
    precision: Precision,
    rows: Rows,
    texts: list[str] | None,
    samples: int,
    keep: list[str],
    vnni: bool | None,
    overwrite: bool,
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from .. import openvino
    from ..bench.model import load_model
    from ..openvino.embedding import Embedding

    openvino.extension()  # what is missing is told before anything slow
    made = openvino.compile(
        load_model(source),
        precision.value,
        rows=rows.value,
        texts=texts,
        tokenizer=AutoTokenizer.from_pretrained(folder.transformer),
        embedding=Embedding.of_folder(folder.root, folder.transformer),
        samples=samples,
        keep=keep,
        vnni=vnni,
    )
    made.save_pretrained(output, overwrite=overwrite)
    return {"model_class": made.model_class, "rows": made.rows, "operations": made.operations}


def _to_onnx(source: str, folder: "ModelFolder", output: Path, precision: Precision, overwrite: bool) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from .. import onnx
    from ..bench.model import load_model

    model, tokenizer = load_model(source), AutoTokenizer.from_pretrained(folder.transformer)
    path = onnx.export(model, output, precision.value, tokenizer=tokenizer, overwrite=overwrite)
    return {"model_class": type(model).__name__, "rows": "f32", "operations": onnx.operations(path)}
