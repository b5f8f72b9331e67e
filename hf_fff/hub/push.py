"""A model's folder, in one commit, to the Hub: whole or not at all, and nothing twice."""

import fnmatch
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from ..files import disk_is_full
from ..surgery.folder import sha256_of
from .card import Card, make_card
from .contents import CARD, Contents, look_through
from .results import BENCHMARKS, RESULTS, is_benchmark

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
_TRIES = 4
# Weights of before that would be loaded in place of the new ones, or with them, and what was measured of them.
_STALE = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*pytorch_model*.bin",
    "*pytorch_model.bin.index.json",
    f"{RESULTS}/*.json",
    f"{BENCHMARKS}/eval-*.yaml",
)


@dataclass(frozen=True)
class Pushed:
    """What is there now. ``changed`` and ``removed`` are the files that the commit changed; none where all was there already."""

    url: str
    commit: str
    pull_request: str | None
    changed: list[str]
    removed: list[str]


def check_repo_id(repo_id: str) -> None:
    """Raises ``ValueError`` where no repository of the Hub can have the name."""
    owner, _, name = repo_id.partition("/")
    parts_fit = all(_NAME.fullmatch(part) and "--" not in part and ".." not in part for part in (owner, name))
    if not parts_fit or len(repo_id) > 96 or name.endswith(".git"):
        raise ValueError(
            f"repo_id={repo_id!r} is no name of a repository (allowed: OWNER/NAME, of letters, digits, '-', '_' and '.', at most 96 "
            "characters)"
        )


def push_folder(
    folder: Path | Contents,
    repo_id: str,
    *,
    card: Card | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    timeout: float = 120.0,
) -> Pushed:
    """Pushes a converted model's folder: model, tokenizer, sentence-transformers' files, results and card, in one commit.

    What the server has already is not sent again, be it from a push that was interrupted. Weights of an earlier model that the
    new one lacks are removed in the same commit. The token is that of ``hf auth login``, or ``HF_TOKEN``.

    Args:
        card: as ``make_card`` gives it, which is the default.
        private: a new repository is private; one that exists already must be.
        revision: a branch, made if need be.
        create_pr: open a pull request instead; one that is open with the same content is taken.
        timeout: seconds without a byte after which a connection is given up and tried anew.

    Raises:
        ValueError: as ``look_through`` and ``make_card``; a bad name, no token, one that is not taken or may not write, a
            repository that holds another kind of model, or is public where ``private`` was asked for.
        RuntimeError: the Hub cannot be reached, or does not do what it is asked. What was sent is not sent again.
    """
    check_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(f"revision={revision!r} and create_pr contradict each other: a pull request goes to main")
    contents = look_through(folder) if isinstance(folder, Path) else folder
    card = card or make_card(contents, repo_id=repo_id)

    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise ValueError("there is no token for the Hub: `hf auth login` asks for one and keeps it, or set HF_TOKEN")
    files = files_of(contents, card)
    with _explained(repo_id):
        return _Push(HfApi(), repo_id, revision or "main", files, timeout).run(contents, private, create_pr)


def files_of(contents: Contents, card: Card) -> dict[str, Path | bytes]:
    """All that a push sends."""
    made = {CARD: card.text, **card.benchmarks}
    kept = {name: path for name, path in contents.files.items() if not is_benchmark(name)}
    return kept | {name: text.encode("utf-8") for name, text in made.items()}


