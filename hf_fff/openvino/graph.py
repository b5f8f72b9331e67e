"""From a torch model to a graph of OpenVINO in which each FFF is one operation."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..exporting import Positional, example_of, private_copy
from ..layers import FFF, ChannelsFirst, NoFFN
from ..ops import ACTIVATIONS, pack
from .library import engine, extension

# What a hidden token holds reaches its neighbours through a convolution: the trees go over all tokens.
_MIXING = {"convbert"}


def to_graph(model: Any) -> tuple[Any, str]:
    """The graph in float32, with dynamic shapes, and the name of the class of the outputs. The model stays as it is.

    Raises:
        ValueError: the model is no float32, bfloat16 or float16 model on a CPU, or OpenVINO cannot convert it.
    """
    traced = Positional(_own_copy(model)).eval()
    example = example_of(model)
    openvino, extensions = engine(), [str(extension()), _operation(traced)]
    with _quiet(), torch.no_grad():
        try:
            graph = openvino.convert_model(traced, example_input=example, extension=extensions, share_weights=False)
        except Exception as error:  # of many types
            kind = getattr(model.config, "model_type", "?")
            raise ValueError(f"OpenVINO cannot convert this {type(model).__name__} ({kind}): {error}") from error
    for port in graph.inputs:
        port.get_tensor().set_names({next(name for name in example if name in port.get_names())})
    for port, name in zip(graph.outputs, traced.names, strict=True):
        port.get_tensor().set_names({name})
    return graph, traced.kind


def _own_copy(model: Any) -> Any:
    """The copy that the engine converts, with what it is to find in the trees."""
    own = private_copy(model, "OpenVINO")
    for module in list(own.modules()):
        if isinstance(module, FFF):
            settings = [module.n_trees, ACTIVATIONS.index(module.config.activation)]
            module.register_buffer("settings", torch.tensor(settings), persistent=False)
        elif not isinstance(module, ChannelsFirst):
            for child in module.children():  # zeros of one token, which the output bias swallows when the graph is made
                if isinstance(child, NoFFN):
                    child.forward = lambda x: x.new_zeros(x.shape[-1])  # type: ignore[method-assign]
    return own


def _operation(traced: Positional) -> Any:
    """An extension that makes one operation of each FFF."""
    from openvino.frontend.pytorch import ModuleExtension

    skip_hidden = traced.model.config.model_type.removeprefix("fast") not in _MIXING

    def convert(module: FFF, operation: Any, x: Tensor) -> Tensor:
        weights = (module.weight_in, module.bias_in, module.weight_out, module.settings)
        mask = traced.mask
        one_a_token = mask is not None and mask.numel() * module.hidden_size == x.numel()
        return operation(x, *weights, mask) if skip_hidden and one_a_token else operation(x, *weights)

    return ModuleExtension(FFF, "hf_fff::FFF", evaluate=lambda module, x, *_: torch.zeros_like(x), convert=convert)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of tracing: that sizes become constants is looked at in our tests, not by users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def operations(graph: Any) -> list[Any]:
    """The FFFs of a graph, packed or not."""
    return [node for node in graph.get_ordered_ops() if node.get_type_name() in ("FFF", "PackedFFF")]


def pack_rows(graph: Any, rows: str) -> None:
    """Puts packed layers in the place of the FFFs of a graph of float32: rows of "int8" or "bf16", a constant of bytes each.

    What the operation takes and gives stays float32, which is what the engine has there: it keeps the residual and the norms in
    float32 even where its products are of int8 or bfloat16.

    Raises:
        ValueError: a weight is not finite.
    """
    from openvino.utils.node_factory import NodeFactory

    openvino, factory = engine(), NodeFactory()
    factory.add_extension(str(extension()))
    known: dict[tuple[str, ...], Any] = {}  # layers that share their weights, as ALBERT's
    for node in operations(graph):
        x, *weights = (node.input_value(i) for i in range(4))
        mask = [node.input_value(4)] if node.get_input_size() == 5 else []
        told = node.get_attributes()
        key = tuple(w.get_node().get_friendly_name() for w in weights)
        if key not in known:
            packed = pack(*(torch.tensor(w.get_node().get_data()) for w in weights), int(told["n_trees"]), rows)
            known[key] = openvino.op.Constant(packed.numpy(), shared_memory=False)
            known[key].set_friendly_name(f"{node.get_friendly_name()}.packed")
        new = factory.create("PackedFFF", [x, known[key].output(0), *mask], {"activation": told["activation"]})
        new.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(new.output(0))


def align_rows(graph: Any) -> None:
    """Copies packed layers of a graph that was read to the start of a cache line: in the file they lie anywhere, and the engine maps
    it, so that each load of the kernel would touch two lines."""
    openvino = engine()
    known: dict[int, Any] = {}
    for node in operations(graph):
        if node.get_type_name() == "PackedFFF":
            data = node.input_value(1).get_node().get_data()
            where = data.ctypes.data
            if where not in known:
                known[where] = openvino.op.Constant(data, shared_memory=False)
                known[where].set_friendly_name(node.input_value(1).get_node().get_friendly_name())
            node.input(1).replace_source_output(known[where].output(0))
