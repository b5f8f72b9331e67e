"""The command line: what it writes, what it prints, and that wrong use writes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import HEADS, outputs, same, tiny_bert, tiny_inputs
from transformers import AutoModel, AutoModelForSequenceClassification, BertTokenizer, DistilBertConfig
from typer.testing import CliRunner

from hf_fff import __version__
from hf_fff.cli.app import app
from hf_fff.ops import loader

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")

WORDS = [f"word{i}" for i in range(100)]


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def model(tmp_path):
    """A tiny classifier with its tokenizer, in a folder."""
    folder = tmp_path / "dense"
    dense = tiny_bert(HEADS["ForSequenceClassification"], num_labels=3)
    dense.save_pretrained(folder)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, len(WORDS), (120, 12), generator=generator).tolist()
    path.write_text("\n".join(" ".join(WORDS[i] for i in row) for row in rows))
    return path


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_version_and_help():
    assert run("--version").stdout.strip() == __version__
    told = run("--help")
    assert told.exit_code == 0 and all(name in told.stdout for name in ("convert", "env", "build", "bench"))
    for command in (["convert"], ["env"], ["build"], ["bench", "layer"]):
        assert run(*command, "--help").exit_code == 0


def test_convert_without_text(model, tmp_path):
    with pytest.warns(UserWarning, match="not calibrated"):
        result = run("convert", model, tmp_path / "fast", "--fff", "2x3")
    assert result.exit_code == 0 and "not calibrated" in result.stdout and "2x3" in result.stdout
    fast = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert type(fast).__name__ == "FastBertForSequenceClassification"
    assert {c.shorthand for c in fast.config.fff_layers.values()} == {"2x3"} and len(fast.config.fff_layers) == 3


def test_convert_with_text_is_reproducible_and_prints_json_alone(model, text, tmp_path):
    results = []
    for name in ("one", "two"):
        options = ("--fff", "2x3", "--text", text, "--steps", 20, "--seed", 5, "--json")
        result = run("convert", model, tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        results.append(json.loads(result.stdout))
    fast = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("one", "two")]
    assert same(*(outputs(m.eval(), tiny_inputs(m)) for m in fast))
    first = results[0]
    assert first["model_class"] == "FastBertForSequenceClassification"
    assert first["layers"] == {"0": "2x3", "1": "2x3", "2": "2x3"}
    assert first["parameters"] == sum(p.numel() for p in fast[0].parameters())
    assert first["calibration"]["steps"] == 20 and first["calibration"]["tokens"] > 256
    assert first["calibration"]["unexplained"] == results[1]["calibration"]["unexplained"]
    assert all(0 < value < 1.05 for value in first["calibration"]["unexplained"].values())


def test_convert_prints_what_it_reached(model, text, tmp_path):
    result = run("convert", model, tmp_path / "fast", "--fff", "2x3", "--text", text, "--steps", 5)
    assert result.exit_code == 0 and "unexplained" in result.stdout and "--steps 5 --seed 0" in result.stdout


def test_convert_chosen_layers_and_dtype(model, tmp_path):
    result = run("convert", model, tmp_path / "fast", "--fff", "4x2", "--layers", "0,2-2", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    fast = AutoModel.from_pretrained(tmp_path / "fast")
    assert list(fast.config.fff_layers) == [0, 2] and fast.dtype == torch.bfloat16


def test_overwrite(model, tmp_path):
    target = tmp_path / "fast"
    target.mkdir()
    (target / "old").write_text("precious")
    refused = run("convert", model, target, "--fff", "2x3")
    assert refused.exit_code == 2 and "--overwrite" in refused.output and listing(target) == {"old": b"precious"}
    assert run("convert", model, target, "--fff", "2x3", "--overwrite").exit_code == 0
    assert "old" not in listing(target) and "model.safetensors" in listing(target)


WRONG_USE = {
    "shorthand": (["--fff", "8y8"], "KxD"),
    "trees": (["--fff", "0x3"], "n_trees=0 is out of range (allowed: 1 to 65536)"),
    "depth": (["--fff", "8x99"], "depth=99 is out of range (allowed: 0 to 24)"),
    "no shorthand": ([], "--fff"),
    "layers": (["--fff", "2x3", "--layers", "1-x"], "'1-x' is not a list of layers"),
    "no text file": (["--fff", "2x3", "--text", "nowhere.txt"], "nowhere.txt is not a file"),
    "budget": (["--fff", "2x3", "--budget", "0"], "--budget"),
    "steps": (["--fff", "2x3", "--steps", "0"], "--steps"),
    "init": (["--fff", "2x3", "--init", "zero"], "--init"),
    "dtype": (["--fff", "2x3", "--dtype", "int8"], "--dtype"),
    "option": (["--fff", "2x3", "--frobnicate"], "--frobnicate"),
}


@pytest.mark.parametrize("name", WRONG_USE)
def test_wrong_use(model, tmp_path, name):
    options, message = WRONG_USE[name]
    before = listing(tmp_path)
    result = run("convert", model, tmp_path / "fast", *options)
    assert result.exit_code == 2 and message in unwrapped(result.output)
    assert listing(tmp_path) == before


def unwrapped(output):
    """Without the box that wraps messages."""
    return " ".join(" ".join(line.strip("│╭╮╰╯─ ") for line in output.splitlines()).split())


def no_such(tmp_path):
    return tmp_path / "nowhere" / "at all", "neither a folder nor a model"


def a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    return path, "is a file"


def no_model(tmp_path):
    path = tmp_path / "empty"
    path.mkdir()
    return path, "there is no config.json"


def other_family(tmp_path):
    path = tmp_path / "distilbert"
    DistilBertConfig().save_pretrained(path)
    return path, "known families: bert"


def converted(tmp_path):
    path = tmp_path / "converted"
    assert run("convert", tmp_path / "dense", path, "--fff", "2x3").exit_code == 0
    return path, "already converted"


@pytest.mark.parametrize("source", [no_such, a_file, no_model, other_family, converted])
def test_source_that_cannot_be_converted(model, tmp_path, source):
    path, message = source(tmp_path)
    before = listing(tmp_path)
    result = run("convert", path, tmp_path / "fast", "--fff", "2x3")
    assert result.exit_code == 1 and message in unwrapped(result.output)
    assert listing(tmp_path) == before and not (tmp_path / "fast").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no text in it"),
        (b" \n\n", "has no text in it"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"word1 word2", "at least 256 are needed"),
    ],
)
def test_text_that_cannot_be_used(model, tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    result = run("convert", model, tmp_path / "fast", "--fff", "2x3", "--text", path)
    assert result.exit_code == 1 and message in unwrapped(result.output)
    assert not (tmp_path / "fast").exists()


def test_layers_that_are_not_there_and_output_in_the_source(model, tmp_path):
    before = listing(tmp_path)
    result = run("convert", model, tmp_path / "fast", "--fff", "2x3", "--layers", "1,7")
    assert result.exit_code == 1 and "target_layers has 7; the model has layers 0 to 2" in unwrapped(result.output)
    result = run("convert", model, model / "fast", "--fff", "2x3")
    assert result.exit_code == 1 and "lies in the source" in unwrapped(result.output)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(model, text, tmp_path, sent, code):
    command = [sys.executable, "-c", "from hf_fff.cli import main; main()", "convert", str(model)]
    command += [str(tmp_path / "fast"), "--fff", "2x3", "--text", str(text), "--steps", "1000000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    seen = b""
    while b"calibrating" not in seen:  # its progress bar: the output folder is being made by now
        piece = process.stderr.read1()
        assert piece, seen.decode()
        seen += piece
    time.sleep(0.2)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "text.txt"]


def test_env():
    facts = json.loads(run("env", "--json").stdout)
    assert facts["packages"]["torch"] == torch.__version__ and facts["hf_fff"] == __version__
    assert facts["backend"]["cpu"] in ("native", "torch") and facts["kernels"]["libraries"]["cpu"]["status"]
    table = run("env")
    assert table.exit_code == 0 and "kernels.cache" in table.stdout


def in_a_process(*args, **environment):
    command = [sys.executable, "-c", "from hf_fff.cli import main; main()", *map(str, args)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


def test_env_says_why_pytorch_runs():
    facts = json.loads(in_a_process("env", "--json", HF_FFF_BACKEND="torch").stdout)
    assert facts["backend"] == {"cpu": "torch", "isa": None}
    assert facts["kernels"]["libraries"]["cpu"]["reason"] == "HF_FFF_BACKEND=torch"
    wrong = in_a_process("env", HF_FFF_BACKEND="cobol")
    assert wrong.returncode == 1 and "HF_FFF_BACKEND='cobol' is not known" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_build(tmp_path):
    if loader.load("cpu").loaded:
        told = json.loads(run("build", "--json").stdout)
        assert told["loaded"] and Path(told["path"]).is_file()
        shown = run("build", "--output", tmp_path / "lib")
        assert shown.exit_code == 0 and [p.suffix for p in sorted((tmp_path / "lib").iterdir())] == [".json", ".so"]
    broken = in_a_process("build", HF_FFF_CXX="/bin/false", HF_FFF_CACHE=str(tmp_path / "cache"))
    assert broken.returncode == 1 and "failed (exit status 1)" in broken.stderr


def test_bench_layer():
    options = ("--fff", "2x3", "--hidden-size", 16, "--tokens", "1,5", "--rounds", 3)
    result = json.loads(run("bench", "layer", *options, "--json").stdout)
    assert [row["tokens"] for row in result["rows"]] == [1, 5] and result["fff"] == "2x3" and result["cpu"]
    table = run("bench", "layer", *options, "--no-backward")
    assert table.exit_code == 0 and "microseconds" in table.stdout
    for wrong in (["--tokens", "1,x"], ["--tokens", "0"], ["--fff", "2y3"], ["--hidden-size", "0"]):
        assert run("bench", "layer", *wrong).exit_code == 2
