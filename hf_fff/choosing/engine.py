"""A candidate inside the engine that it will run in."""

import copy
import warnings
from itertools import chain
from typing import Any

ENGINES = ("torch", "openvino")
PRECISION = "int8"  # of OpenVINO's models: what is fastest there


def inside(model: Any, inputs: list[Any], tokenizer: Any, max_length: int) -> Any:
    """A model that looks as ``model`` does, with whose weights it shares memory, and whose outputs OpenVINO computes, in int8.

    Args:
        model: on the CPU.
        inputs: typical texts or batches of tensors, to see the ranges of the activations.
        max_length: tokens at which texts are cut.

    Raises:
        ImportError: openvino or nncf is not installed.
        RuntimeError: the library with the operation FFF can neither be found nor compiled.
    """
    from .. import openvino
    from ..openvino.embedding import Embedding

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*holds no FFF")  # the dense one
        how = Embedding(max_length=max_length)
        made = openvino.compile(model, PRECISION, texts=inputs, tokenizer=tokenizer, embedding=how)
    served = copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())}).eval()
    served.forward = made
    return served
