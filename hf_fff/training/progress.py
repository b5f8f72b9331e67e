"""How a training goes on, in one bar, in the place of the dicts that transformers' Trainer prints."""

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback


def tell_progress(trainer: Any, doing: str = "distilling", shown: tuple[str, ...] = ("loss", "cosine")) -> None:
    """Gives a trainer one bar on stderr, with what of the logs is to be shown; with ``disable_tqdm``, nothing at all."""
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress(doing, shown))


class Progress(TrainerCallback):
    """A bar of the steps, with the latest of what is to be shown, and one for each evaluation."""

    def __init__(self, doing: str = "distilling", shown: tuple[str, ...] = ("loss", "cosine")) -> None:
        self._doing, self._shown = doing, shown
        self._told: dict[str, str] = {}
        self._bar: Any = None
        self._evaluation: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._bar = _bar(self._doing, "step", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        told = {name.removeprefix("eval_"): f"{logs[name]:.4f}" for name in self._shown if name in (logs or {})}
        self._told |= told
        if self._bar is not None and told:
            self._bar.set_postfix(self._told)

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
