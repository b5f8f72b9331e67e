"""The Fast<Family> classes, made from the table and from transformers' own classes when they are first used.

Any of them is an attribute of this module, which is where pickle finds them. They are made late because transformers' modeling
files, one a family, take longer to import than all else here.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, TOKENIZER_MAPPING, AutoConfig, AutoTokenizer
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

from .delta import DeltaMixin
from .families import FAMILIES, FFNInterface
from .fast import FastConfigMixin, FastModelMixin
from .fastcrammedbert import configuration_fastcrammedbert

_DECODERS = ("AutoModelForCausalLM", "AutoModelWithLMHead")
_AUTO_CLASSES: list[Any] = [
    value
    for name, value in vars(modeling_auto).items()
    if isinstance(value, type)
    and issubclass(value, _BaseAutoModelClass)
    and getattr(value, "_model_mapping", None) is not None
    and name not in _DECODERS
]


def known_types() -> list[str]:
    """The model types of the table that the installed transformers has."""
    return [model_type for model_type in FAMILIES if model_type in CONFIG_MAPPING]


def dense_config_name(model_type: str) -> str:
    """The name of transformers' config class; nothing is imported for it."""
    return CONFIG_MAPPING_NAMES.get(model_type) or CONFIG_MAPPING[model_type].__name__


def heads(model_type: str) -> dict[str, list[Any]]:
    """The names of a family's classes in transformers, the base model's first, and the Auto classes that give them; those of
    decoders are left out. Nothing is imported for it."""
    found: dict[str, list[Any]] = {}
    for auto in _AUTO_CLASSES:
        mapping = auto._model_mapping
        names = mapping._model_mapping.get(model_type, ())
        if not names and model_type not in CONFIG_MAPPING_NAMES:  # somebody else's family, registered as ours are
            names = getattr(mapping._extra_content.get(CONFIG_MAPPING[model_type]), "__name__", ())
        for name in (names,) if isinstance(names, str) else names:
            found.setdefault(name, []).append(auto)
    return dict(sorted(found.items(), key=lambda item: "For" in item[0]))


# model type -> what has been made for it
_configs: dict[str, Any] = {}
_models: dict[str, dict[Any, Any]] = {}
_registered: set[str] = set()


def config_class(model_type: str) -> Any:
    """``Fast<Family>Config``."""
    if model_type not in _configs:
        _configs[model_type] = _make_config(FAMILIES[model_type], CONFIG_MAPPING[model_type])
    return _configs[model_type]


def _make_config(row: FFNInterface, dense: Any) -> Any:
    class Config(FastConfigMixin, dense):
        model_type = f"fast{row.model_type}"
        # transformers' default names no module of most families. It takes an entry that is exactly the embedding out where that is
        # tied to a head: the two must not be sharded apart.
        base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
            row.embeddings: "free_full_weight",
            f"{row.layers}.*": "free_full_weight",
        }
        base_model_tp_plan = _outside_ffns(row, dense.base_model_tp_plan)
        dense_model_type: ClassVar[str] = row.model_type
        fff: Any = "1x11"

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            # Whoever asks an Auto class for a model or a tokenizer has made a config before.
            register_models(row.model_type)
            return super().__new__(cls)

    return _named(
        Config,
        f"Fast{dense.__name__}",
        f"""``{dense.__name__}`` and ``fff``: which layers hold which FFF (see ``FastConfigMixin``); "1x11" in all layers by default.

    ```python
    >>> Fast{dense.__name__}(fff="8x8").fff_layers[0].active_nodes
    72
    ```
    """,
    )


