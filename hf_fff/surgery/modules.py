"""Any ``nn.Module``: feedforward networks that a pattern names, and their saving with an explicit recipe."""

import copy
import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from ..config import FORMAT_VERSION, FFFConfig, LayersLike, resolve_layers
from ..files import atomic_files
from ..layers import FeedforwardBlock, OutputBias, Packed, feedforward
from ..modes import evaluating
from ..ops.torch_backend import activation_functions
from .calibration import Calibration, calibrate_alone
from .dense import DenseNeurons
from .initialise import init_from_dense

_RECIPE, _WEIGHTS = "fff.json", "model.safetensors"
_ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "identity")


def convert_modules(
    module: nn.Module,
    config: LayersLike,
    pattern: str,
    *,
    target_layers: Iterable[int] | None = None,
    init: str = "dense",
    calibration: Calibration | None = None,
    seed: int = 0,
) -> Any:
    """``convert_ffn_to_fff`` with ``ffn=pattern``: see there."""
    names = _matching(module, pattern)
    sizes = {name: _checked_size(module, name, pattern) for name in names}
    dense = {name: _recognised(module.get_submodule(name), size) for name, size in sizes.items()}
    activation = next((found[1] for found in dense.values() if found is not None), "gelu")
    layers = resolve_layers(config, len(names), target_layers, activation=activation)
    chosen = {names[i]: layers[i] for i in layers}

    shared = {id(t): t for t in chain(module.parameters(), module.buffers())}
    fast: Any = copy.deepcopy(module, shared)
    generator = torch.Generator().manual_seed(seed)
    neurons: dict[str, DenseNeurons | None] = {}
    for number, (name, one) in enumerate(chosen.items()):
        old, found = module.get_submodule(name), dense[name]
        neurons[name] = None if found is None else found[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            block = _block(old, sizes[name], one).train(old.training)
        if found is not None and init == "dense":
            init_from_dense(block.ffn, found[0], None, generator)
        if found is not None and found[0].bias_out is not None:
            bias = found[0].bias_out
            block.output.bias = bias if calibration is None else nn.Parameter(bias.detach().clone())
        fast.set_submodule(name, block)
    if calibration is not None:
        fast.calibration_report = calibrate_alone(fast, module, chosen, neurons, calibration)
    return fast


def save_fff(module: nn.Module, folder: str | Path) -> None:
    """Saves a module that ``convert_ffn_to_fff(..., ffn=pattern)`` has made: its weights, and in ``fff.json`` what stands where.

    Raises:
        ValueError: nothing in it is converted, or it is packed.
    """
    blocks = {name: m for name, m in module.named_modules() if isinstance(m, FeedforwardBlock)}
    if packed := [name for name, m in module.named_modules() if isinstance(m, Packed)]:
        raise ValueError(
            f"{packed[0]} is packed: save the module that was optimized, and optimize it again after loading"
        )
    if not blocks:
        raise ValueError(
            f"no feedforward network of this {type(module).__name__} is converted: there is nothing to save"
        )
    modules = {n: {"hidden_size": b.ffn.hidden_size, "fff": b.ffn.config.to_dict()} for n, b in blocks.items()}
    with atomic_files(Path(folder)) as work:
        save_model(module, str(work / _WEIGHTS))
        (work / _RECIPE).write_text(
            json.dumps({"version": FORMAT_VERSION, "modules": modules}, indent=2) + "\n", "utf-8"
        )


def load_fff(module: nn.Module, folder: str | Path) -> Any:
    """Loads what ``save_fff`` has saved into a dense module of the same make, which is changed and returned.

    Raises:
        FileNotFoundError: there is no recipe in the folder.
        ValueError: the recipe is of a newer format, or names parts that the module does not have.
        RuntimeError: the weights are not those of the module.
    """
    recipe = json.loads((Path(folder) / _RECIPE).read_text(encoding="utf-8"))
    if recipe.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder}/{_RECIPE} has version={recipe.get('version')!r}; this hf_fff reads {FORMAT_VERSION}"
        )
    known = dict(module.named_modules())
    if missing := sorted(set(recipe["modules"]) - set(known)):
        raise ValueError(f"this {type(module).__name__} has no {', '.join(missing)}, which {folder}/{_RECIPE} names")
    for name, part in recipe["modules"].items():
        old = known[name]
        block = _block(old, part["hidden_size"], FFFConfig.from_dict(part["fff"])).train(old.training)
        module.set_submodule(name, block)
    load_model(module, str(Path(folder) / _WEIGHTS))
    return module


