"""Calibration: each FFF is fitted to the FFN whose place it takes, on that FFN's own inputs, from unlabelled text.

What is minimised is the error that the layer's output sees to first order: FFN outputs differ by the next LayerNorm on the
residual stream, so the error of dimension d counts ``gamma[d]`` and that of token t ``1 / sigma[t]``. Plain squared error is
useless here: in some layers one outlier dimension carries nearly all of the variance.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from ..config import FFFConfig
from ..layers import FFF, OutputBias
from ..models import FFNInterface
from .initialise import balance_hyperplanes
from .text import Batch, as_batches, shuffled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """How to fit the FFFs.

    Args:
        data: unlabelled inputs in the format of the model's task: texts, pairs of texts, or tensors (see ``as_batches``).
        tokenizer: for texts; by default the one that lies with the model.
        budget: seconds for everything, collecting the inputs included. The number of steps is derived from it once, from the
            measured speed of a step, and reported: with that number as ``steps`` the result is the same again.
        steps: steps a layer, instead of a budget.
        max_tokens: tokens to collect at most; memory is ``4 * layers * hidden_size`` bytes a token.
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
    batch_tokens: int = 4096
    learning_rate: float = 4e-3
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
    """What was done, and how much of each layer's output stays unexplained (weighted, on held-out tokens; 1: nothing is
    explained, as by a constant; 0: all)."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    collect_seconds: float = 0.0
    unexplained: dict[int, float] = field(default_factory=dict)


@dataclass
class _Layer:
    """A layer's inputs and outputs, both standardised, and how to get back."""

    x: Tensor  # [tokens, H] float16: (x - x_mean) / x_scale
    y: Tensor  # [tokens, H] float16: (y - y_mean) / y_scale
    weight: Tensor  # [tokens]: 1 / sigma of the next LayerNorm, mean square 1
    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor


