"""Rows fitted to networks that are exact for Gaussians and mixtures, whose ODE is solved in closed form."""

import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from diffusers_dpm.calibration import student
from diffusers_dpm.calibration.fit import FITTED, SOLVERS, calibrate, network_calls, teacher_for
from diffusers_dpm.calibration.inputs import Network, initial_noise
from diffusers_dpm.calibration.student import MAX_HISTORY, RIDGE, Student, fit_row
from diffusers_dpm.calibration.tables import Calibration, solver_for
from diffusers_dpm.pipelines import DPMPipeline
from diffusers_dpm.schedulers import (
    CLEAN,
    AnalyticDPMScheduler,
    CalibratedScheduler,
    DDIMScheduler,
    DPMSolverScheduler,
)
from tests.commands import Counter
from tests.models import LinearClassifier, MixtureNetwork, tiny_unet
from tests.pipelines.tiny_diffusion_pipelines import unet as conditional_unet
from tests.schedulers.helpers import Gaussian
from tests.schedulers.problems import MIXTURE


pytestmark = pytest.mark.usefixtures("one_thread")
ExactNetwork = partial(MixtureNetwork, (-1.0, 0.6), (0.4, 0.25), (0.35, 0.65))  # of `MIXTURE`


def gaussian(mean, deviation, **config):
    return MixtureNetwork((mean,), (deviation,), **config)


SCHEDULER = DDIMScheduler(clip_sample=False)
SCHEDULE = SCHEDULER.schedule
QUICK = {"num_images": 8, "teacher_steps": 40, "max_walks": 6}
THOROUGH = {"num_images": 24, "teacher_steps": 100, "max_walks": 40}


def rms(x):
    return x.square().mean().sqrt().item()


def assert_same_tables(one, other, tolerance=0.0):
    """To the bit by default."""
    assert [table["timesteps"] for table in one.tables] == [table["timesteps"] for table in other.tables]
    for a, b in zip(one.tables, other.tables, strict=True):
        for row, again in zip(a["rows"], b["rows"], strict=True):
            assert row == pytest.approx(again, rel=tolerance, abs=tolerance)
        assert a["error"] == pytest.approx(b["error"], rel=tolerance, abs=tolerance)


class Fixed(DPMSolverScheduler):
    """Walks the timesteps in `fixed`, whatever number of steps a pipeline asks for."""

    def set_timesteps(self, num_inference_steps=None, device=None, **options):
        super().set_timesteps(device=device, timesteps=self.fixed)


def best_solver_of(table, scheduler):
    """The solver that a table is compared with, for a pipeline."""
    if table["solver"]["timestep_spacing"] != FITTED:
        return solver_for(scheduler, **table["solver"])
    solver = Fixed.from_config(solver_for(scheduler, solver_order=table["solver"]["solver_order"]).config)
    solver.fixed = table["timesteps"]
    return solver


def sampled(unet, scheduler, noise, n, classifier=None, **options):
    """The final x_0 of our pipeline, not clamped."""
    pipe = DPMPipeline(unet, scheduler, classifier)
    output = pipe(num_inference_steps=n, latents=noise, output_type="np", return_trajectory=True, **options)
    return output.trajectory.latents[-1]


def solved(unet, solver, timesteps, noise):
    """The final x under one of `SOLVERS`, in as many steps as there are timesteps."""
    options = {"timestep_spacing": solver["timestep_spacing"]} if solver["timestep_spacing"] != FITTED else {}
    scheduler = solver_for(SCHEDULER, solver_order=solver["solver_order"], **options)
    scheduler.set_timesteps(**({"num_inference_steps": len(timesteps)} if options else {"timesteps": timesteps}))
    x = noise
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(unet.eval()(x, t).sample, t, x).prev_sample
    return x


@pytest.fixture(scope="module")
def fitted():
    """Tables of the mixture."""
    return calibrate(ExactNetwork(), SCHEDULER, (3, 5, 8), **THOROUGH)


# One row -------------------------------------------------------------------------------------------------------------


def problem(num_terms, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_terms + 1, 3, 2, 4, 4, generator=generator, dtype=torch.float64).split([num_terms, 1])


@pytest.mark.parametrize("num_terms", [1, 2, 5])
def test_a_row_is_the_least_squares_fit(num_terms):
    terms, (target,) = problem(num_terms)
    expected = np.linalg.lstsq(terms.flatten(1).T.numpy(), target.flatten().numpy(), rcond=None)[0]
    for prior in ([], [0.3], [1e3] * num_terms):
        assert fit_row([*terms], target, prior, 0.0) == pytest.approx(expected, abs=1e-9)


