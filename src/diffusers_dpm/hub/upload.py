"""Upload a folder to the Hub and read it back."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.hub.staging import list_files


class PublishError(DiffusersDPMError):
    """Nothing was published, or not as it was meant; the message says why and what to do."""


def log_in(api: HfApi) -> str:
    """The name of the user whose token is used. Raises PublishError if there is none."""
    with explained("cannot log in"):
        return api.whoami()["name"]


def first_line(error: BaseException) -> str:
    """The first line of the message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# What the Hub client raises: its own errors, those of its HTTP library (requests, httpx or httpx2, by version; the
# common base is that of HfHubHTTPError), and RuntimeError for a failed transfer of weights.
CLIENT_ERRORS: tuple[Any, ...] = (OSError, RuntimeError, HfHubHTTPError.__bases__[0])


STATUS_HELP: dict[Any, str] = {
    401: "the token is not valid: run `hf auth login` again",
    403: "the token may not write there: it needs the write role, and you must be a member of the organisation",
    404: "there is no such repository, or the token may not see it",
    412: "somebody else changed the repository meanwhile; run the command again",
    429: "too many requests; wait a few minutes and run the command again",
}


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors of the Hub client as `PublishError`, with what to do about them."""
    try:
        yield
    except PublishError:
        raise
    except LocalTokenNotFoundError as error:
        raise PublishError("not logged in: run `hf auth login`, or set HF_TOKEN") from error
    except CLIENT_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = STATUS_HELP.get(status, "the Hub is not reached or fails; run the command again later")
        raise PublishError(f"{what}: {advice} ({first_line(error)})") from error


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    force: bool = False,
    api: HfApi | None = None,
) -> str:
    """Make `folder` the content of a repository, in one commit, and read it back; returns the commit's address.

    The repository and the branch are created if they are missing; an upload that fails leaves at most an empty one,
    and can be run again.

    Args:
        folder: what `stage` wrote.
        repo_id: "organisation/name".
        private: the repository is to be private: created so, or already so.
        revision: branch to commit to; the main one if None.
        create_pr: open a pull request instead.
        force: replace what the branch holds, also files that `folder` does not have.
        api: client of another Hub or token than the environment's.

    Raises:
        PublishError: no token, no right to write, no connection, other content, or a file that came back damaged.
    """
    folder, api = Path(folder), api or HfApi()
    with explained(f"cannot publish to {repo_id}"):
        open_repo(api, repo_id, private=private, create=not create_pr)
        head = open_branch(api, repo_id, revision)
        remote = remote_files(api, repo_id, head)
        changed = [path for path in list_files(folder) if not same_file(folder / path, remote.get(path.as_posix()))]
        stale = sorted(set(remote) - {path.as_posix() for path in list_files(folder)})
        # A branch of its own that stands where the main one does: nothing is lost there.
        fresh = revision not in (None, "main") and head == api.repo_info(repo_id).sha
        if not changed and not stale:  # published before; it is read back all the same
            address = f"{api.endpoint}/{repo_id}/commit/{head}"
            verify(api, folder, repo_id, head, address)
            return address
        if remote and not (force or create_pr or fresh):
            raise PublishError(
                f"{repo_id} holds other files ({', '.join([*remote][:3])}, ...): replace them with --force, "
                "or propose the change with --create-pr"
            )
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path.as_posix(), folder / path) for path in changed),
                *(CommitOperationDelete(path) for path in stale),
            ],
            commit_message=f"Publish with diffusers-dpm {version('diffusers-dpm')}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    address = commit.pr_url or commit.commit_url
    verify(api, folder, repo_id, commit.oid, address)
    return address


def open_repo(api: HfApi, repo_id: str, *, private: bool, create: bool) -> None:
    """Create the repository if it is missing; a private one is private from the start."""
    try:
        info = api.repo_info(repo_id)
    except RepositoryNotFoundError:
        if not create:
            raise
        api.create_repo(repo_id, private=private)
        return
    if private and not info.private:
        raise PublishError(f"{repo_id} exists and is public: change that in its settings, or leave --private out")


def open_branch(api: HfApi, repo_id: str, revision: str | None) -> str:
    """The newest commit of the branch, which is created if it is missing."""
    try:
        return str(api.repo_info(repo_id, revision=revision).sha)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=str(revision))
        return str(api.repo_info(repo_id, revision=revision).sha)


def remote_files(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """The files of a commit by their paths, without the one that the Hub itself writes."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile) and entry.path != ".gitattributes"}


def same_file(path: Path, remote: RepoFile | None) -> bool:
    """Whether the Hub has this content, by the hash that it keeps: SHA-256 of large files, git's of the others."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    return remote.blob_id == git_hash(path.read_bytes()) if remote.lfs is None else remote.lfs.sha256 == digest(path)


def verify(api: HfApi, folder: Path, repo_id: str, commit: str, address: str) -> None:
    """Download the commit into an empty cache and compare every file."""
    with tempfile.TemporaryDirectory() as cache, explained(f"published {address}, but cannot read it back"):
        downloaded = Path(api.snapshot_download(repo_id, revision=commit, cache_dir=cache))
        for path in list_files(folder):
            there = downloaded / path
            if not there.is_file() or digest(there) != digest(folder / path):
                raise PublishError(f"published {address}, but {path} came back damaged: run the command again")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()
