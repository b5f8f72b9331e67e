"""A small Hub for tests, and for trying things without a network: the part of the protocol that huggingface_hub uses for models, and
for reading kernels, whose names here begin with ``kernels/``.

    python tests/hub/hub_server.py [--port 8080]        # prints what to set before a client is started

Repositories live in memory. Any file of ``LFS_FROM`` bytes or more, and any ``.safetensors``, goes the way of large files: asked
for in a batch, sent by PUT (in parts above ``PART``), committed by its hash. There is no xet: a client chooses that by itself,
unless ``HF_HUB_DISABLE_XET=1`` is set before huggingface_hub is imported.

Faults are injected by ``hub.fault(method, pattern, action)``, and act on the next requests that fit.
"""

import argparse
import base64
import hashlib
import json
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_FROM = 1_000_000
PART = 1 << 30
NOW = "2025-01-01T00:00:00.000Z"


@dataclass
class File:
    """What a path of a commit refers to."""

    content: bytes
    large: bool

    @cached_property  # of 90 MB, on a busy machine, it takes longer than a client waits
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob(self):
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.large else self.blob

    def entry(self, path):
        large = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return {
            "type": "file",
            "path": path,
            "size": len(self.content),
            "oid": self.blob,
            **({"lfs": large} if self.large else {}),
        }


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, File]
    parent: str | None