def test_half_precision_terms_are_summed_in_float64():
    terms, (target,) = problem(2)
    single = [*terms.float()], target.float()
    double = [*terms.float().double()], target.float().double()
    assert fit_row(*single, [], 0.0) == fit_row(*double, [], 0.0)


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 30.0])
def test_a_row_solves_the_normal_equations_of_the_ridge_problem(ridge):
    terms, (target,) = problem(3)
    terms = terms * torch.tensor([1.0, 20.0, 0.01], dtype=torch.float64).view(-1, 1, 1, 1, 1)
    prior = torch.tensor([0.5, -0.2, 7.0], dtype=torch.float64)
    factors = torch.tensor(fit_row([*terms], target, prior.tolist(), ridge), dtype=torch.float64)
    flat = terms.flatten(1)
    gradient = flat @ (factors @ flat - target.flatten()) + ridge * flat.square().sum(1) * (factors - prior)
    assert (gradient.abs() / flat.norm(dim=1)).max() < 1e-10


def test_strong_ridge_gives_the_prior_missing_factors_are_0():
    terms, (target,) = problem(4)
    assert fit_row([*terms], target, [0.5, -0.2], 1e14) == pytest.approx([0.5, -0.2, 0.0, 0.0], abs=1e-12)


def test_what_the_images_do_not_tell_stays_at_the_prior():
    """Two terms that are equal share what is to be explained, and one that is 0 explains nothing."""
    x = problem(1)[0][0]
    a, b, c = fit_row([x, x, 0 * x], 0.7 * x, [0.2, 0.4, 0.3], 1e-6)
    assert (a, b) == pytest.approx((0.25, 0.45), abs=1e-6)
    assert c == pytest.approx(0.3, abs=1e-12)


# Gaussian data: each image moves along a straight line ---------------------------------------------------------------


