"""A converted MiniLM as anybody makes it, by ``hf-fff distill``: how near it is to the original, as one line of JSON.

    python examples/experiments/by_command.py --model DIR --text train.txt more.txt --unseen short.txt long.txt --keep DIR \\
        -- --fff 8x8 --steps 6000 --crop 0.5 --graphs --bf16

What follows ``--`` are options of the command.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from quality_minilm import fidelity
from transformers import AutoModel, AutoTokenizer

import hf_fff  # registers the Fast classes
from hf_fff.surgery.text import read_texts

PACKAGE = Path(hf_fff.__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--unseen", type=Path, nargs="+", required=True)
    parser.add_argument("--keep", type=Path, help="folder for the model, its weights in float16")
    own = sys.argv[1:]
    cut = own.index("--") if "--" in own else len(own)
    args, options = parser.parse_args(own[:cut]), own[cut + 1 :]

    with tempfile.TemporaryDirectory() as folder:
        out, source = Path(folder) / "out", Path(folder) / "model"
        shutil.copytree(args.model, source)
        # In float32, whatever it comes in
        AutoModel.from_pretrained(args.model, dtype=torch.float32).save_pretrained(source)
        texts = [option for path in args.text for option in ("--text", str(path.resolve()))]
        command = [sys.executable, "-m", "hf_fff", "distill", str(source), str(out), *texts, *options, "--json"]
        # The package that is imported here, whatever lies in the working folder
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])}
        begun = time.monotonic()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)
        told = json.loads(done.stdout)
        seconds = time.monotonic() - begun
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dense, fast = (AutoModel.from_pretrained(path, dtype=torch.float32).to(device) for path in (args.model, out))
        unseen = {path.stem: read_texts(path) for path in args.unseen}
        shown = ["hf-fff", "distill", "MODEL", "OUT", *(name.rpartition("/")[2] for name in texts), *options]
        result = {
            "run": "command",
            "command": shlex.join(shown),
            "fff": next(iter(told["layers"].values())),
            **told["distillation"],
            "whole_seconds": round(seconds, 1),
            "distilled": fidelity(dense, fast, AutoTokenizer.from_pretrained(out), unseen),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "torch": torch.__version__,
        }
        if args.keep:
            shutil.copytree(out, args.keep, dirs_exist_ok=True)
            fast.half().save_pretrained(args.keep)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
