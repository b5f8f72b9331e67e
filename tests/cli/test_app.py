"""The command line: what it writes, what it prints, and that wrong use writes nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import listing, run, unwrapped
from tiny import outputs, same, tiny_inputs
from transformers import AutoModel, AutoModelForSequenceClassification, FNetConfig

from hf_fff import __version__, convert_ffn_to_fff, ops
from hf_fff.bench import machine
from hf_fff.cli import env as env_command
from hf_fff.ops import loader

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def test_version_and_help():
    assert run("--version").stdout.strip() == __version__
    told = run("--help")
    assert told.exit_code == 0 and all(name in told.stdout for name in ("convert", "distill", "env", "build", "bench"))
    for command in (["convert"], ["distill"], ["env"], ["build"], ["bench", "layer"]):
        assert run(*command, "--help").exit_code == 0
    told = run()
    assert told.exit_code == 2 and "convert" in told.output
    assert run("no-such-command").exit_code == 2


def test_convert_without_text(model, tmp_path):
    result = run("convert", model, tmp_path / "fast", "--fff", "2x3")
    assert result.exit_code == 0 and "not calibrated" in result.stdout and "2x3" in result.stdout
    assert "has lost what its FFNs knew: give --text" in unwrapped(result.stderr)
    fast = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert type(fast).__name__ == "FastBertForSequenceClassification"
    assert {c.shorthand for c in fast.config.fff_layers.values()} == {"2x3"} and len(fast.config.fff_layers) == 3


def test_convert_with_text_is_reproducible_and_prints_json_alone(model, text, tmp_path):
    results, weights = [], []
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        options = ("--fff", "2x3", "--text", text, "--steps", 4, "--seed", seed, "--json")
        result = run("convert", model, tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        results.append(json.loads(result.stdout))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    first, fast = results[0], AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    assert first["output"] == str(tmp_path / "one") and first["model_class"] == type(fast).__name__
    assert first["layers"] == {"0": "2x3", "1": "2x3", "2": "2x3"}
    assert first["parameters"] == sum(p.numel() for p in fast.parameters())
    assert first["calibration"]["steps"] == 4 and first["calibration"]["tokens"] > 256
    assert first["calibration"]["unexplained"] == results[1]["calibration"]["unexplained"]
    assert all(0 < value < 1.2 for value in first["calibration"]["unexplained"].values())


def test_convert_prints_what_it_reached(model, text, tmp_path):
    result = run("convert", model, tmp_path / "fast", "--fff", "2x3", "--text", text, "--steps", 5)
    assert (
        result.exit_code == 0
        and "unexplained" in result.stdout
        and "--steps 5 --max-tokens 1680 --seed 0" in result.stdout
    )


@pytest.mark.parametrize("fff", ["mlp:9", "none"])
def test_convert_to_a_control(model, tmp_path, fff):
    result = run("convert", model, tmp_path / "fast", "--fff", fff)
    assert result.exit_code == 0 and fff in result.stdout
    fast = AutoModel.from_pretrained(tmp_path / "fast")
    assert {c.shorthand for c in fast.config.fff_layers.values()} == {fff}


def test_convert_chosen_layers_and_dtype(model, tmp_path):
    result = run("convert", model, tmp_path / "fast", "--fff", "4x2", "--layers", "0,2-2", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    fast = AutoModel.from_pretrained(tmp_path / "fast")
    assert list(fast.config.fff_layers) == [0, 2] and fast.dtype == torch.bfloat16


def test_convert_writes_what_the_library_makes(model, tmp_path):
    assert run("convert", model, tmp_path / "fast", "--fff", "2x3", "--layers", "0-1").exit_code == 0
    dense = AutoModelForSequenceClassification.from_pretrained(model)
    want = convert_ffn_to_fff(dense, "2x3", target_layers=[0, 1])
    fast = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert list(fast.config.fff_layers) == [0, 1] and same(fast.state_dict(), want.state_dict())
    assert same(outputs(fast, tiny_inputs(fast)), outputs(want.eval(), tiny_inputs(want)))
    assert (tmp_path / "fast" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("init", ["dense", "random"])
def test_the_seed_of_the_first_values(model, tmp_path, init):
    weights = []
    for seed in (0, 1):
        options = ("--fff", "2x3", "--init", init, "--seed", seed)
        assert run("convert", model, tmp_path / str(seed), *options).exit_code == 0
        weights.append((tmp_path / str(seed) / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_two_texts_are_more_than_one(model, text, tmp_path):
    options = ("--fff", "2x3", "--steps", 1, "--json", "--text", text)
    one = json.loads(run("convert", model, tmp_path / "one", *options).stdout)
    two = json.loads(run("convert", model, tmp_path / "two", *options, "--text", text).stdout)
    assert two["calibration"]["tokens"] == 2 * one["calibration"]["tokens"] > 0


def test_names_are_printed_as_they_are(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a short name, which the table does not fold
    for name in ("a[red]", "b[/b]", "c:100:"):
        result = run("convert", model, name, "--fff", "2x3")
        assert result.exit_code == 0 and f"FastBertForSequenceClassification in {name}" in unwrapped(result.stdout)


def test_overwrite(model, tmp_path):
    target = tmp_path / "fast"
    target.mkdir()
    (target / "old").write_text("precious")
    refused = run("convert", model, target, "--fff", "2x3")
    assert (
        refused.exit_code == 2
        and "--overwrite" in unwrapped(refused.stderr)
        and listing(target) == {"old": b"precious"}
    )
    assert run("convert", model, target, "--fff", "2x3", "--overwrite").exit_code == 0
    assert "old" not in listing(target) and "model.safetensors" in listing(target)


WRONG_USE = {
    "shorthand": (["--fff", "8y8"], "KxD"),
    "width": (["--fff", "mlp:0"], "width=0 is out of range (allowed: 1 to 16777216)"),
    "trees": (["--fff", "0x3"], "n_trees=0 is out of range (allowed: 1 to 65536)"),
    "depth": (["--fff", "8x99"], "depth=99 is out of range (allowed: 0 to 24)"),
    "no shorthand": ([], "--fff"),
    **{
        f"layers {value!r}": (["--fff", "2x3", "--layers", value], f"{value!r} is not a list of layers such as 0,2,4")
        for value in ("1-x", "", "0,,1", "-1", "0-", "2-0", "0-1-2", "0-99999999999")
    },
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


def no_such(tmp_path):
    return tmp_path / "nowhere" / "at all", "at all, and a model of the Hub has a name such as"


def a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    return path, "is a file"


def no_model(tmp_path):
    path = tmp_path / "empty"
    path.mkdir()
    return path, "there is no config.json"


def other_family(tmp_path):
    path = tmp_path / "fnet"
    FNetConfig().save_pretrained(path)
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
    assert result.exit_code == 2 and message in unwrapped(result.output)
    assert result.stdout == "" and listing(tmp_path) == before


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
    before = listing(tmp_path)
    result = run("convert", model, tmp_path / "new" / "fast", "--fff", "2x3", "--text", path, "--json")
    assert result.exit_code == 2 and message in unwrapped(result.stderr)
    assert result.stdout == "" and listing(tmp_path) == before


def test_damaged_weights(model, tmp_path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    before = listing(tmp_path)
    result = run("convert", model, tmp_path / "fast", "--fff", "2x3")
    assert result.exit_code == 2 and "error: Error while deserializing" in unwrapped(result.stderr)
    assert listing(tmp_path) == before


def test_a_backend_that_is_not_known(model, tmp_path, monkeypatch):
    """Random values need no operator, so that nothing else would look at the setting."""
    monkeypatch.setenv("HF_FFF_BACKEND", "cobol")
    before = listing(tmp_path)
    result = run("convert", model, tmp_path / "fast", "--fff", "2x3", "--init", "random")
    assert result.exit_code == 2 and listing(tmp_path) == before
    assert "HF_FFF_BACKEND='cobol' is not known (allowed: auto, native, torch, hub)" in unwrapped(result.stderr)


def test_layers_that_are_not_there_and_output_in_the_source(model, tmp_path):
    before = listing(tmp_path)
    result = run("convert", model, tmp_path / "fast", "--fff", "2x3", "--layers", "1,7")
    assert result.exit_code == 2 and "--layers has 7; the model has layers 0 to 2" in unwrapped(result.output)
    result = run("convert", model, model / "fast", "--fff", "2x3")
    assert result.exit_code == 2 and "lies in the source" in unwrapped(result.output)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", ["convert", "distill", "choose"])
def test_the_source_is_not_overwritten(model, text, tmp_path, monkeypatch, command):
    """However it is written."""
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    usual = {
        "convert": ("--fff", "2x3"),
        "distill": ("--fff", "2x3", "--steps", 1, "--text", text),
        "choose": ("--task", "mlm", "--keep", 0.5, "--text", text),
    }
    before = listing(tmp_path)
    for output in (model, "dense", "link", tmp_path / "link" / ".." / "dense"):
        result = run(command, model, output, "--overwrite", *usual[command])
        assert result.exit_code == 2 and "is the source, which stays as it is" in unwrapped(result.stderr)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(model, text, tmp_path, sent, exit_code):
    # The handler is set since a shell starts what ends in "&" with SIGINT ignored, which children inherit.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from hf_fff.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "convert", str(model), str(tmp_path / "fast")]
    command += ["--fff", "2x3", "--text", str(text), "--steps", "1000000"]
    before = listing(tmp_path)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    try:
        seen = b""
        while b"calibrating" not in seen:  # its progress bar
            piece = process.stderr.read1()
            assert piece, seen.decode()
            seen += piece
        assert listing(tmp_path) != before, "there is nothing to clean up"
        process.send_signal(sent)
        told = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == exit_code and "interrupted" in told and "Traceback" not in told
    assert listing(tmp_path) == before


def test_env():
    facts = json.loads(run("env", "--json").stdout)
    assert facts["packages"]["torch"] == torch.__version__ and facts["hf_fff"] == __version__
    assert facts["backend"]["cpu"] in ("native", "torch") and facts["kernels"]["libraries"]["cpu"]["status"]
    table = run("env")
    assert table.exit_code == 0 and "kernel cache" in table.stdout and "packages." not in table.stdout
    assert all(problem in table.stdout for problem in facts["problems"])


def report(**changes):
    """As ``machine.report`` gives it, of a machine without faults."""
    library = {"compiler": "/usr/bin/c++", "version": "c++ 12", "status": "native", "loaded": True, "path": "/lib.so"}
    library |= {"origin": "cache", "reason": ""}
    facts = {
        "hf_fff": "1",
        "python": "3",
        "platform": "Linux",
        "packages": {"torch": "2", "peft": "not installed"},
        "cpu": {"name": "a processor", "threads": 2},
        "cuda": "a GPU",
        "backend": {"cpu": "native", "isa": "avx2"},
        "kernels": {"cpu_features": ["fma", "avx2"], "sources": "/s", "cache": "/c", "libraries": {"cpu": library}},
    }
    library |= changes.pop("library", {})
    facts["kernels"]["libraries"] |= changes.pop("libraries", {})
    return {**facts, **changes}


def cells(shown):
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]


def test_env_in_plain_words(monkeypatch):
    monkeypatch.setattr(env_command, "_no_gpu", lambda: None)
    monkeypatch.setattr(machine, "report", report)
    monkeypatch.setenv("HF_FFF_THING", "value")
    shown = run("env").stdout
    for row in (
        ["torch", "2"],
        ["not installed, and optional", "peft"],
        ["its features", "fma avx2"],
        ["GPU", "a GPU"],
    ):
        assert row in cells(shown)
    assert ["what FFFs run in, on the CPU", "C++ kernel, avx2"] in cells(shown)
    assert ["HF_FFF_THING, as set", "value"] in cells(shown)
    assert shown.endswith("Nothing is slow or missing.\n")


def on_gpu(runs, **cuda):
    library = {"compiler": "/usr/local/cuda/bin/nvcc", "version": "release 13.0", "targets": ["90"], "status": "torch"}
    return {
        "cuda": "a GPU, compute capability 9.0",
        "backend": {"cpu": "native", "isa": "avx2", "cuda": runs},
        "libraries": {"cuda": library | cuda},
        "gpu_ways": {"forward": {"1x11": "tiles", "8x8": "dense", "32x6": "dense"}} if runs == "native" else {},
    }


def test_env_with_a_gpu(monkeypatch):
    loaded = {"loaded": True, "path": "/cuda.so", "origin": "built", "reason": "", "status": "native"}
    monkeypatch.setattr(env_command, "_no_gpu", lambda: None)
    monkeypatch.setattr(machine, "report", lambda: report(**on_gpu("native", **loaded)))
    shown = run("env").stdout
    for row in (
        ["GPU", "a GPU, compute capability 9.0"],
        ["what FFFs run in, on the GPU", "CUDA kernels"],
        ["forward (BERT-base, bf16)", "tiles: 1x11; dense: 8x8, 32x6"],
        ["CUDA kernel library", "/cuda.so"],
        ["CUDA compiler", "/usr/local/cuda/bin/nvcc"],
    ):
        assert row in cells(shown)
    assert shown.endswith("Nothing is slow or missing.\n")
    monkeypatch.setattr(machine, "report", report)
    assert "CUDA" not in run("env").stdout


NO_COMPILER = "none: no c++ compiler found (none of c++, g++, clang++ is on PATH). Install g++ or clang++"
PROBLEMS = {
    "PyTorch runs": (
        {"backend": {"cpu": "torch", "isa": None}, "library": {"loaded": False, "reason": "it is too old"}},
        "FFFs run in PyTorch on this CPU, which is slower than the C++ kernel: it is too old",
    ),
    "no compiler": ({"library": {"compiler": NO_COMPILER}}, "Kernels cannot be compiled here: no c++ compiler found"),
    "a temporary one": (
        {"library": {"reason": "the cache cannot be used"}},
        "The C++ kernel: the cache cannot be used",
    ),
    "baseline": (
        {"backend": {"cpu": "native", "isa": "baseline"}},
        "without vector instructions, slowly: this processor",
    ),
    "Triton on the GPU": (
        on_gpu("triton", reason="no nvcc compiler found"),
        "FFFs run in Triton kernels on this GPU, not in the CUDA kernels: no nvcc compiler found",
    ),
    "nothing on the GPU": (
        on_gpu("nothing", reason="no nvcc compiler found"),
        "FFFs do not run on this GPU: HF_FFF_BACKEND=native, and the CUDA kernels cannot be loaded: no nvcc",
    ),
    "a temporary one on the GPU": (on_gpu("native", reason="the cache is full"), "The CUDA kernels: the cache is full"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_env_says_what_is_slow(monkeypatch, name):
    changes, message = PROBLEMS[name]
    monkeypatch.setattr(env_command, "_no_gpu", lambda: None)
    monkeypatch.setattr(machine, "report", lambda: report(**changes))
    monkeypatch.delenv("HF_FFF_ISA", raising=False)
    (problem,) = json.loads(run("env", "--json").stdout)["problems"]
    assert message in problem and f"- {problem}\n" in run("env").stdout


def test_env_says_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "is built for CPUs alone" in run("env").stdout
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "its driver is missing" in run("env").stdout
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides them all" in run("env").stdout


def test_env_cuts_nothing_off(monkeypatch):
    long, named = "".join(f"/folder{i}" for i in range(30)), "fff.cpp:100: [enabled by default] [/x]"
    monkeypatch.setattr(machine, "report", lambda: report(hf_fff=long, cuda=named))
    rows = cells(run("env").stdout)
    start = next(i for i, (label, _) in enumerate(rows) if label == "hf_fff")
    assert "".join(value for _, value in rows[start:])[: len(long)] == long
    assert ["GPU", named] in rows


def test_env_says_why_pytorch_runs(monkeypatch):
    monkeypatch.setattr(loader, "_statuses", {})  # as in a process in which nothing is loaded yet
    monkeypatch.setattr(ops, "has_native", lambda device="cpu": False)
    monkeypatch.setenv("HF_FFF_BACKEND", "torch")
    facts = json.loads(run("env", "--json").stdout)
    assert facts["backend"]["cpu"] == "torch" and facts["backend"]["isa"] is None
    assert facts["kernels"]["libraries"]["cpu"]["reason"] == "HF_FFF_BACKEND=torch"
    assert "slower than the C++ kernel: HF_FFF_BACKEND=torch" in run("env").stdout
    monkeypatch.setenv("HF_FFF_BACKEND", "cobol")
    wrong = run("env")
    assert wrong.exit_code == 2 and wrong.stdout == ""
    assert "HF_FFF_BACKEND='cobol' is not known (allowed: auto, native, torch, hub)" in unwrapped(wrong.stderr)


def test_build(tmp_path):
    assert loader.load("cpu").loaded, loader.load("cpu").reason
    told = json.loads(run("build", "--json").stdout)
    assert told["loaded"] and Path(told["path"]).is_file()
    folder = tmp_path / ("long" * 30) / "[red]"
    shown = run("build", "--output", folder)
    path, origin = shown.stdout.rstrip("\n").rsplit(" ", 1)  # in one line, however long
    assert shown.exit_code == 0 and path == str(folder / "libhf_fff_cpu.so") and origin in ("(cache)", "(built)")
    assert [p.suffix for p in sorted(folder.iterdir())] == [".json", ".so"]


def test_build_says_what_the_compiler_said(tmp_path, monkeypatch):
    compiler, message = tmp_path / "cxx", "fff.cpp:100: error: no such thing [enabled by default] [/x]"
    compiler.write_text(f"#!/bin/sh\necho '{message}'\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("HF_FFF_CXX", str(compiler))
    monkeypatch.setenv("HF_FFF_CACHE", str(tmp_path / "cache"))
    result = run("build")
    assert result.exit_code == 1 and result.stdout == ""
    assert f"{compiler} failed (exit status 3):\n{message}" in result.stderr
    told = json.loads(run("build", "--json").stdout)
    assert not told["loaded"] and told["path"] is None and message in told["reason"]
    assert not list(tmp_path.rglob("*.so"))


def test_build_for_gpus_without_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_FFF_NVCC", str(tmp_path / "nvcc"))
    monkeypatch.setenv("HF_FFF_CACHE", str(tmp_path / "cache"))
    result = run("build", "--cuda", "--arch", "sm_90", "--output", tmp_path / "out")
    assert result.exit_code == 1 and result.stdout == "" and listing(tmp_path) == {}
    assert f"no nvcc compiler found (HF_FFF_NVCC={tmp_path}/nvcc). Install the CUDA toolkit" in result.stderr


def test_convert_says_what_a_calibration_lacks(model, text, tmp_path):
    result = run("convert", model, tmp_path / "a", "--fff", "2x3", "--steps", 2)
    assert result.exit_code == 2 and "needs --text" in unwrapped(result.stderr)
    result = run("convert", model, tmp_path / "b", "--fff", "2x3", "--text", text, "--steps", 1)
    assert result.exit_code == 0 and "no better than a constant" in unwrapped(result.stderr)
