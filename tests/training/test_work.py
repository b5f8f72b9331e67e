"""From folder to folder: what a training that goes on from a trained model starts with."""

import pytest
from task_rows import WORDS
from tiny import same, tiny_bert
from transformers import AutoModel

from hf_fff import Calibration
from hf_fff.surgery.folder import ModelFolder, convert_folder
from hf_fff.surgery.record import read_record
from hf_fff.training import arguments_for, distil_folder, work


@pytest.mark.filterwarnings("ignore:the converted model is not calibrated")
def test_it_starts_with_a_trained_model(tmp_path, tokenizer, monkeypatch):
    """With rates of nearly nothing the result is what it began with, and nothing is converted again."""
    tiny_bert().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    source = ModelFolder.find(str(tmp_path / "dense"))
    begun = convert_folder(source, tmp_path / "begun", "2x3", init="random", seed=5)
    monkeypatch.setattr(work, "convert_ffn_to_fff", lambda *_, **__: pytest.fail("it was converted"))
    options = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-30, "fff_learning_rate": 1e-30}
    args = arguments_for(None, output_dir=str(tmp_path / "work"), use_cpu=True, disable_tqdm=True, **options)
    texts = [f"{WORDS[i % 100]} {WORDS[i * 7 % 100]}" for i in range(100)]
    usual = {"calibration": Calibration(None, steps=1, progress=False), "start": tmp_path / "begun"}
    distil_folder(source, tmp_path / "out", "2x3", texts, args, **usual)
    assert same(AutoModel.from_pretrained(tmp_path / "out").state_dict(), begun.state_dict())
    assert (tmp_path / "begun" / "config.json").is_file() and not (tmp_path / "work").exists()


def test_the_folder_keeps_how_it_was_made(tmp_path, tokenizer):
    """The calibration before it too, after an interruption as well, and no paths."""
    tiny_bert().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: mit\n---\n")
    source = ModelFolder.find(str(tmp_path / "dense"))
    args = arguments_for(
        None,
        output_dir=str(tmp_path / "work"),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=2,
        per_device_train_batch_size=8,
    )
    texts = [f"{WORDS[i % 100]} {WORDS[i * 7 % 100]}" for i in range(200)]
    plan = Calibration(None, steps=3, progress=False)
    model = distil_folder(source, tmp_path / "out", "2x3", texts, args, calibration=plan)
    record = read_record(tmp_path / "out")
    assert record["distillation"] == vars(model.distillation_report) and record["calibration"]["steps"] == 3
    assert record["recipe"]["steps"] == 2 and record["recipe"]["batch_size"] == 8
    assert record["base"]["licence"] == {"license": "mit"} and record["base"]["weights"] == source.weights_digest()
    assert str(tmp_path) not in (tmp_path / "out" / "hf_fff.json").read_text()
