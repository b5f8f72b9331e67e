"""Several processes: what they give is what one gives; what would run; what does not do what it seems to."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config import config_args
from command import run, unwrapped
from resuming import Plain
from task_rows import WORDS, tiny_tokenizer
from test_distillation import pair
from test_distillation import trainer as distillation
from tiny import HEADS, tiny_bert
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification, TrainingArguments
from two_processes import STEPS, rate, trainers

from hf_fff import Calibration, DistillationArguments
from hf_fff.surgery.folder import ModelFolder
from hf_fff.surgery.record import read_record
from hf_fff.training import arguments_for, distil_folder, work
from hf_fff.training.processes import what_would_run

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """Neither launched, nor a config of Accelerate, nor a GPU."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return monkeypatch


def test_nothing_is_launched(bare):
    told = what_would_run()
    assert told.pop("told_by").startswith("nothing")
    want = {
        "processes": 1,
        "how": "one process",
        "backend": None,
        "devices": ["cpu"],
        "mixed_precision": "no",
        "notes": [],
    }
    assert told == want


CONFIGS = {
    "gpu_1": (1, "one process", None, "bf16", []),
    "gpu_8_ddp": (8, "DDP", "nccl", "bf16", []),
    "gpu_8_fsdp2": (8, "FSDP2", "nccl", "bf16", []),
    "cpu_2": (2, "DDP", "gloo", "no", []),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_our_configs(bare, name):
    bare.setattr(config_args, "default_config_file", str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    count, how, backend, precision, notes = CONFIGS[name]
    if name.startswith("gpu"):
        bare.setattr(torch.cuda, "device_count", lambda: count)
        bare.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
    told = what_would_run()
    assert told["told_by"].endswith(f"{name}.yaml")
    assert (told["processes"], told["how"], told["backend"], told["mixed_precision"]) == (
        count,
        how,
        backend,
        precision,
    )
    assert len(told["devices"]) == count and told["notes"] == notes


def test_every_config_is_described():
    folder = ROOT / "examples" / "accelerate"
    assert {p.stem for p in folder.glob("*.yaml")} == set(CONFIGS)
    assert all(f"`{name}.yaml`" in (folder / "README.md").read_text() for name in CONFIGS)


NOTES = {
    "MULTI_CPU": (
        {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True},
        1,
        "one process",
        "without mpirun",
    ),
    "FSDP": ({"distributed_type": "FSDP", "num_processes": 2, "use_cpu": True}, 2, "DDP", "FSDP needs GPUs"),
}


@pytest.mark.parametrize("name", NOTES)
def test_configs_that_do_something_else(bare, tmp_path, name):
    fields, count, how, note = NOTES[name]
    usual = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "debug": False, "fsdp_config": {}}
    place = tmp_path / "config.json"
    place.write_text(json.dumps({**usual, **fields}))
    bare.setattr(config_args, "default_config_file", str(place))
    told = what_would_run()
    assert (told["processes"], told["how"]) == (count, how) and note in told["notes"][0]


def test_a_config_that_cannot_be_read(bare, tmp_path):
    place = tmp_path / "config.json"
    place.write_text("{")
    bare.setattr(config_args, "default_config_file", str(place))
    result = run("env", "--distributed")
    assert result.exit_code == 2 and f"{place} cannot be read" in unwrapped(result.stderr)


def test_launched(bare):
    launched = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in launched.items():
        bare.setenv(name, value)
    told = what_would_run()
    assert (told["processes"], told["how"], told["devices"]) == (4, "DDP", ["cpu", "cpu"])
    assert "use_cpu=True" in told["notes"][0]
    result = run("env", "--distributed", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout) == told
    result = run("env", "--distributed")
    assert result.exit_code == 0 and "DDP" in result.stdout and "gloo" in result.stdout
    bare.setenv("RANK", "1")
    assert run("env", "--distributed").stdout == ""


def arguments(folder, **options):
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **options)