MEAN, DEVIATION = 0.3, 0.5
moved = Gaussian(MEAN, DEVIATION**2).flow


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(("history", "ridge", "accuracy"), [(1, 0.0, 1e-8), (MAX_HISTORY, RIDGE, 1e-5)])
def test_fitted_to_exact_states_the_rows_are_exact(n, history, ridge, accuracy, prediction_type):
    unet = gaussian(MEAN, DEVIATION, prediction_type=prediction_type).eval()
    teacher = solver_for(DDIMScheduler(clip_sample=False, prediction_type=prediction_type))
    teacher.set_timesteps(40)
    x = initial_noise(unet, None, 10, 0)
    states = torch.stack([moved(x, teacher.levels[0], level) for level in teacher.levels])
    student = Student(Network(unet, teacher, {}, None, 64, dtype=torch.float64), teacher, states, 4)
    with torch.no_grad():
        walk = student.fit([40 * i // n for i in range(n)], history, ridge, num_images=10)
    assert [len(row.x0) for row in walk.rows] == [min(i + 1, history) for i in range(n)]
    assert walk.distances.max() < accuracy
    assert student.searched(walk) == walk.distances[4:8].mean()


@pytest.mark.parametrize("history", [1, 2, 3, MAX_HISTORY])
def test_a_strong_ridge_gives_rows_that_land(history):
    unet = gaussian(MEAN, DEVIATION).eval()
    teacher = solver_for(SCHEDULER)
    teacher.set_timesteps(40)
    states = torch.stack([moved(initial_noise(unet, None, 6, 0), teacher.levels[0], s) for s in teacher.levels])
    student = Student(Network(unet, teacher, {}, None, 64, dtype=torch.float64), teacher, states, 2)
    places = [0, 7, 21, 35]
    with torch.no_grad():
        rows = student.fit(places, history, 1e14).rows
    levels = [*(teacher.levels[place] for place in places), CLEAN]
    assert [len(row.x0) for row in rows] == [min(i + 1, history) for i in range(4)]
    assert (
        max(abs(miss) for row, pair in zip(rows, pairwise(levels), strict=True) for miss in row.defect(*pair)) < 1e-9
    )


def test_tables_of_gaussian_data_are_as_good_as_their_teacher():
    """On noises that they never saw, against the closed form."""
    unet = gaussian(MEAN, DEVIATION)
    calibration = calibrate(unet, SCHEDULER, (1, 2, 5), **QUICK)
    assert [len(table["timesteps"]) for table in calibration.tables] == [1, 2, 5]
    noise = initial_noise(unet, None, 8, seed=77)
    exact = moved(noise, SCHEDULE[999], CLEAN)
    teacher = rms(sampled(unet, teacher_for(SCHEDULER), noise, 40) - exact)
    assert 1e-5 < teacher < 0.01
    for n in (1, 2, 5):
        ours = rms(sampled(unet, calibration.scheduler(SCHEDULER), noise, n) - exact)
        assert ours == pytest.approx(teacher, rel=0.01)


def test_where_the_solver_is_exact_no_table_is_kept():
    """Of a single point, every prediction is the truth."""
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="sample")
    calibration = calibrate(gaussian(0.3, 0.0, prediction_type="sample"), scheduler, (2, 3), **QUICK)
    assert calibration.tables == []
    assert calibration.provenance["left_out"] == [2, 3]
    with pytest.raises(ValueError, match=r"tables=\[\]"):
        calibration.scheduler(scheduler)


# A mixture, solved by quantiles --------------------------------------------------------------------------------------


def test_tables_beat_solvers_and_improve_with_more_steps(fitted):
    assert [len(table["timesteps"]) for table in fitted.tables] == [3, 5, 8]
    assert fitted.provenance["left_out"] == []
    for table in fitted.tables:
        assert table["error"] < 0.8 * table["solver_error"]
        assert table["mean_error"] < 0.8 * table["solver_mean_error"]
    for fewer, more in pairwise(fitted.tables):
        assert more["error"] < 0.8 * fewer["error"]


def test_on_new_noises_they_are_nearer_to_the_exact_solution(fitted):
    """Than the solver of the report; and the report's errors are those of new noises."""
    unet = ExactNetwork()
    noise = initial_noise(unet, None, 64, seed=77)
    exact = torch.from_numpy(MIXTURE.flow(noise.flatten().numpy(), SCHEDULE[999], CLEAN)).view_as(noise)
    for table in fitted.tables:
        n = len(table["timesteps"])
        ours = rms(sampled(unet, fitted.scheduler(SCHEDULER), noise, n) - exact)
        solver = rms(solved(unet, table["solver"], table["timesteps"], noise) - exact)
        assert ours < 0.85 * solver
        assert ours == pytest.approx(table["error"], rel=0.35)
        assert solver == pytest.approx(table["solver_error"], rel=0.35)


def test_the_report_is_of_the_best_solver_on_its_own_images(fitted):
    """Which the settings of neither rows nor solver were chosen by."""
    unet, count = ExactNetwork(), THOROUGH["num_images"]
    noise = initial_noise(unet, None, 3 * count, 0)[2 * count :]
    teacher = sampled(unet, teacher_for(SCHEDULER), noise, THOROUGH["teacher_steps"])
    for table in fitted.tables:
        errors = [
            (solved(unet, solver, table["timesteps"], noise) - teacher).square().flatten(1).mean(1).sqrt()
            for solver in SOLVERS
        ]
        best = min(range(len(SOLVERS)), key=lambda i: errors[i].mean())
        assert table["solver"] == SOLVERS[best]
        assert table["solver_mean_error"] == pytest.approx(errors[best].mean().item(), rel=1e-6)
        assert table["solver_error"] == pytest.approx(rms(errors[best]), rel=1e-6)
        ours = sampled(unet, fitted.scheduler(SCHEDULER), noise, len(table["rows"])) - teacher
        gains = errors[best] - ours.square().flatten(1).mean(1).sqrt()
        assert table["standard_error"] == pytest.approx(gains.std(correction=0).item() / count**0.5, rel=1e-5)


def test_fitted_rows_miss_the_levels_that_derived_rows_land_on(fitted):
    for table in fitted.tables:
        n = len(table["timesteps"])
        calibrated, solver = fitted.scheduler(SCHEDULER), DPMSolverScheduler()
        calibrated.set_timesteps(n)
        solver.set_timesteps(timesteps=table["timesteps"])
        defects = [
            [max(map(abs, row.defect(*pair))) for row, pair in zip(s.updates, pairwise(s.levels), strict=True)]
            for s in (calibrated, solver)
        ]
        assert max(defects[0]) > 0.01
        assert max(defects[1]) < 1e-12


def test_a_table_says_what_its_rows_are(fitted):
    for table in fitted.tables:
        assert [len(row) - 1 for row in table["rows"]] == [
            min(i + 1, table["history"]) for i in range(len(table["rows"]))
        ]
        assert all(a > b for a, b in pairwise(table["timesteps"]))
        assert table["guidance_scale"] is None


def test_more_walks_are_never_worse_on_the_search_images():
    unet = ExactNetwork().eval()
    teacher = solver_for(SCHEDULER)
    teacher.set_timesteps(40)
    noise = initial_noise(unet, None, 16, 0)
    x = noise.flatten().numpy()
    states = [MIXTURE.flow(x, teacher.levels[0], level) for level in teacher.levels]
    states = torch.from_numpy(np.stack(states)).view(41, *noise.shape)
    student = Student(Network(unet, teacher, {}, None, 64, dtype=torch.float64), teacher, states, 8)
    with torch.no_grad():
        start = student.fit(student.nearest([999, 998, 997, 996]))
        walks = [student.search(start, tries) for tries in (0, 1, 5, 20, 80)]
        assert walks[0] is start
        for fewer, more in pairwise(map(student.searched, walks)):
            assert more <= fewer
        assert student.searched(walks[-1]) < 0.5 * student.searched(start)
        for walk in walks:  # what was taken over from other walks is what a new walk finds
            again = student.fit(walk.places)
            assert walk.places == again.places
            assert walk.rows == again.rows
            assert torch.equal(walk.distances, again.distances)


def test_the_nearest_timesteps_are_all_different():
    teacher = solver_for(SCHEDULER)
    teacher.set_timesteps(10)
    student = Student(None, teacher, torch.zeros(11, 3, 1, 1, 1), 1)
    assert student.timesteps == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
    assert student.nearest([999, 620, 130]) == [0, 4, 9]
    assert student.nearest([500, 500, 480]) == [0, 5, 6]
    assert student.nearest([999, 999, 998]) == [0, 1, 2]
    assert student.nearest([999, 3, 2, 1]) == [0, 7, 8, 9]


# Sampling walks what calibration walked ------------------------------------------------------------------------------


CASES = [
    ({}, {}),
    ({"learns_variance": True}, {}),
    ({"prediction_type": "sample"}, {"clip_sample": True, "clip_sample_range": 0.9}),
    ({"prediction_type": "v_prediction"}, {"thresholding": True, "dynamic_thresholding_ratio": 0.9}),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"rescale_betas_zero_snr": True}),
]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("network", "options"), CASES)
def test_sampling_the_reports_noises_gives_the_reported_errors(network, options, guided):
    unet, n = ExactNetwork(**network), 3
    prediction_type = unet.config.prediction_type
    scheduler = DDIMScheduler(**{"clip_sample": False, "prediction_type": prediction_type, **options})
    guidance = {"classifier": LinearClassifier(), "guidance_scale": 2.0} if guided else {}
    labels = {"class_labels": [1, 0, 0] * 8} if guided else {}
    calibration = calibrate(unet, scheduler, (n,), **QUICK, **guidance, **labels, batch_size=16)
    (table,) = calibration.tables
    noise = initial_noise(unet, None, 24, seed=0)

    def images(one, steps):
        return sampled(unet, one, noise, steps, **guidance, **labels)[16:]

    calibrated = calibration.scheduler(scheduler, guidance_scale=2.0 if guided else None)
    teacher = images(teacher_for(scheduler), 40)
    for error, one in (("error", calibrated), ("solver_error", best_solver_of(table, scheduler))):
        assert rms(images(one, n) - teacher) == pytest.approx(table[error], rel=1e-8)
    assert table["error"] < table["solver_error"]


