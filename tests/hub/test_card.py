"""Model cards: what they say is in the folder or was measured, their snippets run, and what is written by hand stays."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from command import listing, run, unwrapped
from hub_client import make_folder
from safetensors.torch import load_file, save_file
from task_rows import rows_of, tiny_tokenizer
from tiny import HEADS, tiny_bert
from transformers import AutoModel

from hf_fff.hub import card as cards
from hf_fff.hub import look_through, make_card, write_card
from hf_fff.remote import save_remote_code
from hf_fff.surgery.folder import ModelFolder, convert_folder

SECTIONS = ["about", "use", "layers", "training", "results", "speed", "limits", "citation"]


def embedder(path):
    """A sentence-transformers folder."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    made = make_folder(path, "Model")
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "modules.json").write_text(json.dumps(modules))
    return made


def reranker(path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    dense = path.with_name("plain")
    tiny_bert(HEADS["ForSequenceClassification"], num_labels=1).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    made = path.with_name("cross")
    sentence_transformers.CrossEncoder(str(dense), device="cpu").save_pretrained(str(made))
    (made / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.warns(UserWarning, match="not calibrated"):
        convert_folder(ModelFolder.find(str(made)), path, {0: "2x3", 1: "2x3", 2: "mlp:8"})
    return path


KINDS = {
    "encoder": (lambda path: make_folder(path, "Model"), "feature-extraction", "transformers"),
    "embedder": (embedder, "sentence-similarity", "sentence-transformers"),
    "classifier": (lambda p: make_folder(p, num_labels=3), "text-classification", "transformers"),
    "reranker": (reranker, "text-ranking", "sentence-transformers"),
    "tagger": (
        lambda path: make_folder(path, "ForTokenClassification", num_labels=3),
        "token-classification",
        "transformers",
    ),
    "qa": (lambda path: make_folder(path, "ForQuestionAnswering"), "question-answering", "transformers"),
    "masked-lm": (lambda path: make_folder(path, "ForMaskedLM"), "fill-mask", "transformers"),
}


@pytest.fixture(scope="module", params=KINDS)
def carded(request, tmp_path_factory):
    """A folder with its card, and what the metadata is to say."""
    make, pipeline_tag, library = KINDS[request.param]
    folder = make(tmp_path_factory.mktemp(request.param) / "fast")
    card = write_card(folder, repo_id="me/fast", base_model="somebody/dense")
    return folder, card, pipeline_tag, library


def test_sections_and_metadata(carded):
    folder, card, pipeline_tag, library = carded
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == card.text and re.findall(r"hf_fff:begin (\w+)", text) == SECTIONS
    assert text.count("ot measured") >= 3 and "{{" not in text and "{%" not in text
    loaded = huggingface_hub.ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data
    assert (loaded.pipeline_tag, loaded.library_name, loaded.license) == (pipeline_tag, library, "mit")
    assert loaded.base_model == "somebody/dense" and loaded.to_dict()["base_model_relation"] == "finetune"
    assert "hf_fff" in loaded.tags and loaded.eval_results is None
    assert ModelFolder.find(str(folder)).weights_digest() in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


def snippets_of(text, folder):
    """The Python of a card, with a local copy in the place of the repository."""
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert snippets and all('"me/fast"' in snippet for snippet in snippets)
    return [snippet.replace('"me/fast"', repr(str(folder))) for snippet in snippets]


def test_snippets_run(carded):
    """Each in a scope of its own."""
    folder, card, _, library = carded
    snippets = snippets_of(card.text, folder)
    assert "trust_remote_code" not in card.text and "is code." in card.text
    assert any("hf_fff.openvino" in s for s in snippets) and any("sentence_transformers" in s for s in snippets) == (
        library == "sentence-transformers"
    )
    for snippet in snippets:
        if "openvino" in snippet and find_spec("openvino") is None:
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="this CPU has no bfloat16")
            exec(snippet, {"__name__": "snippet"})


_ALONE = """
import sys

class Blocker:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "hf_fff":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
for snippet in sys.argv[1:]:
    exec(snippet, {"__name__": "snippet"})
"""


@pytest.mark.parametrize("kind", ["classifier", "embedder"])
def test_snippets_of_remote_code_run_where_there_is_no_hf_fff(kind, tmp_path):
    folder = KINDS[kind][0](tmp_path / "fast")
    save_remote_code(AutoModel.from_pretrained(folder), folder)
    text = write_card(folder, repo_id="me/fast").text
    assert "modeling\\_fastbert.py here is code" in text and "Nothing in this repository is code" not in text
    (snippet,) = (s for s in snippets_of(text, folder) if "trust_remote_code=True" in s)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, snippet],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "fast", num_labels=3)


