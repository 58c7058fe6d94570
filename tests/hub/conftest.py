"""A Hub on 127.0.0.1 and its clients."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, file_download

from .server import Account, HubServer


ALICE, ALICE_READ_ONLY, BOB = "hf_alice", "hf_alice_read_only", "hf_bob"
ACCOUNTS = {
    ALICE: Account("alice", organizations=("org",)),
    ALICE_READ_ONLY: Account("alice", organizations=("org",), role="read"),
    BOB: Account("bob"),
}
WITHOUT_PACKAGE = 'import sys; sys.modules["diffusers_dpm"] = None\n'


class Hub(HubServer):
    """The server, with tokens, and clients in this process and in others.

    `alice` may write to "alice/..." and "org/...", with `alice_read_only` she may read them; `bob` is a stranger.
    """

    alice, alice_read_only, bob = ALICE, ALICE_READ_ONLY, BOB

    def __init__(self, folder: Path) -> None:
        super().__init__(ACCOUNTS)
        self.folder = folder

    def api(self, token: str | bool = ALICE) -> HfApi:
        """A client in this process; `token=False` for nobody."""
        return HfApi(endpoint=self.url, token=token)

    def environment(self, cache: str, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Environment of a process whose Hub this is, with nothing of the user's own Hub settings."""
        theirs = re.compile("HF_|HUGGING|.*_proxy", re.IGNORECASE)
        inherited = {key: value for key, value in os.environ.items() if not theirs.match(key)}
        hub = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.folder / cache),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
        }
        return inherited | hub | ({"HF_TOKEN": token} if token else {})

    def run(
        self,
        code: str,
        *arguments: str | Path,
        token: str | None = None,
        cache: str | None = None,
        offline: bool = False,
        without_package: bool = False,
        returncode: int = 0,
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code in a process of its own, in an empty working directory.

        Args:
            code: may be indented; finds `arguments` in `sys.argv[1:]`.
            token: of an account; nobody by default.
            cache: a name; calls with the same name share HF_HOME. Fresh by default.
            offline: sets HF_HUB_OFFLINE.
            without_package: makes `import diffusers_dpm` fail.
            returncode: how the process must end; AssertionError with its output if it does not.
        """
        number = len(list(self.folder.iterdir()))
        working_directory = self.folder / f"run{number}"
        working_directory.mkdir()
        source = (WITHOUT_PACKAGE if without_package else "") + textwrap.dedent(code)
        result = subprocess.run(
            [sys.executable, "-c", source, *map(str, arguments)],
            env=self.environment(cache or f"home{number}", token, offline),
            cwd=working_directory,
            capture_output=True,
            text=True,
        )
        assert result.returncode == returncode, f"{result.stdout}\n{result.stderr}"
        return result


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A Hub without repositories."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        # For clients in this process: what huggingface_hub computes from its environment when it is imported. The
        # argument `endpoint` is not enough, huggingface_hub < 1 compares the addresses in answers with the constant.
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield hub
