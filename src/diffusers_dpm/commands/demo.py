"""Do the main job end to end on scikit-learn's handwritten digits, without a download.

Train a small U-Net and show its first picture, train a classifier of noisy digits, estimate posterior variances for
Analytic-DPM, fit rows of coefficients for few steps, and draw the same seeds with every sampler, then each digit by
classifier guidance. Last, load the run folder with plain diffusers, in a process that cannot import this package, and
check what publishing it would upload. What the library prints goes to demo.log in the run folder.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_dpm.options import check_ranges


@dataclass(kw_only=True)
class DemoOptions:
    """demo"""

    output_dir: str = "runs/demo"
    """run folder"""
    max_train_steps: int | None = None
    """training steps (default: 1000)"""

    def __post_init__(self) -> None:
        check_ranges(self)


def run(options: DemoOptions) -> None:
    from diffusers_dpm.commands import demo_steps

    demo_steps.tell(Path(options.output_dir), options.max_train_steps)
