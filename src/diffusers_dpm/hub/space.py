"""The files of a Space, whose page is `diffusers-dpm app` of a model on the Hub."""

from pathlib import Path

from diffusers_dpm.hub.staging import check_empty
from diffusers_dpm.records import write_text


APP = """from diffusers_dpm.app import build_app


build_app("{repo_id}").launch()
"""
CARD = """---
title: "{name}"
sdk: gradio
app_file: app.py
models: ["{repo_id}"]
tags: [diffusers-dpm]
---

The samplers of [diffusers-dpm](https://github.com/diffusers-dpm/diffusers-dpm) race on
[{repo_id}](https://huggingface.co/{repo_id}): as many network calls for each, the same seeds, and the distance from
the converged run. The same page on your machine:

```bash
pip install "diffusers-dpm[app]"
diffusers-dpm app {repo_id}
```
"""


def stage_space(folder: Path, repo_id: str) -> None:
    """Write the Space of a model `repo_id` into a folder, which must be empty or absent."""
    check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "app.py", APP.format(repo_id=repo_id))
    write_text(folder / "requirements.txt", "diffusers-dpm[app]\n")
    write_text(folder / "README.md", CARD.format(repo_id=repo_id, name=repo_id.split("/")[-1]))


def check_space(folder: Path) -> str:
    """Compile the page's code; what was found, in words."""
    compile((folder / "app.py").read_text(encoding="utf-8"), "app.py", "exec")
    return "the Space's code compiles"
