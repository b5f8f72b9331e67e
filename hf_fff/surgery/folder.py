"""Converting a model's folder, with all that lies in it: tokenizer, sentence-transformers' modules, the head."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..config import FFFConfig, LayersLike
from ..files import atomic_folder, disk_is_full
from ..memory import memory_explained
from ..models import known_types
from ..models.classes import model_classes
from ..remote import save_remote_code
from .calibration import Calibration
from .convert import convert_ffn_to_fff
from .record import RECORD, record_of, write_record

# What belongs to the dense model alone, beside its weights: exports for other engines, and the card that describes it.
_LEFT_BEHIND = {"onnx", "openvino", "README.md", RECORD, ".git", ".gitattributes", ".cache"}
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.h5", "*.msgpack", "*.ot", "*.onnx")


@dataclass(frozen=True)
class ModelFolder:
    """A local model folder; ``transformer`` is where transformers' files lie in it (the folder itself, but for some of
    sentence-transformers)."""

    root: Path
    transformer: Path

    @classmethod
    def find(cls, source: str) -> "ModelFolder":
        """A folder, or a repository of the Hub, which is fetched.

        Raises:
            ValueError: there is no model.
        """
        root = Path(source)
        if not root.is_dir():
            if root.exists():
                raise ValueError(
                    f"{source} is a file; a model is a folder with a config.json, or a repository of the Hub"
                )
            root = _fetch(source)
        transformer = root
        modules = root / "modules.json"
        if modules.is_file():
            transformer = root / _transformer_path(modules)
            if not transformer.resolve().is_relative_to(root.resolve()):  # of a repository, anybody may have written it
                raise ValueError(
                    f"{modules} says that the transformer is in {transformer}, which lies outside of {root}"
                )
        if not (transformer / "config.json").is_file():
            raise ValueError(f"{source} is no model: there is no config.json in {transformer}")
        return cls(root, transformer)

    def name_of_transformer(self, source: str) -> str:
        """What a program loads the transformer by: its folder, or the repository where ``source`` is one.

        Raises:
            ValueError: it lies in a subfolder of a repository, which has no name.
        """
        if Path(source).is_dir():
            return str(self.transformer.resolve())
        if self.transformer != self.root:
            raise ValueError(
                f"the transformer of {source} lies in {self.transformer.name} there: download it, and give its folder"
            )
        return source

    def weights_digest(self) -> str:
        """What tells these weights from all others: the SHA-256 of the file of weights, as the Hub shows it; of several files,
        that of the lines ``SHA-256  name`` of all."""
        files = sorted(self.root.rglob("*.safetensors")) or sorted(self.transformer.glob("*.bin"))
        lines = {f.relative_to(self.root).as_posix(): sha256_of(f) for f in files}
        if len(lines) == 1:
            return next(iter(lines.values()))
        return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in lines.items()).encode()).hexdigest()

    def identity(self) -> dict[str, str]:
        """What a measurement says of the model that it is of: the digest of its ``weights``, and what its FFNs are, ``fff``."""
        layers = getattr(AutoConfig.from_pretrained(self.transformer), "fff_layers", {})
        return {"weights": self.weights_digest(), "fff": named_layers(layers) if layers else "dense"}

    def load_dense(self) -> Any:
        """The model, with the head that its config names.

        Raises:
            ValueError: a model of no known family, or one that is converted already.
        """
        config = AutoConfig.from_pretrained(self.transformer)
        if hasattr(config, "fff"):
            raise ValueError(f"{self.root} is already converted (model_type={config.model_type!r})")
        if config.model_type not in known_types():
            raise ValueError(
                f"{self.root} is a {config.model_type!r} model, whose feedforward networks are not known "
                f"(known families: {', '.join(known_types())})"
            )
        known = {dense.__name__: dense for dense in model_classes(config.model_type)}
        name = (config.architectures or [next(iter(known))])[0]
        if name not in known:
            raise ValueError(
                f"{self.root} has the architecture {name!r}, which has no fast class (known: {', '.join(known)})"
            )
        return known[name].from_pretrained(self.transformer)

    def copy_rest(self, target: Path) -> Path:
        """Copies what is not the transformer's weights and config; returns the transformer's place in ``target``."""
        inner = target / self.transformer.relative_to(self.root)
        weights = {p for pattern in ("config.json", *_WEIGHTS) for p in self.transformer.glob(pattern)}

        def ignore(folder: str, names: list[str]) -> list[str]:
            return [n for n in names if n in _LEFT_BEHIND or Path(folder, n) in weights]

        shutil.copytree(self.root, target, ignore=ignore, dirs_exist_ok=True)
        inner.mkdir(parents=True, exist_ok=True)
        return inner


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def named_layers(layers: Mapping[int, FFFConfig]) -> str:
    """``"8x8"``, or where layers differ ``"8x8 in 0, 1; mlp:72 in 2"``."""
    by_name: dict[str, list[str]] = {}
    for index, config in layers.items():
        by_name.setdefault(config.shorthand, []).append(str(index))
    if len(by_name) == 1:
        return next(iter(by_name))
    return "; ".join(f"{name} in {', '.join(numbers)}" for name, numbers in by_name.items())


def _transformer_path(modules: Path) -> str:
    """Where sentence-transformers' list of modules says that the transformer is."""
    try:
        first = json.loads(modules.read_text(encoding="utf-8"))[0]
        kind, path = str(first["type"]), str(first.get("path", ""))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{modules} is no list of sentence-transformers' modules") from error
    if not kind.endswith(".Transformer"):
        raise ValueError(f"the first module in {modules} is {kind!r}, not a transformer")
    return path