def _outside_ffns(row: FFNInterface, plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """A tensor-parallel plan without the projections that an FFF replaces; an FFF itself is on each device as a whole."""
    is_ffn = row.ffn_key().search
    return plan and {name: style for name, style in plan.items() if not is_ffn(f"{name.replace('*', '0')}.")}


def model_classes(model_type: str) -> dict[Any, Any]:
    """A family's classes in transformers -> the Fast ones. Imports the family's modeling file."""
    if model_type not in _models:
        _models[model_type] = _make_models(model_type)
    return _models[model_type]


def _make_models(model_type: str) -> dict[Any, Any]:
    config = config_class(model_type)
    dense = {name: _dense_class(autos, name, model_type) for name, autos in heads(model_type).items()}
    base = next(iter(dense.values()))
    common = next(c for c in base.__mro__[1:] if c.__name__.endswith("PreTrainedModel"))
    prefix = common.__name__.removesuffix("PreTrainedModel")
    pretrained = type("PreTrained", (DeltaMixin, FastModelMixin, common), {"config_class": config})
    _named(pretrained, f"Fast{common.__name__}", f"Base of all Fast{prefix} classes.")
    made = {}
    for name, dense_class in dense.items():
        fast = type(name, (pretrained, dense_class), {})
        text = (
            f"transformers' ``{name}``, with the feedforward networks replaced as its config says (``Fast{prefix}Config``). "
            "``import hf_fff`` makes the Auto classes load it."
        )
        made[dense_class] = _named(fast, f"Fast{name}", text)
    return made


def _dense_class(autos: list[Any], name: str, model_type: str) -> Any:
    found = autos[0]._model_mapping[CONFIG_MAPPING[model_type]]
    return next(c for c in (found if isinstance(found, tuple) else (found,)) if c.__name__ == name)


def _named(made: Any, name: str, text: str) -> Any:
    made.__name__ = made.__qualname__ = name
    made.__module__, made.__doc__ = __name__, text
    return made


def fast_class(dense_class: Any) -> Any:
    """The Fast class for a class of transformers; None where there is none."""
    model_type = getattr(getattr(dense_class, "config_class", None), "model_type", None)
    return model_classes(model_type).get(dense_class) if model_type in known_types() else None


def class_names(model_type: str) -> list[str]:
    """The public names of a family's classes, its config's first. Nothing is imported for it."""
    return [f"Fast{dense_config_name(model_type)}", *(f"Fast{name}" for name in heads(model_type))]


def __getattr__(name: str) -> Any:
    for model_type in known_types() if name.startswith("Fast") else ():
        if name == f"Fast{dense_config_name(model_type)}":
            return config_class(model_type)
        prefix = dense_config_name(model_type).removesuffix("Config")
        if name.startswith(f"Fast{prefix}") and name in (*class_names(model_type), f"Fast{prefix}PreTrainedModel"):
            made = model_classes(model_type)
            every = {c.__name__: c for fast in made.values() for c in fast.__mro__[:2]}
            return every[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> Iterator[str]:
    return iter([*globals(), *(name for model_type in known_types() for name in class_names(model_type))])


# --- the Auto classes -----------------------------------------------------------------------------------------------


def register() -> None:
    """Registers all configs; models and tokenizers follow when a config is made. Doing it again changes nothing."""
    for model_type in known_types():
        config = config_class(model_type)
        AutoConfig.register(config.model_type, config, exist_ok=True)
    configuration_fastcrammedbert.register()


def register_models(model_type: str) -> None:
    """Makes the Auto classes know a family's models, and ``AutoTokenizer`` its tokenizer."""
    if model_type in _registered:
        return
    _registered.add(model_type)
    config = config_class(model_type)
    by_name = {dense.__name__: fast for dense, fast in model_classes(model_type).items()}
    for name, autos in heads(model_type).items():
        for auto in autos:
            auto.register(config, by_name[name], exist_ok=True)
    tokenizer: Any = TOKENIZER_MAPPING.get(CONFIG_MAPPING[model_type], None)
    if isinstance(tokenizer, tuple):
        tokenizer = tokenizer[1] or tokenizer[0]
    if tokenizer is not None:
        AutoTokenizer.register(config, fast_tokenizer_class=tokenizer, exist_ok=True)


def register_family(row: FFNInterface) -> None:
    """Adds a family to the table: its classes can be imported from ``hf_fff`` at once, and the Auto classes know them.

    Args:
        row: where the family keeps its feedforward networks. Its model type is one of transformers, or one that has been
            registered with ``AutoConfig`` and the other Auto classes.

    Raises:
        ValueError: the installed transformers knows no such model type, or no model of it.
        TypeError: not a row.
    """
    if not isinstance(row, FFNInterface):
        raise TypeError(f"a family is an FFNInterface, not {type(row).__name__}")
    if row.model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers knows no model_type={row.model_type!r}: register its config with AutoConfig, and its models with "
            "AutoModel and the like, before"
        )
    if not heads(row.model_type):
        raise ValueError(f"transformers knows no encoder of model_type={row.model_type!r}: register it with AutoModel")
    FAMILIES[row.model_type] = row
    _configs.pop(row.model_type, None)
    _models.pop(row.model_type, None)
    _registered.discard(row.model_type)
    register()
