"""Model cards: what a folder says of its model, and nothing else. What is written by hand stays."""

import html
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml
from safetensors import safe_open

from ..config import FFFConfig
from ..files import atomic_files
from ..surgery.record import read_record
from .contents import CARD, Contents, look_through
from .results import BENCHMARKS, RESULTS, Results, benchmark_files, compared, hub_data, is_benchmark, keep_results

NOT_MEASURED = "not measured"
_MARK = re.compile(r"<!-- hf_fff:(begin|end) ([a-z]+) -->")
_BLOCK = re.compile(r"<!-- hf_fff:begin ([a-z]+) -->\n.*?<!-- hf_fff:end \1 -->", re.DOTALL)
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_CONFLICT = re.compile(r"^(<{7}|={7}$|>{7})", re.MULTILINE)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class Kind(NamedTuple):
    """A kind of card."""

    template: str
    pipeline_tag: str
    library: str = "transformers"


EMBEDDER = Kind("embedder", "sentence-similarity", "sentence-transformers")
RERANKER = Kind("classifier", "text-ranking", "sentence-transformers")
KINDS = {
    "Model": Kind("encoder", "feature-extraction"),
    "ForSequenceClassification": Kind("classifier", "text-classification"),
    "ForTokenClassification": Kind("tagger", "token-classification"),
    "ForQuestionAnswering": Kind("qa", "question-answering"),
    "ForMaskedLM": Kind("masked-lm", "fill-mask"),
}


@dataclass(frozen=True)
class Card:
    """A card, as it is to be written, its metadata, and the files of results that the Hub reads (names -> text)."""

    text: str
    metadata: dict[str, Any]
    benchmarks: dict[str, str]


def make_card(
    contents: Contents,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    results: Results | None = None,
) -> Card:
    """The card of a model's folder: the one that lies there with its marked blocks and our metadata renewed, or a new one.

    Args:
        repo_id: what the snippets load; the name that the card has already, or the folder's, by default.
        base_model: ``OWNER/NAME`` of the dense model; as recorded by default.
        licence: an identifier of the Hub, such as ``apache-2.0``; the base model's by default.
        results: measurements; those that lie in the folder by default.

    Raises:
        ValueError: a kind of model that has no card; a licence that is not known, or not the base model's; a card with broken
            metadata or marks, or with the marks of a merge conflict.
    """
    root = contents.folder.root
    old = _read(root / CARD)
    front, body = _split(old, root / CARD)
    record = read_record(root)
    weights = contents.folder.weights_digest()
    results = results or keep_results(root, [], weights, write=False)
    kind = kind_of(contents)
    if base_model is None:
        before = front.get("base_model")
        known = contents.delta_base or (record.get("base") or {}).get("name")
        base_model = known or (before if isinstance(before, str) else None)
    if base_model is not None and not _REPO.fullmatch(base_model):
        raise ValueError(f"base_model={base_model!r} is no name of a model of the Hub (allowed: OWNER/NAME)")
    licences = _licence(record, front, licence)
    repo_id = repo_id or _loaded_by(body) or root.resolve().name
    facts = _facts(contents, kind, repo_id, base_model, record, weights, results)
    rendered = _environment().get_template(f"{kind.template}.md").render(facts)
    metadata = _metadata(front, kind, base_model, licences, results, repo_id)
    head = old[: len(old) - len(body)]
    if metadata != front or not head:
        head = f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"
    text = head + (_merged(body, rendered) if body.strip() else f"\n{rendered.strip()}\n")
    _validate(metadata)
    return Card(text, metadata, benchmark_files(results, repo_id))


def write_card(root: Path, files: Iterable[Path] = (), **options: Any) -> Card:
    """``make_card``, written into the folder, where ``files`` of results are kept, too. All is checked before anything is written."""
    contents = look_through(root)
    weights, files = contents.folder.weights_digest(), list(files)
    card = make_card(contents, results=keep_results(root, files, weights, write=False), **options)
    keep_results(root, files, weights, write=True)
    for name in [name for name in contents.files if is_benchmark(name) and name not in card.benchmarks]:
        (root / name).unlink()
    with atomic_files(root / BENCHMARKS) if card.benchmarks else nullcontext(root) as work:
        for name, text in card.benchmarks.items():
            (work / Path(name).name).write_text(text, encoding="utf-8")
    with atomic_files(root) as work:
        (work / CARD).write_text(card.text, encoding="utf-8")
    return card


