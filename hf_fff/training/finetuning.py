"""Finetuning and masked-LM pretraining, of dense and converted models: ``Trainer`` with rates for what replaced the FFNs, and scores."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import DataCollatorForLanguageModeling
from transformers.trainer_utils import speed_metrics

from ..config import layers_to_json
from ..layers import FFF
from ..modes import evaluating, rounded_rows
from ..tasks import Encoded, get_task
from ..tasks.data import IGNORED
from ..tasks.evaluate import batches, on_device
from ..tasks.kinds import Task
from .arguments import FinetuningArguments
from .base import FastTrainer, without_labels
from .objectives import get_objective


class FinetuningTrainer(FastTrainer):
    """A ``Trainer`` for dense and converted models, by the loss that their head gives; of "qa" by the same over what is not padding.

    What replaced the FFNs has a rate of its own (``args.fff_learning_rate``), in units of its inputs and outputs. With a task,
    batches are made by its collator (of "mlm" with fresh masks in every epoch), and ``evaluate`` gives the metrics of
    ``hf_fff.tasks.evaluate`` and the mean loss, over all processes; without one, all is as in ``Trainer``.

    Args:
        model: with the head of the task.
        args: how to train.
        task: a name of ``objectives.OBJECTIVES``.
        train_dataset, eval_dataset: encoded by the task; of "mlm" to train on, rows with ``input_ids`` that are not masked
            (``TextPieces``, ``StreamedPieces``).
        kwargs: as ``Trainer``; a task without ``data_collator`` needs ``processing_class=tokenizer``.

    Raises:
        ValueError: a data set is empty, or the model has no head for the task.
        FloatingPointError: from ``train``, as ``FastTrainer`` says; from ``evaluate``: an output is not finite.
    """

    args: FinetuningArguments

    def __init__(
        self, model: Any, args: FinetuningArguments | None = None, *, task: str | None = None, **kwargs: Any
    ) -> None:
        args = FinetuningArguments() if args is None else args
        if not isinstance(args, FinetuningArguments):
            raise ValueError(f"args must be FinetuningArguments, not {type(args).__name__}")
        self.task: Task | None = None
        if task is not None:
            self._objective = get_objective(task)
            self.task = get_task(task)
            self.task.check_model(model)
            tokenizer = kwargs.get("processing_class")
            if kwargs.get("data_collator") is None:
                if tokenizer is None:
                    raise ValueError(f"task={task!r} makes its batches with a tokenizer: give processing_class")
                kwargs["data_collator"] = collator(task, tokenizer, args)
            self._pad = self.task.collator(tokenizer) if tokenizer is not None else kwargs["data_collator"]
        self._drops_out = args.dropout
        if args.routing_gradient is not None:
            set_routing_gradient(model, args.routing_gradient)
        super().__init__(model, args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As ``Trainer.compute_loss``; in training it keeps by what a loss that is not finite is told, without waiting for it."""
        training = torch.is_grad_enabled()
        given = {**inputs, "output_hidden_states": True} if training else dict(inputs)
        loss, out = super().compute_loss(model, given, True, num_items_in_batch)
        if self.task is not None and self._objective.padding_counts:
            total, labels = self._objective.label_losses(out, inputs).sum(0)
            loss = total / labels.clamp_min(1)
        if training:
            sums = [h.detach().sum(dtype=torch.float32) for h in out.get("hidden_states") or ()]
            self._seen.append((self.state.global_step + 1, torch.stack([*sums, loss.detach().float()])))
        return (loss, out) if return_outputs else loss

    def _described(self) -> dict[str, Any]:
        names = ("routing_gradient", "dropout", "mlm_probability")
        return {**super()._described(), **{name: getattr(self.args, name) for name in names}}

    def _learned_from(self, out: Any) -> list[Tensor]:
        return [t for t in out.values() if isinstance(t, Tensor)]

    def _place(self, part: int) -> str:
        if part == self._seen[0][1].numel() - 1:
            return "the loss of the head alone is"
        return f"layer {part - 1} is the first whose hidden state is" if part else "the embeddings are"

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As ``Trainer.evaluate``; of a task and rows that it encoded: its metrics, and the mean of the loss."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str) and isinstance(self.eval_dataset, dict):
            data = self.eval_dataset[data]
        if self.task is None or not isinstance(data, Encoded):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._memory_tracker.start()
        begin = time.time()
        scores = {f"{metric_key_prefix}_{name}": value for name, value in self._scores(data).items()}
        scores |= speed_metrics(metric_key_prefix, begin, num_samples=len(data))
        self.log(scores)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        self._memory_tracker.stop_and_update_metrics(scores)
        return scores

    def _scores(self, data: Encoded) -> dict[str, float]:
        """Each process takes its turn of the batches; where the last turn has too few, the others do one of them again, since a
        sharded model is computed by all together."""
        task, args = self.task, self.args
        assert task is not None
        model: Any = self.model
        steps = list(batches(data, self._pad, args.eval_batch_size))
        turns = range(0, len(steps), args.world_size)
        self.callback_handler.eval_dataloader = turns
        kept: list[tuple[int, Tensor]] = []
        losses: list[Tensor] = []
        with evaluating(model), rounded_rows(model, args.packed_rows), self.accelerator.autocast():
            for turn in turns:
                place = turn + args.process_index
                indices, batch = steps[place if place < len(steps) else 0]
                batch = on_device(batch, model)
                out = model(**without_labels(batch))
                if place < len(steps):
                    have = task.outputs(lambda out=out, **_: out, batch, data, indices)
                    kept += [(i, task.reduce(o, data[i]).cpu()) for i, o in zip(indices, have, strict=True)]
                    losses.append(self._objective.label_losses(out, batch).sum(0).cpu())
                self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        everywhere = dict(gather_object(kept))
        total, labels = torch.stack(gather_object(losses)).double().sum(0).tolist()
        for i, output in everywhere.items():
            if not bool(output.isfinite().all()):
                raise FloatingPointError(f"an output for row {data.row_of[i] + 1} is not finite")
        return {"loss": total / max(labels, 1), **task.score([everywhere[i] for i in range(len(data))], data)}


