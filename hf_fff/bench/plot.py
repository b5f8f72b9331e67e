"""Measurements as pictures, from the JSON that the commands write."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from ..files import atomic_file
from .shapes import PAIRS

_FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises ``ValueError`` where a picture cannot be drawn: better told before the search than after it."""
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path} must end in one of {', '.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise ValueError("this needs matplotlib, which is not installed: pip install hf-fff[bench]")


def plot(told: Mapping[str, Any], path: Path) -> None:
    """Draws what a command told; ``told["command"]`` says which."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    _DRAW[told["command"]](told, figure.add_subplot())
    with atomic_file(path) as work:
        figure.savefig(work, dpi=120)


def _layer(told: Mapping[str, Any], axes: Any) -> None:
    def line(row: Mapping[str, Any]) -> str:
        weights = "" if row["weights"] == "random" else f", {row['weights']}"
        return f"{row['fff']}, H = {row['hidden_size']}, {row['dtype']}, threads {row['threads']}{weights}"

    for name, of in groupby(sorted(told["rows"], key=line), key=line):
        rows = sorted(of, key=lambda row: row["tokens"])
        times = [row["loop"] or row["forward"] for row in rows]
        axes.plot([row["tokens"] for row in rows], [t["dense"] / t["fff"] for t in times], marker="o", label=name)
    _finish(axes, "tokens", "times as fast as a dense layer of as many neurons")


def _frontier(told: Mapping[str, Any], axes: Any) -> None:
    threads = max(row["threads"] for row in told["rows"])
    shown = [row for row in told["rows"] if row["threads"] == threads]
    for i, fff in enumerate(dict.fromkeys(row["fff"] for row in shown)):
        of = sorted((row for row in shown if row["fff"] == fff), key=lambda row: row["tokens"])
        rival = PAIRS.get(fff)
        for name, where, style in (("int8 rows", "loop", "-"), ("int8 rows", "engine", "--"), (rival, "engine", ":")):
            rows = [row for row in of if name in row[where]]
            label = f"{fff if name != rival else f'{rival}, int8, for {fff}'}{', in a loop' if where == 'loop' else ', a call of OpenVINO'}"
            times = [row[where][name] / row["tokens"] for row in rows]
            axes.plot([row["tokens"] for row in rows], times, style, color=f"C{i}", marker="o", label=label)
    _finish(axes, "tokens", f"µs a token, {threads} thread{'s' * (threads > 1)}")


def _scaling(told: Mapping[str, Any], axes: Any) -> None:
    threads = max(row["threads"] for row in told["rows"])
    rows = [row for row in told["rows"] if row["threads"] == threads and row["name"] != "paper"]
    for i, tokens in enumerate(sorted({row["tokens"] for row in rows})):
        of = [row for row in rows if row["tokens"] == tokens]
        sizes = [row["hidden_size"] for row in of]
        label = f"{tokens} token{'s' * (tokens > 1)}"
        axes.plot(sizes, [row["speedup"] for row in of], color=f"C{i}", marker="o", label=label)
        axes.plot(sizes, [row["roofline"] for row in of], color=f"C{i}", linestyle=":", linewidth=1)
    of = sorted({(row["hidden_size"], row["theory"]) for row in rows})
    axes.plot(*zip(*of, strict=True), color="k", linestyle="--", label="neurons of the dense layer / used")
    axes.plot([], [], color="0.5", linestyle=":", label="what memory permits")
    _finish(axes, "hidden size", f"times as fast as the dense layer, {threads} threads")


def _model(told: Mapping[str, Any], axes: Any) -> None:
    rows = told["rows"]
    names = list(rows[0]["seconds"])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [k + (i - (len(names) - 1) / 2) * width for k in range(len(rows))]
        axes.bar(at, [1 / row["ratios"][name] for row in rows], width, label=name)
    axes.set_xticks(range(len(rows)), [row["workload"] for row in rows])
    axes.set_ylabel(f"times as fast as {names[0]}")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=7)


def _serve(told: Mapping[str, Any], axes: Any) -> None:
    systems = list(dict.fromkeys((row["engine"], row["model"]) for row in told["rows"]))
    shapes = list(dict.fromkeys(row["workload"] for row in told["rows"]))
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        of = [row for row in told["rows"] if (row["engine"], row["model"]) == system]
        at = [k + (i - (len(systems) - 1) / 2) * width for k in range(len(shapes))]
        axes.bar(at, [row["to_openvino"] or 0.0 for row in of], width, label=" ".join(system))
    axes.axhline(1, color="k", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("times as fast as the dense model in OpenVINO int8")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=6)


def _cuda(told: Mapping[str, Any], axes: Any) -> None:
    from .cuda import lines

    def name(row: Mapping[str, Any]) -> str:
        return f"{row['fff']}, {row['dtype']}, {row['section']}"

    rows = [row for row in lines(told) if not row["routing"]]
    for label, of in groupby(sorted(rows, key=name), key=name):
        some = sorted(
            (row["tokens"], row[first]) for row in of for first in [n for n in row if n.startswith("dense:")][:1]
        )
        axes.plot(*zip(*some, strict=True), marker="o", label=label)
    _finish(axes, "tokens", "times as fast as the dense layer")


def _finish(axes: Any, x: str, y: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=6)


_DRAW = {
    "layer": _layer,
    "frontier": _frontier,
    "scaling": _scaling,
    "model": _model,
    "serve": _serve,
    "cuda": _cuda,
}


def csv_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of the columns, and a line for each row; what is not known is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [names, *(["" if row.get(n) is None else str(row[n]) for n in names] for row in rows)]
