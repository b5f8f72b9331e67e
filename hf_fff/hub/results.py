"""Measurements that lie with a model: the JSON files of ``hf-fff eval`` and ``hf-fff bench model``, told apart by the digests of the
weights that they are of. No number in a card comes from anywhere else."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..files import atomic_files

RESULTS = "fff_results"
BENCHMARKS = ".eval_results"  # where the Hub looks for scores on its data sets
_DATA = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?:([\w\[\]%+-]+)")


@dataclass(frozen=True)
class Results:
    """Those of one model, and of what it is compared with."""

    evaluations: list[dict[str, Any]]
    controls: list[dict[str, Any]]
    timings: list[dict[str, Any]]


class HubData(NamedTuple):
    """A part of a data set of the Hub."""

    name: str
    config: str | None
    split: str


def hub_data(evaluation: Mapping[str, Any]) -> HubData | None:
    """What an evaluation was measured on, if that is one data set of the Hub, with an owner."""
    sources = evaluation["data"]["sources"]
    found = _DATA.fullmatch(sources[0]) if len(sources) == 1 else None
    return HubData(found[1], found[2], found[3]) if found else None


def is_benchmark(name: str) -> bool:
    """Whether a file of a folder is one of ``benchmark_files``."""
    return re.fullmatch(rf"{re.escape(BENCHMARKS)}/eval-[\w-]+\.yaml", name) is not None


def benchmark_files(results: Results, repo_id: str) -> dict[str, str]:
    """The main score of each evaluation on a data set of the Hub, as files for ``.eval_results``: names -> text."""
    from huggingface_hub import EvalResultEntry, constants, eval_result_entries_to_yaml

    from ..tasks import get_task

    files = {}
    for evaluation in results.evaluations:
        known, scores = hub_data(evaluation), evaluation["model"]["metrics"]
        metric = get_task(evaluation["task"]).main_metric
        if known is None or metric not in scores or evaluation["task"] == "embeddings":  # no score of the data set
            continue
        kept = _name(evaluation)
        where = f"{constants.ENDPOINT}/{repo_id}/blob/main/{RESULTS}/{kept}" if "/" in repo_id else None
        weights = evaluation["model"]["weights"]
        entry = EvalResultEntry(
            dataset_id=known.name,
            task_id=known.config or "default",
            value=scores[metric],
            source_url=where,
            source_name="hf-fff eval" if where else None,
            notes=f"{metric} on {evaluation['rows']} rows of {known.split}; weights {weights[:12]}; {RESULTS}/{kept}",
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        files[f"{BENCHMARKS}/{Path(kept).stem}.yaml"] = text
    return files


def add_results(root: Path, files: Iterable[Path], weights: str) -> Results:
    """Those that lie in ``root`` already, and ``files``; these are kept there, without paths of this machine.

    Raises:
        ValueError: a file that is no result, or one of other weights.
    """
    return keep_results(root, files, weights, write=True)


def keep_results(root: Path, files: Iterable[Path], weights: str, *, write: bool) -> Results:
    folder = root / RESULTS
    there = sorted(folder.glob("*.json")) if folder.is_dir() else []
    read = {path: _read(path) for path in [*there, *files]}
    found = _sort(read, weights)
    new = {_name(read[path]): read[path] for path in files}
    if new and write:
        with atomic_files(folder) as work:
            for name, result in new.items():
                (work / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file of results: {error}") from error
    if not isinstance(result, dict) or not ({"task", "model"} <= set(result) or "rows" in result):
        raise ValueError(f"{path} is no file that hf-fff eval --json or hf-fff bench model --json wrote")
    told = [*_roles(result).values(), *_timed(result).values()]
    if not told or not all(isinstance(one, Mapping) and {"weights", "fff"} <= set(one) for one in told):
        raise ValueError(f"{path} does not say which weights it is of: measure again with this version of hf_fff")
    return _without_paths(result)


def _roles(result: Mapping[str, Any]) -> dict[str, Any]:
    return {role: result[role] for role in ("model", "teacher", "none") if result.get(role)} if "task" in result else {}


def _timed(result: Mapping[str, Any]) -> dict[str, Any]:
    models = result.get("models")
    return dict(models) if isinstance(models, Mapping) and "task" not in result else {}


def _without_paths(result: dict[str, Any]) -> dict[str, Any]:
    kept = json.loads(json.dumps(result))
    for one in _roles(kept).values():
        one["source"] = _short(one.get("source", ""))
    if "data" in kept:
        kept["data"]["sources"] = [_short(source) for source in kept["data"]["sources"]]
    if models := _timed(kept):
        names = {
            name: _short(name) if len({_short(n) for n in models}) == len(models) else f"model {i}"
            for i, name in enumerate(models)
        }
        kept["models"] = {names[name]: about for name, about in models.items()}
        for row in kept["rows"]:
            for field in ("seconds", "microseconds", "ratios"):
                row[field] = {names[name]: value for name, value in row[field].items()}
    return kept


def _short(source: str) -> str:
    """The name of a file or folder, without where it lies; a repository or data set of the Hub stays as it is."""
    path = Path(source)
    return (
        path.name if path.is_absolute() or path.exists() or source.count("/") > 1 or source.startswith(".") else source
    )


def _name(result: Mapping[str, Any]) -> str:
    """One measured again takes the place of the old one."""
    roles, timed = _roles(result), _timed(result)
    if roles:
        key = [result["task"], result["data"]["sha256"], roles["model"]["weights"]]
        return f"eval-{result['task']}-{_digest(key)}.json"
    machine = [result.get(name) for name in ("cpu", "device", "threads")]
    key = [machine, sorted(about["weights"] for about in timed.values()), [row["workload"] for row in result["rows"]]]
    return f"bench-{_digest(key)}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _sort(read: Mapping[Path, dict[str, Any]], weights: str) -> Results:
    by_name = {_name(result): (path, result) for path, result in read.items()}
    evaluations = [r for _, r in by_name.values() if _roles(r) and r["model"]["weights"] == weights]
    timings = [r for _, r in by_name.values() if weights in [about["weights"] for about in _timed(r).values()]]
    controls = []
    for path, result in by_name.values():
        if result in evaluations or result in timings:
            continue
        if not _is_control(result, evaluations):
            of = ", ".join(str(one["weights"])[:12] for one in [*_roles(result).values(), *_timed(result).values()])
            raise ValueError(
                f"{path} is of other weights ({of}) than this model's ({weights[:12]}), and is no control (mlp:WIDTH or none) "
                "that was measured on the same data against the same dense model: measure again, or remove it"
            )
        controls.append(result)
    return Results(evaluations, controls, timings)


def compared(control: Mapping[str, Any], evaluation: Mapping[str, Any]) -> bool:
    """Whether both were measured on the same data, against the same dense model."""
    teachers = [_roles(r).get("teacher", {}).get("weights") for r in (control, evaluation)]
    return (
        all(control.get(name) == evaluation.get(name) for name in ("task", "rows"))
        and control["data"]["sha256"] == evaluation["data"]["sha256"]
        and control["data"]["max_length"] == evaluation["data"]["max_length"]
        and teachers[0] == teachers[1] is not None
    )


def _is_control(result: Mapping[str, Any], evaluations: list[dict[str, Any]]) -> bool:
    roles = _roles(result)
    kind = str(roles["model"]["fff"]) if roles else ""
    return (kind == "none" or kind.startswith("mlp:")) and any(compared(result, other) for other in evaluations)
