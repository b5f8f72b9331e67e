"""Converting a model's folder: a real sentence-transformers one, and what can go wrong."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from tiny import HEADS, outputs, same, tiny_bert, tiny_inputs
from transformers import AutoModel, AutoModelForSequenceClassification, FNetConfig, PreTrainedModel

from hf_fff import FastBertModel
from hf_fff.surgery.folder import ModelFolder, convert_folder

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def convert(source, output, config="2x3", **options):
    return convert_folder(ModelFolder.find(str(source)), Path(output), config, **options)


def listing(root):
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def converted(minilm_path, tmp_path_factory):
    """MiniLM's folder, its listing before, and what it became."""
    before = listing(Path(minilm_path))
    output = tmp_path_factory.mktemp("converted") / "fast"
    with pytest.warns(UserWarning, match="not calibrated"):
        fast = convert(minilm_path, output)
    return before, output, fast


@pytest.fixture
def tiny(tmp_path):
    """A plain transformers folder with this and that in it."""
    folder = tmp_path / "dense"
    tiny_bert(HEADS["ForSequenceClassification"], num_labels=3).save_pretrained(folder)
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "README.md").write_text("about the dense model")
    (folder / "pytorch_model.bin").write_text("dense weights")
    for name in ("onnx", "openvino", "1_Pooling"):
        (folder / name).mkdir()
        (folder / name / "file").write_text(name)
    return folder


def test_sentence_transformer(converted):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    _, output, fast = converted
    model = sentence_transformers.SentenceTransformer(str(output), device="cpu")
    assert isinstance(model[0].auto_model if hasattr(model[0], "auto_model") else model[0].model, FastBertModel)
    vectors = model.encode(["A first sentence.", "And a second one, longer than the first."])
    assert vectors.shape == (2, 384) and abs((vectors**2).sum(1) - 1).max() < 1e-5
    tokens = model.tokenizer(["A first sentence."], return_tensors="pt")
    with torch.no_grad():
        pooled = fast.eval()(**tokens).last_hidden_state.mean(1)[0]
    assert torch.allclose(torch.nn.functional.normalize(pooled, dim=0), torch.tensor(vectors[0]), atol=1e-4)


def test_auto_model(converted):
    _, output, fast = converted
    loaded = AutoModel.from_pretrained(output)
    assert isinstance(loaded, FastBertModel) and len(loaded.config.fff_layers) == 6
    assert same(loaded.state_dict(), fast.state_dict())


def test_files_of_the_folder(converted, minilm_path):
    before, output, _ = converted
    assert listing(Path(minilm_path)) == before
    for name in (
        "modules.json",
        "1_Pooling/config.json",
        "tokenizer.json",
        "vocab.txt",
        "config_sentence_transformers.json",
    ):
        assert (output / name).read_bytes() == (Path(minilm_path) / name).read_bytes()
    assert not (output / "README.md").exists() and not (output / ".gitattributes").exists()
    assert json.loads((output / "config.json").read_text())["model_type"] == "fastbert"
    assert [p.name for p in output.parent.iterdir()] == ["fast"]


def test_plain_folder(tiny, tmp_path):
    before = listing(tiny)
    fast = convert(tiny, tmp_path / "fast", {0: "2x3"})
    assert listing(tiny) == before
    assert set(listing(tmp_path / "fast")) == {
        "config.json",
        "hf_fff.json",
        "model.safetensors",
        "vocab.txt",
        "1_Pooling/file",
    }
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast")
    assert type(loaded) is type(fast) and loaded.num_labels == 3 and list(loaded.config.fff_layers) == [0]
    assert same(loaded.state_dict(), fast.state_dict())
    assert outputs(loaded, tiny_inputs(loaded))["logits"].shape == (3, 3)


