"""General distillation: a converted model learns, from unlabelled text, to give the hidden states and the mean-pooled
sentence embeddings of the dense model that it comes from.

Calibration fits one layer at a time; here all of them are trained together, attention and embeddings too.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..files import atomic_folder, check_output
from ..layers import FFF, MLP, NoFFN, OutputBias
from ..models import FAST_CLASSES
from ..surgery import Calibration, convert_ffn_to_fff
from ..surgery.folder import ModelFolder, check_places, write_folder
from ..surgery.text import shuffled

_SCALE_ROWS = 1024  # on which the teacher's standard deviations are measured
_HELD_OUT_ROWS = 2048  # more would only cost time
_OPTIONS, _START = "options.json", "start"  # what lies in a work folder beside the checkpoints


@dataclass
class DistillationArguments(TrainingArguments):
    """transformers' ``TrainingArguments`` with the weights of the loss, a rate for what replaced the FFNs, and other defaults.

    Raises:
        ValueError: a weight below 0, both of them 0, or a rate that is not above 0.
    """

    hidden_weight: float = field(default=0.5, metadata={"help": "Of the hidden states' error in the loss."})
    embedding_weight: float = field(default=10.0, metadata={"help": "Of 1 - cosine of the embeddings in the loss."})
    fff_learning_rate: float = field(
        default=1e-3,
        metadata={"help": "For what replaced the FFNs, output biases included; learning_rate for the rest."},
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "For all but what replaced the FFNs."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the rates fall."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps in which the rates rise; below 1: a share."})
    report_to: Any = field(default="none", metadata={"help": "Where to report to."})
    # The filter would hide a loss that is not finite, and wait for the GPU at every step to do so.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN losses out of the logs."})
    # Nothing is unused: what the loss cannot reach is frozen.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Passed to DDP."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_weight", "embedding_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0")
        if not self.hidden_weight + self.embedding_weight > 0:
            raise ValueError("hidden_weight and embedding_weight are both 0: there is nothing to learn")
        for name in ("learning_rate", "fff_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be above 0")


class DistillationTrainer(Trainer):
    """Trains a student to give the hidden states and the embeddings of a teacher.

    The loss of a batch is ``hidden_weight * hidden + embedding_weight * (1 - cosine)``. ``hidden`` is the mean over layers,
    visible tokens and dimensions of the squared difference of the hidden states after a layer, each dimension divided by the
    standard deviation that it has in the teacher (measured once, on the first rows, before the first step). ``cosine`` is the
    mean, over rows, of the cosine of the mean-pooled last hidden states. Both are logged; ``evaluate`` gives ``eval_loss``,
    ``eval_cosine`` and ``eval_hidden`` of the whole set, whatever the batch size.

    Only ``student.base_model`` is trained, and ``trainer.model`` and checkpoints are that base model: a head is left as it is
    (one that is tied to the embeddings moves with them), and so is the pooler, which the loss does not reach. ``save_model``
    saves the student with its head. There is no dropout in training, which to a regression is only noise.

    Args:
        model: the student, with any head.
        teacher: the dense model, with any head. It is put in evaluation mode and moved to the student's device.
        args: how to train.
        train_dataset, eval_dataset: rows with ``input_ids`` and, where there is padding, ``attention_mask``; labels are not
            looked at. With an attribute ``lengths``, rows of similar length are batched together.
        kwargs: as ``Trainer``; with ``processing_class=tokenizer``, batches are padded as they are made.

    Raises:
        ValueError: student and teacher differ in shape or share parameters, or a data set is too small.
        FloatingPointError: from ``train``: the loss is not finite. This is looked at when something is logged or saved, and at
            the end; the last checkpoint is from before.
    """

    args: DistillationArguments

    def __init__(self, model: Any, args: DistillationArguments | None = None, *, teacher: Any, **kwargs: Any) -> None:
        args = DistillationArguments() if args is None else args
        if not isinstance(args, DistillationArguments):
            raise ValueError(f"args must be DistillationArguments, not {type(args).__name__}")
        _check_pair(model, teacher)
        _check_rows("train_dataset", kwargs.get("train_dataset"), args.train_batch_size * args.world_size)
        _check_rows("eval_dataset", kwargs.get("eval_dataset"), 1)
        super().__init__(model=model.base_model, args=args, **kwargs)
        self.student = model
        self.teacher = teacher.base_model.to(args.device).eval()
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        self._scales: list[Tensor] = []  # [H] for each layer
        self._seen: list[tuple[int, Tensor]] = []  # step and parts of the loss, since the last log

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``."""
        self._measure_scales()
        self._seen = []
        if self.model_wrapped is self.model:  # after an evaluation, which would keep DDP from being wrapped around it
            _unprepare(self.model)
        with self._undisturbed():
            return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, a scalar."""
        rows, outputs = self._compare(model, inputs)
        parts = _parts(rows)
        if torch.is_grad_enabled():
            self._seen.append((self.state.global_step + 1, parts.detach()))
        loss = self._weighted(parts)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Two groups of parameters, the one that replaced the FFNs last; four if there is a weight decay."""
        if self.optimizer is None:
            model = self.model if model is None else model
            own = {
                id(p) for m in model.modules() if isinstance(m, (FFF, MLP, NoFFN, OutputBias)) for p in m.parameters()
            }
            decayed = set(self.get_decay_parameter_names(model)) if self.args.weight_decay else set()
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, p in model.named_parameters():
                if p.requires_grad:
                    groups.setdefault((id(p) in own, name in decayed), []).append(p)
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(
                [
                    {
                        "params": groups[key],
                        "lr": self.args.fff_learning_rate if key[0] else self.args.learning_rate,
                        "weight_decay": self.args.weight_decay if key[1] else 0.0,
                    }
                    for key in sorted(groups)
                ],
                **options,
            )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss."""
        if self._seen and ("loss" in logs or "train_loss" in logs):
            mean = self._checked().mean(0)
            if "loss" in logs:
                logs |= {"hidden": float(mean[:-1].mean()), "cosine": 1 - float(mean[-1])}
            self._seen = []
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the student with its head; checkpoints hold the base model alone."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save and self.student is not self.model:
            self.student.save_pretrained(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._seen:
            self._checked()
        for name, p in self.student.base_model.named_parameters():
            if p.requires_grad and not bool(p.isfinite().all()):
                raise FloatingPointError(f"after step {self.state.global_step} the weights {name} are not finite")
        super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = getattr(self.train_dataset if train_dataset is None else train_dataset, "lengths", None)
        if lengths is None:
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _ByLength(lengths, size, self.args.seed)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """No dropout; what the loss does not reach is frozen, so that DDP does not wait for its gradients."""
        base: Any = self.model
        dropouts = [(m, m.p) for m in base.modules() if isinstance(m, nn.Dropout)]
        for module, _ in dropouts:
            module.p = 0.0
        frozen = self._unreached()
        for p in frozen:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for module, rate in dropouts:
                module.p = rate
            for p in frozen:
                p.requires_grad_(True)

    def _unreached(self) -> list[nn.Parameter]:
        """Trainable parameters that no hidden state depends on."""
        base: Any = self.model
        parameters = [p for p in base.parameters() if p.requires_grad]
        with torch.enable_grad():
            out = base.eval()(**next(self._first_batches(1)), output_hidden_states=True)
            total = sum(h.float().sum() for h in (*out.hidden_states, out.last_hidden_state))
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is None]

    def _checked(self) -> Tensor:
        """``[steps, layers + 1]``, the parts of the losses since the last log, of all processes. Waits for the GPU."""
        parts = self.accelerator.gather(torch.stack([p for _, p in self._seen])).float().cpu()
        wrong = (~parts.isfinite()).nonzero()
        if len(wrong):
            worst = min((self._seen[i % len(self._seen)][0], layer) for i, layer in wrong.tolist())
            place = (
                f"layer {worst[1]} is the first whose hidden state"
                if worst[1] < parts.shape[1] - 1
                else "the embedding"
            )
            raise FloatingPointError(
                f"the loss is not finite at step {worst[0]}: {place} is not finite. "
                "Continue from the last checkpoint with lower learning rates"
            )
        return parts

    # What is compared

    def _compare(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """``[rows, layers + 2]``: each row's error summed over its visible tokens, after each layer; how many tokens these
        are; the cosine. And the student's outputs."""
        inputs = _without_labels(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            want = self.teacher(**inputs, output_hidden_states=True)
        have = model(**inputs, output_hidden_states=True)
        visible = _visible(inputs)
        errors = [
            (((h.float() - w.float()) / scale).square().mean(-1) * visible).sum(1)
            for h, w, scale in zip(have.hidden_states[1:], want.hidden_states[1:], self._scales, strict=True)
        ]
        a, b = (_pooled(out.last_hidden_state, visible) for out in (have, want))
        cosine = F.cosine_similarity(a, b, dim=-1)
        return torch.stack([*errors, visible.sum(1), cosine], 1), have

    def _weighted(self, parts: Tensor) -> Tensor:
        return self.args.hidden_weight * parts[:-1].mean() + self.args.embedding_weight * parts[-1]

    @torch.no_grad()
    def _measure_scales(self) -> None:
        """Standard deviations of the teacher's hidden states, at least a hundredth of their layer's median, so that a
        dimension that hardly varies does not fill the loss."""
        if self._scales:
            return
        shifts: list[Tensor] = []  # about the means, for the sake of float32
        count, sums, squares = torch.zeros(3, device=self.args.device).unbind()
        for inputs in self._first_batches(_SCALE_ROWS):
            states = self.teacher(**inputs, output_hidden_states=True).hidden_states[1:]
            visible = _visible(inputs)
            if not shifts:
                shifts = [_pooled(h.flatten(0, 1)[None], visible.flatten()[None])[0] for h in states]
            moved = torch.stack(
                [(h.float() - shift) * visible.unsqueeze(-1) for h, shift in zip(states, shifts, strict=True)]
            )
            count = count + visible.sum()
            sums = sums + moved.sum((1, 2))
            squares = squares + moved.square().sum((1, 2))
        if not shifts:
            raise ValueError("the data set is empty")
        spread = ((squares / count) - (sums / count).square()).clamp_min(0).sqrt()
        self._scales = list(torch.maximum(spread, 0.01 * spread.median(1, keepdim=True).values).clamp_min(1e-6))

    def _first_batches(self, rows: int) -> Iterator[dict[str, Any]]:
        """The first rows as they lie in the data set, the same in all processes and however often it is asked."""
        data: Any = self.eval_dataset if self.train_dataset is None else self.train_dataset
        if data is None:
            raise ValueError("there is no train_dataset, on which the teacher's standard deviations are measured")
        size = self.args.train_batch_size
        items = (data[i] for i in range(len(data))) if hasattr(data, "__len__") else iter(data)
        items = islice(items, rows)
        collate = self._get_collator_with_removed_columns(self.data_collator)
        while part := list(islice(items, size)):
            yield _without_labels(self._prepare_inputs(collate(part)))

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ``Trainer.evaluate``; see the class for what it gives."""
        self._measure_scales()
        return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the place of logits, what ``evaluation_loop`` makes the metrics of: ``[rows, layers + 2]``."""
        with torch.no_grad():
            return None, self._compare(model, self._prepare_inputs(inputs))[0], None

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output: Any = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        parts = _parts(torch.as_tensor(output.predictions).double())
        values = {"loss": self._weighted(parts), "hidden": parts[:-1].mean(), "cosine": 1 - parts[-1]}
        output.metrics.update({f"{metric_key_prefix}_{name}": float(value) for name, value in values.items()})
        return output


def _parts(rows: Tensor) -> Tensor:
    """``[rows, layers + 2] -> [layers + 1]``: the mean error after each layer, and 1 - cosine."""
    return torch.cat([rows[:, :-2].sum(0) / rows[:, -2].sum(), 1 - rows[:, -1:].mean(0)])


def _without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in ("labels", "label", "label_ids")}


