"""``convert_ffn_to_fff``: a model with fast feedforward networks from a dense one."""

import copy
import warnings
from collections.abc import Iterable
from dataclasses import replace
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import LayersLike, layers_to_json, resolve_layers
from ..models import FAMILIES, FFN, FFNInterface, fast_class, known_types
from ..models.classes import heads
from .calibration import Calibration, calibrate
from .dense import DenseNeurons
from .initialise import init_from_dense
from .modules import convert_modules

INITS = ("dense", "random")
_ANY_MODULE = 'In any module, ffn="encoder.layers.*.mlp" says which parts to replace.'


def convert_ffn_to_fff(
    model: Any,
    config: LayersLike,
    *,
    ffn: str | None = None,
    target_layers: Iterable[int] | None = None,
    init: str = "dense",
    calibration: Any = None,
    seed: int = 0,
) -> Any:
    """Returns a model of the registered Fast class in which FFNs are replaced by FFFs. The input model keeps working, bit
    for bit: what is neither replaced nor fitted is shared with it, not copied, so training one trains the other's attention too.

    Args:
        model: a transformers model of a known family, with any head, or what holds one, as a ``SentenceTransformer`` or a
            ``CrossEncoder`` does, of which all else is kept. With ``ffn``, any ``nn.Module``.
        config: an ``FFFConfig``, ``"KxD"`` such as ``"8x8"`` (or ``"4x8+mlp:64"``, or a control, ``"mlp:72"`` or ``"none"``), or a dict from layer number to such a config. A shorthand
            takes the model's own activation.
        ffn: for modules of no known family, the names of their feedforward networks, ``"encoder.layers.*.mlp"``: each takes
            and gives ``[..., H]``, which is tried. What comes back is of the same class; ``save_fff`` and ``load_fff`` save and
            load it. Layers are numbered in the order of the names, calibration data are batches as the module takes them, and
            each network is fitted by itself.
        target_layers: which layers; all by default.
        init: first values: "dense" draws each node from the dense neurons and matches the size of the output, "random" does
            not look at them. Calibration starts from either's directions. Of a gated network "dense" takes the activated half.
        calibration: a ``Calibration``, or what its ``data`` may be (texts, pairs of texts, tensors). Without it the model has
            forgotten what it knew, and a warning says so.
        seed: of the first values; a ``Calibration`` has its own.

    Returns:
        The converted model; with a calibration, its ``calibration_report`` says what was reached.

    Raises:
        ValueError: an unknown model, a model that is already converted, layers that do not exist, an ``FFFConfig`` out of
            range, an activation that the operator lacks, calibration data that is empty; layers that share an FFN and are to get
            different ones; projections that are quantised or adapted; an ``ffn`` that names nothing, or no feedforward network.

    A program that loads what was saved imports ``hf_fff`` before, by which the Auto classes know it:

    ```python
    convert_ffn_to_fff(model, "8x8", calibration=texts).save_pretrained("fast")

    import hf_fff  # in whatever program loads it

    AutoModel.from_pretrained("fast")
    ```
    """
    if init not in INITS:
        raise ValueError(f"init={init!r} is not known (allowed: {', '.join(INITS)})")
    plan = calibration if isinstance(calibration, (type(None), Calibration)) else Calibration(calibration)
    if ffn is not None:
        options: dict[str, Any] = {"target_layers": target_layers, "init": init, "calibration": plan, "seed": seed}
        fast = convert_modules(model, config, ffn, **options)
    elif (inner := _only_model_in(model)) is not None:
        if plan is not None and plan.tokenizer is None:
            plan = replace(plan, tokenizer=getattr(model, "tokenizer", None))
        # In a copy of what is around it, with the same parameters, wherever it is referred to.
        known: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
        known[id(inner)] = _convert_model(inner, config, target_layers, init, plan, seed)
        fast = copy.deepcopy(model, known)
        fast.calibration_report = getattr(known[id(inner)], "calibration_report", None)
    else:
        fast = _convert_model(model, config, target_layers, init, plan, seed)
    if plan is None:
        warnings.warn(
            "the converted model is not calibrated: it has lost what its FFNs knew. Pass calibration=texts, or train it.",
            stacklevel=2,
        )
    return fast


