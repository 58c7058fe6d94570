"""Adaptive steps against the published law's own figures and exact solutions; plans against the runs they freeze."""

import json
import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from diffusers_dpm.adaptive import (
    CONTROLLERS,
    Integrator,
    Node,
    PIDController,
    ReferenceController,
    StepPlan,
    integrate_adaptive,
    plan_timesteps,
)
from diffusers_dpm.networks import whole_config
from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler, Level
from tests.models import tiny_unet
from tests.schedulers.helpers import QUARTER
from tests.schedulers.problems import MIXTURE


# The continuous VP-linear process (beta from 0.1 to 20) and a mixture of two Gaussians -------------------------------

START, END = -5.024978406659204, {1e-3: 4.5577149327298656, 1e-4: 5.75150979526936}
X_T = torch.tensor([[0.3, -1.7, 1.2, -0.4], [0.9, -0.1, 0.5, -2.2]], dtype=torch.float64)
EXACT = {(0, 0): 0.544351855886294, (0, 1): -1.455859688776237, (0, 2): 0.831771414546260, (0, 3): -0.160638869446928}


def continuous_node(lambda_):
    log_inverse = math.log1p(math.exp(-2 * lambda_))
    t = 2 * log_inverse / (math.sqrt(0.01 + 39.8 * log_inverse) + 0.1)
    return Node(t, Level(1 / math.sqrt(1 + math.exp(-2 * lambda_)), 1 / math.sqrt(1 + math.exp(2 * lambda_)), lambda_))


def mixture(x, node):
    """(x_0, epsilon) of the best network."""
    epsilon = torch.from_numpy(MIXTURE.epsilon(x.flatten().numpy(), node.level)).view_as(x)
    return (x - node.level.sigma * epsilon) / node.level.alpha, epsilon


def solve(form, order, rtol, atol=0.0078, end=1e-3, controller=CONTROLLERS["reference"], **options):
    integrator = Integrator(
        mixture, continuous_node, form, "midpoint", order, controller, atol=atol, rtol=rtol, **options
    )
    return integrator(X_T, START, END[end], to_clean=False)


@pytest.mark.parametrize(
    ("form", "order", "rtol", "first", "last"),
    [
        ("dpmsolver", 2, 0.05, 0.546310824081, -1.721643581985),
        ("dpmsolver", 2, 0.01, 0.545668278635, -1.712449321924),
        ("dpmsolver", 3, 0.05, 0.544908921069, -1.704225607540),
        ("dpmsolver", 3, 0.01, 0.544212325114, -1.701322066589),
        ("dpmsolver++", 2, 0.05, 0.540350444847, -1.666784771241),
        ("dpmsolver++", 3, 0.05, 0.543778946963, -1.698389343812),
        ("dpmsolver++", 3, 0.01, 0.544184145292, -1.700224018751),
    ],
)
def test_golden_numbers_of_the_reference_code(form, order, rtol, first, last):
    sample = solve(form, order, rtol).sample
    assert sample[0, 0].item() == pytest.approx(first, abs=1e-8)  # the reference casts its factors to float32
    assert sample[1, 3].item() == pytest.approx(last, abs=1e-8)


@pytest.mark.parametrize(
    ("form", "end", "order", "calls"),
    [
        ("dpmsolver", 1e-3, 2, (42, 74, 82, 102, 116)),
        ("dpmsolver", 1e-3, 3, (33, 45, 51, 60, 66)),
        ("dpmsolver++", 1e-3, 2, (8, 30, 34, 48, 58)),
        ("dpmsolver++", 1e-3, 3, (12, 45, 36, 39, 45)),
        ("dpmsolver", 1e-4, 2, (46, 86, 94, 114, 122)),
        ("dpmsolver", 1e-4, 3, (27, 42, 42, 57, 66)),
    ],
)
def test_calls_of_the_reference_code(form, end, order, calls):
    runs = [solve(form, order, rtol, end=end) for rtol in (0.5, 0.1, 0.05, 0.01, 0.001)]
    assert tuple(run.num_calls + run.num_rejected for run in runs) == calls
    for run in runs:  # of which a rejection costs us one less
        assert run.num_calls == order * run.num_accepted + (order - 1) * run.num_rejected
        assert run.orders == [order] * run.num_accepted
        assert len(run.timesteps) == len(run.lambdas) == sum(run.orders)