def test_layers_are_those_of_the_config(tmp_path):
    folder = reranker(tmp_path / "fast")
    text = make_card(look_through(folder)).text
    assert "| 0 to 1 | 2x3 | 8 | 30 | 64 |" in text and "| 2 | mlp:8 | 8 | 8 | 64 |" in text


def test_what_is_written_by_hand_stays(folder):
    write_card(folder)
    path = folder / "README.md"
    text = path.read_text()
    text = text.replace("---\nlicense: mit\n", "---\n# a remark\nlicense: mit\nlanguage: en\n", 1)
    text = text.replace("<!-- hf_fff:begin use -->", "A paragraph of ours.\n\n<!-- hf_fff:begin use -->")
    text = text.replace("## Limits", "## No limits at all")
    path.write_text(text + "\n## Thanks\n\nTo all.\n")
    write_card(folder)
    once = path.read_text()
    assert "A paragraph of ours.\n\n<!-- hf_fff:begin use -->" in once and once.endswith("\n## Thanks\n\nTo all.\n")
    assert "# a remark" in once and "language: en" in once  # metadata that says what it should is not written anew
    assert "## Limits" in once and "No limits" not in once
    write_card(folder)
    assert path.read_text() == once
    assert 'from_pretrained("fast")' in once
    write_card(folder, repo_id="me/other")
    renamed = path.read_text()
    write_card(folder)
    assert path.read_text() == renamed and 'from_pretrained("me/other")' in renamed


def test_a_card_without_marks_gets_them_in_the_end(folder):
    (folder / "README.md").write_text("# Mine\n\nAll by hand.\n")
    text = write_card(folder).text
    assert "# Mine\n\nAll by hand.\n\n<!-- hf_fff:begin about -->" in text
    assert write_card(folder).text == text


def test_how_it_was_made(tmp_path):
    """The calibration that the folder keeps, and nothing of where it was made."""
    from hf_fff import Calibration

    dense = tmp_path / "dense"
    tiny_bert(HEADS["Model"]).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    rows = torch.randint(5, 100, (60, 12), generator=torch.Generator().manual_seed(0))
    plan = Calibration(rows, steps=3, progress=False)
    model = convert_folder(ModelFolder.find(str(dense)), tmp_path / "fast", "2x3", calibration=plan)
    report = model.calibration_report
    text = make_card(look_through(tmp_path / "fast"), licence="mit").text
    assert f"on {report.tokens} tokens of unlabelled text: 3 steps a layer" in text and "Distillation: none." in text
    values = report.unexplained.values()
    assert f"{min(values):.3f} to {max(values):.3f}" in text
    assert str(tmp_path) not in text + (tmp_path / "fast" / "hf_fff.json").read_text()


def test_names_are_escaped(folder):
    """What comes from configs cannot write Markdown, HTML, marks or Jinja."""
    evil = "x | y\n<script>alert(1)</script> <!-- hf_fff:end training --> [a](b) {{ 7 * 6 }} `c`"
    record = json.loads((folder / "hf_fff.json").read_text())
    record["hf_fff"] = evil
    record["calibration"] = {"tokens": evil, "steps": 1, "seconds": 1.0, "unexplained": {}}
    (folder / "hf_fff.json").write_text(json.dumps(record))
    text = write_card(folder).text
    assert "<script>" not in text and "[a](b)" not in text and "42" not in re.findall(r"tokens.*", text)[0]
    assert text.count("hf_fff:end training -->") == 1
    assert write_card(folder).text == text