def kind_of(contents: Contents) -> Kind:
    name = str((contents.config.get("architectures") or [""])[0])
    head = re.search(r"(For[A-Z]\w*|Model)$", name)
    modules = (contents.folder.root / "modules.json").is_file()
    if modules and head and head[0] == "Model":
        return EMBEDDER
    if head is None or head[0] not in KINDS:
        known = ", ".join(f"...{suffix}" for suffix in KINDS)
        raise ValueError(f"there is no card for the architecture {name!r} (there are cards for {known})")
    scores = head[0] == "ForSequenceClassification" and len(contents.config.get("id2label") or ()) == 1
    if scores and (modules or "sentence_transformers" in contents.config):  # as CrossEncoder saves it
        return RERANKER
    return KINDS[head[0]]


# What is there already


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8") from error


def _split(text: str, path: Path) -> tuple[dict[str, Any], str]:
    """Metadata and what follows."""
    if _CONFLICT.search(text):
        raise ValueError(f"{path} has the marks of a merge conflict in it: resolve it first")
    _check_marks(text, path)
    if not (match := _FRONT.match(text)):
        if text.startswith("---"):
            raise ValueError(f"the metadata of {path} has no end: a line of three dashes")
        return {}, text
    try:
        front = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"the metadata of {path} is no YAML: {told}") from error
    if not isinstance(front, dict):
        raise ValueError(f"the metadata of {path} must be a mapping")
    return front, text[match.end() :]


def _check_marks(text: str, path: Path) -> None:
    opened, seen = None, set()
    for what, name in _MARK.findall(text):
        if (
            (what == "begin") != (opened is None)
            or (what == "end" and name != opened)
            or (what == "begin" and name in seen)
        ):
            raise ValueError(f"the marks of {path} are broken at hf_fff:{what} {name}: each block begins and ends once")
        seen.add(name)
        opened = name if what == "begin" else None
    if opened:
        raise ValueError(f"the marks of {path} are broken: hf_fff:begin {opened} has no end")


def _loaded_by(body: str) -> str | None:
    found = re.search(r"(?:from_pretrained|SentenceTransformer|CrossEncoder)\((\"(?:[^\"\\]|\\.)*\")", body)
    return str(json.loads(found[1])) if found and "hf_fff:begin use" in body else None


def _merged(body: str, rendered: str) -> str:
    """``body`` with its blocks renewed; those that it lacks follow in the end."""
    new = {match[1]: match[0] for match in _BLOCK.finditer(rendered)}
    had = {match[1] for match in _BLOCK.finditer(body)}
    body = _BLOCK.sub(lambda match: new.get(match[1], match[0]), body)
    rest = [block for name, block in new.items() if name not in had]
    return "\n\n".join([body.rstrip("\n"), *rest]) + "\n" if rest else body


# Metadata


def _licence(record: Mapping[str, Any], front: Mapping[str, Any], given: str | None) -> dict[str, str]:
    of_base = dict((record.get("base") or {}).get("licence") or {})
    written = {name: str(front[name]) for name in ("license", "license_name", "license_link") if name in front}
    if given and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", given):
        raise ValueError(
            f"license={given!r} is no identifier of a licence of the Hub, such as apache-2.0, mit or other"
        )
    asked = {"license": given} if given and given != written.get("license") else written
    if "license" in of_base and asked.get("license", of_base["license"]) != of_base["license"]:
        raise ValueError(
            f"the licence {asked['license']!r} is not the base model's, which is {of_base['license']!r}: what is made from a model "
            "stays under its licence"
        )
    found = of_base if "license" in of_base else asked
    if "license" not in found:
        raise ValueError("the licence of the base model is not known: look it up there, and give it with --license")
    return found


