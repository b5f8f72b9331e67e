"""What an FFF is made of, and how ``config.json`` says it. Knows no torch: a config can be read anywhere."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

FORMAT_VERSION = 1

# name in a model's config -> the operator's name for it
ACTIVATION_ALIASES = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "identity": "identity",
    "linear": "identity",
}
MAX_TREES, MAX_DEPTH, MAX_WIDTH = 65536, 24, 1 << 24

# kind -> the fields that say how large it is
KINDS: dict[str, tuple[str, ...]] = {
    "tree": ("n_trees", "depth"),
    "mlp": ("width",),
    "tree+mlp": ("n_trees", "depth", "width"),
    "none": (),
}
_SIZES = KINDS["tree+mlp"]

# kind -> how it is written, its sizes in the order above
_SHORTHANDS = {
    "tree": r"(\d+)x(\d+)",
    "mlp": r"mlp:(\d+)",
    "tree+mlp": r"(\d+)x(\d+)\+mlp:(\d+)",
    "none": "none",
}


def _require_int(field: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{field}={value!r} is not an integer (allowed: {low} to {high})")
    if not low <= value <= high:
        raise ValueError(f"{field}={value} is out of range (allowed: {low} to {high})")


def _require_number(field: str, value: Any, *, above_zero: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf") or (above_zero and value == 0):
        raise ValueError(f"{field}={value!r} must be a finite number {'above' if above_zero else 'of at least'} 0")


@dataclass(frozen=True)
class FFFConfig:
    """What stands in the place of one layer's feedforward network.

    ``kind="tree"``, the default: ``n_trees`` balanced binary trees of ``depth`` (arXiv 2311.10770 writes it ``KxD``).
    **Depth is counted as in the paper**: depth D visits D + 1 neurons, and a tree has ``2**(D+1) - 1`` of them. So "1x11"
    uses 12 of 4095 neurons, "8x8" 72 of 4088. ``kind="mlp"``: a dense MLP of ``width`` neurons ("mlp:72"). ``kind="none"``: no
    network at all, the output bias alone ("none"). These two are what a tree has to be measured against, and where they do
    as well, they are the better choice. ``kind="tree+mlp"``: trees and an MLP side by side, whose outputs are added ("4x8+mlp:64").

    Args:
        n_trees: K, the number of parallel trees (1 to 65536).
        depth: D (0 to 24).
        activation: "gelu" (exact, the default), "gelu_new" (tanh form), "relu", "silu", "identity", or one of the names that
            transformers has for them.
        kind: "tree", "mlp", "tree+mlp" or "none".
        routing_gradient: alpha of the straight-through routing gradient used in training; 0 is the paper's training.
        routing_temperature: tau of the same.
        width: neurons of the MLP (1 to 16777216).

    Raises:
        ValueError: a value out of range; the message names the field, the value and what is allowed.
    """

    n_trees: int | None = None
    depth: int | None = None
    activation: str = "gelu"
    kind: str = "tree"
    routing_gradient: float = 3.0
    routing_temperature: float = 1.0
    width: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not known (allowed: {', '.join(KINDS)})")
        sizes = KINDS[self.kind]
        for name in _SIZES:
            if name not in sizes and getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)!r} means nothing to kind={self.kind!r}")
        limits = {"n_trees": (1, MAX_TREES), "depth": (0, MAX_DEPTH), "width": (1, MAX_WIDTH)}
        for name in sizes:
            _require_int(name, getattr(self, name), *limits[name])
        if not isinstance(self.activation, str) or self.activation not in ACTIVATION_ALIASES:
            raise ValueError(f"activation={self.activation!r} is not known (allowed: {', '.join(ACTIVATION_ALIASES)})")
        object.__setattr__(self, "activation", ACTIVATION_ALIASES[self.activation])
        _require_number("routing_gradient", self.routing_gradient, above_zero=False)
        _require_number("routing_temperature", self.routing_temperature, above_zero=True)

    @property
    def has_trees(self) -> bool:
        """Whether there are trees, alone or beside an MLP."""
        return self.n_trees is not None

    @property
    def tree_nodes(self) -> int:
        """Nodes of one tree."""
        return 2 ** ((self.depth or 0) + 1) - 1 if self.has_trees else 0

    @property
    def nodes(self) -> int:
        """Neurons of the layer."""
        return (self.n_trees or 0) * self.tree_nodes + (self.width or 0)

    @property
    def active_nodes(self) -> int:
        """Neurons that one token uses."""
        return (self.n_trees or 0) * ((self.depth or 0) + 1) + (self.width or 0)

    @property
    def shorthand(self) -> str:
        """``"KxD"``, ``"mlp:WIDTH"``, ``"KxD+mlp:WIDTH"`` or ``"none"``."""
        trees, mlp = f"{self.n_trees}x{self.depth}" * self.has_trees, f"mlp:{self.width}" * (self.width is not None)
        return "+".join(filter(None, (trees, mlp))) or "none"

    @property
    def parts(self) -> "tuple[FFFConfig, ...]":
        """Trees and MLP, each for itself, of ``"tree+mlp"``; of ``"none"`` nothing; else the config itself."""
        if self.kind == "none":
            return ()
        if self.kind != "tree+mlp":
            return (self,)
        trees = dataclasses.replace(self, kind="tree", width=None)
        return trees, dataclasses.replace(self, kind="mlp", n_trees=None, depth=None)

    def to_dict(self) -> dict[str, Any]:
        other = set(_SIZES) - set(KINDS[self.kind])
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in other}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FFFConfig":
        fields = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(fields), key=str):
            raise ValueError(f"unknown fff field(s) {', '.join(map(repr, unknown))} (allowed: {', '.join(fields)})")
        required = KINDS.get(values.get("kind", "tree"), ()) if isinstance(values.get("kind", ""), str) else ()
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"fff field(s) {', '.join(map(repr, missing))} missing")
        return cls(**values)

    @classmethod
    def from_shorthand(cls, text: str, **fields: Any) -> "FFFConfig":
        """``"64x5"``: 64 trees of depth 5; ``"mlp:72"``: a dense MLP of 72 neurons; ``"4x8+mlp:64"``: both; ``"none"``: neither."""
        for kind, written in _SHORTHANDS.items():
            if match := re.fullmatch(written, text.strip()):
                sizes = zip(KINDS[kind], map(int, match.groups()), strict=True)
                return cls(kind=kind, **dict(sizes), **fields)  # type: ignore[arg-type]
        raise ValueError(
            f'fff={text!r} is not of the form "KxD" (trees x depth), such as "8x8" or "64x5", nor "mlp:WIDTH", nor both, '
            '"KxD+mlp:WIDTH", nor "none"'
        )


ConfigLike: TypeAlias = FFFConfig | str | Mapping[str, Any]
LayersLike: TypeAlias = ConfigLike | Mapping[int, ConfigLike]


def as_config(value: Any, **defaults: Any) -> FFFConfig:
    """An ``FFFConfig`` from one, from ``"KxD"``, or from its JSON fields; ``defaults`` fill what those leave open."""
    if isinstance(value, FFFConfig):
        return value
    if isinstance(value, str):
        return FFFConfig.from_shorthand(value, **defaults)
    if isinstance(value, Mapping):
        return FFFConfig.from_dict({**defaults, **value})
    raise ValueError(f'fff={value!r} must be an FFFConfig, a string such as "8x8", or a dict')


def _check_layers(layers: Iterable[Any], num_layers: int, field: str) -> list[int]:
    indices = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise ValueError(f"{field} has {layer!r}; the model has layers 0 to {num_layers - 1}")
        indices.append(layer)
    if not indices:
        raise ValueError(f"{field} is empty; name at least one of layers 0 to {num_layers - 1}")
    return indices


def resolve_layers(
    config: LayersLike, num_layers: int, target_layers: Iterable[int] | None = None, **defaults: Any
) -> dict[int, FFFConfig]:
    """Which layer gets which FFF: ``config`` for all (or for ``target_layers``), or a dict from layer to config."""
    if isinstance(config, Mapping) and config and all(isinstance(key, int) for key in config):
        if target_layers is not None:
            raise ValueError("target_layers and a dict of per-layer configs say the same thing twice: give one of them")
        by_layer = cast("Mapping[int, ConfigLike]", config)
        return {i: as_config(by_layer[i], **defaults) for i in sorted(_check_layers(by_layer, num_layers, "config"))}
    one = as_config(config, **defaults)
    chosen = range(num_layers) if target_layers is None else _check_layers(target_layers, num_layers, "target_layers")
    return dict.fromkeys(sorted(set(chosen)), one)


def layers_to_json(layers: Mapping[int, FFFConfig], num_layers: int) -> dict[str, Any]:
    """The ``"fff"`` object of ``config.json``: one set of fields where all layers agree, else ``"layers"``."""
    configs = list(layers.values())
    if configs and len(configs) == num_layers and all(c == configs[0] for c in configs):
        return {"version": FORMAT_VERSION, **configs[0].to_dict()}
    return {"version": FORMAT_VERSION, "layers": {str(i): layers[i].to_dict() for i in sorted(layers)}}


def layers_from_json(value: Mapping[str, Any], num_layers: int) -> dict[int, FFFConfig]:
    """The inverse of ``layers_to_json``.

    Raises:
        ValueError: a newer format, unknown or contradictory fields, layers that the model does not have.
    """
    fields = dict(value)
    version = fields.pop("version", None)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"fff.version={version!r} is not a format version (this hf_fff reads 1 to {FORMAT_VERSION})")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"fff.version={version} is newer than this hf_fff reads (up to {FORMAT_VERSION}): update hf_fff"
        )
    if "layers" not in fields:
        return resolve_layers(fields, num_layers)
    layers = fields.pop("layers")
    if fields:
        raise ValueError(
            f"fff has both 'layers' and {', '.join(map(repr, sorted(fields)))}: they contradict each other"
        )
    if not isinstance(layers, Mapping) or not all(isinstance(k, str) and k.isdecimal() for k in layers):
        raise ValueError("fff.layers must map layer numbers to fff fields")
    numbered: dict[int, Any] = {}
    for name, config in layers.items():
        if int(name) in numbered:
            raise ValueError(f"fff.layers names layer {int(name)} twice")
        numbered[int(name)] = config
    return resolve_layers(numbered, num_layers) if numbered else {}