def _visible(inputs: Mapping[str, Any]) -> Tensor:
    """``[rows, tokens]``, 1 where there is no padding. Multiplied by, not indexed with: that would wait for the GPU."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.float32) if mask is None else mask.float()


def _pooled(hidden: Tensor, visible: Tensor) -> Tensor:
    """``[rows, tokens, H] -> [rows, H]``."""
    return (hidden.float() * visible.unsqueeze(-1)).sum(1) / visible.sum(1, keepdim=True).clamp_min(1)


def _unprepare(model: Any) -> None:
    """Takes away what accelerate leaves on a model: its autocast around ``forward``, and a mark that it is prepared."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(name, None)


def shares_parameters(student: nn.Module, teacher: nn.Module) -> bool:
    storages = {p.untyped_storage().data_ptr() for p in student.parameters() if p.numel()}
    return any(p.untyped_storage().data_ptr() in storages for p in teacher.parameters() if p.numel())


def _own_parameters(model: nn.Module) -> None:
    """Gives a model parameters that it shares with no other; those that are tied in it stay tied."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, new.setdefault(id(p), nn.Parameter(p.detach().clone(), p.requires_grad)))


def _check_pair(student: Any, teacher: Any) -> None:
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        has, wants = getattr(student.config, name), getattr(teacher.config, name)
        if has != wants:
            raise ValueError(f"{name} differs: {has} in the student, {wants} in the teacher")
    if shares_parameters(student, teacher):
        raise ValueError(
            "student and teacher share parameters, as a converted model does with its source: the teacher would move with "
            "the student, and the loss would fall falsely. Give teacher=copy.deepcopy(teacher)"
        )


def _check_rows(name: str, data: Any, least: int) -> None:
    if data is None or not hasattr(data, "__len__") or isinstance(data, Mapping):
        return
    if not len(data):
        raise ValueError(f"{name} is empty")
    if len(data) < least:
        raise ValueError(f"{name} has {len(data)} rows, fewer than one batch, which has {least}")


class _ByLength(Sampler[int]):
    """Rows of similar length together, in an order that depends on seed and epoch alone: so resuming finds it again."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class TokenisedTexts(Dataset[dict[str, list[int]]]):
    """Texts as rows of ids, not padded; held as int32, since lists of integers are ten times as large.

    Args:
        max_length: longer texts are cut.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, max_length: int) -> None:
        self.lengths: list[int] = []
        columns: dict[str, list[Tensor]] = {}
        for start in range(0, len(texts), 1024):
            encoded = tokenizer(list(texts[start : start + 1024]), truncation=True, max_length=max_length)
            self.lengths += [len(row) for row in encoded["input_ids"]]
            for name, rows in encoded.items():
                flat = [value for row in rows for value in row]
                columns.setdefault(name, []).append(torch.tensor(flat, dtype=torch.int32))
        self._columns = {name: torch.cat(parts) for name, parts in columns.items()}
        self._ends = torch.tensor(self.lengths, dtype=torch.int64).cumsum(0).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        end = self._ends[index]
        return {name: flat[end - self.lengths[index] : end].tolist() for name, flat in self._columns.items()}


@dataclass
class DistillationReport:
    """What was done, and the mean cosine of the embeddings to the teacher's on held-out texts, before and after."""

    rows: int
    held_out: int
    steps: int
    seconds: float
    cosine_before: float
    cosine: float
    loss: float


