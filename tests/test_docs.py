"""The documentation is true: its code runs as it stands, its options exist, its links lead somewhere.

Each page runs by itself, in a directory of its own: its blocks in order, Python blocks in one namespace. A line
`expression  # literal` must have that value. A notebook is a page whose blocks are its cells of code. `path/to/images`
holds a few digits, `path/to/clip` a tiny CLIP, `runs/mine` is a small run, and the Hub is one on 127.0.0.1, with
random networks under the names of the checkpoints that the pages load.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from packaging.requirements import Requirement
from PIL import Image
from sklearn.datasets import load_digits

from diffusers_dpm.commands.main import main as diffusers_dpm
from tests.conftest import forget_accelerator
from tests.hub.conftest import hub  # noqa: F401 (a fixture)
from tests.hub.server import Account
from tests.models import save_clip
from tests.original_networks import Flags, OpenAIClassifier, OpenAIUNet, randomised
from tests.pipelines.tiny_diffusion_pipelines import save_stable_diffusion
from tests.pipelines.tiny_pipelines import built


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *NOTEBOOKS, ROOT / "benchmarks" / "README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY, SITE = PROJECT["urls"]["Source"], PROJECT["urls"]["Documentation"]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# What makes a command take seconds; later options win over those of the page. Forty steps suffice for samples to
# depend on their noise, without which there is nothing to calibrate in runs/mine.
SMALL = {
    "train": "--max-train-steps 2 --batch-size 16 --learning-rate 1e-3 --lr-warmup-steps 0 "
    "--sample-every 0 --log-with none",
    "train runs/mine": "--max-train-steps 40 --ema-snapshot-every 20 --log-with tensorboard",
    "ema": "",
    "train --resume": "--max-train-steps 41",
    "train-classifier": "--max-train-steps 2 --log-with none",
    "train-variance": "--max-train-steps 2 --log-with none",
    "train-features": "--max-train-steps 2 --log-with none",
    "statistics": "--num-samples 2 --timesteps 3",
    "calibrate": "--steps 5 10 --num-images 16 --max-walks 1 --teacher-steps 20",
    "calibrate --prompts": "--steps 2 --num-images 1 --max-walks 0 --teacher-steps 4 --call height=8 width=8 "
    "--dtype float32",
    "publish-calibration": "",
    "likelihood": "--num-images 2",
    "likelihood --method": "--solver rk4 --num-steps 2",
    "sample": "--seeds 0-3",
    "encode": "--num-images 2",
    "evaluate": "--num-images 20 --num-resamples 2",
    "evaluate-pipeline": "--seeds 0 --steps 2 3 --reference-steps 4 --cpu",
    "evaluate-pipeline --call": "--call height=8 width=8 guidance_scale=6",
    "compare": "",
    "publish": "",
    "convert": "--resolution 16 --attention-head-dim 32",
}


def page_name(page):
    return page.relative_to(ROOT).with_suffix("").as_posix()


def read(page):
    """The text of a page; of a notebook, as a page would have it."""
    text = page.read_text(encoding="utf-8")
    return "\n\n".join(map(cell_text, json.loads(text)["cells"])) if page in NOTEBOOKS else text


def cell_text(cell):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    if source[0] in "!%":  # commands, all of them: !diffusers-dpm ... or %pip install ...
        return f"```bash\n{re.sub('^[!%]', '', source, flags=re.MULTILINE)}\n```"
    return f"```python\n{source}\n```"


def blocks(page):
    """(language, code, line number of its first line) of each block that runs."""
    text = read(page)
    return [(match[1], match[2], text[: match.start(2)].count("\n") + 1) for match in BLOCK.finditer(text)]


def command_lines(code):
    """The words of each command of a shell block."""
    lines = code.replace("\\\n", " ").replace(" && ", "\n").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands(page):
    """The arguments of each `diffusers-dpm` of a page, `accelerate launch -m diffusers_dpm.commands.main` included."""
    lines = [words for language, code, _ in blocks(page) if language == "bash" for words in command_lines(code)]
    module = "diffusers_dpm.commands.main"
    starts = [words.index(module) if module in words else 0 for words in lines]
    return [words[i + 1 :] for words, i in zip(lines, starts, strict=True) if words[i] in ("diffusers-dpm", module)]


def small(arguments):
    name = arguments[0]
    options = [SMALL[key] for key in SMALL if key.split()[0] == name and {*key.split()[1:]} <= {*arguments}]
    return [*arguments, *" ".join(options).split()]


# Repositories that the pages load by name -> a tiny pipeline of their class and scheduler.
TINY = {
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
    "stabilityai/stable-diffusion-3-medium-diffusers": "StableDiffusion3Pipeline",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "WanPipeline UniPC",
    "playgroundai/playground-v2.5-1024px-aesthetic": "StableDiffusionXLPipeline EDMDPMSolver",
    "stabilityai/stable-video-diffusion-img2vid-xt": "StableVideoDiffusionPipeline",
}


# Running a page ------------------------------------------------------------------------------------------------------


def run_python(code, page, line, names):
    tree = ast.increment_lineno(ast.parse(code), line - 1)
    lines = code.splitlines()
    for node in tree.body:
        if not isinstance(node, ast.Expr):
            exec(compile(ast.Module([node], []), page.name, "exec"), names)
            continue
        value = eval(compile(ast.Expression(node.value), page.name, "eval"), names)
        comment = lines[node.end_lineno - line][node.end_col_offset :].partition("#")[2].strip()
        try:
            expected = ast.literal_eval(comment)
        except (SyntaxError, ValueError):  # prose
            continue
        assert value == expected, f"{page.name}, line {node.lineno}: {value}"


def run_command(words):
    """Run a command of the package, small; of others, check what can be checked without a download."""
    if words[0] == "diffusers-dpm":
        forget_accelerator()  # of an earlier command, as in a process of its own
        assert diffusers_dpm(small(words[1:])) == 0, words
    elif words[0] == "accelerate":
        module, environment = words.index("-m"), os.environ | {"OMP_NUM_THREADS": "1"}
        options = words[2:module]
        if "--use_fsdp" in options:  # which the launcher refuses on CPUs; what it says to the processes is this
            options, fsdp = options[:2], options[3:]
            names = [name.removeprefix("--").upper() for name in fsdp[::2]]
            environment |= {"ACCELERATE_USE_FSDP": "true", **dict(zip(names, fsdp[1::2], strict=True))}
            environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] = environment.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *options, *words[module : module + 2]]
        subprocess.run([*launch, *small(words[module + 2 :])], env=environment, check=True)
    elif words[:2] == ["pip", "install"]:
        requirement = Requirement(words[2])
        assert requirement.name == PROJECT["name"]
        assert requirement.extras <= PROJECT["optional-dependencies"].keys()
    elif words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif words[0] == "git":
        assert words == ["git", "clone", REPOSITORY]
    else:
        assert words == ["cd", REPOSITORY.split("/")[-1]], f"no rule for {words}"


def save_digits(folder, indices):
    digits = load_digits()
    for i in indices:
        path = folder / str(digits.target[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 255 / 16).round().astype(np.uint8)).save(path)


def save_checkpoints(folder):
    """Files of a network and a classifier as guided-diffusion has them, small."""
    flags = Flags(num_res_blocks=1, num_head_channels=32, classes=1000)
    for name, cls in {"diffusion": OpenAIUNet, "classifier": OpenAIClassifier}.items():
        torch.save(randomised(cls(flags)).state_dict(), folder / f"64x64_{name}.pt")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Images, and a run with everything that a run can have."""
    folder = tmp_path_factory.mktemp("workspace")
    save_digits(folder / "path/to/images", range(64))
    save_digits(folder / "path/to/test/images", range(64, 80))
    save_checkpoints(folder)
    save_clip(folder / "path/to/clip")
    save_stable_diffusion(folder / "path/to/pipeline")
    for name in ("prompts.txt", "others.txt"):
        (folder / name).write_text("a fox\na hen\n")
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        context.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        for line in (
            "train --data path/to/images --output-dir runs/mine",
            "train-classifier runs/mine --data path/to/images",
            "statistics runs/mine --data path/to/images",
            "calibrate runs/mine",
        ):
            run_command(["diffusers-dpm", *line.split()])
    shutil.rmtree(folder / "runs/mine/classifier_training")  # a page that trains another must not resume this one
    (folder / "runs/other").symlink_to("mine")  # two evaluations to compare
    return folder


