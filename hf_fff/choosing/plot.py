"""The frontier as a picture."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .results import Choice

_FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises ``ValueError`` where a picture cannot be drawn: better told before the search than after it."""
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path} must end in one of {', '.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise ValueError("this needs matplotlib, which is not installed: pip install hf-fff[bench]")


def plot(choice: Choice, path: Path) -> None:
    """What each trained candidate keeps, against its time, both as shares of the dense model's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.add_subplot()
    axes.axhline(choice.keep, color="0.6", linestyle="--", linewidth=1, label=f"asked: {choice.keep:g}")
    axes.plot([1], [1], "k*", markersize=11, label="dense")
    frontier = choice.frontier
    axes.plot([r.relative for r in frontier], [r.share for r in frontier], color="C0", linewidth=1, label="frontier")
    for result in (r for r in choice.results if r.share is not None):
        chosen = result is choice.chosen
        style = {"color": "C3" if chosen else "C0", "marker": "o", "capsize": 2, "linestyle": "none"}
        axes.errorbar([result.relative], [result.share], yerr=None if result.error is None else [result.error], **style)
        label = f"{result.name} (chosen)" if chosen else result.name
        axes.annotate(label, (result.relative, result.share), xytext=(5, -11), textcoords="offset points", fontsize=8)
    axes.set_xlabel("time / the dense model's (geometric mean over the batch sizes)")
    axes.set_ylabel(f"{choice.metric} / the dense model's, ± 1 standard error")
    axes.set_title(f"{choice.metric} on {choice.rows} held-out rows; dense {choice.dense['score']:.4f}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
