"""From a torch model to a graph of OpenVINO in which each FFF is one operation."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    openvino, factory = engine(), _factory()
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


def fuse_norms(graph: Any) -> int:
    """Lets FFFs do themselves what follows them in a block whose norm comes last: output bias, residual and layer norm, in one pass
    over their outputs instead of several of the engine's. Returns how many do; others stay as they are.

    For hidden tokens the output is then 0.
    """
    openvino, factory, count = engine(), _factory(), 0
    for node in operations(graph):
        if (norm := _norm_behind(node)) is None:
            continue
        vectors = [openvino.op.Constant(v, shared_memory=False).output(0) for v in (norm.bias, norm.scale, norm.shift)]
        told = {**node.get_attributes(), "epsilon": norm.epsilon}
        new = factory.create(node.get_type_name(), [*node.input_values(), *vectors], told)
        new.set_friendly_name(node.get_friendly_name())
        norm.end.replace(new.output(0))
        count += 1
    return count


def _factory() -> Any:
    """What makes our operations."""
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(extension()))
    return factory


@dataclass
class _Norm:
    """The layer norm of x + y + bias: float32 vectors, and the output in the graph."""

    bias: Any
    scale: Any
    shift: Any
    epsilon: float
    end: Any


def _norm_behind(node: Any) -> _Norm | None:
    """What follows an FFF of x, where that is the layer norm of x + FFF(x) + bias and nothing else sees what lies between."""
    size = node.get_output_partial_shape(0)[-1]
    if size.is_dynamic or node.get_output_element_type(0) != engine().Type.f32:
        return None
    hidden, x = size.get_length(), _place(node.input_value(0))

    def follow(output: Any, kind: str) -> tuple[Any, Any]:
        """The node of that kind which alone takes an output, and its other input; None where there is none."""
        users = list(output.get_target_inputs())
        if len(users) != 1 or (user := users[0].get_node()).get_type_name() != kind:
            return None, None
        return user, user.input_value(1 - users[0].get_index())

    def vector(output: Any) -> Any:
        """Its values ``[hidden]``, if it is a constant that goes along the last dimension."""
        of = output.get_node()
        if of.get_type_name() != "Constant" or of.get_output_shape(0)[-1:] != [hidden] or of.data.size != hidden:
            return None
        return np.array(of.data, np.float32).reshape(-1)

    bias = np.zeros(hidden, np.float32)
    sums, other = follow(node.output(0), "Add")
    if sums is not None and (added := vector(other)) is not None:
        bias = added
        sums, other = follow(sums.output(0), "Add")
    if sums is None or _place(other) != x:
        return None
    users = list(sums.output(0).get_target_inputs())
    mvn = users[0].get_node()
    if len(users) != 1 or mvn.get_type_name() != "MVN" or not _is_layer_norm(mvn):
        return None
    end, known = mvn.output(0), {"Multiply": np.ones(hidden, np.float32), "Add": np.zeros(hidden, np.float32)}
    for kind in known:  # left out of the graph where they change nothing
        user, other = follow(end, kind)
        if user is not None and (values := vector(other)) is not None:
            end, known[kind] = user.output(0), values
    return _Norm(bias, known["Multiply"], known["Add"], float(mvn.get_attributes()["eps"]), end)


def _place(output: Any) -> tuple[str, int]:
    """Where an output is in its graph."""
    return output.get_node().get_name(), output.get_index()


def _is_layer_norm(mvn: Any) -> bool:
    """Over the last dimension, with the variance, epsilon inside the root."""
    told, axes = mvn.get_attributes(), mvn.input_value(1).get_node()
    if axes.get_type_name() != "Constant" or not told["normalize_variance"]:
        return False
    last = [int(axis) for axis in axes.data.reshape(-1)]
    return told["eps_mode"].lower() == "inside_sqrt" and last in ([-1], [len(mvn.get_output_partial_shape(0)) - 1])


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