@pytest.mark.parametrize(
    ("order", "pid", "rtol", "atol", "calls", "accepted", "rejected", "error"),
    [
        (2, (0.0, 1.0, 0.0), 0.05, 0.0078, 32, 13, 3, 1.1e-1),
        (2, (0.4, 0.6, 0.0), 0.05, 0.0078, 36, 15, 3, 2.9e-2),
        (2, (0.4, 0.6, 0.0), 0.001, 0.0001, 132, 61, 5, 2.1e-3),
        (3, (0.0, 1.0, 0.0), 0.05, 0.0078, 39, 10, 3, 3.3e-2),
        (3, (0.3, 0.7, 0.0), 0.05, 0.0078, 39, 11, 2, 2.5e-3),
        (3, (0.4, 0.6, 0.0), 0.05, 0.0078, 42, 12, 2, 1.0e-3),
        (3, (0.4, 0.6, 0.0), 0.001, 0.0001, 90, 24, 6, 2.1e-4),
        (3, (0.0, 0.5, 0.2), 0.05, 0.0078, 27, 8, 1, 9.9e-2),
    ],
)
def test_figures_of_k_diffusions_pid_law(order, pid, rtol, atol, calls, accepted, rejected, error):
    run = solve("dpmsolver", order, rtol, atol, controller=PIDController(*pid))
    assert (run.num_calls + run.num_rejected, run.num_accepted, run.num_rejected) == (calls, accepted, rejected)
    fine = solve("dpmsolver", 3, 1e-6, 1e-6, max_calls=10_000).sample
    for place, value in EXACT.items():
        assert fine[place].item() == pytest.approx(value, abs=2e-6)
    assert (run.sample - fine).abs().max().item() == pytest.approx(error, rel=0.06)


