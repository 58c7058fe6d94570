"""Model cards: rendered from what a run recorded, from the files that are published, and from facts in a YAML file."""

import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from diffusers_dpm.pipelines import DPMPipeline, NoisyClassifier
from diffusers_dpm.schedulers import AnalyticDPMScheduler, CalibratedScheduler


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
LOCAL_DATA = "images from a local folder"


class Extra(NamedTuple):
    """A component that plain diffusers does not know."""

    cls: Any  # that saves and loads it
    tag: str  # of a repository that has it


# Folders beside the pipeline, in a run folder and in its repository. The template has a section on each.
EXTRAS = {
    "classifier": Extra(NoisyClassifier, "classifier-guidance"),
    "analytic_dpm": Extra(AnalyticDPMScheduler, "analytic-dpm"),
    "calibrated": Extra(CalibratedScheduler, "calibrated-rows"),
}
# key of a row of metrics.json -> its type; the first ones say what was measured, the last how
METRIC_KEYS: dict[str, type | tuple[type, ...]] = {
    "scheduler": str,
    "options": dict,
    "steps": int,
    "metric": str,
    "value": (int, float),
    "error": (int, float, type(None)),
    "num_images": int,
    "feature_extractor": (str, type(None)),
    "weights": (str, type(None)),
    "reference": (str, type(None)),
}


