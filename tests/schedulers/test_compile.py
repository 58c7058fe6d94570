"""A whole sampling loop as one graph: rows are constants, so `torch.compile` sees only the tensor operations."""

import pytest
import torch

from diffusers_dpm.schedulers import ALL_SCHEDULERS

from .helpers import network, noise


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_loop_compiles_into_one_graph(scheduler_class, backend):
    """Integers as timesteps are constants of the graph; a tensor would have to be read."""
    scheduler = scheduler_class()
    scheduler.set_timesteps(4)
    timesteps = scheduler.timesteps.tolist()

    def sample(x):
        for t in timesteps:
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        return x

    x = noise(2, 3, 8, 8)
    torch.manual_seed(0)
    expected = sample(x)
    torch._dynamo.reset()
    compiled = torch.compile(sample, fullgraph=True, backend=backend)
    for _ in range(2):
        torch.manual_seed(0)
        got = compiled(x)
        if backend == "aot_eager" or not scheduler.updates[0].noise:  # inductor draws other numbers
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert got.isfinite().all()
