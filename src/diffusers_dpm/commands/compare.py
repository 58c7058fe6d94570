"""Compare two results of `diffusers-dpm evaluate`, for the same samplers and settings.

The errors are assumed independent; with the same seeds, that of the difference is smaller.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_dpm.errors import DiffusersDPMError


@dataclass(kw_only=True)
class CompareOptions:
    """comparison"""

    output: str | None = None
    """a .png file for a picture of the differences"""

    def __post_init__(self) -> None:
        if self.output is not None and Path(self.output).suffix != ".png":
            raise DiffusersDPMError(f"--output must be a .png file, got {self.output}")


def run(first: str, second: str, options: CompareOptions) -> None:
    from diffusers_dpm.evaluation.report import compare, comparison, plot_comparison
    from diffusers_dpm.evaluation.results import read_metrics

    a, b = read_metrics(Path(first)), read_metrics(Path(second))
    if not (a and b):
        raise DiffusersDPMError(f"{second if a else first} holds no rows")
    rows = compare(a, b)
    print(comparison(rows))
    if options.output is not None:
        plot_comparison(rows, Path(options.output), *("/".join(Path(path).parts[-2:]) for path in (first, second)))
    for path, measurements in ((first, a), (second, b)):
        print(f"{path}: {len(measurements)} measurements, {len(rows)} compared")
