"""``hf-fff env`` and ``hf-fff build``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, app, out, reports_errors, table_of


@app.command()
@reports_errors
def env(as_json: Json = False) -> None:
    """Say what is installed, which kernels run, and why."""
    from ..bench.machine import report

    facts = report()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = table_of("what", "value", show_header=False)
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
