"""Calibration: each FFF is fitted to the FFN whose place it takes, layer after layer, from unlabelled text.

A layer is fitted on what the layers before it, converted already, make of the text, and learns what brings the residual
stream back to the dense model's. On MiniLM at 8x8 that gives a cosine of 0.86 to the original's embeddings, where layers
that are each fitted on the dense model's inputs give 0.81 (the same text and steps). Layers that share their weights, as ALBERT's, are fitted at once, on the dense model's inputs.

What is minimised is the error that the layer's output sees to first order: FFN outputs differ by the next LayerNorm on the
residual stream, so the error of dimension d counts ``gamma[d]`` and that of token t ``1 / sigma[t]``. Plain squared error is
useless here: in some layers one outlier dimension carries nearly all of the variance.
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..config import FFFConfig
from ..graphs import StepGraphs
from ..layers import FFF, MLP, Feedforward, NoFFN, OutputBias, feedforward
from ..models import FFNInterface
from ..modes import evaluating
from ..ops.torch_backend import activation_functions
from .dense import DenseNeurons
from .initialise import balance_hyperplanes, best_neurons, parts_of, solve_outputs
from .text import Batch, in_random_order

_FORWARD_TOKENS = {"cpu": 4096}  # of a batch on its way through the models; elsewhere
_MORE_TOKENS = 16_384
_PASSES = 2.0  # what all layers cost, in passes of the dense model: that, and the converted layers twice
_MLP_RATE = 2.0  # an MLP learns best at a higher rate than a tree
_COLLECTING = 0.35  # share of a budget for them
_LEAST_STEPS = 50  # however short the budget


@dataclass(frozen=True)
class Calibration:
    """How to fit the FFFs.

    Args:
        data: unlabelled inputs in the format of the model's task: texts, pairs of texts, or tensors (see ``as_batches``).
        tokenizer: for texts; by default the one that lies with the model.
        budget: seconds for everything, collecting the inputs included. The number of steps is derived from it once, from the
            measured speed of a step, 50 a layer at least, and reported: with that number as ``steps``, and the report's ``tokens`` as
            ``max_tokens``, the result is the same again.
        steps: steps a layer, instead of a budget.
        max_tokens: tokens to collect at most; memory is about ``12 * hidden_size`` bytes a token.
        max_length: longer inputs are cut.
        batch_tokens: tokens a step.
        learning_rate: of Adam, at its highest.
        held_out: share of the tokens on which the unexplained variance is measured.
        seed: of everything random.
        progress: whether to show a bar.
        cuda_graphs: whether the steps of a layer are recorded on a GPU, once, and replayed. How much faster that is, is not
            measured.
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
    cuda_graphs: bool = False

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
    is explained, as by a constant; 0: all). What was lost before a layer counts as its own: see the module. Of a layer with several
    FFNs it is their mean; layers that share one have it in common."""

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
    """A batch on its way through the layers: what the layer before gives, in the dense model and in the one that is being made."""

    inputs: dict[str, Tensor]
    mask: Tensor | None  # [rows * tokens]: what is no padding
    dense: Any = None  # None before the first layer
    fast: Any = None  # the same object until the first converted layer
    ahead: Any = None  # what the dense layer gives whose FFN is being looked at


class _Reached(Exception):
    """Ends a forward pass after the layer that is wanted; holds what that gives."""


class _Layers:
    """Runs single layers of a model. What lies around them, masks, positions and whatever else a family computes, is
    made by the model's own forward pass, in which the layers before only hand over what is known already."""

    def __init__(self, base_model: nn.Module, family: FFNInterface) -> None:
        self.base_model, self.family = base_model, family
        self.blocks = family.blocks(base_model)

    def run(self, piece: _Piece, index: int, before: Any) -> Any:
        """What layer ``index`` returns, given what the one before it returned."""
        calls = 0

        def stand_in(real: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **named: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls <= index:
                    return before
                raise _Reached(real(*args, **named))

            return forward

        own = [(block, block.__dict__.get("forward")) for block in dict.fromkeys(self.blocks)]
        try:
            for block, _ in own:
                block.forward = stand_in(block.forward)
            self.base_model(**piece.inputs)
        except _Reached as reached:
            return reached.args[0]
        finally:
            for block, forward in own:
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward
        raise RuntimeError(f"{type(self.base_model).__name__} did not run its layer {index}")

    def hidden(self, output: Any) -> Tensor:
        """The hidden states in what a layer returns."""
        if isinstance(output, dict):
            return next(iter(output.values()))
        return output[0] if isinstance(output, tuple) else output

    def visible(self, t: Tensor, mask: Tensor | None) -> Tensor:
        """``[tokens, H]``, without padding."""
        t = t.transpose(1, 2) if self.family.channels_first else t
        t = t.detach().flatten(0, -2).float()
        return t if mask is None else t[mask]


@dataclass(frozen=True)
class _Norm:
    """The next norm on the residual stream after an FFN: how it counts the error of each dimension and of each token."""

    module: Any

    @classmethod
    def after(cls, layers: _Layers, index: int, site: int) -> "_Norm":
        family, blocks = layers.family, layers.blocks
        if family.output_norm is not None:
            return cls(family.ffns(blocks[index])[site].get(family.output_norm))
        if index + 1 < len(blocks):
            return cls(family.get(blocks[index + 1], str(family.next_norm)))
        return cls(family.get(layers.base_model, str(family.final_norm)))

    def gamma(self, like: Tensor) -> Tensor:
        weight = getattr(self.module, "weight", None)
        gamma = like.new_ones(like.shape[-1]) if weight is None else weight.detach().float().abs()
        return gamma.clamp_min(1e-3 * float(gamma.max()))

    def token_weight(self, residual: Tensor) -> Tensor:
        if not any(hasattr(self.module, name) for name in ("eps", "variance_epsilon")):
            return residual.new_ones(len(residual))  # it does not divide, as MobileBERT's
        centred = hasattr(self.module, "bias")  # else it divides by the root mean square
        size = residual.std(-1) if centred else residual.square().mean(-1).sqrt()
        return 1 / size.clamp_min(1e-6)


def _pieces(
    base_model: nn.Module, batches: Iterable[Batch], c: Calibration, deadline: float
) -> tuple[list[_Piece], int]:
    """As many batches as the time allows, and how many tokens they hold."""
    device = next(base_model.parameters()).device
    pieces: list[_Piece] = []
    tokens, start = 0, time.monotonic()
    for number, batch in enumerate(batches):
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        mask = inputs.get("attention_mask")
        mask = None if mask is None else mask.flatten().bool()
        pieces.append(_Piece(inputs, mask))
        if number == 0:  # how long a batch takes through all layers
            base_model(**inputs)
            start = time.monotonic()
            base_model(**inputs)
            each = _PASSES * (time.monotonic() - start)
        tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        if tokens >= c.max_tokens or max(start + len(pieces) * each, time.monotonic()) > deadline:
            break
    return pieces, tokens


def _seen(dense: _Layers, fast: _Layers, indices: list[int], site: int, piece: _Piece) -> tuple[Tensor, ...] | None:
    """What an FFN of the layers ``indices`` reads, what it is to give, and the dense residual stream after it, for the visible
    tokens of a batch (None if there are none). More than one layer is given where they share the FFN.

    The FFF reads what the layers before it, converted already, make of the text. What it is to give is what brings the
    residual stream back to the dense model's: so each layer also makes good, as far as it can, what those before it missed.
    One that is shared is needed before it is there, and reads and gives what the dense one does.
    """
    found = []
    before = piece.dense
    for index in indices:
        piece.ahead, x, y, residual = _watched(dense, index, site, piece, before)
        if piece.fast is not piece.dense and len(indices) == 1:
            _, x, fast_y, fast_residual = _watched(fast, index, site, piece, piece.fast)
            y = residual - (fast_residual - fast_y)
        found.append((x, y, residual))
        before = piece.ahead
    # A token's values in all layers stand together, so that those that are held out are of the same tokens.
    seen = tuple(torch.stack(column, 1).flatten(0, 1) for column in zip(*found, strict=True))
    return seen if len(seen[0]) else None


def _watched(layers: _Layers, index: int, site: int, piece: _Piece, before: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Runs a layer; what it returns, what an FFN of it reads and gives, and the residual stream after that."""
    family = layers.family
    ffn = family.ffns(layers.blocks[index])[site]
    seen: dict[str, list[Tensor]] = {"x": [], "y": [], "residual": []}  # lists, since it may run in chunks of tokens
    reads, gives = ffn.ends
    hooks = [
        reads.register_forward_pre_hook(lambda _, args: seen["x"].append(args[0])),
        gives.register_forward_hook(lambda _, __, output: seen["y"].append(output)),
    ]
    if family.output_norm is not None:
        norm = ffn.get(family.output_norm)
        hooks.append(norm.register_forward_pre_hook(lambda _, args: seen["residual"].append(args[0])))
    try:
        output = layers.run(piece, index, before)
    finally:
        for hook in hooks:
            hook.remove()
    if family.output_norm is None:
        seen["residual"].append(layers.hidden(output))
    x, y, residual = (
        layers.visible(torch.cat(parts, -1 if family.channels_first else 1), piece.mask) for parts in seen.values()
    )
    return output, x, y, residual


def _dense_layer(dense: _Layers, fast: _Layers, indices: list[int], site: int, pieces: list[_Piece]) -> _Layer | None:
    """What an FFF has to learn, from all batches (None if all is padding); see ``_seen``."""
    norm = _Norm.after(dense, indices[0], site)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    statistics: tuple[Tensor, ...] | None = None
    for piece in pieces:
        if (seen := _seen(dense, fast, indices, site, piece)) is None:
            continue
        x, y, residual = seen
        weight = norm.token_weight(residual)
        if statistics is None:  # of the first batch: they only have to be about right, what is fitted adapts
            gamma = norm.gamma(y)
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


class _Fit:
    """The regression of one layer, in standardised coordinates."""

    def __init__(self, data: _Layer, ffn: Feedforward, dense: DenseNeurons | None, c: Calibration) -> None:
        self.data, self.c = data, c
        self.generator = torch.Generator().manual_seed(c.seed)
        device, hidden = data.x.device, data.x.shape[1]
        self.bias = nn.Parameter(torch.zeros(hidden, device=device))
        count = len(data.x)
        held_out = min(max(1, int(count * c.held_out)), 32_768)
        # The last tokens come from texts that no training token is from, but for one at the border.
        self.train_tokens = torch.arange(count - held_out) if count > held_out else torch.arange(count)
        self.test_tokens = slice(count - held_out, count)
        self.ffn = self._start(ffn, dense)
        self._order = torch.empty(0, dtype=torch.long)
        fused = device.type in ("cpu", "cuda")
        groups = [(c.learning_rate * (_MLP_RATE if isinstance(part, MLP) else 1), part) for part in parts_of(self.ffn)]
        parameters = [*self.ffn.parameters(), self.bias]
        self.optimizer = torch.optim.Adam(
            [{"params": [*part.parameters()], "lr": rate} for rate, part in groups]
            + [{"params": [self.bias], "lr": max((rate for rate, _ in groups), default=c.learning_rate)}],
            betas=(0.9, 0.99),
            fused=fused,
        )
        self._graphs = StepGraphs(parameters) if c.cuda_graphs and device.type == "cuda" else None

    @torch.no_grad()
    def _start(self, ffn: Feedforward, dense: DenseNeurons | None) -> Feedforward:
        """First values, in standardised coordinates: a tree's directions, balanced, with outputs of zero; an MLP of the best dense
        neurons, and the outputs that give most with those."""
        d, draw = self.data, self._draw(32_768)
        x, y, weight = d.x[draw].float(), d.y[draw].float(), d.weight[draw]
        new = feedforward(x.shape[1], ffn.config, device="meta").to_empty(device=x.device)  # all of it is filled here
        if isinstance(new, NoFFN):
            self.bias.copy_((y * weight.square().unsqueeze(1)).sum(0) / weight.square().sum())
        for part, given in zip(parts_of(new), parts_of(ffn), strict=True):
            if isinstance(part, FFF):
                part.weight_in.copy_(given.weight_in.float() * d.x_scale)
                balance_hyperplanes(part, x)
                continue
            own = given.weight_in.detach().float().clone()
            part.bias_in.copy_(given.bias_in)
            if dense is not None:
                act, _ = activation_functions(part.config.activation)
                values = dense.values((x * d.x_scale + d.x_mean).to(dense.weight_in), act)
                best = best_neurons(values.float() * weight.unsqueeze(1), dense.weight_out.float() / d.y_scale)
                best = best[: part.config.nodes]  # where it is wider than the dense network, its own neurons fill it up
                own[: len(best)] = dense.weight_in[best].float()
                part.bias_in[: len(best)] = dense.bias_in[best].float() if dense.bias_in is not None else 0.0
            part.bias_in.add_(own @ d.x_mean)
            part.weight_in.copy_(own * d.x_scale)
            solve_outputs(part, self.bias, x, y, weight)
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
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(_rate, steps=steps))
        for step in range(steps):
            self.step()
            schedule.step()
            if step % max(1, steps // 8) == 0:
                tell(self.unexplained())

    def step(self) -> None:
        index = self._next_batch()
        if self._graphs:
            self._graphs.step({"tokens": index}, lambda given: self._gradients(given["tokens"]))
        else:
            self._gradients(index)
        self.optimizer.step()

    @torch.enable_grad()
    def _gradients(self, index: Tensor) -> tuple[Tensor, ...]:
        x, y = self.data.x[index].float(), self.data.y[index].float()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):  # a CPU computes as fast in float32
            fitted = self.ffn(x)
        error = (fitted + self.bias - y) * self.data.weight[index].unsqueeze(1)
        self.optimizer.zero_grad()
        error.square().mean().backward()
        return ()

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
        for fitted, part in zip(parts_of(self.ffn), parts_of(ffn), strict=True):
            w = fitted.weight_in / d.x_scale
            part.weight_in.copy_(w)
            part.bias_in.copy_(fitted.bias_in - w @ d.x_mean)
            part.weight_out.copy_(fitted.weight_out * d.y_scale)
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
    batch_tokens = _FORWARD_TOKENS.get(dense.device.type, _MORE_TOKENS)
    batches = in_random_order(
        c.data, lambda: _tokenizer(c, dense), max_length=c.max_length, batch_tokens=batch_tokens, seed=c.seed
    )
    dense_layers, fast_layers = _Layers(dense.base_model, family), _Layers(fast.base_model, family)
    blocks = dense_layers.blocks
    # FFNs to fit: those of each layer, or of all layers that share them
    groups = {group[0]: group for group in family.groups(dense.base_model) if group[0] in layers}
    plans = [layers[i] for i in groups for _ in family.ffns(blocks[i])]
    report = CalibrationReport(steps=c.steps or 0)
    first, last = min(layers), max(layers)
    with evaluating(dense, fast):
        pieces, report.tokens = _pieces(dense.base_model, batches, c, start + _COLLECTING * seconds)
        if report.tokens < 256:
            raise ValueError(f"the calibration data has {report.tokens} tokens; at least 256 are needed")
        bar = tqdm(total=len(plans), desc="calibrating", unit="layer", disable=not c.progress)
        for index in range(last + 1):
            bar.set_postfix_str(f"layer {index}: collecting")  # which takes long where there is much text
            unexplained = []
            for piece in pieces if index not in groups else ():
                piece.ahead = dense_layers.run(piece, index, piece.dense)
            ffns = zip(family.ffns(blocks[index]), family.ffns(fast_layers.blocks[index]), strict=True)
            for site, (dense_ffn, fast_ffn) in enumerate(ffns if index in groups else ()):
                begin = time.monotonic()
                data = _dense_layer(dense_layers, fast_layers, groups[index], site, pieces)
                report.collect_seconds += time.monotonic() - begin
                if data is None:
                    continue
                new, neurons = fast_ffn.fast, DenseNeurons.of(dense_ffn)
                assert new is not None
                if c.steps is None and not report.steps:
                    to_come = report.collect_seconds * _PASSES * (last - index) / (index + 1)
                    report.steps = _steps_within(start + seconds - to_come, data, plans, neurons, c)
                fit = _Fit(data, new, neurons, c)
                fit.run(report.steps, partial(_tell, bar, index))
                unexplained.append(fit.unexplained())
                fit.write(new, fast_ffn.output)
                bar.update()
                del data, fit
            for shared in groups[index] if unexplained else ():
                report.unexplained[shared] = sum(unexplained) / len(unexplained)
            begin = time.monotonic()
            for piece in pieces if index < last else ():
                if len(groups.get(index, ())) > 1:  # what lies ahead is the last of those that share
                    piece.ahead = dense_layers.run(piece, index, piece.dense)
                piece.dense, before = piece.ahead, piece.fast
                piece.fast = piece.dense if index < first else fast_layers.run(piece, index, before)
            report.collect_seconds += time.monotonic() - begin
    bar.set_postfix_str(", ".join(f"{i}: {v:.3f}" for i, v in report.unexplained.items()))
    bar.close()
    report.seconds = time.monotonic() - start
    return report


def calibrate_alone(
    fast: nn.Module,
    dense: nn.Module,
    plans: dict[str, FFFConfig],
    neurons: dict[str, DenseNeurons | None],
    c: Calibration,
) -> CalibrationReport:
    """``calibrate`` for a module of which only the feedforward networks are known: each is fitted to what the dense one reads and
    gives, all errors counting alike.

    Args:
        plans, neurons: of each network, by its name; the report numbers them in this order.
        c: its ``data`` are batches as the module takes them: a tensor, a tuple of arguments, or a mapping of named ones.
    """
    start = time.monotonic()
    seconds = float("inf") if c.steps is not None or c.budget is None else c.budget
    report = CalibrationReport(steps=c.steps or 0)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in plans}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args, y: seen[name].append((args[0].detach().flatten(0, -2), y.detach().flatten(0, -2)))

    hooks = [dense.get_submodule(name).register_forward_hook(watch(name)) for name in plans]
    try:
        with evaluating(dense):
            for batch in [c.data] if torch.is_tensor(c.data) or isinstance(c.data, dict) else c.data:
                if isinstance(batch, dict):
                    dense(**batch)
                else:
                    dense(*(batch if isinstance(batch, tuple) else (batch,)))
                report.tokens = max(sum(len(x) for x, _ in pairs) for pairs in seen.values())
                if report.tokens >= c.max_tokens or time.monotonic() > start + _COLLECTING * seconds:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    if report.tokens < 256:
        raise ValueError(f"the calibration data has {report.tokens} tokens; at least 256 are needed")
    report.collect_seconds = time.monotonic() - start
    for number, name in enumerate(plans):
        if not seen[name]:
            raise ValueError(f"the module does not run its {name} on the calibration data")
        x, y = (torch.cat(list(column)).float() for column in zip(*seen.pop(name), strict=True))
        x_scale, y_scale = x.std(0, correction=0).clamp_min(1e-6), y.std(0, correction=0).mean().clamp_min(1e-6)
        y_scale = y_scale.expand(y.shape[1])
        statistics = (x.mean(0), x_scale, y.mean(0), y_scale)
        x, y = ((x - statistics[0]) / x_scale).half(), ((y - statistics[2]) / y_scale).half()
        data = _Layer(x, y, torch.ones(len(x), device=x.device), *statistics)
        block: Any = fast.get_submodule(name)
        if not report.steps:
            report.steps = _steps_within(start + seconds, data, list(plans.values()), neurons[name], c)
        fit = _Fit(data, block.ffn, neurons[name], c)
        fit.run(report.steps, lambda _: None)
        report.unexplained[number] = fit.unexplained()
        fit.write(block.ffn, block.output)
    report.seconds = time.monotonic() - start
    return report


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: it rises for a twentieth of them and falls as a cosine. (transformers' own schedule
    imports its whole Trainer, and with it PEFT, where that is installed.)"""
    rising = max(1, steps // 20)
    return step / rising if step < rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps + 1 - rising)))


