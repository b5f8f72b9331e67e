"""``hf-fff eval``."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Json,
    LabelColumn,
    OnDevice,
    Seed,
    TextColumns,
    app,
    bad_option,
    check_device,
    columns_of,
    out,
    read_data,
    reports_errors,
    table_of,
    working,
)

if TYPE_CHECKING:
    from ..tasks import Task


@app.command("eval")
@reports_errors
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model, or a repository of the Hub.")],
    task: Annotated[str, typer.Option(help="classification, regression, tokens, qa, mlm, similarity or embeddings.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Rows: .tsv, .csv, .jsonl, .json, .txt, .parquet, or NAME[:CONFIG]:SPLIT of the Hub; may be repeated."
        ),
    ],
    teacher: Annotated[str | None, typer.Option(help="The dense model: how far MODEL agrees with it.")] = None,
    none: Annotated[
        str | None, typer.Option(help="The same without FFNs: which share of the gap to the teacher MODEL recovers.")
    ] = None,
    text_columns: TextColumns = None,
    label_column: LabelColumn = None,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens at which a row is cut; at least 32 for qa.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are computed at once.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to use at most, the first ones.")] = None,
    device: OnDevice = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure how good a model is at a task, and how close it is to its teacher."""
    if none is not None and teacher is None:
        raise bad_option("--none", ValueError("what is recovered is told against a --teacher, which is missing"))
    if seed < 0:
        raise bad_option("--seed", ValueError(f"{seed} must be at least 0"))

    import torch

    from ..models.usage import fff_usage
    from ..surgery.folder import ModelFolder
    from ..tasks import evaluate as measure
    from ..tasks import get_task
    from ..tasks.evaluate import batches, check_teacher
    from ..training.work import digest

    try:
        kind = get_task(task)
    except ValueError as error:
        raise bad_option("--task", error) from error
    if task == "embeddings" and teacher is None:
        raise bad_option("--task", ValueError("embeddings are measured against a --teacher, which is missing"))
    if max_length < kind.least_length:
        raise bad_option("--max-length", ValueError(f"{max_length} must be at least {kind.least_length} for {task}"))
    check_device("--device", device)
    rows = read_data("--data", data)

    place = device.value if device else "cuda" if torch.cuda.is_available() else "cpu"
    sources = {role: s for role, s in (("model", model), ("teacher", teacher), ("none", none)) if s is not None}
    with working():
        loaded = {role: _load(source, kind, place) for role, source in sources.items()}
        student, tokenizer = loaded["model"]
        for role, (other, its_tokenizer) in loaded.items():
            check_teacher(student, other, kind, role)
            if its_tokenizer.get_vocab() != tokenizer.get_vocab():
                raise ValueError(f"{model} and {sources[role]} have different tokenizers: they cannot be compared")
        encoded = kind.encode(
            rows[:limit],
            tokenizer,
            student.config,
            max_length=max_length,
            columns=columns_of(text_columns, label_column),
            seed=seed,
        )
        dense = loaded["teacher"][0] if teacher is not None else None
        scores = {
            role: measure(m, kind, encoded, tokenizer, teacher=dense, batch_size=batch_size, progress=not as_json)
            for role, (m, _) in loaded.items()
        }
        identities = {role: ModelFolder.find(source).identity() for role, source in sources.items()}
        usage = fff_usage(student, (batch for _, batch in batches(encoded, kind.collator(tokenizer), batch_size)))
    result = {
        "task": task,
        "data": {"sources": data, "sha256": digest(map(repr, rows[:limit])), "max_length": max_length},
        "rows": len(encoded.rows),
        "items": len(encoded),  # texts of embedders, windows of long contexts
        **{role: {"source": source, **identities[role], "metrics": scores[role]} for role, source in sources.items()},
        "recovered": _recovered(scores, kind) if none is not None else None,
        "usage": {str(i): values for i, values in usage.items()},
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _show(result, scores)


def _load(source: str, task: "Task", device: str) -> tuple[Any, Any]:
    """A model with the task's head, dense or converted, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from ..surgery.folder import ModelFolder

    folder = ModelFolder.find(source).transformer
    try:
        task.check_model(AutoConfig.from_pretrained(folder))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return task.auto_class.from_pretrained(folder).to(device).eval(), AutoTokenizer.from_pretrained(folder)


def _recovered(scores: dict[str, dict[str, float]], task: "Task") -> dict[str, Any]:
    """(x - none) / (teacher - none); the share is None where the teacher is no better than none: then there is no gap."""
    metric = next(name for name in (task.gap_metric, "agreement", "cosine") if name in scores["model"])
    x, teacher, none = (scores[role][metric] for role in ("model", "teacher", "none"))
    better = teacher < none if metric == "loss" else teacher > none
    return {"metric": metric, "share": (x - none) / (teacher - none) if better else None}


def _show(result: dict[str, Any], scores: dict[str, dict[str, float]]) -> None:
    title = f"{result['model']['source']}: {result['task']}, {result['rows']} rows"
    told = table_of("metric", *scores, title=title)
    for name in scores["model"]:
        told.add_row(name, *(f"{values[name]:.4f}" for values in scores.values()))
    out.print(told)
    if (recovered := result["recovered"]) is not None:
        share = recovered["share"]
        found = "not defined, for none is no worse than the teacher" if share is None else f"{share:.1%}"
        out.print(f"recovered of the gap in {recovered['metric']} between none and teacher: {found}")
    if result["usage"]:
        used = table_of(
            "layer", "depth", "nodes never visited", "entropy of the leaves, bits", title="Use of the trees"
        )
        for layer, values in result["usage"].items():
            used.add_row(layer, str(values["depth"]), f"{values['dead']:.1%}", f"{values['entropy']:.2f}")
        out.print(used)
