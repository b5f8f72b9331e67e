"""Calibration: each FFF is fitted to the FFN whose place it takes, layer after layer, from unlabelled text.

A layer is fitted on what the layers before it, converted already, make of the text, and learns what brings the residual
stream back to the dense model's. On MiniLM at 8x8 that gives a cosine of 0.86 to the original's embeddings, where layers
that are each fitted on the dense model's inputs give 0.81 (the same text and steps).

What is minimised is the error that the layer's output sees to first order: FFN outputs differ by the next LayerNorm on the
residual stream, so the error of dimension d counts ``gamma[d]`` and that of token t ``1 / sigma[t]``. Plain squared error is
useless here: in some layers one outlier dimension carries nearly all of the variance.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from ..config import FFFConfig
from ..layers import FFF, MLP, Feedforward, NoFFN, OutputBias, feedforward
from ..models import FFNInterface
from ..ops.torch_backend import activation_functions
from .initialise import balance_hyperplanes, best_neurons, solve_outputs
from .text import Batch, as_batches, shuffled

logger = logging.getLogger(__name__)

_FORWARD_TOKENS = 4096  # a batch on its way through the models
_PASSES = 2.0  # what all layers cost, in passes of the dense model: that, and the converted layers twice
_MLP_RATE = 2.0  # an MLP learns best at a higher rate than a tree
_COLLECTING = 0.35  # share of a budget for them


@dataclass(frozen=True)
class Calibration:
    """How to fit the FFFs.

    Args:
        data: unlabelled inputs in the format of the model's task: texts, pairs of texts, or tensors (see ``as_batches``).
        tokenizer: for texts; by default the one that lies with the model.
        budget: seconds for everything, collecting the inputs included. The number of steps is derived from it once, from the
            measured speed of a step, and reported: with that number as ``steps``, and the report's ``tokens`` as
            ``max_tokens``, the result is the same again.
        steps: steps a layer, instead of a budget.
        max_tokens: tokens to collect at most; memory is about ``12 * hidden_size`` bytes a token.
        max_length: longer inputs are cut.
        batch_tokens: tokens a step.
        learning_rate: of Adam, at its highest.
        held_out: share of the tokens on which the unexplained variance is measured.
        seed: of everything random.
        progress: whether to show a bar.
    """

    data: Any
    tokenizer: Any = None
    budget: float | None = 300.0
    steps: int | None = None
    max_tokens: int = 600_000
    max_length: int = 128
    batch_tokens: int = 1024
    learning_rate: float = 2e-3
    held_out: float = 0.04
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.steps is None and (self.budget is None or not self.budget > 0):
            raise ValueError(f"calibration needs budget={self.budget!r} above 0 seconds, or steps")
        for name in ("steps", "max_tokens", "max_length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"calibration {name}={value!r} must be an integer of at least 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"calibration held_out={self.held_out!r} must lie between 0 and 1")


@dataclass
class CalibrationReport:
    """What was done, and how much of what each layer is to give stays unexplained (weighted, on held-out tokens; 1: nothing
    is explained, as by a constant; 0: all). What was lost before a layer counts as its own: see the module."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    collect_seconds: float = 0.0
    unexplained: dict[int, float] = field(default_factory=dict)


@dataclass
class _Layer:
    """What a layer's FFF reads and is to give, both standardised, and how to get back."""

    x: Tensor  # [tokens, H] float16: (x - x_mean) / x_scale
    y: Tensor  # [tokens, H] float16: (y - y_mean) / y_scale
    weight: Tensor  # [tokens]: 1 / sigma of the next LayerNorm, mean square 1
    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor


@dataclass
class _Piece:
    """A batch on its way through the layers: its hidden states in the dense model and in the one that is being made."""

    mask: Tensor | None  # [rows * tokens]: what is no padding
    dense: Tensor
    fast: Tensor  # the same tensor until the first converted layer
    rest: tuple[Any, ...]  # a layer's other arguments, the same for all layers
    named: dict[str, Any]

    def through(self, block: Any, hidden: Tensor) -> Tensor:
        out = block(hidden, *self.rest, **self.named)
        return out[0] if isinstance(out, tuple) else out

    def visible(self, t: Tensor) -> Tensor:
        t = t.detach().flatten(0, -2).float()
        return t if self.mask is None else t[self.mask]


class _Arrived(Exception):
    """Ends a forward pass at the first layer."""


