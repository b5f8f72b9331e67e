"""The small hub, against the clients that people have: huggingface_hub, transformers and sentence-transformers."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hub_client import LOAD, logits_of
from transformers import AutoModelForSequenceClassification

UPLOAD = """
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("me/model", exist_ok=True)
done = api.upload_folder(repo_id="me/model", folder_path=sys.argv[1], create_pr=len(sys.argv) > 2)
tell({"oid": done.oid, "pr": done.pr_num})
"""
SNAPSHOT = "from huggingface_hub import snapshot_download\ntell(snapshot_download('me/model'))"


def test_push_load_snapshot_offline(hub, client, new_client, folder):
    client(UPLOAD, folder)
    assert hub.files("me/model")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    wanted = logits_of(folder)
    fresh = new_client("fresh")
    assert fresh(LOAD, "{}") == wanted
    path = fresh(SNAPSHOT)
    assert (folder / "config.json").read_bytes() == Path(path, "config.json").read_bytes()
    hub.requests.clear()
    offline = new_client("fresh", HF_HUB_OFFLINE="1")
    assert offline(LOAD, "{}") == wanted and offline(SNAPSHOT) == path and not hub.requests
    assert "offline mode" in offline(LOAD, json.dumps({"cache_dir": f"{path}/none"}), fails=True)


def test_a_revision_is_pinned(hub, client, folder, tmp_path):
    first = client(UPLOAD, folder)["oid"]
    wanted = logits_of(folder)
    changed = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.nn.init.ones_(changed.classifier.bias)
    changed.save_pretrained(folder)
    second = client(UPLOAD, folder)["oid"]
    assert first != second and logits_of(folder) != wanted
    assert client(LOAD, json.dumps({"revision": first})) == wanted
    assert client(LOAD, "{}") == logits_of(folder)
    assert "not a valid git identifier" in client(LOAD, '{"revision": "no-such"}', fails=True)


def test_pull_requests_leave_main_alone(hub, client, folder):
    hub.create("me/model")
    assert client(UPLOAD, folder, "pr")["pr"] == 1
    assert list(hub.files("me/model")) == [".gitattributes"]
    assert client(LOAD, '{"revision": "refs/pr/1"}') == logits_of(folder)


def test_large_files_in_parts(hub, client, folder):
    hub.part = 10_000
    client(UPLOAD, folder)
    size = (folder / "model.safetensors").stat().st_size
    assert len([r for r in hub.sent("/lfs/") if r[0] == "PUT"]) == -(-size // 10_000) > 2
    assert hub.files("me/model")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_what_the_server_answers(hub, client):
    """Against its own definition: hashes, ranges, codes."""
    content = bytes(range(200))
    hub.create("me/model", files={"model.safetensors": content, "small.txt": b"text"})
    code = """
from huggingface_hub import get_hf_file_metadata, hf_hub_url, get_session
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
url = hf_hub_url("me/model", "model.safetensors")
meta = [get_hf_file_metadata(hf_hub_url("me/model", n)) for n in ("model.safetensors", "small.txt")]
part = get_session().get(url, headers={"Range": "bytes=10-19"})
errors = []
for u in ("me/model/resolve/main/none", "me/model/resolve/none/small.txt", "me/none/resolve/main/small.txt"):
    try:
        get_hf_file_metadata(url.split("/me/")[0] + "/" + u)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        errors.append(type(error).__name__)
tell([[m.etag, m.size, m.commit_hash] for m in meta] + [part.status_code, list(part.content), errors])
"""
    large, small, status, part, errors = client(code)
    head = hub.repos["me/model"].refs["main"]
    assert large == [hashlib.sha256(content).hexdigest(), 200, head]
    assert small == ["f3a34851d44d6b97c90fbb99dd3d18c261b9a237", 4, head]  # git hash-object
    assert status == 206 and bytes(part) == content[10:20]
    assert errors == ["RemoteEntryNotFoundError", "RevisionNotFoundError", "RepositoryNotFoundError"]


def test_sentence_transformer(hub, client, minilm_path):
    """Dense, as it is: what is tested is the way through the hub."""
    pytest.importorskip("sentence_transformers")
    client(UPLOAD, minilm_path)
    code = """
from sentence_transformers import SentenceTransformer
tell([SentenceTransformer(name, device="cpu").encode(["A sentence."]).tolist() for name in ("me/model", sys.argv[1])])
"""
    loaded, wanted = client(code, minilm_path)
    assert loaded == wanted
