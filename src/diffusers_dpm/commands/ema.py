"""Make pipelines of a run with other lengths of the moving average of its weights, after training.

The run must have been trained with --ema-snapshot-every. Each pipeline is a folder that sample, evaluate and publish
take.
"""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class EMALengthOptions:
    """averages"""

    sigma_rel: list[float] = field(default_factory=list)
    """lengths: standard deviations of the weights over time, in parts of the training; 0.05 to 0.15 are usual"""
    raw: bool = False
    """the weights of the last step, without an average"""
    step: int | None = None
    """step of the snapshot to average up to (default: the last)"""
    output_dir: str | None = None
    """gets a folder for each (default: ema in the run folder)"""


def run(model: str, options: EMALengthOptions) -> None:
    from diffusers_dpm.training.post_hoc_ema import average_run

    made = average_run(model, options.sigma_rel, raw=options.raw, step=options.step, output_dir=options.output_dir)
    for average in made:
        print(f"{average.folder}" + (f": {average.defect:.1%} of the profile missed" if average.defect else ""))
    if any(average.defect > 0.1 for average in made):
        print("more than 10 % of a profile is missed: --ema-snapshot-every with fewer steps would be nearer")
