"""`publish --with-space`: a Space over HTTP, whose code opens the page of the published model."""

import pytest
import yaml

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.hub.publish import publish_space
from diffusers_dpm.hub.upload import PublishError, upload
from tests.commands import error_of
from tests.models import make_run, save_run


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of huggingface_hub
REPO, SPACE = "org/name", "spaces/org/name-space"


def test_a_space_is_a_repository_beside_the_model(hub):
    address = publish_space(REPO, api=hub.api())
    assert address.startswith(f"{hub.url}/{SPACE}/commit/")
    files = {name: content.decode() for name, content in hub.files(SPACE).items()}
    assert set(files) == {"app.py", "requirements.txt", "README.md"}
    assert files["requirements.txt"] == "diffusers-dpm[app]\n"
    card = yaml.safe_load(files["README.md"].split("---")[1])
    assert card["sdk"] == "gradio"
    assert card["models"] == [REPO]
    assert REPO not in hub.repositories


def test_a_space_is_published_once_and_others_are_kept(hub):
    assert publish_space(REPO, private=True, api=hub.api()) == publish_space(REPO, api=hub.api())
    assert hub.repositories[SPACE].private
    assert len(hub.repositories[SPACE].history("main")) == 2
    other = {"repo_id": "org/other-space", "repo_type": "space"}
    hub.api().create_repo(space_sdk="gradio", **other)
    hub.api().upload_file(path_or_fileobj=b"1", path_in_repo="README.md", **other)
    with pytest.raises(PublishError, match=r"org/other-space holds other files \(README.md"):
        publish_space("org/other", api=hub.api())


def test_a_staged_space_is_not_written_over(tmp_path):
    assert publish_space(REPO, dry_run=True, staging_dir=tmp_path / "staged") is None
    assert (tmp_path / "staged-space" / "README.md").is_file()
    with pytest.raises(DiffusersDPMError, match="staged-space is not empty"):
        publish_space(REPO, dry_run=True, staging_dir=tmp_path / "staged")


def test_the_command_refuses_a_space_on_a_branch(capsys, tmp_path):
    arguments = (str(tmp_path), REPO, "--with-space")
    assert "--with-space is for the main branch" in error_of("publish", capsys, *arguments, "--revision", "b")
    assert "--with-space is for the main branch" in error_of("publish", capsys, *arguments, "--create-pr")


@pytest.mark.slow
def test_a_dry_run_shows_the_space(capsys, tmp_path):
    run, staged = make_run(tmp_path / "run"), tmp_path / "staged"
    assert cli(["publish", str(run), REPO, "--with-space", "--dry-run", "--staging-dir", str(staged)]) == 0
    shown = capsys.readouterr().out
    assert [shown.count(name) for name in ("  app.py", "  model_index.json", "nothing was uploaded")] == [1, 1, 2]
    assert f'build_app("{REPO}")' in (tmp_path / "staged-space" / "app.py").read_text()


@pytest.mark.slow
def test_the_code_of_the_space_serves_the_model_of_the_hub(hub, tmp_path):
    save_run(tmp_path / "run")
    upload(tmp_path / "run", REPO, api=hub.api())
    publish_space(REPO, api=hub.api())
    code = hub.files(SPACE)["app.py"].decode()
    assert code.count(".launch()") == 1
    served = "page = " + code.split("\n\n\n")[1].replace(".launch()", "")
    code = (
        code.split("\n\n\n")[0]
        + f"""
{served}
from gradio_client import Client

url = page.launch(prevent_thread_lock=True, quiet=True)[1]
picture, table = Client(url, verbose=False).predict(["ddim"], 20, 5, "0", "any class", 1, 0, "", api_name="/race")
print(table["data"][0][:2])
page.close()
"""
    )
    assert "['ddim', 5]" in hub.run(code).stdout