class _Push:
    def __init__(
        self, api: Any, repo_id: str, revision: str, files: Mapping[str, Path | bytes], timeout: float
    ) -> None:
        self.api, self.repo_id, self.revision, self.files, self.timeout = api, repo_id, revision, files, timeout
        self.hashes = {name: _hashes(content) for name, content in files.items()}

    def run(self, contents: Contents, private: bool, create_pr: bool) -> Pushed:
        self.try_again(lambda: self.api.create_repo(self.repo_id, private=private or None, exist_ok=True))
        main = self.try_again(lambda: self.api.repo_info(self.repo_id))
        if private and not main.private:
            raise ValueError(
                f"{self.repo_id} exists, and is public: make it private on its page, or push to another name"
            )
        self.check_model(self.tree(main.sha), main.sha)
        if self.revision != "main":
            self.try_again(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))
        parent = self.sha_of(self.revision)
        there = self.tree(parent)
        self.check_model(there, parent)
        changed = [name for name in self.files if there.get(name) not in self.hashes[name]]
        removed = [n for n in there if n not in self.files and any(fnmatch.fnmatch(n, p) for p in _STALE)]
        if not changed and not removed:
            return Pushed(f"{self.api.endpoint}/{self.repo_id}", parent, None, [], [])
        title = f"hf-fff push: {(contents.config.get('architectures') or ['model'])[0]}"
        info = self.commit(title, parent, changed, removed, create_pr)
        return Pushed(info[1], info[0], info[2], changed, removed)

    def commit(
        self, title: str, parent: str, changed: list[str], removed: list[str], create_pr: bool
    ) -> tuple[str, str, str | None]:
        """The commit, its address, and the pull request's."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if create_pr and (found := self.open_pull_request(title)):
            return found
        additions = [CommitOperationAdd(name, _given(self.files[name])) for name in changed]
        self.be_patient()
        # It tries again by itself, and asks the server which files it has.
        self.api.preupload_lfs_files(
            self.repo_id, additions, revision=self.revision, create_pr=create_pr, free_memory=False
        )
        operations = [*additions, *(CommitOperationDelete(name) for name in removed)]

        def send() -> tuple[str, str, str | None]:
            made = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=title,
                revision=self.revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
            return made.oid, made.commit_url, made.pr_url

        def landed() -> tuple[str, str, str | None] | None:
            """What an answer that was lost would have said. The server takes no second commit on the same parent."""
            if create_pr:
                return self.open_pull_request(title)
            head = self.api.repo_info(self.repo_id, revision=self.revision).sha
            there = head != parent and self.holds(head, removed)
            return (head, f"{self.api.endpoint}/{self.repo_id}/commit/{head}", None) if there else None

        done = self.try_again(send, landed)
        if not self.holds(done[0], removed):
            raise RuntimeError(
                f"{self.repo_id} does not hold at {done[0]} what was sent: look at it before anybody loads it"
            )
        return done

    def open_pull_request(self, title: str) -> tuple[str, str, str | None] | None:
        """One that has the same content already."""
        found = self.try_again(
            lambda: list(
                self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open")
            )
        )
        for number in [d.num for d in found if d.title == title]:
            sha = self.sha_of(f"refs/pr/{number}")
            if self.holds(sha, []):
                url = f"{self.api.endpoint}/{self.repo_id}/discussions/{number}"
                return sha, f"{self.api.endpoint}/{self.repo_id}/commit/{sha}", url
        return None

    def sha_of(self, revision: str) -> str:
        return str(self.try_again(lambda: self.api.repo_info(self.repo_id, revision=revision)).sha)

    def holds(self, revision: str, removed: list[str]) -> bool:
        there = self.tree(revision)
        return all(there.get(name) in hashes for name, hashes in self.hashes.items()) and not {*removed} & {*there}

    def tree(self, revision: str) -> dict[str, str]:
        """Paths -> SHA-256 of large files, git's hash of others."""
        found = self.try_again(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)))
        return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in found if hasattr(f, "blob_id")}

    def check_model(self, there: Mapping[str, str], revision: str) -> None:
        """Whether what is there is a model of ours, or none."""
        for name in there:
            if Path(name).name != "config.json" or name not in self.files or there[name] in self.hashes[name]:
                continue
            config = self.json_of(name, revision)
            ours = _given(self.files[name])
            wanted = "fff" in json.loads(ours if isinstance(ours, bytes) else Path(ours).read_bytes())
            if wanted and not (isinstance(config, dict) and "fff" in config):
                raise ValueError(
                    f"{self.repo_id} holds a model that is not of hf_fff (its {name} has no fff), and is left as it is: push to another name"
                )

    def json_of(self, name: str, revision: str) -> Any:
        with TemporaryDirectory() as cache:
            options = {"revision": revision, "cache_dir": cache}
            path = self.try_again(lambda: self.api.hf_hub_download(self.repo_id, name, **options))
            try:
                return json.loads(Path(path).read_text(encoding="utf-8"))
            except ValueError:
                return None

    def be_patient(self) -> None:
        """By default a client waits for ever."""
        from huggingface_hub import get_session

        get_session().timeout = self.timeout

    def try_again(self, call: Callable[[], T], landed: Callable[[], T | None] | None = None) -> T:
        """For what huggingface_hub does not try again itself. ``landed`` looks whether it was done and only the answer was lost."""
        for left in reversed(range(_TRIES)):
            try:
                self.be_patient()
                return call()
            except Exception as error:
                if not _passes(error) and not (landed and _status(error) in (409, 412)):
                    raise
                waited = _retry_after(error)
                if left:
                    time.sleep(2.0 ** (_TRIES - 1 - left) if waited is None else waited)
                if landed and (found := self.try_again(landed)) is not None:
                    return found
                if not left or not _passes(error):
                    raise
        raise AssertionError


