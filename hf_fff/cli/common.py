"""The application, and what its commands share.

Exit codes, the same for all commands:

- 0: done.
- 2: what was given is wrong, be it an option, a file, a model or a variable of the environment: the same call will fail again.
- 1: it went wrong while working, be it memory, a disk, a compiler or a training; or nothing was found that is good enough.
- 130 and 143: interrupted, and terminated.
"""

import errno
import json
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from enum import Enum
from functools import wraps
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Column, Table
from safetensors import SafetensorError
from typer.models import ArgumentInfo, OptionInfo

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
    str,
    typer.Option(
        help="Trees x depth, such as 8x8 (depth D visits D + 1 neurons a tree); mlp:WIDTH; both, such as 4x8+mlp:64; none."
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an output folder that is not empty.")]
RemoteCode = Annotated[
    bool, typer.Option(help="Add a file with which trust_remote_code=True opens the model without hf_fff.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


TextColumns = Annotated[
    str | None, typer.Option(help="Columns of the texts, such as premise,hypothesis; well-known names by default.")
]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels; a well-known name by default.")]
OnDevice = Annotated[Device | None, typer.Option(help="Where to compute; a GPU by default where there is one.")]


# ValueErrors name a field that was given; of files, these are what a wrong path gives.
_GIVEN = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    UnpicklingError,
)


def exit_code(error: Exception) -> int:
    """2 where what was given is wrong, 1 where it went wrong while working."""
    if isinstance(error, SafetensorError):
        return 2 if "deserializing" in str(error) else 1  # a damaged model; a disk that is full
    if isinstance(error, OSError) and error.errno is None:
        return 2  # transformers cannot read what it was given
    return 2 if isinstance(error, _GIVEN) else 1


def reports_errors(command: F) -> F:
    """Errors become one line on stderr and an exit code; a traceback helps nobody who mistyped a path."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, RuntimeError, FloatingPointError, SafetensorError, UnpicklingError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # `hf-fff env | head -1`
                raise
            told = _as_typed(str(error), command)
            if isinstance(error, UnpicklingError):  # torch's own text advises to run it
                told = "the weights are a pickle that is damaged, or that runs code, and are not read: save them as safetensors"
            err.print(f"error: {told}{_kept(error)}", style="red")
            raise typer.Exit(exit_code(error)) from error
        except (KeyboardInterrupt, SystemExit) as error:
            err.print(f"\ninterrupted{_kept(error)}")
            raise

    return wrapped  # type: ignore[return-value]


# Fields of the library whose options have other names.
_OPTIONS = {
    "target_layers": "layers",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "license": "licence",
}
# A name of several words, and one that may be a word of any sentence.
_FIELD = re.compile(r"(?<![\w./-])[a-z]+(?:_[a-z]+)+(?!\.?\w|\()|(?<![\w./-])(?<!: )[a-z]+(?==)")


def _as_typed(message: str, command: Callable[..., Any]) -> str:
    """The library's message, in which fields that a command has as options are called as they are typed: ``max_tokens`` becomes
    ``--max-tokens``. A name of one word only counts before "=", and not as the column of a row (``row 3: text=5``)."""
    typed: dict[str, str] = {}
    for name, hint in command.__annotations__.items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                declared = [info.default, *(info.param_decls or ())]  # in Annotated the first one comes as the default
                named = [word for word in declared if isinstance(word, str) and word.startswith("--")]
                typed[name] = next(iter(named), f"--{name.replace('_', '-')}")
            elif isinstance(info, ArgumentInfo):
                typed[name] = info.metavar or name.upper()
    if "text_columns" in typed:
        message = message.replace(": name them", f": name them with {typed['text_columns']}")
    typed |= {field: typed[name] for field, name in _OPTIONS.items() if name in typed}
    return _FIELD.sub(lambda match: typed.get(match[0], match[0]), message)


def _kept(error: BaseException) -> str:
    work = getattr(error, "kept_in", None)
    return f"\nWhat is done is kept in {work}: the same command goes on from there" if work else ""


@contextmanager
def resumable(work: Path) -> Iterator[None]:
    """What ends too early, though not by what was given, says that what is done is kept."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, RuntimeError, OSError) as error:
        if work.is_dir() and not (isinstance(error, Exception) and exit_code(error) == 2):
            error.kept_in = work  # type: ignore[union-attr]
        raise


@contextmanager
def working() -> Iterator[None]:
    """Around the work of a command: stdout is for its result alone, so what libraries print goes to stderr. transformers' bars
    of a second, for each model that is read or written, are left out; those of downloads stay."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if shown:
        enable_progress_bars()
    done = threading.Event()
    clock = threading.Thread(target=_tick, args=(done,), daemon=True)
    clock.start()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        done.set()
        clock.join()


def _tick(done: threading.Event, seconds: float = 5.0) -> None:
    """Shows bars again now and then, so that their clocks go on where a step takes long."""
    from tqdm import tqdm

    while not done.wait(seconds):
        for bar in list(getattr(tqdm, "_instances", ())):
            if not bar.disable:
                bar.refresh()


def must_compile(name: str = "cpu") -> bool:
    """Whether a library is to be compiled when it is loaded, which a user should hear of."""
    from ..ops import loader

    facts = loader.describe()
    row = facts["libraries"][name]
    key = row.get("targets", True) and row.get("key")  # none without a compiler, and no targets without a GPU
    setting = facts["backend_setting"]
    asked = setting == "torch" or (setting == "hub" and name == "cpu") or facts["kernel_path"]
    return bool(key and not asked and not any(Path(facts["cache"]).glob(f"{name}-{key}*")))


def announce(name: str, what: str) -> None:
    """Tells that a library is about to be compiled, if it is."""
    from ..ops import loader

    if must_compile(name):
        err.print(f"compiling the {what}, once: this takes {loader.LIBRARIES[name].tools.takes}")


def load_kernels(device: Device | None = Device.cpu) -> None:
    """Now, so that a bad ``HF_FFF_BACKEND`` is told before minutes of work; those of the CPU, and of a GPU where ``device`` is one, or
    may be."""
    import torch

    from .. import ops

    announce("cpu", "CPU kernel")
    ops.load()
    if device is not Device.cpu and torch.cuda.is_available():
        announce("cuda", "CUDA kernels")
        ops.load("cuda")


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


def check_use(fff: str, source: str, output: Path, overwrite: bool) -> None:
    """What can be told from the options alone."""
    from ..config import FFFConfig

    try:
        FFFConfig.from_shorthand(fff)
    except ValueError as error:
        raise bad_option("--fff", error) from error
    check_out(source, output, overwrite)


def check_out(source: str, output: Path, overwrite: bool) -> None:
    from ..files import check_output

    if Path(source).is_dir() and output.resolve() == Path(source).resolve():
        raise bad_option("OUT", ValueError(f"{output} is the source, which stays as it is: give another folder"))
    try:
        check_output(output, overwrite=overwrite)
    except OSError as error:
        raise bad_option("OUT", error) from error


def read_text(paths: list[Path] | None) -> list[str]:
    """The paragraphs of all files of ``--text``."""
    from ..surgery.text import read_texts

    try:
        for path in paths or []:
            if not path.is_file():
                raise ValueError(f"{path} is not a file")
        return [text for path in paths or [] for text in read_texts(path)]
    except (ValueError, OSError) as error:
        raise bad_option("--text", error) from error


def read_data(option: str, sources: list[str]) -> list[dict[str, Any]]:
    """The rows of all sources that an option names."""
    from ..tasks import read_rows

    try:
        return [row for source in sources for row in read_rows(source)]
    except FileNotFoundError as error:
        raise bad_option(option, ValueError(f"there is no file {error.filename}")) from error
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
        "layers": {str(i): c.shorthand for i, c in getattr(model.config, "fff_layers", {}).items()},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def how_to_open(output: Path) -> str:
    """Lines of Python, to be copied."""
    import transformers

    from ..surgery.folder import ModelFolder

    folder = ModelFolder.find(str(output))
    config = json.loads((folder.transformer / "config.json").read_text(encoding="utf-8"))
    head = re.search(r"For[A-Z]\w*$", (config.get("architectures") or [""])[0])
    names = [f"AutoModel{head[0]}" if head else "AutoModel", "AutoModel"]
    auto = next(name for name in names if hasattr(transformers, name))
    opened = [f"{auto}.from_pretrained({_quoted(folder.transformer)})"]
    imports = ["import hf_fff  # registers the Fast classes", f"from transformers import {auto}"]
    if (folder.root / "modules.json").is_file():
        imports.append("from sentence_transformers import SentenceTransformer")
        opened.append(f"SentenceTransformer({_quoted(folder.root)})")
    return "\n".join(["To open it, in Python:", *(f"    {line}" for line in imports + opened)])


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def command_line(context: typer.Context, **changed: Any) -> str:
    """The command as it was given, with other values of some parameters; to be copied."""
    words = ["hf-fff", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name not in changed and (source is None or source.name != "COMMANDLINE"):
            continue
        value = changed.get(name, context.params[name])
        values = value if isinstance(value, (list, tuple)) else [value]
        told = [str(v.value if isinstance(v, Enum) else v) for v in values]
        if parameter.param_type_name == "argument":
            words += told
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            words += [word for v in told for word in (parameter.opts[0], v)]
    return shlex.join(words)