def distil_texts(
    student: Any,
    teacher: Any,
    texts: Sequence[str],
    tokenizer: Any,
    args: DistillationArguments,
    *,
    max_length: int = 128,
    held_out: float = 0.02,
    resume_from_checkpoint: str | None = None,
) -> Any:
    """Trains ``student`` in place and returns it, in evaluation mode; ``student.distillation_report`` says what was reached.

    Args:
        teacher: not changed. Where the student shares parameters with it, as a converted model does with its source, the
            student gets its own.
        texts: unlabelled; shuffled by ``args.seed``, and no more of them are taken than ``args.max_steps`` needs.
        max_length: longer texts are cut, and so are those that are longer than the model takes.
        held_out: share of the texts to evaluate on, at least one of them.
        resume_from_checkpoint: a checkpoint of the same student, texts and args.

    Raises:
        ValueError: too little text; as ``DistillationTrainer``.
        FloatingPointError: as ``DistillationTrainer``.
    """
    train, test = _split(texts, args, held_out)
    max_length = _length(max_length, student)
    if shares_parameters(student, teacher):
        _own_parameters(student)
    start = time.monotonic()
    trainer = DistillationTrainer(
        student,
        args,
        teacher=teacher,
        train_dataset=TokenisedTexts(train, tokenizer, max_length),
        eval_dataset=TokenisedTexts(test, tokenizer, max_length),
        processing_class=tokenizer,
    )
    try:
        before = trainer.evaluate()
        done = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        after = trainer.evaluate()
    finally:
        _unprepare(student.base_model)
    student.distillation_report = DistillationReport(
        rows=len(train),
        held_out=len(test),
        steps=done.global_step,
        seconds=time.monotonic() - start,
        cosine_before=before["eval_cosine"],
        cosine=after["eval_cosine"],
        loss=after["eval_loss"],
    )
    return student.eval()