def set_routing_gradient(model: Any, alpha: float) -> None:
    """Sets the routing gradient of all trees of a model, in its config too; 0 switches it off. Models without trees stay as they
    are.

    Raises:
        ValueError: ``alpha`` is below 0 or not finite.
    """
    for module in model.modules():
        if isinstance(module, FFF):
            module.config = replace(module.config, routing_gradient=float(alpha))
    layers = getattr(model.config, "fff_layers", {})
    trees = {i: replace(c, routing_gradient=float(alpha)) if c.has_trees else c for i, c in layers.items()}
    if trees != layers:
        model.config.fff = layers_to_json(trees, model.config.num_hidden_layers)


class MaskingCollator(DataCollatorForLanguageModeling):
    """transformers' collator for masked language models: of the tokens that are masked, 80 % are replaced by the mask token and 10 % by
    others. A batch has at least one, since the loss of none is NaN.

    Args:
        share: of the tokens that are masked.

    Raises:
        ValueError: the tokenizer has no mask token; a batch has no token to be masked.
    """

    def __init__(self, tokenizer: Any, share: float = 0.25) -> None:
        super().__init__(tokenizer=tokenizer, mlm_probability=share)
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)))

    def torch_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any = None, offset_mapping: Any = None
    ) -> tuple[Any, Any]:
        special = torch.isin(inputs, self._special)
        if bool(special.all()):
            raise ValueError(
                f"a batch of {len(inputs)} texts has no token to be masked: all are special ones, or unknown to the tokenizer. "
                "Leave such texts out, or take a tokenizer that knows their characters"
            )
        while True:
            masked, labels = super().torch_mask_tokens(inputs.clone(), special, offset_mapping)
            if bool((labels != IGNORED).any()):
                return masked, labels


def collator(task: str, tokenizer: Any, args: FinetuningArguments) -> Any:
    """What makes batches of a task to train on."""
    if task == "mlm":
        return MaskingCollator(tokenizer, args.mlm_probability)
    return get_task(task).collator(tokenizer)
