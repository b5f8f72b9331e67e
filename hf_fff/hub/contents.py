"""What of a folder is published: looked through before anything is sent."""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ..models.delta import WEIGHTS as DELTA
from ..remote import write_remote_code
from ..surgery.folder import ModelFolder

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SKIPPED = {".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store", ".gitattributes"}
_SKIPPED |= {"runs"}  # tensorboard's logs, whose names have the name of the machine
# Weights in formats that can carry code, or that nobody here checks.
_NO_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack", ".ot"}


@dataclass(frozen=True)
class Contents:
    """A model's folder as it is published; ``files`` are relative paths, the card not among them."""

    folder: ModelFolder
    config: dict[str, Any]
    files: dict[str, Path]

    @property
    def weights(self) -> list[str]:
        return [name for name in self.files if name.endswith(".safetensors")]

    @property
    def delta_base(self) -> str | None:
        """What a delta is to be put together with: a repository of the Hub. None of whole models."""
        return str(self.config["fff_delta"]["base"]) if "fff_delta" in self.config else None


def look_through(root: Path) -> Contents:
    """The files of a converted model's folder.

    Raises:
        ValueError: no model of ours; weights that are missing, damaged or no safetensors; a delta of a model that only this machine
            has; code that the config does not name; a name that leaves the folder, or that the Hub could not hold.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder: what is pushed is the folder of a converted model")
    _check_modules(root)
    folder = ModelFolder.find(str(root))
    config = _json(folder.transformer / "config.json")
    if not isinstance(config.get("fff"), dict):
        raise ValueError(f"{root} is no model of hf_fff: its config.json has no fff (hf-fff convert makes one)")
    files = {name: path for name, path in _walk(root) if name != CARD}
    inner = folder.transformer.relative_to(root).as_posix()
    code = _code_of(config)
    for name, path in files.items():
        if path.suffix in _NO_WEIGHTS:
            raise ValueError(
                f"{name} is no safetensors file, and is not pushed: remove it, or save its weights as safetensors"
            )
        if path.suffix == ".py" and path.name not in code:  # the remote-code file is named there
            raise ValueError(f"{name} is code that no auto_map of config.json names: remove it from {root}")
        if path.suffix == ".safetensors":
            _keys(path)
    prefix = "" if inner == "." else f"{inner}/"
    if "fff_delta" in config:
        _check_delta(folder.transformer, config["fff_delta"], f"{prefix}{DELTA}" in files)
    else:
        _check_weights(folder.transformer, prefix, files)
    return Contents(folder, config, dict(sorted(files.items())))


def with_remote_code(contents: Contents, work: Path) -> Contents:
    """The same with the file that opens the model where hf_fff is not installed, and a config that names it; both lie in ``work``,
    and the model's folder stays as it is.

    Raises:
        ValueError: a delta, or a model of no family of the table.
    """
    if contents.delta_base is not None:
        raise ValueError("--remote-code is for whole models: a delta is put together by hf_fff alone")
    transformer = contents.folder.transformer
    shutil.copy(transformer / "config.json", work)
    code = write_remote_code(AutoConfig.from_pretrained(transformer), work)
    inner = transformer.relative_to(contents.folder.root)
    files = {(inner / path.name).as_posix(): path for path in (code, work / "config.json")}
    return replace(
        contents, config=_json(work / "config.json"), files=dict(sorted({**contents.files, **files}.items()))
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object")
    return value


def _check_modules(root: Path) -> None:
    path = root / "modules.json"
    if not path.is_file():
        return
    try:
        paths = [str(module.get("path", "")) for module in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no list of sentence-transformers' modules") from error
    for inside in paths:
        if not (root / inside).resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{path} names {inside!r}, which lies outside of {root}")


def _walk(root: Path) -> Iterable[tuple[str, Path]]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if _SKIPPED & set(relative.parts):
            continue
        name = relative.as_posix()
        if not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{name} is a link to {path.resolve()}, which lies outside of {root}: copy the file there")
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the file name {name!r} is not UTF-8") from error
        if re.search(r"[\x00-\x1f\x7f\\]", name):
            raise ValueError(f"the file name {name!r} has a backslash or a control character in it")
        if path.is_file():
            yield name, path


def _code_of(config: dict[str, Any]) -> set[str]:
    named = config.get("auto_map")
    values = named.values() if isinstance(named, dict) else ()
    return {f"{str(v).split('--')[-1].split('.')[0]}.py" for v in values}


def _keys(path: Path) -> set[str]:
    """The names of the tensors of a file that is whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or not a whole one: {error}") from error


def _check_delta(transformer: Path, about: Any, there: bool) -> None:
    base = about.get("base") if isinstance(about, dict) else None
    if not there:
        raise ValueError(f"{transformer} is a delta checkpoint without its {DELTA}: there are no weights to push")
    if not isinstance(base, str) or not _HUB_ID.fullmatch(base) or Path(base).exists():
        raise ValueError(
            f"fff_delta.base={base!r} in {transformer / 'config.json'} is no repository of the Hub, so nobody else could load this "
            'delta: push the base, and save the delta with delta="OWNER/NAME" (or convert OWNER/NAME with --delta), or push the '
            "whole model"
        )


def _check_weights(transformer: Path, prefix: str, files: dict[str, Path]) -> None:
    index = files.get(f"{prefix}model.safetensors.index.json")
    if f"{prefix}model.safetensors" in files:
        if index is not None:
            raise ValueError(
                f"{transformer} has model.safetensors and an index of several files: remove what is not the model"
            )
        return
    if index is None:
        raise ValueError(
            f"{transformer} has no model.safetensors, nor several with their index: there are no weights to push"
        )
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map")
    by_file: dict[str, set[str]] = {}
    for tensor, name in places.items():
        by_file.setdefault(str(name), set()).add(tensor)
    for name, tensors in by_file.items():
        if f"{prefix}{name}" not in files:
            raise ValueError(f"{index} names {name!r}, which is no file of {transformer}")
        if missing := tensors - _keys(files[f"{prefix}{name}"]):
            raise ValueError(f"{name} lacks {sorted(missing)[0]!r}, which {index.name} says is in it")