# Results


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A classifier, the same without FFNs and with an MLP, what eval says of them, and the dense one."""
    root = tmp_path_factory.mktemp("measured")
    names = {"fast": "2x3", "without": "none", "small": "mlp:8"}
    folders = {name: make_folder(root / name, num_labels=3, fff=fff) for name, fff in names.items()}
    data = root / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows_of("classification", 12)))
    files = {}
    for name, folder in folders.items():
        options = ("--none", folders["without"]) if name == "fast" else ()
        done = run(
            *("eval", folder, "--task", "classification", "--data", data, "--teacher", root / "fast-dense", "--json"),
            *options,
        )
        assert done.exit_code == 0, done.output
        files[name] = root / f"{name}.json"
        files[name].write_text(done.stdout)
    return folders, files


@pytest.fixture
def copy(measured, tmp_path):
    folders, files = measured
    shutil.copytree(folders["fast"], tmp_path / "fast")
    return tmp_path / "fast", files


def test_results_with_the_dense_model_and_both_controls(copy, measured):
    folder, files = copy
    card = write_card(folder, [files["fast"], files["small"]])
    told = {name: json.loads(path.read_text()) for name, path in files.items()}
    row = next(line for line in card.text.splitlines() if line.startswith("| accuracy |"))
    accuracy = [told["fast"][role]["metrics"]["accuracy"] for role in ("model", "teacher", "none")]
    accuracy.append(told["small"]["model"]["metrics"]["accuracy"])
    assert row == "| accuracy | " + " | ".join(f"{value:.4f}" for value in accuracy) + " |"
    assert "| | this model (2x3) | the dense model | no FFN at all | mlp:8 |" in card.text
    assert (
        "classification on rows.jsonl, 12 rows" in card.text and "How the trees are used: not measured" not in card.text
    )
    (result,) = card.metadata["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == told["fast"]["model"]["metrics"]
    loaded = huggingface_hub.ModelCard(card.text, ignore_metadata_errors=False).data
    assert {r.metric_type for r in loaded.eval_results} == set(told["fast"]["model"]["metrics"])
    assert not card.benchmarks and not (folder / ".eval_results").exists()  # rows.jsonl is no data set of the Hub
    # They are kept, without paths of this machine, and the next card has them.
    kept = sorted((folder / "fff_results").glob("*.json"))
    assert len(kept) == 2 and not any(str(files["fast"].parent) in path.read_text() for path in kept)
    assert write_card(folder).text == card.text == write_card(folder, [files["fast"]]).text


def test_scores_on_data_sets_of_the_hub(copy):
    """Are also written as the Hub reads them, and go when they are measured no more."""
    folder, files = copy
    result = json.loads(files["fast"].read_text())
    result["data"]["sources"] = ["somebody/reviews:small:test"]
    given = folder.parent / "hub.json"
    given.write_text(json.dumps(result))
    card = write_card(folder, [given], repo_id="me/fast")
    (path,) = (folder / ".eval_results").iterdir()
    (entry,) = huggingface_hub.parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id) == ("somebody/reviews", "small")
    assert entry.value == result["model"]["metrics"]["accuracy"]
    assert entry.notes.startswith("accuracy on 12 rows of test; weights ") and "/me/fast/blob/main/" in entry.source_url
    assert (folder / "fff_results" / entry.source_url.rsplit("/", 1)[1]).is_file()
    (listed,) = card.metadata["model-index"][0]["results"]
    about = {"name": "somebody/reviews:small:test", "type": "somebody/reviews", "config": "small", "split": "test"}
    assert listed["dataset"] == about
    assert write_card(folder).text == card.text
    told = json.loads(run("push", folder, "me/fast", "--dry-run", "--json").stdout)
    assert f".eval_results/{path.name}" in told["files"]
    for kept in (folder / "fff_results").iterdir():
        kept.unlink()
    write_card(folder)
    assert not list((folder / ".eval_results").iterdir())


def test_what_was_not_measured_says_so(copy):
    folder, files = copy
    alone = json.loads(files["fast"].read_text())
    del alone["teacher"], alone["none"]
    (folder.parent / "alone.json").write_text(json.dumps(alone))
    text = write_card(folder, [folder.parent / "alone.json"]).text
    row = next(line for line in text.splitlines() if line.startswith("| accuracy |"))
    assert row.count("not measured") == 3


def test_speed_with_its_machine(copy, measured):
    folder, files = copy
    folders, _ = measured
    names = [str(folders["fast"].with_name("fast-dense")), str(folder)]
    identities = [ModelFolder.find(name).identity() for name in names]
    micro = dict(zip(names, (20.0, 10.0), strict=True))
    timing = {"workload": "1x16", "tokens": 16, "seconds": micro, "microseconds": micro, "ratios": micro}
    result = {"cpu": "A machine", "threads": 2, "rows": [timing], "models": dict(zip(names, identities, strict=True))}
    path = folder.parent / "bench.json"
    path.write_text(json.dumps(result))
    text = write_card(folder, [files["fast"], path]).text
    assert "On cpu A machine, threads 2:" in text and "| 1x16 | 20 | 10 (2.00x) |" in text
    assert "the dense model, µs a token | this model (2x3), µs a token" in text
    del result["models"]
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="does not say which weights"):
        write_card(folder, [path])


def test_results_of_other_weights_are_refused(copy, measured):
    folder, files = copy
    before = listing(folder)
    for other in (files["small"], files["without"]):  # controls, of nothing that was measured
        with pytest.raises(ValueError, match="is of other weights"):
            write_card(folder, [other])
    assert listing(folder) == before
    write_card(folder, [files["fast"], files["small"]])
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is of other weights"):
        write_card(folder)
    done = run("push", folder, "me/model", "--dry-run")
    assert done.exit_code == 2 and "is of other weights" in unwrapped(done.stderr)


def test_a_control_of_other_data_is_refused(copy):
    folder, files = copy
    other = json.loads(files["small"].read_text())
    other["data"]["sha256"] = "0" * 64
    path = folder.parent / "other.json"
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="measured on the same data"):
        write_card(folder, [files["fast"], path])


# Bad input


BAD_CARDS = {
    "<<<<<<< HEAD\nx\n=======\ny\n>>>>>>> z\n": "marks of a merge conflict",
    "---\ntags: [\n---\n": "is no YAML",
    "---\n- a\n---\n": "must be a mapping",
    "---\nlicense: mit\n": "has no end",
    "<!-- hf_fff:begin use -->\n": "hf_fff:begin use has no end",
    "<!-- hf_fff:end use -->\n": "broken at hf_fff:end use",
    "<!-- hf_fff:begin use -->\n<!-- hf_fff:begin speed -->\n<!-- hf_fff:end use -->\n": "broken at hf_fff:begin speed",
    "---\nlicense: gpl-3.0\n---\n": "'gpl-3.0' is not the base model's, which is 'mit'",
}


@pytest.mark.parametrize("text", BAD_CARDS)
def test_bad_cards(folder, text):
    (folder / "README.md").write_text(text)
    before = listing(folder)
    with pytest.raises(ValueError, match=re.escape(BAD_CARDS[text])):
        write_card(folder)
    assert listing(folder) == before


def test_the_licence_is_asked_for(tmp_path):
    folder = make_folder(tmp_path / "fast", num_labels=3, readme=False)
    done = run("card", folder)
    assert (
        done.exit_code == 2
        and "give it with --license" in unwrapped(done.stderr)
        and not (folder / "README.md").exists()
    )
    done = run("card", folder, "--license", "apache-2.0", "--base-model", "me/dense", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["metadata"]["license"] == "apache-2.0"
    assert run("card", folder).exit_code == 0  # known now
    for options in (("--license", "My licence"), ("--base-model", "x y"), ("--repo-id", "nobody")):
        assert run("card", folder, *options).exit_code == 2


def test_a_head_without_a_card(tmp_path):
    folder = make_folder(tmp_path / "fast", "ForMultipleChoice")
    with pytest.raises(ValueError, match="no card for the architecture 'FastBertForMultipleChoice'"):
        write_card(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"task": 1, "model": {}}', '{"rows": []}'])
def test_files_that_are_no_results(folder, content):
    path = folder.parent / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="results.json"):
        write_card(folder, [path])


def test_templates_are_found_in_the_project_and_in_the_wheel():
    names = set(cards._environment().list_templates())
    assert {f"{kind.template}.md" for kind in [*cards.KINDS.values(), cards.EMBEDDER, cards.RERANKER]} < names


def test_the_sample_card():
    """What is kept of `make publish-example` is a card of today: all sections, metadata that can be read, real numbers."""
    (path,) = (Path(__file__).parents[2] / "examples" / "cards").glob("*.md")
    card = huggingface_hub.ModelCard.load(path, ignore_metadata_errors=False)
    assert re.findall(r"hf_fff:begin (\w+)", card.text) == SECTIONS and "not measured" not in card.text
    for result in card.data.eval_results:
        assert f"| {cards._escaped(result.metric_type)} | {result.metric_value:.4f} |" in card.text
