"""``hf-fff env`` and ``hf-fff build``."""

import json
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, Overwrite, announce, app, bad_option, err, must_compile, out, reports_errors, table_of


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

    announce("cpu", "CPU kernel")
    announce("cuda", "CUDA kernels")
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
    on_gpu = kernels["libraries"].get("cuda", {}) if backend.get("cuda") else {}
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
        ("C++ compiler", _compiler(library)),
        ("what FFFs run in, on the GPU", _ON_GPU.get(backend.get("cuda"), "")),
        *((f"{name} (BERT-base, bf16)", _ways(ways)) for name, ways in facts.get("gpu_ways", {}).items()),
        *([("CUDA kernel library", _library(on_gpu)), ("CUDA compiler", _compiler(on_gpu))] if on_gpu else []),
        ("kernel sources", kernels["sources"]),
        ("kernel cache", kernels["cache"]),
        *((f"{name}, as set", value) for name, value in sorted(os.environ.items()) if name.startswith("HF_FFF_")),
    ]
    return [(label, value) for label, value in rows if value]


_ON_GPU = {"native": "CUDA kernels", "triton": "Triton kernels", "torch": "PyTorch", "nothing": "nothing"}


def _ways(ways: dict[str, str]) -> str:
    """Such as "tiles: 1x11; dense: 8x8, 32x6"."""
    found: dict[str, list[str]] = {}
    for fff, way in ways.items():
        found.setdefault(way, []).append(fff)
    return "; ".join(f"{way}: {', '.join(of)}" for way, of in found.items())


def _compiler(library: dict[str, Any]) -> str:
    return f"{library['compiler']}\n{library.get('version', '')}".strip()


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
    told += _gpu_problems(backend.get("cuda"), facts["kernels"]["libraries"].get("cuda", {}))
    if no_gpu:
        told.append(f"No GPU is used, so that distilling is slow: {no_gpu}")
    return told


def _gpu_problems(runs: str | None, library: dict[str, Any]) -> list[str]:
    if runs is None or (runs == "native" and not library.get("reason")):
        return []
    reason = library.get("reason") or library.get("status")
    if runs == "native":
        return [f"The CUDA kernels: {reason}"]
    if runs == "nothing":
        return [f"FFFs do not run on this GPU: HF_FFF_BACKEND=native, and the CUDA kernels cannot be loaded: {reason}"]
    return [f"FFFs run in {_ON_GPU[runs]} on this GPU, not in the CUDA kernels: {reason}"]


def _no_gpu() -> str | None:
    """Why there is none; None where there is one."""
    from .. import ops

    return ops.no_gpu()


@app.command()
@reports_errors
def build(
    output: Annotated[Path | None, typer.Option(help="Folder to put the library in, for HF_FFF_KERNEL_PATH.")] = None,
    cuda: Annotated[bool, typer.Option("--cuda", help="The CUDA kernels, by nvcc; needs no GPU.")] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            help="With --cuda: GPUs to build for, comma-separated, such as 80,90 or 8.0,sm_90; all by default."
        ),
    ] = None,
    force: Annotated[bool, typer.Option(help="Build even if there is one already.")] = False,
    kernel_layout: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the kernel as a project of kernel-builder, built for this machine."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Build the CPU kernel, or the CUDA kernels, now instead of on its first use; or write it as a kernel of the Hub, for the package kernels."""
    from dataclasses import asdict

    from ..ops import loader

    if kernel_layout is not None:
        if cuda:
            raise bad_option(
                "--cuda", ValueError("does not go with --kernel-layout, which writes the kernel of the CPU")
            )
        _write_layout(kernel_layout, output, overwrite, as_json)
        return
    if arch is not None and not cuda:
        raise bad_option("--arch", ValueError("belongs to --cuda"))
    try:
        targets = loader.check_targets(arch.split(",") if arch is not None else ())
    except ValueError as error:
        raise bad_option("--arch", error) from error
    if cuda:
        err.print(
            f"compiling the CUDA kernels, unless they are there: this takes {loader.LIBRARIES['cuda'].tools.takes}"
        )
    elif force or must_compile():
        err.print("compiling the CPU kernel: this takes some seconds")
    status = loader.build("cuda" if cuda else "cpu", force=force, output=output, targets=targets)
    if as_json:
        print(json.dumps(asdict(status), indent=2, default=str))
    elif status.path is not None:
        out.print(f"{status.path} ({status.origin})", soft_wrap=True)
    if status.path is None:
        raise RuntimeError(status.reason)
    if status.reason and not status.loaded:
        err.print(f"built, and not loaded here: {status.reason}")


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