@pytest.mark.parametrize("form", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("controller", list(CONTROLLERS.values()), ids=list(CONTROLLERS))
def test_the_error_falls_with_the_tolerance(form, order, controller):
    errors = []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        sample = solve(form, order, tolerance, tolerance, controller=controller, max_calls=5000).sample
        errors.append(max(abs(sample[place].item() - value) for place, value in EXACT.items()))
    assert all(small < 0.5 * large for large, small in pairwise(errors))
    assert errors[-1] < 1e-4


# A scheduler's own schedule ------------------------------------------------------------------------------------------


def gaussian_network(scheduler):
    return QUARTER.network(scheduler.schedule, scheduler.config.prediction_type)


def gaussian_flow(scheduler, t):
    """What the exact flow multiplies x by, from the noisiest level to timestep t."""
    return QUARTER.flow(1.0, scheduler.schedule[999], scheduler.schedule.level(t))


def scheduler_with(**config):
    return DPMSolverScheduler(**{"final_sigmas_type": "sigma_min", **config})


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("end", [0.0, 123.25])
def test_the_solution_is_that_of_the_ode(algorithm_type, prediction_type, end):
    scheduler = scheduler_with(algorithm_type=algorithm_type, prediction_type=prediction_type)
    run = integrate_adaptive(gaussian_network(scheduler), scheduler, X_T, atol=1e-4, rtol=1e-4, end=end)
    assert (run.sample / X_T).sub(gaussian_flow(scheduler, end)).abs().max() < 1e-3
    assert run.end == pytest.approx(end, abs=0.01)
    assert run.timesteps[0] == 999
    assert run.timesteps == sorted(run.timesteps, reverse=True)


def test_clean_data_is_one_more_call():
    network = gaussian_network(scheduler_with())
    open_end, clean = (
        integrate_adaptive(network, scheduler_with(final_sigmas_type=kind), X_T) for kind in ("sigma_min", "zero")
    )
    assert clean.num_calls == open_end.num_calls + 1
    assert clean.orders == [*open_end.orders, 1]
    assert clean.timesteps == [*open_end.timesteps, open_end.end]
    assert clean.end is None
    level = scheduler_with().schedule.level(open_end.end)
    total = (level.alpha * 0.5) ** 2 + level.sigma**2
    torch.testing.assert_close(clean.sample, level.alpha * 0.25 * open_end.sample / total)


def test_network_calls_are_counted_and_in_the_batchs_dtype():
    scheduler = scheduler_with()
    network, seen = gaussian_network(scheduler), []

    def counted(x, t):
        seen.append((x.dtype, t.dtype))
        return torch.cat([network(x, t), x], dim=1)  # with a variance, which is not used

    run = integrate_adaptive(counted, scheduler, X_T.half(), rtol=0.5)
    assert seen == [(torch.float16, torch.float32)] * run.num_calls
    assert run.sample.dtype == torch.float16
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize("algorithm_type", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize(
    "clipping", [{"clip_sample": True, "clip_sample_range": 0.4}, {"thresholding": True, "sample_max_value": 3.0}]
)
def test_clipping_is_that_of_step(algorithm_type, clipping):
    scheduler = scheduler_with(algorithm_type=algorithm_type, final_sigmas_type="zero", **clipping)
    x = 3 * X_T
    run = integrate_adaptive(gaussian_network(scheduler), scheduler, x)
    scheduler.set_timesteps(plan=frozen(run, scheduler))
    walked = walk(scheduler, gaussian_network(scheduler), x)
    torch.testing.assert_close(walked, run.sample, rtol=1e-5, atol=1e-5)
    scheduler.set_timesteps(5, encode=True)  # which clips nothing
    assert torch.equal(integrate_adaptive(gaussian_network(scheduler), scheduler, x).sample, run.sample)
    free = scheduler_with(algorithm_type=algorithm_type, final_sigmas_type="zero")
    assert (integrate_adaptive(gaussian_network(free), free, x).sample - run.sample).abs().max() > 0.1


def test_tolerances_that_cannot_be_met():
    scheduler = scheduler_with()
    network = gaussian_network(scheduler)
    with pytest.raises(RuntimeError, match=r"max_calls=20 .* timestep \d+"):
        integrate_adaptive(network, scheduler, X_T, max_calls=20)
    assert integrate_adaptive(network, scheduler, X_T, max_calls=200).num_calls <= 200
    with pytest.raises(RuntimeError, match=r"min_step=0.04"):
        integrate_adaptive(network, scheduler, X_T, atol=1e-9, rtol=1e-9, min_step=0.04)
    with pytest.raises(RuntimeError, match=r"min_step=0.06"):
        integrate_adaptive(network, scheduler, X_T, min_step=0.06)
    with pytest.raises(RuntimeError, match="nan at timestep 999"):
        integrate_adaptive(lambda x, t: x * math.nan, scheduler, X_T)


def test_the_limit_on_calls_is_exact():
    scheduler = scheduler_with(final_sigmas_type="zero")
    network = gaussian_network(scheduler)
    needed = integrate_adaptive(network, scheduler, X_T).num_calls
    assert integrate_adaptive(network, scheduler, X_T, max_calls=needed).num_calls == needed
    with pytest.raises(RuntimeError, match="max_calls"):
        integrate_adaptive(network, scheduler, X_T, max_calls=needed - 1)


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"order": 1}, {}, "order=1"),
        ({"rtol": 0.0}, {}, "rtol=0.0"),
        ({"end": 999}, {}, "end=999"),
        ({"controller": "pi"}, {}, "controller='pi'"),
        ({}, {"algorithm_type": "sde-dpmsolver++"}, r"algorithm_type='sde-dpmsolver\+\+'"),
    ],
)
def test_arguments_that_make_no_sense(options, config, message):
    with pytest.raises(ValueError, match=message):
        integrate_adaptive(lambda x, t: x, scheduler_with(**config), X_T, **options)


@pytest.mark.parametrize(("lambda_min_clipped", "start"), [(-math.inf, 998), (-5.1, 930)])
def test_walk_starts_at_the_noisiest_usable_level(lambda_min_clipped, start):
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = scheduler_with(lambda_min_clipped=lambda_min_clipped, **config)
    run = integrate_adaptive(gaussian_network(scheduler), scheduler, X_T)
    assert run.timesteps[0] == start
    assert (run.sample / X_T).sub(0.5).abs().max() < 0.02


def test_no_error_at_all_takes_the_longest_steps():
    run = integrate_adaptive(lambda x, t: torch.zeros_like(x), scheduler_with(algorithm_type="dpmsolver"), X_T)
    assert run.num_accepted == 2


def test_the_pid_law_looks_back():
    law, plain = PIDController(p=0.4, i=0.6), PIDController(p=0.0, i=0.6)
    assert law.judge(0.5, [0.5], 2) == plain.judge(0.5, [], 2)
    assert law.judge(0.5, [0.1], 2)[1] < law.judge(0.5, [0.5], 2)[1] < law.judge(0.5, [0.9], 2)[1]
    assert ReferenceController(safety=0.5).judge(0.25, [], 2) == (True, 1.0)


# Plans ---------------------------------------------------------------------------------------------------------------


def walk(scheduler, network, x):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


def frozen(run, scheduler):
    """A plan made by hand, with the timesteps in float32."""
    template = plan_timesteps((small_unet(), scheduler), 0.5, 1).to_dict()
    timesteps = torch.tensor(run.timesteps).tolist()
    return {**template, "timesteps": timesteps, "orders": run.orders, "end": run.end}