def _hashes(content: Path | bytes) -> set[str]:
    """As a large file has it, and as git has it: the server chooses."""
    if isinstance(content, Path):
        size, sha256, sha1 = content.stat().st_size, sha256_of(content), hashlib.sha1()
        sha1.update(b"blob %d\0" % size)
        with content.open("rb") as file:
            while block := file.read(1 << 20):
                sha1.update(block)
        return {sha256, sha1.hexdigest()}
    return {hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


def _given(content: Path | bytes) -> str | bytes:
    return str(content) if isinstance(content, Path) else content


# What went wrong


def _causes(error: BaseException | None) -> "Iterator[BaseException]":
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    for cause in _causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            return int(response.status_code)
    return None


def _is(error: BaseException, *names: str) -> bool:
    """By name: which HTTP library there is depends on the version of huggingface_hub."""
    return any(c.__name__ in names for cause in _causes(error) for c in type(cause).__mro__)


def _passes(error: BaseException) -> bool:
    """Whether it may go well another time."""
    return (_status(error) or 0) in (408, 429, 500, 502, 503, 504) or _is(error, "TransportError", "JSONDecodeError")


def _retry_after(error: BaseException) -> float | None:
    for cause in _causes(error):
        text = getattr(getattr(cause, "response", None), "headers", {}).get("Retry-After", "")
        if re.fullmatch(r"\d+(\.\d+)?", text):
            return min(float(text), 300.0)
    return None


@contextmanager
def _explained(repo_id: str) -> "Iterator[None]":
    """Errors of clients say what to do."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    again = "run the same command again: what the server has is not sent again"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError("HF_HUB_OFFLINE is set: nothing can be pushed") from error
    except Exception as error:
        if full := next((c for c in _causes(error) if disk_is_full(c)), None):
            where = getattr(full, "filename", None)
            told = f" ({where})" if where else ""
            raise RuntimeError(
                f"this machine's disk is full{told}, and {repo_id} is as it was: make room, and {again}"
            ) from error
        status = _status(error)
        messages = [getattr(cause, "server_message", None) for cause in _causes(error)]
        first = next((str(message) for message in messages if message), "")
        if status == 401:
            raise ValueError(
                "the Hub does not take the token (it may have expired): `hf auth login` asks for another"
            ) from error
        if status == 403:
            raise ValueError(f"the token may not write to {repo_id}: {first or 'forbidden'}") from error
        if status in (409, 412):
            raise RuntimeError(
                f"{repo_id} was changed meanwhile, by another push: look at it, and then {again}"
            ) from error
        if status == 404:
            raise ValueError(f"there is no {repo_id}, or the token may not see it") from error
        if status is not None or isinstance(error, HfHubHTTPError):
            told = f" ({first})" if first else ""
            raise RuntimeError(f"the Hub answered {status}{told}, and {repo_id} is as it was; {again}") from error
        if _is(error, "TransportError", "JSONDecodeError"):
            kind = type(list(_causes(error))[-1]).__name__
            raise RuntimeError(
                f"the connection to the Hub failed ({kind}), and {repo_id} is as it was; {again}"
            ) from error
        raise
