"""Delta checkpoints: what conversion and training changed, beside a reference to the dense model that has the rest."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from ..adapters import check_not_adapted
from ..files import atomic_files

DELTA_VERSION = 1
WEIGHTS = "fff_delta.safetensors"  # under another name than whole weights, which transformers would take these for
_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")


class DeltaMixin:
    """Goes before ``FastModelMixin`` in the bases of a Fast class: saves and loads delta checkpoints."""

    def save_pretrained(self, save_directory: Any, *args: Any, delta: bool | str = False, **kwargs: Any) -> None:
        """As in transformers; with ``delta``, only what is not the dense base's, with a reference to it.

        Args:
            delta: True, where the base is what the model came from, or the base: a folder or a repository of the Hub.

        Raises:
            ValueError: no base, none of the model's architecture, or one that is converted itself; the folder holds whole weights;
                adapters of PEFT that are not merged, or quantised weights; other options beside ``delta``.
        """
        if not delta:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
            Path(save_directory, WEIGHTS).unlink(missing_ok=True)
            return
        if args or kwargs:
            given = ", ".join([*map(repr, args), *kwargs])
            raise ValueError(f"a delta takes a folder and its base alone (also given: {given})")
        save_delta(self, Path(save_directory), delta if isinstance(delta, str) else None)

    @classmethod
    def from_pretrained(cls, *args: Any, delta_base: str | None = None, **kwargs: Any) -> Any:
        """As ``FastModelMixin.from_pretrained``; a delta checkpoint is put together with its base.

        Args:
            delta_base: where the base of a delta lies, if not where the delta says.

        Raises:
            ValueError: a delta that is damaged or of a newer format, or whose base is not there or differs.
        """
        load: Any = super().from_pretrained  # type: ignore[misc]
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        config = None if "state_dict" in kwargs else cls._delta_config(source, kwargs)
        if config is None:
            if delta_base is not None:
                raise ValueError(f"delta_base={delta_base!r} means nothing to {source}, which is no delta checkpoint")
            return load(*args, **kwargs)
        base = delta_base or _about(config, source).get("base")
        kwargs |= {"config": config, "state_dict": load_delta(cls, config, source, base, kwargs)}
        kwargs.pop("pretrained_model_name_or_path", None)
        del config.fff_delta
        loaded = load(None, *args[1:], **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path, model.delta_base = str(source), base
        return loaded

    @classmethod
    def _delta_config(cls, source: Any, kwargs: dict[str, Any]) -> Any:
        """The config of a delta checkpoint, a copy, whose fields are taken out of ``kwargs``; None for any other checkpoint."""
        given: Any = kwargs.get("config")
        config_class: Any = cls.config_class  # type: ignore[attr-defined]
        if given is None and source is not None:
            found, _ = config_class.get_config_dict(source, **kwargs)
            if "fff_delta" in found:
                config, rest = config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
                kwargs.clear()
                kwargs.update(rest)
                return config
        return copy.deepcopy(given) if hasattr(given, "fff_delta") else None


def save_delta(model: Any, folder: Path, base: str | None) -> None:
    """Saves the tensors of a converted model that are not those of its dense base, bit for bit, and in ``config.json`` which base
    that is and what its weights hash to: see ``DeltaMixin.save_pretrained``."""
    base = base or getattr(model, "delta_base", None) or model.name_or_path
    if not base:
        raise ValueError(
            'delta=True needs to know the dense model that this one was made from: give delta="FOLDER or HUB ID"'
        )
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    if whole := sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin") and p.name != WEIGHTS):
        raise ValueError(f"{folder} holds whole weights ({', '.join(whole)}): save the delta in a folder of its own")
    check_not_adapted(model, "save as a delta")
    # What bitsandbytes packs is told by the config, and torchao's tensors by their class.
    if hasattr(model.config, "quantization_config") or any(type(p.data) is not Tensor for p in model.parameters()):
        raise ValueError("the model is quantised: save the delta of the model that it was quantised from")
    dense = _dense_tensors(model, model.config, base)
    own: dict[str, Tensor] = {}
    borrowed = []
    known: set[tuple[Any, ...]] = set()  # tied tensors are saved once
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device)
        if name in dense and _same(dense[name], tensor):
            borrowed.append(name)
        elif key not in known or not tensor.numel():
            own[name] = tensor.detach().cpu().contiguous().clone()
            known.add(key)
    if not borrowed:
        raise ValueError(f"the base {base} has nothing in common with this model: save it whole")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.fff_delta = {
        "version": DELTA_VERSION,
        "base": base,
        "base_sha256": _digest({name: dense[name] for name in borrowed}),
        "sha256": _digest(own),
    }
    with atomic_files(folder) as work:
        save_file(own, work / WEIGHTS, metadata={"format": "pt", "borrowed": json.dumps(borrowed)})
        config.save_pretrained(work)


def load_delta(
    model_class: Any, config: Any, source: Any, base: str | None, options: dict[str, Any]
) -> dict[str, Tensor]:
    """The whole state dict of a delta checkpoint, base and all, in the dtypes that were saved.

    Args:
        source: the delta's folder or repository.
        base: where its base is looked for.
        options: of ``from_pretrained``, of which those about the Hub are used.

    Raises:
        ValueError: a newer format, a damaged delta, no base or one that differs from that which it was made from.
    """
    about = _about(config, source)
    own, borrowed = _read(source, options)
    if _digest(own) != about.get("sha256"):
        raise ValueError(f"{WEIGHTS} of {source} is damaged: its hash is not the one in config.json")
    dense = _dense_tensors(model_class, config, base, **{k: options[k] for k in _HUB_OPTIONS if k in options})
    missing = [name for name in borrowed if name not in dense]
    if missing or _digest({name: dense[name] for name in borrowed}) != about.get("base_sha256"):
        what = f"it has no {missing[0]}" if missing else "its weights have another hash"
        raise ValueError(
            f"{base} is not the base that the delta {source} was made from: {what}. "
            'from_pretrained(..., delta_base="FOLDER or HUB ID") names another place of the same base'
        )
    dtype = _dtype_of(config)
    return own | {
        name: dense[name].to(dtype) if dtype and dense[name].is_floating_point() else dense[name] for name in borrowed
    }


def _about(config: Any, source: Any) -> dict[str, Any]:
    about = config.fff_delta if isinstance(config.fff_delta, dict) else {}
    if (version := about.get("version")) != DELTA_VERSION:
        raise ValueError(
            f"fff_delta.version={version!r} of {source} is not one that this hf_fff reads ({DELTA_VERSION}); a newer hf_fff may"
        )
    return about


def _dtype_of(config: Any) -> Any:
    dtype = getattr(config, "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _same(dense: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor is the base's, or what that becomes in another number format."""
    tensor = tensor.detach().cpu()
    return dense.shape == tensor.shape and torch.equal(dense.to(tensor.dtype), tensor)


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes; files of other formats with the same tensors have the same."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read(source: Any, options: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    hub = {k: options[k] for k in (*_HUB_OPTIONS, "revision", "subfolder") if options.get(k) is not None}
    try:
        path = cached_file(source, WEIGHTS, **hub)
    except OSError as error:
        raise ValueError(f"config.json of {source} is of a delta, but there is no {WEIGHTS} beside it") from error
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["borrowed"])  # noqa: SIM118
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _dense_tensors(model: Any, config: Any, base: Any, **hub: Any) -> dict[str, Tensor]:
    """What a base has for the dense class that a Fast class inherits from, by that class's names, in the base's own dtypes; heads
    that the base lacks are left out."""
    from .fast import FastModelMixin  # which imports this

    fast = model if isinstance(model, type) else type(model)
    dense: Any = next(c for c in fast.__mro__ if issubclass(c, nn.Module) and not issubclass(c, FastModelMixin))
    kind = config.dense_model_type
    if getattr(dense, "config_class", None) is None:
        raise ValueError(f"{fast.__name__} has no dense counterpart of which there could be a base: save it whole")
    try:
        found, _ = dense.config_class.get_config_dict(base, **hub)
    except OSError as error:
        raise ValueError(
            f"the base {base} of the delta cannot be read: {str(error).strip().splitlines()[0]} "
            '(from_pretrained(..., delta_base="FOLDER or HUB ID") names another place of it)'
        ) from error
    if "fff" in found or found.get("model_type") != kind:
        raise ValueError(f"the base {base} must be a dense {kind!r} model; it is a {found.get('model_type')!r}")
    left_out = ("model_type", "architectures", "transformers_version", "dtype", "fff", "fff_delta")
    fields = {k: v for k, v in config.to_dict().items() if k not in left_out}
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what the base lacks is no news here
    try:
        loaded, info = dense.from_pretrained(
            base,
            config=dense.config_class(**fields),
            dtype="auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **hub,
        )
    finally:
        transformers_logging.set_verbosity(level)
    absent = set(info["missing_keys"]) | {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return {name: tensor for name, tensor in loaded.state_dict().items() if name not in absent}
