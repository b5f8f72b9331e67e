"""Checkpoints that are whole or not there, that are of the same training or refused, and that an interrupted training leaves."""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..files import flush, settle
from .processes import check_processes
from .routing import RoutingMetrics

_MANIFEST, _STATE, _SCHEDULER = "manifest.json", "trainer_state.json", "scheduler.pt"
# Of a model's config: what training, saving or another version of transformers changes.
_NOT_COMPARED = {"transformers_version", "architectures", "dtype", "torch_dtype", "problem_type", "use_cache"}
_NOT_COMPARED |= {"bos_token_id", "eos_token_id", "pad_token_id"}
# What must be as it was for the same rows to come with the same steps.
_ARGUMENTS = ("seed", "data_seed", "optim", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm")


class SafeCheckpoints(Trainer):
    """A ``Trainer``, or before another one (``class Mine(SafeCheckpoints, SomeTrainer)``), with these checkpoints:

    - One is written beside its place, flushed to the disk, and takes its place by one renaming: it is whole or not there. Where writing
      fails, on a full disk, the training ends with an error, and those before are kept.
    - A list of its files with their digests lies in it. ``train(resume_from_checkpoint=...)`` takes a checkpoint, a folder of them, or
      True for those of ``output_dir``; of several the last whole one, after a warning about any that is torn.
    - One of another model, config or training is refused, with the field. One of another number of processes is taken where a step
      has as many rows as there.
    - What goes on from one gives what it would have given without the interruption, to the bit where computing is deterministic: what a
      collator draws, such as masked tokens, depends on the seed, the epoch and the rows alone; in evaluations it is always the same.

    Without ``accelerate launch`` it trains on one GPU, not by ``DataParallel`` on all.

    SIGINT (ctrl-C) and SIGTERM end the training after the step, and after one more checkpoint, with ``KeyboardInterrupt`` or
    ``SystemExit(143)``; a second one ends it at once. Several processes agree on the step.

    Raises:
        ValueError: as ``check_processes``; from ``train``: a checkpoint is not whole, or of another training.
        RuntimeError: from ``train``: a checkpoint cannot be written.
    """

    _partial: Path | None = None  # where a checkpoint is written meanwhile
    _saved: int | None = None  # the step of the last one
    _signal = 0  # that ends the training
    _ending = False  # all processes know
    _hosts: Any = None  # processes, without their GPUs
    _seeded: Any = None

    def __init__(self, model: Any = None, args: Any = None, *more: Any, **kwargs: Any) -> None:
        check_processes(args)
        if args is not None:
            # Not DataParallel, which is slower than one GPU and blind to hooks: several are for accelerate launch.
            args._n_gpu = min(args.n_gpu, 1)
        super().__init__(model, args, *more, **kwargs)
        self._training: dict[str, Any] = {}

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; see the class."""
        self._training = self._described()
        checkpoint = self._checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        callbacks = self.callback_handler.callbacks
        callbacks.sort(key=lambda one: not isinstance(one, RoutingMetrics))  # before those that report what is logged
        try:
            with self._interruptible():
                result = super().train(checkpoint, *args, **kwargs)
        finally:
            for callback in callbacks:
                if isinstance(callback, RoutingMetrics):
                    callback.stop()
        if self._ending:
            raise SystemExit(143) if self._signal == signal.SIGTERM else KeyboardInterrupt
        return result

    # Writing

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, run = self.state.global_step, Path(super()._get_output_dir(trial))
        place, partial = run / f"checkpoint-{step}", run / f".checkpoint-{step}.partial"
        try:
            if self.args.should_save:
                for left in run.glob(".checkpoint-*.partial"):  # by a process that was killed
                    shutil.rmtree(left)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            best = run / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self._partial = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._partial = None
            self.accelerator.wait_for_everyone()
            new = partial / place.name
            if self.state.best_model_checkpoint == str(new):
                self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(new / _STATE))
                _seal(new, step, self._training)
                _put(new, place)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            kept = [p.name for p in _checkpoints(run)]
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"the checkpoint of step {step} cannot be written to {run}: {why}. "
                + (f"{kept[0]} is the last one that was" if kept else "There is none before it")
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
        self._saved = step
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(place))
        if self.args.should_save:
            best_place, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(str(run), limit, best_model_checkpoint=best_place, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._partial is None:  # else it is still to be moved
            super()._push_from_checkpoint(checkpoint_folder)

    # Going on

    def _checkpoint(self, given: Any) -> str:
        """The checkpoint to go on from; one process reads it through."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = str(whole_checkpoint(Path(str(self.args.output_dir if given is True else given))))
            except ValueError as error:
                found[1] = str(error)
        found = broadcast_object_list(found)
        if found[1]:
            raise ValueError(found[1])
        _check_same(Path(found[0]), _manifest(Path(found[0]))["training"], self._training)
        return str(found[0])

    def _described(self) -> dict[str, Any]:
        """What a checkpoint must be of to go on from it."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        config = model.config.to_dict() if hasattr(model, "config") else {}
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None  # type: ignore[arg-type]
        size, accumulated = args.train_batch_size, args.gradient_accumulation_steps
        steps = None
        if rows is not None:
            drop = args.dataloader_drop_last
            batches = _parts(_parts(rows, size, drop), args.world_size, drop)  # of each process
            steps = _parts(batches, accumulated, False)
        told = {
            "model": type(model).__name__.removeprefix("FSDP"),
            **{f"config.{k}": v for k, v in config.items() if k not in _NOT_COMPARED and not k.startswith("_")},
            **{
                f"weights.{n}": f"{p.dtype} {list(p.shape)}".removeprefix("torch.") for n, p in model.named_parameters()
            },
            "rows of train_dataset": rows,
            "rows of a step": size * accumulated * args.world_size,
            "steps of an epoch": steps,
            "sharding": _sharding(self),
            "processes": args.world_size,
            **{name: getattr(args, name, None) for name in _ARGUMENTS},
        }
        plain: dict[str, Any] = json.loads(json.dumps(told, default=str))  # as it is read again
        return plain

    def get_train_dataloader(self) -> Any:
        """As ``Trainer`` has it, with a collator that draws the same for the same rows of an epoch."""
        with self._seeded_collator() as self._seeded:
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer`` has it, with a collator that draws the same in each evaluation."""
        with self._seeded_collator():
            return super().get_eval_dataloader(*args, **kwargs)

    @contextmanager
    def _seeded_collator(self) -> Iterator["_SeededCollator"]:
        collate: Any = self.data_collator
        self.data_collator = seeded = _SeededCollator(collate, self.args.seed)
        try:
            yield seeded
        finally:
            self.data_collator = collate

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self._seeded is not None:
            self._seeded.epoch = int(self.state.epoch or 0)
        return super()._run_epoch(*args, **kwargs)

    # Ending early

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._ending:
            return  # this is no end of an epoch
        self._ending = self._all_are_to_end()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._ending:
            if self._saved != self.state.global_step:
                self._save_checkpoint(self.model_wrapped, None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            # Else the Trainer goes back to the best one, and with save_total_limit=1 removes this one.
            self.state.best_model_checkpoint = None
            self.control.should_training_stop = True

    def _all_are_to_end(self) -> bool:
        if self._hosts is not None:
            asked = torch.tensor(self._signal)
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._hosts)
            self._signal = int(asked)
        return bool(self._signal)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        self._signal, self._ending, self._saved, self._process = 0, False, None, os.getpid()
        if self._hosts is None and self.args.world_size > 1 and dist.is_initialized():
            self._hosts = dist.new_group(backend="gloo")
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._asked_to_end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _asked_to_end(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._process:  # a process that loads data, which its parent ends
            if number == signal.SIGTERM:
                os._exit(143)
            return
        if self._signal:
            raise SystemExit(143) if number == signal.SIGTERM else KeyboardInterrupt
        self._signal = number
        if self.args.process_index == 0:
            print("\nending after this step, with a checkpoint; once more to end at once", file=sys.stderr, flush=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in a folder, or None.

    Warns:
        UserWarning: there is a later one that is torn.
    """
    for checkpoint in _checkpoints(folder):
        why = torn(checkpoint)
        if why is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is left out, it is torn: {why}", stacklevel=2)
    return None


def whole_checkpoint(place: Path) -> Path:
    """``place``, if it is a checkpoint, or the last whole one in it.

    Raises:
        ValueError: it is torn; there is none.
    """
    if (place / _STATE).exists() or (place / _MANIFEST).exists():
        if why := torn(place):
            others = [p.name for p in _checkpoints(place.parent) if p != place]
            raise ValueError(
                f"the checkpoint {place} is torn: {why}" + (f" (others there: {', '.join(others)})" if others else "")
            )
        return place
    found = last_checkpoint(place)
    if found is None:
        raise ValueError(f"there is no whole checkpoint in {place}")
    return found


def torn(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: its files are read through."""
    try:
        manifest = _manifest(checkpoint)
    except FileNotFoundError:
        return f"there is no {_MANIFEST}, which is written last"
    except (OSError, ValueError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    for name, digest in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} is not what was written"
    if not (checkpoint / _STATE).is_file() or _STATE not in manifest["files"]:
        return f"there is no {_STATE}"
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The latest first."""
    found = {int(p.name[11:]): p for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal() and p.is_dir()}
    return [found[step] for step in sorted(found, reverse=True)]


def _seal(checkpoint: Path, step: int, training: Mapping[str, Any]) -> None:
    """Writes the list of a checkpoint's files, and has the disk hold all of it."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    body = {
        "version": 1,
        "step": step,
        "files": {str(p.relative_to(checkpoint)): _digest(p) for p in files},
        "training": dict(training),
    }
    written = {"digest": _digest_of(body), **body}
    (checkpoint / _MANIFEST).write_text(json.dumps(written, indent=1), encoding="utf-8")
    settle(checkpoint)


def _put(new: Path, place: Path) -> None:
    """Gives a finished folder its place, where a torn one may be, or one of a training that went on from an earlier step."""
    old = new.with_name("old")
    if place.exists():
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    flush(place.parent)


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """Raises ``OSError`` or ``ValueError`` where it is not what was written."""
    body = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(body, dict) or body.pop("digest", None) != _digest_of(body):
        raise ValueError("it is not what was written")
    return body


def _digest(path: Path) -> str:
    digest, part = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb") as file:
        while count := file.readinto(part):
            digest.update(memoryview(part)[:count])
    return digest.hexdigest()


def _digest_of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_same(checkpoint: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` where a checkpoint is of another training, or holds none."""
    if there.get("sharding") == "none" and not (checkpoint / _SCHEDULER).is_file():
        raise ValueError(f"{checkpoint} holds weights alone (save_only_model), from which no training goes on")
    differing = [name for name in {**there, **now} if there.get(name) != now.get(name) and name != "processes"]
    sharded = {there.get("sharding"), now.get("sharding")} != {"none"}
    if there.get("processes") != now.get("processes"):
        if sharded:
            differing.append("processes")
        elif not differing:
            warnings.warn(
                f"{checkpoint} is of {there.get('processes')} processes, and there are {now['processes']} now: the rows of each step "
                "are the same, but not what dropout draws",
                stacklevel=4,
            )
    if not differing:
        return
    name = differing[0]
    told = f"{name} is {there.get(name, 'absent')!r} there, {now.get(name, 'absent')!r} now"
    if len(differing) > 1:
        told += f"; {len(differing) - 1} more, such as {differing[1]}"
    if "rows of a step" in differing:
        told += ". Rows of a step are per_device_train_batch_size * gradient_accumulation_steps * processes"
    raise ValueError(f"{checkpoint} is a checkpoint of another training, and is not continued: {told}")


def _sharding(trainer: Any) -> str:
    return "fsdp" if trainer.is_fsdp_enabled else "deepspeed" if trainer.is_deepspeed_enabled else "none"


def _parts(whole: int, size: int, drop: bool) -> int:
    return whole // size if drop else -(-whole // size)


class _SeededCollator:
    """What it draws depends on the seed, the epoch and the rows: not on what was drawn before, nor on who collates. Left to the state of
    the generators, batches that are fetched ahead would draw otherwise when a training goes on."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any], seed: int) -> None:
        self.collate, self.seed, self.epoch = collate, seed, 0

    def __call__(self, rows: Sequence[Any]) -> Any:
        key = zlib.crc32(repr((self.seed, self.epoch)).encode())
        for row in rows:
            for value in row.values() if isinstance(row, Mapping) else [row]:
                key = zlib.crc32(_bytes(value), key)
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(key)
        np.random.seed(key)
        torch.default_generator.manual_seed(key)  # torch.manual_seed would seed the GPUs too
        try:
            return self.collate(rows)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def _bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy() if value.dtype == torch.bfloat16 else value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.tobytes()
    return repr(value).encode()
