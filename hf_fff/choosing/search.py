"""The search: candidates from the fastest on, each calibrated and distilled, until one keeps what is asked.

How fast a candidate is does not depend on what its weights are, so that is measured first, on untrained conversions: what
cannot win is not trained. It is measured again on the trained model, and that counts.
"""

import json
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer

from ..bench.model import load_model, real_rows, time_models
from ..config import LayersLike
from ..files import atomic_folder, check_output
from ..memory import memory_explained
from ..models import FAMILIES
from ..surgery import Calibration, convert_ffn_to_fff
from ..surgery.folder import ModelFolder, check_places
from ..training import DistillationArguments, TaskRows, TokenisedTexts, distil_folder
from ..training.data import calibration_batches
from ..training.distil import length_for
from ..training.work import check_options, described, digest
from . import engine
from .quality import HeldOut, Quality
from .results import Choice, Plan, Result
from .rows import Data

_STATE = "search.json"  # in the work folder, beside the models and what is left of trainings
_CALIBRATING, _TRAINING = 0.25, 0.6  # shares of a candidate's seconds; the rest is for measuring
_LEAST_STEPS = 50
_ROUNDS = 11
_MIXED = 2  # candidates with different kinds in different layers, at most
_SAMPLE = 512  # rows to measure a step on
_LAYERS_STEPS, _LAYERS_TOKENS = 200, 100_000  # to find out what a kind costs in each layer
_ENGINE_TOKENS = 20_000  # of inputs at which int8 looks
_OPTIMISER = 1.2  # what a step takes, in forward and backward passes


def choose(
    source: ModelFolder,
    output: Path,
    data: Data,
    plan: Plan,
    arguments: Callable[[Path, int], DistillationArguments],
    *,
    time_on: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    tell: Callable[[str], object] = lambda _: None,
) -> Choice:
    """Finds the fastest model that keeps what is asked, and writes it as ``distil_folder`` does, whole or not at all.

    What is found on the way lies in ``OUT.work``, where an interrupted search goes on; it is removed in the end. Where nothing
    keeps what is asked it stays, so that a search that asks for less takes what is there, and one with a higher budget, or more
    candidates, goes on from it: candidates that keep too little are then trained further.

    Args:
        arguments: of a work folder and a number of steps, how to distil.
        time_on: a device to measure times on; by default where it is trained, and with OpenVINO the CPU.
        tell: hears what is going on.

    Raises:
        ValueError: as ``distil_folder``; the dense model's own score is not above 0; the work folder was made with other
            options, or is none; there are several processes.
        FileExistsError: the output exists and is not empty, and ``overwrite`` is not set.
        RuntimeError: out of memory.

    Warns:
        UserWarning: the machine is busy, so that times tell little; what is chosen keeps less than asked inside the engine.
    """
    work = output.with_name(f"{output.name}.work")
    for place in (output, work):
        check_places(source, place)
    check_output(output, overwrite=overwrite)
    search = _Search(source, work, data, plan, arguments, time_on, resume, tell)
    try:
        chosen = search.run()
    except ValueError:
        if all(r.share is None for r in search.results.values()):  # wrong data: there is nothing that could go on
            shutil.rmtree(work, ignore_errors=True)
        raise
    if chosen is not None:
        with atomic_folder(output, overwrite=overwrite) as new:
            shutil.copytree(search.model_folder(chosen), new, dirs_exist_ok=True)
    results = sorted(search.asked(), key=lambda r: r.relative)
    facts = (search.held_out.metric, plan.keep, len(data.held_out), search.dense_facts, results, chosen)
    if chosen is None and any(r.share is not None for r in search.results.values()):
        return Choice(*facts, work=work)
    shutil.rmtree(work)
    return Choice(*facts)


