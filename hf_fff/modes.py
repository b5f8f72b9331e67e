"""Modes of modules that are put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .layers import FFF
from .ops import ROWS


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def rounded_rows(model: nn.Module, rows: str | None = "int8") -> Iterator[None]:
    """Within it, the trees of a model compute as those of ``optimize(model, rows)`` do, but on any device and with gradients.

    Rows of the weights and tokens are rounded as the packed layers have them, and so is what a token multiplies output rows by; gradients
    pass all rounding unchanged (straight-through). A model that is trained so is meant to lose less when it is packed, see
    ``packed_rows`` of the training's arguments. In float32 the outputs are those of the packed layers, but for the last bits of
    their sums. Weights stay what they are.

    Args:
        model: any module with ``FFF`` layers.
        rows: "int8" or "bf16"; None changes nothing.

    Raises:
        ValueError: ``rows`` is not known, or there are no trees in the model.
    """
    if rows is not None and rows not in ROWS:
        raise ValueError(f"rows={rows!r} is not known (allowed: {', '.join(ROWS)}, None)")
    trees = [module for module in model.modules() if isinstance(module, FFF)]
    if rows is not None and not trees:
        raise ValueError(f"rows={rows!r} is of trees, and there are none in this {type(model).__name__}")
    before = [tree.rows for tree in trees]
    for tree in trees:
        tree.rows = tree.rows if rows is None else rows
    try:
        yield
    finally:
        for tree, own in zip(trees, before, strict=True):
            tree.rows = own
