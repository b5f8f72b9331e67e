"""A candidate inside OpenVINO: it looks as it did, and the engine computes its outputs."""

import pytest
import torch
from task_rows import WORDS, tiny_tokenizer
from tiny import HEADS, outputs, tiny_bert, tiny_inputs

from hf_fff import convert_ffn_to_fff
from hf_fff.choosing import engine
from hf_fff.tasks import get_task
from hf_fff.tasks.evaluate import evaluate

pytest.importorskip("openvino.frontend", reason="openvino is not installed")
pytest.importorskip("nncf", reason="nncf is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def test_a_classifier_inside():
    model = convert_ffn_to_fff(
        tiny_bert(HEADS["ForSequenceClassification"], initializer_range=0.1, num_labels=2), "none"
    )
    batch = tiny_inputs(model, 6, 12)
    before = outputs(model, batch)["logits"]
    served = engine.inside(model, [batch], tiny_tokenizer(), 64)
    assert type(served) is type(model) and not served.training
    found = outputs(served, batch)["logits"]
    assert not torch.equal(found, before)  # int8
    torch.testing.assert_close(found, before, atol=0.2 * float(before.abs().max()), rtol=0)
    assert torch.equal(outputs(model, batch)["logits"], before)
    own = dict(model.named_parameters())
    assert all(p is own[name] for name, p in served.named_parameters())
    task = get_task("classification")
    rows = [{"text": " ".join(WORDS[i : i + 4]), "label": i % 2} for i in range(20)]
    data = task.encode(rows, tiny_tokenizer(), model.config)
    assert 0 <= evaluate(served, task, data, tiny_tokenizer())["accuracy"] <= 1
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(outputs(served, batch)["logits"], found)  # the engine's own weights
