"""The test Hub against the real client: what is uploaded comes back, and what should fail does so as on the Hub."""

import contextlib
import hashlib
import http.client
import json

import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.numpy import load_file, save_file

from .repository import LFS_SIZE


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of huggingface_hub
REPO = "org/model"
README = "---\nlicense: apache-2.0\nlibrary_name: diffusers\ntags: [toy]\n---\n# A model\n"


@pytest.fixture
def repo(hub):
    """An empty repository that alice may write to."""
    hub.api().create_repo(REPO)
    return REPO


@pytest.fixture
def folder(tmp_path):
    """A small repository on disk, as users have them."""
    (tmp_path / "folder" / "unet").mkdir(parents=True)
    (tmp_path / "folder" / "README.md").write_text(README)
    (tmp_path / "folder" / "unet" / "config.json").write_text("{}")
    (tmp_path / "folder" / "empty.txt").touch()
    save_file({"weight": np.arange(1000.0)}, tmp_path / "folder" / "unet" / "model.safetensors")
    return tmp_path / "folder"


def add(path, content):
    return CommitOperationAdd(path, content.encode() if isinstance(content, str) else content)


def commit(hub, *operations, token=None, **keywords):
    return hub.api(token or hub.alice).create_commit(REPO, operations, commit_message="A change", **keywords)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def download(hub, path, cache, token=False, **keywords):
    with open(hub.api(token).hf_hub_download(REPO, path, cache_dir=cache, **keywords), "rb") as file:
        return file.read()


def status(error):
    return error.value.response.status_code