def _block(old: nn.Module, size: int, config: FFFConfig) -> FeedforwardBlock:
    like = next(old.parameters())
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    return FeedforwardBlock(feedforward(size, config, **options), OutputBias(size, **options))


def _matching(module: nn.Module, pattern: str) -> list[str]:
    """The modules that a pattern names, in their order; "*" stands for one part of a path."""
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"[^.]*"))
    found = [name for name, part in module.named_modules() if name and wanted.fullmatch(name)]
    if any(isinstance(module.get_submodule(name), FeedforwardBlock) for name in found):
        raise ValueError(f"what ffn={pattern!r} names is already converted")
    if found:
        return found
    likely = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in _candidates(module))
    hint = f"; likely: {', '.join(list(likely)[:6])}" if likely else ""
    raise ValueError(f"ffn={pattern!r} names no part of {type(module).__name__}{hint}")


def _candidates(module: nn.Module) -> list[str]:
    """Parts that look like feedforward networks and hold no such part."""
    parts = [(n, part) for n, part in module.named_modules() if n and _linear_layers(part) > 1]
    names = [name for name, part in parts if _size(part) is not None]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def _linear_layers(part: nn.Module) -> int:
    return sum(isinstance(m, nn.Linear) for m in part.modules())


def _checked_size(module: nn.Module, name: str, pattern: str) -> int:
    part = module.get_submodule(name)
    size = _size(part) if _linear_layers(part) != 1 else None
    if size is None:
        raise ValueError(
            f"{name}, which ffn={pattern!r} names, is a {type(part).__name__} and no feedforward network: of none of the sizes "
            f"of its linear layers does it take [..., size] and give [..., size] ({', '.join(map(str, _sizes(part))) or 'it has none'})"
        )
    return size


def _sizes(part: nn.Module) -> list[int]:
    return list(dict.fromkeys(m.in_features for m in part.modules() if isinstance(m, nn.Linear)))


def _size(part: nn.Module) -> int | None:
    """The size of what a module takes and gives, by trying."""
    for size in _sizes(part):
        x = torch.zeros(1, 2, size).to(next(part.parameters()))
        y = _tried(part, x)
        if y is not None and y.shape == x.shape:
            return size
    return None


def _tried(part: nn.Module, x: Tensor) -> Tensor | None:
    with evaluating(part):
        try:
            y = part(x)
        except Exception:  # whatever it is, it is no feedforward network
            return None
    return y if torch.is_tensor(y) else None


def _recognised(part: nn.Module, size: int) -> tuple[DenseNeurons, str] | None:
    """The neurons and the activation of an FFN of two or three linear layers, if it computes what such a one does."""
    linear = [m for m in part.modules() if type(m) is nn.Linear]
    ins = [m for m in linear if m.in_features == size]
    outs = [m for m in linear if m.out_features == size and m not in ins[:-1]]
    if len(linear) not in (2, 3) or len(ins) != len(linear) - 1 or len(outs) != 1:
        return None
    x = torch.randn(8, size, generator=torch.Generator().manual_seed(0)).to(next(part.parameters()))
    want = _tried(part, x)
    if want is None:
        return None
    down = outs[0]
    for first, *rest in (ins, ins[::-1]):
        gate = (rest[0].weight, rest[0].bias) if rest else (None, None)
        neurons = DenseNeurons(first.weight, first.bias, down.weight.T, down.bias, *gate)
        for name in _ACTIVATIONS:
            with torch.no_grad():
                got = neurons.values(x, activation_functions(name)[0]) @ neurons.weight_out
                got = got if down.bias is None else got + down.bias
            if torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())):
                return neurons, name
    return None
