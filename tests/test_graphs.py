"""Recorded training steps: what can be looked at without a GPU."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_bert
from torch import nn
from transformers import TrainerCallback

from hf_fff import Calibration, DistillationArguments, DistillationTrainer, convert_ffn_to_fff, graphs
from hf_fff.graphs import StepGraphs
from hf_fff.surgery import calibration


def batch(tokens, rows=2):
    ids = torch.arange(5, 5 + rows * tokens).view(rows, tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Recorder:
    """In the place of CUDA's: calls again what was called while it recorded."""

    again = None

    def replay(self):
        self.again()


@pytest.fixture
def cuda(monkeypatch):
    """A torch.cuda whose graphs are ``Recorder``; ``broken`` ones raise before or after the step."""
    state = SimpleNamespace(graph=None, broken="")

    class Recording:
        def __init__(self, graph, **_):
            state.graph = graph

        def __enter__(self):
            self.fail("before")

        def __exit__(self, *_):
            state.graph = None
            self.fail("after")

        def fail(self, when):
            if state.broken == when:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

    class Stream:
        def wait_stream(self, other):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    fake = SimpleNamespace(
        Stream=Stream, current_stream=Stream, stream=lambda s: s, graph=Recording, CUDAGraph=Recorder,
        graph_pool_handle=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=fake, OutOfMemoryError=torch.OutOfMemoryError))
    return state


def test_what_is_recorded_gives_what_was_run(cuda):
    """Each shape is run twice, then recorded; inputs, outputs and gradients are those of the step."""
    p, calls = nn.Parameter(torch.tensor(2.0)), []
    steps = StepGraphs([p])

    def run(inputs):
        calls.append(tuple(inputs["input_ids"].shape))
        loss = (p * inputs["input_ids"].float()).sum()
        loss.backward()
        out = (loss.detach(), inputs["attention_mask"].sum())
        if cuda.graph is not None:  # what a GPU would do again

            def again():
                out[0].copy_((p.detach() * inputs["input_ids"].float()).sum())
                out[1].copy_(inputs["attention_mask"].sum())
                recorded.copy_(inputs["input_ids"].float().sum())

            recorded = p.grad
            cuda.graph.again = again
        return out

    kept = []
    for number, tokens in enumerate((16, 16, 32, 16, 16, 32, 16)):
        given = {k: v + number * (k == "input_ids") for k, v in batch(tokens).items()}
        p.grad = None
        loss, seen = steps.step(given, run)
        total = given["input_ids"].sum().float()
        assert loss == p.detach() * total and p.grad == total and seen == 2 * tokens
        kept.append((loss, float(loss)))
    assert calls == [(2, 16), (2, 16), (2, 32), (2, 16), (2, 32)]  # the others were replayed
    assert all(float(loss) == then for loss, then in kept)  # the next replay leaves them alone


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_cannot_be_recorded_is_run(cuda, when):
    p, cuda.broken = nn.Parameter(torch.tensor(2.0)), when
    steps = StepGraphs([p])

    def run(inputs):
        (p * 3).backward()
        return (p.detach() * 3,)

    for _ in range(2):
        p.grad = None
        steps.step(batch(8), run)
    with pytest.warns(
        UserWarning, match="not recorded as CUDA graphs: operation not permitted when stream is capturing$"
    ):
        p.grad = None
        assert steps.step(batch(8), run)[0] == 6 and p.grad == 3
    p.grad = None
    assert steps.step(batch(8), run)[0] == 6 and p.grad == 3


def fails_once(run):
    with pytest.warns(UserWarning, match="steps are not recorded") as told:
        result = run()
    assert sum("not recorded" in str(warning.message) for warning in told) == 1
    return result


@pytest.mark.filterwarnings("ignore:the converted model is not calibrated")
def test_a_training_that_cannot_be_recorded_is_as_any(cuda, tmp_path):
    g = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(5, 120, (12,), generator=g), "attention_mask": torch.ones(12, dtype=torch.long)}
        for _ in range(32)
    ]
    cuda.broken, options = "after", {"max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 3}
    teacher = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def logged(graphed):
        class OnAGpu(TrainerCallback):
            def on_train_begin(self, args, state, control, **_):
                trainer._graphed = graphed

        arguments = DistillationArguments(str(tmp_path), **options, save_strategy="no", disable_tqdm=True, use_cpu=True)
        student = convert_ffn_to_fff(copy.deepcopy(teacher), "2x3", init="random", seed=0)
        trainer = DistillationTrainer(
            student, arguments, teacher=teacher, train_dataset=rows, eval_dataset=rows, callbacks=[OnAGpu()]
        )
        trainer.train()
        # Of paths more are counted here: a GPU does not run what it records.
        names = ("loss", "grad_norm", "hidden", "cosine")
        return [{name: row[name] for name in names} for row in trainer.state.log_history if "loss" in row]

    plain, fallen_back = logged(False), fails_once(lambda: logged(True))
    assert len(plain) == len(fallen_back) == 2
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(plain, fallen_back, strict=True))


def test_a_calibration_that_cannot_be_recorded_is_as_any(cuda, monkeypatch):
    cuda.broken, made = "after", calibration._Fit.__init__

    def on_a_gpu(self, *args):
        made(self, *args)
        self._graphs = StepGraphs([*self.ffn.parameters(), self.bias])

    def unexplained():
        ids = torch.randint(5, 120, (100, 16), generator=torch.Generator().manual_seed(0))
        plan = Calibration(ids, steps=20, progress=False)
        return convert_ffn_to_fff(model, {1: "2x3"}, calibration=plan).calibration_report.unexplained

    model = tiny_bert()
    plain = unexplained()
    monkeypatch.setattr(calibration._Fit, "__init__", on_a_gpu)
    assert fails_once(unexplained) == plain
