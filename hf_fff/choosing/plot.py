"""The frontier as a picture."""

from pathlib import Path
from typing import Any

from ..bench.plot import check_plot
from .results import Choice

__all__ = ["check_plot", "plot"]


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