@pytest.fixture
def hub_with_checkpoint(hub, tmp_path, monkeypatch):  # noqa: F811
    """The Hub of this process: an account `your-name`, and an old DDPM checkpoint, its files side by side."""
    hub.accounts["hf_yours"] = Account("your-name")
    hub.accounts["hf_google"] = Account("google")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_yours")
    torch.manual_seed(0)
    unet = UNet2DModel(
        32,
        3,
        3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    folder = tmp_path / "checkpoint"
    DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder)
    for part in ("unet", "scheduler"):
        shutil.copytree(folder / part, folder, dirs_exist_ok=True)
        shutil.rmtree(folder / part)
    api = hub.api("hf_google")
    api.create_repo("google/ddpm-cifar10-32")
    api.upload_folder(repo_id="google/ddpm-cifar10-32", folder_path=folder)


def publish_tiny_pipelines(hub, page, folder, monkeypatch):  # noqa: F811
    """Those that the page names, which load without tokenizers and text encoders: they have none."""
    text = read(page)
    for repo_id, name in TINY.items():
        if repo_id in text:
            owner = repo_id.split("/")[0]
            hub.accounts[f"hf_{owner}"] = Account(owner)
            pipe, _ = built(name)
            absent = [key for key, component in pipe.components.items() if component is None]
            monkeypatch.setattr(type(pipe), "_optional_components", [*pipe._optional_components, *absent])
            pipe.save_pretrained(folder / repo_id)
            api = hub.api(f"hf_{owner}")
            api.create_repo(repo_id)
            api.upload_folder(repo_id=repo_id, folder_path=folder / repo_id)