class _Recorder:
    """Hooks on one dense FFN; keeps inputs and outputs of the tokens that the mask shows."""

    def __init__(self, block: nn.Module, family: FFNInterface) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.mask: Tensor | None = None
        self.statistics: tuple[Tensor, ...] | None = None
        self.norm: Any = block.get_submodule(family.output_norm)
        self._x = self._y = torch.empty(0)
        self.hooks = [
            block.get_submodule(family.ffn_in).register_forward_pre_hook(self._see_input),
            block.get_submodule(family.dense_out).register_forward_hook(self._see_output),
            self.norm.register_forward_pre_hook(self._see_residual),
        ]

    def _visible(self, t: Tensor) -> Tensor:
        t = t.detach().flatten(0, -2).float()
        return t if self.mask is None else t[self.mask]

    def _see_input(self, _module: nn.Module, args: Any) -> None:
        self._x = self._visible(args[0])

    def _see_output(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._y = self._visible(output)

    def _see_residual(self, _module: nn.Module, args: Any) -> None:
        if not len(self._x):
            return
        weight = 1 / self._visible(args[0]).std(-1).clamp_min(1e-6)
        x, y = self._x, self._y
        if self.statistics is None:  # of the first batch: they only have to be about right, what is fitted adapts
            gamma = self.norm.weight.detach().float().abs()
            gamma = gamma.clamp_min(1e-3 * float(gamma.max()))
            y_mean = y.mean(0)
            size = ((y - y_mean) * gamma * weight.unsqueeze(1)).square().mean().sqrt().clamp_min(1e-12)
            size = size / weight.square().mean().sqrt()
            x_scale = x.std(0, correction=0).clamp_min(1e-6)
            self.statistics = (x.mean(0), x_scale, y_mean, size / gamma)
        x_mean, x_scale, y_mean, y_scale = self.statistics
        self.parts.append((((x - x_mean) / x_scale).half(), ((y - y_mean) / y_scale).half(), weight))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def finish(self) -> _Layer:
        x, y, weight = (torch.cat(list(column)) for column in zip(*self.parts, strict=True))
        self.parts.clear()
        assert self.statistics is not None
        return _Layer(x, y, weight / weight.square().mean().sqrt(), *self.statistics)


def _collect(
    base_model: nn.Module,
    family: FFNInterface,
    layers: list[int],
    batches: list[Batch],
    c: Calibration,
    deadline: float,
) -> dict[int, _Layer]:
    blocks = family.blocks(base_model)
    recorders = {i: _Recorder(blocks[i], family) for i in layers}
    device = next(base_model.parameters()).device
    modes = [(module, module.training) for module in base_model.modules()]
    base_model.eval()
    tokens = 0
    bar = tqdm(total=c.max_tokens, desc="collecting", unit="tok", unit_scale=True, disable=not c.progress, leave=False)
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
                mask = inputs.get("attention_mask")
                for recorder in recorders.values():
                    recorder.mask = None if mask is None else mask.flatten().bool()
                base_model(**inputs)
                seen = int(batch["attention_mask"].sum()) if mask is not None else batch["input_ids"].numel()
                tokens += seen
                bar.update(seen)
                if tokens >= c.max_tokens or time.monotonic() > deadline:
                    break
    finally:
        bar.close()
        for module, mode in modes:
            module.training = mode
        for recorder in recorders.values():
            recorder.close()
    return {i: recorder.finish() for i, recorder in recorders.items() if recorder.parts}


class _Fit:
    """The regression of one layer, in standardised coordinates."""

    def __init__(self, data: _Layer, config: FFFConfig, directions: Tensor, c: Calibration) -> None:
        self.data, self.c = data, c
        self.generator = torch.Generator().manual_seed(c.seed)
        device, hidden = data.x.device, data.x.shape[1]
        self.fff = FFF(hidden, config, device="meta").to_empty(device=device)  # all of it is filled below
        with torch.no_grad():
            self.fff.weight_in.copy_(directions)
        self.bias = nn.Parameter(torch.zeros(hidden, device=device))
        count = len(data.x)
        held_out = min(max(1, int(count * c.held_out)), 32_768)
        # The last tokens come from texts that no training token is from, but for one at the border.
        self.train_tokens = torch.arange(count - held_out) if count > held_out else torch.arange(count)
        self.test_tokens = slice(count - held_out, count)
        balance_hyperplanes(self.fff, data.x[self._draw(32_768)].float())
        self._order = torch.empty(0, dtype=torch.long)
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(
            [*self.fff.parameters(), self.bias], lr=c.learning_rate, betas=(0.9, 0.99), fused=fused
        )

    def _draw(self, count: int) -> Tensor:
        order = torch.randperm(len(self.train_tokens), generator=self.generator)[:count]
        return self.train_tokens[order].to(self.data.x.device)

    def _next_batch(self) -> Tensor:
        size = min(self.c.batch_tokens, len(self.train_tokens))
        if len(self._order) < size:
            self._order = self._draw(len(self.train_tokens))
        batch, self._order = self._order[:size], self._order[size:]
        return batch

    @torch.enable_grad()
    def step(self) -> None:
        index = self._next_batch()
        x, y = self.data.x[index].float(), self.data.y[index].float()
        error = (self.fff(x) + self.bias - y) * self.data.weight[index].unsqueeze(1)
        self.optimizer.zero_grad()
        error.square().mean().backward()
        self.optimizer.step()

    @torch.no_grad()
    def unexplained(self) -> float:
        """Weighted share of the held-out outputs' variance that is not explained."""
        x, y = self.data.x[self.test_tokens].float(), self.data.y[self.test_tokens].float()
        weight = self.data.weight[self.test_tokens].unsqueeze(1)
        error = ((self.fff(x) + self.bias - y) * weight).square().sum()
        return float(error / ((y - y.mean(0)) * weight).square().sum())

    @torch.no_grad()
    def write(self, fff: FFF, output_bias: OutputBias) -> None:
        """Undoes the standardisation and fills the model's own layer."""
        d, w = self.data, self.fff.weight_in / self.data.x_scale
        fff.weight_in.copy_(w)
        fff.bias_in.copy_(self.fff.bias_in - w @ d.x_mean)
        fff.weight_out.copy_(self.fff.weight_out * d.y_scale)
        output_bias.bias.copy_(d.y_mean + self.bias * d.y_scale)


def calibrate(
    fast: Any, dense: Any, family: FFNInterface, layers: dict[int, FFFConfig], c: Calibration
) -> CalibrationReport:
    """Fits the FFFs of ``fast`` (and its output biases) to the FFNs of ``dense``, whose weights are only read.

    Raises:
        ValueError: no text, or so little of it that there is nothing to fit to.
    """
    start = time.monotonic()
    deadline = start + (0.5 * c.budget if c.budget is not None and c.steps is None else float("inf"))
    batches = as_batches(c.data, lambda: _tokenizer(c, dense), max_length=c.max_length, batch_tokens=c.batch_tokens)
    batches = shuffled(batches, c.seed)
    collected = _collect(dense.base_model, family, sorted(layers), batches, c, deadline)
    tokens = min((len(layer.x) for layer in collected.values()), default=0)
    report = CalibrationReport(tokens=tokens, collect_seconds=time.monotonic() - start)
    if report.tokens < 256:
        raise ValueError(f"the calibration data has {report.tokens} tokens; at least 256 are needed")
    blocks = family.blocks(fast.base_model)

    def new_fit(index: int) -> _Fit:
        directions = blocks[index].get_submodule(family.ffn_in).weight_in.detach().float()
        return _Fit(collected[index], layers[index], directions * collected[index].x_scale, c)

    report.steps = c.steps or _steps_within(c, start, layers, new_fit)
    bar = tqdm(total=report.steps * len(layers), desc="calibrating", unit="step", disable=not c.progress)
    for index in sorted(layers):
        fit = new_fit(index)
        schedule = get_cosine_schedule_with_warmup(fit.optimizer, max(1, report.steps // 20), report.steps + 1)
        every = max(1, report.steps // 8)
        for step in range(report.steps):
            fit.step()
            schedule.step()
            bar.update()
            if step % every == 0:
                bar.set_postfix_str(f"layer {index}: {fit.unexplained():.3f} unexplained")
        report.unexplained[index] = fit.unexplained()
        block = blocks[index]
        fit.write(block.get_submodule(family.ffn_in), block.get_submodule(family.dense_out))
        del collected[index]
    bar.set_postfix_str(", ".join(f"{i}: {v:.3f}" for i, v in report.unexplained.items()))
    bar.close()
    report.seconds = time.monotonic() - start
    return report


def _steps_within(c: Calibration, start: float, layers: dict[int, FFFConfig], new_fit: Callable[[int], _Fit]) -> int:
    """Steps a layer that the budget allows, from the speed of a few steps that are thrown away."""
    assert c.budget is not None
    seconds = {}
    for config in set(layers.values()):
        index = next(i for i, other in layers.items() if other == config)
        begin = time.monotonic()
        fit = new_fit(index)
        for _ in range(2):
            fit.step()
        set_up, begin = time.monotonic() - begin, time.monotonic()
        for _ in range(5):
            fit.step()
        seconds[config] = (set_up, (time.monotonic() - begin) / 5)
    left = c.budget - (time.monotonic() - start) - sum(seconds[config][0] for config in layers.values())
    steps = int(left / sum(seconds[config][1] for config in layers.values()))
    if steps < 50:
        logger.warning(
            "a budget of %.0f s allows %d steps a layer, which is too few: taking 50", c.budget, max(steps, 0)
        )
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
