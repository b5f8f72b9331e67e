"""What the commands work on."""

import pytest
import torch
from task_rows import WORDS, tiny_tokenizer
from tiny import HEADS, tiny_bert

from hf_fff.cli.common import out


@pytest.fixture(autouse=True)
def usual_width(monkeypatch):
    """Of what is no terminal; else COLUMNS would count, which the console reads when it is made."""
    monkeypatch.setattr(out, "_width", 80)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def model(tmp_path):
    """A tiny classifier with its tokenizer, in a folder."""
    folder = tmp_path / "dense"
    dense = tiny_bert(HEADS["ForSequenceClassification"], num_labels=3)
    dense.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, len(WORDS), (120, 12), generator=generator).tolist()
    path.write_text("\n".join(" ".join(WORDS[i] for i in row) for row in rows))
    return path
