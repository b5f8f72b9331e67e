"""``hf-fff bench``."""

import csv
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD

from .common import Json, Seed, app, bad_option, err, out, read_text, reports_errors, table_of
from .export import Rows

bench_app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Tokens = Annotated[str, typer.Option(help="Token counts, comma-separated.")]
Threads = Annotated[
    str | None, typer.Option(help="Numbers of threads, comma-separated, such as 1,2; as torch has it by default.")
]
Rounds = Annotated[int, typer.Option(min=3, help="Turns that the candidates take.")]
Patience = Annotated[
    float,
    typer.Option(
        min=0, help="Seconds to spend, in all, on measuring again what was measured while the machine was busy."
    ),
]
Keep = Annotated[
    Path | None,
    typer.Option(
        help="File for finished cells, as they come: interrupted, the same command goes on from it. Removed at the end."
    ),
]
Csv = Annotated[Path | None, typer.Option("--csv", help="File of values to write, one line a time.")]
Plot = Annotated[Path | None, typer.Option(help="Picture to write, such as bench.png.")]


@bench_app.command("layer")
@reports_errors
def bench_layer(
    context: typer.Context,
    fff: Annotated[str, typer.Option(help="Trees x depth, comma-separated, such as 1x11,8x8.")] = "1x11",
    hidden_size: Annotated[int, typer.Option(min=1, help="Size of input and output.")] = 768,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or both, comma-separated.")] = "float32",
    tokens: Tokens = "1,8,128,512,4096",
    threads: Threads = None,
    against: Annotated[
        str, typer.Option(help="More dense layers to time, comma-separated: dense:3072 or, the same, mlp:72.")
    ] = "",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER[:LAYER]", help="Also a trained layer of a converted model; its sizes are taken for all."
        ),
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help="Texts, one a line, whose hidden states --weights gets.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="openvino",
            help="Instead: time what is --against as int8 inside OpenVINO, and trees with rows of float32, int8 and bf16 in loops of their own "
            "and inside OpenVINO; forward alone.",
        ),
    ] = None,
    backward: Annotated[bool, typer.Option(help="Time the backward passes too.")] = True,
    rounds: Rounds = 15,
    patience: Patience = 0,
    keep: Keep = None,
    csv_file: Csv = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Time FFF layers against torch's Linear-GELU-Linear of as many neurons, and against an FFF in plain PyTorch."""
    from ..config import FFFConfig

    try:
        configs = [FFFConfig.from_shorthand(shape) for shape in fff.split(",")]
        if other := [c.shorthand for c in configs if c.kind != "tree"]:
            raise ValueError(f"{other[0]} is no tree (--against takes dense layers)")
    except ValueError as error:
        raise bad_option("--fff", error) from error
    counts = _numbers("--tokens", tokens)
    thread_counts = _numbers("--threads", threads) if threads is not None else None
    widths = _widths(against)
    if (weights is None) != (inputs is None):
        raise bad_option("--inputs", ValueError("--weights and --inputs belong together"))
    dtypes = _dtypes(dtype)
    if engine is not None:
        from ..bench import frontier

        try:
            if why := frontier.missing(engine):
                raise ValueError(why)
            if list(dtypes) != ["float32"]:
                raise ValueError(f"takes layers of float32, which are then packed; --dtype is {dtype}")
        except ValueError as error:
            raise bad_option("--engine", error) from error
    _check_files(csv_file, plot, keep)

    from ..bench import layer
    from ..bench.load import Patience

    layers = []
    if weights is not None and inputs is not None:
        trained = layer.trained_layer(weights, read_text([inputs]))
        configs, hidden_size = [trained.fff.config], trained.fff.hidden_size
        layers = [layer.with_dtype(trained, of) for of in dtypes.values()]
    layers += [layer.random_layer(config, hidden_size, of) for config in configs for of in dtypes.values()]
    waiting, kept = Patience(patience), _kept(context, keep)
    options: dict[str, Any] = {"threads": thread_counts, "against": widths, "rounds": rounds}
    if engine is not None:
        found = frontier.bench_frontier(layers, counts, patience=waiting, kept=kept, **options)
        told = _told("frontier", waiting, {"versions": frontier.versions(engine), "rows": frontier.as_records(found)})
        _write(told, frontier.as_lines(found), csv_file, plot)
        if as_json:
            print(json.dumps(told, indent=1))
        else:
            _show_frontier(told)
        kept.done()
        return
    rows = layer.bench_layers(layers, counts, backward=backward, patience=waiting, kept=kept, **options)
    told = _told("layer", waiting, {"rows": layer.as_records(rows), "threads_faster": layer.thread_scaling(rows)})
    _write(told, layer.as_lines(rows), csv_file, plot)
    if as_json:
        print(json.dumps(told, indent=1))
        kept.done()
        return
    title = "{fff}, {nodes} neurons, hidden size {hidden_size}, {dtype}, threads {threads}, weights {weights}"
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in told["rows"]:
        groups.setdefault(title.format_map(row), []).append(row)
    for name, group in groups.items():
        out.print(_forward_table(name, group))
        if any(row["backward"] for row in group):
            out.print(_backward_table(group))
    if told["threads_faster"]:
        table = _table("layer", "tokens", "threads", "FFF", "dense", title="how many times as fast with more threads")
        for row in told["threads_faster"]:
            name = "{fff}, {dtype}, {weights}".format_map(row)
            table.add_row(name, str(row["tokens"]), row["threads"], *(f"{row[n]:.2f}x" for n in ("faster", "dense")))
        out.print(table)
    _caption(
        told, [f"A call from Python takes {overhead:.1f} µs more than the operation." for overhead in _overheads(told)]
    )
    kept.done()


