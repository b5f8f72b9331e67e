"""What a search is asked, and what it finds."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import FFFConfig, LayersLike
from ..training.work import digest
from .engine import ENGINES


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Args:
        keep: share of the dense model's main metric; of "mlm" of ``exp(-loss)``, which is the dense model's perplexity by the
            other's; of "embeddings" of the cosine to the dense model's, which is 1.
        candidates: ``"none"``, ``"mlp:WIDTH"``, ``"KxD"``, ``"KxD+mlp:WIDTH"``.
        steps: of each distillation; instead of a budget, and reproducible.
        calibration_steps: a layer; ``steps`` by default. With a budget, they are derived from it too.
        budget: seconds for the whole search.
        batch_sizes: rows that are computed at once when models are timed.
        every: train all candidates that are faster than the dense model.
        mixed: try different kinds in different layers.
        max_length: tokens at which rows are cut.
        max_tokens: tokens to calibrate on at most.
        engine: what the model will run in, "torch" or "openvino" (in int8): times are measured there.
        seed: of everything random.

    Raises:
        ValueError: a value that is not allowed.
    """

    keep: float
    candidates: tuple[str, ...]
    steps: int | None = None
    calibration_steps: int | None = None
    budget: float = 3600.0
    batch_sizes: tuple[int, ...] = (1, 32)
    every: bool = False
    mixed: bool = True
    max_length: int = 128
    max_tokens: int = 600_000
    engine: str = "torch"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep!r} must lie above 0, and be 1 at most")
        if not self.candidates:
            raise ValueError("there are no candidates")
        object.__setattr__(
            self,
            "candidates",
            tuple(dict.fromkeys(FFFConfig.from_shorthand(c).shorthand for c in self.candidates)),
        )
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes!r} must be numbers of at least 1")
        for name in ("steps", "calibration_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is not known (allowed: {', '.join(ENGINES)})")
        if not self.budget > 0:
            raise ValueError(f"budget={self.budget!r} must be above 0 seconds")


@dataclass
class Result:
    """What is known of a candidate; ``share`` and what belongs to it only if it was trained.

    Attributes:
        layers: the kind of each layer, of a mixed candidate.
        microseconds: for each token, by batch size.
        relative: the geometric mean, over the batch sizes, of its time divided by the dense model's.
        steps: of its trainings, all in all, the one that goes on included.
        done: of these, the steps behind what is known of it and behind the model in the work folder; 0 before the first.
        budget: of the search by which the steps were allotted.
        calibration: steps a layer, or the seconds for it.
        score: of the main metric.
        share: the same, divided by the dense model's.
        error: standard error of ``share``.
        in_engine: the share that is left inside the engine, of what is chosen, where that is not torch.
        failed: why there is no share, where the training went wrong.
    """

    name: str
    layers: dict[str, str] | None = None
    microseconds: dict[str, float] = field(default_factory=dict)
    relative: float = math.inf
    steps: int | None = None
    done: int = 0
    budget: float | None = None
    calibration: dict[str, float | None] = field(default_factory=dict)
    step_seconds: float | None = None
    score: float | None = None
    share: float | None = None
    error: float | None = None
    in_engine: float | None = None
    failed: str = ""
    note: str = ""

    @property
    def config(self) -> LayersLike:
        return {int(i): kind for i, kind in self.layers.items()} if self.layers else self.name

    @property
    def slug(self) -> str:
        return self.name.replace(":", "-") if not self.layers else "mixed-" + digest([self.name])[:8]


@dataclass(frozen=True)
class Choice:
    """What a search found: ``chosen`` is None where nothing keeps what is asked; what was trained then lies in ``work``, if
    anything was. ``results`` are by their time, the fastest first."""

    metric: str
    keep: float
    rows: int
    dense: dict[str, Any]
    results: list[Result]
    chosen: Result | None
    work: Path | None = None

    @property
    def best(self) -> Result | None:
        """The one that keeps most, of those that are faster than the dense model."""
        trained = (r for r in self.results if r.share is not None and r.relative < 1)
        return max(trained, key=lambda r: r.share or 0.0, default=None)

    @property
    def frontier(self) -> list[Result]:
        """Those that are faster than the dense model, and than all that keep as much."""
        kept, most = [], -math.inf
        for result in self.results:
            if result.share is not None and result.share > most and result.relative < 1:
                kept.append(result)
                most = result.share
        return kept