class TestUploadAndDownload:
    def test_folder_comes_back_as_it_was(self, hub, repo, folder, tmp_path):
        hub.api().upload_folder(repo_id=repo, folder_path=folder)
        assert hub.files(repo) == contents(folder)
        snapshot = hub.api(token=False).snapshot_download(repo, local_dir=tmp_path / "copy")
        copy = {path: data for path, data in contents(tmp_path / "copy").items() if not path.startswith(".")}
        assert copy == contents(folder)
        assert np.array_equal(load_file(f"{snapshot}/unet/model.safetensors")["weight"], np.arange(1000.0))

    def test_upload_is_one_commit_after_its_lfs_objects(self, hub, repo, folder):
        hub.log.clear()
        hub.api().upload_folder(repo_id=repo, folder_path=folder)
        writes = dict.fromkeys(hub.requests("^(POST|PUT)"))  # without repetitions: some validate the card twice
        sha256 = hashlib.sha256((folder / "unet" / "model.safetensors").read_bytes()).hexdigest()
        assert list(writes) == [
            ("POST", "/api/validate-yaml", 200),
            ("POST", "/api/models/org/model/preupload/main", 200),
            ("POST", "/org/model.git/info/lfs/objects/batch", 200),
            ("PUT", f"/lfs/org/model/{sha256}", 200),
            ("POST", f"/lfs/org/model/{sha256}/verify", 200),
            ("POST", "/api/models/org/model/commit/main", 200),
        ]

    def test_lfs_by_name_by_size_and_by_content(self, hub, repo, tmp_path):
        large = tmp_path / "large.json"
        large.write_text(" " * (LFS_SIZE + 1))
        operations = [
            add("small.safetensors", b"text"),
            CommitOperationAdd("large.json", large),
            add("limit.json", " " * LFS_SIZE),
            add("sub/picture.png", b"\x89PNG\0"),
            add("config.json", "{}"),
        ]
        commit(hub, *operations)
        entries = {entry.path: entry for entry in hub.api().list_repo_tree(repo, recursive=True)}
        in_lfs = {path for path, entry in entries.items() if getattr(entry, "lfs", None)}
        assert in_lfs == {"small.safetensors", "large.json", "sub/picture.png"}
        assert entries["large.json"].lfs.sha256 == hashlib.sha256(large.read_bytes()).hexdigest()
        assert entries["large.json"].size == entries["large.json"].lfs.size == LFS_SIZE + 1
        assert download(hub, "large.json", tmp_path) == large.read_bytes()
        attributes = download(hub, ".gitattributes", tmp_path).decode().splitlines()
        assert [rule.split()[0] for rule in attributes if "/" in rule] == ["sub/picture.png"]

    def test_hashes_are_those_of_git(self, hub, repo):
        """As `printf 'hello\n' | git hash-object --stdin` has it, and the same for the pointer of an LFS file."""
        commit(hub, add("hello.txt", "hello\n"), add("hello.bin", "hello\n"))
        text, binary = hub.api().get_paths_info(repo, ["hello.txt", "hello.bin"])
        assert text.blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"
        assert binary.lfs.sha256 == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
        assert binary.lfs.pointer_size == 126
        assert binary.blob_id == "fa61e1ef71c9908c0926776a4aa3504b3a27f159"

    def test_unchanged_content_makes_no_commit(self, hub, repo, folder):
        first = hub.api().upload_folder(repo_id=repo, folder_path=folder)
        again = hub.api().upload_folder(repo_id=repo, folder_path=folder)
        assert again.oid == first.oid
        assert len(hub.requests("POST .*/commit/")) == 1
        assert len(hub.requests("PUT /lfs/")) == 1

    def test_delete_and_copy(self, hub, repo):
        commit(hub, add("a/1.txt", "1"), add("a/2.bin", "2"), add("b.txt", "b"), add("ab.txt", "ab"))
        commit(hub, CommitOperationCopy("a/2.bin", "c.bin"), CommitOperationDelete("b.txt"))
        assert hub.files(repo) == {"a/1.txt": b"1", "a/2.bin": b"2", "c.bin": b"2", "ab.txt": b"ab"}
        commit(hub, CommitOperationDelete("a/"))
        assert hub.files(repo) == {"c.bin": b"2", "ab.txt": b"ab"}
        with pytest.raises(EntryNotFoundError):
            commit(hub, add("new.txt", "new"), CommitOperationDelete("missing.txt"))
        assert hub.files(repo) == {"c.bin": b"2", "ab.txt": b"ab"}

    def test_trees(self, hub, repo):
        commit(hub, add("a/b/c.txt", "c"), add("a/d.txt", "d"), add("ab.txt", "ab"))

        def paths(**keywords):
            return [entry.path for entry in hub.api().list_repo_tree(repo, **keywords)]

        assert paths() == [".gitattributes", "a", "ab.txt"]
        assert paths(recursive=True) == [".gitattributes", "a", "a/b", "a/b/c.txt", "a/d.txt", "ab.txt"]
        assert paths(path_in_repo="a") == ["a/b", "a/d.txt"]
        with pytest.raises(EntryNotFoundError):
            paths(path_in_repo="missing")
        kinds = {entry.path: type(entry).__name__ for entry in hub.api().get_paths_info(repo, ["a", "ab.txt", "no"])}
        assert kinds == {"a": "RepoFolder", "ab.txt": "RepoFile"}

    def test_names_beyond_ascii(self, hub, repo, tmp_path):
        commit(hub, add("größe 100%/日本.bin", "w"))
        assert download(hub, "größe 100%/日本.bin", tmp_path) == b"w"
        assert [entry.path for entry in hub.requests("GET .*日本")] == ["/org/model/resolve/main/größe 100%/日本.bin"]
        with pytest.raises(EntryNotFoundError, match="日本語"):
            commit(hub, CommitOperationDelete("日本語.txt"))

    def test_model_info(self, hub, repo):
        sha = commit(hub, add("README.md", README), add("weights.bin", "weights")).oid
        info = hub.api(token=False).model_info(repo, files_metadata=True)
        assert (info.id, info.author, info.sha, info.private) == (repo, "org", sha, False)
        assert (info.library_name, info.tags, info.card_data.license) == ("diffusers", ["toy"], "apache-2.0")
        siblings = {file.rfilename: file for file in info.siblings}
        assert list(siblings) == [".gitattributes", "README.md", "weights.bin"]
        assert siblings["README.md"].size == len(README)
        assert siblings["weights.bin"].lfs.sha256 == hashlib.sha256(b"weights").hexdigest()

    def test_card_metadata_is_checked(self, hub, repo):
        with pytest.raises(ValueError, match="Invalid metadata"):
            commit(hub, add("README.md", "---\ntags: [\n---\n"))
        with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
            commit(hub, add("README.md", "# No metadata\n"))


