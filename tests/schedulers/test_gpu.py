"""What must hold on a CUDA device: no wait for the device in a loop, one graph of it, half precision.

`pytest -m gpu tests/schedulers/test_gpu.py`
"""

from contextlib import contextmanager

import pytest
import torch

from .helpers import DTYPES, network_with_variance, noise, working
from .test_compile import WALKS


pytestmark = pytest.mark.gpu
N = 7


def ready(scheduler_class, options, device="cuda"):
    scheduler = working(scheduler_class, **options)
    scheduler.set_timesteps(N, device=device)
    return scheduler


def predict(x, t):
    """A network with 2C channels for any timestep, of which the value is not read."""
    return network_with_variance(x, 0)


def sample(scheduler, x, timesteps, generator=None):
    for t in timesteps:
        x = scheduler.step(predict(x, t), t, x, generator=generator, return_dict=False)[0]
    return x


@contextmanager
def no_waiting():
    """Whatever waits for the device inside the block raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_read_would_be_noticed():
    x = torch.ones(3, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("timesteps_on", ["cuda", "cpu"])
@pytest.mark.parametrize(("scheduler_class", "options"), WALKS)
def test_a_loop_never_waits_for_the_device(scheduler_class, options, timesteps_on, dtype):
    scheduler = ready(scheduler_class, options, timesteps_on)
    x = noise(2, 3, 8, 8, dtype=dtype).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    timesteps = list(scheduler.timesteps)
    with no_waiting():
        result = sample(scheduler, x, timesteps, generator)
    assert result.dtype == dtype
    assert result.isfinite().all()


DETERMINISTIC = [(c, o) for c, o in WALKS if not any(row.noise for row in ready(c, o, "cpu").updates)]


@pytest.mark.parametrize(("scheduler_class", "options"), DETERMINISTIC)
def test_a_captured_loop_replays_as_it_ran(scheduler_class, options):
    scheduler = ready(scheduler_class, options)
    timesteps = scheduler.timesteps.tolist()
    x = noise(2, 3, 8, 8, dtype=torch.float32).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate in their first calls, which a capture forbids
        sample(scheduler, x, timesteps)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(scheduler, x, timesteps)
    for seed in (0, 1):
        x.copy_(noise(2, 3, 8, 8, seed=seed, dtype=torch.float32))
        graph.replay()
        assert torch.equal(captured, sample(scheduler, x, timesteps))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scheduler_class", "options"), WALKS)
def test_a_half_precision_step_is_the_float32_step_rounded_once(scheduler_class, options, dtype):
    x, output = noise(2, 3, 8, 8, dtype=dtype).cuda(), noise(2, 6, 8, 8, seed=1, dtype=dtype).cuda()
    results = []
    for convert in (torch.Tensor.clone, torch.Tensor.float):
        scheduler = ready(scheduler_class, options)
        generator = torch.Generator("cuda").manual_seed(0)
        step = scheduler.step(convert(output), scheduler.timesteps[0], convert(x), generator=generator)
        results.append(step.prev_sample)
    assert results[0].dtype == dtype
    assert torch.equal(results[0], results[1].to(dtype))


@pytest.mark.parametrize(("scheduler_class", "options"), WALKS)
def test_a_device_loop_agrees_with_the_host(scheduler_class, options):
    """With the same noise: one generator on the host for each image."""
    results = []
    for device in ("cpu", "cuda"):
        scheduler = ready(scheduler_class, options, device)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        x = sample(scheduler, noise(2, 3, 8, 8).to(device), scheduler.timesteps, generators)
        results.append(x.cpu())
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("scheduler_class", "options"), DETERMINISTIC)
def test_a_loop_compiles_into_one_graph(scheduler_class, options):
    scheduler = ready(scheduler_class, options)
    timesteps = scheduler.timesteps.tolist()
    x = noise(2, 3, 8, 8, dtype=torch.float32).cuda()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sample(scheduler, x, timesteps), fullgraph=True)
    expected = sample(scheduler, x, timesteps)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-4)
