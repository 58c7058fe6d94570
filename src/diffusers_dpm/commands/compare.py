"""Compare two results of `diffusers-dpm evaluate`, for the same samplers and settings.

The errors are assumed independent; with the same seeds, that of the difference is smaller.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class CompareOptions:
    """comparison"""


def run(first: str, second: str, options: CompareOptions) -> None:
    from diffusers_dpm.errors import DiffusersDPMError
    from diffusers_dpm.evaluation.report import compare, comparison
    from diffusers_dpm.evaluation.results import read_metrics

    a, b = read_metrics(Path(first)), read_metrics(Path(second))
    if not (a and b):
        raise DiffusersDPMError(f"{second if a else first} holds no rows")
    rows = compare(a, b)
    print(comparison(rows))
    for path, measurements in ((first, a), (second, b)):
        print(f"{path}: {len(measurements)} measurements, {len(rows)} compared")
