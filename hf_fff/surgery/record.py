"""How a model was made, in a file that stays in its folder: what its card says comes from there, not from anybody's memory."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    from .folder import ModelFolder

RECORD = "hf_fff.json"
_CACHED = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})$")
_LICENCE = ("license", "license_name", "license_link")


def record_of(source: "ModelFolder", model: Any, **how: Any) -> dict[str, Any]:
    """What is known of a model and of the dense one that it was made from: no paths of this machine.

    Args:
        how: what the model does not carry itself, such as the options of a training.
    """
    cached = _CACHED.search(source.root.resolve().as_posix())
    base = {
        "name": cached["name"].replace("--", "/") if cached else None,
        "revision": cached["revision"] if cached else None,
        "weights": source.weights_digest(),
        "licence": licence_of(source.root / "README.md"),
    }
    reports = {name: getattr(model, f"{name}_report", None) for name in ("calibration", "distillation")}
    told = {name: asdict(report) for name, report in reports.items() if is_dataclass(report)}  # type: ignore[arg-type]
    return {"version": 1, "hf_fff": __version__, "base": base, **told, **how}


def licence_of(card: Path) -> dict[str, str]:
    """The fields of a licence in the metadata of a card; empty where there is none, or nobody can read it."""
    return {k: str(v) for k, v in _metadata(card).items() if k in _LICENCE and isinstance(v, (str, int, float))}


def _metadata(card: Path) -> Mapping[str, Any]:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        found = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Empty where a folder has none, as of models that were saved by ``save_pretrained`` alone.

    Raises:
        ValueError: it is no record.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("base"), dict):
            raise ValueError("it has no base")
    except ValueError as error:
        raise ValueError(f"{path} is no record of how a model was made: {error}") from error
    return record