def _tell(bar: Any, index: int, unexplained: float) -> None:
    bar.set_postfix_str(f"layer {index}: {unexplained:.3f} unexplained")


def _steps_within(
    deadline: float, data: _Layer, plans: list[FFFConfig], dense: DenseNeurons | None, c: Calibration
) -> int:
    """Steps a layer that the time allows, from the speed of a few steps that are thrown away."""
    set_up, per_step = 0.0, 0.0
    for config, count in Counter(plans).items():
        begin = time.monotonic()
        if config.kind == "none":
            continue
        with torch.random.fork_rng(devices=[]):
            ffn = feedforward(data.x.shape[1], config).to(data.x.device)
        fit = _Fit(data, ffn, dense, c)
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
    if steps < _LEAST_STEPS:
        with tqdm.external_write_mode():  # not into the bar's line
            warnings.warn(
                f"the calibration's budget of {c.budget:g} seconds allows {max(steps, 0)} steps a layer, too few to fit anything: it "
                f"takes {_LEAST_STEPS}, which need about {_LEAST_STEPS * per_step:.0f} seconds more than collecting does",
                stacklevel=2,
            )
    return max(_LEAST_STEPS, steps)


def _tokenizer(c: Calibration, dense: Any) -> Any:
    if c.tokenizer is not None:
        return c.tokenizer
    try:
        return AutoTokenizer.from_pretrained(dense.name_or_path)
    except Exception as error:
        raise ValueError(
            f"no tokenizer could be loaded from {dense.name_or_path!r}: give Calibration(tokenizer=...) or tensors"
        ) from error
