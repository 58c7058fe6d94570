"""The processes of an accelerator that share work, or this one alone."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast


class Processes:
    """What work that is shared needs to know of an `accelerate.Accelerator`; None stands for one process.

    Attributes:
        rank: of this process, from 0.
        count: how many there are.
    """

    def __init__(self, accelerator: Any = None):
        self.accelerator = accelerator
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.count: int = 1 if accelerator is None else accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over the processes, for all of them; on the device of `values`."""
        if self.count == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum").to(values.device)

    def first(self, values: Sequence[float]) -> list[float]:
        """Those of the first process, for all: what decides over a next call must not differ by a rounding."""
        if self.count == 1:
            return list(values)
        return broadcast(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)).tolist()