def page_parameters():
    for page in PAGES:
        if blocks(page):
            needs_run = "runs/" in read(page)
            yield pytest.param(page, id=page_name(page), marks=[pytest.mark.slow] if needs_run else [])


@pytest.mark.usefixtures("fresh_process", "hub_with_checkpoint", "modules_cache")
@pytest.mark.parametrize("page", [*page_parameters()])
def test_page(page, request, tmp_path, monkeypatch, hub):  # noqa: F811
    publish_tiny_pipelines(hub, page, tmp_path / "tiny", monkeypatch)
    folder = tmp_path / "page"
    if "runs/" in read(page):
        shutil.copytree(request.getfixturevalue("workspace"), folder, symlinks=True)
        called = {arguments[0] for arguments in commands(page) if "runs/labelled" not in arguments}
        for command, result in (("train-classifier", "runs/mine/classifier"), ("train", "runs/mine")):
            if command in called:  # a page begins without what it makes
                shutil.rmtree(folder / result)
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))  # for processes
    names = {"__name__": page.stem}
    for language, code, line in blocks(page):
        if language == "python":
            run_python(code, page, line, names)
        else:
            for words in command_lines(code):
                run_command(words)


# Facts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({arguments[0] for page in PAGES for arguments in commands(page)}))
def test_options_exist(name, capsys):
    with pytest.raises(SystemExit):
        diffusers_dpm([name, "--help"])
    options = {*re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)}
    used = {word for page in PAGES for arguments in commands(page) if arguments[0] == name for word in arguments}
    assert {word for word in used if word.startswith("--")} <= options


def anchors(page):
    """The ids that the site and GitHub give to the headings of a page, which are in ASCII."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


LINKED = [*PAGES, *sorted((ROOT / "docs" / "api").glob("*.md")), ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", LINKED, ids=page_name)
def test_links_lead_somewhere(page):
    """Those of the README and of notebooks are absolute, because PyPI and Colab show them, too."""
    text = read(page)
    for address in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
        path, _, anchor = address.partition("#")
        raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
        colab = REPOSITORY.replace("github.com", "colab.research.google.com/github")
        if path.startswith(SITE):
            target = ROOT / "docs" / ((path.removeprefix(SITE).strip("/") or "index") + ".md")
        elif match := re.match(rf"(?:{REPOSITORY}/blob|{raw}|{colab}/blob)/main/(.*)", path):
            target = ROOT / match[1]
        elif re.match("https?://", path):
            continue
        else:
            assert page not in (README, *NOTEBOOKS), f"{address} does not work on PyPI and Colab"
            target = page.parent / path if path else page
        assert target.is_file(), address
        assert not anchor or "." in anchor or anchor in anchors(target), address  # those with a dot mkdocs checks


def test_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 130
    assert len(re.sub(r"\]\([^)]*\)", "]", text).split()) <= 900


def test_make_compat_tests_every_lower_bound_but_of_torch():
    """torch is what constraints.txt says."""
    extras = PROJECT["optional-dependencies"]
    users = map(Requirement, [*PROJECT["dependencies"], *extras["train"], *extras["app"]])
    bounds = {f"{each.name}{each.specifier}" for each in users if each.name != "torch"}
    (oldest,) = re.findall(r"^OLDEST := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert bounds <= {pin.replace("==", ">=") for pin in oldest.replace("\\\n", "").split()}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_fits_the_width_of_a_page(page):
    """Without scrolling at 1,280 pixels."""
    assert not [line for _, code, _ in blocks(page) for line in code.splitlines() if len(line) > 95]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=page_name)
def test_notebook_is_listed_and_as_it_was_before_it_ran(page):
    """Outputs would be large, and tell of the machine that made them."""
    cells = [cell for cell in json.loads(page.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    assert f"blob/main/docs/notebooks/{page.name}" in read(ROOT / "docs" / "notebooks.md")


def test_every_difference_is_listed_with_its_test():
    """And nothing else is."""
    files = [*(ROOT / "tests" / "schedulers").glob("test_*.py"), *(ROOT / "tests" / "pipelines").glob("test_*.py")]
    tests = [
        name for file in files for name in re.findall(r"def test_differs_(\w+)", file.read_text(encoding="utf-8"))
    ]
    lines = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8").split("\n")
    listed = [
        name for line in lines if line.startswith("| ") for name in re.findall(r"`(\w+)`", line.split(" | ")[-1])
    ]
    assert sorted(listed) == sorted(tests)
