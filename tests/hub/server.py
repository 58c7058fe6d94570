"""A Hub for models and Spaces on 127.0.0.1: the part of the HTTP API that huggingface_hub and diffusers use.

Content goes over plain HTTP and LFS, never Xet: set HF_HUB_DISABLE_XET=1, for a client that finds hf_xet installed
uploads by Xet only. LFS files are answered directly, not by a redirect to another host. What the server does not
speak is answered with 501.
"""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import yaml

from .http_server import LoggingServer, Request, Response
from .repository import Commit, File, HubError, PullRequest, Repository


class Account(NamedTuple):
    """Whom a token stands for."""

    user: str
    organizations: tuple[str, ...] = ()
    role: str = "write"


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []
PLACES = {
    "repo": "[^/]+(?:/[^/]+)?",
    "revision": "[^/]+",
    "branch": "[^/]+",
    "number": "[0-9]+",
    "oid": "[0-9a-f]{64}",
    "path": ".+",
}


def route(method: str, template: str) -> Callable:
    """Register an endpoint; it is called with the request, the account, and what stands at the template's places."""
    pattern = re.compile(re.sub(r"{(\w+)}", lambda place: f"(?P<{place[1]}>{PLACES[place[1]]})", template))

    def register(endpoint: Callable) -> Callable:
        ROUTES.append((method, pattern, endpoint))
        return endpoint

    return register


