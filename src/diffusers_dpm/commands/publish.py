"""Assemble a run folder as a Hub repository that plain diffusers loads, check it, and upload it in one commit."""

from dataclasses import dataclass
from functools import partial
from typing import Literal


@dataclass(kw_only=True)
class ModelOptions:
    """model"""

    card: str | None = None
    """YAML file with facts for the model card (default: what the run recorded)"""
    license: str | None = None
    """licence of the model, as the Hub names it, such as mit (default: that in the facts)"""
    variant: Literal["fp16"] | None = None
    """add the weights in half precision beside the full ones"""


@dataclass(kw_only=True)
class RepositoryOptions:
    """repository"""

    private: bool = False
    """create a private repository; an existing one must be private"""
    revision: str | None = None
    """branch to commit to, created if it is missing (default: main)"""
    create_pr: bool = False
    """open a pull request instead of committing"""
    force: bool = False
    """replace what the branch holds"""
    dry_run: bool = False
    """assemble, list and check; no network, no login"""
    staging_dir: str | None = None
    """keep the assembled repository in this folder (default: a temporary folder)"""


@dataclass(kw_only=True)
class PublishOptions(ModelOptions, RepositoryOptions):
    """Options of `diffusers-dpm publish`, described by its `--help`."""


def run(folder: str, repo_id: str, options: PublishOptions) -> None:
    from diffusers_dpm.hub.publish import publish

    choices = {"facts" if name == "card" else name: value for name, value in vars(options).items()}
    publish(folder, repo_id, report=partial(print, flush=True), **choices)