def test_transformer_in_a_folder_of_its_own(tiny, tmp_path):
    root = tmp_path / "st"
    shutil.copytree(tiny, root / "0_Transformer")
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling" / "config.json").write_text("{}")
    modules = [{"idx": 0, "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (root / "modules.json").write_text(json.dumps(modules))
    convert(root, tmp_path / "fast")
    got = listing(tmp_path / "fast")
    assert {
        "modules.json",
        "1_Pooling/config.json",
        "0_Transformer/config.json",
        "0_Transformer/model.safetensors",
    } <= set(got)
    assert "0_Transformer/pytorch_model.bin" not in got and "config.json" not in got
    assert AutoModel.from_pretrained(tmp_path / "fast" / "0_Transformer").config.model_type == "fastbert"
    modules[0]["type"] = "sentence_transformers.models.CLIPModel"
    (root / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="CLIPModel', not a transformer"):
        ModelFolder.find(str(root))


def test_dtype_and_options(tiny, tmp_path):
    fast = convert(tiny, tmp_path / "fast", target_layers=[1], init="random", dtype=torch.bfloat16)
    assert fast.dtype == torch.bfloat16
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "fast").dtype == torch.bfloat16


def test_output_exists(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists and is not empty"):
        convert(tiny, out)
    assert set(listing(out)) == {"mine"} and (out / "mine").read_text() == "mine"
    convert(tiny, out, overwrite=True)
    assert "mine" not in listing(out) and isinstance(AutoModel.from_pretrained(out), FastBertModel)
    assert {p.name for p in tmp_path.iterdir()} == {"dense", "out"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_nothing(tiny, tmp_path, monkeypatch, error):
    def failing(self, folder, **_):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").write_text("half of it")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", failing)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    before = listing(tmp_path)
    for path in (tmp_path / "fresh", out):
        with pytest.raises(type(error)) as caught:
            convert(tiny, path, overwrite=True)
        assert caught.value is error
        assert listing(tmp_path) == before and {p.name for p in tmp_path.iterdir()} == {"dense", "out"}


def test_a_bad_config_leaves_nothing(tiny, tmp_path):
    for config, options in (("8y8", {}), ("2x3", {"target_layers": [7]})):
        with pytest.raises(ValueError, match="8y8|7; the model has"):
            convert(tiny, tmp_path / "fast", config, **options)
        assert {p.name for p in tmp_path.iterdir()} == {"dense"}


def test_output_that_holds_the_source(tiny, tmp_path):
    """Replacing it would delete the source."""
    (tmp_path / "holder").mkdir()
    source = tiny.rename(tmp_path / "holder" / "source")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="holds the source"):
        convert(source, tmp_path / "holder", overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("content", ["[]", "{}", "[1]", '[{"path": ""}]', "no JSON"])
def test_a_list_of_modules_that_is_none(tiny, content):
    (tiny / "modules.json").write_text(content)
    with pytest.raises(ValueError, match="modules.json is no list of sentence-transformers' modules"):
        ModelFolder.find(str(tiny))


def test_output_within_the_source(tiny):
    before = listing(tiny)
    for inner in (tiny / "fast", tiny / "1_Pooling" / "fast"):
        with pytest.raises((ValueError, OSError), match="lies in the source"):
            convert(tiny, inner)
    assert listing(tiny) == before
    convert(tiny, tiny, overwrite=True)  # in its own place: it replaces the source
    assert isinstance(AutoModel.from_pretrained(tiny), FastBertModel)


# --- sources that are none ------------------------------------------------------------------------------------------


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match="is no model: there is no config.json in"):
        ModelFolder.find(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; a model is a folder with a config.json"):
        ModelFolder.find(str(tmp_path / "file"))


def test_a_family_that_is_not_known(tmp_path):
    FNetConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is a 'fnet' model.*known families: bert"):
        convert(tmp_path / "other", tmp_path / "fast")
    assert not (tmp_path / "fast").exists()


def test_an_architecture_that_is_not_known(tiny, tmp_path):
    values = json.loads((tiny / "config.json").read_text())
    for name in ("BertLMHeadModel", "MyBert"):
        (tiny / "config.json").write_text(json.dumps({**values, "architectures": [name]}))
        with pytest.raises(ValueError, match=f"architecture '{name}', which has no fast class .known: BertModel"):
            convert(tiny, tmp_path / "fast")
    (tiny / "config.json").write_text(json.dumps({**values, "architectures": None}))
    assert isinstance(convert(tiny, tmp_path / "fast"), FastBertModel)


def test_already_converted(tiny, tmp_path):
    convert(tiny, tmp_path / "fast")
    with pytest.raises(ValueError, match="fast is already converted .model_type='fastbert'"):
        convert(tmp_path / "fast", tmp_path / "faster")
    assert not (tmp_path / "faster").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nobody/has-such-a-model", "the Hub cannot be reached, and no model of that name has been fetched before"),
        ("not//a name", "a model there is called OWNER/NAME"),
        ("./nowhere/at/all", "a model there is called OWNER/NAME"),
    ],
)
def test_neither_a_folder_nor_a_model_of_the_hub(monkeypatch, tmp_path, name, why):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    known = "no model of that name could be had from the Hub: HF_HUB_OFFLINE is set, and the cache does not have it"
    why = known if name.startswith("nobody") else "a model of the Hub has a name such as NAME or OWNER/NAME"
    with pytest.raises(ValueError) as caught:
        ModelFolder.find(name)
    assert str(caught.value) == f"there is no folder {name}, and {why}"


HUB_ERRORS = {
    RepositoryNotFoundError: "there is none, or it is private",
    GatedRepoError: "its owner must let you in first",
    LocalEntryNotFoundError: "it cannot be reached, and the cache does not have it",
    HfHubHTTPError: "500 Server Error",
}


@pytest.mark.parametrize("kind", HUB_ERRORS)
def test_what_the_hub_says(monkeypatch, kind):
    def fetch(*_, **__):
        error = kind.__new__(kind)
        error.args = ("500 Server Error\nmore",)
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(ValueError, match=f"no folder nobody/model, and .* from the Hub: {HUB_ERRORS[kind]}") as caught:
        ModelFolder.find("nobody/model")
    assert "\n" not in str(caught.value)


def test_out_of_memory(tiny, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("hf_fff.surgery.folder.convert_ffn_to_fff", full)
    with pytest.raises(RuntimeError, match="out of memory while converting: lower the calibration's max_tokens"):
        convert(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()
