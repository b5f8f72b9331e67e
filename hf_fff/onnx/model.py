"""``export``: a model in PyTorch, written as an ONNX file with what belongs to it."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exporting import Positional, example_of, only_model_in, private_copy
from ..files import atomic_folder, check_output
from ..layers import FFF
from .functions import DOMAIN, OPSET, VERSION, name_of, text_of

PRECISIONS = ("f32", "int8")
_GRAPH, _WEIGHTS = "model.onnx", "model.onnx_data"  # optimum's names
_INLINE = 1_800_000_000  # bytes of weights that fit into the one file, of which protobuf allows 2 GiB
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(
    model: Any, folder: str | Path, precision: str = "f32", *, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Writes ``model.onnx``, config and tokenizer to a folder, which appears whole or not at all. The model stays as it was.

    The file holds all that a runtime needs: ``onnxruntime.InferenceSession`` opens it without hf_fff and PyTorch. What is converted
    and what is dense both work. Batch and length are free.

    Args:
        model: a transformers model with any head, or what holds one, as a ``SentenceTransformer`` does.
        folder: a folder that does not exist, or is empty.
        precision: "f32"; or "int8": ONNX Runtime's dynamic quantisation of the matrix products with weights, those of attention
            above all. Trees stay in float32.
        tokenizer: to be saved; a ``SentenceTransformer`` brings its own.
        overwrite: replace a folder that is not empty.

    Returns:
        The path of the file.

    Raises:
        ImportError: a package of the extra ``onnx`` is missing.
        FileExistsError: the folder is not empty, and ``overwrite`` is not set.
        ValueError: another precision, a float64 model, a packed one, one that torch.onnx cannot export.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision={precision!r} is not known here (allowed: {', '.join(PRECISIONS)}); "
            "hf_fff.openvino has bf16, and is the faster engine for trees"
        )
    for name in _PACKAGES:
        _package(name)
    check_output(Path(folder), overwrite=overwrite)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    inner = only_model_in(model)
    graph = to_model(inner)
    with atomic_folder(Path(folder), overwrite=overwrite) as target:
        if precision == "int8":
            with tempfile.TemporaryDirectory(prefix=".", dir=target) as work:
                _save(graph, Path(work) / _GRAPH)
                _quantise(Path(work) / _GRAPH, target / _GRAPH)
        else:
            _save(graph, target / _GRAPH)
        inner.config.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
    return Path(folder) / _GRAPH


def operations(path: str | Path) -> int:
    """How many FFFs the graph of an ONNX file has."""
    graph = _package("onnx").load(path, load_external_data=False).graph
    return sum(node.domain == DOMAIN for node in graph.node)


def to_model(model: Any) -> Any:
    """The ``onnx_ir.Model`` of a transformers model in float32, each FFF a function of the domain ``hf_fff``.

    Raises:
        ValueError: the model is no float32, bfloat16 or float16 model on a CPU, it is packed, or torch.onnx cannot export it.
    """
    own = private_copy(model, "ONNX Runtime")
    kinds = {}
    for module in own.modules():
        if isinstance(module, FFF):
            kinds[name_of(module.config)] = text_of(module.config)
            module.forward = _operation(module)  # type: ignore[method-assign]
    traced, example = Positional(own).eval(), example_of(own)
    example["attention_mask"][-1, ..., 5:] = 0  # one that hides nothing would be left out of the graph
    axes = ("batch_size", "num_choices", "sequence_length")
    free = dict(enumerate(axes if example["input_ids"].ndim == 3 else axes[::2]))
    with _quiet(), torch.no_grad():
        try:
            traced(**example)  # tells the names of its outputs
            program = torch.onnx.export(
                traced,
                tuple(example.values()),
                input_names=list(example),
                output_names=traced.names,
                dynamic_shapes=tuple(dict(free) for _ in example),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # of many types
            kind = getattr(model.config, "model_type", "?")
            raise ValueError(f"torch.onnx cannot export this {type(model).__name__} ({kind}): {error}") from error
    assert program is not None
    parse, ir = import_module("onnx.parser").parse_function, _package("onnx_ir")
    for text in kinds.values():
        function = ir.serde.deserialize_function(parse(text))
        program.model.functions[function.identifier()] = function
    return program.model


def _operation(layer: FFF) -> Any:
    """A forward of which torch.onnx makes one node."""
    name = f"{DOMAIN}::{name_of(layer.config)}"

    def forward(x: Tensor) -> Tensor:
        weights = (layer.weight_in, layer.bias_in, layer.weight_out)
        result: Tensor = torch.onnx.ops.symbolic(name, (x, *weights), dtype=x.dtype, shape=x.shape, version=VERSION)
        return result

    return forward


def _save(graph: Any, path: Path) -> None:
    """One file, or where that would be too large for one, two."""
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    _package("onnx_ir").save(graph, path, external_data=_WEIGHTS if size > _INLINE else None)


def _quantise(plain: Path, path: Path) -> None:
    quantization = import_module("onnxruntime.quantization")
    with _quiet():
        quantization.quantize_dynamic(
            plain,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=(plain.parent / _WEIGHTS).exists(),
        )


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} cannot be imported ({error}): install it with `pip install 'hf-fff[onnx]'`"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the reports of tracing and of ONNX Runtime's quantisation."""
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
