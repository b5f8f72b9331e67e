"""What all commands share: one rule of exit codes, results alone on stdout, and lines to be copied that work."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import sentence_transformers
import transformers
import typer
from command import run, unwrapped
from safetensors import SafetensorError
from tiny import tiny_bert
from tqdm import tqdm
from typer.main import get_command
from typer.testing import CliRunner

from hf_fff.cli import common
from hf_fff.cli.app import app
from hf_fff.surgery.folder import ModelFolder

ERRORS = {
    2: [
        ValueError("x=1 must be 2"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        FileExistsError("it exists"),
        PermissionError(errno.EACCES, "denied"),
        OSError("It looks like the config file is not a valid JSON file."),  # as transformers says it
        SafetensorError("Error while deserializing header: header too small"),
    ],
    1: [
        RuntimeError("out of memory"),
        NotImplementedError("no kernel for this dtype"),
        FloatingPointError("the loss is not finite"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
    ],
}


@pytest.mark.parametrize(("code", "error"), [(code, error) for code, errors in ERRORS.items() for error in errors])
def test_whose_fault_it_is(code, error):
    assert common.exit_code(error) == code


# Of each command: what is wrong with what is given, of which it says so on stderr, in these words.
TASK = ("--task", "classification")
BAD_CALLS = {
    "convert": [
        (("{tmp}/nowhere", "{tmp}/out", "--fff", "2x3"), "there is no folder"),
        (("{model}", "{tmp}/out", "--fff", "2y3"), "--fff"),
        (("{model}", "{tmp}/out", "--fff", "2x3", "--text", "{tmp}/empty.txt"), "has no text in it"),
        (("{model}", "{tmp}/out", "--fff", "2x3", "--text", "{tmp}/nowhere.txt"), "is not a file"),
        (("{model}", "{tmp}/out", "--fff", "2x3", "--text", "{tmp}/short.txt"), "at least 256 are needed"),
        (("{model}", "{tmp}/full", "--fff", "2x3"), "is not empty"),
        (("{model}", "{tmp}/full/file/out", "--fff", "2x3"), "is not a folder that can be written to"),
        (("{model}", "{model}/out", "--fff", "2x3"), "lies in the source"),
        (("{model}", "{tmp}/out", "--fff", "2x3", "--layers", "1,7"), "--layers has 7; the model has layers 0 to 2"),
        (("{broken}", "{tmp}/out", "--fff", "2x3"), "is not a valid JSON file"),
    ],
    "distill": [
        (("{tmp}/nowhere", "{tmp}/out", "--fff", "2x3", "--steps", "1", "--text", "{text}"), "there is no folder"),
        (("{model}", "{tmp}/out", "--fff", "2x3", "--steps", "1", "--text", "{tmp}/empty.txt"), "has no text in it"),
        (("{model}", "{tmp}/out", "--fff", "2x3", "--steps", "1", *TASK, "--data", "{tmp}/no.tsv"), "there is no file"),
        (("{model}", "{tmp}/out", "--fff", "2x3", "--steps", "1", *TASK, "--data", "{tmp}/bad.tsv"), "1 fields, but"),
        (
            ("{model}", "{tmp}/out", "--fff", "2x3", "--steps", "1", *TASK, "--data", "{tmp}/few.tsv"),
            "name them with --text-columns",
        ),
        (("{model}", "{tmp}/full", "--fff", "2x3", "--steps", "1", "--text", "{text}"), "is not empty"),
    ],
    "choose": [
        (("{tmp}/nowhere", "{tmp}/out", "--keep", "0.9", "--task", "mlm", "--text", "{text}"), "there is no folder"),
        (("{model}", "{tmp}/out", "--keep", "0.9", "--task", "mlm", "--text", "{tmp}/empty.txt"), "has no text in it"),
        (("{model}", "{tmp}/out", "--keep", "0.9", "--task", "mlm", "--text", "{text}"), "has no head for mlm"),
        (("{model}", "{tmp}/out", "--keep", "0.9", *TASK, "--data", "{tmp}/few.tsv"), "name them with --text-columns"),
        (("{model}", "{tmp}/full", "--keep", "0.9", *TASK, "--data", "{tmp}/few.tsv"), "is not empty"),
    ],
    "eval": [
        (("{tmp}/nowhere", *TASK, "--data", "{tmp}/few.tsv"), "there is no folder"),
        (("{model}", *TASK, "--data", "{tmp}/empty.txt"), "has no text in it"),
        (("{model}", *TASK, "--data", "{tmp}/empty"), "neither a file of a known kind"),
        (("{model}", *TASK, "--data", "{tmp}/few.tsv"), "name them with --text-columns"),
        (("{model}", "--task", "mlm", "--data", "{text}"), "has no head for mlm"),
    ],
    "export": [
        (("{tmp}/nowhere", "{tmp}/out", "--precision", "f32"), "there is no folder"),
        (("{model}", "{tmp}/out"), "int8 looks at some hundreds of typical texts"),
        (("{model}", "{tmp}/out", "--text", "{tmp}/empty.txt"), "has no text in it"),
        (("{model}", "{tmp}/out", "--text", "{tmp}/nowhere.txt"), "is not a file"),
        (("{model}", "{tmp}/out", "--precision", "int4"), "--precision"),
        (("{model}", "{tmp}/out", "--engine", "onnx", "--precision", "bf16"), "bf16 is not for onnx"),
        (("{model}", "{tmp}/out", "--engine", "onnx", "--rows", "int8"), "where trees are f32"),
        (("{model}", "{tmp}/out", "--engine", "onnx", "--text", "{text}"), "leave it out"),
        (("{model}", "{tmp}/full", "--engine", "onnx"), "is not empty"),
        (("{model}", "{tmp}/full", "--precision", "f32"), "is not empty"),
        (("{model}", "{model}", "--precision", "f32", "--overwrite"), "is the source"),
    ],
    "import ultrafastbert": [
        (("{tmp}/nowhere", "{tmp}/out"), "there is no folder"),
        (("{model}", "{tmp}/out"), "is not of UltraFastBERT"),
        (("{model}", "{tmp}/full"), "is not empty"),
        (("{broken}", "{tmp}/out"), "is not a valid JSON file"),
    ],
    "card": [
        (("{tmp}/nowhere",), "is no folder"),
        (("{model}",), "is no model of hf_fff"),
        (("{model}", "--repo-id", "nobody"), "--repo-id='nobody' is no name of a repository (allowed: OWNER/NAME"),
    ],
    "push": [
        (("{tmp}/nowhere", "me/model"), "is no folder"),
        (("{model}", "me/model"), "is no model of hf_fff"),
        (("{model}", "model"), "REPO_ID='model' is no name of a repository (allowed: OWNER/NAME"),
    ],
    **{
        f"train {command}": [
            (("{tmp}/nowhere", "--data", "{tmp}/train.tsv", "--out", "{tmp}/out"), "there is no folder"),
            (("{model}", "--data", "{tmp}/no.tsv", "--out", "{tmp}/out"), "there is no file"),
            (("{model}", "--data", "{tmp}/bad.tsv", "--out", "{tmp}/out"), "1 fields, but"),
            (("{model}", "--data", "{tmp}/few.tsv", "--out", "{tmp}/out"), "name them with --text-columns"),
            (("{model}", "--data", "{tmp}/few.tsv", "--out", "{tmp}/full"), "is not empty"),
            (("{model}", "--data", "{tmp}/few.tsv", "--out", "{model}", "--overwrite"), "is the source"),
            (
                ("{model}", "--data", "{tmp}/few.tsv", "--out", "{tmp}/out", "--set", "x"),
                "is not of the form name=value",
            ),
        ]
        for command in ("classify", "regress", "tokens", "qa", "mlm")
    },
    "env": [(("--frobnicate",), "--frobnicate")],
    "build": [
        (("--output",), "--output"),
        (("--arch", "90"), "belongs to --cuda"),
        (
            ("--cuda", "--arch", "90,70"),
            "target '70' is not supported (allowed: 75, 80, 86, 89, 90, 90a, 100, 100a, 120, 120a",
        ),
    ],
    "bench cuda": [(("--only", "sideways"), "--only"), (("--tokens", "0"), "--tokens")],
    "bench layer": [(("--fff", "2y3"), "--fff"), (("--tokens", "0"), "--tokens")],
    "bench scaling": [(("--threads", "0"), "--threads"), (("--sizes", "nowhere"), "--sizes")],
    "bench serve": [(("--threads", "0"), "--threads"), (("--engines", "abacus"), "--engines")],
    "bench train": [
        (("--batch", "16"), "ROWSxTOKENS"),
        (("--size", "bert-giant"), "bert-giant"),
        (("--fff", "8y8"), "8y8"),
        (("--device", "abacus"), "no device of this machine"),
        (("--size", "bert-tiny", "--batch", "1x600", "--no-memory"), "longer than the model takes, 512"),
    ],
    "bench model": [
        (("{tmp}/nowhere",), "there is no folder"),
        (("{model}", "--text", "{tmp}/empty.txt", "--batch", "1"), "has no text in it"),
    ],
}


@pytest.fixture
def places(model, text, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty").write_text("")
    (tmp_path / "short.txt").write_text("word1 word2")
    (tmp_path / "bad.tsv").write_text("text\tlabel\nword1\n")
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "word1\t1\nword2\t2\n" * 10)
    (tmp_path / "few.tsv").write_text("words\tlabel\n" + "word1\t1\n" * 20)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    return {"tmp": tmp_path, "model": model, "text": text, "broken": broken}


@pytest.mark.parametrize(
    ("command", "given", "message"), [(c, *call) for c, calls in BAD_CALLS.items() for call in calls]
)
def test_what_is_given_is_wrong(places, command, given, message):
    result = run(*command.split(), *(word.format(**places) for word in given))
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert message in unwrapped(result.stderr)


MESSAGES = {
    "target_layers has 7; the model has": "--layers has 7; the model has",
    "lower the calibration's max_tokens or": "lower the calibration's --max-tokens or",
    "fewer than one batch (per_device_train_batch_size).": "fewer than one batch (--batch-size).",
    "max_steps: 3 there, 4 now": "--steps: 3 there, 4 now",
    "steps=0 must be at least 1": "--steps=0 must be at least 1",
    "license='x' is no": "--license='x' is no",
    "source='x' is": "SRC='x' is",
    "every=True, and max_tokens.": "--all=True, and --max-tokens.",
    "none of the columns is known: name them": "none of the columns is known: name them with --text-columns",
    # which are no fields of the command
    "the text has few steps, and layers": "the text has few steps, and layers",
    "row 3: text=5 is no text": "row 3: text=5 is no text",
    "/tmp/max_tokens, max_tokens.json, max_tokens(3)": "/tmp/max_tokens, max_tokens.json, max_tokens(3)",
    "model_type='bert', hidden_size=3": "model_type='bert', hidden_size=3",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_errors_name_what_was_typed(message, capsys):
    @common.reports_errors
    def command(
        source: common.Source,
        layers: Annotated[str, typer.Option()] = "",
        text: Annotated[str, typer.Option()] = "",
        max_tokens: Annotated[int | None, typer.Option(min=256)] = None,
        batch_size: Annotated[int, typer.Option()] = 1,
        steps: Annotated[int, typer.Option()] = 1,
        every: Annotated[bool, typer.Option("--all")] = False,
        licence: Annotated[str, typer.Option("--license")] = "",
        text_columns: common.TextColumns = None,
    ):
        raise ValueError(message)

    with pytest.raises(typer.Exit):
        command("x")
    assert capsys.readouterr().err == f"error: {MESSAGES[message]}\n"


def commands(group, *before):
    for name, command in group.commands.items():
        yield from commands(command, *before, name) if hasattr(command, "commands") else [" ".join([*before, name])]


def test_no_command_is_left_out():
    assert {*commands(get_command(app))} == {*BAD_CALLS}


GOOD_CALLS = {
    "convert": ("{model}", "{tmp}/out", "--fff", "2x3", "--text", "{text}", "--steps", "1"),
    "distill": (
        *("{model}", "{tmp}/out", "--fff", "2x3", "--text", "{text}", "--steps", "1", "--batch-size", "16"),
        *("--calibration-steps", "1"),
    ),
    "choose": (
        *("{model}", "{tmp}/out", "--keep", "0.01", "--task", "embeddings", "--text", "{text}"),
        *("--steps", "1", "--candidates", "none", "--batch-size", "16", "--batch-sizes", "1"),
    ),
    "eval": ("{model}", "--task", "embeddings", "--teacher", "{model}", "--data", "{text}"),
}


@pytest.mark.parametrize("command", GOOD_CALLS)
def test_what_libraries_print_is_no_result(places, monkeypatch, command):
    if command in ("choose", "eval"):  # which want an embedder here
        tiny_bert().save_pretrained(places["model"])
    find = ModelFolder.find

    def noisy(source):
        print("{'loss': 'chatter'}")
        return find(source)

    monkeypatch.setattr(ModelFolder, "find", noisy)
    monkeypatch.setattr("hf_fff.choosing.search.time_models", time_models)
    monkeypatch.setattr("hf_fff.choosing.search.busy", lambda: None)
    result = run(command, *(word.format(**places) for word in GOOD_CALLS[command]), "--json")
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)
    assert "chatter" in result.stderr


def time_models(models, workloads, **_):
    from hf_fff.bench.model import Timing

    return [Timing(w.name, 10, {name: 1.0 if name == "dense" else 0.5 for name in models}) for w in workloads]


def lines_to_copy(printed):
    lines = printed.splitlines()
    start = lines.index("To open it, in Python:") + 1
    return [line.strip() for line in lines[start:]]


def test_the_lines_that_open_a_result(model, tmp_path):
    output = tmp_path / 'a "quoted" name'
    *imports, opened = lines_to_copy(run("convert", model, output, "--fff", "2x3").stdout)
    space = {}
    exec("\n".join(imports), space)
    assert type(eval(opened, space)).__name__ == "FastBertForSequenceClassification"
    assert opened.startswith("AutoModelForSequenceClassification")


def test_the_lines_that_open_an_embedder(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "bert")
    from task_rows import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu").save(str(tmp_path / "dense"))
    *imports, opened, embedder = lines_to_copy(
        run("convert", tmp_path / "dense", tmp_path / "fast", "--fff", "2x3").stdout
    )
    space = {}
    exec("\n".join(imports), space)
    assert type(eval(opened, space)).__name__ == "FastBertModel"
    assert isinstance(eval(embedder, space), sentence_transformers.SentenceTransformer)


def test_no_lines_with_json(model, tmp_path):
    assert "To open it" not in run("convert", model, tmp_path / "out", "--fff", "2x3", "--json").output


def test_the_command_as_it_was_given():
    told = []
    tiny = typer.Typer()

    @tiny.command()
    def command(
        context: typer.Context,
        source: str,
        output: Path,
        keep: float = 0.5,
        data: list[str] | None = None,
        every: bool = typer.Option(False, "--all"),
        mixed: bool = True,
        device: common.Device = common.Device.cpu,
        budget: int = 9,
    ):
        told.extend([common.command_line(context), common.command_line(context, keep=0.25, budget=3)])

    given = ["a b", "out", "--data", "x", "--data", "y", "--all", "--no-mixed", "--device", "cuda", "--keep", "0.9"]
    assert CliRunner().invoke(tiny, given).exit_code == 0
    usual = "'a b' out --keep {} --data x --data y --all --no-mixed --device cuda"
    assert told == [
        f"hf-fff command {usual.format(0.9)}",
        f"hf-fff command {usual.format(0.25)} --budget 3",
    ]


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyboardInterrupt(), True), (SystemExit(143), True), (RuntimeError("no memory"), True), (ValueError("x"), False)],
)
@pytest.mark.parametrize("there", [True, False])
def test_what_is_kept_is_told(tmp_path, capsys, error, told, there):
    work = tmp_path / "out.work"
    if there:
        work.mkdir()

    @common.reports_errors
    def command():
        with common.resumable(work):
            raise error

    with pytest.raises((type(error), typer.Exit)):
        command()
    assert (f"What is done is kept in {work}: the same command goes on" in capsys.readouterr().err) == (told and there)


def test_clocks_of_bars_go_on(capsys):
    """Where a step takes long; one that is not shown is left alone."""
    done = SimpleNamespace(waits=3)

    def wait(seconds):
        done.waits -= 1
        return done.waits < 0

    done.wait = wait
    shown, hidden = tqdm(total=2, desc="slow"), tqdm(total=2, desc="hidden", disable=True)
    capsys.readouterr()
    time.sleep(0.01)
    common._tick(done)
    told = capsys.readouterr().err
    assert told.count("slow:") == 3 and "hidden" not in told
    shown.close(), hidden.close()


def test_bars_of_transformers(monkeypatch):
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()
    with common.working():
        assert not are_progress_bars_disabled()  # downloads
        assert not transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("cached", [True, False])
def test_a_compilation_is_told(tmp_path, monkeypatch, capsys, cached):
    monkeypatch.setenv("HF_FFF_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_FFF_BACKEND", "auto")
    monkeypatch.delenv("HF_FFF_KERNEL_PATH", raising=False)
    monkeypatch.setattr("hf_fff.ops.load", lambda: None)
    from hf_fff.ops import loader

    key = loader.describe()["libraries"]["cpu"].get("key")
    if key is None:
        pytest.skip("there is no compiler")
    if cached:
        (tmp_path / f"cpu-{key}").mkdir()
    common.load_kernels()
    assert ("compiling the CPU kernel" in capsys.readouterr().err) != cached


@pytest.mark.parametrize(
    ("device", "targets", "told"),
    [("cuda", ["90"], True), (None, ["90"], True), ("cpu", ["90"], False), ("cuda", [], False), ("cuda", None, False)],
)
def test_a_compilation_for_the_gpu_is_told(tmp_path, monkeypatch, capsys, device, targets, told):
    """Unless the CPU is asked for, or the GPU cannot be served, or what serves it is there."""
    from hf_fff.ops import loader

    facts = {"backend_setting": "auto", "kernel_path": None, "cache": str(tmp_path)}
    facts["libraries"] = {"cpu": {}, "cuda": {"key": "12", "targets": ["90"] if targets is None else targets}}
    if targets is None:
        (tmp_path / "cuda-12-80-90").mkdir()
    loaded = []
    monkeypatch.setattr(loader, "describe", lambda: facts)
    monkeypatch.setattr("hf_fff.ops.load", lambda name="cpu": loaded.append(name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    common.load_kernels(common.Device(device) if device else None)
    assert ("compiling the CUDA kernels, once" in capsys.readouterr().err) is told
    assert loaded == (["cpu"] if device == "cpu" else ["cpu", "cuda"])


@pytest.mark.parametrize("module", ["hf_fff", "hf_fff.cli"])
def test_as_a_module(module):
    environment = {**os.environ, "COLUMNS": "80"}
    told = subprocess.run(
        [sys.executable, "-m", module, "convert"], capture_output=True, text=True, env=environment, check=False
    )
    assert told.returncode == 2 and "hf-fff convert" in told.stderr


# As pip writes it
_SCRIPT = "import sys\nfrom hf_fff.cli import main\nsys.exit(main())\n"


@pytest.mark.parametrize("called", ["hf-fff", "-m hf_fff", "a program"])
def test_interrupted_while_importing(tmp_path, called):
    """The command leaves without a word; a program of somebody else hears of it as ever."""
    slow = tmp_path / "transformers"  # which takes the longest
    slow.mkdir()
    (slow / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    script = tmp_path / called
    script.write_text(_SCRIPT)
    command = [sys.executable, *(["-m", "hf_fff"] if called == "-m hf_fff" else [script]), "convert", "a", "b"]
    root = Path(common.__file__).parents[2]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        # a shell starts what ends in "&" with SIGINT ignored, which children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    if called == "a program":
        assert "KeyboardInterrupt" in told and process.returncode != 0
    else:
        assert (process.returncode, told) == (130, "")


def test_interrupts_are_heard_again_when_the_work_begins():
    code = "import signal\nfrom hf_fff import cli\nfrom hf_fff.cli import app\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "app.app = lambda **_: print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\ncli.main()"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "True\n"


def test_warnings_are_one_line():
    code = "import warnings\nfrom hf_fff import cli\nfrom hf_fff.cli import app\n"
    code += "app.app = lambda **_: warnings.warn('it is late', UserWarning)\ncli.main()"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stderr == "warning: it is late\n"
