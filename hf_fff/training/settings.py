"""Arguments of a training from words: presets, a YAML file, and ``name=value``, each typed by the argument's own type."""

import json
import math
import types
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .arguments import FinetuningArguments

# How arXiv 2311.10770 trains crammed BERTs; on inputs of 128 tokens, which is the length by default.
PRESETS: dict[str, dict[str, Any]] = {
    "crammed-finetune": {
        "num_train_epochs": 5.0,
        "per_device_train_batch_size": 16,
        "learning_rate": 4e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.0,
    },
    "crammed-pretrain": {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-12,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "dropout": False,
        "mlm_probability": 0.25,
    },
}

# What the command says in other ways
_TAKEN = {
    "output_dir": "OUT",
    "seed": "--seed",
    "use_cpu": "--device",
    "disable_tqdm": "--json",
    "resume_from_checkpoint": "--resume",
    "metric_for_best_model": "--best",
    "greater_is_better": "--best",
    "load_best_model_at_end": "--best",
}
_LOWER = ("loss", "perplexity", "mse")  # of which less is better
_TRUE, _FALSE, _NONE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}, {"none", "null"}


def preset(name: str) -> dict[str, Any]:
    """Raises ``ValueError`` for a preset that is not known."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not known (allowed: {', '.join(PRESETS)})")
    return dict(PRESETS[name])


def read_settings(path: Path) -> dict[str, Any]:
    """The arguments of a YAML file, a mapping from names to values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML mapping; as ``typed``.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold a mapping from names of arguments to values, not {type(found).__name__}")
    return typed(found)


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """The arguments of ``name=value`` words.

    Raises:
        ValueError: a word without "="; as ``typed``.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is not of the form name=value")
        found[name.strip()] = value.strip()
    return typed(found)


def finetuning_arguments(
    settings: Mapping[str, Any], *, evaluates: bool, best: str | None = None, patience: int | None = None, **fixed: Any
) -> FinetuningArguments:
    """The arguments of a training that evaluates, where it does, and saves after every epoch, or every 500 steps where ``max_steps`` are
    given, and keeps two checkpoints; ``settings`` come before that.

    Args:
        settings: as ``preset``, ``read_settings`` and ``parse_settings`` give them.
        evaluates: whether there is something to evaluate on.
        best: the metric by which the best model is kept, not the last one.
        patience: whether the training may end early, by ``best``.
        fixed: arguments that are no settings, such as ``output_dir``.

    Raises:
        ValueError: a choice or an evaluation with nothing to evaluate on; as ``FinetuningArguments``.
    """
    if not evaluates and (best or patience):
        raise ValueError(f"{'--best' if best else '--patience'} needs something to evaluate on (--eval)")
    if not evaluates and settings.get("eval_strategy", "no") != "no":
        raise ValueError(f"eval_strategy={settings['eval_strategy']!r} needs something to evaluate on (--eval)")
    how = "steps" if settings.get("max_steps", -1) > 0 else "epoch"
    options: dict[str, Any] = {"save_strategy": how, "save_total_limit": 2, "logging_steps": 10}
    if evaluates:
        options |= {"eval_strategy": how, "eval_steps": settings.get("save_steps", 500)}
    options |= settings
    if best:
        options |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": best,
            "greater_is_better": best not in _LOWER,
            "save_strategy": options["eval_strategy"],
            "save_steps": options["eval_steps"],
            "restore_callback_states_from_checkpoint": True,  # how long the patience has lasted
        }
    return FinetuningArguments(**{**options, **fixed})


def typed(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Values, which may be words, as ``FinetuningArguments`` take them.

    Raises:
        ValueError: an argument that there is not, or that is told otherwise; a value of another type.
    """
    hints, found = _hints(), {}
    for name, value in values.items():
        if name in _TAKEN:
            raise ValueError(f"{name} is set by {_TAKEN[name]}")
        if name not in hints:
            close = get_close_matches(str(name), hints, n=3)
            told = f"did you mean {' or '.join(close)}?" if close else "see transformers.TrainingArguments"
            raise ValueError(f"there is no argument {name!r} ({told})")
        found[name] = _as_type(name, value, hints[name])
    return found


@cache
def _hints() -> dict[str, Any]:
    fields = FinetuningArguments.__dataclass_fields__
    return {
        name: hint for name, hint in get_type_hints(FinetuningArguments).items() if name in fields and fields[name].init
    }


def _as_type(name: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = [c.value for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for c in kind]
    choices += [c for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
    choices += FinetuningArguments.__dataclass_fields__[name].metadata.get("choices", [])
    word = value if isinstance(value, str) else str(value)
    low = word.lower()
    if type(None) in kinds and low in _NONE and "none" not in choices:
        return None
    if choices and word in choices:
        return word
    if bool in kinds and low in _TRUE | _FALSE:
        return low in _TRUE
    for kind in (int, float):
        if kind in kinds and not isinstance(value, bool):
            try:
                number = kind(word)
            except ValueError:
                continue
            if math.isfinite(number):
                return number
    for container, begun in ((dict, "{"), (list, "[")):
        if Any in kinds or container in (get_origin(k) or k for k in kinds):
            if isinstance(value, container):
                return value
            if word.startswith(begun):
                try:
                    return json.loads(word)
                except ValueError as error:
                    raise ValueError(f"{name}={word!r} is no JSON: {error}") from error
    if not choices and (str in kinds or Any in kinds) and not isinstance(value, (dict, list, bool)):
        return word
    raise ValueError(f"{name}={value!r} is not allowed (allowed: {_told(kinds, choices)})")


def _told(kinds: tuple[Any, ...], choices: list[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "none"}
    names |= {dict: "a JSON object", list: "a JSON list"}
    told = [names[k] for k in (get_origin(kind) or kind for kind in kinds) if k in names and not (choices and k is str)]
    return ", ".join([*map(str, choices), *told])
