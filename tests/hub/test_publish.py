"""Publishing over HTTP: one commit or none, nothing lost, and a repository that plain diffusers loads."""

import huggingface_hub
import pytest

from diffusers_dpm.commands.main import main as cli
from diffusers_dpm.hub import upload as upload_module
from diffusers_dpm.hub.upload import PublishError, log_in, upload, within
from tests.models import make_run


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of huggingface_hub
REPO = "org/name"
COMMIT, LFS = "POST .*/commit/", "PUT /lfs"


@pytest.fixture
def folder(tmp_path):
    """Small files in the place of a staged folder."""
    (tmp_path / "staged" / "unet").mkdir(parents=True)
    (tmp_path / "staged" / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# A model\n")
    (tmp_path / "staged" / "unet" / "weights.safetensors").write_bytes(bytes(range(256)))
    return tmp_path / "staged"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commits(hub, revision="main"):
    """Commits after the one that creates the repository."""
    return len(hub.repositories[REPO].history(revision)) - 1


def test_one_commit_that_is_read_back(hub, folder):
    address = upload(folder, REPO, api=hub.api())
    assert hub.files(REPO) == contents(folder)
    assert commits(hub) == 1
    assert address.startswith(f"{hub.url}/{REPO}/commit/")
    after = hub.log.index(hub.requests(COMMIT)[0])
    downloaded = {
        entry.path.split("/", 5)[-1] for entry in hub.log[after:] if entry.path.startswith(f"/{REPO}/resolve/")
    }
    assert downloaded >= set(contents(folder))
    assert not hub.repositories[REPO].private


def test_private_is_private_before_anything_is_sent(hub, folder):
    upload(folder, REPO, private=True, api=hub.api())
    assert hub.repositories[REPO].private
    created = [entry.path for entry in hub.log].index("/api/repos/create")
    sent = [i for i, entry in enumerate(hub.log) if entry.method == "PUT" or "/commit/" in entry.path]
    assert created < min(sent)
    assert not hub.requests("PUT .*/settings")


def test_private_is_refused_where_the_repository_is_public(hub, folder):
    hub.api().create_repo(REPO)
    with pytest.raises(PublishError, match=rf"{REPO} .*--private"):
        upload(folder, REPO, private=True, api=hub.api())
    assert commits(hub) == 0


def test_the_same_again_makes_no_commit(hub, folder):
    address = upload(folder, REPO, api=hub.api())
    assert upload(folder, REPO, api=hub.api()) == address
    assert commits(hub) == 1


def test_other_content_is_kept_unless_forced(hub, folder):
    hub.api().create_repo(REPO)
    hub.api().upload_file(path_or_fileobj=b"1", path_in_repo="theirs.txt", repo_id=REPO)
    with pytest.raises(PublishError, match=r"theirs.txt, .*--force.*--create-pr"):
        upload(folder, REPO, api=hub.api())
    assert hub.files(REPO) == {"theirs.txt": b"1"}
    upload(folder, REPO, force=True, api=hub.api())
    assert hub.files(REPO) == contents(folder)
    assert commits(hub) == 2


def test_pull_request_of_somebody_without_rights(hub, folder):
    hub.api().create_repo(REPO)
    hub.api().upload_file(path_or_fileobj=b"1", path_in_repo="theirs.txt", repo_id=REPO)
    address = upload(folder, REPO, create_pr=True, api=hub.api(hub.bob))
    assert "/discussions/1" in address
    assert hub.files(REPO) == {"theirs.txt": b"1"}
    assert hub.files(REPO, "refs/pr/1") == contents(folder)


def test_pull_request_to_a_repository_that_is_not_there(hub, folder):
    with pytest.raises(PublishError, match=rf"{REPO}: .*404"):
        upload(folder, REPO, create_pr=True, api=hub.api())
    assert REPO not in hub.repositories


def test_branch(hub, folder):
    upload(folder, REPO, api=hub.api())
    before = hub.files(REPO)
    (folder / "more.txt").write_text("2")
    hub.inject(COMMIT, drop_request=True)
    with pytest.raises(PublishError, match=rf"{REPO}: "):
        upload(folder, REPO, revision="v2", api=hub.api())
    upload(folder, REPO, revision="v2", api=hub.api())  # the branch is there now, and holds what main holds
    assert hub.files(REPO) == before
    assert hub.files(REPO, "v2") == contents(folder)
    (folder / "more.txt").write_text("3")
    for revision in ("v2", "main"):
        with pytest.raises(PublishError, match="--force"):
            upload(folder, REPO, revision=revision, api=hub.api())


@pytest.mark.parametrize("fault", [{"drop_request": True}, {"status": 500}, {"status": 412}, {"status": 403}])
def test_failed_commit_leaves_what_was_there(fault, hub, folder):
    upload(folder, REPO, api=hub.api())
    before = contents(folder)
    (folder / "unet" / "weights.safetensors").write_bytes(b"new")
    hub.inject(COMMIT, **fault)
    with pytest.raises(PublishError, match=REPO):
        upload(folder, REPO, force=True, api=hub.api())
    assert hub.files(REPO) == before
    upload(folder, REPO, force=True, api=hub.api())
    assert hub.files(REPO) == contents(folder)


def test_a_hub_that_never_answers_is_given_up(hub, folder, monkeypatch):
    """The client itself waits for ever."""
    hub.inject("GET /api/whoami", hang=True)
    monkeypatch.setattr(upload_module, "ANSWER_SECONDS", 0.2)
    with pytest.raises(PublishError, match="cannot log in: no end after 0 seconds"):
        log_in(hub.api())
    assert log_in(hub.api()) == "alice"
    hub.inject(COMMIT, hang=True)
    with pytest.raises(PublishError, match=f"{REPO}: no end after 1 seconds"):
        within(1, f"cannot publish to {REPO}", lambda: upload(folder, REPO, api=hub.api()))
    assert hub.files(REPO) == {}
    within(60, "", lambda: upload(folder, REPO, api=hub.api()))
    assert hub.files(REPO) == contents(folder)


def test_errors_within_the_time_are_the_works_own():
    with pytest.raises(ZeroDivisionError):
        within(60, "", lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="of the work"):
        within(60, "", lambda: (_ for _ in ()).throw(TimeoutError("of the work")))


def test_failed_first_upload_can_be_run_again(hub, folder):
    hub.inject(LFS, status=400, times=100)
    with pytest.raises(PublishError, match=rf"{REPO}: .*weights\.safetensors"):
        upload(folder, REPO, api=hub.api())
    assert hub.files(REPO) == {}
    hub.faults.clear()
    upload(folder, REPO, api=hub.api())
    assert hub.files(REPO) == contents(folder)
    assert commits(hub) == 1


def test_somebody_else_commits_in_between(hub, folder, monkeypatch):
    upload(folder, REPO, api=hub.api())
    (folder / "more.txt").write_text("2")
    api = hub.api()
    create_commit = api.create_commit

    def late(*arguments, **keywords):
        hub.api().upload_file(path_or_fileobj=b"1", path_in_repo="theirs.txt", repo_id=REPO)
        return create_commit(*arguments, **keywords)

    monkeypatch.setattr(api, "create_commit", late)
    with pytest.raises(PublishError, match=rf"{REPO}: .*412"):
        upload(folder, REPO, force=True, api=api)
    assert "theirs.txt" in hub.files(REPO)


def test_damage_on_the_way_back_is_found(hub, folder):
    hub.inject("GET .*/resolve/.*weights", corrupt=True, times=2)
    for _ in range(2):  # the second time there is nothing to upload, and it is looked at again
        with pytest.raises(PublishError, match=r"http.*weights\.safetensors "):
            upload(folder, REPO, api=hub.api())
    upload(folder, REPO, api=hub.api())
    assert commits(hub) == 1


@pytest.mark.parametrize("token", ["bob", "alice_read_only"])
def test_no_right_to_write(token, hub, folder):
    with pytest.raises(PublishError, match=rf"{REPO}: .*403"):
        upload(folder, REPO, api=hub.api(getattr(hub, token)))
    assert REPO not in hub.repositories


def test_not_logged_in(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(PublishError, match="`hf auth login`"):
        log_in(hub.api(None))
    with pytest.raises(PublishError, match="Invalid user token"):
        log_in(hub.api("hf_wrong"))
    assert log_in(hub.api()) == "alice"


def test_no_connection(folder):
    nobody = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="hf_alice")
    with pytest.raises(PublishError, match="Connection refused"):
        log_in(nobody)
    with pytest.raises(PublishError, match=rf"{REPO}: .*Connection refused"):
        upload(folder, REPO, api=nobody)


def test_a_trained_run_that_cannot_be_published_is_kept(hub, tmp_path, monkeypatch, capsys):
    """Trained, given a component that is not ours, and trained further: `stage` refuses it."""
    monkeypatch.setenv("HF_TOKEN", hub.alice)
    unet = make_run(tmp_path / "other") / "unet"
    run = tmp_path / "my run"
    options = [
        *("--data=digits", f"--unet-config={unet}", f"--output-dir={run}", "--batch-size=4", "--lr-warmup-steps=0"),
        *("--sample-every=0", "--log-with=none", "--cpu"),
    ]
    assert cli(["train", *options, "--max-train-steps=1"]) == 0
    (run / "classifier").mkdir()
    (run / "classifier" / "config.json").write_text('{"_class_name": "SomebodysClassifier"}')
    capsys.readouterr()
    push = ["--resume", "--max-train-steps=2", f"--push-to-hub={REPO}", "--hub-private"]
    assert cli(["train", *options, *push]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {run}/classifier/config.json: _class_name must be NoisyClassifier")
    assert error.endswith(f"; the run is kept, publish it with: diffusers-dpm publish '{run}' {REPO} --private")
    assert (run / "checkpoints" / "step-00000002").is_dir()
    assert REPO not in hub.repositories


PUBLISH = """
import sys
from diffusers_dpm.commands.main import main
sys.exit(main(["publish", sys.argv[1], "org/name", "--private", "--variant", "fp16"]))
"""
PLAIN = """
import sys, warnings
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils import get_class_from_dynamic_module
warnings.simplefilter("ignore")

def draw(pipe, **arguments):
    return pipe(num_inference_steps=4, output_type="np", **arguments).images.sum().item()

print(draw(DiffusionPipeline.from_pretrained("org/name"), generator=torch.Generator().manual_seed(0)))
print("plain is loaded", file=sys.stderr)
DiffusionPipeline.from_pretrained("org/name", variant="fp16")
pipe = DiffusionPipeline.from_pretrained("org/name", custom_pipeline="pipeline_dpm", trust_remote_code=True)
AutoModel.from_pretrained("org/name", subfolder="classifier", trust_remote_code=True)
cls = get_class_from_dynamic_module(
    "org/name",
    "scheduling_analytic_dpm.py",
    subfolder="analytic_dpm",
    class_name="AnalyticDPMScheduler",
    trust_remote_code=True,
)
pipe.scheduler = cls.from_pretrained("org/name", subfolder="analytic_dpm")
print(draw(pipe, seeds=[0]))
"""
PACKAGE = """
from diffusers_dpm.pipelines import DPMPipeline, NoisyClassifier
from diffusers_dpm.schedulers import AnalyticDPMScheduler
classifier = NoisyClassifier.from_pretrained("org/name", subfolder="classifier")
pipe = DPMPipeline.from_pretrained("org/name", classifier=classifier)
pipe.scheduler = AnalyticDPMScheduler.from_pretrained("org/name", subfolder="analytic_dpm")
print(pipe(seeds=[0], num_inference_steps=4, output_type="np").images.sum().item())
"""


@pytest.mark.slow
def test_the_command_and_every_way_of_loading(hub, tmp_path):
    run = make_run(tmp_path / "run", extras=True)
    printed = hub.run(PUBLISH, run, token=hub.alice).stdout
    assert "published, and read back unchanged" in printed
    assert commits(hub) == 1
    assert hub.repositories[REPO].private
    files = hub.files(REPO)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files
    assert not {name for name in files if "checkpoint" in name or "secret" in name or "logs" in name}

    hub.log.clear()
    plain = hub.run(PLAIN, token=hub.alice_read_only, without_package=True)
    before = plain.stderr.split("plain is loaded")[0]
    assert "Warning" not in before
    assert "not expected" not in before
    requests = [entry.path for entry in hub.requests("GET .*/resolve/")]
    first = requests[: next(i for i, path in enumerate(requests) if "fp16" in path)]
    assert {path.split("/", 5)[-1] for path in first} == {
        *("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"),
        "unet/diffusion_pytorch_model.safetensors",
    }
    with_package = hub.run(PACKAGE, token=hub.alice_read_only)
    assert with_package.stdout.split() == plain.stdout.split()[1:]
