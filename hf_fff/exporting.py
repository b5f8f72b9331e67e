"""A model as engines take it: a float32 copy that is called by position and returns tensors."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import Packed

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Positional(nn.Module):
    """A model that takes tensors by position and returns a tuple of tensors; knows the mask while it runs.

    Attributes:
        names: of the tensors that the last call returned.
        kind: the class of its outputs, such as ``"BaseModelOutput"``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.mask: Tensor | None = None
        self.names: list[str] = []
        self.kind = ""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Ids ``[..., tokens]`` -> the tensors among the model's outputs."""
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        self.mask = attention_mask
        try:
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **segments)
        finally:
            self.mask = None
        found = {name: value for name, value in out.items() if isinstance(value, Tensor)}
        self.names, self.kind = list(found), type(out).__name__
        return tuple(found.values())


def inputs_of(model: Any) -> tuple[str, ...]:
    """What a graph takes: segment ids only where the model has more than one kind of segment."""
    known = inspect.signature(model.forward).parameters
    segments = "token_type_ids" in known and getattr(model.config, "type_vocab_size", 2) > 1
    return INPUTS if segments else INPUTS[:2]


def example_of(model: Any) -> dict[str, Tensor]:
    """Inputs to trace with, by name: ``[2, 9]``, of multiple choice ``[2, 3, 9]``."""
    shape = (2, 3, 9) if "MultipleChoice" in type(model).__name__ else (2, 9)
    ids = torch.arange(2, 2 + 9).expand(shape) % model.config.vocab_size
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {name: example[name].contiguous() for name in inputs_of(model)}


def complete(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """What the graph takes, by name: tokens are visible and of the first segment unless told otherwise."""
    ids = tensors["input_ids"]
    fill = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
    return {name: tensors[name] if name in tensors else fill[name](ids) for name in names}


def private_copy(model: Any, engine: str) -> Any:
    """A float32 copy to be changed, which shares its parameters with the model where they are float32.

    Raises:
        ValueError: the model is no float32, bfloat16 or float16 model on a CPU, or it is packed.
    """
    packed = next((name for name, module in model.named_modules() if isinstance(module, Packed)), None)
    if packed is not None:
        raise ValueError(f"{packed} is packed: export the model that was optimized")
    tensors = list(chain(model.parameters(), model.buffers()))
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"the model has weights of dtype={tensor.dtype}, in which {engine} does not compute: model.float() makes them float32"
            )
        if tensor.device.type != "cpu":
            raise ValueError(f"the model is on device={tensor.device}: move it to the CPU first, model.cpu()")
    whole = all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())
    own = copy.deepcopy(model, {id(t): t for t in tensors}) if whole else copy.deepcopy(model).float()
    # As fast as "sdpa" in OpenVINO, whose softmax over nothing but minus infinity (a token that sees hidden ones alone) is NaN.
    own.set_attn_implementation("eager")
    return own


def only_model_in(module: Any) -> Any:
    """The transformers model that a module of another kind holds, or that it is.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [m for m in module.modules() if isinstance(m, PreTrainedModel)] if isinstance(module, nn.Module) else []
    if not found or not all(m in set(found[0].modules()) for m in found):
        raise ValueError(f"a transformers model is wanted, or what holds one, and this is a {type(module).__name__}")
    return found[0]
