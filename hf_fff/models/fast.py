"""What every Fast<Family> class adds to the transformers class that it inherits from."""

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from transformers import initialization as init

from ..config import FFFConfig, layers_from_json, layers_to_json, resolve_layers
from ..layers import Feedforward, OutputBias
from .families import FAMILIES, FFNInterface


class FastConfigMixin:
    """Adds ``fff`` to a family's config: which layers hold which FFF.

    ``fff`` may be given as ``"KxD"`` (or ``"mlp:WIDTH"``, ``"KxD+mlp:WIDTH"``, ``"none"``), an ``FFFConfig``, a dict from layer to config, or the JSON object itself, which is what it
    becomes: ``{"version": 1, "kind": "tree", "n_trees": 8, ...}`` or ``{"version": 1, "layers": {"0": {...}, ...}}``.
    """

    dense_model_type: ClassVar[str]
    if TYPE_CHECKING:  # transformers makes fields of a config's annotations
        fff: Any
        num_hidden_layers: int

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self._normalise_fff()

    def _normalise_fff(self) -> None:
        value = self.fff
        if isinstance(value, dict) and "version" in value:
            layers = layers_from_json(value, self.num_hidden_layers)
        else:
            activation = self.family.activation_of(self)
            defaults = {} if isinstance(value, FFFConfig) else {"activation": activation}
            layers = resolve_layers(value, self.num_hidden_layers, **defaults)
        self.fff = layers_to_json(layers, self.num_hidden_layers)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "fff" in kwargs:  # transformers would set it last, as it is
            config_dict = {**config_dict, "fff": kwargs.pop("fff")}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @property
    def family(self) -> FFNInterface:
        """Where the family keeps its feedforward networks."""
        return FAMILIES[self.dense_model_type]

    @property
    def fff_layers(self) -> dict[int, FFFConfig]:
        """Layer number -> its FFF; layers that are not in it are dense."""
        return layers_from_json(self.fff, self.num_hidden_layers)


def replace_ffns(base_model: nn.Module, family: FFNInterface, layers: dict[int, FFFConfig]) -> None:
    """Puts new FFFs where the FFNs of ``layers`` are."""
    family.check_shared(base_model, layers)
    for index, block in enumerate(family.blocks(base_model)):
        for ffn in family.ffns(block) if index in layers else ():
            if ffn.fast is None:  # a shared one is there already
                ffn.replace(layers[index])


class FastModelMixin:
    """Goes before the transformers class in the bases of a Fast<Family> class."""

    if TYPE_CHECKING:
        config: Any
        base_model: Any

    @property
    def family(self) -> FFNInterface:
        return self.config.family

    def post_init(self) -> None:
        # The surgery belongs to construction: from_pretrained then finds the modules that the checkpoint is for.
        replace_ffns(self.base_model, self.family, self.config.fff_layers)
        super().post_init()  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls) -> bool:
        """What transformers asks of what lies outside it, and then passes over modules without parameters of their own when it gives
        first values; by those some families (ModernBERT) give their children's. A Fast class is as custom as what it inherits from.
        """
        dense: Any = next(c for c in cls.__mro__ if issubclass(c, nn.Module) and not issubclass(c, FastModelMixin))
        return dense.is_custom_code()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, (Feedforward, OutputBias)):
            module.reset_parameters(init)

    def _initialize_weights(self, module: Any, is_custom_code: bool = False) -> None:
        fresh = module is self and not getattr(module, "_is_hf_initialized", False)
        super()._initialize_weights(module, is_custom_code)  # type: ignore[misc]
        # The whole model comes last. The FFFs in a head's base model were given to that, which is transformers' own, does not
        # know them and takes them for done. What a checkpoint has filled says so itself, and stays as it is.
        for part in module.modules() if fresh else ():
            if isinstance(part, (Feedforward, OutputBias)):
                part._is_hf_initialized = False  # type: ignore[assignment]
                super()._initialize_weights(part, is_custom_code)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, with one difference: FFN weights that are missing, superfluous or of another shape are an
        error, never a reinitialisation.

        Raises:
            ValueError: the checkpoint's FFN weights are not those that the config describes.
            RuntimeError: other weights are of another shape, and ``ignore_mismatched_sizes`` is not set.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if kwargs.get("state_dict") != {}:  # which is how transformers asks for first values of everything
            _check_ffn_weights(model, info, source)
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            raise RuntimeError(
                f"weights in {source} are of another shape than its config describes: {', '.join(_mismatched(info))} "
                "(ignore_mismatched_sizes=True initialises them anew)"
            )
        _align(model)
        return (model, info) if output_loading_info else model


def _align(model: nn.Module) -> None:
    """Copies parameters that a memory-mapped file left off the boundaries of an allocation: matrix products round differently
    on them, and a loaded model is to give the outputs of the saved one bit for bit."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _mismatched(info: dict[str, Any]) -> list[str]:
    return sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])


def _check_ffn_weights(model: Any, info: dict[str, Any], source: Any) -> None:
    is_ffn = model.family.ffn_key().search
    problems = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of another shape": _mismatched(info),
    }
    found = {what: sorted(filter(is_ffn, keys)) for what, keys in problems.items()}
    if any(found.values()):
        text = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
            for what, keys in found.items()
            if keys
        )
        raise ValueError(
            f"the feedforward weights in {source} are not those that its config describes: {text}. "
            "A dense checkpoint becomes a fast one by hf_fff.convert_ffn_to_fff, not by loading it under another config."
        )
