"""Checkpoints: whole or not there, of the same training or refused, and what goes on from one ends where it would have ended."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from command import deliver, listing
from resuming import STEPS, losses, rows, run, trainer, weights
from safetensors.torch import load_file
from tiny import HEADS, same, tiny_bert
from transformers import TrainerCallback

from hf_fff import convert_ffn_to_fff
from hf_fff.training import checkpoints, last_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.act()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nobody interrupts: its folder, weights and losses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    t = trainer(folder, save_total_limit=None)
    t.train()
    torch.set_num_threads(threads)
    return folder, weights(t.model), losses(t.state)


def ends_as(t, whole):
    return same(weights(t.model), whole[1]) and losses(t.state) == whole[2]


def names(folder):
    return {p.name for p in folder.iterdir()}


def test_what_is_written(whole):
    folder = whole[0]
    assert names(folder) == {f"checkpoint-{n}" for n in range(2, STEPS + 1, 2)}
    manifest = json.loads((folder / "checkpoint-4" / "manifest.json").read_text())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < set(manifest["files"])
    assert set(manifest["files"]) | {"manifest.json"} == set(listing(folder / "checkpoint-4"))
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / "checkpoint-4" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    assert last_checkpoint(folder) == folder / f"checkpoint-{STEPS}" and len(whole[2]) == STEPS + 3


@pytest.mark.parametrize("step", [2, 4, 10], ids=str)  # in the first epoch, before its end, at the end of the second
def test_it_goes_on_to_the_bit(whole, tmp_path, step):
    shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    torch.manual_seed(123)
    t = trainer(tmp_path)
    t.train(resume_from_checkpoint=True)
    assert ends_as(t, whole)


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported what is slow to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resuming"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}")
        multiprocessing.forkserver.ensure_running()
    return lambda *args, **options: context.Process(target=run, args=args, kwargs=options)


def finished(folder, whole):
    kept = load_file(folder / "end.safetensors")
    assert same(kept, whole[1]), [name for name in kept if not torch.equal(kept[name], whole[1][name])]
    assert [tuple(row) for row in json.loads((folder / "losses.json").read_text())] == whole[2]


def test_killed_at_two_steps(whole, processes, tmp_path):
    for event, step in (("step", 5), ("save", 8), (None, None)):
        process = processes(tmp_path, event, step)
        process.start()
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if event else 0)
    finished(tmp_path, whole)
    assert (tmp_path / "steps").read_text().split() == [
        str(n) for n in (*range(1, 6), *range(5, 9), *range(9, STEPS + 1))
    ]


@pytest.mark.full
def test_killed_at_random(processes, tmp_path):
    """Wherever it is, with a checkpoint after each step, so that some kills come while one is written."""
    options = {"max_steps": 80, "save_steps": 1, "save_total_limit": 3}
    t = trainer(tmp_path / "whole", **options)
    t.train()
    draw, folder, kills = random.Random(0), tmp_path / "killed", []
    steps = folder / "steps"

    def made():
        return steps.read_text().split() if steps.exists() else []

    while len(kills) < 12:
        target = len(made()) + draw.randint(1, 3)
        process = processes(folder, **options)
        process.start()
        while process.is_alive() and len(made()) < target:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"it ended after {len(kills)} kills, or failed"
        kills.append(int(made()[-1]))
    process = processes(folder, **options)
    process.start()
    process.join(120)
    finished(folder, (None, weights(t.model), losses(t.state)))
    assert not list(folder.glob(".checkpoint-*")), kills


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit": (lambda c: flip(c / "model.safetensors"), "model.safetensors is not what was written"),
    "cut off": (lambda c: os.truncate(c / "optimizer.pt", 100), "optimizer.pt is not what was written"),
    "a file": (lambda c: (c / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "there is no manifest.json"),
    "half a manifest": (lambda c: os.truncate(c / "manifest.json", 100), "manifest.json cannot be read"),
    "a manifest's bit": (lambda c: flip(c / "manifest.json"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_one_is_left_out(whole, tmp_path, damage):
    act, message = DAMAGE[damage]
    for step in (6, 8):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    act(tmp_path / "checkpoint-8")
    with pytest.warns(UserWarning, match=f"checkpoint-8 is left out, it is torn: {message}"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    with pytest.raises(
        ValueError, match=f"checkpoint-8 is torn: {message}.*others there: checkpoint-6|no whole checkpoint"
    ):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_it_goes_on_before_a_torn_one(whole, tmp_path):
    for step in (6, 8):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    flip(tmp_path / "checkpoint-8" / "optimizer.pt")
    t = trainer(tmp_path)
    with pytest.warns(UserWarning, match="checkpoint-8 is left out"):
        t.train(resume_from_checkpoint=str(tmp_path))
    assert ends_as(t, whole) and checkpoints.torn(tmp_path / "checkpoint-8") is None


def test_nothing_to_go_on_from(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with (
        pytest.warns(UserWarning, match="checkpoint-3 is left out"),
        pytest.raises(ValueError, match="no whole checkpoint in"),
    ):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path / "none") is None


def model(**fields):
    return convert_ffn_to_fff(tiny_bert(HEADS["ForMaskedLM"], **fields), "2x3")


def headless():
    return convert_ffn_to_fff(tiny_bert(), "2x3")


OTHERS = {
    "model": ({"model": headless}, "model is 'FastBertForMaskedLM' there, 'FastBertModel' now"),
    "hidden size": ({"model": lambda: model(hidden_size=64)}, "config.hidden_size is 32 there, 64 now"),
    "trees": ({"config": "1x3"}, "config.fff is .*2.* there, .*1.* now"),
    "seed": ({"seed": 1}, "seed is 42 there, 1 now"),
    "rate": ({"learning_rate": 2e-3}, "learning_rate is 0.001 there, 0.002 now"),
    "rows": ({"data": rows(48)}, "rows of train_dataset is 40 there, 48 now; 1 more, such as steps of an epoch"),
    "batch": ({"per_device_train_batch_size": 4}, "rows of a step is 8 there, 4 now.*gradient_accumulation_steps"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_training_is_refused(whole, tmp_path, name):
    options, message = OTHERS[name]
    options = {k: v() if callable(v) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=f"checkpoint of another training, and is not continued: {message}"):
        trainer(tmp_path / "new", **options).train(resume_from_checkpoint=str(whole[0]))
    assert not (tmp_path / "new").exists() or not names(tmp_path / "new")


def test_the_same_rows_in_smaller_parts(whole, tmp_path):
    """That is the same training; how its batches fall apart is not."""
    t = trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    t.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert t.state.global_step == STEPS


def test_weights_alone_are_refused(tmp_path):
    t = trainer(tmp_path, save_only_model=True, max_steps=2)
    t.train()
    with pytest.raises(ValueError, match="checkpoint-2 holds weights alone"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_disk_that_fills(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = At(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
    try:
        with pytest.raises(
            RuntimeError, match="checkpoint of step 4 cannot be written to .*checkpoint-2 is the last one that was"
        ):
            trainer(tmp_path, callbacks=[fill], save_total_limit=1).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == {"checkpoint-2"} and checkpoints.torn(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth", "trainer_state.json", "manifest.json"])
def test_whatever_cannot_be_written(tmp_path, monkeypatch, file):
    """A disk that is full at any file of the checkpoint."""

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    names_of = {
        "optimizer.pt": "_save_optimizer_and_scheduler",
        "rng_state.pth": "_save_rng_state",
        "trainer_state.json": "store_flos",
    }
    t = trainer(tmp_path)

    def fail():
        if file == "manifest.json":
            monkeypatch.setattr(checkpoints, "_seal", full)
        else:
            monkeypatch.setattr(t, names_of[file], full)

    t.add_callback(At(4, fail))
    with pytest.raises((RuntimeError, OSError), match="No space left"):
        t.train()
    assert names(tmp_path) == {"checkpoint-2"} and checkpoints.torn(tmp_path / "checkpoint-2") is None


def test_the_best_model_is_where_it_is_said(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 1}
    t = trainer(tmp_path, save_steps=5, max_steps=15, **options)
    t.train()
    best = Path(t.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.name == f"checkpoint-{t.state.best_global_step}"
    told = json.loads((best / "trainer_state.json").read_text())
    assert told["best_model_checkpoint"] == str(best) and checkpoints.torn(best) is None
    assert same(weights(t.model), weights(type(t.model).from_pretrained(best)))
    assert len(names(tmp_path)) <= 2


# Interrupted


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize(
    "step", [3, 4, 5]
)  # in between, where a checkpoint is due, where an evaluation and an epoch's end are
def test_interrupted_and_continued(whole, tmp_path, number, raised, step):
    before = signal.getsignal(number)
    t = trainer(tmp_path, callbacks=[At(step, lambda: deliver(number))])
    with pytest.raises(raised) as caught:
        t.train()
    assert raised is KeyboardInterrupt or caught.value.code == 143
    assert signal.getsignal(number) is before
    assert names(tmp_path) == {f"checkpoint-{n}" for n in {*range(2, step, 2), step}}
    assert all(ffn.watch is None for ffn in t.model.modules() if hasattr(ffn, "watch"))
    t = trainer(tmp_path)
    t.train(resume_from_checkpoint=True)
    assert ends_as(t, whole)


def test_interrupted_where_the_best_model_is_kept(tmp_path):
    """The Trainer goes back to the best checkpoint in the end, and with a limit of one removes all others."""
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 1}
    options |= {"save_steps": 5, "max_steps": 15}
    t = trainer(tmp_path, callbacks=[At(7, lambda: deliver(signal.SIGINT))], **options)
    with pytest.raises(KeyboardInterrupt):
        t.train()
    assert "checkpoint-7" in names(tmp_path)
    t = trainer(tmp_path, **options)
    t.train(resume_from_checkpoint=True)
    assert t.state.global_step == 15 and Path(t.state.best_model_checkpoint).is_dir()


def test_interrupted_twice(tmp_path):
    def twice():
        deliver(signal.SIGINT)
        deliver(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[At(3, twice)]).train()
    assert names(tmp_path) == {"checkpoint-2"}


def test_without_checkpoints_one_is_left(whole, tmp_path):
    t = trainer(tmp_path, save_strategy="no", callbacks=[At(3, lambda: deliver(signal.SIGINT))])
    with pytest.raises(KeyboardInterrupt):
        t.train()
    assert names(tmp_path) == {"checkpoint-3"}
    t = trainer(tmp_path)
    t.train(resume_from_checkpoint=True)
    assert ends_as(t, whole)


def test_collators_leave_the_generators_alone():
    """And draw the same for the same rows of an epoch."""

    def collate(some):
        return random.random(), float(torch.rand(1)), len(some)

    seeded, data = checkpoints._SeededCollator(collate, 0), rows(4)
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    first = seeded(data[:2])
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert seeded(data[:2]) == first != seeded(data[2:])
    seeded.epoch = 1
    other = seeded(data[:2])
    assert other != first and other[2] == 2


def test_evaluations_mask_the_same(whole):
    """So that their losses can be compared, and their paths."""
    told = json.loads((whole[0] / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_agreeing_paths_0" in row for row in told) == 2  # of three
    t = trainer(whole[0])
    assert t.evaluate()["eval_loss"] == t.evaluate()["eval_loss"]
