"""From a model's folder to another one: converted, calibrated, distilled. What is interrupted goes on where it stopped."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from ..config import LayersLike, as_config
from ..files import atomic_folder, check_output
from ..memory import memory_explained
from ..models import fast_class
from ..surgery import Calibration, convert_ffn_to_fff
from ..surgery.folder import ModelFolder, check_places, write_folder
from ..surgery.record import read_record, record_of, write_record
from ..surgery.text import shuffled
from ..tasks import Columns, evaluate, get_task
from .arguments import DistillationArguments, FastArguments
from .checkpoints import last_checkpoint
from .data import calibration_batches
from .distil import distil_task, distil_texts, length_for, mixed_rows, split_rows, split_texts
from .objectives import get_objective
from .processes import check_not_sharded, check_processes

OPTIONS, START = "options.json", "start"  # what lies in a work folder beside the checkpoints
_WEIGHTS = ("hidden_weight", "embedding_weight", "logits_weight", "label_weight", "temperature")


@dataclass(frozen=True)
class TaskRows:
    """What a task is distilled on.

    Args:
        task: a name of ``objectives.OBJECTIVES``.
        rows: labelled rows, as ``hf_fff.tasks.read_rows`` gives them.
        transfer: rows of the same form, whose labels, if there are any, are not looked at.
        columns: which columns of the rows to read; guessed where they are not given. Transfer rows that have not the text
            columns of the others have others that are guessed.
    """

    task: str
    rows: Sequence[dict[str, Any]]
    transfer: Sequence[dict[str, Any]] = ()
    columns: Columns | None = None


class _Plan(NamedTuple):
    """What data makes of a model: inputs to calibrate on, and the training."""

    inputs: Any
    distil: Callable[[Any, str | None], Any]  # of a student and a checkpoint


def distil_folder(
    source: ModelFolder,
    output: Path,
    config: LayersLike,
    data: Sequence[str] | TaskRows,
    args: DistillationArguments,
    *,
    calibration: Calibration,
    max_length: int = 128,
    held_out: float | None = None,
    start: Path | None = None,
    resume: bool = True,
    overwrite: bool = False,
) -> Any:
    """Converts a model folder, calibrates, distils, and writes another folder, which appears whole or not at all. All of it
    runs on the device of ``args``.

    ``args.output_dir`` is the work folder: it holds the calibrated start and the checkpoints, stays where it is when the
    training is interrupted, and is removed in the end. With ``resume``, one that is there already is continued. Under
    ``accelerate launch`` (DDP) all processes call this; the first one calibrates and writes.

    Args:
        data: texts for general distillation, or the rows of a task, of which the source is a finetuned model.
        calibration: how; its ``data`` is replaced by the texts, or by the inputs of the task as the model meets them.
        held_out: share of the texts or labelled rows to evaluate on; 0.02 of texts and 0.1 of rows by default.
        start: a folder of a model that was made from the source with ``config``: it is trained further, and not calibrated.

    Returns:
        The model, with its ``distillation_report``.

    Raises:
        ValueError: as ``convert_ffn_to_fff``, ``distil_texts`` and ``distil_task``; ``args.packed_rows`` and no trees in ``config``; the
            work folder was made with other options, or is none; as ``check_processes``, or it would run under FSDP or DeepSpeed.
        FileExistsError: the output exists and is not empty, and ``overwrite`` is not set.
        RuntimeError: out of memory.
    """
    check_processes(args)
    check_not_sharded(args)
    check_trees(args, config)
    first = args.process_index == 0
    work = Path(str(args.output_dir))
    check_folders(source, output, work, overwrite=overwrite)
    if held_out is None:
        held_out = 0.1 if isinstance(data, TaskRows) else 0.02
    options = {
        "source": str(source.root.resolve()),
        "fff": _named(config),
        **described(data),
        "calibration": {
            "budget": calibration.budget,
            "steps": calibration.steps,
            "max_tokens": calibration.max_tokens,
            "batch_tokens": calibration.batch_tokens,
        },
        "max_length": max_length,
        "held_out": held_out,
        "steps": args.max_steps,
        "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "fff_learning_rate": args.fff_learning_rate,
        "loss": {name: getattr(args, name) for name in _WEIGHTS},
        "crop": args.crop,
        "packed_rows": args.packed_rows,
        "muon": args.muon or None,  # as folders have it that know no Muon
        "seed": args.seed,
        "bf16": args.bf16,
        "start": str(start.resolve()) if start else None,
    }
    options = json.loads(json.dumps(options))  # as it is read again
    if first:  # before anything that takes time
        check_work(work, options, resume=resume)
    dense = source.load_dense().to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(source.transformer)
    max_length = length_for(max_length, dense)
    plan = (_plan_of_task if isinstance(data, TaskRows) else _plan_of_texts)(
        data, dense, tokenizer, args, max_length, held_out, calibration
    )
    with args.main_process_first(local=False):
        if not check_work(work, options, resume=resume or not first):
            if not first:
                raise RuntimeError("the first process, which begins, has failed")
            calibrated = replace(calibration, data=plan.inputs, tokenizer=tokenizer, max_length=max_length)
            with (
                atomic_folder(work, overwrite=True) as new,
                memory_explained("calibrating", "the calibration's max_tokens or the maximal length of the inputs"),
            ):
                if start:
                    begun: Any = fast_class(type(dense)).from_pretrained(ModelFolder.find(str(start)).transformer)
                else:
                    begun = convert_ffn_to_fff(dense, config, calibration=calibrated, seed=args.seed)
                begun.save_pretrained(new / START)
                before = read_record(ModelFolder.find(str(start)).root) if start else {}
                write_record(new / START, before or record_of(source, begun))
                (new / OPTIONS).write_text(json.dumps(options, indent=2), encoding="utf-8")
    # Loaded even if it was just made: so what is interrupted and what is not start alike.
    student: Any = fast_class(type(dense)).from_pretrained(work / START)
    dtype = student.dtype
    dense.float()
    checkpoint = last_checkpoint(work)
    plan.distil(student.float(), str(checkpoint) if checkpoint else None)  # small steps vanish in half precision
    how = {name: part for name, part in read_record(work / START).items() if name == "calibration"}
    how["recipe"] = {name: value for name, value in options.items() if name not in ("source", "start")}  # paths
    student.to(dtype)
    with args.main_process_first(local=False):
        if first:
            write_folder(source, output, lambda: student, overwrite=overwrite, how=how)
            shutil.rmtree(work)
    return student


def _plan_of_texts(
    texts: Any,
    dense: Any,
    tokenizer: Any,
    args: DistillationArguments,
    max_length: int,
    held_out: float,
    calibration: Calibration,
) -> _Plan:
    split_texts(texts, args, held_out)  # too little text is told now, not after the calibration
    inputs, _ = split_rows(
        [t for t in texts if t.strip()], args.seed, held_out
    )  # on what is held out it is not calibrated

    def distil(student: Any, checkpoint: str | None) -> Any:
        options: dict[str, Any] = {"max_length": max_length, "held_out": held_out}
        return distil_texts(student, dense, texts, tokenizer, args, resume_from_checkpoint=checkpoint, **options)

    return _Plan(inputs, distil)


def _plan_of_task(
    data: Any,
    dense: Any,
    tokenizer: Any,
    args: DistillationArguments,
    max_length: int,
    held_out: float,
    calibration: Calibration,
) -> _Plan:
    """All that is wrong with the data is told here."""
    get_objective(data.task)
    kind = get_task(data.task)
    kind.check_model(dense)
    most = mixed_rows(args)
    rows, test_rows = split_rows(data.rows, args.seed, held_out)

    def encode(rows: Sequence[Any], columns: Columns | None) -> Any:
        return kind.encode(rows, tokenizer, dense.config, max_length=max_length, columns=columns, seed=args.seed)

    test = encode(test_rows, data.columns)
    evaluate(dense, kind, encode(test_rows[:2], data.columns), tokenizer)  # a package that scoring wants may be missing
    transfer = shuffled(_transfer_rows(data), args.seed)
    if data.task == "mlm":  # where all rows are labelled alike
        rows, transfer = shuffled([*rows, *transfer], args.seed), []
    train = encode(rows[:most], data.columns)
    columns = Columns(text=tuple(transfer[0])) if transfer else None
    transferred = encode(transfer[:most], columns) if transfer else None
    inputs = calibration_batches(data.task, train, transferred, tokenizer, calibration.max_tokens)

    def distil(student: Any, checkpoint: str | None) -> Any:
        options = {"held_out": test, "transfer": transferred, "resume_from_checkpoint": checkpoint}
        return distil_task(student, dense, data.task, train, tokenizer, args, **options)

    return _Plan(inputs, distil)


def _transfer_rows(data: TaskRows) -> list[dict[str, Any]]:
    """The text columns of the transfer rows alone, under the names that they have in the others."""
    given = data.columns.text if data.columns else None
    given = (given,) if isinstance(given, str) else given
    known = [*([given] if given else []), *get_task(data.task).text_columns]

    def of(row: dict[str, Any]) -> tuple[str, ...]:
        return next((tuple(names) for names in known if {*names} <= {*row}), ())

    wanted, found = of(data.rows[0]), [of(row) for row in data.transfer]
    for number, names in enumerate(found, 1):
        if len(names) != len(wanted) or not names:
            has = list(data.transfer[number - 1])
            raise ValueError(
                f"transfer row {number} is not of the form of the labelled rows, whose texts are in {list(wanted)}: "
                f"its columns are {has}"
            )
    return [
        {name: row[other] for name, other in zip(wanted, names, strict=True)}
        for row, names in zip(data.transfer, found, strict=True)
    ]


def check_trees(args: FastArguments, config: LayersLike) -> None:
    """Raises ``ValueError`` where rows are to be rounded, and no layer has any."""
    by_layer = isinstance(config, Mapping) and all(isinstance(key, int) for key in config)
    layers: Any = config.values() if by_layer else [config]  # type: ignore[union-attr]
    if args.packed_rows is not None and not any(as_config(one).has_trees for one in layers):
        raise ValueError(f"packed_rows={args.packed_rows!r} is of trees, and there are none in the model")


def _named(config: LayersLike) -> Any:
    """A config, or those of layers, for the options."""
    if isinstance(config, Mapping) and all(isinstance(key, int) for key in config):
        return {str(i): as_config(one).to_dict() for i, one in config.items()}
    return config if isinstance(config, str) else as_config(config).to_dict()


def described(data: Sequence[str] | TaskRows) -> dict[str, Any]:
    """For the options of a work folder."""
    if not isinstance(data, TaskRows):
        return {"texts": digest(data)}
    columns = data.columns or Columns()
    text = [columns.text] if isinstance(columns.text, str) else list(columns.text or [])
    return {
        "task": data.task,
        "rows": digest(map(repr, data.rows)),
        "transfer": digest(map(repr, data.transfer)),
        "columns": {"text": text, "label": columns.label},
    }


def digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def check_folders(source: ModelFolder, output: Path, work: Path, *, overwrite: bool) -> None:
    """Raises ``ValueError`` or ``FileExistsError`` where source, output and work folder are in each other's way."""
    check_places(source, output)
    check_places(source, work)
    check_output(output, overwrite=overwrite)
    if work.resolve() == output.resolve() or output.resolve() in work.resolve().parents:
        raise ValueError(f"the work folder {work} is or lies in the output {output}, which is replaced in the end")
    if work.resolve() in output.resolve().parents:
        raise ValueError(f"the output {output} lies in the work folder {work}, which is removed in the end")


def check_work(work: Path, options: dict[str, Any], *, resume: bool, doing: str = "distillation") -> bool:
    """Whether there is something to continue.

    Raises:
        ValueError: the folder holds something else, or was made with other options.
    """
    if work.exists() and not work.is_dir():
        raise ValueError(f"the work folder {work} is a file")
    if not work.is_dir() or not any(work.iterdir()):
        return False
    try:
        made_with = json.loads((work / OPTIONS).read_text(encoding="utf-8"))
        if not isinstance(made_with, dict) or not (work / START / "config.json").is_file():
            raise ValueError
    except (OSError, ValueError) as error:
        raise ValueError(f"{work} is no work folder of a {doing}, and is left as it is: give another") from error
    if not resume:
        return False
    check_options(work, made_with, options)
    return True


def check_options(work: Path, made_with: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` where what a work folder was made with is not what is wanted now."""
    differing = [k for k in options if made_with.get(k) != options[k]]
    if differing:
        told = ", ".join(f"{k}: {made_with.get(k)!r} there, {options[k]!r} now" for k in differing)
        raise ValueError(f"the work folder {work} was made with other options ({told}); --no-resume starts anew")