class _Search:
    def __init__(
        self,
        source: ModelFolder,
        work: Path,
        data: Data,
        plan: Plan,
        arguments: Callable[[Path, int], DistillationArguments],
        time_on: str | None,
        resume: bool,
        tell: Callable[[str], object],
    ) -> None:
        self.source, self.work, self.data, self.plan = source, work, data, plan
        self.arguments, self.tell = arguments, tell
        self.args = arguments(work / "training", 1)
        if self.args.world_size > 1:
            raise ValueError(f"there are {self.args.world_size} processes, and a search measures times: start one")
        self.time_on = torch.device("cpu" if plan.engine != "torch" else time_on or self.args.device)
        self.dense_inside: Any = None  # the dense model in the engine, once it is there
        self.options = self._options()
        state = _opened(work, self.options, resume=resume)
        self.results = {name: Result(**fields) for name, fields in state.get("results", {}).items()}
        self.dense_facts: dict[str, Any] = state.get("dense", {})
        self.spent: float = state.get("spent", 0.0)  # seconds, up to when this was written
        self.mark = time.monotonic()
        self.busy = False  # whether that was told
        self.dense = source.load_dense().to(self.args.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source.transformer)
        self.max_length = length_for(plan.max_length, self.dense)
        self.held_out = HeldOut(
            data.task,
            data.held_out,
            self.tokenizer,
            self.dense.config,
            max_length=self.max_length,
            columns=data.columns,
            seed=plan.seed,
            progress=not self.args.disable_tqdm,
        )
        self.held_out.task.check_model(self.dense)
        self.sample = self._sample()  # what is wrong with the rows is told now
        collate = self.held_out.task.collator(self.tokenizer)
        self.workloads = [real_rows(self.held_out.all, collate, size, seed=plan.seed) for size in plan.batch_sizes]

    def _options(self) -> dict[str, Any]:
        """All that a candidate's result depends on, and that is not written beside it."""
        plan, args = asdict(self.plan), self.args
        of_plan = {k: v for k, v in plan.items() if k not in ("keep", "every", "mixed", "candidates", "budget")}
        options = {
            "source": str(self.source.root.resolve()),
            "task": self.data.task,
            "train": described(self.data.train),
            "held_out": digest(map(repr, self.data.held_out)),
            **of_plan,
            "time_on": str(self.time_on),
            "batch_size": args.per_device_train_batch_size,
            "learning_rate": args.learning_rate,
            "fff_learning_rate": args.fff_learning_rate,
            "muon": args.muon or None,  # as searches have it that know no Muon, and MLPs in units alone
            "mlp_units": None if args.units_of("mlp") else False,
            "bf16": args.bf16,
        }
        return cast("dict[str, Any]", json.loads(json.dumps(options)))  # as it is read again

    def save(self) -> None:
        """In one piece: an interruption leaves the last one."""
        now = time.monotonic()
        self.spent, self.mark = self.spent + now - self.mark, now
        state = {
            "options": self.options,
            "spent": self.spent,
            "dense": self.dense_facts,
            "results": {name: asdict(result) for name, result in self.results.items()},
        }
        told = json.dumps(state, indent=2)
        if not self.work.exists():
            with atomic_folder(self.work) as new:
                (new / _STATE).write_text(told, encoding="utf-8")
            return
        written = self.work / f"{_STATE}.new"
        written.write_text(told, encoding="utf-8")
        os.replace(written, self.work / _STATE)

    # The search

    def run(self) -> Result | None:
        with memory_explained("measuring", "the batch sizes or the maximal length of the inputs"):
            if not self.dense_facts:
                shutil.rmtree(self.work, ignore_errors=True)  # a search that is not to be continued
                self._measure_dense()
            new = [Result(name) for name in self.plan.candidates if name not in self.results]
            if new:
                self._measure_untrained(new)
        queue = sorted(
            (self.results[name] for name in self.plan.candidates if self.results[name].relative < 1),
            key=lambda r: r.relative,
        )
        mixed = _MIXED if self.plan.mixed and len(queue) > 1 else 0
        for number, result in enumerate(queue):
            self._train(result, len(queue) - number + mixed)
            if self._keeps(result) and not self.plan.every:
                break
        # Of one kind in all layers: so a search that was interrupted while it mixed goes on with that.
        uniform = min(filter(self._keeps, queue), key=lambda r: r.relative, default=None)
        faster = [r for r in queue if r.share is not None and uniform and r.relative < uniform.relative]
        if self.plan.mixed and uniform and faster:
            self._mix(uniform, max(faster, key=lambda r: r.relative))
        best = self._best()
        if best is not None and best.in_engine is None and self.plan.engine != "torch":
            self._measure_inside(best)
        for result in self.results.values():
            result.note = self._note(result, best)
        return best

    def asked(self) -> list[Result]:
        """Of what is known, what this search is about: an earlier one may have tried other candidates."""
        kinds = {*self.plan.candidates}
        return [
            r
            for r in self.results.values()
            if (self.plan.mixed and {*r.layers.values()} <= kinds if r.layers else r.name in kinds)
        ]

    def _keeps(self, result: Result) -> bool:
        return result.share is not None and result.share >= self.plan.keep and result.relative < 1

    def _best(self) -> Result | None:
        """The fastest of those that keep what is asked."""
        return min(filter(self._keeps, self.asked()), key=lambda r: r.relative, default=None)

    def _note(self, result: Result, best: Result | None) -> str:
        if result.failed:
            return result.failed
        if result.relative >= 1:
            return "slower than the dense model" + ("" if result.share is not None else ": skipped")
        if result is best:
            return "chosen"
        if result.share is None:
            return "not trained: slower than what is chosen"
        return "" if self._keeps(result) else "keeps too little"

    def _mix(self, slow: Result, fast: Result) -> None:
        """The kind that keeps enough in the layers that gain most by it, the next faster one in the others: in half of the
        layers, then in fewer if that kept enough, else in more."""
        try:
            with memory_explained("measuring", "the batch sizes or the maximal length of the inputs"):
                order = self._most_gained_first(slow.name, fast.name)
        except FloatingPointError as error:
            self.tell(f"nothing is mixed: {error}")
            return
        count = (len(order) + 1) // 2
        for left in range(_MIXED, 0, -1):
            if not 0 < count < len(order):
                return
            chosen = sorted(i for group in order[:count] for i in group)
            every = sorted(i for group in order for i in group)
            layers = {str(i): slow.name if i in chosen else fast.name for i in every}
            name = f"{slow.name} in {','.join(map(str, chosen))}, else {fast.name}"
            if name not in self.results:
                self._measure_untrained([Result(name, layers)])
            result = self.results[name]
            if result.relative >= slow.relative:
                return  # no faster than what keeps enough already
            self._train(result, left)
            count = count // 2 if self._keeps(result) else (count + len(order) + 1) // 2

    def _most_gained_first(self, slow: str, fast: str) -> list[list[int]]:
        """Layers, those that share an FFN together, by how much nearer to the dense model's the outputs are where one alone is of the slower
        kind and not of the faster. What a fit leaves unexplained in a layer would say little: much of little may be lost."""
        groups = FAMILIES[self.dense.config.model_type].groups(self.dense.base_model)
        if len(groups) < 2:
            return groups  # there is nothing to mix
        known: dict[str, list[float]] = self.dense_facts.setdefault("distances", {})
        for kind in (slow, fast):
            if kind not in known:
                known[kind] = self._distances(kind, groups)
                self.save()
        gained = [far - near for near, far in zip(known[slow], known[fast], strict=True)]
        return [group for _, group in sorted(zip(gained, groups, strict=True), key=lambda pair: -pair[0])]

    def _distances(self, kind: str, groups: list[list[int]]) -> list[float]:
        """How far the outputs are from the dense model's with a kind in one group of layers alone. All are fitted at once, each on what those below
        give, which is cheaper than to fit each alone, and overstates what the last ones cost (MiniLM: by 12 to 25 %)."""
        self.tell(f"what {kind} costs in each layer")
        plan = Calibration(
            self.data.train if isinstance(self.data.train, list) else self._inputs(),
            tokenizer=self.tokenizer,
            budget=None,
            steps=min(self.plan.steps or _LAYERS_STEPS, _LAYERS_STEPS),
            max_tokens=min(self.plan.max_tokens, _LAYERS_TOKENS),
            max_length=self.max_length,
            seed=self.plan.seed,
            progress=not self.args.disable_tqdm,
        )
        family = FAMILIES[self.dense.config.model_type]
        fitted = convert_ffn_to_fff(self.dense, kind, calibration=plan, seed=self.plan.seed)
        found = []
        for group in groups:
            alone = self._untrained(dict.fromkeys(group, kind))
            blocks, new = (family.blocks(model.base_model) for model in (alone, fitted))
            for i in group:  # assigned: what is copied into it would be in the dense model, too
                blocks[i].load_state_dict(new[i].state_dict(), assign=True)
            found.append(self.held_out.distance(alone, self.dense))
        return found

    def _untrained(self, config: LayersLike) -> Any:
        """A conversion of which nothing is known yet but its shapes."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the converted model is not calibrated")
            return convert_ffn_to_fff(self.dense, config, seed=self.plan.seed).to(self.args.device).eval()

    # Training

    def model_folder(self, result: Result, steps: int | None = None) -> Path:
        """Of the model after so many steps; of the one that was measured by default."""
        return self.work / "models" / f"{result.slug}-{result.done if steps is None else steps}"

    def _train(self, result: Result, left: int) -> None:
        """Calibrates, distils and measures a candidate; one that keeps too little for its steps is trained further where the
        budget is higher than it was then. ``left``: so many share the seconds that are left."""
        if result.failed:
            return
        if result.steps is None or (result.steps == result.done and self._may_improve(result)):
            self._allot(result, left)
            self.save()  # so that it goes on with as many
        if result.steps == result.done:
            return
        assert result.steps is not None
        more = f"{result.steps - result.done} more" if result.done else result.steps
        self.tell(f"{result.name}: {more} steps, {result.relative:.2f} of the dense model's time")
        try:
            model = self._distilled(result)
            with memory_explained("measuring", "the batch sizes or the maximal length of the inputs"):
                quality = self.held_out.measure(model, self.dense)
                self._time({result.name: model})
        except FloatingPointError as error:  # of this candidate alone
            self.tell(f"{result.name}: {error}")
            if result.done:
                result.steps = result.done  # what it was before stands
            else:
                result.failed = str(error)
            self.save()
        else:
            dense = Quality(self.dense_facts["score"], tuple(self.dense_facts["groups"]))
            result.score, result.share, result.error = quality.value, quality.share(dense), quality.error(dense)
            result.in_engine = None
            before, result.done = self.model_folder(result), result.steps
            self.save()
            shutil.rmtree(before, ignore_errors=True)
            self.tell(f"{result.name} keeps {result.share:.2%} at {result.relative:.2f} of the time")

    def _may_improve(self, result: Result) -> bool:
        with_less = result.budget is not None and self.plan.budget > result.budget
        return self.plan.steps is None and with_less and not self._keeps(result)

    def _distilled(self, result: Result) -> Any:
        folder, training = self.model_folder(result, result.steps), self.work / "training" / result.slug
        if training.exists() or not folder.exists():  # else it was interrupted while it was measured
            assert result.steps is not None
            args = self.arguments(training, result.steps - result.done)
            distil_folder(
                self.source,
                folder,
                result.config,
                self.data.train,
                args,
                calibration=Calibration(
                    None,
                    **cast("dict[str, Any]", result.calibration),
                    max_tokens=self.plan.max_tokens,
                    seed=self.plan.seed,
                    progress=not args.disable_tqdm,
                ),
                max_length=self.plan.max_length,
                start=self.model_folder(result) if result.done else None,
                overwrite=True,
            )
        return load_model(str(folder)).to(self.args.device)

    def _allot(self, result: Result, left: int) -> None:
        """Steps for the seconds that it gets; of a model that is calibrated already, the calibration's too."""
        plan = self.plan
        if plan.steps is not None:
            result.steps = plan.steps
            result.calibration = {"budget": None, "steps": plan.calibration_steps or plan.steps}
            return
        seconds = max(plan.budget - self.spent - (time.monotonic() - self.mark), 0.0) / left
        assert result.step_seconds is not None
        share = _TRAINING + (_CALIBRATING if result.done else 0.0)
        result.steps = result.done + max(_LEAST_STEPS, int(share * seconds / result.step_seconds))
        result.budget = plan.budget
        if not result.done:
            result.calibration = {"budget": max(_CALIBRATING * seconds, 1.0), "steps": plan.calibration_steps}

    # Measuring

    def _measure_dense(self) -> None:
        metric = self.held_out.metric
        self.tell(f"the dense model: {metric} on {len(self.data.held_out)} rows")
        quality = self.held_out.measure(self.dense, self.dense)
        if not quality.value > 0:
            raise ValueError(
                f"the dense model's {metric} is {quality.value:.4f} on held-out rows: there is nothing to keep"
            )
        self.dense_facts = {"score": quality.value, "groups": list(quality.groups)}

    def _measure_untrained(self, results: list[Result]) -> None:
        models = {r.name: self._untrained(r.config) for r in results}
        self.results |= {r.name: r for r in results}
        self._time(models)
        if self.plan.steps is None:
            for result in results:
                result.step_seconds = self._step_seconds(models[result.name])
        self.save()

    def _inside(self, model: Any) -> Any:
        """A model in the engine; the dense one is put there once."""
        if model is self.dense and self.dense_inside is not None:
            return self.dense_inside
        inputs = self.data.train if isinstance(self.data.train, list) else self._inputs(_ENGINE_TOKENS)
        served = engine.inside(model, inputs, self.tokenizer, self.max_length)
        if model is self.dense:
            self.dense_inside = served
        return served

    def _measure_inside(self, result: Result) -> None:
        self.tell(f"{result.name} inside {self.plan.engine}")
        model = self._inside(load_model(str(self.model_folder(result))))
        quality = self.held_out.measure(model, self.dense)
        result.in_engine = quality.share(Quality(self.dense_facts["score"], tuple(self.dense_facts["groups"])))
        self.save()
        if result.in_engine < self.plan.keep:
            warnings.warn(
                f"{result.name} keeps {result.share:.1%} in torch, and {result.in_engine:.1%} inside {self.plan.engine} in "
                f"{engine.PRECISION}, less than the {self.plan.keep:.1%} that were asked",
                stacklevel=2,
            )

    def _time(self, models: dict[str, Any]) -> None:
        """Writes times into the results of these names. What is measured is how many times as long as the dense model they
        take, side by side; microseconds are that, times what the dense model took when it was measured first."""
        self._warn_if_busy()
        models = {"dense": self.dense, **models}
        for model in models.values():
            model.to(self.time_on)
        try:
            timings = []
            timed = models if self.plan.engine == "torch" else {name: self._inside(m) for name, m in models.items()}
            for workload in self.workloads:  # one at a time, so that there is something to hear
                self.tell(f"how fast, {workload.name} rows at once: {', '.join(models)}")
                timings += time_models(timed, [workload], rounds=_ROUNDS, seed=self.plan.seed)
        finally:
            for model in models.values():
                model.to(self.args.device)
        dense = self.dense_facts.setdefault("microseconds", {t.workload: t.microseconds["dense"] for t in timings})
        for name in models.keys() - {"dense"}:
            ratios = {t.workload: t.ratios[name] for t in timings}
            self.results[name].microseconds = {w: dense[w] * ratio for w, ratio in ratios.items()}
            self.results[name].relative = statistics.geometric_mean(ratios.values())

    def _warn_if_busy(self) -> None:
        """Once; only of the machine's CPU is the load known."""
        told = busy() if self.time_on.type == "cpu" and not self.busy else None
        if told:
            self.busy = True
            warnings.warn(told, stacklevel=2)

    def _step_seconds(self, model: Any) -> float:
        """About how long a step of the distillation takes, from a few passes."""
        collate, device = self.held_out.task.collator(self.tokenizer), self.args.device
        (batch, *_) = real_rows(self.sample, collate, self.args.train_batch_size, seed=self.plan.seed).batches
        batch = {k: v.to(device) for k, v in batch.items()}
        times = []
        for _ in range(4):
            start = time.monotonic()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
                with torch.no_grad():
                    self.dense(**batch)
                out = model(**batch, output_hidden_states=True)
                found = [*out.hidden_states, *(t for t in out.to_tuple() if torch.is_tensor(t))]
                loss = torch.stack([t.float().square().mean() for t in found]).sum()
            loss.backward()
            float(loss.detach())  # waits for a GPU
            times.append(time.monotonic() - start)
        model.zero_grad(set_to_none=True)
        self.dense.zero_grad(set_to_none=True)  # of which the model has the attention
        return _OPTIMISER * sorted(times[1:])[1]

    def _sample(self) -> Any:
        """Some of what is trained on, encoded."""
        train = self.data.train
        if not isinstance(train, TaskRows):
            return TokenisedTexts(train[:_SAMPLE], self.tokenizer, self.max_length)
        return self.held_out.task.encode(
            train.rows[:_SAMPLE],
            self.tokenizer,
            self.dense.config,
            max_length=self.max_length,
            columns=train.columns,
            seed=self.plan.seed,
        )

    def _inputs(self, tokens: int = _LAYERS_TOKENS) -> list[dict[str, torch.Tensor]]:
        return calibration_batches(self.data.task, self.sample, None, self.tokenizer, tokens)


def busy() -> str | None:
    """What to say of a machine with so much to do that its times tell little; else None. What this process itself does counts
    for no more than the threads that it uses."""
    try:
        load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    except (OSError, AttributeError):  # it is not known everywhere
        return None
    threads = torch.get_num_threads()
    if load <= cpus + threads / 2:
        return None
    return (
        f"the machine is busy: its load average is {load:.1f}, on {cpus} CPUs of which {threads} are used here. Times, and what "
        "is chosen by them, may not hold when it is idle"
    )


def _opened(work: Path, options: Mapping[str, Any], *, resume: bool) -> dict[str, Any]:
    """What an interrupted search left; an empty dict where there is nothing to continue."""
    if not work.exists() or (work.is_dir() and not any(work.iterdir())):
        return {}
    try:
        state = json.loads((work / _STATE).read_text(encoding="utf-8"))
        made_with = dict(state["options"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{work} is no work folder of a search: move it away, or give another OUT") from error
    if not resume:
        return {}
    made_with.setdefault("engine", "torch")  # of before there was another
    check_options(work, made_with, options)
    return cast("dict[str, Any]", state)