def _split(texts: Sequence[str], args: DistillationArguments, held_out: float) -> tuple[list[str], list[str]]:
    """What to train on, and what to evaluate on."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out!r} must lie between 0 and 1")
    chosen = shuffled([t for t in texts if t.strip()], args.seed)
    if not chosen:
        raise ValueError("there is no text to distil on")
    test_rows = min(max(1, int(held_out * len(chosen))), _HELD_OUT_ROWS)
    train, test = chosen[test_rows:], chosen[:test_rows]
    batch = args.train_batch_size * args.world_size
    _check_rows("the text to train on", train, batch)
    if args.max_steps > 0:
        train = train[: args.max_steps * batch * args.gradient_accumulation_steps]
    return train, test


def _length(max_length: int, model: Any) -> int:
    if max_length < 1:
        raise ValueError(f"max_length={max_length!r} must be at least 1")
    return min(max_length, getattr(model.config, "max_position_embeddings", max_length))


def distil_folder(
    source: ModelFolder,
    output: Path,
    config: str,
    texts: Sequence[str],
    args: DistillationArguments,
    *,
    calibration: Calibration,
    max_length: int = 128,
    held_out: float = 0.02,
    resume: bool = True,
    overwrite: bool = False,
) -> Any:
    """Converts a model folder, calibrates, distils, and writes another folder, which appears whole or not at all.

    ``args.output_dir`` is the work folder: it holds the calibrated start and the checkpoints, stays where it is when the
    training is interrupted, and is removed in the end. With ``resume``, one that is there already is continued.

    Returns:
        The model, with its ``distillation_report``.

    Raises:
        ValueError: as ``convert_ffn_to_fff`` and ``distil_texts``; the work folder was made with other options, or is none.
        FileExistsError: the output exists and is not empty, and ``overwrite`` is not set.
    """
    work = Path(str(args.output_dir))
    check_places(source, output)
    check_places(source, work)
    check_output(output, overwrite=overwrite)
    if work.resolve() == output.resolve() or output.resolve() in work.resolve().parents:
        raise ValueError(f"the work folder {work} is or lies in the output {output}, which is replaced in the end")
    if work.resolve() in output.resolve().parents:
        raise ValueError(f"the output {output} lies in the work folder {work}, which is removed in the end")
    options = {
        "source": str(source.root.resolve()),
        "fff": config,
        "texts": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "calibration": {"budget": calibration.budget, "steps": calibration.steps},
        "max_length": max_length,
        "held_out": held_out,
        "steps": args.max_steps,
        "batch_size": args.per_device_train_batch_size,
        "learning_rate": args.learning_rate,
        "fff_learning_rate": args.fff_learning_rate,
        "seed": args.seed,
        "bf16": args.bf16,
    }
    started = _check_work(work, options, resume=resume)
    dense = source.load_dense()
    tokenizer = AutoTokenizer.from_pretrained(source.transformer)
    if not started:
        _split(texts, args, held_out)  # too little text is told now, not after the calibration
        length = _length(max_length, dense)
        plan = replace(calibration, data=texts, tokenizer=tokenizer, max_length=length)
        with atomic_folder(work, overwrite=True) as new:
            convert_ffn_to_fff(dense, config, calibration=plan, seed=args.seed).save_pretrained(new / _START)
            (new / _OPTIONS).write_text(json.dumps(options, indent=2), encoding="utf-8")
    # Loaded even if it was just made: so what is interrupted and what is not start alike.
    student: Any = FAST_CLASSES[type(dense)].from_pretrained(work / _START)
    dtype = student.dtype
    distil_texts(
        student.float(),  # small steps vanish in half precision
        dense.float(),
        texts,
        tokenizer,
        args,
        max_length=max_length,
        held_out=held_out,
        resume_from_checkpoint=_last_checkpoint(work),
    )
    write_folder(source, output, lambda: student.to(dtype), overwrite=overwrite)
    shutil.rmtree(work)
    return student


def _check_work(work: Path, options: dict[str, Any], *, resume: bool) -> bool:
    """Whether there is something to continue."""
    if work.exists() and not work.is_dir():
        raise ValueError(f"the work folder {work} is a file")
    if not work.is_dir() or not any(work.iterdir()):
        return False
    try:
        made_with = json.loads((work / _OPTIONS).read_text(encoding="utf-8"))
        if not isinstance(made_with, dict) or not (work / _START / "config.json").is_file():
            raise ValueError
    except (OSError, ValueError) as error:
        raise ValueError(f"{work} is no work folder of a distillation, and is left as it is: give another") from error
    if not resume:
        return False
    differing = [k for k in options if made_with.get(k) != options[k]]
    if differing:
        told = ", ".join(f"{k}: {made_with.get(k)!r} there, {options[k]!r} now" for k in differing)
        raise ValueError(f"the work folder {work} was made with other options ({told}); --no-resume starts anew")
    return True


def _last_checkpoint(work: Path) -> str | None:
    """The last one that is complete: the state is what the Trainer writes last."""
    found = {int(p.parent.name.split("-")[1]): p.parent for p in work.glob("checkpoint-*/trainer_state.json")}
    return str(found[max(found)]) if found else None
