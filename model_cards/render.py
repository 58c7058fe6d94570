"""Render a card that is kept in this folder from its facts, its figures and its pictures: `make card`.

    python model_cards/render.py model_cards/ddpm-digits.yaml

It reads NAME.yaml, NAME.metrics.json and samples/, and writes NAME.md. The figures are of one run of that recipe.
`publish` never reads them: another training gives other weights, of which they would be untrue. To measure anew, run
`diffusers-dpm evaluate RUN` with the options in the figures, and keep RUN's metrics.json as NAME.metrics.json.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers_dpm.evaluation.results import read_baselines, read_metrics
from diffusers_dpm.hub.card import load_facts, render_card
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.run_folder import EXTRAS
from diffusers_dpm.schedulers import DDPMScheduler
from diffusers_dpm.training.train_diffusion import TrainingOptions
from diffusers_dpm.training.trained_paths import with_own_values
from diffusers_dpm.training.unet_presets import PRESETS, build_unet


CHANNELS = {"8x8 greyscale, 17 grey levels": 1, "32x32 RGB": 3}
FITTED_STEPS: dict[float | None, list[int]] = {None: [5, 10]}  # as published


def untrained_pipeline(facts: dict[str, Any]) -> tuple[DPMPipeline, dict[str, Any]]:
    """(the model of the recipe with new weights, its options as a CPU's trainer records them)."""
    options = with_own_values(TrainingOptions(**facts["training"], output_dir="run"))
    side, config = PRESETS[str(options.preset)]
    unet = build_unet(config, (CHANNELS[facts["data"]["shape"]], side, side))
    recorded = asdict(options) | {"mixed_precision": "no", "split": "train"}
    return DPMPipeline(unet, DDPMScheduler(variance_type=options.variance_type)), recorded


def render(path: Path) -> str:
    """The card of the facts NAME.yaml, as Markdown."""
    facts, figures = load_facts(path), path.with_suffix(".metrics.json")
    pipe, options = untrained_pipeline(facts)
    return render_card(
        pipe,
        f"diffusers-dpm/{path.stem}",
        facts=facts,
        options=options,
        rows=read_metrics(figures),
        baselines=read_baselines(figures),
        extras=[*EXTRAS],
        fitted_steps=FITTED_STEPS,
        pictures=[path.name for path in (path.parent / "samples").iterdir()],
    )


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.with_suffix(".md").write_text(render(path), encoding="utf-8")