def test_a_real_network_in_float32():
    unet = tiny_unet(block_out_channels=(8,)).train()
    calibration = calibrate(unet, SCHEDULER, (4,), num_images=4, teacher_steps=40, max_walks=2)
    noise = initial_noise(unet, None, 12, seed=0)
    assert noise.dtype == torch.float32
    teacher = sampled(unet, teacher_for(SCHEDULER), noise, 40)
    images = sampled(unet, calibration.scheduler(SCHEDULER), noise, 4)
    (table,) = calibration.tables
    assert table["error"] < 0.8 * table["solver_error"]
    assert rms((images - teacher)[8:]) == pytest.approx(table["error"], rel=1e-3)
    assert calibration.provenance["dtype"] == "float32"
    assert unet.training  # as before


def test_rows_for_a_network_that_guides_itself():
    unet = tiny_unet(block_out_channels=(8,), num_class_embeds=3)
    unet.register_to_config(_has_null_class=True)
    options = {"guidance_scale": 3.0, "class_labels": [0, 1] * 6}
    few = {"num_images": 4, "teacher_steps": 40, "max_walks": 2, "batch_size": 5}
    calibration = calibrate(unet, SCHEDULER, (4,), **few, **options)
    noise = initial_noise(unet, None, 12, seed=0)
    teacher = sampled(unet, teacher_for(SCHEDULER), noise, 40, **options)
    images = sampled(unet, calibration.scheduler(SCHEDULER), noise, 4, **options)
    (table,) = calibration.tables
    assert (table["guidance_scale"], table["classifier"]) == (3.0, "null class")
    assert rms((images - teacher)[8:]) == pytest.approx(table["error"], rel=1e-3)
    assert table["error"] < table["solver_error"]
    other = sampled(unet, calibration.scheduler(SCHEDULER), noise, 4, **{**options, "guidance_scale": 1.0})
    assert rms(other - images) > 2 * table["error"]