def _metadata(
    front: Mapping[str, Any],
    kind: Kind,
    base_model: str | None,
    licences: Mapping[str, str],
    results: Results,
    repo_id: str,
) -> dict[str, Any]:
    tags = front.get("tags") or []
    own = ["hf_fff", "fast-feedforward-network", *({kind.library} - {"transformers"})]
    made: dict[str, Any] = {
        **licences,
        "library_name": kind.library,
        "pipeline_tag": kind.pipeline_tag,
        "tags": [*tags, *(tag for tag in own if tag not in tags)],
    }
    if base_model:
        made |= {"base_model": base_model, "base_model_relation": "finetune"}
    others = {name: value for name, value in front.items() if name not in made and name != "model-index"}
    index = _model_index(kind, results, repo_id.split("/")[-1])
    return {**made, **others, **({"model-index": index} if index else {})}


def _model_index(kind: Kind, results: Results, name: str) -> list[dict[str, Any]]:
    found = []
    for evaluation in results.evaluations:
        data = ", ".join(evaluation["data"]["sources"])
        known = hub_data(evaluation)
        metrics = [
            {"type": metric, "name": metric, "value": value}
            for metric, value in evaluation["model"]["metrics"].items()
            if isinstance(value, (int, float))
        ]
        about = {"name": data, "type": re.sub(r"[^\w./-]+", "-", data)}
        if known:
            about |= {"type": known.name, **({"config": known.config} if known.config else {}), "split": known.split}
        found.append(
            {"task": {"type": kind.pipeline_tag, "name": evaluation["task"]}, "dataset": about, "metrics": metrics}
        )
    return [{"name": name, "results": found}] if found else []


def _validate(metadata: Mapping[str, Any]) -> None:
    """As huggingface_hub does without a network: it must be able to read what was made."""
    from huggingface_hub import ModelCardData

    try:
        ModelCardData(**json.loads(json.dumps(metadata, default=str)), ignore_metadata_errors=False)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the metadata of the card is not valid: {error}") from error


# What is said


class _Safe(str):
    """Text that is to be written as it is."""


def _escaped(value: Any) -> str:
    """One line of plain text, whatever it says: no Markdown, no HTML, no marks of ours."""
    if isinstance(value, _Safe):
        return value
    line = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", line)


def _environment() -> Any:
    try:
        jinja2 = import_module("jinja2")
    except ImportError as error:
        raise ValueError("cards need jinja2, which is not installed: pip install hf-fff[hub]") from error
    inside = Path(__file__).parent.parent / "_cards"
    cards = inside if inside.is_dir() else Path(__file__).parents[2] / "hub_cards"
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(cards),
        finalize=_escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[[Any], Any]] = {
        "python": lambda value: _Safe(json.dumps(str(value), ensure_ascii=False)),
        "safe": _Safe,
        "url": lambda value: _Safe(quote(str(value))),
        "number": lambda value: NOT_MEASURED if value is None else f"{value:.4f}",
        "seconds": lambda value: f"{value:.0f} s",
        "range": _range,
    }
    made.filters.update(filters)
    return made


def _range(values: Iterable[float]) -> str:
    numbers = list(values)
    return f"{min(numbers):.3f} to {max(numbers):.3f}" if numbers else NOT_MEASURED


def _facts(
    contents: Contents,
    kind: Kind,
    repo_id: str,
    base_model: str | None,
    record: Mapping[str, Any],
    weights: str,
    results: Results,
) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(contents.folder.transformer)
    count, dtypes = _parameters(contents)
    return {
        "title": repo_id.split("/")[-1],
        "repo_id": repo_id,
        "base_model": base_model,
        "reranker": kind is RERANKER,
        "labels": config.num_labels,
        "layers": _layers(config.fff_layers),
        "dense_width": getattr(config, "intermediate_size", None),
        "parameters": f"{count / 1e6:.1f} million" if count >= 1e5 else count,
        "dtypes": dtypes,
        "weights": weights,
        "code": ", ".join(name for name in contents.files if name.endswith(".py")),
        "auto": _auto_class(contents),
        "delta": contents.delta_base,
        "recorded": bool(record),
        "calibration": record.get("calibration"),
        "distillation": record.get("distillation"),
        "training": record.get("training"),
        "recipe": record.get("recipe"),
        "data": _data(record.get("recipe") or {}),
        "made_with": record.get("hf_fff"),
        "evaluations": [_evaluation(one, results.controls) for one in results.evaluations],
        "timings": [_timing(one, weights, results) for one in results.timings],
        "usage": _usage(results.evaluations),
        "results_folder": _Safe(RESULTS),
    }


