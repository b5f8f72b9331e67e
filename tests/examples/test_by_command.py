"""The command's model: which one it is made from, by which package, what is told and kept of it."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from task_rows import tiny_tokenizer
from tiny import tiny_bert

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "experiments"))

import by_command

ROOT = Path(__file__).resolve().parents[2]


def test_from_a_float32_copy(tmp_path, monkeypatch, capsys):
    model, text, seen = tmp_path / "model", tmp_path / "train.txt", {}
    tiny_bert().half().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text.write_text("word1 word2\n")

    def distil(command, *, cwd, env, **_):
        source, out = (Path(word) for word in command[4:6])
        seen.update(command=command, cwd=Path(cwd), path=env["PYTHONPATH"])
        seen["dtypes"] = {weight.dtype for weight in load_file(source / "model.safetensors").values()}
        shutil.copytree(source, out)
        return SimpleNamespace(stdout=json.dumps({"layers": {"0": "2x3"}, "distillation": {"steps": 9, "cosine": 0.5}}))

    monkeypatch.setattr(by_command.subprocess, "run", distil)
    monkeypatch.setattr(by_command, "fidelity", lambda *_: {"unseen": {"cosine": 0.6}})
    given = ["--model", model, "--text", text, "--unseen", text, "--keep", tmp_path / "kept"]
    monkeypatch.setattr(sys, "argv", ["by_command.py", *map(str, given), "--", "--fff", "2x3", "--steps", "9"])
    by_command.main()
    told = json.loads(capsys.readouterr().out)
    assert seen["dtypes"] == {torch.float32} and seen["cwd"] != Path.cwd()
    assert Path(seen["path"].split(":")[0]) == ROOT  # not what lies in the working folder
    assert seen["command"][6:] == ["--text", str(text), "--fff", "2x3", "--steps", "9", "--json"]
    assert told["command"] == "hf-fff distill MODEL OUT --text train.txt --fff 2x3 --steps 9"
    assert (told["run"], told["fff"], told["steps"]) == ("command", "2x3", 9)
    assert told["distilled"] == {"unseen": {"cosine": 0.6}}
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert {weight.dtype for weight in kept.values()} == {torch.float16}
    assert (tmp_path / "kept" / "tokenizer_config.json").exists()
