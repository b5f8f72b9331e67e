"""``optimize``: a converted model for inference on a CPU."""

import copy
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.utils import parametrize

from .adapters import check_not_adapted
from .layers import FFF, LINEARS, MLP, Packed, PackedFFF, PackedLinear, PackedMLP
from .layers.linear import why_not
from .ops import ROWS

_SAVES = ("save_pretrained", "save", "push_to_hub", "save_to_hub")


def optimize(model: Any, rows: str = "int8", linears: str | None = None) -> Any:
    """Returns a copy of a converted model for inference on a CPU, in evaluation mode, with packed trees.

    Each ``FFF`` becomes a ``PackedFFF``: frozen, with rows of a quarter ("int8") or half ("bf16") of float32's bytes. With
    ``linears`` all that is dense, attention above all, becomes a ``PackedLinear`` too: small dense networks (``"mlp:WIDTH"``) and
    every ``nn.Linear``; without, it stays as it is. All other weights are shared with ``model``, which stays as it was. What ``model``
    learns afterwards, the copy does not know: optimize again.

    The copy is neither trained, saved by ``save_pretrained``, nor moved to a GPU: save ``model``, and optimize it after loading. Its
    ``state_dict`` can be saved and loaded into another copy that was packed alike.

    Args:
        model: a model from ``convert_ffn_to_fff`` or ``from_pretrained``; what holds one, as a ``SentenceTransformer``; any
            module with ``FFF`` layers. With ``linears`` it may have none.
        rows: of the trees: "int8" is the faster, "bf16" the closer to float32.
        linears: "bf16", where the CPU has bfloat16 instructions the faster and the closer to float32; "int8", with scales of each token,
            for a CPU that has those for int8 alone; None leaves float32.

    Raises:
        ValueError: ``rows`` or ``linears`` is not known; there is nothing in the model to pack; it is on another device than the CPU,
            holds numbers that are not finite, or is adapted (PEFT) or quantised.
        RuntimeError: this CPU, or this build of PyTorch, cannot compute such ``linears``.
    """
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r} is not known (allowed: {', '.join(ROWS)})")
    if linears is not None and linears not in LINEARS:
        raise ValueError(f"linears={linears!r} is not known (allowed: {', '.join(LINEARS)}, None)")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, not a module")
    if any(isinstance(m, Packed) for m in model.modules()):
        raise ValueError(f"this {type(model).__name__} is packed already: optimize the model that it was made from")
    dense = (nn.Linear, MLP) if linears else ()
    # Of just these types: who made another of an nn.Linear looks at its weight.
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FFF) or type(m) in dense}
    if not layers:
        raise ValueError(f"there are no FFF layers in this {type(model).__name__}: convert_ffn_to_fff puts them there")
    check_not_adapted(model, "optimize")
    for name, layer in layers.items():
        _check_plain(name, layer)
    if linears and (why := why_not(linears)):
        raise RuntimeError(f"linears={linears!r} does not work here: {why}")
    known: dict[int, Any] = {id(layer): _packed(layer, rows, linears) for layer in layers.values()}
    known |= {id(t): t for t in chain(model.parameters(), model.buffers())}
    fast = copy.deepcopy(model, known).eval()
    for module in fast.modules():
        for name in _SAVES:
            if callable(getattr(type(module), name, None)):
                setattr(module, name, _refuse_to_save)
    return fast


def _packed(layer: nn.Module, rows: str, linears: str | None) -> nn.Module:
    if isinstance(layer, FFF):
        return PackedFFF.of(layer, rows)
    assert linears is not None
    if isinstance(layer, MLP):
        return PackedMLP(layer, linears)
    return PackedLinear(layer.weight, layer.bias, linears)  # type: ignore[arg-type]


def _check_plain(name: str, layer: nn.Module) -> None:
    if parametrize.is_parametrized(layer):
        raise ValueError(f"the weights of {name} are parametrized: remove_parametrizations first")
    for field, weight in layer.named_parameters(recurse=False):
        kind = type(weight.data)
        if kind is not torch.Tensor or not weight.is_floating_point():
            raise ValueError(
                f"{name}.{field} is a {kind.__name__} of {weight.dtype}: quantised weights cannot be packed"
            )
        if weight.device.type != "cpu":
            raise ValueError(
                f"{name}.{field} is on {weight.device}, and packed layers are for the CPU: move the model there first"
            )
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name}.{field} is not finite: it cannot be packed")


def _refuse_to_save(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "a model from hf_fff.optimize is not saved: save the model that was optimized, and optimize it again after loading. "
        "(torch.save of its state_dict() works, for a copy that was packed alike.)"
    )
