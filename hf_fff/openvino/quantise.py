"""int8 for all but the trees: post-training quantisation by NNCF."""

import fnmatch
import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..ops.loader import cpu_features
from ..surgery.text import Batch, as_batches, shuffled

_BATCH_TOKENS = 256  # small batches: inputs of similar length together, so that little padding is seen


def calibration_batches(texts: Any, tokenizer: Any, max_length: int, samples: int, seed: int = 0) -> list[Batch]:
    """Batches of at most ``samples`` texts, drawn by ``seed``.

    Raises:
        ValueError: there are no texts, or no tokenizer for them.
    """
    if texts is None:
        raise ValueError(
            "precision='int8' needs texts=..., some hundreds of typical inputs (unlabelled), to see the ranges of the activations"
        )

    def given() -> Any:
        if tokenizer is None:
            raise ValueError("precision='int8' with texts needs tokenizer=... too")
        return tokenizer

    if isinstance(texts, (list, tuple)):
        texts = shuffled(texts, seed)[:samples]
    return as_batches(texts, given, max_length=max_length, batch_tokens=_BATCH_TOKENS)


def products(graph: Any, modules: Sequence[str]) -> list[str]:
    """Names of the graph's matrix products that are made in modules of the torch model, whose names may have a * for any part.

    Raises:
        ValueError: a name is of no module in which there is such a product.
    """
    where = {
        node.get_friendly_name(): node.get_friendly_name().removeprefix("__module.model.").partition("/")[0]
        for node in graph.get_ordered_ops()
        if node.get_type_name() == "MatMul"
    }
    for pattern in modules:
        if not any(fnmatch.fnmatchcase(module, pattern) for module in where.values()):
            known = ", ".join(dict.fromkeys(where.values()))
            raise ValueError(f"keep={pattern!r} names no module that makes a matrix product (those are: {known})")
    return [name for name, module in where.items() if any(fnmatch.fnmatchcase(module, p) for p in modules)]


def has_vnni() -> bool:
    """Whether this CPU sums up products of int8 in 32 bits. An x86 CPU without VNNI adds each two of them in 16 bits, where they
    overflow; one that tells no features (they are read as Linux names them) counts as such."""
    exact = any("vnni" in feature or feature == "amx_int8" for feature in cpu_features())
    return exact or platform.machine().lower() not in ("x86_64", "amd64")


def quantised(graph: Any, inputs: list[dict[str, Any]], keep: Sequence[str] = (), vnni: bool | None = None) -> Any:
    """A graph with int8 matrix products, after a look at some typical inputs; FFFs stay as they are.

    Args:
        keep: names of products that stay in float32.
        vnni: whether the CPU that will run it has such instructions; None: as this one. Without them weights have 7 bits, so that no
            sum of two products overflows.

    Raises:
        ImportError: NNCF is not installed.
    """
    try:
        import nncf
    except ImportError as error:
        raise ImportError(
            f"int8 needs NNCF, which cannot be imported ({error}): install it with `pip install 'hf-fff[openvino]'`"
        ) from error

    vnni = has_vnni() if vnni is None else vnni
    with _quiet():
        return nncf.quantize(
            graph,
            nncf.Dataset(inputs),
            subset_size=len(inputs),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=list(keep)),
            advanced_parameters=None
            if vnni
            else nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without NNCF's reports, which are of no use to whoever did not choose its settings."""
    loggers = [logging.getLogger(name) for name in ("nncf", "root.nncf")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