def _fetch(source: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        fetched = Path(snapshot_download(source, ignore_patterns=["onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot"]))
        _check_hashes(fetched, source)
        return fetched
    except HFValidationError as error:
        raise ValueError(
            f"there is no folder {source}, and a model of the Hub has a name such as NAME or OWNER/NAME"
        ) from error
    except OSError as error:
        if disk_is_full(error):
            raise RuntimeError(
                f"the disk is full, and {source} was not fetched whole: make room in {constants.HF_HUB_CACHE} (or set HF_HOME to another "
                "place), and the same command goes on from there"
            ) from error
        if not isinstance(error, (HfHubHTTPError, LocalEntryNotFoundError)):
            raise
        if isinstance(error, GatedRepoError):
            why = "its owner must let you in first (see its page there, then `hf auth login`)"
        elif isinstance(error, RepositoryNotFoundError):
            why = "there is none, or it is private (then `hf auth login`)"
        elif isinstance(error, LocalEntryNotFoundError):
            offline = constants.HF_HUB_OFFLINE
            why = ("HF_HUB_OFFLINE is set" if offline else "it cannot be reached") + ", and the cache does not have it"
        else:
            why = str(error).strip().split("\n")[0]
        raise ValueError(
            f"there is no folder {source}, and no model of that name could be had from the Hub: {why}"
        ) from error


def _check_hashes(fetched: Path, source: str) -> None:
    """Downloads are checked by their size alone, yet the cache names a large file by the SHA-256 that the server told."""
    for path in sorted(fetched.rglob("*")):
        blob = path.resolve()
        if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob.name) and sha256_of(blob) != blob.name:
            blob.unlink()
            path.unlink()
            raise ValueError(
                f"{path.name} of {source} did not arrive as it is on the Hub (its SHA-256 is another), and was removed from the "
                "cache: the same command fetches it again"
            )


def convert_folder(
    source: ModelFolder,
    output: Path,
    config: LayersLike,
    *,
    target_layers: list[int] | None = None,
    init: str = "dense",
    calibration: Calibration | None = None,
    seed: int = 0,
    dtype: Any = None,
    delta: str | None = None,
    remote_code: bool = False,
    overwrite: bool = False,
) -> Any:
    """Converts a model folder into another one; returns the converted model. The output appears whole or not at all.

    A sentence-transformers folder stays one: ``SentenceTransformer(output)`` opens it after ``import hf_fff``. With ``delta``, the
    name of the dense model, only what is not that model's is written (``DeltaMixin.save_pretrained``); with ``remote_code``, also
    what opens the output where hf_fff is not installed (``hf_fff.remote``).

    Raises:
        ValueError: as ``convert_ffn_to_fff``, or the output lies in the source or holds it.
        FileExistsError: the output exists and is not empty, and ``overwrite`` is not set.
        RuntimeError: out of memory.
    """

    def make() -> Any:
        dense = source.load_dense()
        with memory_explained("converting", "the calibration's max_tokens or the maximal length of the inputs"):
            fast = convert_ffn_to_fff(
                dense, config, target_layers=target_layers, init=init, calibration=calibration, seed=seed
            )
        return fast if dtype is None else fast.to(dtype)

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(folder, **({"delta": delta} if delta else {}))
        if remote_code:
            save_remote_code(model, folder)

    return write_folder(source, output, make, save, overwrite=overwrite)


def check_places(source: ModelFolder, output: Path) -> None:
    """Raises ``ValueError`` where the output lies in the source or holds it."""
    if source.root.resolve() in output.resolve().parents:
        raise ValueError(f"the output {output} lies in the source {source.root}")
    if output.resolve() in source.root.resolve().parents:
        raise ValueError(f"the output {output} holds the source {source.root}: it would be lost")


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def write_folder(
    source: ModelFolder,
    output: Path,
    make: Callable[[], Any],
    save: Callable[[Any, Path], None] = _save,
    *,
    overwrite: bool = False,
    how: Mapping[str, Any] | None = None,
) -> Any:
    """Writes the model that ``make`` gives, by ``save``, with all else that lies in the source and a record of how it was made, to
    which ``how`` adds; returns the model.

    Raises:
        ValueError: the output lies in the source or holds it.
        FileExistsError: the output exists and is not empty, and ``overwrite`` is not set.
    """
    check_places(source, output)
    with atomic_folder(output, overwrite=overwrite) as target:
        model = make()
        save(model, source.copy_rest(target))
        write_record(target, record_of(source, model, **(how or {})))
    return model
