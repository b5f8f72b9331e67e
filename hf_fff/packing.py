"""``optimize``: a converted model for inference on a CPU."""

import copy
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.utils import parametrize

from .adapters import check_not_adapted
from .layers import FFF, PackedFFF
from .ops import ROWS

_SAVES = ("save_pretrained", "save", "push_to_hub", "save_to_hub")


def optimize(model: Any, rows: str = "int8") -> Any:
    """Returns a copy of a converted model for inference on a CPU, in evaluation mode, with packed trees.

    Each ``FFF`` becomes a ``PackedFFF``: frozen, with rows of a quarter ("int8") or half ("bf16") of float32's bytes. All
    other weights are shared with ``model``, which stays as it was. What ``model``'s trees learn afterwards, the copy does not
    know: optimize again. Small dense networks and layers without one (``"mlp:WIDTH"``, ``"none"``) stay as they are.

    The copy is neither trained, saved by ``save_pretrained``, nor moved to a GPU: save ``model``, and optimize it after loading. Its
    ``state_dict`` can be saved and loaded into another copy that was packed alike.

    Args:
        model: a model from ``convert_ffn_to_fff`` or ``from_pretrained``; what holds one, as a ``SentenceTransformer``; any
            module with ``FFF`` layers.
        rows: "int8" is the faster, "bf16" the closer to float32.

    Raises:
        ValueError: ``rows`` is not known; there are no trees in the model; they are on another device than the CPU, hold
            numbers that are not finite, or are adapted (PEFT) or quantised.
    """
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r} is not known (allowed: {', '.join(ROWS)})")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, not a module")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FFF)}
    if not layers:
        packed = any(isinstance(m, PackedFFF) for m in model.modules())
        what = "its trees are packed already" if packed else "convert_ffn_to_fff puts them there"
        raise ValueError(f"there are no FFF layers in this {type(model).__name__}: {what}")
    check_not_adapted(model, "optimize")
    for name, layer in layers.items():
        _check_plain(name, layer)
    known: dict[int, Any] = {id(layer): PackedFFF.of(layer, rows) for layer in layers.values()}
    known |= {id(t): t for t in chain(model.parameters(), model.buffers())}
    fast = copy.deepcopy(model, known).eval()
    for module in fast.modules():
        for name in _SAVES:
            if callable(getattr(type(module), name, None)):
                setattr(module, name, _refuse_to_save)
    return fast


def _check_plain(name: str, layer: FFF) -> None:
    if parametrize.is_parametrized(layer):
        raise ValueError(f"the weights of {name} are parametrized: remove_parametrizations first")
    for field in ("weight_in", "bias_in", "weight_out"):
        weight = getattr(layer, field)
        kind = type(weight.data)
        if kind is not torch.Tensor or not weight.is_floating_point():
            raise ValueError(f"{name}.{field} is a {kind.__name__} of {weight.dtype}: quantised trees cannot be packed")
        if weight.device.type != "cpu":
            raise ValueError(
                f"{name}.{field} is on {weight.device}, and packed layers are for the CPU: move the model there first"
            )


def _refuse_to_save(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "a model from hf_fff.optimize is not saved: save the model that was optimized, and optimize it again after loading. "
        "(torch.save of its state_dict() works, for a copy that was packed alike.)"
    )