class HubServer(LoggingServer):
    """The server and its repositories.

    A private repository does not exist for those outside its namespace; a gated one can be listed by all and
    downloaded by its namespace. Anybody with a write token may open a pull request where they can read.

    Args:
        accounts: by token.
    """

    def __init__(self, accounts: dict[str, Account]) -> None:
        super().__init__()
        self.accounts = accounts
        self.repositories: dict[str, Repository] = {}

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a repository by path; `.gitattributes`, which every repository has, is left out."""
        files = self.repositories[name].find(revision).files
        return {path: file.data for path, file in files.items() if path != ".gitattributes"}

    def answer(self, request: Request) -> Response:
        try:
            return self._dispatch(request)
        except HubError as error:
            return error_response(error)
        except (KeyError, TypeError, ValueError) as error:
            return error_response(HubError(400, f"Malformed request: {error!r}"))

    def _dispatch(self, request: Request) -> Response:
        account = self._authenticate(request)
        method = "GET" if request.method == "HEAD" else request.method
        path, space = request.quoted_path, re.match("/(api/)?spaces/", request.quoted_path)
        path = path.replace("spaces/", "models/" if space[1] else "", 1) if space else path
        for verb, pattern, endpoint in ROUTES:
            match = pattern.fullmatch(path)
            if verb == method and match:
                places: dict[str, Any] = {key: unquote(value) for key, value in match.groupdict().items()}
                if "repo" in places:
                    places["repo"] = self._readable(("spaces/" if space else "") + places["repo"], account)
                answer = endpoint(self, request, account, **places)
                return answer if isinstance(answer, Response) else json_response(answer)
        raise HubError(501, f"The test Hub does not speak {request.method} {request.target}")

    # Who may do what

    def _authenticate(self, request: Request) -> Account | None:
        authorization = request.headers.get("Authorization")
        if authorization is None:
            return None
        account = self.accounts.get(authorization.removeprefix("Bearer "))
        if account is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return account

    def _readable(self, name: str, account: Account | None) -> Repository:
        repo = self.repositories.get(name)
        if repo is None or (repo.private and not is_member(account, name)):
            if account is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def _require_write(self, account: Account | None, name: str) -> Account:
        account = require_write_token(account)
        if not is_member(account, name):
            raise HubError(403, f"You don't have the rights to write to {name}")
        return account

    # Accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request, account: Account | None) -> dict:
        if account is None:
            raise HubError(401, "Invalid username or password.")
        return {
            "type": "user",
            "name": account.user,
            "orgs": [{"type": "org", "name": name, "roleInOrg": "write"} for name in account.organizations],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}},
        }

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request, account: Account | None) -> Response:
        name, settings = self._named(request, account)
        account = self._require_write(account, name)
        url = f"{self.url}/{name}"
        if name in self.repositories:
            return json_response({"error": "You already created this repo", "url": url}, 409)
        self.repositories[name] = Repository(name, account.user, private=is_private(settings, False))
        return json_response({"url": url, "name": name})

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, request: Request, account: Account | None) -> dict:
        name, _ = self._named(request, account)
        self._readable(name, account)
        self._require_write(account, name)
        del self.repositories[name]
        return {}

    def _named(self, request: Request, account: Account | None) -> tuple[str, dict]:
        """Full name of the repository that is to be created or deleted, and the request's content."""
        content = json.loads(request.body)
        kind = content.get("type") or "model"
        if kind not in ("model", "space") or (kind == "space" and content.get("sdk") is None):
            raise HubError(501, f"The test Hub has no repositories of type {kind}, or not without an sdk")
        owner = content.get("organization") or require_write_token(account).user
        return f"{'spaces/' * (kind == 'space')}{owner}/{content['name']}", content

    @route("PUT", "/api/models/{repo}/settings")
    def update_settings(self, request: Request, account: Account | None, repo: Repository) -> dict:
        self._require_write(account, repo.name)
        settings = json.loads(request.body)
        repo.gated = settings.get("gated", repo.gated)
        repo.private = is_private(settings, repo.private)
        return {"private": repo.private, "gated": repo.gated}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request, account: Account | None) -> Response:
        try:
            metadata = card_metadata(json.loads(request.body)["content"])
        except ValueError as error:
            return json_response({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return json_response({"errors": [], "warnings": warnings})

    # Reading

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def info(self, request: Request, account: Account | None, repo: Repository, revision: str = "main") -> dict:
        commit = repo.find(revision)
        card = commit.files.get("README.md", File(b""))
        metadata = card_metadata(card.data.decode())
        with_blobs = request.query.get("blobs", "").lower() in ("1", "true")
        return {
            "id": repo.name.removeprefix("spaces/"),
            "modelId": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "private": repo.private,
            "gated": repo.gated,
            "tags": metadata.get("tags", []),
            "library_name": metadata.get("library_name"),
            "pipeline_tag": metadata.get("pipeline_tag"),
            "cardData": metadata,
            "siblings": [sibling(path, file, with_blobs) for path, file in sorted(commit.files.items())],
        }

    @route("GET", "/api/models/{repo}/tree/{revision}")
    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    def tree(
        self, request: Request, account: Account | None, repo: Repository, revision: str, path: str = ""
    ) -> list[dict]:
        commit = repo.find(revision)
        below = path and path + "/"
        found = sorted(inside for inside in commit.paths if inside.startswith(below))
        if not found:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        if request.query.get("recursive", "").lower() not in ("1", "true"):
            found = [inside for inside in found if "/" not in inside.removeprefix(below)]
        return [tree_entry(commit, inside) for inside in found]

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def paths_info(self, request: Request, account: Account | None, repo: Repository, revision: str) -> list[dict]:
        commit = repo.find(revision)
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return [tree_entry(commit, path) for path in wanted if path in commit.paths]

    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def resolve(
        self, request: Request, account: Account | None, repo: Repository, revision: str, path: str
    ) -> Response:
        if repo.gated and not is_member(account, repo.name):
            message = f"Access to model {repo.name} is restricted."
            raise HubError(403 if account else 401, message, "GatedRepo")
        commit = repo.find(revision)
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        part = byte_range(file.data, request.headers.get("Range"))
        return part._replace(headers={**headers, **part.headers})

    # Branches, tags, history

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, request: Request, account: Account | None, repo: Repository) -> dict:
        def below(prefix: str) -> list[dict]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repo.refs.items()
                if ref.startswith(prefix)
            ]

        refs = {"branches": below("refs/heads/"), "tags": below("refs/tags/"), "converts": []}
        return refs | ({"pullRequests": below("refs/pr/")} if "include_prs" in request.query else {})

    @route("GET", "/api/models/{repo}/commits/{revision}")
    def commits(self, request: Request, account: Account | None, repo: Repository, revision: str) -> list[dict]:
        return [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in repo.history(revision)
        ]

    @route("POST", "/api/models/{repo}/branch/{branch}")
    def create_branch(self, request: Request, account: Account | None, repo: Repository, branch: str) -> dict:
        self._require_write(account, repo.name)
        repo.create_ref(f"refs/heads/{branch}", json.loads(request.body).get("startingPoint", "main"))
        return {}

    @route("POST", "/api/models/{repo}/tag/{revision}")
    def create_tag(self, request: Request, account: Account | None, repo: Repository, revision: str) -> dict:
        self._require_write(account, repo.name)
        repo.create_ref(f"refs/tags/{json.loads(request.body)['tag']}", revision)
        return {}

    # Writing

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, request: Request, account: Account | None, repo: Repository, revision: str) -> dict:
        self._require_commit_rights(request, account, repo)
        files = json.loads(request.body)["files"]
        return {"files": [repo.upload_plan(revision, **file) for file in files]}

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, account: Account | None, repo: Repository) -> dict:
        require_write_token(account)
        objects = json.loads(request.body)["objects"]
        for entry in objects:
            if entry["oid"] not in repo.lfs_objects:
                href = f"{self.url}/lfs/{repo.name}/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/{path}/{oid}")
    def lfs_upload(self, request: Request, account: Account | None, path: str, oid: str) -> dict:
        """The client sends no token here: on the Hub the address is a signed one of the storage provider."""
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced hash")
        self.repositories[path].lfs_objects[oid] = request.body
        return {}

    @route("POST", "/lfs/{repo}/{oid}/verify")
    def lfs_verify(self, request: Request, account: Account | None, repo: Repository, oid: str) -> dict:
        if len(repo.lfs_objects.get(oid, b"")) != json.loads(request.body)["size"]:
            raise HubError(404, f"LFS object {oid} is missing or has another size")
        return {}

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def commit(self, request: Request, account: Account | None, repo: Repository, revision: str) -> dict:
        account = self._require_commit_rights(request, account, repo)
        lines = [json.loads(line) for line in request.body.splitlines()]
        as_pull_request = "create_pr" in request.query
        commit = repo.commit(revision, lines, account.user, as_pull_request)
        url = f"{self.url}/{repo.name}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        if as_pull_request:
            answer["pullRequestUrl"] = f"{url}/discussions/{repo.pull_requests[-1].number}"
        return answer

    def _require_commit_rights(self, request: Request, account: Account | None, repo: Repository) -> Account:
        if "create_pr" in request.query:
            return require_write_token(account)
        return self._require_write(account, repo.name)

    # Pull requests

    @route("GET", "/api/models/{repo}/discussions")
    def discussions(self, request: Request, account: Account | None, repo: Repository) -> dict:
        found = [discussion(repo, pull_request) for pull_request in repo.pull_requests]
        return {"count": len(found), "start": 0, "discussions": found}

    @route("GET", "/api/models/{repo}/discussions/{number}")
    def discussion(self, request: Request, account: Account | None, repo: Repository, number: str) -> dict:
        if not 1 <= int(number) <= len(repo.pull_requests):
            raise HubError(404, f"There is no discussion {number}")
        return discussion(repo, repo.pull_requests[int(number) - 1])

    @route("POST", "/api/models/{repo}/discussions")
    def open_pull_request(self, request: Request, account: Account | None, repo: Repository) -> dict:
        account = require_write_token(account)
        content = json.loads(request.body)
        if not content["pullRequest"]:
            raise HubError(501, "The test Hub has no discussions other than pull requests")
        pull_request = repo.open_pull_request(content["title"], content["description"], account.user, "main")
        return discussion(repo, pull_request)


