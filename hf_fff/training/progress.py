"""How a distillation goes on, in one bar, in the place of the dicts that transformers' Trainer prints."""

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

_SHOWN = ("loss", "cosine")


def tell_progress(trainer: Any) -> None:
    """Gives a trainer one bar on stderr; with ``disable_tqdm``, nothing at all."""
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress())


class Progress(TrainerCallback):
    """A bar of the steps, with the loss and the cosine as they are logged, and one for each evaluation."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._evaluation: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._bar = _bar("distilling", "step", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        told = {name: f"{logs[name]:.4f}" for name in _SHOWN if name in (logs or {})}
        if self._bar is not None and told:
            self._bar.set_postfix(told)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            if self._evaluation is None:
                self._evaluation = _bar("evaluating", "batch", len(eval_dataloader), 0)
            self._evaluation.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None


def _bar(what: str, unit: str, total: int, begun: int) -> Any:
    every = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a file needs no line for each step
    return tqdm(total=total, initial=begun, desc=what, unit=unit, dynamic_ncols=True, mininterval=every)