def test_tables_under_guidance_are_for_that_guidance(fitted):
    """Unguided ones, walked under the same guidance, are further from the guided teacher."""
    unet, classifier, n = ExactNetwork(), LinearClassifier(), 5
    guided = calibrate(unet, SCHEDULER, (n,), classifier=classifier, guidance_scale=3.0, **THOROUGH)
    (table,) = guided.tables
    assert table["guidance_scale"] == 3.0
    noise = initial_noise(unet, None, 24, seed=77)
    options = {"classifier": classifier, "class_labels": [0, 1] * 12, "guidance_scale": 3.0}
    teacher = sampled(unet, teacher_for(SCHEDULER), noise, 100, **options)
    both = fitted.with_tables_of(guided)
    errors = [
        rms(sampled(unet, both.scheduler(SCHEDULER, guidance_scale=scale), noise, n, **options) - teacher)
        for scale in (3.0, None)
    ]
    assert errors[0] < 0.7 * errors[1]


# What the network is called with -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [5, 64])
@pytest.mark.parametrize("labels", [None, [1, 0, 1, 1, 0, 0, 0]])
def test_each_image_has_its_label_and_arguments_in_every_call(labels, batch_size):
    """For data N(0, 1) in both classes x stays a multiple of its noise, which tells the images apart."""
    unet = MixtureNetwork((0.0, 0.0), (1.0, 1.0), num_class_embeds=2)
    noise = initial_noise(unet, None, 24, seed=3)
    own = {"place": torch.arange(24), "scale": torch.tensor([[0.5], [2.0]]), "words": "kept as they are"}
    own["nested"] = {"places": [torch.arange(24), (torch.arange(24), "kept")], "none": None}
    calibrate(unet, SCHEDULER, (3,), **QUICK, seed=3, class_labels=labels, network_kwargs=own, batch_size=batch_size)
    if labels is None:
        expected = torch.randint(2, (24,), generator=torch.Generator().manual_seed(3))
    else:
        expected = torch.tensor([*labels, *labels, *labels, *labels[:3]])
    assert 0 < expected.sum() < 24
    seen = set()
    for call in unet.calls:
        place = call["place"]
        seen |= {*place.tolist()}
        assert 0 < len(place) <= batch_size
        similarity = torch.cosine_similarity(call["x"].flatten(1), noise[place].flatten(1))
        torch.testing.assert_close(similarity, torch.ones_like(similarity), rtol=0, atol=1e-9)
        assert torch.equal(call["class_labels"], expected[place])
        assert torch.equal(call["scale"][:, 0], 0.5 * 4.0 ** (place % 2))
        assert call["words"] == "kept as they are"
        first, (second, kept) = call["nested"]["places"]
        assert torch.equal(first, place)
        assert torch.equal(second, place)
        assert (kept, call["nested"]["none"]) == ("kept", None)
        assert (call["t"].ndim, call["t"].dtype) == (0, torch.int64)
    assert seen == {*range(24)}


def test_a_plain_function_is_a_network():
    unet = ExactNetwork().eval()

    def function(x, t):
        assert x.dtype == torch.float32
        return unet(x, t).sample

    calibration = calibrate(function, SCHEDULER, (3,), **QUICK, sample_shape=(1, 4, 4))
    assert calibration.weights is None
    same = calibrate(ExactNetwork().float(), SCHEDULER, (3,), **QUICK)
    assert_same_tables(calibration, same)


def test_precision_of_a_plain_module_is_that_of_its_weights():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = ExactNetwork()

        def forward(self, x, t):
            assert x.dtype == torch.float64
            return self.unet(x, t).sample

    found = calibrate(Module(), SCHEDULER, (3,), **QUICK, sample_shape=(1, 4, 4), seed=np.int64(2))
    expected = calibrate(ExactNetwork(), SCHEDULER, (3,), **QUICK, seed=2)
    assert_same_tables(found, expected)
    assert json.loads(json.dumps(found.to_dict()))["provenance"]["seed"] == 2


def test_a_conditional_network_of_latents():
    unet = conditional_unet().eval()
    stock = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    prompts = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(1))
    options = {"num_images": 4, "teacher_steps": 30, "max_walks": 0}
    calibration = calibrate(unet, stock, (3,), **options, network_kwargs={"encoder_hidden_states": prompts})
    (table,) = calibration.tables

    def walk(scheduler, n):
        x = initial_noise(unet, None, 12, 0)[8:]
        scheduler.set_timesteps(n)
        for t in scheduler.timesteps:
            with torch.no_grad():
                output = unet(x, t, encoder_hidden_states=prompts[8:]).sample
            x = scheduler.step(output, t, x).prev_sample
        return x

    distance = walk(calibration.scheduler(stock), 3) - walk(teacher_for(stock), 30)
    assert rms(distance) == pytest.approx(table["error"], rel=1e-3)


