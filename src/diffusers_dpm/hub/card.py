"""Model cards: rendered from what a run recorded, from the files that are published, and from facts in a YAML file."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from diffusers_dpm.data import describe_data
from diffusers_dpm.errors import DiffusersDPMError, nearest
from diffusers_dpm.evaluation.results import Row, metric_tables, sampler_name
from diffusers_dpm.pipelines import ADMUNet2DModel, DPMPipeline, picture_shape
from diffusers_dpm.pipelines.networks import null_class_of, num_classes_of
from diffusers_dpm.run_folder import EXTRAS


FACTS = {"name", "title", "license", "description", "data", "training", "hardware", "limits"}
DATA_FACTS = {"name", "source", "license", "images", "shape", "note", "hub_id", "citation"}

# Options of the training command that make the recipe, in the order of its --help.
RECIPE = (
    *("data", "split", "resolution", "channels", "random_flip", "preset", "dropout", "init", "class_conditional"),
    *("class_dropout_prob", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end"),
    *("rescale_betas_zero_snr", "prediction_type", "variance_type", "loss_type", "weighting", "max_train_steps"),
    *("batch_size", "learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2"),
    *("adam_weight_decay", "max_grad_norm", "timestep_sampling", "mixed_precision", "seed"),
    *("ema", "ema_decay", "ema_warmup", "ema_inv_gamma", "ema_power"),
)


def load_facts(path: Path) -> dict[str, Any]:
    """The facts of a model from a YAML file. Raises DiffusersDPMError if it is unreadable or has unknown keys."""
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DiffusersDPMError(f"cannot read the facts in {path}: {' '.join(str(error).split())}") from error
    for part in (facts, *(facts[key] for key in ("data", "training") if facts and key in facts)):
        if not isinstance(part, dict):
            raise DiffusersDPMError(f"{path}, and data and training in it, must hold 'fact: value' lines")
    for values, known in ((facts, FACTS), (facts.get("data", {}), DATA_FACTS)):
        if unknown := sorted(set(values) - known):
            raise DiffusersDPMError(f"{path}: unknown fact {unknown[0]!r}; known are {', '.join(sorted(known))}")
    facts["limits"] = [limits] if isinstance(limits := facts.get("limits", []), str) else limits
    if not isinstance(facts["limits"], list):
        raise DiffusersDPMError(f"{path}: limits must be a sentence or a list of sentences, not {limits!r}")
    if "license" in facts:
        check_license(facts["license"])
    return facts


def check_license(name: Any) -> None:
    """Raise DiffusersDPMError for a licence with which the Hub refuses a card."""
    known = (files("diffusers_dpm.model_cards") / "licenses.txt").read_text(encoding="utf-8").split()
    if name not in known:
        near = nearest(str(name).lower(), known)
        raise DiffusersDPMError(f"the Hub knows no license {name!r}: choose one such as mit, cc-by-4.0 or other{near}")


def check_recipe(facts: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise DiffusersDPMError if the run was not trained as the facts say."""
    for name, value in facts.items():
        if name in options and options[name] != value:
            raise DiffusersDPMError(f"the facts say {name} {value}, but the run was trained with {options[name]}")


def render_card(
    pipe: DPMPipeline,
    repo_id: str,
    *,
    facts: Mapping[str, Any],
    options: Mapping[str, Any],
    rows: Sequence[Row],
    baselines: Sequence[Row],
    extras: Sequence[str],
    pictures: Sequence[str],
    fitted_steps: Mapping[float | None, Sequence[int]] | None = None,
    class_names: Mapping[int, str] | None = None,
) -> str:
    """The model card as Markdown.

    Args:
        pipe: its network and scheduler are described.
        repo_id: what the snippets load.
        facts: as from `load_facts`; may be empty.
        options: the training's, as the run recorded them; may be empty.
        rows: as from `read_metrics`.
        baselines: as from `read_baselines`.
        extras: which of `EXTRAS` the repository has.
        pictures: file names in samples/.
        fitted_steps: guidance scale (None: without) -> numbers of steps, what the extra "calibrated" has rows for.
        class_names: by index, as far as they are known.
    """
    title = facts.get("title") or repo_id.split("/")[1]
    channels, height, width = picture_shape(pipe.unet)
    trained = recipe(facts, options)
    named = {i: name for i, name in (class_names or {}).items() if name != str(i)}
    network = {"parameters": f"{pipe.unet.num_parameters():,}", "num_classes": num_classes_of(pipe.unet)}
    network |= {"null_class": null_class_of(pipe.unet), "own_network": type(pipe.unet) is ADMUNet2DModel}
    about = {"repo_id": repo_id, "title": title, "facts": facts, "recipe": trained, "scheduler": pipe.scheduler.config}
    card = ModelCard.from_template(
        card_metadata(facts, title, rows, extras),
        template_str=(files("diffusers_dpm.model_cards") / "template.md").read_text(encoding="utf-8"),
        **{**about, **network, "channels": channels, "shape": f"{height}x{width}", "class_names": named},
        data={"name": trained.get("data"), **facts.get("data", {})},
        extras=extras,
        fitted_steps=fitted_steps or {},
        pictures={escaped(Path(name).stem.replace("-", " ")): quote(f"samples/{name}") for name in pictures},
        tables=[*map(escaped_table, metric_tables(rows, baselines))],
        diffusers_version=version("diffusers"),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def escaped(text: Any) -> str:
    """One line of Markdown that shows the text as it is, in a table too."""
    return re.sub(r"[\\`*<>|]|\](?=[(\[])", r"\\\g<0>", " ".join(str(text).split()))


def escaped_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """One of `metric_tables`."""
    rows = {escaped(sampler): cells for sampler, cells in table["rows"].items()}
    return {**table, "title": escaped(table["title"]), "rows": rows, "others": [*map(escaped, table["others"])]}


def card_metadata(facts: Mapping[str, Any], title: str, rows: Sequence[Row], extras: Sequence[str]) -> ModelCardData:
    """The front matter; results only if some were measured."""
    data, task = facts.get("data", {}), "unconditional-image-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data.get("hub_id") or row["reference"] or "unknown",
            dataset_name=row["reference"] or data.get("name") or "unknown",
            metric_type=metric_type(row["metric"]),
            metric_name=f"{row['metric']} ({sampler_name(row)}, {row['steps']} steps, {row['num_images']:,} images)",
            metric_value=row["value"],
        )
        for row in rows
    ]
    return ModelCardData(
        license=facts.get("license"),
        library_name="diffusers",
        pipeline_tag=task,
        tags=["diffusion", "ddpm", "diffusers-dpm", *(EXTRAS[name].tag for name in extras)],
        datasets=[data["hub_id"]] if "hub_id" in data else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def metric_type(metric: str) -> str:
    """The identifier that the Hub wants: "Fr\u00e9chet distance" -> "frechet-distance", "FID@1000" -> "fid"."""
    ascii_only = unicodedata.normalize("NFKD", metric.partition("@")[0]).encode("ascii", "ignore").decode()
    return ascii_only.lower().replace(" ", "-")


def recipe(facts: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that matter, as the run recorded them, or else as the facts say."""
    known = {**facts.get("training", {}), **options}
    chosen = {name: known[name] for name in RECIPE if known.get(name) is not None}
    if "data" in chosen:
        chosen["data"] = describe_data(chosen["data"])
    return {name: value if isinstance(value, bool) else escaped(value) for name, value in chosen.items()}
