"""Assemble a run folder as a Hub repository that plain diffusers loads, check it, and upload it in one commit."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from diffusers_dpm.errors import DiffusersDPMError


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
class SpaceOptions:
    """space"""

    with_space: bool = False
    """also make the Space ORG/NAME-space, whose page is that of `diffusers-dpm app`"""


@dataclass(kw_only=True)
class PublishOptions(ModelOptions, RepositoryOptions, SpaceOptions):
    """Options of `diffusers-dpm publish`, described by its `--help`.

    Raises:
        DiffusersDPMError: a Space on another branch than the main one.
    """

    def __post_init__(self) -> None:
        if self.with_space and (self.revision or self.create_pr):
            raise DiffusersDPMError("--with-space is for the main branch: leave out --revision and --create-pr")


def run(folder: str, repo_id: str, options: PublishOptions) -> None:
    from diffusers_dpm.hub.publish import publish, publish_space
    from diffusers_dpm.options import values_of

    report = partial(print, flush=True)
    repository, model = values_of(options, RepositoryOptions), values_of(options, ModelOptions)
    publish(folder, repo_id, report=report, facts=model.pop("card"), **model, **repository)
    if options.with_space:
        publish_space(repo_id, report=report, **repository)