def test_only_schedule_prediction_and_clipping_matter():
    expected = calibrate(ExactNetwork(), SCHEDULER, (3,), **QUICK)
    for scheduler in (
        DPMSolverScheduler(algorithm_type="dpmsolver", method="singlestep", denoise_to_zero=True, solver_order=3),
        diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, final_sigmas_type="sigma_min"),
        AnalyticDPMScheduler(timestep_spacing="optimal", clip_sample=False),
        diffusers.DDPMScheduler(timestep_spacing="trailing", clip_sample=False),
        expected.scheduler(SCHEDULER),
    ):
        assert_same_tables(calibrate(ExactNetwork(), scheduler, (3,), **QUICK), expected)


@pytest.mark.parametrize("max_walks", [0, 30])
def test_progress_stays_within_what_was_announced(max_walks):
    unet, counter = ExactNetwork(), Counter()
    options = {"num_images": 3, "teacher_steps": 30, "max_walks": max_walks}
    calibrate(unet, SCHEDULER, iter((2, 4, 2)), **options, progress=counter, batch_size=2)
    assert counter.total == sum(len(call["x"]) for call in unet.calls)
    announced = network_calls((2, 4), **options)
    assert 0.3 * announced < counter.total <= announced


# What must not change a result ---------------------------------------------------------------------------------------


def test_the_same_call_gives_the_same_tables_in_any_batches():
    options = {"num_images": 4, "teacher_steps": 40, "max_walks": 6}
    first, again = (calibrate(ExactNetwork(), SCHEDULER, (2, 3), **options) for _ in range(2))
    assert_same_tables(first, again)
    assert_same_tables(calibrate(ExactNetwork(), SCHEDULER, (3, 2, 3), **options, batch_size=1), first, 1e-7)
    other = calibrate(ExactNetwork(), SCHEDULER, (2, 3), **options, seed=1)
    assert other.tables[0]["rows"] != first.tables[0]["rows"]


TEACHER = 24 * 40  # images in network calls


