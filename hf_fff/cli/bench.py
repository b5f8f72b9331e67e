"""``hf-fff bench``."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD

from .common import Json, Seed, app, bad_option, out, reports_errors, table_of

bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


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
        raise bad_option("--fff", error) from error
    try:
        counts = [int(t) for t in tokens.split(",")]
        if min(counts) < 1:
            raise ValueError
    except ValueError as error:
        raise bad_option("--tokens", ValueError(f"{tokens!r} is not a list of positive numbers")) from error

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
    table = table_of(*names, title=title, caption=caption, box=SIMPLE_HEAD, padding=0)  # fits into 80 columns
    for row in rows:
        table.add_row(
            str(row.tokens),
            *_triple(row.dense, row.fff),
            *_triple(row.dense_loop, row.fff_loop),
            *_triple(row.backward_masked, row.backward_fff),
            _number(row.backward_routing),
        )
    out.print(table)


@bench_app.command("model")
@reports_errors
def bench_model(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model folders; ratios are to the first.")],
    batch: Annotated[
        str, typer.Option(help="Rows x tokens, comma-separated; with --text, rows alone, such as 1,32.")
    ] = "1x16,1x128,8x128,32x128",
    text: Annotated[Path | None, typer.Option(help="Texts, one a line, whose real lengths are timed.")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens at which a text is cut.")] = 128,
    rounds: Annotated[int, typer.Option(min=3, help="Turns that the models take.")] = 15,
    device: Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")] = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time whole models against each other, interleaved, as they are saved, with their heads."""
    shapes = [part.strip() for part in batch.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*" if text else r"[1-9]\d*x[1-9]\d*", shape) for shape in shapes):
        form = "numbers of rows such as 1,32, as is needed with --text" if text else "ROWSxTOKENS such as 1x16,8x128"
        raise bad_option("--batch", ValueError(f"{batch!r} is not a list of {form}"))

    from dataclasses import asdict

    import torch
    from transformers import AutoTokenizer

    from .. import ops
    from ..bench.machine import summary
    from ..bench.model import Workload, load_model, random_ids, real_rows, time_models
    from ..surgery.folder import ModelFolder
    from ..surgery.text import read_texts
    from ..tasks.data import Collator
    from ..training import TokenisedTexts

    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA
        raise bad_option("--device", ValueError(f"{device!r} is no device of this machine")) from error
    texts = read_texts(text) if text else []
    ops.load()
    loaded: dict[str, Any] = {source: load_model(source).to(place) for source in models}
    workloads: list[Workload]
    if text:
        tokenizer = AutoTokenizer.from_pretrained(ModelFolder.find(models[0]).transformer)
        data = TokenisedTexts(texts, tokenizer, max_length)
        workloads = [real_rows(data, Collator(tokenizer), int(rows), seed=seed) for rows in shapes]
    else:
        vocabulary = min(model.config.vocab_size for model in loaded.values())
        sizes = [[int(n) for n in shape.split("x")] for shape in shapes]
        workloads = [random_ids(rows, tokens, vocabulary, seed=seed) for rows, tokens in sizes]
    timings = time_models(loaded, workloads, rounds=rounds, seed=seed)
    facts = {**summary(), **({"device": torch.cuda.get_device_name(place)} if place.type == "cuda" else {})}
    if as_json:
        rows = [{**asdict(t), "microseconds": t.microseconds, "ratios": t.ratios} for t in timings]
        print(json.dumps({**facts, "rows": rows}, indent=2))
        return
    told = table_of(
        "model",
        *(t.workload for t in timings),
        title="microseconds a token, and how many times as fast as the first",
        caption=", ".join(f"{k} {v}" for k, v in facts.items()),
        box=SIMPLE_HEAD,
    )
    for name in loaded:
        told.add_row(name, *(f"{_number(t.microseconds[name])}  {1 / t.ratios[name]:.2f}x" for t in timings))
    out.print(told)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _triple(slow: float | None, fast: float | None) -> tuple[str, str, str]:
    ratio = (
        "-" if slow is None or fast is None else f"{slow / fast:.0f}x" if slow > 10 * fast else f"{slow / fast:.1f}x"
    )
    return _number(slow), _number(fast), ratio