def _show_frontier(told: Mapping[str, Any]) -> None:
    title = "{fff}, {nodes} neurons, hidden size {hidden_size}, threads {threads}, weights {weights}"
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in told["rows"]:
        groups.setdefault(title.format_map(row), []).append(row)
    for name, group in groups.items():
        for where, what in (("loop", "in a loop"), ("engine", "inside OpenVINO, MLPs in int8")):
            names = list(group[0][where])
            table = _table("tokens", *names, title=f"{name}, {what}: microseconds a call")
            for row in group:
                table.add_row(str(row["tokens"]), *(_number(row[where][n]) for n in names))
            if names:
                out.print(table)
    _caption(told, [])


def _overheads(told: Mapping[str, Any]) -> list[float]:
    """At the fewest tokens, where it is not drowned by what a call does."""
    rows = [row for row in told["rows"] if row["overhead"] is not None]
    return [min(rows, key=lambda row: row["tokens"])["overhead"]] if rows else []


def _forward_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    others = [name for name in rows[0]["forward"] if name not in ("fff", "dense", "torch")]
    names = ("tokens", "dense", *others, "torch FFF", "FFF(x)", "x", "dense, loop", "fff, loop", "x")
    table = _table(*names, title=f"{title}: microseconds a call")
    for row in rows:
        forward, loop = row["forward"], row["loop"]
        table.add_row(
            str(row["tokens"]),
            *(_number(forward[name]) for name in ("dense", *others, "torch", "fff")),
            _ratio(forward["dense"], forward["fff"]),
            *_triple(loop.get("dense"), loop.get("fff")),
        )
    return table


def _backward_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    names = ("tokens", "dense", "masked dense", "torch FFF", "fff", "x dense", "x masked", "+ routing", "x dense")
    table = _table(*names, title="backward, all gradients: microseconds a call")
    for row in rows:
        b = row["backward"]
        cells = (_number(b[name]) for name in ("dense", "masked", "torch", "fff"))
        ratios = (_ratio(b["dense"], b["fff"]), _ratio(b["masked"], b["fff"]))
        table.add_row(str(row["tokens"]), *cells, *ratios, _number(b["routing"]), _ratio(b["dense"], b["routing"]))
    return table