def _only_model_in(module: Any) -> Any:
    """The transformers model that a module of another kind holds, if it is one."""
    if not isinstance(module, nn.Module) or isinstance(module, PreTrainedModel):
        return None
    models = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    return models[0] if models and all(m in set(models[0].modules()) for m in models) else None


def _convert_model(
    model: Any, config: LayersLike, target_layers: Iterable[int] | None, init: str, plan: Calibration | None, seed: int
) -> Any:
    family, new_class = _fast_class_of(model)
    blocks = family.blocks(model.base_model)
    layers = resolve_layers(config, len(blocks), target_layers, activation=family.activation_of(model.config))
    family.check_shared(model.base_model, layers)
    neurons = {i: [DenseNeurons.of(ffn) for ffn in family.ffns(blocks[i])] for i in layers}

    fast = _skeleton(model, new_class, layers_to_json(layers, len(blocks)))
    _share_modules(model, fast)
    generator = torch.Generator().manual_seed(seed)
    fast_blocks = family.blocks(fast.base_model)
    for index in layers:
        if fast_blocks[index] in fast_blocks[:index]:
            continue  # shared, and done
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + index)
            for dense, ffn, old in zip(
                neurons[index], family.ffns(fast_blocks[index]), family.ffns(blocks[index]), strict=True
            ):
                _fill(ffn, dense, old, init, generator, own_bias=plan is not None)
    if plan is not None:
        fast.calibration_report = calibrate(fast, model, family, layers, plan)
    return fast


def _fill(ffn: FFN, dense: DenseNeurons, old: FFN, init: str, generator: torch.Generator, *, own_bias: bool) -> None:
    """Gives a converted FFN, which has no values yet, its first ones."""
    new, like = ffn.fast, dense.weight_out
    assert new is not None
    new.to_empty(device=like.device).to(like.dtype).train(ffn.block.training)
    new.reset_parameters()
    if init == "dense":
        norm = ffn.family.input_norm
        init_from_dense(new, dense, None if norm is None else old.get(norm), generator)
    bias = nn.Parameter(like.new_zeros(like.shape[1])) if dense.bias_out is None else dense.bias_out
    ffn.output.bias = nn.Parameter(bias.detach().clone()) if own_bias else bias


def _fast_class_of(model: Any) -> tuple[FFNInterface, Any]:
    config = getattr(model, "config", None)
    if (fff := getattr(config, "fff", None)) is not None:
        raise ValueError(f"the model is already converted ({type(model).__name__} with fff={fff})")
    for field, kind in (("is_encoder_decoder", "an encoder with a decoder"), ("is_decoder", "a decoder")):
        if getattr(config, field, False):
            raise ValueError(f"{type(model).__name__} is {kind}, for which there are no fast classes. {_ANY_MODULE}")
    model_type = getattr(config, "model_type", None)
    if model_type not in known_types():
        raise ValueError(
            f"no known feedforward networks in {type(model).__name__} (model_type={model_type!r}); "
            f"known families: {', '.join(known_types())}. register_family adds one. {_ANY_MODULE}"
        )
    if (found := fast_class(type(model))) is None:
        raise ValueError(
            f"{type(model).__name__} has no fast class; of the family {model_type!r} there are: {', '.join(heads(model_type))}"
        )
    return FAMILIES[model_type], found


def _skeleton(model: Any, new_class: Any, fff: dict[str, Any]) -> Any:
    """The Fast model without weights (on the meta device), set up as ``model`` is."""
    own = ("model_type", "architectures", "transformers_version")
    fields = {k: v for k, v in model.config.to_dict().items() if k not in own}
    config = new_class.config_class(**fields, fff=fff)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        options = signature(type(model).__init__).parameters
        kwargs = {"add_pooling_layer": model.pooler is not None} if "add_pooling_layer" in options else {}
        fast = new_class(config, **kwargs)
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
