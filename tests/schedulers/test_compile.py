"""A whole sampling loop as one graph: rows are constants, so `torch.compile` sees only the tensor operations."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from diffusers_dpm.schedulers import (
    ALL_SCHEDULERS,
    AnalyticDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
    EDMScheduler,
)

from .helpers import network, noise, working


@pytest.mark.slow
@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_loop_compiles_into_one_graph(scheduler_class, backend):
    """Integers as timesteps are constants of the graph; a tensor would have to be read."""
    scheduler = working(scheduler_class)
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


# Every path through `step`: with and without noise, history, stages, a threshold, epsilon derived again.
WALKS = [
    *((scheduler_class, {}) for scheduler_class in ALL_SCHEDULERS),
    (DDPMScheduler, {"variance_type": "learned_range"}),
    (DDPMScheduler, {"thresholding": True}),
    (DDIMScheduler, {"eta": 0.5, "use_clipped_model_output": True}),
    (AnalyticDPMScheduler, {"forward_process": "ddim"}),
    (DPMSolverScheduler, {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    (DPMSolverScheduler, {"solver_order": 3, "method": "singlestep"}),
    (DDIMScheduler, {"process": {"kind": "flow"}, "prediction_type": "flow_prediction", "eta": 0.5}),
    (DPMSolverScheduler, {"process": {"kind": "flow", "shift": 3.0}, "prediction_type": "flow_prediction"}),
    (DPMSolverScheduler, {"process": {"kind": "edm"}, "solver_order": 3}),
    (EDMScheduler, {"process": {"kind": "edm"}, "s_churn": 2.0, "stage_fraction": 0.5}),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(("scheduler_class", "options"), WALKS)
def test_a_loop_reads_no_value_of_a_tensor(scheduler_class, options, integers, dtype):
    """On a GPU such a read waits for all that is queued. A fake tensor has no values: a read of one raises.

    The timesteps are either integers or real entries of `scheduler.timesteps`, found by their place in memory; a read
    of those raises as well, because no real tensor may be used beside fake ones.
    """
    scheduler = working(scheduler_class, **options)
    scheduler.set_timesteps(7)
    timesteps = scheduler.timesteps.tolist() if integers else list(scheduler.timesteps)
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 8, dtype=dtype)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            float(x[0, 0, 0, 0])
        for t in timesteps:
            seen = scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.cat([seen.sin(), seen.cos()], dim=1), t, x, return_dict=False)[0]
        assert (x.shape, x.dtype) == ((2, 3, 8, 8), dtype)