@bench_app.command("scaling")
@reports_errors
def bench_scaling(
    context: typer.Context,
    sizes: Annotated[
        str | None, typer.Option(help="Sizes, comma-separated, such as bert-base,gpt-3; all of them by default.")
    ] = None,
    tokens: Tokens = "1,8,128",
    threads: Threads = None,
    rounds: Rounds = 9,
    patience: Patience = 0,
    keep: Keep = None,
    csv_file: Csv = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Time one layer from BERT-tiny's size to GPT-3's: the dense FFN against the deepest tree with at most as many neurons."""
    counts = _numbers("--tokens", tokens)
    thread_counts = _numbers("--threads", threads) if threads is not None else None
    _check_files(csv_file, plot, keep)

    from ..bench import scaling
    from ..bench.load import Patience

    names = [name.strip() for name in sizes.split(",")] if sizes is not None else list(scaling.NAMES)
    try:
        for name in names:
            scaling.dimensions(name)
    except ValueError as error:
        raise bad_option("--sizes", error) from error
    waiting, kept = Patience(patience), _kept(context, keep)
    result = scaling.bench_scaling(names, counts, threads=thread_counts, rounds=rounds, patience=waiting, kept=kept)
    rows = [row.record() for row in result.rows]
    told = _told("scaling", waiting, {"rows": rows, "bandwidth": result.bandwidth, "skipped": result.skipped})
    _write(told, rows, csv_file, plot)
    if as_json:
        print(json.dumps(told, indent=1))
        kept.done()
        return
    table = _table("size", "dense", "tree", "threads", "tokens", "dense, µs", "FFF, µs", "x", "theory", "memory permits",
                   title="one layer, float32: how many times as fast as the dense one")  # fmt: skip
    for row in rows:
        table.add_row(
            row["name"],
            "{hidden_size}/{inner}".format_map(row),
            row["fff"],
            *(str(row[name]) for name in ("threads", "tokens")),
            *_triple(row["dense"], row["measured"]),
            *(f"{row[name]:.0f}x" for name in ("theory", "roofline")),
        )
    out.print(table)
    table = _table("MB", "threads", "GB/s", title="what torch reads, again and again (torch.sum or torch.mv)")
    for row in result.bandwidth:
        table.add_row(str(row["mb"]), str(row["threads"]), f"{row['gb_per_second']:.1f}")
    out.print(table)
    _caption(told, [f"{name} was skipped: {why}." for name, why in result.skipped.items()])
    kept.done()


@bench_app.command("model")
@reports_errors
def bench_model(
    context: typer.Context,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Model folders; ratios are to the first.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Instead of folders: a BERT of this size with random weights, such as bert-base, dense and with --fff."
        ),
    ] = None,
    fff: Annotated[
        str, typer.Option(help="With --size: what takes the place of the FFNs, comma-separated.")
    ] = "1x11,8x8,none",
    dtype: Annotated[str, typer.Option(help="With --size: float32, bfloat16 or both, comma-separated.")] = "float32",
    batch: Annotated[
        str, typer.Option(help="Rows x tokens, comma-separated; with --text, rows alone, such as 1,32.")
    ] = "1x16,1x128,8x128,32x128",
    text: Annotated[Path | None, typer.Option(help="Texts, one a line, whose real lengths are timed.")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens at which a text is cut.")] = 128,
    rounds: Rounds = 15,
    device: Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")] = "cpu",
    seed: Seed = 0,
    patience: Patience = 0,
    keep: Keep = None,
    csv_file: Csv = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Time whole models against each other, interleaved, as they are saved, with their heads."""
    shapes = [part.strip() for part in batch.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*" if text else r"[1-9]\d*x[1-9]\d*", shape) for shape in shapes):
        form = "numbers of rows such as 1,32, as is needed with --text" if text else "ROWSxTOKENS such as 1x16,8x128"
        raise bad_option("--batch", ValueError(f"{batch!r} is not a list of {form}"))
    if bool(models) == (size is not None):
        raise bad_option("MODEL", ValueError("give model folders, or --size, one of the two"))
    if size is not None and text is not None:
        raise bad_option("--text", ValueError("needs a model's tokenizer, and --size has none: give model folders"))
    _check_files(csv_file, plot, keep)

    from dataclasses import asdict

    import torch
    from transformers import AutoTokenizer

    from .. import ops
    from ..bench.load import Patience
    from ..bench.model import Workload, limits, load_model, random_ids, random_models, real_rows, time_models, visited
    from ..surgery.folder import ModelFolder
    from ..tasks.data import Collator
    from ..training import TokenisedTexts

    place = _place(device)
    texts = read_text([text] if text else None)
    ops.load()
    if size is not None:
        torch.manual_seed(seed)
        kinds = ["dense", *(part.strip() for part in fff.split(","))]
        try:
            loaded = random_models(size, kinds, _dtypes(dtype))
        except ValueError as error:
            raise bad_option("--size or --fff", error) from error
    else:
        loaded = {source: load_model(source) for source in models or []}
    loaded = {name: model.to(place) for name, model in loaded.items()}
    workloads: list[Workload]
    if text:
        tokenizer = AutoTokenizer.from_pretrained(ModelFolder.find(next(iter(loaded))).transformer)
        data = TokenisedTexts(texts, tokenizer, max_length)
        workloads = [real_rows(data, Collator(tokenizer), int(rows), seed=seed) for rows in shapes]
    else:
        vocabulary = min(model.config.vocab_size for model in loaded.values())
        sizes = [[int(n) for n in shape.split("x")] for shape in shapes]
        workloads = [random_ids(rows, tokens, vocabulary, seed=seed) for rows, tokens in sizes]
    waiting, kept = Patience(patience), _kept(context, keep)
    timings = time_models(loaded, workloads, rounds=rounds, seed=seed, patience=waiting, limit=_MODEL_LIMIT, kept=kept)
    empty = limits(loaded)
    rows = [
        {**asdict(t), "microseconds": t.microseconds, "ratios": t.ratios, "shares": t.shares(empty)} for t in timings
    ]
    longest = max(workloads, key=lambda work: work.batches[0]["input_ids"].numel())
    neurons = {name: found for name, model in loaded.items() if (found := visited(model, longest))}
    on = {"device": torch.cuda.get_device_name(place)} if place.type == "cuda" else {}
    identities = {} if size is not None else {name: ModelFolder.find(name).identity() for name in models or []}
    facts = {"size": size, "models": identities, "visited": {"workload": longest.name, **neurons}, "rows": rows}
    told = _told("model", waiting, {**on, **facts})
    lines = [
        {
            "workload": t.workload,
            "model": name,
            "milliseconds": 1e3 * seconds * _per_call(t.workload, t.tokens),
            "microseconds_a_token": t.microseconds[name],
            "times_as_fast": 1 / t.ratios[name],
            "share_of_the_limit": t.shares(empty).get(name),
        }
        for t in timings
        for name, seconds in t.seconds.items()
    ]
    _write(told, lines, csv_file, plot)
    if as_json:
        print(json.dumps(told, indent=1))
        kept.done()
        return
    shares = ", and the share of the speed without FFNs" if empty else ""
    table = _table(
        "model",
        *(t.workload for t in timings),
        title=f"microseconds a token, how many times as fast as the first{shares}",
        padding=(0, 1),
    )
    for name in loaded:
        cells = []
        for t in timings:
            part = t.shares(empty).get(name)
            share = f"  {100 * part:.0f} %" if part is not None else ""
            cells.append(f"{_number(t.microseconds[name])}  {1 / t.ratios[name]:.2f}x{share}")
        table.add_row(name, *cells)
    out.print(table)
    _caption(told, [])
    kept.done()


@bench_app.command("serve")
@reports_errors
def bench_serve(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Model folders, the dense one first: it is timed in all --engines."),
    ] = None,
    size: Annotated[
        str, typer.Option(help="Without folders: a BERT of this size with random weights, dense and with --fff.")
    ] = "bert-base",
    fff: Annotated[
        str, typer.Option(help="Without folders: what takes the place of the FFNs, comma-separated.")
    ] = "none,mlp:72,mlp:224,1x11,8x8,32x6",
    engines: Annotated[
        str,
        typer.Option(
            help="For the dense model, comma-separated: torch-f32, torch-bf16, torch-packed (hf_fff.optimize), torch-packed-bf16 and torch-packed-int8 "
            "(with linears), torchao-int8, onnxruntime-int8, openvino-bf16, openvino-int8. One that is not installed is left out, and the output says why."
        ),
    ] = "torch-f32,torch-bf16,torchao-int8,onnxruntime-int8,openvino-bf16,openvino-int8",
    fff_engines: Annotated[str, typer.Option(help="For the other models, comma-separated.")] = "openvino-int8",
    rows: Annotated[
        Rows, typer.Option(help="Of trees inside OpenVINO; auto: as `hf-fff export` chooses them.")
    ] = Rows.auto,
    batch: Annotated[
        str, typer.Option(help="Rows x tokens, comma-separated; mixed: 32 rows of real lengths, padded.")
    ] = "1x16,1x128,8x128,32x128,1x512,mixed",
    text: Annotated[
        Path | None, typer.Option(help="With folders: typical texts, one a line, for int8, mixed and the fidelity.")
    ] = None,
    fidelity: Annotated[
        Path | None,
        typer.Option(
            help="Without folders: what distilled models of these kinds keep, lines of JSON of "
            "examples/experiments/quality_minilm.py; stands beside the speed."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every engine; as many as there are cores.")] = None,
    rounds: Rounds = 9,
    seed: Seed = 0,
    patience: Patience = 0,
    keep: Keep = None,
    csv_file: Csv = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Time models as they are deployed on a CPU: engines against each other, one process each, which take turns in random order."""
    shapes = [part.strip() for part in batch.split(",")]
    if not all(shape == "mixed" or re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape) for shape in shapes):
        raise bad_option("--batch", ValueError(f"{batch!r} is not a list of ROWSxTOKENS such as 1x16,8x128 and mixed"))
    if text is not None and not models:
        raise bad_option("--text", ValueError("needs a model's tokenizer: give model folders"))
    if models and text is None:
        raise bad_option("--text", ValueError("int8 looks at some hundreds of typical texts: name a file of them"))
    _check_files(csv_file, plot, keep)

    from functools import partial

    import torch
    from transformers import AutoConfig, AutoTokenizer

    from .. import ops
    from ..bench import serve
    from ..bench.load import Patience
    from ..bench.model import random_models
    from ..config import FFFConfig
    from ..surgery.folder import ModelFolder

    try:
        if fidelity is not None and models:
            raise ValueError("is for random weights: folders are compared themselves")
        if fidelity is not None and not fidelity.is_file():
            raise ValueError(f"there is no file {fidelity}")
        quality = serve.fidelities(fidelity) if fidelity is not None else None
    except ValueError as error:
        raise bad_option("--fidelity", error) from error
    used: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    for option, given in (("--engines", engines), ("--fff-engines", fff_engines)):
        used[option] = []
        for name in (part.strip() for part in given.split(",") if part.strip()):
            try:
                why = serve.missing(name)
            except ValueError as error:
                raise bad_option(option, error) from error
            if why is None:
                used[option].append(name)
            else:
                left_out[name] = why
    if not used["--engines"]:
        raise bad_option("--engines", ValueError(f"none of them can be used: {left_out}"))
    texts = read_text([text] if text else None)
    ops.load()
    sources: dict[str, Any]
    if models:
        folders = {Path(name).name: name for name in models}
        if len(folders) < len(models):
            raise bad_option("MODEL", ValueError("two folders have the same name, by which the results are told apart"))
        paths = [ModelFolder.find(name).transformer for name in models]
        configs = [AutoConfig.from_pretrained(path) for path in paths]
        vocabulary, longest = (
            min(getattr(c, field) for c in configs) for field in ("vocab_size", "max_position_embeddings")
        )
        tokenizer, sources = AutoTokenizer.from_pretrained(paths[0]), dict(folders)
    else:
        from ..bench.shapes import size_of

        try:
            size_of(size)
            kinds = [FFFConfig.from_shorthand(part.strip()).shorthand for part in fff.split(",") if part.strip()]
        except ValueError as error:
            raise bad_option("--size or --fff", error) from error

        def make(kind: str) -> Any:
            torch.manual_seed(seed)
            return next(iter(random_models(size, [kind], {"float32": torch.float32}).values()))

        sources = {kind: partial(make, kind) for kind in ("dense", *kinds)}
        tokenizer, vocabulary, longest = None, 30522, 512
    if too_long := [s for s in shapes if s != "mixed" and int(s.partition("x")[2]) > longest]:
        raise bad_option("--batch", ValueError(f"{too_long[0]} is longer than the models take, {longest} tokens"))
    first, *rest = sources
    systems = [serve.System(first, name) for name in used["--engines"]]
    systems += [serve.System(name, engine) for name in rest for engine in used["--fff-engines"]]
    waiting, kept = Patience(patience), _kept(context, keep)
    found, load = serve.bench_serve(
        sources,
        systems,
        serve.workloads(shapes, vocabulary, texts=texts, tokenizer=tokenizer, seed=seed),
        texts=texts,
        rows=rows.value,
        threads=threads,
        rounds=rounds,
        seed=seed,
        patience=waiting,
        kept=kept,
        tell=lambda words: err.print(words),
    )
    lines = serve.records(found, load, bool(models), quality)
    about = {
        "size": None if models else size,
        "rounds": rounds,
        "tree_rows": rows.value,
        "left_out": left_out,
        "versions": serve.versions(),
        "waiting": "awake",  # threads, between products; before this was told they slept at once
    }
    told = _told("serve", waiting, {**about, "rows": lines})
    told["threads"] = threads or told["cores"]
    _write(told, lines, csv_file, plot)
    if as_json:
        print(json.dumps(told, indent=1))
        kept.done()
        return
    title = "milliseconds a batch, times as fast as the first model in OpenVINO int8"
    table = _table("engine", "model", *shapes, "start", "MB", "cosine", title=title, padding=(0, 1))
    for served in found:
        of = [r for r in lines if (r["engine"], r["model"]) == (served.system.engine, served.system.model)]
        cells = [_number(r["milliseconds"]) + (f"  {r['to_openvino']:.2f}x" if r["to_openvino"] else "") for r in of]
        cosine = served.cosine if quality is None else quality.get(served.system.model, {}).get("cosine")
        table.add_row(
            served.system.engine,
            served.system.model,
            *cells,
            f"{served.cold_start:.1f} s",
            "-" if served.peak_memory is None else f"{served.peak_memory / 1e6:.0f}",
            "" if cosine is None else f"{cosine:.3f}",
        )
    out.print(table)
    notes = [] if models else ["Weights are random: speed alone."]
    if quality is not None:
        training = quality["dense"]["training"]
        notes.append(f"Cosines are those of models of the same kinds, distilled for {training} ({fidelity}).")
    _caption(told, [*notes, *(f"{name} was left out: {why}." for name, why in left_out.items())])
    kept.done()


@bench_app.command("train")
@reports_errors
def bench_train(
    size: Annotated[
        str, typer.Option(help="A BERT of this size with random weights, such as bert-base.")
    ] = "bert-base",
    fff: Annotated[str, typer.Option(help="What takes the place of the FFNs, comma-separated.")] = "1x11,8x8",
    batch: Annotated[str, typer.Option(help="Rows x tokens of a step.")] = "16x128",
    bf16: Annotated[bool, typer.Option(help="Under autocast in bfloat16.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory too, in a process for each model.")] = True,
    rounds: Rounds = 5,
    device: Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")] = "cpu",
    seed: Seed = 0,
    patience: Patience = 0,
    csv_file: Csv = None,
    as_json: Json = False,
) -> None:
    """Time steps of a finetuning (forward, backward, AdamW) of a dense model and of converted ones, without and with the routing gradient."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", batch):
        raise bad_option("--batch", ValueError(f"{batch!r} is not of the form ROWSxTOKENS, such as 16x128"))
    _check_files(csv_file, None)

    import torch

    from .. import ops
    from ..bench import train
    from ..bench.load import Patience
    from ..bench.shapes import size_of

    rows, tokens = (int(n) for n in batch.split("x"))
    kinds = [part.strip() for part in fff.split(",") if part.strip()]
    try:
        size_of(size)
        train.systems(kinds)
    except ValueError as error:
        raise bad_option("--size or --fff", error) from error
    _place(device)
    ops.load()
    waiting = Patience(patience)
    found = train.bench_train(
        size,
        kinds,
        rows,
        tokens,
        bf16=bf16,
        device=device,
        rounds=rounds,
        seed=seed,
        memory=memory,
        patience=waiting,
        tell=lambda words: err.print(words),
    )
    lines = train.records(found, rows, tokens)
    on = {"device": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    told = _told("train", waiting, {**on, "size": size, "bf16": bf16, "rounds": rounds, "rows": lines})
    _write(told, lines, csv_file, None)
    if as_json:
        print(json.dumps(told, indent=1))
        return
    table = _table(
        "model", "ms a step", "tokens/s", "x dense", "peak MB", "dead nodes", title=f"a step of {batch}, {size}"
    )
    for line in lines:
        dead = "-" if line["dead"] is None else f"{100 * line['dead']:.0f} %"
        cells = (_number(line[name]) for name in ("milliseconds", "tokens_per_second"))
        table.add_row(line["model"], *cells, f"{line['times_as_fast']:.2f}x", _number(line["peak_mb"]), dead)
    out.print(table)
    _caption(told, ["Weights are random: nothing here tells of quality."])


@bench_app.command("cuda")
@reports_errors
def bench_cuda(
    fff: Annotated[
        str,
        typer.Option(
            help="Trees x depth, comma-separated.",
            show_default="1x11,4x9,8x8,32x6; of models and their training 1x11,8x8",
        ),
    ] = "",
    hidden_size: Annotated[int, typer.Option(min=1, help="Size of the layers' input and output.")] = 768,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or both, comma-separated.")] = "bfloat16,float32",
    tokens: Annotated[
        str,
        typer.Option(
            help="Token counts of the layers, comma-separated.",
            show_default="forward 128,512,2048,16384,131072; backward the last three; graph 128,256,512,1024,2048",
        ),
    ] = "",
    only: Annotated[
        str, typer.Option(help="Sections to measure, comma-separated: forward, backward, graph, model, train.")
    ] = "forward,backward,graph,model,train",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer shapes and rounds, and no cell begun after 90 seconds.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="After which nothing new is begun; what was measured is told.")
    ] = None,
    rounds: Rounds = 30,
    csv_file: Csv = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Time layers, models and training steps on a GPU against dense layers, narrow ones, a masked dense layer and a copy of the input."""
    from dataclasses import replace

    from ..config import FFFConfig

    changes: dict[str, Any] = {"hidden_size": hidden_size, "rounds": rounds}
    if fff:
        changes["fff"] = tuple(part.strip() for part in fff.split(","))
        try:
            if other := [shape for shape in changes["fff"] if FFFConfig.from_shorthand(shape).kind != "tree"]:
                raise ValueError(f"{other[0]} is no tree")
        except ValueError as error:
            raise bad_option("--fff", error) from error
        changes["kinds"] = ("dense", *changes["fff"], "none")
    if tokens:
        counts = tuple(_numbers("--tokens", tokens))
        changes |= {"tokens": counts, "backward_tokens": counts, "graph_tokens": counts}
    _check_files(csv_file, plot)

    from ..bench import cuda

    changes["dtypes"] = tuple(_dtypes(dtype))
    if seconds is not None:
        changes["seconds"] = seconds
    sections = [part.strip() for part in only.split(",")]
    if wrong := [name for name in sections if name not in cuda.SECTIONS]:
        raise bad_option("--only", ValueError(f"{wrong[0]!r} is not known (allowed: {', '.join(cuda.SECTIONS)})"))
    gpu, begun = cuda.Gpu(), time.monotonic()

    from ..bench import machine, page
    from ..bench.load import Patience

    plan = replace(cuda.Plan(), **changes)
    measured = cuda.bench_cuda(plan.quick() if quick else plan, sections, gpu=gpu, tell=lambda words: err.print(words))
    known = machine.gpu() or {}
    words = {"--fff": fff, "--tokens": tokens, "--dtype": dtype, "--only": only}
    words |= {
        "--hidden-size": str(hidden_size) if hidden_size != 768 else "",
        "--rounds": str(rounds) if rounds != 30 else "",
    }
    words["--seconds"] = "" if seconds is None else f"{seconds:g}"
    line = " ".join(["hf-fff bench cuda", *(f"{name} {value}" for name, value in words.items() if value)])
    line += " --quick" if quick else ""
    about = {"line": line, "gpu": known, "device": known.get("name"), "seconds": round(time.monotonic() - begun)}
    told = _told("cuda", Patience(), {**about, **measured}, device="cuda")
    _write(told, cuda.lines(told), csv_file, plot)
    if as_json:
        print(json.dumps(told, indent=1))
    else:
        out.print("\n".join(page.cuda_page(told)), soft_wrap=True)
    if measured["failed"]:
        raise RuntimeError("; ".join(f"{section} failed: {why}" for section, why in measured["failed"].items()))


_MODEL_LIMIT = 60.0  # seconds for the rounds of a workload, if three are done by then


def _per_call(workload: str, tokens: int) -> float:
    """What part of a workload, which has several batches, one batch of ``ROWSxTOKENS`` is; of real rows, all."""
    rows, _, length = workload.partition("x")
    return int(rows) * int(length) / tokens if length else 1.0


def _place(device: str) -> Any:
    import torch

    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA
        raise bad_option("--device", ValueError(f"{device!r} is no device of this machine")) from error


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
        if min(numbers) < 1:
            raise ValueError
    except ValueError as error:
        raise bad_option(option, ValueError(f"{text!r} is not a list of positive numbers")) from error
    return numbers


def _widths(text: str) -> dict[str, int]:
    names = [part.strip() for part in text.split(",")] if text else []
    if wrong := [name for name in names if not re.fullmatch(r"(dense|mlp):[1-9]\d{0,7}", name)]:
        raise bad_option("--against", ValueError(f"{wrong[0]!r} is not of the form dense:3072 or mlp:72"))
    return {name: int(name.partition(":")[2]) for name in names}


def _dtypes(text: str) -> dict[str, Any]:
    from ..bench.layer import DTYPES

    names = [part.strip() for part in text.split(",")]
    if wrong := [name for name in names if name not in DTYPES]:
        raise bad_option("--dtype", ValueError(f"{wrong[0]!r} is not known (allowed: {', '.join(DTYPES)})"))
    return {name: DTYPES[name] for name in names}


def _check_files(csv_file: Path | None, plot: Path | None, keep: Path | None = None) -> None:
    """What cannot be written is better told before the measurement than after it."""
    from ..bench.plot import check_plot

    for option, file in (("--csv", csv_file), ("--keep", keep)):
        if file is not None and not file.parent.is_dir():
            raise bad_option(option, ValueError(f"there is no folder {file.parent}"))
    try:
        if plot is not None:
            check_plot(plot)
    except ValueError as error:
        raise bad_option("--plot", error) from error


def _kept(context: typer.Context, keep: Path | None) -> Any:
    """Where finished cells go; figures depend on the command as it was typed, and on the machine."""
    from ..bench.kept import Kept
    from ..bench.machine import facts

    words = {n: value for n, value in context.params.items() if n not in _FREE}
    same = {n: value for n, value in facts().items() if n != "date"}
    try:
        return Kept(keep, {n: str(value) for n, value in {**words, **same}.items()})
    except ValueError as error:
        raise bad_option("--keep", error) from error


_FREE = ("patience", "keep", "csv_file", "plot", "as_json")  # options on which no figure depends


def _told(command: str, waiting: Any, results: Mapping[str, Any], device: str = "cpu") -> dict[str, Any]:
    """What ``--json`` prints: the machine, what else it did, and the results."""
    from dataclasses import asdict

    from ..bench.load import worst
    from ..bench.machine import facts

    return {
        "command": command,
        **facts(device),
        "load": asdict(worst(waiting.loads)),
        "seconds": round(waiting.measuring),
        **results,
    }


def _write(
    told: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], csv_file: Path | None, plot: Path | None
) -> None:
    from ..bench import plot as draw
    from ..files import atomic_file

    if csv_file is not None:
        # Beside every value: lines are cut out and pasted.
        same = ("cpu", "cores", "isa", "backend", "torch", "hf_fff", "date")
        with atomic_file(csv_file) as path, path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(draw.csv_lines([{**line, **{n: told[n] for n in same}} for line in lines]))
    if plot is not None:
        draw.plot(told, plot)
    load = told["load"]
    if load["others"] is not None:
        busy, how = (
            load["others"] > 0.5,
            f"other processes used up to {load['others']:g} of its {told['cores']} cores, ",
        )
    else:  # the load average knows no better than to count our own threads too
        busy, how = load["after"] is not None and load["after"] > told["threads"] + 1, ""
    if busy:
        err.print(
            f"warning: the machine was busy: {how}load average {load['before']} before and {load['after']} after. "
            "Measure again when it is quiet (--patience).",
            style="yellow",
        )


def _caption(told: Mapping[str, Any], more: Sequence[str]) -> None:
    load = told["load"]
    facts = {
        n: told[n] for n in ("cpu", "cores", "threads", "isa", "backend", "torch", "transformers", "hf_fff", "date")
    }
    out.print(
        ", ".join(
            f"{name} {value}"
            for name, value in {**facts, **({"device": told["device"]} if "device" in told else {})}.items()
        )
    )
    out.print(
        f"load average {load['before']} before, {load['after']} after; others used up to {load['others']} cores; {told['seconds']} s"
    )
    for line in more:
        out.print(line)


def _table(*names: str, **options: Any) -> Any:
    return table_of(*names, **{"box": SIMPLE_HEAD, "padding": 0, **options})  # fits into 80 columns


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(slow: float | None, fast: float | None) -> str:
    if slow is None or fast is None:
        return "-"
    return f"{slow / fast:.0f}x" if slow > 10 * fast else f"{slow / fast:.1f}x"


def _triple(slow: float | None, fast: float | None) -> tuple[str, str, str]:
    return _number(slow), _number(fast), _ratio(slow, fast)
