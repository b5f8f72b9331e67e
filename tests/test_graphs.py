"""Recorded training steps: what can be looked at without a GPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_fff import graphs
from hf_fff.graphs import StepGraphs


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
    monkeypatch.setattr(graphs.torch, "cuda", fake)
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
