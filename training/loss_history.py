"""Importance sampling of timesteps by their losses (Nichol and Dhariwal 2021, section 3.3)."""

import numpy as np
import torch


UNIFORM = 0.001  # the part of the uniform distribution


class LossHistory:
    """The last losses of every timestep, and the probabilities to draw timesteps with.

    p_t is proportional to sqrt(E[L_t^2]), estimated from the last losses (eq. 18), and mixed with a little of the
    uniform distribution. Weights 1 / (T p_t) give every loss the expectation that it has under uniform timesteps.

    Args:
        num_timesteps: T.
        size: losses kept for each timestep.
    """

    def __init__(self, num_timesteps: int, size: int = 10):
        self.losses = np.zeros((num_timesteps, size))  # rings; on the host, for one batch may hold a timestep twice
        self.counts = np.zeros(num_timesteps, dtype=np.int64)

    def probabilities(self) -> torch.Tensor | None:
        """(T,), float64; None, for uniform ones, until every timestep has all its losses."""
        num_timesteps, size = self.losses.shape
        if (self.counts < size).any():
            return None
        expected = np.sqrt(np.square(self.losses).mean(axis=1))
        if not expected.any():
            return None
        return torch.from_numpy((1 - UNIFORM) * expected / expected.sum() + UNIFORM / num_timesteps)

    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Take over one batch of unweighted losses (B,), in the order of the batch. Waits for the device."""
        size = self.losses.shape[1]
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            self.losses[t, self.counts[t] % size] = loss
            self.counts[t] += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"losses": torch.from_numpy(self.losses), "counts": torch.from_numpy(self.counts)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.losses, self.counts = state["losses"].numpy(), state["counts"].numpy()