def _auto_class(contents: Contents) -> str:
    head = re.search(r"For[A-Z]\w*$", str((contents.config.get("architectures") or [""])[0]))
    return f"AutoModel{head[0]}" if head else "AutoModel"


def _data(recipe: Mapping[str, Any]) -> dict[str, str] | None:
    """What tells the data of a training from others."""
    found = [(what, recipe[field]) for field, what in (("texts", "texts"), ("rows", "rows")) if recipe.get(field)]
    return {"what": found[0][0], "sha256": str(found[0][1])} if found else None


def _layers(layers: Mapping[int, FFFConfig]) -> list[dict[str, Any]]:
    """Neighbours that are alike in one row."""
    rows: list[dict[str, Any]] = []
    for index, config in layers.items():
        if rows and rows[-1]["config"] == config and rows[-1]["last"] == index - 1:
            rows[-1]["last"] = index
        else:
            rows.append({"first": index, "last": index, "config": config})
    return [
        {
            "layers": str(row["first"]) if row["first"] == row["last"] else f"{row['first']} to {row['last']}",
            "fff": row["config"].shorthand,
            "used": row["config"].active_nodes,
            "of": row["config"].nodes,
        }
        for row in rows
    ]


def _parameters(contents: Contents) -> tuple[int, str]:
    count, dtypes = 0, set()
    for name in contents.weights:
        with safe_open(contents.files[name], framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                size = 1
                for length in part.get_shape():
                    size *= length
                count += size
                dtypes.add(str(part.get_dtype()))
    return count, ", ".join(sorted(dtypes))


def _evaluation(result: Mapping[str, Any], controls: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The model, the dense one, and both controls: what was not measured stands there as such."""
    columns = [{"name": f"this model ({result['model']['fff']})", "metrics": result["model"]["metrics"]}]
    columns.append({"name": "the dense model", "metrics": (result.get("teacher") or {}).get("metrics", {})})
    others = [control["model"] for control in controls if compared(control, result)]
    none: Any = result.get("none") or next((other for other in others if other["fff"] == "none"), {})
    columns.append({"name": "no FFN at all", "metrics": none.get("metrics", {})})
    small = [other for other in others if other["fff"] != "none"] or [{"fff": "a small dense FFN", "metrics": {}}]
    columns += [{"name": other["fff"], "metrics": other["metrics"]} for other in small]
    return {
        "task": result["task"],
        "data": ", ".join(result["data"]["sources"]),
        "rows": result["rows"],
        "columns": columns,
        "metrics": list(result["model"]["metrics"]),
    }


def _timing(result: Mapping[str, Any], weights: str, results: Results) -> dict[str, Any]:
    dense = {(r.get("teacher") or {}).get("weights") for r in results.evaluations}
    names, models = [], result["models"]
    for about in models.values():
        known = "this model" if about["weights"] == weights else "the dense model" if about["weights"] in dense else ""
        names.append(f"{known} ({about['fff']})" if known == "this model" else known or about["fff"])
    first = next(iter(models))
    rows = []
    for row in result["rows"]:
        micro = row["microseconds"]
        cells = [
            f"{micro[name]:.3g}" + ("" if name == first else f" ({micro[first] / micro[name]:.2f}x)") for name in models
        ]
        rows.append({"workload": row["workload"], "cells": cells})
    facts = ("cpu", "device", "threads", "isa", "backend", "torch", "hf_fff")
    machine = ", ".join(f"{name} {result[name]}" for name in facts if name in result)
    return {"machine": machine, "names": names, "rows": rows}


def _usage(evaluations: Iterable[Mapping[str, Any]]) -> str:
    parts = []
    for result in evaluations:
        dead = [values["dead"] for values in (result.get("usage") or {}).values()]
        if dead:
            parts.append(f"{min(dead):.1%} to {max(dead):.1%} in a layer ({', '.join(result['data']['sources'])})")
    return "; ".join(parts)