def small_unet(**config):
    """Without gradients, as inside a pipeline: with them torch takes other kernels, which round otherwise."""
    return tiny_unet(**{"sample_size": 4, "block_out_channels": (8, 8), **config}).requires_grad_(False)


def pilot_noise(num, size=4):
    return torch.cat([torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(i)) for i in range(num)])


@pytest.mark.parametrize("algorithm_type", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@torch.no_grad()
def test_walking_a_plan_is_the_adaptive_run(algorithm_type, order, final_sigmas_type):
    unet = small_unet()
    scheduler = scheduler_with(algorithm_type=algorithm_type, final_sigmas_type=final_sigmas_type, solver_type="heun")
    plan = plan_timesteps((unet, scheduler), 0.05, 4, order=order)
    run = integrate_adaptive(lambda x, t: unet(x, t).sample, scheduler, pilot_noise(4), order=order)
    assert plan.orders == run.orders
    assert plan.num_calls == run.num_calls - run.num_rejected * (order - 1)
    scheduler.set_timesteps(plan=plan)
    assert scheduler.timesteps.tolist() == plan.timesteps
    walked = walk(scheduler, lambda x, t: unet(x, t).sample, pilot_noise(4))
    torch.testing.assert_close(walked, run.sample, rtol=1e-4, atol=1e-5)
    scheduler.set_timesteps(plan.num_calls)  # the plan was for once: this is the ordinary grid
    assert scheduler.timesteps.tolist() != plan.timesteps


@pytest.fixture(scope="module")
def pipe():
    return DDPMPipeline(small_unet(), DDPMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def plan(pipe):
    return plan_timesteps(pipe, tolerance=0.1, num_pilot_images=2)


def test_a_plan_survives_its_file(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert StepPlan.load(tmp_path / "plan.json") == plan
    scheduler = DPMSolverScheduler(clip_sample=False)
    scheduler.set_timesteps(plan=plan)
    rows = scheduler.updates
    scheduler.set_timesteps(plan=json.loads((tmp_path / "plan.json").read_text()))
    assert scheduler.updates == rows
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"other.json"):
        StepPlan.load(tmp_path / "other.json")


def test_a_stock_pipeline_walks_the_plan(pipe, plan, tmp_path):
    planned = DDPMPipeline(pipe.unet, plan.scheduler(pipe.scheduler))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    images = planned(2, generators, num_inference_steps=plan.num_calls, output_type="np").images
    assert planned.scheduler.timesteps.tolist() == plan.timesteps
    run = integrate_adaptive(
        lambda x, t: pipe.unet(x, t).sample, planned.scheduler, pilot_noise(2), rtol=0.1, atol=0.0156
    )
    expected = (run.sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(images), expected, rtol=1e-4, atol=1e-5)

    planned.scheduler.save_pretrained(tmp_path)
    loaded = DPMSolverScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(plan.num_calls)
    assert loaded.updates == planned.scheduler.updates
    ordinary = DPMSolverScheduler.from_config(whole_config(pipe.scheduler))
    for scheduler in (loaded, ordinary):
        scheduler.set_timesteps(plan.num_calls + 1)
    assert loaded.updates == ordinary.updates


def test_a_plan_is_refused_by_another_schedule_or_solver(plan):
    for config in ({"beta_end": 0.021}, {"algorithm_type": "dpmsolver"}, {"solver_type": "heun"}):
        with pytest.raises(ValueError, match=r"schedule_hash=|algorithm_type=|solver_type="):
            DPMSolverScheduler(**config).set_timesteps(plan=plan)
        with pytest.raises(ValueError, match=r"schedule_hash=|algorithm_type=|solver_type="):
            DPMSolverScheduler(**config, step_plan=plan.to_dict())
    with pytest.raises(ValueError, match="unic='bh2'"):
        DPMSolverScheduler(unic="bh2").set_timesteps(plan=plan)
    with pytest.raises(ValueError, match="unic='bh2'"):
        DPMSolverScheduler(unic="bh2", step_plan=plan.to_dict())
    assert plan.scheduler(DPMSolverScheduler(unic="bh2")).config.unic is None
    scheduler = DPMSolverScheduler()
    with pytest.raises(ValueError, match=r"num_inference_steps, .*plan"):
        scheduler.set_timesteps(10, plan=plan)
    with pytest.raises(ValueError, match="encode=True"):
        scheduler.set_timesteps(plan=plan, encode=True)
    damages = (
        {"orders": plan.orders[1:]},
        {"timesteps": plan.timesteps[::-1]},
        {"timesteps": [], "orders": []},
        {"timesteps": [2000.0, *plan.timesteps[1:]]},
        {"end": plan.timesteps[-2]},
        {"timesteps": plan.timesteps[:3], "orders": [3]},  # only first order can land on clean data
        {"timesteps": "abc"},
        {"timesteps": None},
        {"orders": None},
        {"end": "zero"},
    )
    for damage in damages:
        with pytest.raises(ValueError, match=r"timesteps .*orders "):
            scheduler.set_timesteps(plan={**plan.to_dict(), **damage})
    missing = plan.to_dict()
    del missing["orders"]
    with pytest.raises(ValueError, match=r"timesteps .*orders "):
        scheduler.set_timesteps(plan=missing)
    with pytest.raises(ValueError, match=r"'plan\.json'.*StepPlan\.load"):
        scheduler.set_timesteps(plan="plan.json")


def test_entering_a_plan_in_the_middle_of_a_block(plan):
    """Image to image: the first block keeps its remaining stages, the later blocks are unchanged."""
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(plan=plan)
    rows = scheduler.updates
    scheduler.set_begin_index(4)  # the second stage of the second block
    assert [row.anchored for row in scheduler.updates[4:6]] == [False, True]
    assert scheduler.updates[6:] == rows[6:]
    network = gaussian_network(scheduler)
    x = 0.7 * torch.ones(1, 2, dtype=torch.float64)
    for t in scheduler.timesteps[4:-1]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    whole = gaussian_flow(scheduler, plan.timesteps[-1]) / gaussian_flow(scheduler, plan.timesteps[4])
    assert x[0, 0].item() == pytest.approx(0.7 * whole, rel=0.02)


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_a_rounded_plan(pipe, final_sigmas_type):
    pair = pipe.unet, scheduler_with(final_sigmas_type=final_sigmas_type)
    rounded, plan = (plan_timesteps(pair, 0.1, 2, fractional=fractional) for fractional in (False, True))
    assert all(isinstance(t, int) for t in rounded.timesteps)
    assert rounded.end == (None if final_sigmas_type == "zero" else 0)
    assert max(abs(t - s) for t, s in zip(rounded.timesteps, plan.timesteps, strict=True)) < 3
    scheduler = rounded.scheduler(pipe.scheduler)
    scheduler.set_timesteps(rounded.num_calls)
    assert not scheduler.timesteps.is_floating_point()
    assert walk(scheduler, lambda x, t: x, X_T).isfinite().all()


@pytest.mark.parametrize(("number", "seeds"), [(0, None), (2, [1]), (2, [1, 2, 3]), (-1, None)])
def test_there_is_a_seed_for_each_pilot(pipe, number, seeds):
    with pytest.raises(ValueError, match=f"num_pilot_images={number}"):
        plan_timesteps(pipe, 0.5, number, seeds=seeds)


def test_too_long_a_plan_cannot_be_rounded():
    pair = small_unet(), DDIMScheduler(num_train_timesteps=10, beta_end=0.9, clip_sample=False)
    plan = plan_timesteps(pair, 0.01, 1)
    assert plan.num_calls > 10
    with pytest.raises(ValueError, match=f"{plan.num_calls} steps.* 10 "):
        plan_timesteps(pair, 0.01, 1, fractional=False)


def test_the_network_gets_its_further_arguments():
    unet, seen = small_unet(num_class_embeds=3), []
    unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    plan_timesteps((unet, DDIMScheduler(clip_sample=False)), 0.5, 2, network_kwargs={"return_dict": True})
    assert all(call["return_dict"] is True and len(call["class_labels"]) == 2 for call in seen)


def test_pilots_of_a_class_conditional_network():
    unet = small_unet(num_class_embeds=3, out_channels=2)
    scheduler = DDIMScheduler(clip_sample=False)
    seen = []
    unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    drawn = plan_timesteps((unet, scheduler), 0.5, 4, generator=torch.Generator().manual_seed(3))
    assert {tuple(labels) for labels in seen} == {tuple(seen[0])}
    assert set(seen[0]) <= {0, 1, 2}
    assert drawn.provenance["seeds"] is None
    seen.clear()
    plan_timesteps((unet.train(), scheduler), 0.5, 2, seeds=[5, 6], class_labels=[2, 0])
    assert seen[0] == [2, 0]
    assert unet.training
