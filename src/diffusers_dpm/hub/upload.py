"""Upload a folder to the Hub and read it back."""

import filecmp
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors
from huggingface_hub.hf_api import RepoFile

from diffusers_dpm.errors import DiffusersDPMError, first_line
from diffusers_dpm.hub.staging import list_files


class PublishError(DiffusersDPMError):
    """Nothing was published, or not as it was meant; the message says why and what to do."""


# The Hub client's own errors are OSErrors, as are those of requests; newer clients use httpx, whose base is HTTPError.
# A failed transfer of weights is a RuntimeError.
CLIENT_ERRORS: tuple[Any, ...] = (OSError, RuntimeError, errors.HTTPError)
# The client waits for ever for an answer that does not come.
ANSWER_SECONDS = 60.0
LEAST_SECONDS, LEAST_SPEED = 600.0, 50_000  # of an upload; bytes a second, there and back

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
    except errors.LocalTokenNotFoundError as error:
        raise PublishError("not logged in: run `hf auth login`, or set HF_TOKEN") from error
    except CLIENT_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = STATUS_HELP.get(status, "the Hub is not reached or fails; run the command again later")
        raise PublishError(f"{what}: {advice} ({first_line(error)})") from error


def within(seconds: float, what: str, work: Callable[[], Any]) -> Any:
    """The result of `work`. Raises PublishError if it takes longer, and whatever it raises."""
    with ThreadPool(1) as pool:
        try:
            return pool.apply_async(work).get(seconds)
        except TimeoutError as error:
            raise PublishError(f"{what}: no end after {seconds:.0f} seconds; run the command again later") from error


def log_in(api: HfApi) -> str:
    """The name of the user whose token is used. Raises PublishError if there is none."""
    with explained("cannot log in"):
        return within(ANSWER_SECONDS, "cannot log in", lambda: api.whoami()["name"])


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    force: bool = False,
    api: HfApi | None = None,
    repo_type: str = "model",
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
        repo_type: "model" or "space".

    Raises:
        PublishError: no token, no right to write, no connection, other content, or a file that came back damaged.
    """
    folder, api = Path(folder), api or HfApi()
    place = repo_id if repo_type == "model" else f"{repo_type}s/{repo_id}"
    with explained(f"cannot publish to {repo_id}"):
        open_repo(api, repo_id, repo_type, private=private, create=not create_pr)
        head = open_branch(api, repo_id, repo_type, revision)
        remote = remote_files(api, repo_id, repo_type, head)
        # A new branch holds what the main one does: nothing is lost there.
        is_new_branch = revision not in (None, "main") and head == api.repo_info(repo_id, repo_type=repo_type).sha
        if remote and is_published(folder, remote):
            commit, address = head, f"{api.endpoint}/{place}/commit/{head}"
        elif remote and not (force or create_pr or is_new_branch):
            files = f"{repo_id} holds other files ({', '.join([*remote][:3])}, ...)"
            raise PublishError(f"{files}: replace them with --force, or propose the change with --create-pr")
        else:
            target: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "parent_commit": head}
            message = f"Publish with diffusers-dpm {version('diffusers-dpm')}"
            target |= {"repo_id": repo_id, "repo_type": repo_type, "delete_patterns": "*", "commit_message": message}
            info = api.upload_folder(folder_path=folder, **target)
            commit, address = info.oid, info.pr_url or info.commit_url
    verify(api, folder, repo_id, repo_type, commit, address)
    return address


def open_repo(api: HfApi, repo_id: str, repo_type: str, *, private: bool, create: bool) -> None:
    """Create the repository if it is missing; a private one is private from the start."""
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except errors.RepositoryNotFoundError:
        if not create:
            raise
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(repo_id, repo_type=repo_type, private=private, space_sdk=sdk)
        return
    if private and not info.private:
        raise PublishError(f"{repo_id} exists and is public: change that in its settings, or leave --private out")


def open_branch(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> str:
    """The newest commit of the branch, which is created if it is missing."""
    try:
        return str(api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha)
    except errors.RevisionNotFoundError:
        api.create_branch(repo_id, repo_type=repo_type, branch=str(revision))
        return str(api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha)


def remote_files(api: HfApi, repo_id: str, repo_type: str, commit: str) -> dict[str, RepoFile]:
    """The files of a commit by their paths, without the one that the Hub itself writes."""
    entries = api.list_repo_tree(repo_id, repo_type=repo_type, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile) and entry.path != ".gitattributes"}


def is_published(folder: Path, remote: dict[str, RepoFile]) -> bool:
    """Whether the repository holds the folder's files, and no others."""
    paths = {path.as_posix(): folder / path for path in list_files(folder)}
    return paths.keys() == remote.keys() and all(is_content_of(paths[name], remote[name]) for name in paths)


def is_content_of(path: Path, remote: RepoFile) -> bool:
    """By the hash that the Hub has of a file: SHA-256 of large ones, git's of the others."""
    content = path.read_bytes()
    if remote.lfs is not None:
        return hashlib.sha256(content).hexdigest() == remote.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id


def verify(api: HfApi, folder: Path, repo_id: str, repo_type: str, commit: str, address: str) -> None:
    """Download the commit into an empty cache and compare every file."""
    with tempfile.TemporaryDirectory() as cache, explained(f"published {address}, but cannot read it back"):
        downloaded = api.snapshot_download(repo_id, repo_type=repo_type, revision=commit, cache_dir=cache)
        _, damaged, missing = filecmp.cmpfiles(folder, downloaded, list_files(folder), shallow=False)
        if damaged or missing:
            raise PublishError(f"published {address}, but {[*damaged, *missing][0]} came back damaged: run it again")