class TestRevisions:
    def test_branch_tag_hash_and_main(self, hub, repo, tmp_path):
        first = commit(hub, add("x.txt", "1")).oid
        hub.api().create_tag(repo, tag="v1")
        hub.api().create_branch(repo, branch="old/er", revision=first)
        second = commit(hub, add("x.txt", "2")).oid
        third = commit(hub, add("x.txt", "3"), revision="old/er").oid
        wanted = {"main": b"2", "v1": b"1", "old/er": b"3", first: b"1", second[:7]: b"2", third: b"3"}
        for revision, content in wanted.items():
            assert download(hub, "x.txt", tmp_path, revision=revision) == content
        assert [item.commit_id for item in hub.api().list_repo_commits(repo, revision="old/er")][:2] == [third, first]
        refs = hub.api().list_repo_refs(repo)
        assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "old/er": third}
        assert [(ref.name, ref.ref) for ref in refs.tags] == [("v1", "refs/tags/v1")]

    def test_what_is_not_there(self, hub, repo, tmp_path):
        for revision in ("nope", "0" * 40, hub.api().model_info(repo).sha[:6]):
            with pytest.raises(RevisionNotFoundError):
                hub.api().model_info(repo, revision=revision)
        with pytest.raises(EntryNotFoundError) as error:
            download(hub, "nope.txt", tmp_path)
        assert error.value.response.headers["X-Repo-Commit"] == hub.api().model_info(repo).sha
        with pytest.raises(RevisionNotFoundError):
            commit(hub, add("x.txt", "1"), revision="nope")
        with pytest.raises(HfHubHTTPError) as error:
            hub.api().create_branch(repo, branch="main")
        assert status(error) == 409
        hub.api().create_branch(repo, branch="main", exist_ok=True)

    def test_a_commit_to_a_tag_or_a_hash_is_refused(self, hub, repo):
        hub.api().create_tag(repo, tag="v1")
        for revision in ("v1", hub.api().model_info(repo).sha):
            with pytest.raises(HfHubHTTPError) as error:
                commit(hub, add("x.txt", "1"), revision=revision)
            assert status(error) == 400
            assert hub.files(repo, revision) == {}

    def test_parent_commit(self, hub, repo):
        first = commit(hub, add("x.txt", "1")).oid
        second = commit(hub, add("x.txt", "2"), parent_commit=first).oid
        with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
            commit(hub, add("x.txt", "3"), parent_commit=first)
        assert status(error) == 412
        assert hub.files(repo) == {"x.txt": b"2"}
        commit(hub, add("x.txt", "3"), parent_commit=second[:10])
        assert hub.files(repo) == {"x.txt": b"3"}

    def test_pull_request_of_a_stranger(self, hub, repo, tmp_path):
        base = commit(hub, add("x.txt", "1")).oid
        proposed = commit(hub, add("x.txt", "2"), add("w.bin", "w"), token=hub.bob, create_pr=True)
        assert (proposed.pr_num, proposed.pr_revision) == (1, "refs/pr/1")
        assert hub.files(repo) == {"x.txt": b"1"}
        assert hub.files(repo, "refs/pr/1") == {"x.txt": b"2", "w.bin": b"w"}
        assert download(hub, "w.bin", tmp_path, revision="refs/pr/1") == b"w"
        commit(hub, add("x.txt", "3"), revision="refs/pr/1")
        assert hub.files(repo, "refs/pr/1")["x.txt"] == b"3"
        details = hub.api().get_discussion_details(repo, 1)
        assert (details.title, details.author, details.status) == ("A change", "bob", "open")
        assert (details.is_pull_request, details.git_reference) == (True, "refs/pr/1")

        commit(hub, add("x.txt", "4"))
        late = commit(hub, add("y.txt", "y"), create_pr=True, parent_commit=base)
        assert hub.files(repo, late.pr_revision) == {"x.txt": b"1", "y.txt": b"y"}
        opened = hub.api(hub.bob).create_pull_request(repo, title="A draft", description="Why")
        assert opened.events[0].content == "Why"
        assert hub.files(repo, opened.git_reference) == {"x.txt": b"4"}
        assert [found.num for found in hub.api().get_repo_discussions(repo)] == [1, 2, 3]
        refs = hub.api().list_repo_refs(repo, include_pull_requests=True)
        assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1", "refs/pr/2", "refs/pr/3"]


