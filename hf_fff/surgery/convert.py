"""``convert_ffn_to_fff``: a model with fast feedforward networks from a dense one."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..config import LayersLike, layers_to_json, resolve_layers
from ..layers import feedforward
from ..models import FAMILIES, FAST_CLASSES, FFNInterface
from .calibration import Calibration, calibrate
from .initialise import init_from_dense

INITS = ("dense", "random")


def convert_ffn_to_fff(
    model: Any,
    config: LayersLike,
    *,
    target_layers: Iterable[int] | None = None,
    init: str = "dense",
    calibration: Any = None,
    seed: int = 0,
) -> Any:
    """Returns a model of the registered Fast class in which FFNs are replaced by FFFs. The input model keeps working, bit
    for bit: what is neither replaced nor fitted is shared with it, not copied, so training one trains the other's attention too.

    Args:
        model: a transformers model of a known family, with any head.
        config: an ``FFFConfig``, ``"KxD"`` such as ``"8x8"`` (or a control, ``"mlp:72"`` or ``"none"``), or a dict from layer number to such a config. A shorthand
            takes the model's own activation.
        target_layers: which layers; all by default.
        init: first values: "dense" draws each node from the dense neurons and matches the size of the output, "random" does
            not look at them. Calibration starts from either's directions.
        calibration: a ``Calibration``, or what its ``data`` may be (texts, pairs of texts, tensors). Without it the model has
            forgotten what it knew, and a warning says so.
        seed: of the first values; a ``Calibration`` has its own.

    Returns:
        The converted model; with a calibration, its ``calibration_report`` says what was reached.

    Raises:
        ValueError: an unknown model, a model that is already converted, layers that do not exist, an ``FFFConfig`` out of
            range, an activation that the operator lacks, calibration data that is empty.
    """
    family, fast_class = _fast_class_of(model)
    if init not in INITS:
        raise ValueError(f"init={init!r} is not known (allowed: {', '.join(INITS)})")
    plan = calibration if isinstance(calibration, (type(None), Calibration)) else Calibration(calibration)
    dense_blocks = family.blocks(model.base_model)
    num_layers = len(dense_blocks)
    layers = resolve_layers(config, num_layers, target_layers, activation=getattr(model.config, family.activation))

    fast = _skeleton(model, fast_class, layers_to_json(layers, num_layers))
    _share_modules(model, fast)
    generator = torch.Generator().manual_seed(seed)
    for index, block in enumerate(family.blocks(fast.base_model)):
        if index not in layers:
            continue
        dense_in, dense_out = (dense_blocks[index].get_submodule(n) for n in (family.dense_in, family.dense_out))
        like = {"device": dense_out.weight.device, "dtype": dense_out.weight.dtype}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + index)
            ffn = feedforward(dense_out.weight.shape[0], layers[index], **like)
        block.set_submodule(family.ffn_in, ffn.train(block.training))
        if init == "dense":
            init_from_dense(ffn, dense_in, dense_out, dense_blocks[index].get_submodule(family.input_norm), generator)
        bias = dense_out.bias if plan is None else nn.Parameter(dense_out.bias.detach().clone())
        block.get_submodule(family.dense_out).bias = bias
    if plan is None:
        warnings.warn(
            "the converted model is not calibrated: it has lost what its FFNs knew. Pass calibration=texts, or train it.",
            stacklevel=2,
        )
    else:
        fast.calibration_report = calibrate(fast, model, family, layers, plan)
    return fast


def _fast_class_of(model: Any) -> tuple[FFNInterface, Any]:
    config = getattr(model, "config", None)
    if (fff := getattr(config, "fff", None)) is not None:
        raise ValueError(f"the model is already converted ({type(model).__name__} with fff={fff})")
    family, fast_class = FAMILIES.get(getattr(config, "model_type", "")), FAST_CLASSES.get(type(model))
    if family is None or fast_class is None:
        raise ValueError(
            f"no known feedforward networks in {type(model).__name__} (model_type={getattr(config, 'model_type', None)!r}); "
            f"known families: {', '.join(FAMILIES)}; known classes: {', '.join(c.__name__ for c in FAST_CLASSES)}"
        )
    return family, fast_class


def _skeleton(model: Any, fast_class: Any, fff: dict[str, Any]) -> Any:
    """The Fast model without weights (on the meta device), set up as ``model`` is."""
    own = ("model_type", "architectures", "transformers_version")
    fields = {k: v for k, v in model.config.to_dict().items() if k not in own}
    config = fast_class.config_class(**fields, fff=fff)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        kwargs = {"add_pooling_layer": False} if getattr(model, "pooler", 0) is None else {}
        fast = fast_class(config, **kwargs)
    fast.name_or_path = model.name_or_path
    fast.generation_config = getattr(model, "generation_config", None)
    return fast.train(model.training)


def _share_modules(model: nn.Module, fast: nn.Module) -> None:
    """Gives ``fast`` the parameters and buffers of ``model`` themselves, wherever both have them."""
    sources = dict(model.named_modules())
    for name, module in fast.named_modules():
        source = sources.get(name)
        if source is None or not isinstance(module, type(source)):
            continue
        module._parameters.update(source._parameters)
        module._buffers.update(source._buffers)
        module.training = source.training