@pytest.mark.parametrize(
    ("stop_after", "files", "saved"),
    [
        (TEACHER // 2, {"partial-0.safetensors"}, TEACHER // 3),  # one batch of three
        (TEACHER, {"partial-0.safetensors"}, TEACHER),
        (TEACHER + 2000, {"partial-0.safetensors", "partial.json"}, TEACHER + 500),
    ],
)
def test_an_interrupted_call_goes_on(stop_after, files, saved, tmp_path):
    folder = tmp_path / "partial"
    options = {**QUICK, "batch_size": 8}
    counter = Counter()
    whole = calibrate(ExactNetwork(), SCHEDULER, (2, 6), **options, progress=counter)
    with pytest.raises(KeyboardInterrupt):
        calibrate(ExactNetwork(), SCHEDULER, (2, 6), **options, folder=folder, progress=Counter(stop_after))
    assert {path.name for path in folder.iterdir()} == files
    rest = Counter()
    resumed = calibrate(ExactNetwork(), SCHEDULER, (2, 6), **options, folder=folder, progress=rest)
    assert_same_tables(resumed, whole)
    assert rest.total <= counter.total - saved
    assert not folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"num_images": 7},
        {"teacher_steps": 41},
        {"max_walks": 5},
        {"network_kwargs": {"place": torch.arange(24)}},
        {"network_kwargs": {"nested": {"place": [torch.arange(24)]}}},
        {"network_kwargs": {"words": "others"}},
        {"classifier": LinearClassifier(), "guidance_scale": 1.0},
        {"scheduler": DDIMScheduler(beta_end=0.03, clip_sample=False)},
        {"scheduler": DDIMScheduler(clip_sample=True)},
        {"unet": gaussian(0.0, 1.0).requires_grad_(False)},
    ],
)
def test_a_folder_of_other_settings_is_refused(change, tmp_path):
    given = {"unet": ExactNetwork(), "scheduler": SCHEDULER, "steps": (2,), **QUICK, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        calibrate(**given, progress=Counter(TEACHER))
    if "unet" in change:
        change["unet"].weight.fill_(1.0)  # what is compared is the weights
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        calibrate(**{**given, **change})


def test_finished_tables_of_other_settings_are_not_taken_over(tmp_path):
    given = {"unet": ExactNetwork(), "scheduler": SCHEDULER, "steps": (2, 6), **QUICK, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        calibrate(**given, progress=Counter(TEACHER + 2000))
    (tmp_path / "partial-0.safetensors").unlink()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        calibrate(**given, seed=1)
    for text in ("", "[]", "{}"):
        (tmp_path / "partial.json").write_text(text)
        with pytest.raises(ValueError, match=r"partial\.json"):
            calibrate(**given)


@pytest.mark.slow
def test_two_processes_share_the_work_and_get_what_one_gets(tmp_path, in_two_processes):
    in_two_processes(__file__, tmp_path)
    counter = Counter()
    alone = calibrate(ExactNetwork(), SCHEDULER, (2, 3), **QUICK, batch_size=4, progress=counter)
    for i in range(2):
        assert_same_tables(Calibration.load(tmp_path / f"{i}.json"), alone)
        assert int((tmp_path / f"{i}.txt").read_text()) == counter.total / 2
    assert not (tmp_path / "partial").exists()


def one_of_two_processes(folder):
    accelerator, unet = Accelerator(), ExactNetwork()
    assert accelerator.num_processes == 2
    if not accelerator.is_main_process:  # a processor that rounds otherwise must not change what they agree on
        student.fit_row = lambda *args: [factor * (1 + 1e-3) for factor in fit_row(*args)]
    given = {**QUICK, "batch_size": 4, "accelerator": accelerator, "folder": folder / "partial"}
    calibrate(unet, SCHEDULER, (2, 3), **given).save(folder / f"{accelerator.process_index}.json")
    images = sum(len(call["x"]) for call in unet.calls)
    (folder / f"{accelerator.process_index}.txt").write_text(str(images))
    accelerator.end_training()


# Arguments -----------------------------------------------------------------------------------------------------------


def conditional(**config):
    return ExactNetwork(num_class_embeds=2, **config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": ()}, r"steps .*20, .*\[\]"),
        ({"steps": (0, 3)}, r"\[0, 3\]"),
        ({"steps": (3, 21)}, r"20, .*\[3, 21\]"),
        ({"num_images": 0}, "num_images=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"max_walks": -1}, "max_walks=-1"),
        ({"guidance_scale": 1.0}, "guidance_scale=1 needs a classifier"),
        ({"classifier": LinearClassifier()}, "classifier .*guidance_scale"),
        ({"classifier": LinearClassifier(sample_size=8), "guidance_scale": 1.0}, "sample_size"),
        ({"class_labels": [0]}, "class_labels .*num_class_embeds"),
        ({"unet": conditional(), "class_labels": []}, r"labels .*\(0,\)"),
        ({"unet": conditional(), "class_labels": [0, 2]}, r"0 \.\. 1, .*\[0, 2"),
        ({"unet": conditional(), "class_labels": [0, -1]}, r"0 \.\. 1, "),
        ({"unet": conditional(), "class_labels": [0.5]}, r"0 \.\. 1, .*\[0\.5"),
        ({"unet": conditional(), "network_kwargs": {"class_labels": torch.zeros(1).long()}}, "network_kwargs"),
        ({"network_kwargs": {"place": torch.tensor(1)}}, r"network_kwargs .*\(\)"),
        ({"unet": lambda x, t: x}, "sample_size"),
        ({"unet": lambda x, t: x, "sample_shape": (1, 2, 2), "folder": "unused"}, r"folder .*torch\.nn\.Module"),
        ({"unet": lambda x, t: x[:, :1], "sample_shape": (3, 2, 2)}, r"model_output .*\(24, 1, 2, 2\)"),
        ({"unet": lambda x, t: x.repeat(1, 3, 1, 1), "sample_shape": (2, 2, 2)}, r"\(24, 6, 2, 2\)"),
        ({"unet": lambda x, t: x * math.nan, "sample_shape": (1, 2, 2)}, "timestep 999"),
        ({"scheduler": diffusers.IPNDMScheduler()}, "IPNDMScheduler .*trained_betas"),
    ],
)
def test_what_cannot_be_used_is_refused(change, message):
    given = {"unet": ExactNetwork(), "scheduler": SCHEDULER, "steps": (3,), **QUICK, **change}
    with pytest.raises(ValueError, match=message):
        calibrate(**given)


def test_labels_of_a_classifier_that_does_not_say_its_classes():
    def classifier_of(**config):
        classifier = LinearClassifier()
        classifier.register_to_config(**config)
        return classifier

    options = {**QUICK, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match="class_labels"):
        calibrate(ExactNetwork(), SCHEDULER, (3,), **options, classifier=classifier_of(num_classes=None))
    given = {"classifier": classifier_of(num_classes=None), "class_labels": [0, 1]}
    expected = calibrate(ExactNetwork(), SCHEDULER, (3,), **options, classifier=classifier_of(), class_labels=[0, 1])
    assert_same_tables(calibrate(ExactNetwork(), SCHEDULER, (3,), **options, **given), expected)


# What is kept --------------------------------------------------------------------------------------------------------


def test_saving_is_exact(fitted, tmp_path):
    fitted.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == fitted
    assert Calibration.from_dict(fitted.to_dict()) == fitted
    former = {key: value for key, value in fitted.to_dict().items() if key not in ("provenance", "weights")}
    former["made"] = {"weights": fitted.weights, "seed": 0}
    assert Calibration.from_dict(former) == replace(fitted, provenance=former["made"])
    whole, table = fitted.to_dict(), fitted.to_dict()["tables"][0]
    for change in ({"extra": 1}, {"tables": [5]}, {"tables": None}, {"provenance": None}):
        with pytest.raises(ValueError, match=rf"\b({next(iter(change))}|table)\b"):
            Calibration.from_dict({**whole, **change})
    del table["mean_error"]
    for text in ("{}", "[]", "no JSON", json.dumps({**whole, "tables": [table]})):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=r"broken\.json"):
            Calibration.load(tmp_path / "broken.json")


def test_its_scheduler(fitted, tmp_path):
    stock = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler = fitted.scheduler(stock)
    assert type(scheduler) is CalibratedScheduler
    assert scheduler.available_steps == [3, 5, 8]
    assert scheduler.config.timestep_spacing == "trailing"
    assert fitted.scheduler(stock, guidance_scale=2.0).available_steps == []
    scheduler.save_pretrained(tmp_path)
    assert CalibratedScheduler.from_pretrained(tmp_path).calibration == fitted.to_dict()
    with pytest.raises(ValueError, match="clip_sample"):
        fitted.scheduler(diffusers.DDPMScheduler())
    analytic = AnalyticDPMScheduler(timestep_spacing="optimal", clip_sample=False)
    assert fitted.scheduler(analytic).available_steps == [3, 5, 8]


def test_its_scheduler_takes_guided_tables_as_a_last_resort(fitted):
    def of(*scales):
        return replace(fitted, tables=[{**fitted.tables[0], "guidance_scale": scale} for scale in scales])

    before = fitted.scheduler(SCHEDULER, guidance_scale=7.0)
    for scales, taken in (((4.0, None), None), ((4.0, 2.0), 2.0), ((None,), None)):
        for scheduler in (SCHEDULER, before):
            assert of(*scales).scheduler(scheduler).config.guidance_scale == taken
    with pytest.raises(ValueError, match=r"guidance_scale=7 .*guidance_scale=2, "):
        of(2.0, None).scheduler(SCHEDULER, guidance_scale=7.0).set_timesteps(3)


def test_tables_given_are_not_those_of_the_scheduler(fitted):
    given = fitted.to_dict()
    scheduler = CalibratedScheduler.from_config(SCHEDULER.config)
    scheduler.set_calibration(given)
    given["tables"][0]["rows"][0][0] = 99.0
    assert scheduler.calibration == fitted.to_dict()


def test_tables_of_several_calls_are_joined(fitted):
    def with_tables(*pairs):
        tables = [{**fitted.tables[0], "guidance_scale": scale, "error": error} for scale, error in pairs]
        return replace(fitted, tables=tables)

    guided = with_tables((2.0, 1.0), (0.0, 2.0), (None, 3.0))
    joined = fitted.with_tables_of(guided)
    found = [(table["guidance_scale"], len(table["timesteps"]), table["error"]) for table in joined.tables]
    kept = [(None, n, fitted.tables[i]["error"]) for i, n in ((1, 5), (2, 8))]
    assert found == [(None, 3, 3.0), *kept, (0.0, 3, 2.0), (2.0, 3, 1.0)]
    assert len(fitted.tables) == 3


def test_tables_for_a_classifier_that_is_replaced_are_left_out(fitted):
    def with_tables(*triples):
        return replace(
            fitted,
            tables=[
                {**fitted.tables[0], "timesteps": [*range(n)], "guidance_scale": scale, "classifier": classifier}
                for n, scale, classifier in triples
            ],
        )

    old = with_tables((3, None, None), (3, 2.0, "old"), (5, 2.0, "old"))
    for new, kept in (
        (with_tables((4, 2.0, "new")), [(None, 3), (2.0, 4)]),
        (with_tables((4, 2.0, "old")), [(None, 3), (2.0, 3), (2.0, 4), (2.0, 5)]),
        (with_tables((4, None, None)), [(None, 3), (None, 4), (2.0, 3), (2.0, 5)]),
    ):
        tables = old.with_tables_of(new).tables
        assert [(table["guidance_scale"], len(table["timesteps"])) for table in tables] == kept


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schedule_hash", "0"),
        ("prediction_type", "sample"),
        ("clip_sample", True),
        ("clip_sample_range", 2.0),
        ("thresholding", True),
        ("dynamic_thresholding_ratio", 0.9),
        ("sample_max_value", 2.0),
        ("weights", "0"),
    ],
)
def test_tables_of_other_networks_or_schedulers_are_not_joined(fitted, key, value):
    unknown = replace(fitted, weights=None)
    with pytest.raises(ValueError, match="weights=None"):
        unknown.with_tables_of(unknown)
    with pytest.raises(ValueError, match=f"{key}={value}"):
        fitted.with_tables_of(replace(fitted, **{key: value}))


if __name__ == "__main__":
    one_of_two_processes(Path(sys.argv[1]))