class TestPermissions:
    def test_whoami(self, hub):
        alice = hub.api().whoami()
        assert (alice["name"], [org["name"] for org in alice["orgs"]]) == ("alice", ["org"])
        assert hub.api(hub.alice_read_only).whoami()["auth"]["accessToken"]["role"] == "read"
        assert hub.api(hub.bob).whoami()["orgs"] == []
        with pytest.raises(OSError, match="Invalid user token") as error:
            hub.api("hf_wrong").whoami()
        assert status(error) == 401

    def test_create(self, hub):
        assert hub.api().create_repo("mine").repo_id == "alice/mine"
        assert hub.api().create_repo("org/private", private=True).repo_id == "org/private"
        assert hub.api().model_info("org/private").private
        with pytest.raises(HfHubHTTPError) as error:
            hub.api().create_repo("mine")
        assert status(error) == 409
        assert hub.api().create_repo("mine", exist_ok=True).repo_id == "alice/mine"
        refused = {False: 401, hub.alice_read_only: 403, hub.bob: 403}
        for token, code in refused.items():
            with pytest.raises(HfHubHTTPError) as error:
                hub.api(token).create_repo("org/new")
            assert status(error) == code
        assert sorted(hub.repositories) == ["alice/mine", "org/private"]

    def test_delete(self, hub, repo):
        with pytest.raises(HfHubHTTPError) as error:
            hub.api(hub.bob).delete_repo(repo)
        assert status(error) == 403
        hub.api().delete_repo(repo)
        assert not hub.api().repo_exists(repo)
        with pytest.raises(RepositoryNotFoundError):
            hub.api().delete_repo(repo)

    @pytest.mark.parametrize(("token", "code"), [(False, 401), ("hf_alice_read_only", 403), ("hf_bob", 403)])
    def test_write_without_rights(self, hub, repo, token, code):
        writes = [
            lambda api: api.create_commit(repo, [add("x.txt", "1")], commit_message="A change"),
            lambda api: api.create_branch(repo, branch="new"),
            lambda api: api.create_tag(repo, tag="new"),
            lambda api: api.update_repo_settings(repo, private=True),
        ]
        for write in writes:
            with pytest.raises(HfHubHTTPError) as error:
                write(hub.api(token))
            assert status(error) == code
        assert hub.files(repo) == {}
        assert list(hub.repositories[repo].refs) == ["refs/heads/main"]
        assert not hub.repositories[repo].private

    def test_private_is_not_there_for_others(self, hub, tmp_path):
        hub.api().create_repo(REPO, private=True)
        commit(hub, add("x.txt", "1"), add("w.bin", "w"))
        for token in (hub.alice, hub.alice_read_only):
            assert hub.api(token).repo_exists(REPO)
            assert download(hub, "w.bin", tmp_path / token, token) == b"w"
        for token, code in ((False, 401), (hub.bob, 404)):
            assert not hub.api(token).repo_exists(REPO)
            with pytest.raises(RepositoryNotFoundError) as error:
                download(hub, "x.txt", tmp_path / "other", token)
            assert status(error) == code
            with pytest.raises(RepositoryNotFoundError):
                hub.api(token).snapshot_download(REPO, cache_dir=tmp_path / "other")
        with pytest.raises(RepositoryNotFoundError):
            commit(hub, add("x.txt", "2"), token=hub.bob, create_pr=True)

    def test_gated_is_listed_but_not_downloaded(self, hub, repo, tmp_path):
        commit(hub, add("x.txt", "1"))
        hub.api().update_repo_settings(repo, gated="auto")
        assert download(hub, "x.txt", tmp_path / "alice", hub.alice) == b"1"
        for token, code in ((False, 401), (hub.bob, 403)):
            assert hub.api(token).model_info(repo).gated == "auto"
            with pytest.raises(GatedRepoError) as error:
                download(hub, "x.txt", tmp_path / "other", token)
            assert status(error) == code

    def test_missing_repository(self, hub):
        for name in ("org/nothing", "nothing"):
            assert not hub.api().repo_exists(name)
            with pytest.raises(RepositoryNotFoundError):
                hub.api(token=False).model_info(name)


