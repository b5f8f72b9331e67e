"""Remote code: one file beside the weights, with which ``AutoModel.from_pretrained(..., trust_remote_code=True)`` opens a converted
model where hf_fff is not installed.

The file is put together from the sources of this package, so that it cannot drift from them: the layers, the operator in PyTorch,
the table's row of the family, and what makes transformers' classes Fast ones.
"""

import ast
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import config, layers
from .._version import __version__
from ..files import atomic_files
from ..layers import controls, joint, wrappers
from ..layers import fff as trees
from ..models import FAMILIES, families, fast
from ..models.classes import heads, model_classes
from ..models.fastcrammedbert import configuration_fastcrammedbert as crammed
from ..ops import _schema, torch_backend
from . import operator

# What is taken of each module, in the order of the file; () is everything.
_PARTS: list[tuple[ModuleType, tuple[str, ...]]] = [
    (config, ()),
    (_schema, ("DTYPES", "depth_of", "check_arguments", "logits_dtype")),
    (torch_backend, ()),
    (operator, ()),
    (trees, ()),
    (controls, ()),
    (joint, ()),
    (wrappers, ()),
    (layers, ()),
    (families, ("FFNInterface", "FFN")),
    (fast, ()),
]

_HEAD = '''"""{dense} with fast feedforward networks (arXiv 2311.10770).

Put together by hf_fff {version} from its own sources, for programs that do not have it: torch, and transformers 5.17 or newer, are
enough. Where hf_fff is installed, its kernels are used. Apache-2.0.
"""
'''

_OPERATOR = """

try:
    from hf_fff import ops
except ImportError:

    class ops:
        fff = staticmethod(fff_in_torch)


add_bias = getattr(ops, "add_bias", torch.add)  # an hf_fff that is older than this file may have none
"""

# What the classes of FastCrammedBert refer to, and need not do there.
_CRAMMED = """

FAMILIES: dict[str, FFNInterface] = {}


def register_models() -> None:
    \"\"\"config.json tells the Auto classes.\"\"\"


class DeltaMixin:
    pass
"""


def save_remote_code(model: Any, folder: Path) -> Path:
    """Puts the file beside a model that was saved in ``folder``, and says so in its ``config.json``; returns the file's place.

    Raises:
        ValueError: as ``remote_code``.
    """
    return write_remote_code(model.config, folder)


def write_remote_code(config: Any, folder: Path) -> Path:
    """The same for a model's config."""
    code = _code_for(config)
    place = folder / f"modeling_{config.model_type.replace('-', '_')}.py"
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"AutoConfig": type(config).__name__, **_autos(config.dense_model_type)}
    settings["auto_map"] = {auto: f"{place.stem}.{name}" for auto, name in names.items()}
    with atomic_files(folder) as work:
        (work / place.name).write_text(code, encoding="utf-8")
        (work / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return place


def remote_code(model: Any) -> str:
    """The source of the file for a model's family, with all its heads.

    Raises:
        ValueError: the model is of no family of the table, or its dense classes are not transformers' own.
    """
    return _code_for(model.config)


def _code_for(config: Any) -> str:
    kind = getattr(config, "dense_model_type", None)
    if (kind not in FAMILIES and kind != crammed.FastCrammedBertConfig.dense_model_type) or not hasattr(config, "fff"):
        raise ValueError(
            f"there is no remote code for a model of {type(config).__name__}: it is no converted model of transformers"
        )
    source = _Source()
    for module, names in _PARTS:
        source.take(module, names)
    source.text.append(_OPERATOR)
    if kind in FAMILIES:
        source.text += _classes(kind, type(config), source)
    else:
        from ..models.fastcrammedbert import modeling_fastcrammedbert as modeling

        source.text.append(_CRAMMED)
        source.take(crammed, ("POOLINGS", "FastCrammedBertConfig"))
        source.take(modeling, ())
    dense = type(config).__name__.removeprefix("Fast").removesuffix("Config")
    head = _HEAD.format(dense=dense, version=__version__)
    return "\n".join([head, *sorted(source.imports), *source.text]).rstrip() + "\n"


def _autos(kind: str) -> dict[str, str]:
    """The Auto classes, and the class that each of them is to give."""
    if kind not in FAMILIES:
        return crammed.MODELS
    return {auto.__name__: f"Fast{name}" for name, found in reversed(heads(kind).items()) for auto in found}


class _Source:
    """Text of several modules, as it would stand in one."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.text: list[str] = []
        self.known: dict[str, str] = {}  # name -> the module that it is of

    def take(self, module: ModuleType, names: tuple[str, ...]) -> None:
        """Takes definitions with the comments before them; imports of this package's own are left out."""
        text = inspect.getsource(module)
        lines = text.splitlines()
        end = 0
        for node in ast.parse(text).body:
            before, end = end, node.end_lineno or 0
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._import(node)
                continue
            defined = _defined(node)
            if not defined or "__all__" in defined or (names and not set(defined) & set(names)):
                continue
            for name in defined:
                if name in self.known:
                    raise AssertionError(f"{name} is in {self.known[name]} and in {module.__name__}")
                self.known[name] = module.__name__
            # In one file the operator's modules need no names.
            self.text.append("\n".join(lines[before:end]).replace("torch_backend.", ""))

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.ImportFrom) and node.level:
            return
        at = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
        self.imports |= {f"{at}import {ast.unparse(alias)}" for alias in node.names}


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines; none for a docstring."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _classes(kind: str, config_class: Any, source: _Source) -> list[str]:
    """What ``hf_fff.models.classes`` makes when it runs, written out."""
    made = model_classes(kind)
    if strange := [c.__name__ for c in made if not c.__module__.startswith("transformers.")]:
        raise ValueError(f"there is no remote code for {kind!r}: {', '.join(strange)} are not transformers' own")
    dense_config = next(c for c in config_class.__mro__ if c.__module__.startswith("transformers."))
    common = next(c for c in next(iter(made)).__mro__[1:] if c.__name__.endswith("PreTrainedModel"))
    source.imports |= {f"from {c.__module__} import {c.__name__}" for c in (dense_config, common, *made)}
    text = [
        "\n",
        f"FAMILIES = {{{kind!r}: {FAMILIES[kind]!r}}}",
        "\n",
        f"class {config_class.__name__}(FastConfigMixin, {dense_config.__name__}):",
        f"    model_type = {config_class.model_type!r}",
        f"    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {config_class.base_model_fsdp_plan!r}",
        f"    base_model_tp_plan = {config_class.base_model_tp_plan!r}",
        f"    dense_model_type: ClassVar[str] = {kind!r}",
        f"    fff: Any = {'1x11'!r}",
        "\n",
        f"class Fast{common.__name__}(FastModelMixin, {common.__name__}):",
        f"    config_class = {config_class.__name__}",
    ]
    for dense, fast_class in made.items():
        text += ["\n", f"class {fast_class.__name__}(Fast{common.__name__}, {dense.__name__}):", "    pass"]
    return text
