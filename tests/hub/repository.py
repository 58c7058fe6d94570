"""What the test Hub stores: model repositories with commits, branches, tags, pull requests and LFS objects."""

import base64
import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import PurePosixPath
from typing import NamedTuple


LFS_SIZE = 10 * 1024**2  # bytes; larger files are stored with LFS, whatever their name
LFS_SUFFIXES = ("bin", "ckpt", "gz", "h5", "npy", "npz", "onnx", "pkl", "pt", "pth", "safetensors", "tar", "zip")
LFS_ATTRIBUTES = "filter=lfs diff=lfs merge=lfs -text"
GITATTRIBUTES = "".join(f"*.{suffix} {LFS_ATTRIBUTES}\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """An answer other than success; `code` is the Hub's X-Error-Code, from which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def git_hash(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


class File(NamedTuple):
    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds instead of the content of an LFS file."""
        version = "https://git-lfs.github.com/spec/v1"
        return f"version {version}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        return git_hash("blob", self.pointer if self.lfs else self.data)

    @property
    def etag(self) -> str:
        """What the client compares a local file with, and names it by in its cache."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    title: str
    description: str
    author: str
    parent: str | None
    files: dict[str, File]
    date: str = field(default_factory=now)

    @cached_property
    def oid(self) -> str:
        tree = "".join(f"{file.oid} {path}\n" for path, file in sorted(self.files.items()))
        text = "\n".join((tree, str(self.parent), self.author, self.date, self.title, self.description))
        return git_hash("commit", text.encode())

    @cached_property
    def paths(self) -> set[str]:
        """Of the files and of the folders that hold them."""
        folders = {str(folder) for path in self.files for folder in PurePosixPath(path).parents}
        return {*self.files, *folders} - {"."}


class PullRequest(NamedTuple):
    number: int
    title: str
    description: str
    author: str
    date: str

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"


@dataclass
class Repository:
    """A model repository. It begins with one commit, as on the Hub, which holds `.gitattributes`."""

    name: str
    creator: str
    private: bool = False
    gated: str | bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        files = {".gitattributes": File(GITATTRIBUTES)}
        self._advance("refs/heads/main", Commit("initial commit", "", self.creator, None, files))

    def _advance(self, ref: str, commit: Commit) -> None:
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid

    def ref(self, revision: str) -> str | None:
        """Full name of the branch, tag or pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request, or a hash of 7 digits or more stands for."""
        ref = self.ref(revision)
        oids = [self.refs[ref]] if ref else [oid for oid in self.commits if oid.startswith(revision)]
        if len(oids) != 1 or (ref is None and len(revision) < 7):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oids[0]]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commits = [self.find(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits

    def create_ref(self, ref: str, revision: str) -> None:
        if ref in self.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        self.refs[ref] = self.find(revision).oid

    def upload_plan(self, revision: str, path: str, size: int, sample: str) -> dict:
        """How a file is to be sent: with LFS if .gitattributes says so, or if it is large or not text."""
        files = self.find(revision).files
        lfs = is_listed(path, files) or size > LFS_SIZE or b"\0" in base64.b64decode(sample)
        plan = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        return plan | ({"oid": files[path].etag} if path in files else {})

    def open_pull_request(self, title: str, description: str, author: str, base: str) -> PullRequest:
        pull_request = PullRequest(len(self.pull_requests) + 1, title, description, author, now())
        self.create_ref(pull_request.ref, base)
        self.pull_requests.append(pull_request)
        return pull_request

    def commit(self, revision: str, lines: list[dict], author: str, create_pr: bool = False) -> Commit:
        """Apply the lines of a commit request to a branch, a pull request, or with `create_pr` a new pull request.

        All of it or, on an error, nothing.
        """
        header, operations = lines[0]["value"], lines[1:]
        title, description = header["summary"], header.get("description", "")
        parent = header.get("parentCommit", "")
        base = self.find(parent if parent and create_pr else revision)
        if not base.oid.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for operation in operations:
            self._apply(files, operation["key"], **operation["value"])
        if create_pr:
            revision = self.open_pull_request(title, description, author, base.oid).ref
        ref = self.ref(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(400, f"Not a branch: {revision}")
        commit = Commit(title, description, author, base.oid, files)
        self._advance(ref, commit)
        return commit

    def _apply(
        self, files: dict[str, File], key: str, path: str, content: str = "", oid: str = "", **_: object
    ) -> None:
        if key == "file":
            files[path] = File(base64.b64decode(content, validate=True))
        elif key == "lfsFile":
            if oid not in self.lfs_objects:
                raise HubError(400, f"The LFS object of {path} has not been uploaded")
            files[path] = File(self.lfs_objects[oid], lfs=True)
            if not is_listed(path, files):  # the Hub adds a line, too
                rule = f"{path} {LFS_ATTRIBUTES}\n".encode()
                files[".gitattributes"] = File(gitattributes(files) + rule)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(folder))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation {key}")


def gitattributes(files: dict[str, File]) -> bytes:
    return files.get(".gitattributes", File(b"")).data


def is_listed(path: str, files: dict[str, File]) -> bool:
    """Whether `.gitattributes` among the files gives the path to LFS."""
    rules = [line.split() for line in gitattributes(files).decode().splitlines() if line]
    return any("filter=lfs" in attributes and PurePosixPath(path).match(rule) for rule, *attributes in rules)