@dataclass
class Repo:
    name: str
    owner: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[dict] = field(default_factory=list)

    def add(self, title, files, parent):
        content = sorted((path, file.etag) for path, file in files.items())
        oid = hashlib.sha1(repr((self.name, len(self.commits), title, content)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, files, parent)
        return oid

    def resolve(self, revision):
        oid = self.refs.get(revision, revision)
        return self.commits.get(oid)

    def history(self, revision="main"):
        """Commits, the newest first."""
        found, commit = [], self.resolve(revision)
        while commit:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found


@dataclass
class Fault:
    """What happens to requests that fit, ``times`` times, after ``skip`` of them.

    ``action``: a status (with ``headers``), or "cut" (the connection ends in the middle of the request's body, or of the
    answer's), "hang" (nothing comes for ``seconds``), "lost" (it is done, and the answer never comes), "flip" (one byte of the
    body arrives, or is answered, as another).
    """

    method: str
    pattern: str
    action: object
    times: int = 1
    skip: int = 0
    headers: dict = field(default_factory=dict)
    seconds: float = 600.0
    message: str = ""


class Refused(Exception):
    def __init__(self, status, message, code=None, body=None):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class LocalHub:
    """``with LocalHub() as hub``: serves on a free port of this machine. ``tokens`` maps a token to whom it is, and what he may."""

    def __init__(self, port=0):
        self.reset()
        self.lock = threading.RLock()
        self._stopped = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home, token="hf_owner"):
        """Variables for a client; they must be set before it imports huggingface_hub."""
        own = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        return own | ({"HF_TOKEN": token} if token else {})

    def fault(self, method, pattern, action, **options):
        self.faults.append(Fault(method, pattern, action, **options))

    def reset(self):
        """As it was at first, on the same port."""
        self.tokens = {
            "hf_owner": {"name": "me", "may": {"me", "group"}},
            "hf_guest": {"name": "guest", "may": {"guest"}},
        }
        self.repos, self.objects, self.parts, self.faults = {}, {}, {}, []
        self.requests = []  # (method, path, bytes of the body that arrived)
        self.outwaited = 0  # how many hanging requests a client did not give up
        self.part = PART

    def sent(self, pattern):
        """The requests to a path, as ``(method, path, bytes)``."""
        return [r for r in self.requests if re.search(pattern, r[1])]

    def files(self, repo, revision="main"):
        commit = self.repos[repo].resolve(revision)
        return {path: file.content for path, file in commit.files.items()}

    def create(self, repo, owner="me", private=False, files=None):
        made = self.repos[repo] = Repo(repo, owner, private)
        stored = {path: File(content, self.is_large(path, len(content))) for path, content in (files or {}).items()}
        start = {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}
        made.refs["main"] = made.add("initial commit", start | stored, None)
        self.objects.update({f.sha256: f.content for f in stored.values() if f.large})
        return made

    @staticmethod
    def is_large(path, size):
        return size >= LFS_FROM or path.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # One request

    def serve(self):
        split = urlsplit(self.path)
        self.parts = [unquote(p) for p in split.path.strip("/").split("/")]
        self.query = {k: v[0] for k, v in parse_qs(split.query).items()}
        fault = self.find_fault(split.path)
        length = int(self.headers.get("Content-Length") or 0)
        self.fault = fault.action if fault else None
        if self.fault == "cut" and self.command in ("POST", "PUT"):
            read = len(self.rfile.read(length // 2))
            self.hub.requests.append((self.command, self.path, read))
            self.hang_up()
            return
        body = self.rfile.read(length)
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        self.hub.requests.append((self.command, self.path, len(body)))
        if self.fault == "hang":
            if not self.hub._stopped.wait(fault.seconds):
                self.hub.outwaited += 1
            self.hang_up()
            return
        if isinstance(self.fault, int):
            self.answer(fault.action, {"error": fault.message or "as the test wants it"}, headers=fault.headers)
            return
        if self.fault == "flip" and self.command == "PUT":
            body = flipped(body)
        try:
            with self.hub.lock:
                answer = self.route(body)
        except Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self.answer(refused.status, refused.body or {"error": refused.message}, headers=headers)
            return
        if self.fault == "lost":
            self.hang_up()
            return
        if isinstance(answer, File):
            self.answer_file(answer)
        else:
            self.answer(200, answer)

    def find_fault(self, path):
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.method == self.command and re.search(fault.pattern, unquote(path)):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    if fault.times:
                        fault.times -= 1
                        return fault
        return None

    def hang_up(self):
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status, value, headers=None):
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_file(self, file):
        content = file.content
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first, last = (int(wanted[1]), int(wanted[2] or len(content) - 1)) if wanted else (0, len(content) - 1)
        if wanted and first >= len(content):
            self.answer(416, {"error": "range"})
            return
        piece = content[first : last + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("X-Repo-Commit", self.commit.oid)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        if file.large:
            self.send_header("X-Linked-Etag", f'"{file.sha256}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "cut":
            self.wfile.write(piece[: len(piece) // 2])
            self.wfile.flush()
            self.hang_up()
            return
        with suppress(OSError):
            self.wfile.write(flipped(piece) if self.fault == "flip" else piece)

    # Who, and what he may

    @property
    def user(self):
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(given)

    def repo(self, name):
        repo, user = self.hub.repos.get(name), self.user
        hidden = repo and repo.private and (not user or repo.owner not in user["may"])
        if repo is None or hidden:
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, name, pull=False):
        repo, user = self.repo(name), self.user
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if not pull and repo.owner not in user["may"]:
            raise Refused(403, "You don't have the rights to write to this repository")
        return repo

    def at(self, repo, revision):
        self.commit = repo.resolve(revision)
        if self.commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commit

    # What is asked

    def route(self, body):
        p = self.parts
        if p[:2] == ["api", "repos"]:
            return self.create(json.loads(body))
        if p == ["api", "whoami-v2"]:
            if self.user is None:
                raise Refused(401, "Invalid username or password.")
            return {"type": "user", "name": self.user["name"], "orgs": [], "auth": {"type": "access_token"}}
        if p == ["api", "validate-yaml"]:
            return validate_card(json.loads(body)["content"])
        if p[:2] == ["api", "models"]:
            return self.of_model("/".join(p[2:4]), p[4:], body)
        if p[:2] == ["api", "kernels"]:
            return self.of_model("/".join(p[1:4]), p[4:], body)
        if p[0] == "lfs":
            return self.store(p[1:], body)
        if "resolve" in p[2:4]:
            at = p.index("resolve", 2)
            commit = self.at(self.repo("/".join(p[:at])), p[at + 1])
            path = "/".join(p[at + 2 :])
            if path not in commit.files:
                raise Refused(404, f"{path} does not exist", "EntryNotFound")
            return commit.files[path]
        if p[-3:] == ["lfs", "objects", "batch"]:
            return self.batch(self.writable("/".join(p[:2]).removesuffix(".git"), pull=True), json.loads(body))
        raise Refused(404, f"this small hub knows no {self.command} {self.path}")

    def create(self, wanted):
        user = self.user
        if user is None:
            raise Refused(401, "Invalid username or password.")
        owner = wanted.get("organization") or user["name"]
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos and owner in user["may"]:
            raise Refused(409, "You already created this model repo", body={"error": "exists", "url": url})
        if owner not in user["may"]:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        self.hub.create(name, owner, wanted.get("private") or wanted.get("visibility") == "private")
        return {"url": url, "name": name}

    def of_model(self, name, rest, body):
        what = rest[0] if rest else "revision"
        if what == "commit":
            return self.make_commit(name, rest[1], body)
        if what == "preupload":
            return self.preupload(self.writable(name, "create_pr" in self.query), rest[1], json.loads(body))
        if what == "branch":
            repo = self.writable(name)
            if rest[1] in repo.refs:
                raise Refused(409, f"Reference already exists: {rest[1]}")
            repo.refs[rest[1]] = self.at(repo, (json.loads(body) if body else {}).get("startingPoint", "main")).oid
            return {}
        repo = self.repo(name)
        if what == "revision":
            commit = self.at(repo, rest[1] if rest else "main")
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            facts = {"_id": "0", "id": name, "modelId": name, "author": repo.owner, "private": repo.private}
            return facts | {"sha": commit.oid, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
        if what == "tree":
            return self.tree(
                self.at(repo, rest[1]), "/".join(rest[2:]), self.query.get("recursive", "").lower() == "true"
            )
        if what == "paths-info":
            files = self.at(repo, rest[1]).files
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            return [files[path].entry(path) for path in wanted if path in files]
        if what == "commits":
            history = self.at(repo, rest[1]) and repo.history(rest[1])
            return [{"id": c.oid, "title": c.title, "message": "", "authors": [], "date": NOW} for c in history]
        if what == "refs":
            named = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": o} for n, o in repo.refs.items()]
            return {"branches": [b for b in named if "refs/pr" not in b["ref"]], "converts": [], "tags": []}
        if what == "discussions":
            return {
                "count": len(repo.pulls),
                "start": 0,
                "discussions": repo.pulls if self.query.get("p") == "0" else [],
            }
        raise Refused(404, f"this small hub knows no {self.command} {self.path}")

    @staticmethod
    def tree(commit, under, recursive):
        found = {}
        for path, file in sorted(commit.files.items()):
            if under and not path.startswith(f"{under}/"):
                continue
            inside = path[len(under) + 1 :] if under else path
            if "/" in inside and not recursive:
                folder = f"{under}/{inside.split('/')[0]}".lstrip("/")
                found[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            else:
                found[path] = file.entry(path)
        if under and not found:
            raise Refused(404, f"{under} does not exist on this revision", "EntryNotFound")
        return list(found.values())

    def preupload(self, repo, revision, asked):
        files = self.at(repo, revision).files

        def of(file):
            large, there = self.hub.is_large(file["path"], file["size"]), files.get(file["path"])
            mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            return mode | ({"oid": there.etag} if there else {})

        return {"files": [of(file) for file in asked["files"]]}

    def batch(self, repo, asked):
        def of(wanted):
            oid, size = wanted["oid"], wanted["size"]
            if oid in self.hub.objects:
                return {"oid": oid, "size": size}
            upload = {"href": f"{self.hub.url}/lfs/{oid}"}
            if size > self.hub.part:
                count = -(-size // self.hub.part)
                parts = {f"{n:05}": f"{self.hub.url}/lfs/{oid}/{n}" for n in range(1, count + 1)}
                upload = {"href": f"{self.hub.url}/lfs/{oid}/done", "header": {"chunk_size": self.hub.part, **parts}}
            return {"oid": oid, "size": size, "actions": {"upload": upload}}

        return {"transfer": "basic", "objects": [of(wanted) for wanted in asked["objects"]]}

    def store(self, path, body):
        oid, *rest = path
        if rest == ["done"]:
            body = b"".join(self.hub.parts[oid, n["partNumber"]] for n in json.loads(body)["parts"])
        elif rest:
            self.hub.parts[oid, int(rest[0])] = body
            return Part(body, False)
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "The SHA256 of what arrived is not that of the object: it is not kept")
        self.hub.objects[oid] = body
        return {}

    def make_commit(self, name, revision, body):
        pull = "create_pr" in self.query
        repo = self.writable(name, pull)
        head = self.at(repo, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        (header,) = (line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head.oid) != head.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"the object of {value['path']} was never uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(value["path"])
            elif key != "header":
                raise Refused(400, f"this small hub knows no {key}")
        oid = repo.add(header["summary"], files, head.oid)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        if pull:
            number = len(repo.pulls) + 1
            repo.refs[f"refs/pr/{number}"] = oid
            pull_request = {"num": number, "title": header["summary"], "status": "open", "isPullRequest": True}
            about = {"author": {"name": self.user["name"]}, "createdAt": NOW, "repo": {"name": name, "type": "model"}}
            repo.pulls.append(pull_request | about)
            return answer | {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"}
        repo.refs[revision] = oid
        return answer


class Part(File):
    """A part of a large file, which is answered by its etag."""

    @property
    def content(self):
        return b""

    @content.setter
    def content(self, value):
        self.etag_of_part = hashlib.md5(value).hexdigest()

    @property
    def etag(self):
        return self.etag_of_part


def flipped(content):
    """With another last byte."""
    return content[:-1] + bytes([content[-1] ^ 1])


def validate_card(content):
    """The Hub's own rules are its own; here the metadata must be a mapping that YAML can read."""
    match = re.match(r"---\r?\n(.*?)\n---", content, re.DOTALL)
    try:
        values = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        values = error
    if not isinstance(values, dict):
        raise Refused(400, "broken", body={"errors": [{"message": "the metadata is no mapping"}], "warnings": []})
    return {"errors": [], "warnings": []}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    with LocalHub(parser.parse_args().port) as hub:
        print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_owner  # and push to me/NAME", flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