def _pieces(
    base_model: nn.Module, family: FFNInterface, batches: list[Batch], c: Calibration, deadline: float
) -> tuple[list[_Piece], int]:
    """The batches as they enter the first layer, and how many tokens they hold: as many as the time allows."""
    first = family.blocks(base_model)[0]
    device = next(base_model.parameters()).device
    pieces: list[_Piece] = []
    tokens, start = 0, time.monotonic()

    def enter(_module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        hidden, *rest = args or (named.pop("hidden_states"),)
        pieces.append(_Piece(mask, hidden, hidden, tuple(rest), named))
        raise _Arrived

    hook = first.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for number, batch in enumerate(batches):
            inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            mask = inputs.get("attention_mask")
            mask = None if mask is None else mask.flatten().bool()
            with suppress(_Arrived):
                base_model(**inputs)
            if number == 0:  # how long a batch takes through all layers
                hook.remove()
                start = time.monotonic()
                base_model(**inputs)
                each = _PASSES * (time.monotonic() - start)
                hook = first.register_forward_pre_hook(enter, with_kwargs=True)
            tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            if tokens >= c.max_tokens or start + len(pieces) * each > deadline:
                break
    finally:
        hook.remove()
    return pieces, tokens


def _dense_layer(block: Any, fast_block: Any, family: FFNInterface, pieces: list[_Piece]) -> _Layer | None:
    """Takes the dense hidden states through a dense layer; returns what its FFF has to learn (None if all is padding).

    The FFF reads what the layers before it, converted already, make of the text. What it is to give is what brings the
    residual stream back to the dense model's: so each layer also makes good, as far as it can, what those before it missed.
    """
    norm: Any = block.get_submodule(family.output_norm)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    statistics: tuple[Tensor, ...] | None = None
    with _watched(block, family) as seen, _watched(fast_block, family) as seen_fast:
        for piece in pieces:
            before, piece.dense = piece.dense, piece.through(block, piece.dense)
            residual = piece.visible(seen["residual"])
            if not len(residual):
                continue
            x, y = piece.visible(seen["x"]), piece.visible(seen["y"])
            if piece.fast is not before:
                piece.through(fast_block, piece.fast)
                x = piece.visible(seen_fast["x"])
                y = residual - (piece.visible(seen_fast["residual"]) - piece.visible(seen_fast["y"]))
            weight = 1 / residual.std(-1).clamp_min(1e-6)
            if statistics is None:  # of the first batch: they only have to be about right, what is fitted adapts
                gamma = norm.weight.detach().float().abs()
                gamma = gamma.clamp_min(1e-3 * float(gamma.max()))
                y_mean = y.mean(0)
                size = ((y - y_mean) * gamma * weight.unsqueeze(1)).square().mean().sqrt().clamp_min(1e-12)
                size = size / weight.square().mean().sqrt()
                x_scale = x.std(0, correction=0).clamp_min(1e-6)
                statistics = (x.mean(0), x_scale, y_mean, size / gamma)
            x_mean, x_scale, y_mean, y_scale = statistics
            parts.append((((x - x_mean) / x_scale).half(), ((y - y_mean) / y_scale).half(), weight))
    if statistics is None:
        return None
    x, y, weight = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return _Layer(x, y, weight / weight.square().mean().sqrt(), *statistics)


@contextmanager
def _watched(block: Any, family: FFNInterface) -> Iterator[dict[str, Tensor]]:
    """What the FFN of a layer reads (x) and gives (y), and the residual stream after it, of the last pass."""
    seen: dict[str, Tensor] = {}
    hooks = [
        block.get_submodule(family.ffn_in).register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        block.get_submodule(family.dense_out).register_forward_hook(lambda _, __, output: seen.update(y=output)),
        block.get_submodule(family.output_norm).register_forward_pre_hook(
            lambda _, args: seen.update(residual=args[0])
        ),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Fit:
    """The regression of one layer, in standardised coordinates."""

    def __init__(self, data: _Layer, ffn: Feedforward, dense_in: Any, dense_out: Any, c: Calibration) -> None:
        self.data, self.c = data, c
        self.generator = torch.Generator().manual_seed(c.seed)
        device, hidden = data.x.device, data.x.shape[1]
        self.bias = nn.Parameter(torch.zeros(hidden, device=device))
        count = len(data.x)
        held_out = min(max(1, int(count * c.held_out)), 32_768)
        # The last tokens come from texts that no training token is from, but for one at the border.
        self.train_tokens = torch.arange(count - held_out) if count > held_out else torch.arange(count)
        self.test_tokens = slice(count - held_out, count)
        self.ffn = self._start(ffn, dense_in, dense_out)
        self._order = torch.empty(0, dtype=torch.long)
        rate = c.learning_rate * (_MLP_RATE if isinstance(ffn, MLP) else 1)
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam([*self.ffn.parameters(), self.bias], lr=rate, betas=(0.9, 0.99), fused=fused)

    @torch.no_grad()
    def _start(self, ffn: Feedforward, dense_in: Any, dense_out: Any) -> Feedforward:
        """First values, in standardised coordinates: a tree's directions, balanced; an MLP of the best dense neurons."""
        d, draw = self.data, self._draw(32_768)
        x, y, weight = d.x[draw].float(), d.y[draw].float(), d.weight[draw]
        new = feedforward(x.shape[1], ffn.config, device="meta").to_empty(device=x.device)  # all of it is filled here
        if isinstance(new, NoFFN):
            self.bias.copy_((y * weight.square().unsqueeze(1)).sum(0) / weight.square().sum())
            return new
        assert not isinstance(ffn, NoFFN)
        new.weight_in.copy_(ffn.weight_in.float() * d.x_scale)
        if isinstance(new, FFF):
            balance_hyperplanes(new, x)
            return new
        values = activation_functions(new.config.activation)[0](dense_in((x * d.x_scale + d.x_mean).to(ffn.weight_in)))
        best = best_neurons(values.float() * weight.unsqueeze(1), dense_out.weight.T.float() / d.y_scale)
        best = best[: new.config.nodes]  # where the MLP is wider than the dense network, its own neurons fill it up
        own = ffn.weight_in.detach().float().clone()
        own[: len(best)] = dense_in.weight[best].float()
        new.bias_in.copy_(ffn.bias_in)
        new.bias_in[: len(best)] = dense_in.bias[best].float() if dense_in.bias is not None else 0.0
        new.bias_in.add_(own @ d.x_mean)
        new.weight_in.copy_(own * d.x_scale)
        solve_outputs(new, self.bias, x, y, weight)
        return new

    def _draw(self, count: int) -> Tensor:
        order = torch.randperm(len(self.train_tokens), generator=self.generator)[:count]
        return self.train_tokens[order].to(self.data.x.device)

    def _next_batch(self) -> Tensor:
        size = min(self.c.batch_tokens, len(self.train_tokens))
        if len(self._order) < size:
            self._order = self._draw(len(self.train_tokens))
        batch, self._order = self._order[:size], self._order[size:]
        return batch

    def run(self, steps: int, tell: Callable[[float], object]) -> None:
        """All steps, the learning rate rising and falling; ``tell`` hears now and then what is unexplained."""
        if isinstance(self.ffn, NoFFN):
            return  # solved already
        schedule = get_cosine_schedule_with_warmup(self.optimizer, max(1, steps // 20), steps + 1)
        for step in range(steps):
            self.step()
            schedule.step()
            if step % max(1, steps // 8) == 0:
                tell(self.unexplained())

    @torch.enable_grad()
    def step(self) -> None:
        index = self._next_batch()
        x, y = self.data.x[index].float(), self.data.y[index].float()
        error = (self.ffn(x) + self.bias - y) * self.data.weight[index].unsqueeze(1)
        self.optimizer.zero_grad()
        error.square().mean().backward()
        self.optimizer.step()

    @torch.no_grad()
    def unexplained(self) -> float:
        """Weighted share of the held-out outputs' variance that is not explained."""
        x, y = self.data.x[self.test_tokens].float(), self.data.y[self.test_tokens].float()
        weight = self.data.weight[self.test_tokens].unsqueeze(1)
        error = ((self.ffn(x) + self.bias - y) * weight).square().sum()
        return float(error / ((y - y.mean(0)) * weight).square().sum())

    @torch.no_grad()
    def write(self, ffn: Feedforward, output_bias: OutputBias) -> None:
        """Undoes the standardisation and fills the model's own layer."""
        d = self.data
        if not isinstance(self.ffn, NoFFN) and not isinstance(ffn, NoFFN):
            w = self.ffn.weight_in / d.x_scale
            ffn.weight_in.copy_(w)
            ffn.bias_in.copy_(self.ffn.bias_in - w @ d.x_mean)
            ffn.weight_out.copy_(self.ffn.weight_out * d.y_scale)
        output_bias.bias.copy_(d.y_mean + self.bias * d.y_scale)


def calibrate(
    fast: Any, dense: Any, family: FFNInterface, layers: dict[int, FFFConfig], c: Calibration
) -> CalibrationReport:
    """Fits the FFFs of ``fast`` (and its output biases) to the FFNs of ``dense``, whose weights are only read.

    Raises:
        ValueError: no text, or so little of it that there is nothing to fit to.
    """
    start = time.monotonic()
    seconds = float("inf") if c.steps is not None or c.budget is None else c.budget
    batches = as_batches(c.data, lambda: _tokenizer(c, dense), max_length=c.max_length, batch_tokens=_FORWARD_TOKENS)
    batches = shuffled(batches, c.seed)
    dense_blocks, fast_blocks = family.blocks(dense.base_model), family.blocks(fast.base_model)
    report = CalibrationReport(steps=c.steps or 0)
    first, last = min(layers), max(layers)
    with _evaluating(dense, fast):
        pieces, report.tokens = _pieces(dense.base_model, family, batches, c, start + _COLLECTING * seconds)
        if report.tokens < 256:
            raise ValueError(f"the calibration data has {report.tokens} tokens; at least 256 are needed")
        bar = tqdm(total=len(layers), desc="calibrating", unit="layer", disable=not c.progress)
        for index in range(last + 1):
            begin = time.monotonic()
            data = _dense_layer(dense_blocks[index], fast_blocks[index], family, pieces)
            report.collect_seconds += time.monotonic() - begin
            if index in layers and data is not None:
                block, dense_block = fast_blocks[index], dense_blocks[index]
                ffn, output_bias = block.get_submodule(family.ffn_in), block.get_submodule(family.dense_out)
                dense_in, dense_out = (dense_block.get_submodule(n) for n in (family.dense_in, family.dense_out))
                if c.steps is None and not report.steps:
                    to_come = report.collect_seconds * _PASSES * (last - index) / (index + 1)
                    report.steps = _steps_within(start + seconds - to_come, data, layers, dense_in, dense_out, c)
                fit = _Fit(data, ffn, dense_in, dense_out, c)
                fit.run(report.steps, partial(_tell, bar, index))
                report.unexplained[index] = fit.unexplained()
                fit.write(ffn, output_bias)
                bar.update()
            del data
            begin = time.monotonic()
            for piece in pieces if index < last else []:
                piece.fast = piece.dense if index < first else piece.through(fast_blocks[index], piece.fast)
            report.collect_seconds += time.monotonic() - begin
    bar.set_postfix_str(", ".join(f"{i}: {v:.3f}" for i, v in report.unexplained.items()))
    bar.close()
    report.seconds = time.monotonic() - start
    return report


def _tell(bar: Any, index: int, unexplained: float) -> None:
    bar.set_postfix_str(f"layer {index}: {unexplained:.3f} unexplained")


def _steps_within(
    deadline: float, data: _Layer, layers: dict[int, FFFConfig], dense_in: Any, dense_out: Any, c: Calibration
) -> int:
    """Steps a layer that the time allows, from the speed of a few steps that are thrown away."""
    set_up, per_step = 0.0, 0.0
    for config, count in Counter(layers.values()).items():
        begin = time.monotonic()
        if config.kind == "none":
            continue
        with torch.random.fork_rng(devices=[]):
            ffn = feedforward(data.x.shape[1], config).to(data.x.device, dense_in.weight.dtype)
        fit = _Fit(data, ffn, dense_in, dense_out, c)
        for _ in range(3):
            fit.step()
        set_up += count * (time.monotonic() - begin)
        begin = time.monotonic()
        for _ in range(10):
            fit.step()
        fit.bias[0].item()  # waits for a GPU
        per_step += count * (time.monotonic() - begin) / 10
    if not per_step:
        return 1  # nothing that takes steps
    steps = int((deadline - time.monotonic() - set_up) / per_step)
    if steps < 50:
        logger.warning("the calibration's budget allows %d steps a layer, which is too few: taking 50", max(steps, 0))
    return max(50, steps)


def _tokenizer(c: Calibration, dense: Any) -> Any:
    if c.tokenizer is not None:
        return c.tokenizer
    try:
        return AutoTokenizer.from_pretrained(dense.name_or_path)
    except Exception as error:
        raise ValueError(
            f"no tokenizer could be loaded from {dense.name_or_path!r}: give Calibration(tokenizer=...) or tensors"
        ) from error
