"""int8 for all but the trees: post-training quantisation by NNCF."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..exporting import complete
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


def quantised(graph: Any, batches: list[Batch], names: tuple[str, ...]) -> Any:
    """A graph with int8 matrix products; FFFs stay as they are.

    Raises:
        ImportError: NNCF is not installed.
    """
    try:
        import nncf
    except ImportError as error:
        raise ImportError(
            f"int8 needs NNCF, which cannot be imported ({error}): install it with `pip install 'hf-fff[openvino]'`"
        ) from error

    with _quiet():
        return nncf.quantize(
            graph,
            nncf.Dataset([_inputs(batch, names) for batch in batches]),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
        )


def _inputs(batch: Batch, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in complete(batch, names).items()}


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