def test_fsdp_on_a_cpu_is_refused(bare, tmp_path):
    student, teacher = pair()
    for options in ({"fsdp": True}, {"fsdp": "full_shard"}):
        with pytest.raises(ValueError, match="fsdp=True: Accelerate does not shard on a CPU"):
            Plain(student, arguments(tmp_path, **options))
    bare.setenv("ACCELERATE_USE_FSDP", "true")
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP: Accelerate does not shard on a CPU"):
        Plain(student, args)
    with pytest.raises(ValueError, match="does not shard on a CPU"):
        distillation(tmp_path, student, teacher)


def test_processes_that_would_train_alone_are_refused(bare, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    if args.device.type != "cpu":
        pytest.skip("there is a GPU")
    bare.setenv("WORLD_SIZE", "2")
    bare.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="use_cpu=False: 2 processes were started"):
        Plain(pair()[0], args)


def test_a_distillation_of_shards_is_refused(tmp_path):
    student, teacher = pair()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(student, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="distillation does not run under fully_shard.*units.*Use DDP"):
            distillation(tmp_path, student, teacher)
    finally:
        dist.destroy_process_group()


def launch(config, module, *words, options=()):
    """A module by ``accelerate launch``: what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "examples" / "accelerate" / f"{config}.yaml"), *options, "-m", module]
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    told = subprocess.run([*command, *map(str, words)], env=environment, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr[-3000:]
    return told.stdout


@pytest.mark.full
def test_two_processes(tmp_path):
    """``accelerate launch`` with our config: DDP without a search for unused parameters, with accumulation, reaches the losses of one
    process with the same rows a step; what one of them was asked to end, both end at the same step, and go on to the bit."""
    launch("cpu_2", "two_processes", tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name in ("plain", "distillation"):
        assert first[name]["weights"] == second[name]["weights"], f"{name}: the processes have different models"
        assert first[name]["unused"] is False
        t = trainers(tmp_path / "alone", 2)[name]()
        t.train()
        alone, two = rate(t)["losses"], first[name]["losses"]
        assert len(alone) == STEPS and alone == pytest.approx(two, rel=1e-4), (
            f"{name}: losses of one process {alone}, of two {two}, relative tolerance 1e-4"
        )
        again = first[f"{name} continued"]
        assert again["losses"] == two and again["weights"] == first[name]["weights"], f"{name}: {again} after {two}"
    assert first["ended at"] == second["ended at"] == {"plain": 3, "distillation": 3}
    metrics = first["plain"]["metrics"]
    assert metrics and second["plain"]["metrics"] == metrics
    t = trainers(tmp_path / "alone", 2)["plain"]()
    t.train()
    for name, value in rate(t)["metrics"].items():
        assert metrics[name] == pytest.approx(value, abs=0.02), name
    # One process goes on where two were: the same rows a step
    t = trainers(tmp_path / "alone", 2)["plain"]()
    with pytest.warns(UserWarning, match="is of 2 processes, and there are 1 now"):
        t.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))
    assert rate(t)["losses"] == pytest.approx(first["plain"]["losses"], rel=1e-4)
    with pytest.raises(ValueError, match="rows of a step is 16 there, 8 now"):
        trainers(tmp_path / "alone", 1)["plain"]().train(resume_from_checkpoint=str(tmp_path / "plain"))


@pytest.fixture
def classifier(tmp_path):
    """A folder of a tiny classifier, and labelled rows of six words each, so that the halves of a step weigh alike."""
    tiny_bert(HEADS["ForSequenceClassification"]).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=6)) for _ in range(200)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    lines = ["sentence\tlabel", *(f"{text}\t{int(text < 'word5')}" for text in texts)]
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def same_weights(one, other, rtol=1e-3, atol=1e-4):
    ours, theirs = (AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in (one, other))
    assert ours.keys() == theirs.keys() and any("weight_in" in name for name in ours)
    for name, value in ours.items():
        if name.endswith(
            "key.bias"
        ):  # softmax does not see it: its gradient is rounding, of which Adam makes whole steps
            continue
        told = {"rtol": rtol, "atol": atol, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(theirs[name], value, **told)


def distill_words(folder, output, task, device):
    data = ("--task", task, "--data", folder / "rows.tsv") if task else ("--text", folder / "texts.txt")
    options = ("--steps", 6, "--calibration-steps", 3, "--batch-size", 16, "--device", device, "--json")
    return ["distill", folder / "dense", output, "--fff", "2x3", *data, *options]


@pytest.mark.full
@pytest.mark.parametrize("task", [None, "classification"])
def test_distill_on_two_processes(classifier, task):
    """The first one calibrates and writes; both train, on halves of the same steps."""
    alone = run(*distill_words(classifier, classifier / "alone", task, "cpu"))
    assert alone.exit_code == 0, alone.output
    told = launch("cpu_2", "hf_fff", *distill_words(classifier, classifier / "two", task, "cpu"))
    one, two = json.loads(alone.stdout)["distillation"], json.loads(told)["distillation"]
    assert two["steps"] == one["steps"] == 6 and two["rows"] == one["rows"]
    for name in ("cosine_before", "cosine", "loss", *(["score_teacher"] if task else [])):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
    same_weights(classifier / "alone", classifier / "two")
    assert not (classifier / "two.work").exists()
    assert read_record(classifier / "two")["recipe"] == read_record(classifier / "alone")["recipe"]


def test_rows_that_cannot_be_shared(bare, classifier):
    bare.setattr(DistillationArguments, "world_size", 3)
    result = run(*distill_words(classifier, classifier / "out", None, "cpu"))
    assert result.exit_code == 2
    assert "16 rows a step cannot be shared by 3 processes" in unwrapped(result.stderr)
    assert not (classifier / "out.work").exists()


@pytest.mark.parametrize(("name", "how"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")])
def test_a_sharded_distillation_is_refused_before_the_calibration(bare, classifier, name, how):
    bare.setattr(work, "check_processes", lambda args: None)  # which refuses FSDP on a CPU
    args = arguments_for(None, output_dir=str(classifier / "work"), use_cpu=True, max_steps=1)
    plan = Calibration(None, steps=1, progress=False)
    bare.setenv(name, "true")
    with pytest.raises(ValueError, match=f"distillation does not run under {how}"):
        distil_folder(
            ModelFolder.find(str(classifier / "dense")), classifier / "out", "2x3", ["a"], args, calibration=plan
        )
    assert not (classifier / "work").exists()


def train_words(folder, output, rows, device="gpu", **more):
    settings = {"max_steps": 12, "per_device_train_batch_size": rows, "learning_rate": 1e-3, "dropout": "false"}
    settings |= {"logging_steps": 4, "report_to": "none", "save_strategy": "no", **more}
    data = ("--data", folder / "rows.tsv", "--eval", folder / "rows.tsv", "--out", output)
    words = ["train", "classify", folder / "dense", *data, "--fff", "2x3", "--calibration-steps", 3, "--json"]
    words += ["--device", "cpu"] if device == "cpu" else []
    return [*words, *(word for name, value in settings.items() for word in ("--set", f"{name}={value}"))]


@pytest.mark.full
def test_train_on_two_processes(classifier):
    alone = run(*train_words(classifier, classifier / "alone", 16, "cpu"))
    assert alone.exit_code == 0, alone.output
    told = launch("cpu_2", "hf_fff", *train_words(classifier, classifier / "two", 8, "cpu"))
    one, two = json.loads(alone.stdout)["training"], json.loads(told)["training"]
    assert two["scores"] == pytest.approx(one["scores"], abs=0.02)
    same_weights(classifier / "alone", classifier / "two")


def on_shards(monkeypatch, *words):
    """``sharding_on_cpu`` on two processes."""
    config = yaml.safe_load((ROOT / "examples" / "accelerate" / "gpu_8_fsdp2.yaml").read_text())["fsdp_config"]
    for name, value in config.items():  # as accelerate launch hands it on
        told = str(value).lower() if isinstance(value, bool) else str(value)
        monkeypatch.setenv(name.upper().replace("LAYER_CLS", "CLS"), told)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")])
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    told = subprocess.run([*command, "-m", "sharding_on_cpu", *map(str, words)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-3000:]
    return told


@pytest.mark.full
def test_losses_of_shards(tmp_path, monkeypatch):
    """FSDP2 on two processes gives the losses of one, step for step."""
    t = trainers(tmp_path / "alone", 2)["plain"]()
    t.train()
    told = on_shards(monkeypatch, "losses", tmp_path / "two")
    assert re.search(r"sharded (\d\d) of \1 parameters", told.stderr), told.stderr
    two = json.loads(next(line for line in told.stdout.splitlines() if line.startswith("[")))
    assert len(two) == STEPS and two == pytest.approx(rate(t)["losses"], rel=1e-4)


@pytest.mark.full
def test_train_sharded(classifier, monkeypatch):
    """``hf-fff train`` under FSDP2 as Accelerate has it, on two processes: units, steps, checkpoints, evaluation, and the folder that it writes."""
    alone = run(*train_words(classifier, classifier / "alone", 16, "cpu"))
    assert alone.exit_code == 0, alone.output
    words = train_words(classifier, classifier / "two", 8, "cpu", save_strategy="steps", save_steps=6)
    told = on_shards(monkeypatch, *words)
    assert re.search(r"sharded (\d\d) of \1 parameters", told.stderr), told.stderr
    one, two = json.loads(alone.stdout)["training"], json.loads(told.stdout)["training"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["scores"] == pytest.approx(one["scores"], abs=0.02)
    same_weights(classifier / "alone", classifier / "two")


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.full
@pytest.mark.gpu
@pytest.mark.parametrize("config", [pytest.param("gpu_8_ddp", marks=two_gpus), "gpu_8_fsdp2"])
def test_train_on_gpus(classifier, config):
    """``hf-fff train`` on two GPUs (or one), replicated or sharded, gives what one process gives with the same rows a step."""
    processes = min(2, torch.cuda.device_count())
    one = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    words = [str(word) for word in train_words(classifier, classifier / "alone", 16)]
    alone = subprocess.run(
        [sys.executable, "-m", "hf_fff", *words],
        env={**os.environ, **one, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    options = ["--num_processes", str(processes), "--mixed_precision", "no"]
    told = launch(config, "hf_fff", *train_words(classifier, classifier / "two", 16 // processes), options=options)
    first, second = json.loads(alone.stdout)["training"], json.loads(told)["training"]
    assert second["steps"] == first["steps"] == 12
    assert second["scores"] == pytest.approx(first["scores"], abs=0.02)
    same_weights(classifier / "alone", classifier / "two", rtol=1e-2, atol=1e-3)


@pytest.mark.full
@pytest.mark.gpu
@two_gpus
def test_distill_on_two_gpus(classifier):
    options = ["--num_processes", "2", "--mixed_precision", "no"]
    words = distill_words(classifier, classifier / "two", "classification", "cuda")
    two = json.loads(launch("gpu_8_ddp", "hf_fff", *words, options=options))["distillation"]
    alone = run(*distill_words(classifier, classifier / "alone", "classification", "cpu"))
    one = json.loads(alone.stdout)["distillation"]
    assert two["steps"] == one["steps"] == 6
    assert two["cosine"] == pytest.approx(one["cosine"], abs=0.02)
    assert type(AutoModelForSequenceClassification.from_pretrained(classifier / "two")).__name__.startswith("Fast")


@pytest.mark.full
@pytest.mark.gpu
def test_fsdp2_on_one_gpu(tmp_path):
    """The way through Accelerate and the Trainer, which does not shard on a CPU: with one NCCL process the losses of one process, to go
    on from a checkpoint, and a model that opens."""
    launch(
        *("gpu_8_fsdp2", "two_processes", tmp_path, "sharded"),
        options=["--num_processes", "1", "--mixed_precision", "no"],
    )
    told = json.loads((tmp_path / "sharded.json").read_text())
    t = trainers(tmp_path / "alone", 2, use_cpu=False)["plain"]()
    t.train()
    alone = [row["loss"] for row in t.state.log_history if "loss" in row]
    assert told["whole"] == pytest.approx(alone, rel=1e-3), f"sharded {told['whole']}, alone {alone}"
    assert told["continued"] == pytest.approx(told["whole"], rel=1e-3)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(opened) is type(t.model)
    for name, p in t.model.named_parameters():
        torch.testing.assert_close(opened.get_parameter(name), p.cpu(), rtol=1e-2, atol=1e-3)
