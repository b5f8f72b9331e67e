"""What adapters need to know of a converted model."""

import re
from typing import Any

from torch import nn

from .layers.fff import Neurons


def fff_target_parameters(model: Any) -> list[str]:
    """The names of the matrices in a model's FFFs (and in the small MLPs that may stand in their place), for PEFT:

    ```python
    LoraConfig(target_modules=["query", "value"], target_parameters=fff_target_parameters(model))
    ```

    The vectors ``bias_in`` are left out: PEFT adapts matrices alone. Names are those of the model as it was before PEFT wrapped it,
    which is what further adapters need too; leave some out to adapt single layers.

    Raises:
        ValueError: the model holds no FFF.
    """
    # PEFT puts a wrapper around each parameter that it adapts, and a copy beside each module that is to be saved.
    wrapped = re.compile(r"^base_model\.model\.|\.base_layer(?=\.|$)|\.original_module$")
    found = [wrapped.sub("", name) for name, module in model.named_modules() if isinstance(module, Neurons)]
    modules = [name for name in dict.fromkeys(found) if ".modules_to_save." not in name]
    if not modules:
        raise ValueError(f"{type(model).__name__} holds no FFF whose parameters could be adapted: convert it before")
    return [f"{name}.{part}".removeprefix(".") for name in modules for part in ("weight_in", "weight_out")]


def check_not_adapted(model: nn.Module, use: str) -> None:
    """Raises ``ValueError`` where a model has adapters of PEFT that are not merged: what is to ``use`` it would read its weights
    without them."""
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(
                f"the model is adapted by PEFT ({name or 'the model'} is a {type(module).__name__}): "
                f"merge_and_unload() gives the model to {use}"
            )