class TestProtocol:
    """What the client of today does not ask for, and others do."""

    def send(self, hub, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def test_ranges(self, hub, repo):
        commit(hub, add("x.txt", "0123456789"))
        wanted = {
            "bytes=4-": (206, b"456789", "bytes 4-9/10"),
            "bytes=0-0": (206, b"0", "bytes 0-0/10"),
            "bytes=8-99": (206, b"89", "bytes 8-9/10"),
            "bytes=-3": (206, b"789", "bytes 7-9/10"),
            "bytes=-99": (206, b"0123456789", "bytes 0-9/10"),
            "bytes=1-2,4-5": (200, b"0123456789", None),
            "bytes=-": (200, b"0123456789", None),
        }
        for part, expected in wanted.items():
            code, headers, body = self.send(hub, "GET", "/org/model/resolve/main/x.txt", Range=part)
            assert (code, body, headers["Content-Range"]) == expected
        code, headers, _ = self.send(hub, "GET", "/org/model/resolve/main/x.txt", Range="bytes=10-")
        assert (code, headers["Content-Range"]) == (416, "bytes */10")

    def test_head_has_the_headers_of_get(self, hub, repo):
        sha = commit(hub, add("w.bin", "0123456789")).oid
        etag = f'"{hashlib.sha256(b"0123456789").hexdigest()}"'
        for method, expected in (("HEAD", b""), ("GET", b"0123456789")):
            code, headers, body = self.send(hub, method, "/org/model/resolve/main/w.bin")
            assert (code, body) == (200, expected)
            assert (headers["Content-Length"], headers["X-Linked-Size"]) == ("10", "10")
            assert (headers["ETag"], headers["X-Linked-ETag"], headers["X-Repo-Commit"]) == (etag, etag, sha)

    def test_private_as_older_clients_send_it(self, hub):
        headers = {"Authorization": f"Bearer {hub.alice}"}
        body = json.dumps({"name": "old", "organization": "org", "type": "model", "private": True})
        assert self.send(hub, "POST", "/api/repos/create", body, **headers)[0] == 200
        hub.api().update_repo_settings("org/old", gated="manual")
        assert (hub.repositories["org/old"].private, hub.repositories["org/old"].gated) == (True, "manual")
        self.send(hub, "PUT", "/api/models/org/old/settings", json.dumps({"private": False}), **headers)
        assert not hub.repositories["org/old"].private

    def test_unspoken_and_malformed_requests(self, hub, repo):
        assert self.send(hub, "GET", "/api/datasets/org/data")[0] == 501
        with pytest.raises(HfHubHTTPError) as error:
            hub.api().create_repo("data", repo_type="dataset")
        assert status(error) == 501
        headers = {"Authorization": f"Bearer {hub.alice}"}
        for body in (b"{", b"{}", b'{"key": "header", "value": {"summary": "x"}}\n{"key": "unknown"}'):
            assert self.send(hub, "POST", "/api/models/org/model/commit/main", body, **headers)[0] == 400
        assert hub.files(repo) == {}

    def test_lfs_content_must_have_its_hash(self, hub, repo):
        oid = hashlib.sha256(b"announced").hexdigest()
        headers = {"Authorization": f"Bearer {hub.alice}"}
        assert self.send(hub, "PUT", f"/lfs/org/model/{oid}", b"sent")[0] == 400
        verify = f"/lfs/org/model/{oid}/verify"
        assert self.send(hub, "POST", verify, json.dumps({"oid": oid, "size": 9}), **headers)[0] == 404
        lines = [
            {"key": "header", "value": {"summary": "x"}},
            {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": oid, "size": 9}},
        ]
        body = "\n".join(map(json.dumps, lines))
        code, _, answer = self.send(hub, "POST", "/api/models/org/model/commit/main", body, **headers)
        assert (code, json.loads(answer)["error"]) == (400, "The LFS object of w.bin has not been uploaded")
        assert hub.files(repo) == {}
        assert self.send(hub, "PUT", f"/lfs/org/model/{oid}", b"announced")[0] == 200
        assert self.send(hub, "POST", verify, json.dumps({"oid": oid, "size": 9}), **headers)[0] == 200
        assert self.send(hub, "POST", verify, json.dumps({"oid": oid, "size": 8}), **headers)[0] == 404
        assert self.send(hub, "POST", "/api/models/org/model/commit/main", body, **headers)[0] == 200
        assert hub.files(repo) == {"w.bin": b"announced"}


class TestFaults:
    @pytest.mark.needs("huggingface-hub>=1", reason="the client of then gives up")
    def test_the_client_tries_again_after_503_and_429(self, hub, repo, tmp_path):
        hub.inject("PUT /lfs", status=503)
        hub.inject("GET .*/resolve", status=429, headers={"Retry-After": "0"})
        commit(hub, add("w.bin", "w"))
        assert [entry.status for entry in hub.requests("PUT /lfs")] == [503, 200]
        assert download(hub, "w.bin", tmp_path) == b"w"
        assert [entry.status for entry in hub.requests("GET .*/resolve")] == [429, 200]

    def test_lost_upload_is_sent_again(self, hub, repo):
        hub.inject("PUT /lfs", drop_request=True)
        commit(hub, add("w.bin", "w"))
        assert [entry.status for entry in hub.requests("PUT /lfs")] == [None, 200]
        assert hub.files(repo) == {"w.bin": b"w"}

    def test_failed_commit_changes_nothing_and_is_not_repeated(self, hub, repo):
        hub.inject("POST .*/commit", status=500)
        with pytest.raises(HfHubHTTPError) as error:
            commit(hub, add("w.bin", "w"))
        assert status(error) == 500
        assert hub.files(repo) == {}
        commit(hub, add("w.bin", "w"))
        assert hub.files(repo) == {"w.bin": b"w"}
        assert len(hub.requests("PUT /lfs")) == 1

    def test_a_lost_request_commits_nothing_a_lost_answer_does(self, hub, repo):
        hub.inject("POST .*/commit", drop_request=True)
        hub.inject("POST .*/commit", first=2, drop_response=0)
        for expected in ({}, {"x.txt": b"1"}):
            with pytest.raises(Exception, match=r"(?i)disconnected|aborted"):
                commit(hub, add("x.txt", "1"))
            assert hub.files(repo) == expected
        assert [entry.status for entry in hub.requests("POST .*/commit")] == [None, None]

    def test_interrupted_download_is_resumed(self, hub, repo, tmp_path):
        weights = np.arange(DOWNLOAD_CHUNK_SIZE // 4, dtype=np.float64).tobytes()  # two chunks; one arrives
        commit(hub, add("w.bin", weights))
        hub.inject("GET .*/w.bin", drop_response=DOWNLOAD_CHUNK_SIZE + 1000)
        with contextlib.suppress(OSError):  # huggingface_hub < 1 resumes at the next call only
            download(hub, "w.bin", tmp_path)
        assert download(hub, "w.bin", tmp_path) == weights
        assert [entry.status for entry in hub.requests("GET .*/w.bin")] == [200, 206]

    def test_corrupt_download_has_the_right_size(self, hub, repo, tmp_path):
        commit(hub, add("w.bin", b"\0\1\2"))
        hub.inject("GET .*/w.bin", corrupt=True)
        assert download(hub, "w.bin", tmp_path) == b"\xff\xfe\xfd"
        assert download(hub, "w.bin", tmp_path, force_download=True) == b"\0\1\2"

    def test_headers_of_a_fault(self, hub, repo):
        hub.inject("GET .*/models/", status=429, headers={"Retry-After": "7"})
        with pytest.raises(HfHubHTTPError, match="injected fault") as error:
            hub.api().model_info(repo)
        assert (status(error), error.value.response.headers["Retry-After"]) == (429, "7")

    def test_fault_strikes_from_the_nth_request_on(self, hub, repo):
        hub.inject("GET /api/models/org/model$", first=2, times=2, status=500)
        for expected in (200, 500, 500, 200):
            if expected == 500:
                with pytest.raises(HfHubHTTPError):
                    hub.api().model_info(repo)
            else:
                hub.api().model_info(repo)
            assert hub.log[-1].status == expected

    @pytest.mark.needs("huggingface-hub>=1", reason="the client of then gives up")
    def test_server_error_means_the_cached_file(self, hub, repo, tmp_path):
        commit(hub, add("x.txt", "1"))
        download(hub, "x.txt", tmp_path)
        commit(hub, add("x.txt", "2"))
        hub.inject("HEAD", status=500)
        assert download(hub, "x.txt", tmp_path) == b"1"
        assert download(hub, "x.txt", tmp_path) == b"2"


class TestRun:
    def test_environment(self, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "the user's own")
        monkeypatch.setenv("https_proxy", "http://proxy.invalid")
        code = """
            import os, sys
            print(sys.argv[1:], os.listdir(), os.environ["HF_HOME"], os.environ["HF_ENDPOINT"])
            print(os.environ.get("HF_TOKEN"), os.environ["HF_HUB_OFFLINE"], os.environ.get("https_proxy"))
        """

        def lines(*arguments, **keywords):
            return hub.run(code, *arguments, **keywords).stdout.splitlines()

        assert lines(tmp := hub.folder) == [f"['{tmp}'] [] {tmp}/home0 {hub.url}", "None 0 None"]
        assert lines(token=hub.bob, cache="a", offline=True) == [f"[] [] {tmp}/a {hub.url}", "hf_bob 1 None"]
        assert len({lines()[0], lines()[0], lines(cache="a")[0], lines(cache="a")[0]}) == 3

    def test_how_it_ends(self, hub):
        assert hub.run("import sys; sys.exit('error: bad')", returncode=1).stderr == "error: bad\n"
        with pytest.raises(AssertionError, match="error: bad"):
            hub.run("import sys; sys.exit('error: bad')")
        with pytest.raises(AssertionError):
            hub.run("pass", returncode=2)

    def test_without_the_package(self, hub):
        code = "import sys; print(sys.modules.get('diffusers_dpm', 'free'))"
        assert hub.run(code).stdout == "free\n"
        assert hub.run(code, without_package=True).stdout == "None\n"
        error = hub.run("import diffusers_dpm", without_package=True, returncode=1).stderr
        assert "ModuleNotFoundError: import of diffusers_dpm" in error


PUSH = """
import sys
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
    block_out_channels=(4, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
)
DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10)).push_to_hub("org/ddpm", private=True)
torch.save(unet.state_dict(), sys.argv[1])
"""

LOAD = """
import sys
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("org/ddpm")
weights = torch.load(sys.argv[1])
assert all(torch.equal(value, weights[name]) for name, value in pipe.unet.state_dict().items())
try:
    import diffusers_dpm.schedulers
except ImportError:
    print(type(pipe).__name__, pipe.scheduler.config.num_train_timesteps)
"""


@pytest.mark.slow
def test_plain_diffusers_pushes_and_loads_a_pipeline(hub, tmp_path):
    weights = tmp_path / "weights.pt"
    hub.run(PUSH, weights, token=hub.alice)
    assert hub.repositories["org/ddpm"].private
    index = json.loads(hub.files("org/ddpm")["model_index.json"])
    assert index["unet"] == ["diffusers", "UNet2DModel"]

    hub.log.clear()
    result = hub.run(LOAD, weights, token=hub.alice_read_only, without_package=True)
    assert result.stdout == "DDPMPipeline 10\n"
    assert [entry.status for entry in hub.requests("GET .*/unet/diffusion_pytorch_model.safetensors")] == [200]
    assert {entry.status for entry in hub.requests("HEAD|GET")} == {200}
