"""The application, and what its commands share."""

from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
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


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


TextColumns = Annotated[
    str | None, typer.Option(help="Columns of the texts, such as premise,hypothesis; well-known names by default.")
]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels; a well-known name by default.")]
OnDevice = Annotated[Device | None, typer.Option(help="Where to compute; a GPU by default where there is one.")]


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


def bad_option(option: str, error: Exception) -> typer.BadParameter:
    return typer.BadParameter(str(error), param_hint=f"'{option}'")


def table_of(*names: str, **options: Any) -> Table:
    """Where it is too narrow, text is folded, not cut off."""
    return Table(*(Column(name, overflow="fold") for name in names), **options)


def check_use(fff: str, text: list[Path], output: Path, overwrite: bool) -> None:
    """What can be told from the options alone."""
    from ..config import FFFConfig
    from ..files import check_output

    try:
        FFFConfig.from_shorthand(fff)
    except ValueError as error:
        raise bad_option("--fff", error) from error
    for path in text:
        if not path.is_file():
            raise bad_option("--text", ValueError(f"{path} is not a file"))
    try:
        check_output(output, overwrite=overwrite)
    except OSError as error:
        raise bad_option("OUT", error) from error


def read_data(option: str, sources: list[str]) -> list[dict[str, Any]]:
    """The rows of all sources that an option names."""
    from ..tasks import read_rows

    try:
        return [row for source in sources for row in read_rows(source)]
    except (ValueError, OSError) as error:
        raise bad_option(option, error) from error


def columns_of(text_columns: str | None, label_column: str | None) -> Any:
    from ..tasks import Columns

    return Columns(tuple(text_columns.split(",")) if text_columns else None, label_column)


def check_device(option: str, device: Device | None, *, bf16: bool = False) -> None:
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise bad_option(option, ValueError("this machine has no GPU that torch can use"))
    if bf16 and (device is Device.cpu or not torch.cuda.is_available()):
        raise bad_option("--bf16", ValueError("is for GPUs, and this is to run on a CPU: leave it out"))


def facts_of(model: Any, output: Path) -> dict[str, Any]:
    """What ``--json`` tells of any model that was written."""
    return {
        "output": str(output),
        "model_class": type(model).__name__,
        "layers": {str(i): c.shorthand for i, c in model.config.fff_layers.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
    }
