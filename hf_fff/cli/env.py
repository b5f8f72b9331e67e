"""``hf-fff env`` and ``hf-fff build``."""

import json
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, Overwrite, app, bad_option, err, must_compile, out, reports_errors, table_of


@app.command()
@reports_errors
def env(
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed", help="Instead, what a training would run on: under `accelerate launch`, or by its config."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what is installed, which kernels run, and why; and what is slow or missing here."""
    if distributed:
        _tell_processes(as_json)
        return
    from ..bench.machine import report

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="hf_fff: ")  # the same is told below
        facts = report()
    problems = _problems(facts, _no_gpu())
    if as_json:
        print(json.dumps({**facts, "problems": problems}, indent=2))
        return
    table = table_of("what", "value", show_header=False)
    for label, value in _rows(facts):
        table.add_row(label, value)
    out.print(table)
    for problem in problems:
        out.print(f"- {problem}", soft_wrap=True)
    if not problems:
        out.print("Nothing is slow or missing.")


def _tell_processes(as_json: bool) -> None:
    """Of several processes, the first one does."""
    from ..training.processes import what_would_run

    told = what_would_run()
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(told, indent=2))
        return
    table = table_of("what", "value", show_header=False)
    labels = {
        "told_by": "told by",
        "how": "runs as",
        "mixed_precision": "mixed precision, unless bf16 or fp16 are given",
    }
    for name, value in told.items():
        if name != "notes":
            table.add_row(labels.get(name, name), "\n".join(value) if isinstance(value, list) else str(value or "none"))
    out.print(table)
    for note in told["notes"]:
        out.print(f"- {note}", soft_wrap=True)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Labels in plain words, and what stands beside them."""
    kernels, backend, packages = facts["kernels"], facts["backend"], facts["packages"]
    library = kernels["libraries"]["cpu"]
    runs = "PyTorch" if backend["cpu"] == "torch" else f"C++ kernel, {backend['isa']}"
    absent = "not installed"
    rows = [
        ("hf_fff", facts["hf_fff"]),
        ("Python", f"{facts['python']}, {facts['platform']}"),
        *((name, version) for name, version in packages.items() if version != absent),
        ("not installed, and optional", ", ".join(name for name, version in packages.items() if version == absent)),
        ("processor", f"{facts['cpu']['name']}, {facts['cpu']['threads']} threads used"),
        ("its features", " ".join(kernels["cpu_features"])),
        ("GPU", facts["cuda"]),
        ("what FFFs run in, on the CPU", runs),
        ("kernel library", _library(library)),
        ("C++ compiler", f"{library['compiler']}\n{library.get('version', '')}".strip()),
        ("kernel sources", kernels["sources"]),
        ("kernel cache", kernels["cache"]),
        *((f"{name}, as set", value) for name, value in sorted(os.environ.items()) if name.startswith("HF_FFF_")),
    ]
    return [(label, value) for label, value in rows if value]


def _library(library: dict[str, Any]) -> str:
    if not library.get("loaded"):
        return "not loaded"
    return f"{library['path']}\n({library['origin']})"


def _problems(facts: dict[str, Any], no_gpu: str | None) -> list[str]:
    """What is slow or missing, why, and what to do."""
    backend, library = facts["backend"], facts["kernels"]["libraries"]["cpu"]
    reason = library.get("reason") or ""
    told = []
    if backend["cpu"] == "torch":
        told.append(
            f"FFFs run in PyTorch on this CPU, which is slower than the C++ kernel: {reason or library['status']}"
        )
    elif reason:
        told.append(f"The C++ kernel: {reason}")
    if library["compiler"].startswith("none") and "compiler" not in reason:
        told.append(f"Kernels cannot be compiled here: {library['compiler'].removeprefix('none: ')}")
    if backend["cpu"] != "torch" and backend["isa"] == "baseline":
        why = "HF_FFF_ISA says so" if os.environ.get("HF_FFF_ISA") else "this processor has no AVX2"
        told.append(f"The C++ kernel runs without vector instructions, slowly: {why}.")
    if no_gpu:
        told.append(f"No GPU is used, so that distilling is slow: {no_gpu}")
    return told


def _no_gpu() -> str | None:
    """Why there is none; None where there is one."""
    import torch

    if torch.cuda.is_available():
        return None
    if not (torch.version.cuda or torch.version.hip):
        return f"this PyTorch ({torch.__version__}) is built for CPUs alone."
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides them all."
    return (
        f"PyTorch ({torch.__version__}) finds none: there is none in this machine, or its driver is missing or older than "
        "this PyTorch wants (see nvidia-smi)."
    )


@app.command()
@reports_errors
def build(
    output: Annotated[Path | None, typer.Option(help="Folder to put the library in, for HF_FFF_KERNEL_PATH.")] = None,
    force: Annotated[bool, typer.Option(help="Build even if there is one already.")] = False,
    kernel_layout: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the kernel as a project of kernel-builder, built for this machine."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Build the CPU kernel now instead of on its first use; or write it as a kernel of the Hub, for the package kernels."""
    from dataclasses import asdict

    from ..ops import loader

    if kernel_layout is not None:
        _write_layout(kernel_layout, output, overwrite, as_json)
        return
    if force or must_compile():
        err.print("compiling the CPU kernel: this takes some seconds")
    status = loader.build("cpu", force=force, output=output)
    if as_json:
        print(json.dumps(asdict(status), indent=2, default=str))
    elif status.loaded:
        out.print(f"{status.path} ({status.origin})", soft_wrap=True)
    if not status.loaded:
        raise RuntimeError(status.reason)


def _write_layout(folder: Path, output: Path | None, overwrite: bool, as_json: bool) -> None:
    from ..hub.kernel import write_layout

    if output is not None:
        raise bad_option("--output", ValueError("is of the library alone, and --kernel-layout writes another folder"))
    err.print("compiling the CPU kernel: this takes some seconds")
    built = write_layout(folder, overwrite=overwrite)
    if as_json:
        print(json.dumps({"folder": str(folder), "variant": built.name}, indent=2))
        return
    lines = ["from pathlib import Path", "from kernels import get_local_kernel"]
    lines.append(f"kernel = get_local_kernel(Path({json.dumps(str(folder), ensure_ascii=False)}))")
    out.print("\n    ".join([f"{built}\nTo load it, in Python:", *lines]), soft_wrap=True)