def load_facts(path: Path) -> dict[str, Any]:
    """The facts of a model from a YAML file. Raises ValueError for a file that cannot be read and unknown keys."""
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the facts in {path}: {' '.join(str(error).split())}") from error
    for part in (facts, *(facts[key] for key in ("data", "training") if facts and key in facts)):
        if not isinstance(part, dict):
            raise ValueError(f"{path}, and data and training in it, must hold 'fact: value' lines")
    for values, known in ((facts, FACTS), (facts.get("data", {}), DATA_FACTS)):
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{path}: unknown fact {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return facts


def check_recipe(facts: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ValueError if the run was not trained as the facts say."""
    for name, value in facts.items():
        if name in options and options[name] != value:
            raise ValueError(f"the facts say {name} {value}, but the run was trained with {options[name]}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, {"rows": [{...}, ...]} with the keys of `METRIC_KEYS`.

    Raises:
        ValueError: no such rows, a key that is missing or of the wrong type, or a value that is not finite.
    """
    return check_rows(path, "rows", read_json(path).get("rows"))


def read_baselines(path: Path) -> list[dict[str, Any]]:
    """What a metrics file says of other images than the model's: rows as in `read_metrics`, or none."""
    return check_rows(path, "baselines", read_json(path).get("baselines", []))


def check_rows(path: Path, name: str, rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        raise ValueError(f'{path} must hold {{"{name}": [...]}}')
    for i, row in enumerate(rows):
        for key, kind in METRIC_KEYS.items():
            if not isinstance(row, dict) or key not in row or not isinstance(row[key], kind):
                raise ValueError(f"{path}: row {i} has no valid {key!r}")
        if not math.isfinite(row["value"]):
            raise ValueError(f"{path}: row {i} has the value {row['value']}")
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def render_card(
    pipe: DPMPipeline,
    repo_id: str,
    *,
    facts: Mapping[str, Any],
    options: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    baselines: Sequence[Mapping[str, Any]],
    extras: Sequence[str],
    pictures: Sequence[str],
    fitted_steps: Mapping[float | None, Sequence[int]] | None = None,
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
    """
    config = pipe.unet.config
    title = facts.get("title") or repo_id.split("/")[1]
    height, width = image_size(config.sample_size)
    trained = recipe(facts, options)
    card = ModelCard.from_template(
        card_metadata(facts, title, rows, extras),
        template_str=(files("diffusers_dpm.model_cards") / "template.md").read_text(encoding="utf-8"),
        repo_id=repo_id,
        title=title,
        facts=facts,
        data={"name": trained.get("data"), **facts.get("data", {})},
        recipe=trained,
        shape=f"{height}x{width}",
        channels=config.in_channels,
        parameters=f"{pipe.unet.num_parameters():,}",
        scheduler=pipe.scheduler.config,
        num_classes=config.num_class_embeds,
        extras=extras,
        fitted_steps=fitted_steps or {},
        pictures={Path(name).stem.replace("-", " "): quote(f"samples/{name}") for name in pictures},
        tables=metric_tables(rows, baselines),
        diffusers_version=version("diffusers"),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def card_metadata(
    facts: Mapping[str, Any], title: str, rows: Sequence[Mapping[str, Any]], extras: Sequence[str]
) -> ModelCardData:
    """The front matter; results only if some were measured."""
    data = facts.get("data", {})
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
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
        pipeline_tag="unconditional-image-generation",
        tags=["diffusion", "ddpm", "diffusers-dpm", *(EXTRAS[name].tag for name in extras)],
        datasets=[data["hub_id"]] if "hub_id" in data else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def metric_type(metric: str) -> str:
    """The identifier that the Hub wants: "Fr\u00e9chet distance" -> "frechet-distance", "FID@1000" -> "fid"."""
    ascii_only = unicodedata.normalize("NFKD", metric.partition("@")[0]).encode("ascii", "ignore").decode()
    return ascii_only.lower().replace(" ", "-")


def image_size(sample_size: int | Sequence[int]) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else (sample_size[0], sample_size[1])


def describe_data(data: str) -> str:
    """The data option of the training, unless it is a path on somebody's disk."""
    try:
        validate_repo_id(data)
    except HFValidationError:
        return LOCAL_DATA
    return LOCAL_DATA if Path(data).exists() else data


def recipe(facts: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that matter, as the run recorded them, or else as the facts say."""
    known = {**facts.get("training", {}), **options}
    chosen = {name: known[name] for name in RECIPE if known.get(name) is not None}
    return {**chosen, "data": describe_data(chosen["data"])} if "data" in chosen else chosen


def sampler_name(row: Mapping[str, Any]) -> str:
    """The scheduler with the options that were set."""
    options = ", ".join(f"{key}={value!r}" for key, value in row["options"].items())
    return f"{row['scheduler']}({options})" if options else row["scheduler"]


def metric_tables(
    rows: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """One table, samplers by steps, for each metric and way of measuring it."""
    return [metric_table(title, group, baselines) for title, group in grouped(rows).items()]


def grouped(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows that can be compared, by a title that says what they are, and of which seeds where these differ."""
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[table_title(row)][row.get("seeds") or "not recorded"].append(row)
    return {
        f"{title}, seeds {seeds}" if len(by_seeds) > 1 else title: group
        for title, by_seeds in groups.items()
        for seeds, group in by_seeds.items()
    }


def remade(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What to say below a table of rows with the same title, where its lines mix what a sampler was given.

    That is statistics, rows or a classifier, which may be made anew between measurements. Fitted rows are others for
    each number of steps anyway.
    """
    given: dict[tuple[str, int | None], set[tuple[str | None, str | None]]] = defaultdict(set)
    for row in rows:
        steps = row["steps"] if row["scheduler"] == CalibratedScheduler.__name__ else None
        given[sampler_name(row), steps].add((row.get("carried_hash"), row.get("classifier_sha256")))
    mixed = dict.fromkeys(name for (name, _), hashes in given.items() if len(hashes) > 1)
    return [
        f"{name}: its statistics, rows or classifiers are not all the same; of each cell the last is shown"
        for name in mixed
    ]


def table_title(row: Mapping[str, Any]) -> str:
    """What was measured and how: rows of the same title can be compared."""
    how = [f"{row['num_images']:,} images"]
    how += [f"features: {row['feature_extractor']}"] if row["feature_extractor"] else []
    weights, digest = row["weights"], (row.get("weights_sha256") or "")[:12]
    how += [" ".join(filter(None, (weights, "weights", digest)))] if weights or digest else []
    how += [f"against {row['reference']}"] if row["reference"] else []
    return f"{row['metric']}: {', '.join(how)}"


def metric_table(
    title: str, rows: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Of rows of one group; "others" are the baselines that were measured alike."""
    steps = sorted({row["steps"] for row in rows})
    samplers = dict.fromkeys(map(sampler_name, rows))
    cells = {(sampler_name(row), row["steps"]): format_value(row) for row in rows}
    others = [
        f"{row['scheduler']} ({row['num_images']:,} images) {format_value(row)}"
        for row in baselines
        if measurement(row) == measurement(rows[0])
    ]
    return {
        "title": title,
        "steps": steps,
        "rows": {name: [cells.get((name, step), "") for step in steps] for name in samplers},
        "others": [*dict.fromkeys(others)],
    }


def measurement(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What rows about other numbers of images share."""
    return row["metric"].partition("@")[0], row["feature_extractor"], row["reference"]


def format_value(row: Mapping[str, Any]) -> str:
    """The value to two digits of its error, and the error."""
    value, error = row["value"], row["error"]
    if not error:
        return f"{value:.4g}"
    rounded = round(value, 1 - math.floor(math.log10(error))) + 0  # and not -0
    return f"{rounded:g} \u00b1 {error:.2g}"
