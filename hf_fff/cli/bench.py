"""``hf-fff bench``."""

import json
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD

from .common import Json, app, bad_option, out, reports_errors, table_of

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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _triple(slow: float | None, fast: float | None) -> tuple[str, str, str]:
    ratio = (
        "-" if slow is None or fast is None else f"{slow / fast:.0f}x" if slow > 10 * fast else f"{slow / fast:.1f}x"
    )
    return _number(slow), _number(fast), ratio