def is_member(account: Account | None, repo_name: str) -> bool:
    owner = repo_name.removeprefix("spaces/").split("/")[0]
    return account is not None and owner in (account.user, *account.organizations)


def is_private(settings: dict, default: bool) -> bool:
    """huggingface_hub < 1 sends a boolean, later ones a word."""
    visibility = settings.get("visibility")
    return visibility == "private" if visibility else settings.get("private", default)


def require_write_token(account: Account | None) -> Account:
    if account is None:
        raise HubError(401, "Invalid username or password.")
    if account.role != "write":
        raise HubError(403, "This token has no write rights")
    return account


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(content, default=str).encode()  # str: dates in the metadata of a card
    return Response(status, body, {"Content-Type": "application/json", **(headers or {})})


def error_response(error: HubError) -> Response:
    headers = error.headers | ({"X-Error-Code": error.code} if error.code else {})
    message = " ".join(str(error).split()).encode("ascii", "replace").decode()  # fit for a header
    return json_response({"error": str(error)}, error.status, headers | {"X-Error-Message": message})


def byte_range(data: bytes, wanted: str | None) -> Response:
    """All of the data, or the part that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if match is None or not any(match.groups()):
        return Response(200, data)
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    return Response(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def card_metadata(readme: str) -> dict:
    """The YAML block at the top of a model card. Raises ValueError if it is not a mapping."""
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(metadata, dict):
        raise ValueError("The metadata of a model card must be a mapping")
    return metadata


def lfs_info(file: File, hash_name: str) -> dict:
    """The field `lfs` of a listing, which other files do not have."""
    info = {hash_name: file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return {"lfs": info} if file.lfs else {}


def sibling(path: str, file: File, with_blobs: bool) -> dict:
    blob = {"blobId": file.oid, "size": len(file.data), **lfs_info(file, "sha256")}
    return {"rfilename": path, **(blob if with_blobs else {})}


def tree_entry(commit: Commit, path: str) -> dict:
    if path not in commit.files:
        return {"type": "directory", "path": path, "oid": commit.oid, "size": 0}
    file = commit.files[path]
    return {"type": "file", "path": path, "oid": file.oid, "size": len(file.data), **lfs_info(file, "oid")}


def discussion(repo: Repository, pull_request: PullRequest) -> dict:
    author = {"name": pull_request.author}
    comment = {"edited": False, "hidden": False, "latest": {"raw": pull_request.description}}
    return {
        "num": pull_request.number,
        "title": pull_request.title,
        "author": author,
        "createdAt": pull_request.date,
        "status": "open",
        "repo": {"name": repo.name, "type": "model"},
        "isPullRequest": True,
        "events": [{"id": "0", "type": "comment", "author": author, "createdAt": pull_request.date, "data": comment}],
        "filesWithConflicts": [],
        "changes": {"base": "refs/heads/main"},
    }
