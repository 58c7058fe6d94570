"""The processes of an accelerator that share work, or this one alone, and what keeps other commands out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from filelock import FileLock, Timeout

from diffusers_dpm.errors import DiffusersDPMError
from diffusers_dpm.records import TEMPORARY, atomic_folder


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

    @contextmanager
    def atomic_folder(self, target: Path) -> Iterator[Path]:
        """As `records.atomic_folder`, for all to write to; the first makes and renames it."""
        with (
            atomic_folder(target) if self.is_main else nullcontext(target.with_name(TEMPORARY + target.name)) as folder
        ):
            self.wait()
            yield folder
            self.wait()

    @contextmanager
    def locked(self, path: Path) -> Iterator[None]:
        """Keep other commands out, as far as they ask for the same lock file; its folder is made.

        Raises:
            DiffusersDPMError: on all processes: another command holds it.
        """
        lock, refusal = FileLock(path), [""]
        if self.is_main:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(blocking=False)
            except Timeout:
                refusal = [f"{path.parent} is in use by another process: wait for its end, or choose another folder"]
        if self.count > 1:
            broadcast_object_list(refusal)
        if refusal[0]:
            raise DiffusersDPMError(refusal[0])
        try:
            yield
        finally:
            if lock.is_locked:
                path.unlink(missing_ok=True)  # a process that has already opened it will see the results
                lock.release()
                with suppress(OSError):  # a folder that was made for the lock alone
                    path.parent.rmdir()
