"""What sentence-transformers does around a transformer: prompts, truncation, pooling, normalisation."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLING = ("cls", "max", "mean", "mean_sqrt_len_tokens")


@dataclass(frozen=True)
class Embedding:
    """How token embeddings become one vector a text, as plain data.

    Args:
        modules: pairs of a name ("Pooling", "Normalize", ...) and its config, in order.
        max_length: tokens of a text at most.
        lower: texts are put into lower case.
        prompts: name -> what goes before a text.
        default_prompt: the name of the prompt that is used if none is named.
    """

    modules: tuple[tuple[str, dict[str, Any]], ...] = (("Pooling", {"pooling_mode": "mean"}),)
    max_length: int | None = None
    lower: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    @classmethod
    def of_folder(cls, root: Path, transformer: Path) -> "Embedding | None":
        """What ``modules.json`` and the files beside it say; None where there is none."""
        if not (root / "modules.json").is_file():
            return None
        rows = json.loads((root / "modules.json").read_text(encoding="utf-8"))[1:]
        modules = tuple(
            (
                row["type"].rpartition(".")[2],
                _json(root / row.get("path", "") / "config.json") if row.get("path") else {},
            )
            for row in rows
        )
        own, whole = _json(transformer / "sentence_bert_config.json"), _json(root / "config_sentence_transformers.json")
        return cls(
            modules,
            own.get("max_seq_length"),
            bool(own.get("do_lower_case")),
            dict(whole.get("prompts") or {}),
            whole.get("default_prompt_name"),
        )

    @classmethod
    def of_modules(cls, model: Any) -> "Embedding":
        """The same of a ``SentenceTransformer``."""
        first, *rest = model.children()
        modules = tuple((type(m).__name__, dict(getattr(m, "get_config_dict", dict)())) for m in rest)
        lower = bool(getattr(first, "do_lower_case", False))
        return cls(modules, model.max_seq_length, lower, dict(model.prompts or {}), model.default_prompt_name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Embedding":
        return cls(**{**values, "modules": tuple((name, config) for name, config in values["modules"])})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def prompted(self, text: str, prompt: str | None, prompt_name: str | None) -> str:
        """A text with what goes before it.

        Raises:
            ValueError: there is no prompt of that name.
        """
        name = prompt_name or self.default_prompt
        if prompt is None and name is not None:
            if name not in self.prompts:
                raise ValueError(f"prompt_name={name!r} is not known (allowed: {', '.join(self.prompts) or 'none'})")
            prompt = self.prompts[name]
        text = (prompt or "") + text
        return text.lower() if self.lower else text

    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """``[rows, tokens, H]`` and the mask ``[rows, tokens]`` -> ``[rows, size]``.

        Raises:
            ValueError: a module or a way of pooling that is not known here.
        """
        vectors: Tensor | None = None
        for name, config in self.modules:
            if name == "Pooling":
                vectors = torch.cat([_pool(mode, tokens, mask) for mode in _modes(config)], dim=-1)
            elif name == "Normalize" and vectors is not None:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            elif name != "Dropout":
                raise ValueError(
                    f"encode does not know the module {name!r} (known: Pooling, Normalize): pool last_hidden_state yourself"
                )
        if vectors is None:
            raise ValueError("encode needs a Pooling module, and modules.json names none")
        return vectors


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _modes(config: Mapping[str, Any]) -> list[str]:
    given = config.get("pooling_mode") or [mode for key, mode in _LEGACY.items() if config.get(key)] or "mean"
    modes = [given] if isinstance(given, str) else list(given)
    if unknown := [mode for mode in modes if mode not in _POOLING]:
        raise ValueError(f"pooling_mode={unknown[0]!r} is not known to encode (allowed: {', '.join(_POOLING)})")
    if config.get("include_prompt") is False:
        raise ValueError("include_prompt=False is not known to encode")
    return modes


def _pool(mode: str, tokens: Tensor, mask: Tensor) -> Tensor:
    visible = mask.unsqueeze(-1).to(tokens.dtype)
    if mode == "cls":
        first = mask.to(torch.int).argmax(dim=1)
        return tokens[torch.arange(len(tokens)), first]
    if mode == "max":
        return tokens.masked_fill(visible == 0, float("-inf")).max(dim=1).values
    count = visible.sum(dim=1).clamp(min=1e-9)
    return (tokens * visible).sum(dim=1) / (count if mode == "mean" else count.sqrt())
