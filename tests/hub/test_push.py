"""``hf-fff push``: one commit or none, nothing twice, and what goes wrong is said. The table of faults in docs/hub.md is here."""

import json
import re
import subprocess
import sys
import time

import pytest
import torch
from hub_client import CLI, LOAD, SOON, Client, logits_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

FILES = {"README.md", "config.json", "hf_fff.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def titles(hub, repo="me/model", revision="main"):
    return [commit.title for commit in hub.repos[repo].history(revision)]


def uploads(hub):
    """How many bytes of large files arrived."""
    return sum(size for method, _, size in hub.sent("^/lfs/") if method == "PUT")


def test_push_and_load(hub, client, folder, tmp_path):
    said = client.cli("push", folder, "me/model")
    assert "6 of 6 files changed" in said and "hf_owner" not in said
    assert set(hub.files("me/model")) == FILES | {".gitattributes"}
    assert titles(hub) == ["hf-fff push: FastBertForSequenceClassification", "initial commit"]
    assert client(LOAD, json.dumps({"cache_dir": str(tmp_path / "cache")})) == logits_of(folder)
    assert 'from_pretrained("me/model")' in hub.files("me/model")["README.md"].decode()
    assert not (folder / "README.md").exists()  # the source stays as it is
    hub.requests.clear()
    assert "has all of it already" in client.cli("push", folder, "me/model")
    assert len(titles(hub)) == 2 and not uploads(hub) and not hub.sent("/commit/")


def test_dry_run_asks_nobody(hub, client, folder):
    said = client.cli("push", folder, "me/model", "--dry-run", token=None)
    assert not hub.requests and not hub.repos
    assert all(name in said for name in FILES) and "library_name: transformers" in said
    told = json.loads(re.search(r"\{.*\}", client(CLI_JSON, folder), re.DOTALL)[0])
    assert told["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size


CLI_JSON = """
import contextlib, io
from typer.testing import CliRunner
from hf_fff.cli.app import app
tell(CliRunner().invoke(app, ["push", sys.argv[1], "me/model", "--dry-run", "--json"]).stdout)
"""


def test_private_revision_and_pull_request(hub, client, folder):
    client.cli("push", folder, "me/model", "--private", "--revision", "trial/one")
    repo = hub.repos["me/model"]
    assert (
        repo.private
        and set(hub.files("me/model", "trial/one")) > FILES
        and set(hub.files("me/model")) == {".gitattributes"}
    )
    hub.create("group/model")
    assert "/discussions/1" in client.cli("push", folder, "group/model", "--create-pr")
    assert "/discussions/1" in client.cli("push", folder, "group/model", "--create-pr")  # no second one
    assert set(hub.files("group/model")) == {".gitattributes"} and len(hub.repos["group/model"].pulls) == 1
    # Who may not write may still propose.
    hub.create("group/other")
    assert "/discussions/1" in client.cli("push", folder, "group/other", "--create-pr", token="hf_guest")
    assert "is public" in client.cli("push", folder, "group/model", "--private", fails=2)


def test_weights_of_before_go(hub, client, folder):
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.txt": b"kept"}
    hub.create("me/model", files={**old, "config.json": b'{"fff": {}}'})
    client.cli("push", folder, "me/model")
    assert set(hub.files("me/model")) == FILES | {".gitattributes", "notes.txt"}


def test_shards(hub, client, folder):
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    client.cli("push", folder, "me/model")
    assert (
        client(LOAD, "{}") == logits_of(folder) and len([n for n in hub.files("me/model") if ".safetensors" in n]) > 2
    )


def test_remote_code_goes_along(hub, client, folder, tmp_path):
    """And opens the model where there is no hf_fff, if it is trusted, and only then; the folder stays as it was."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "7 of 7 files changed" in client.cli("push", folder, "me/model", "--remote-code")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert set(hub.files("me/model")) == FILES | {".gitattributes", "modeling_fastbert.py"}
    assert "trust_remote_code=True" in hub.files("me/model")["README.md"].decode()
    cache = json.dumps({"cache_dir": str(tmp_path / "cache")})
    alone = tmp_path / "alone.py"
    alone.write_text(
        WITHOUT_HF_FFF + "\nsys.argv = ['', *sys.argv[1:]]\n" + SOON + LOAD.replace("torch, hf_fff", "torch")
    )
    run = f"exec(compile(open({str(alone)!r}).read(), 'alone', 'exec'), globals())"
    fresh = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    told = _in_new_process(client, hub, tmp_path, run, cache, fresh, fails=True)
    assert "trust_remote_code=True" in told and not list((tmp_path / "modules").rglob("modeling*"))
    trusted = json.dumps({"cache_dir": str(tmp_path / "cache"), "trust_remote_code": True})
    got = _in_new_process(client, hub, tmp_path, run, trusted, fresh)  # in PyTorch
    torch.testing.assert_close(torch.tensor(got), torch.tensor(logits_of(folder)))


WITHOUT_HF_FFF = """
import sys

class Blocker:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "hf_fff":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
"""


def _in_new_process(client, hub, tmp_path, code, argument, variables, fails=False):
    made = Client(hub, tmp_path / "home", **variables)
    try:
        return made(code, argument, fails=fails)
    finally:
        made.close()


def test_a_delta_with_a_base_of_the_same_hub(hub, client, new_client, folder, tmp_path):
    dense = folder.with_name(f"{folder.name}-dense")
    client(UPLOAD, dense)
    delta = tmp_path / "delta"
    client.cli("convert", "me/dense", delta, "--fff", "2x3", "--delta")
    client.cli("push", delta, "me/model")
    files = hub.files("me/model")
    assert "fff_delta.safetensors" in files and "model.safetensors" not in files
    card = files["README.md"].decode()
    assert (
        "base_model: me/dense" in card and "the rest comes from me/dense when it is" in card and "license: mit" in card
    )
    fresh = new_client("fresh")
    assert fresh(LOAD, "{}") == client(LOAD.replace("me/model", str(delta)), "{}")
    # Another base under the same name is refused by whoever loads it.
    changed = load_file(dense / "model.safetensors")
    changed["classifier.bias"] += 1
    save_file(changed, dense / "model.safetensors", {"format": "pt"})
    client(UPLOAD, dense)
    assert "is not the base that the delta" in new_client("other")(LOAD, "{}", fails=True)
    # Remote code cannot put it together.
    client(CLI, "push", delta, "me/model", "--remote-code", fails=2)
    assert "is for whole models" in " ".join(client.said.split())


UPLOAD = """
from huggingface_hub import HfApi
HfApi().create_repo("me/dense", exist_ok=True)
HfApi().upload_folder(repo_id="me/dense", folder_path=sys.argv[1])
"""


def test_a_delta_of_a_model_that_only_this_machine_has(hub, client, folder, tmp_path):
    dense, delta = folder.with_name(f"{folder.name}-dense"), tmp_path / "delta"
    client.cli("convert", dense, delta, "--fff", "2x3", "--delta")
    client(CLI, "push", delta, "me/model", fails=2)
    told = " ".join(client.said.split())
    assert "is no repository of the Hub, so nobody else could load this delta" in told and not hub.requests
    (delta / "fff_delta.safetensors").unlink()
    client(CLI, "push", delta, "me/model", fails=2)
    assert "a delta checkpoint without its fff_delta.safetensors" in " ".join(client.said.split())


def test_push_to_hub_of_a_model(hub, client, folder):
    code = """
import hf_fff
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).push_to_hub("me/model")
"""
    client(code, folder)
    assert client(LOAD.replace("AutoTokenizer.from_p", "#"), "{}") == logits_of(folder)


# Bad input: an error before anything is sent


def _no_safetensors(folder):
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _dense(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["fff"]
    (folder / "config.json").write_text(json.dumps(config))


def _cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _linked(folder):
    (folder / "vocab.txt").symlink_to(folder.parent / "fast model é-dense" / "config.json")


def _indexed_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')


def _module_outside(folder):
    (folder / "modules.json").write_text('[{"type": "x.Transformer", "path": ""}, {"type": "y", "path": "../../etc"}]')


BAD_FOLDERS = {
    "is no safetensors file": _no_safetensors,
    "is no model of hf_fff": _dense,
    "not a whole one": _cut_short,
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "no weights to push": lambda folder: (folder / "model.safetensors").unlink(),
    "lies outside": _linked,
    "which is no file of": _indexed_outside,
    "'../../etc', which lies outside": _module_outside,
    "control character": lambda folder: (folder / "a\nb.txt").write_text("x"),
    "is code": lambda folder: (folder / "run.py").write_text("x"),
    "merge conflict": lambda folder: (folder / "README.md").write_text("<<<<<<< HEAD\na\n=======\nb\n>>>>>>> x\n"),
    "is no YAML": lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"),
    "is not the base model's": lambda folder: (folder / "README.md").write_text("---\nlicense: gpl-3.0\n---\n"),
    "licence of the base model is not known": lambda folder: (folder / "hf_fff.json").unlink(),
}


@pytest.mark.parametrize("told", BAD_FOLDERS)
def test_bad_folders(hub, client, folder, told):
    BAD_FOLDERS[told](folder)
    client(CLI, "push", folder, "me/model", fails=2)
    assert told in " ".join(client.said.split()) and not hub.requests


@pytest.mark.parametrize(
    "name", ["model", "me/", "a/b/c", "me/a b", "me/é", "me/../x", "me/a--b", "-me/x", "me/x.git", "me/" + 100 * "a"]
)
def test_bad_names(hub, client, folder, name):
    client(CLI, "push", "--", folder, name, fails=2)
    assert "OWNER/NAME" in client.said and not hub.requests


def test_no_token(hub, client, folder):
    client(CLI, "push", folder, "me/model", token=None, fails=2)
    assert "hf auth login" in client.said and not hub.requests


def test_unicode_and_spaces_in_names(hub, client, folder):
    (folder / "a note é.txt").write_text("x")
    client.cli("push", folder, "me/model")
    assert hub.files("me/model")["a note é.txt"] == b"x"


def test_a_repository_of_another_model(hub, client, folder):
    hub.create("me/model", files={"config.json": b'{"model_type": "bert"}'})
    client(CLI, "push", folder, "me/model", fails=2)
    assert "is left as it is" in client.said and not uploads(hub) and len(titles(hub)) == 1


# Faults


WAITED = "import sys\n" + CLI.replace("app(", "try:\n    app(") + "\nfinally:\n    tell(waited)"
# what: (method, path, action, options) -> a push that goes well, or how it ends
PASSING = {
    "429 with Retry-After, creating": ("POST", "/repos/create", 429, {"headers": {"Retry-After": "7"}}),
    "503 with Retry-After, uploading": ("PUT", "^/lfs/", 503, {"headers": {"Retry-After": "7"}}),
    "503 with Retry-After, committing": ("POST", "/commit/", 503, {"headers": {"Retry-After": "7"}}),
    "500 twice, listing": ("GET", "/tree/", 500, {"times": 2}),
    "connection cut in the middle of an upload": ("PUT", "^/lfs/", "cut", {}),
    "connection cut in the middle of the commit": ("POST", "/commit/", "cut", {}),
    "answer of the commit lost": ("POST", "/commit/", "lost", {}),
    "answer of the creation lost": ("POST", "/repos/create", "lost", {}),
}


@pytest.mark.parametrize("what", PASSING)
def test_faults_that_pass(hub, client, folder, what):
    method, path, action, options = PASSING[what]
    hub.fault(method, path, action, **options)
    waited = client(WAITED, "push", folder, "me/model")
    assert len(titles(hub)) == 2 and set(hub.files("me/model")) > FILES
    assert hub.files("me/model")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    if "Retry-After" in what:
        assert max(waited) >= 7
    assert "hf_owner" not in client.said


def test_a_lost_answer_makes_no_second_pull_request(hub, client, folder):
    hub.create("me/model")
    hub.fault("POST", "/commit/", "lost")
    assert "/discussions/1" in client.cli("push", folder, "me/model", "--create-pr")
    assert len(hub.repos["me/model"].pulls) == 1


LASTING = {
    "503 for long, uploading": ("PUT", "^/lfs/", 503, {"times": 99}, 1, "the same command again"),
    "500 for long, committing": ("POST", "/commit/", 500, {"times": 99}, 1, "the same command again"),
    "connection cut again and again, uploading": ("PUT", "^/lfs/", "cut", {"times": 99}, 1, "the same command again"),
    "connection cut again and again, committing": (
        "POST",
        "/commit/",
        "cut",
        {"times": 99},
        1,
        "the same command again",
    ),
    "wrong hash, uploading": ("PUT", "^/lfs/", "flip", {}, 1, "SHA256 of what arrived"),
    "403, committing": ("POST", "/commit/", 403, {}, 2, "may not write to me/model"),
    "token expires, committing": ("POST", "/commit/", 401, {}, 2, "does not take the token"),
    "disk of the server is full": ("PUT", "^/lfs/", 507, {"message": "Insufficient Storage"}, 1, "answered 507"),
}


@pytest.mark.parametrize("what", LASTING)
def test_faults_that_last(hub, client, folder, what):
    method, path, action, options, code, told = LASTING[what]
    hub.fault(method, path, action, **options)
    client(CLI, "push", folder, "me/model", fails=code)
    assert told in " ".join(client.said.split()) and "Traceback" not in client.said and "hf_owner" not in client.said
    assert titles(hub) == ["initial commit"]  # nothing, not a part
    # The second run sends what is missing, and nothing else.
    there = "/commit/" in path
    hub.faults.clear()
    hub.requests.clear()
    client.cli("push", folder, "me/model")
    assert uploads(hub) == (0 if there else (folder / "model.safetensors").stat().st_size)
    assert len(titles(hub)) == 2 and set(hub.files("me/model")) > FILES


def test_of_several_files_only_the_missing_one_is_sent_again(hub, client, folder):
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sizes = [p.stat().st_size for p in folder.glob("*.safetensors")]
    hub.fault("PUT", "^/lfs/", 400, skip=len(sizes) - 1)
    client(CLI, "push", folder, "me/model", fails=1)
    kept = sum(map(len, hub.objects.values()))
    hub.requests.clear()
    client.cli("push", folder, "me/model")
    assert 0 < uploads(hub) == sum(sizes) - kept < sum(sizes)


def test_a_push_that_is_killed(hub, new_client, client, folder):
    """In the middle of its last file: the second run sends that one alone."""
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sizes = [p.stat().st_size for p in folder.glob("*.safetensors")]
    hub.fault("PUT", "^/lfs/", "hang", skip=len(sizes) - 1, seconds=600)
    victim = new_client("victim")
    victim.start(CLI, "push", folder, "me/model")
    deadline = time.monotonic() + 300
    while len(hub.sent("^/lfs/")) < len(sizes) and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.process.kill()
    kept = sum(map(len, hub.objects.values()))
    assert titles(hub) == ["initial commit"] and 0 < kept < sum(sizes)
    hub.requests.clear()
    client.cli("push", folder, "me/model")
    assert uploads(hub) == sum(sizes) - kept and len(titles(hub)) == 2


@pytest.fixture
def full_disk(tmp_path):
    """A file system with room for 200 kB."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_while_downloading(hub, client, new_client, folder, full_disk, tmp_path):
    """An error that says so, nothing that loads in parts; with room, the same command goes on."""
    client.cli("push", folder, "me/model")
    filler = full_disk / "filler"
    filler.write_bytes(b"x" * 150_000)
    poor = new_client("poor", HF_HUB_CACHE=str(full_disk / "hub"))
    export = ("eval", "me/model", "--task", "classification", "--data", tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    poor(CLI, *export, fails=1)
    told = " ".join(poor.said.split())
    assert "the disk is full, and me/model was not fetched whole" in told and "Traceback" not in told
    poor(LOAD, "{}", fails=True)
    assert not list((full_disk / "hub").rglob("*.safetensors"))
    filler.unlink()
    assert poor(LOAD, "{}") == logits_of(folder)


def test_a_full_disk_while_pushing(hub, client, folder, full_disk):
    """Where another config.json has to be looked at."""
    hub.create("me/model", files={"config.json": b'{"fff": {}, "x": "' + 100_000 * b"y" + b'"}'})
    (full_disk / "filler").write_bytes(b"x" * 150_000)
    code = f"import tempfile\ntempfile.tempdir = {str(full_disk)!r}\n" + CLI
    client(code, "push", folder, "me/model", fails=1)
    told = " ".join(client.said.split())
    assert "this machine's disk is full" in told and "the same command again" in told and len(titles(hub)) == 1
    assert not uploads(hub)
    (full_disk / "filler").unlink()
    client(code, "push", folder, "me/model")
    assert len(titles(hub)) == 2


@pytest.mark.parametrize("path", ["^/lfs/", "/commit/"])
def test_a_server_that_hangs(hub, client, folder, path):
    hub.fault("POST" if "commit" in path else "PUT", path, "hang")
    code = "from pathlib import Path\nfrom hf_fff.hub import push_folder\npush_folder(Path(sys.argv[1]), 'me/model', timeout=0.5)"
    client(code, folder)
    assert len(titles(hub)) == 2 and not hub.outwaited


def test_who_may_not(hub, client, folder):
    client(CLI, "push", folder, "me/model", token="hf_expired", fails=2)
    assert "does not take the token" in client.said and "hf_expired" not in client.said
    client(CLI, "push", folder, "me/model", token="hf_guest", fails=2)
    assert "may not write to me/model" in client.said and not hub.repos
    hub.create("me/model")
    client(CLI, "push", folder, "me/model", token="hf_guest", fails=2)
    assert "may not write to me/model" in client.said and "hf_guest" not in client.said
    assert len(titles(hub)) == 1 and not uploads(hub)


def test_somebody_else_commits_meanwhile(hub, client, folder):
    """Theirs stays, and ours says so."""
    repo = hub.create("me/model")
    hub.fault("POST", "/commit/", 412)
    client(CLI, "push", folder, "me/model", fails=1)
    assert "was changed meanwhile" in client.said and len(repo.history()) == 1


def test_a_repository_that_exists_is_taken(hub, client, folder):
    hub.create("me/model")
    client.cli("push", folder, "me/model")
    assert len(titles(hub)) == 2


# Downloads


def test_download_faults(hub, client, folder, tmp_path):
    client.cli("push", folder, "me/model")
    wanted = logits_of(folder)
    for number, (action, options) in enumerate([("cut", {}), (429, {"headers": {"Retry-After": "7"}}), ("hang", {})]):
        hub.fault("GET", "/resolve/.*safetensors", action, **options)
        assert client(LOAD, json.dumps({"cache_dir": str(tmp_path / str(number))})) == wanted, action
    # Cut for good: an error, no model; what was there already is not loaded in parts.
    hub.fault("GET", "/resolve/.*safetensors", 500, times=99)
    cache = json.dumps({"cache_dir": str(tmp_path / "broken")})
    client(LOAD, cache, fails=True)
    assert not list((tmp_path / "broken").rglob("*.safetensors"))
    hub.faults.clear()
    assert client(LOAD, cache) == wanted


def test_a_download_with_a_wrong_byte(hub, client, folder, tmp_path):
    """Of the right size: huggingface_hub and transformers take it; our commands do not, and fetch it again."""
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += 7  # what no cache has
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    client.cli("push", folder, "me/model")
    hub.fault("GET", "/resolve/.*safetensors", "flip")
    client(LOAD, json.dumps({"cache_dir": str(tmp_path / "theirs")}))
    (taken,) = (tmp_path / "theirs").rglob("*.safetensors")
    assert taken.read_bytes() != (folder / "model.safetensors").read_bytes()
    hub.fault("GET", "/resolve/.*safetensors", "flip")
    find = "from hf_fff.surgery.folder import ModelFolder\ntell(str(ModelFolder.find('me/model').root))"
    assert "did not arrive as it is on the Hub" in client(find, fails=True)
    assert logits_of(client(find)) == logits_of(folder)
