"""A hub on this machine, and clients that are processes of their own, for they read their variables when they are imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from server import LocalHub
from task_rows import tiny_tokenizer
from tiny import HEADS, tiny_bert

from hf_fff.surgery.folder import ModelFolder, convert_folder

ROOT = Path(__file__).resolve().parents[2]

# Waiting for a retry is noted, not done.
PRELUDE = """
import json, logging, sys, time, warnings
warnings.filterwarnings("ignore")
waited, _sleep = [], time.sleep
def sleep(seconds):
    waited.append(seconds)
    _sleep(min(seconds, 0.02))
time.sleep = sleep
"""


@pytest.fixture
def hub():
    with LocalHub() as served:
        yield served


@pytest.fixture
def client(hub, tmp_path):
    """``client(code)`` runs Python against the hub, and returns what the code calls ``tell`` with; with ``fails``, what it says
    in the end. ``home`` names a cache."""

    def run(code, *, token="hf_owner", home="home", fails=False, args=(), **env):
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        own = hub.environment(tmp_path / home, token)
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        told = tmp_path / "told.json"
        told.unlink(missing_ok=True)
        tell = f"def tell(value): open({str(told)!r}, 'w').write(json.dumps(value))\n"
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + tell + code, *map(str, args)],
            cwd=tmp_path,
            env={**variables, **own, "PYTHONPATH": paths, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env},
            capture_output=True,
            text=True,
            timeout=300,
        )
        said = done.stdout + done.stderr
        run.said.append(said)
        assert bool(done.returncode) == fails, said
        return said if fails or not told.exists() else json.loads(told.read_text())

    run.said = []
    return run


CLI = "from hf_fff.cli import main\nsys.argv[0] = 'hf-fff'\nmain()"


@pytest.fixture
def cli(client):
    """The command line against the hub: what it prints."""

    def run(*args, **options):
        client(CLI, args=args, **options)
        return client.said[-1]

    return run


def make_folder(path, head="ForSequenceClassification", fff="2x3", readme=True, **fields):
    """A converted tiny model with its tokenizer."""
    dense = path.with_name(f"{path.name}-dense")
    tiny_bert(HEADS[head], **fields).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    if readme:
        (dense / "README.md").write_text("---\nlicense: mit\n---\n\nThe dense one.\n")
    convert_folder(ModelFolder.find(str(dense)), path, fff)
    return path


@pytest.fixture
def folder(tmp_path):
    with pytest.warns(UserWarning, match="not calibrated"):
        return make_folder(tmp_path / "fast model é", num_labels=3)
