"""What a repository holds is data until its owner is trusted: no code of it runs, no file of it leaves its folder, no token is told."""

import json
import pickle

import pytest
from hub_client import CLI, SOON
from safetensors.torch import load_file

EVIL = "open({marker!r}, 'w').close()\n"


class _Runs:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "it ran"


@pytest.fixture
def dense(folder):
    """Files of a dense model."""
    return {p.name: p.read_bytes() for p in folder.with_name(f"{folder.name}-dense").iterdir()}


OPEN = """
import hf_fff
from transformers import AutoModel
AutoModel.from_pretrained("me/evil")
"""
COMMANDS = [
    ("convert", "me/evil", "OUT", "--fff", "2x3"),
    ("eval", "me/evil", "--task", "classification", "--data", "DATA"),
    ("push", "OUT", "me/other"),
]


@pytest.mark.parametrize("model_type", ["bert", "fastbert", "evil"])
def test_code_of_a_repository_does_not_run(hub, client, dense, marker, tmp_path, model_type):
    config = json.loads(dense["config.json"])
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    code = EVIL.format(marker=str(marker))
    files = {
        **dense,
        "config.json": json.dumps(config).encode(),
        "evil.py": code.encode(),
        "modeling_fastbert.py": code.encode(),
    }
    hub.create("me/evil", files=files)
    _open_all(client, tmp_path)
    assert not marker.exists() and hub.sent("/me/evil/resolve/")


def _open_all(client, tmp_path):
    """In each way, whether it goes well or not."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0}\n')
    places = {"OUT": str(tmp_path / "out"), "DATA": str(tmp_path / "rows.jsonl")}
    for words in COMMANDS:
        given = [places.get(word, word) for word in words]
        client(SOON + "import sys\ntry:\n    exec(" + repr(CLI) + ")\nexcept SystemExit:\n    pass\ntell(None)", *given)
    client(SOON + "try:\n    exec(" + repr(OPEN) + ")\nexcept Exception:\n    pass\ntell(None)")


def test_a_pickle_does_not_run(hub, client, dense, marker, tmp_path):
    files = {name: content for name, content in dense.items() if name != "model.safetensors"}
    hub.create("me/evil", files={**files, "pytorch_model.bin": pickle.dumps(_Runs(str(marker)))})
    client(CLI, "convert", "me/evil", tmp_path / "out", "--fff", "2x3", fails=2)
    assert "pickle" in client.said and "Traceback" not in client.said
    _open_all(client, tmp_path)
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["../../elsewhere", "/elsewhere"])
def test_modules_outside_of_their_folder(hub, client, dense, tmp_path, path):
    """A list of modules from a repository names no place outside of it, neither to read nor to write."""
    modules = [{"idx": 0, "name": "0", "path": path, "type": "sentence_transformers.models.Transformer"}]
    hub.create("me/evil", files={**dense, "modules.json": json.dumps(modules).encode()})
    client(CLI, "convert", "me/evil", tmp_path / "out", "--fff", "2x3", fails=2)
    assert "lies outside of" in " ".join(client.said.split()) and not (tmp_path / "out").exists()


def test_tokens_are_not_told(hub, new_client, folder, tmp_path):
    """Not even by a client that logs all it does."""
    loud = new_client("loud", HF_HUB_VERBOSITY="debug", HF_DEBUG="1")
    loud.cli("push", folder, "me/model")
    said = loud.said
    hub.fault("POST", "/commit/", 401)
    loud(CLI, "push", folder, "me/other", fails=2)
    assert "me/model" in said and "hf_owner" not in said + loud.said
    everything = [*folder.rglob("*"), *(tmp_path / "loud").rglob("*")]
    assert not [p for p in everything if p.is_file() and b"hf_owner" in p.read_bytes()]
    assert not any(b"hf_owner" in content for content in hub.files("me/model").values())
    assert load_file(folder / "model.safetensors")
