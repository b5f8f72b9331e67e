"""Clients of a hub, which are processes of their own: huggingface_hub reads its variables when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from task_rows import tiny_tokenizer
from tiny import HEADS, tiny_bert
from transformers import AutoModelForSequenceClassification

from hf_fff.surgery.folder import ModelFolder, convert_folder

ROOT = Path(__file__).resolve().parents[2]

# A process that runs what it is sent. Waiting for a retry is noted, not done.
WORKER = """
import json, sys, time, traceback, warnings
answers, sys.stdout = sys.stdout, sys.stderr
warnings.filterwarnings("ignore")
_sleep = time.sleep
def sleep(seconds):
    waited.append(seconds)
    _sleep(min(seconds, 0.02))
time.sleep = sleep
for line in sys.stdin:
    waited, told, failed = [], [], False
    asked = json.loads(line)
    sys.argv = ["hf-fff", *asked["args"]]
    try:
        exec(asked["code"], {"json": json, "sys": sys, "tell": told.append, "waited": waited})
    except SystemExit as error:
        failed = error.code or 0
    except BaseException:
        traceback.print_exc()
        failed = True
    sys.stderr.flush()
    print(json.dumps([failed, told[0] if told else None]), file=answers, flush=True)
"""
# Without an answer transformers takes it that code is not trusted: after fifteen seconds, of which one is enough here.
SOON = "import transformers.dynamic_module_utils as asks\nasks.TIME_OUT_REMOTE_CODE = 1\n"
CLI = "from hf_fff.cli.app import app\napp(prog_name='hf-fff')"


class Client:
    """Runs Python as somebody with a cache and a token would, against a hub."""

    def __init__(self, hub, home, **variables):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {
            "PYTHONPATH": paths,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "COLUMNS": "80",
            "OMP_NUM_THREADS": "1",  # as in `logits_of`: on some CPUs PyTorch's products depend on it
        }
        home.mkdir(parents=True, exist_ok=True)
        self._said, self._read = home / "said.txt", 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={**kept, **own, **hub.environment(home, token=None), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said.open("wb"),
            text=True,
        )
        self.said = ""  # all that the last call printed

    def __call__(self, code, *args, token="hf_owner", fails=False):
        """What ``code`` calls ``tell`` with; where it is to fail, what it printed. ``fails`` may be an exit code."""
        self.start(code, *args, token=token)
        failed, told = json.loads(self.process.stdout.readline())
        everything = self._said.read_text(encoding="utf-8")
        self.said, self._read = everything[self._read :], len(everything)
        assert failed == fails and (failed is True) == (fails is True), f"{failed}: {self.said}"
        return self.said if fails else told

    def start(self, code, *args, token="hf_owner"):
        """The same, without waiting for the end."""
        who = (
            f"import os\nos.environ['HF_TOKEN'] = {token!r}\n"
            if token
            else "import os\nos.environ.pop('HF_TOKEN', 0)\n"
        )
        print(json.dumps({"code": who + code, "args": [str(a) for a in args]}), file=self.process.stdin, flush=True)

    def cli(self, *args, **options):
        """The command line: what it printed."""
        self(CLI, *args, **options)
        return " ".join(self.said.split())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


LOAD = """
import torch, hf_fff
from transformers import AutoModelForSequenceClassification, AutoTokenizer
options = json.loads(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained("me/model", **options)
AutoTokenizer.from_pretrained("me/model", **options)
tell(model(torch.arange(5, 15)[None]).logits.tolist())
"""


@torch.no_grad()
def logits_of(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder)(torch.arange(5, 15)[None]).logits.tolist()
    finally:
        torch.set_num_threads(threads)


def make_folder(path, head="ForSequenceClassification", fff="2x3", readme=True, **fields):
    """A converted tiny model with its tokenizer."""
    dense = path.with_name(f"{path.name}-dense")
    tiny_bert(HEADS[head], **fields).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    if readme:
        (dense / "README.md").write_text("---\nlicense: mit\n---\n\nThe dense one.\n")
    with pytest.warns(UserWarning, match="not calibrated"):
        convert_folder(ModelFolder.find(str(dense)), path, fff)
    return path
