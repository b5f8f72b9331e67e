"""Whole models against each other, interleaved in one process, on random ids or on real texts, outputs checked first."""

import copy
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel

from .. import ops
from ..layers import FFF
from ..models import classes
from ..surgery import convert_ffn_to_fff
from ..surgery.folder import ModelFolder
from .kept import Kept
from .load import Patience
from .shapes import bert
from .timing import interleaved

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_BATCHES = 4  # of random ids, which a call goes through, so that trees are not timed on a handful of paths
_ROWS = 16  # of real lengths, at least: a call goes through all of them


@dataclass(frozen=True)
class Workload:
    """Batches as models take them; a call goes through all of them. ``tokens`` are those that are visible."""

    name: str
    batches: Sequence[Mapping[str, Tensor]]

    @property
    def tokens(self) -> int:
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches)


def random_ids(rows: int, tokens: int, vocab_size: int, *, seed: int = 0) -> Workload:
    """``rows`` x ``tokens``, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (_BATCHES, rows, tokens), generator=generator)
    return Workload(f"{rows}x{tokens}", [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids])


def real_rows(
    data: Any,
    collate: Callable[[list[Any]], Mapping[str, Tensor]],
    batch_size: int,
    *,
    seed: int = 0,
) -> Workload:
    """Rows drawn from encoded data in batches of ``batch_size``, padded to the longest of the batch, as they come when nobody
    sorts them. Where there are too few, they come again."""
    count = batch_size * -(-_ROWS // batch_size)
    passes = -(-count // len(data))
    draw = random.Random(seed)
    order = [i for _ in range(passes) for i in draw.sample(range(len(data)), len(data))][:count]
    rows = [{name: data[i][name] for name in _INPUTS if name in data[i]} for i in order]
    return Workload(str(batch_size), [collate(rows[i : i + batch_size]) for i in range(0, count, batch_size)])


@dataclass(frozen=True)
class Timing:
    """Median seconds in which each model goes through a workload; ratios are to the first of them, below 1 is faster."""

    workload: str
    tokens: int
    seconds: dict[str, float]
    others: float | None = None  # cores that other processes kept busy meanwhile

    @property
    def microseconds(self) -> dict[str, float]:
        """For each visible token."""
        return {name: 1e6 * s / self.tokens for name, s in self.seconds.items()}

    @property
    def ratios(self) -> dict[str, float]:
        first = next(iter(self.seconds.values()))
        return {name: s / first for name, s in self.seconds.items()}

    def shares(self, limits: Mapping[str, str]) -> dict[str, float]:
        """What part of the speed of a model without feedforward networks each model has; ``limits`` names the one for each."""
        return {name: self.seconds[limits[name]] / s for name, s in self.seconds.items() if name in limits}


@torch.no_grad()
def time_models(
    models: Mapping[str, Any],
    workloads: Sequence[Workload],
    *,
    rounds: int = 15,
    seed: int = 0,
    limit: float = float("inf"),
    patience: Patience | None = None,
    kept: Kept | None = None,
) -> list[Timing]:
    """Times models on the devices where they are, and leaves them in evaluation mode. Each round they take their turns in another order, by ``seed``.

    Args:
        limit: seconds for the rounds of a workload, once three are made.

    Raises:
        ValueError: a workload has longer rows, or other ids, than a model takes.
        RuntimeError: an output is not finite.
    """
    order = random.Random(seed)
    for model in models.values():
        model.eval()
    patience, kept = patience or Patience(), kept or Kept()
    timings = []
    for workload in workloads:

        def cell(workload: Workload = workload) -> dict[str, Any]:
            calls = {name: _call(name, model, workload) for name, model in models.items()}
            run = partial(interleaved, calls, rounds=rounds, order=order, limit=limit)
            times, load = patience.measure(torch.get_num_threads(), run)
            return asdict(Timing(workload.name, workload.tokens, times, load.others))

        timings.append(Timing(**kept.cell([workload.name], cell, patience)))
    return timings


def _call(name: str, model: Any, workload: Workload) -> Callable[[], None]:
    """Goes through a workload, after it went through it once and what it gives was looked at."""
    device = next(model.parameters()).device
    most, known = getattr(model.config, "max_position_embeddings", None), model.config.vocab_size
    batches = []
    for batch in workload.batches:
        ids = batch["input_ids"]
        if most and ids.shape[1] > most:
            raise ValueError(f"{workload.name} has rows of {ids.shape[1]} tokens, and {name} takes at most {most}")
        if int(ids.max()) >= known:
            raise ValueError(f"{workload.name} has the id {int(ids.max())}, and {name} knows {known} ids")
        batches.append({k: v.to(device) for k, v in batch.items()})
        found = [t for t in model(**batches[-1]).to_tuple() if torch.is_tensor(t)]
        if not all(bool(t.isfinite().all()) for t in found):
            raise RuntimeError(f"the output of {name} is not finite: nothing was timed")

    def call() -> None:
        for batch in batches:
            model(**batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def random_models(size: str, kinds: Sequence[str], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """BERTs with random weights, which take as long as trained ones where every path is as likely as any other.

    Args:
        size: a name of ``shapes.SIZES``.
        kinds: ``"dense"``, or what takes the place of the feedforward networks: ``"8x8"``, ``"mlp:72"``, ``"4x8+mlp:36"``, ``"none"``.
        dtypes: names of dtypes, and these.

    Returns:
        By names such as ``"8x8 float32"``.

    Raises:
        ValueError: a size or a kind that is not known.
    """
    dense = bert(size)
    made = {}
    for kind in kinds:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the converted model is not calibrated")
            made[kind] = dense if kind == "dense" else convert_ffn_to_fff(dense, kind, init="random").eval()
    return {
        f"{kind} {name}": copy.deepcopy(model).to(dtype)
        for name, dtype in dtypes.items()
        for kind, model in made.items()
    }


def limits(models: Mapping[str, Any]) -> dict[str, str]:
    """For each model the one of its dtype that has no feedforward networks left, where there is one: no FFN can be faster."""

    def dtype(model: Any) -> torch.dtype:
        return next(model.parameters()).dtype

    empty = {
        dtype(model): name
        for name, model in models.items()
        if {c.kind for c in getattr(model.config, "fff_layers", {}).values()} == {"none"}
    }
    return {name: empty[dtype(model)] for name, model in models.items() if dtype(model) in empty}


@torch.no_grad()
def visited(model: Any, workload: Workload) -> list[int]:
    """How many of its neurons each FFF of a model uses for the first batch: the fewer, the kinder to caches."""
    counts: list[int] = []

    def count(fff: FFF, args: tuple[Tensor]) -> None:
        c = fff.config
        weights = (fff.weight_in, fff.bias_in, fff.weight_out)
        _, path, _ = ops.fff_train(args[0].flatten(0, -2), *weights, fff.n_trees, c.activation)
        rows = path.long() + torch.arange(fff.n_trees, device=path.device).unsqueeze(-1) * c.tree_nodes
        counts.append(int(rows.unique().numel()))

    handles = [m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, FFF)]
    device = next(model.parameters()).device
    model(**{name: value.to(device) for name, value in workload.batches[0].items()})
    for handle in handles:
        handle.remove()
    return counts


def load_model(source: str) -> Any:
    """A model, dense or converted, with the head that its config names.

    Raises:
        ValueError: there is none.
    """
    folder = ModelFolder.find(source).transformer
    config = AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["AutoModel"])[0]
    model_class: Any = getattr(classes if name.startswith("Fast") else transformers, name, AutoModel)
    return model_class.from_pretrained(folder).eval()
