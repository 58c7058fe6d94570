"""What a config says of its process, through chains of swaps, files, and changes afterwards."""

import copy
import json
import math
import pickle
import re
from inspect import signature

import diffusers
import pytest
import torch

from diffusers_dpm.schedulers import ALL_SCHEDULERS, DDIMScheduler, DDPMScheduler, DPMSolverScheduler

from .helpers import PLANNING, noise


FlowEuler, UniPC = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.UniPCMultistepScheduler
FLOW, EDM = {"kind": "flow"}, {"kind": "edm"}
FLOW_MODE = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PREDICTED = {"flow": "flow_prediction", "edm": "epsilon"}


def made(scheduler_class, process, **config):
    return scheduler_class(process=process, prediction_type=PREDICTED[process["kind"]], **config)


@pytest.mark.parametrize(
    "stock", [FlowEuler(shift=3.0), diffusers.EDMEulerScheduler(), diffusers.DDIMScheduler(clip_sample=False)], ids=str
)
def test_what_is_off_stays_off_through_a_file(stock, tmp_path):
    """Latents must not be clipped because a file was read by another class."""
    DPMSolverScheduler.from_config(stock.config).save_pretrained(tmp_path)
    for scheduler_class in (DDIMScheduler, DDPMScheduler):
        assert scheduler_class.from_pretrained(tmp_path).config.clip_sample is False
    assert DDIMScheduler(process=FLOW).config.clip_sample is False
    assert DDIMScheduler(process=FLOW, clip_sample=True).config.clip_sample is True


def test_a_stock_scheduler_that_changed_meanwhile_is_read_anew(tmp_path):
    ours = DPMSolverScheduler.from_config(FlowEuler(shift=3.0).config)
    stock = FlowEuler.from_config(ours.config, shift=5.0)
    assert DPMSolverScheduler.from_config(stock.config).config.process["shift"] == 5.0
    stock.save_pretrained(tmp_path)
    assert DDIMScheduler.from_pretrained(tmp_path).config.process["shift"] == 5.0
    same = FlowEuler.from_config(ours.config)
    assert DDIMScheduler.from_config(same.config).config.process == ours.config.process


def test_a_flow_mode_that_is_on_is_newer_than_a_shift_that_was_kept():
    kept = FlowEuler(shift=3.0).config
    stock = UniPC.from_config(kept, flow_shift=5.0, **FLOW_MODE)
    process = DPMSolverScheduler.from_config(stock.config).config.process
    assert (process["shift"], process["spacing"]) == (5.0, "unipc")
    karras = UniPC.from_config(kept, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01, **FLOW_MODE)
    process = DPMSolverScheduler.from_config(karras.config).config.process
    assert (process["kind"], process["over"]) == ("flow", "karras")


@pytest.mark.parametrize("key", ["shift", "flow_shift"])
def test_both_names_of_a_shift_mean_it(key):
    ours = DPMSolverScheduler.from_config(FlowEuler(shift=3.0).config, **{key: 5.0})
    assert ours.config.process["shift"] == 5.0
    ours.register_to_config(**{key: 7.0})
    assert ours.config.process["shift"] == 7.0
    stock = FlowEuler(shift=7.0)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(5)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-5, atol=1e-5)


def test_the_clock_of_a_swap_outlives_later_changes():
    audio = {"sigma_schedule": "exponential", "sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0}
    audio |= {"solver_order": 2, "prediction_type": "v_prediction"}
    ours = DPMSolverScheduler.from_config(audio)
    assert ours.config.process["clock"] == "atan"
    ours.register_to_config(sigma_max=300.0)
    again = DDIMScheduler.from_config(ours.config, sigma_max=200.0)
    for scheduler, sigma_max in ((ours, 300.0), (again, 200.0)):
        assert scheduler.config.process["clock"] == "atan"
        assert scheduler.schedule.ends[0] == sigma_max


def test_a_given_process_keeps_what_goes_with_it():
    process = {"kind": "flow", "shift": 9.0, "spacing": "dpm"}
    ours = DDIMScheduler.from_config(FlowEuler(shift=3.0).config, process=process)
    assert ours.config.process == process
    assert (ours.config.prediction_type, ours.config.clip_sample) == ("flow_prediction", False)
    assert DPMSolverScheduler.from_config(ours.config).config.process == process


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: made(DDIMScheduler, FLOW).register_to_config(shift=5.0), "'shift': 5.0"),
        (lambda: DDIMScheduler.from_config(made(DPMSolverScheduler, FLOW).config, shift=5.0), "'shift': 5.0"),
        (lambda: DPMSolverScheduler.from_config(diffusers.DDIMScheduler().config, shift=5.0), "'shift': 5.0"),
        (lambda: made(DDIMScheduler, FLOW | {"num_train_timesteps": 1.5}), "num_train_timesteps=1.5"),
        (lambda: made(DDIMScheduler, FLOW | {"num_train_timesteps": 0}), "num_train_timesteps=0"),
        (lambda: made(DDIMScheduler, FLOW | {"terminal": 1.5}), "terminal=1.5"),
        (lambda: made(DDIMScheduler, EDM | {"sigma_data": 0.0}), "sigma_data=0.0"),
        (lambda: made(DDIMScheduler, EDM | {"rho": 0.0}), "rho=0.0"),
        (lambda: DDIMScheduler(process={"kind": "ve", "scale": 0.0}), "scale=0.0"),
        (lambda: DDIMScheduler(process={"kind": "vp", "bogus": 1}), "'bogus': 1"),
        (lambda: DDIMScheduler(process="flow"), "process='flow'"),
        (lambda: DDIMScheduler(process={"kind": ["flow"]}), r"kind=\['flow'\]"),
        (lambda: DDIMScheduler.from_config({"snr": 0.15, "sampling_eps": 1e-5}), "'sigma_min'"),
        (lambda: DDIMScheduler.from_config({"scaler": 1.0}), "'s'"),
        (
            lambda: DDIMScheduler.from_config({"timestep_type": "continuous", "prediction_type": "v_prediction"}),
            "timestep_type='continuous'",
        ),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        change()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheduler_class", ALL_SCHEDULERS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000'"),
        ({"beta_end": "2e-2"}, "beta_end='2e-2'"),
        ({"clip_sample": "False"}, "clip_sample='False'"),
        ({"thresholding": "off"}, "thresholding='off'"),
        ({"trained_betas": [0.1, "0.2"]}, "trained_betas='0.2'"),
        ({"steps_offset": " 1 "}, "steps_offset=' 1 '"),
        ({"process": {"kind": "flow", "inverted": "no"}}, "inverted='no'"),
        ({"shift": "3.0"}, "shift='3.0'"),
        ({"use_karras_sigmas": "false"}, "use_karras_sigmas='false'"),
        ({**FLOW_MODE, "use_flow_sigmas": "true"}, "use_flow_sigmas='true'"),
        ({"sigma_schedule": "karras", "sigma_data": "0.5"}, "sigma_data='0.5'"),
        ({"snr_shift_scale": "null"}, "snr_shift_scale='null'"),
    ],
    ids=str,
)
def test_text_in_the_place_of_a_number_is_refused(scheduler_class, config, message, tmp_path):
    """By a swap, as an argument of one, from a file, by the constructor, and when it is registered."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    made, stock, own = scheduler_class(), diffusers.DDIMScheduler().config, signature(scheduler_class).parameters
    ways = [
        lambda: scheduler_class.from_config(config),
        lambda: scheduler_class.from_config(stock, **config),
        lambda: scheduler_class.from_pretrained(tmp_path),
        lambda: made.register_to_config(**config),
    ]
    if config.keys() <= own.keys():
        ways.append(lambda: scheduler_class(**config))
    for way in ways:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            way()
        assert "\n" not in str(caught.value)
    assert made.config == scheduler_class().config


def test_names_and_versions_may_read_like_numbers():
    config = {
        **diffusers.DDIMScheduler().config,
        "_diffusers_version": "0.38",
        "_name_or_path": "1000",
        "_note": ["no"],
        "plan": {"rtol": "0.05"},
    }
    assert DDIMScheduler.from_config(config).config["_name_or_path"] == "1000"


@pytest.mark.parametrize("mu", [math.nan, math.inf, 1000.0, "one"])
@pytest.mark.parametrize("dynamic", ["exponential", "linear"])
def test_a_shift_is_a_number_of_moderate_size(mu, dynamic):
    ours = made(DDIMScheduler, FLOW | {"dynamic": dynamic})
    if (mu, dynamic) == (1000.0, "linear"):  # a large factor, and no more
        return ours.set_timesteps(4, mu=mu)
    with pytest.raises(ValueError, match=f"mu={mu!r}"):
        ours.set_timesteps(4, mu=mu)
    return None


def test_a_linear_shift_is_positive():
    with pytest.raises(ValueError, match=r"mu=-1\.0"):
        made(DDIMScheduler, FLOW | {"dynamic": "linear"}).set_timesteps(4, mu=-1.0)


@pytest.mark.parametrize(("place", "sigma"), [(1, 7.0), (2, 0.9), (1, -0.5), (1, math.nan)])
def test_sigmas_that_are_written_to_are_checked(place, sigma):
    ours = made(DDIMScheduler, FLOW)
    ours.set_timesteps(4)
    ours.sigmas[place] = sigma
    with pytest.raises(ValueError, match="sigmas"):
        ours.step(torch.zeros(1, 2), ours.timesteps[0], torch.zeros(1, 2))


@pytest.mark.parametrize("process", [FLOW | {"shift": 0.5}, FLOW | {"inverted": True}, EDM], ids=str)
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "sde-dpmsolver++"])
def test_no_loop_ends_noisier_than_it_was(process, algorithm_type):
    """A grid may end below the cleanest level, at which final_sigmas_type="sigma_min" ends, or a rounding from it."""
    solver = made(DPMSolverScheduler, process, final_sigmas_type="sigma_min", algorithm_type=algorithm_type)
    ddim = made(DDIMScheduler, process, set_alpha_to_one=False, eta=float(algorithm_type.startswith("sde")))
    for scheduler in (solver, ddim):
        scheduler.set_timesteps(12)
        lambdas = [level.lambda_ for level in scheduler.levels]
        assert lambdas == sorted(lambdas)
        x = noise(1, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
        assert x.isfinite().all()


@pytest.mark.parametrize("scheduler_class", PLANNING)
@pytest.mark.parametrize("process", [FLOW, FLOW | {"inverted": True}, EDM, {"kind": "ve"}, {"kind": "subvp"}], ids=str)
def test_schedulers_can_be_pickled(scheduler_class, process):
    scheduler = scheduler_class(process=process)
    for other in (pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler)):
        assert other.config == scheduler.config
        assert other.schedule.hash == scheduler.schedule.hash


def test_a_hash_does_not_depend_on_how_a_number_is_written():
    pairs = [
        ({"kind": "vp_linear", "beta_max": 20}, {"kind": "vp_linear", "beta_max": 20.0}),
        ({"kind": "edm", "sigma_data": 1}, {"kind": "edm", "sigma_data": 1.0}),
        ({"kind": "flow", "inverted": 0}, {"kind": "flow", "inverted": False}),
    ]
    for first, second in pairs:
        assert DDIMScheduler(process=first).schedule.hash == DDIMScheduler(process=second).schedule.hash


@pytest.mark.parametrize(("process", "outside"), [(FLOW, (-1.0, 1500.0)), ({"kind": "vp_linear"}, (-1.0, 1200.0))])
def test_noise_beyond_the_clock_is_refused(process, outside):
    scheduler, x = DDIMScheduler(process=process), noise(1, 4)
    for t in outside:
        with pytest.raises(ValueError, match="timesteps"):
            scheduler.add_noise(x, x, torch.tensor([t]))


@pytest.mark.parametrize("process", [FLOW, FLOW | {"inverted": True}, EDM], ids=str)
def test_the_timestep_after_the_last_is_clean_data(process):
    scheduler, x = made(DDIMScheduler, process), noise(1, 4)
    scheduler.set_timesteps(5)
    after = scheduler.previous_timestep(scheduler.timesteps[-1:])
    torch.testing.assert_close(scheduler.add_noise(x, noise(1, 4, seed=1), after), x)
    with pytest.raises(ValueError, match="timestep"):
        scheduler.previous_timestep(after)


def test_cut_timesteps_are_told_apart_or_refused():
    whole = made(DDIMScheduler, FLOW | {"shift": 3.0})
    whole.set_timesteps(4)
    x = noise(1, 4)
    for place, t in enumerate(whole.timesteps.long().tolist()):
        whole.step(torch.zeros_like(x), t, x)
        assert whole.step_index == place + 1
    unit = made(DDIMScheduler, FLOW | {"num_train_timesteps": 1})
    unit.set_timesteps(sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="timestep 0"):
        unit.step(torch.zeros_like(x), 0, x)


@pytest.mark.parametrize("scheduler_class", PLANNING)
def test_equal_timesteps_are_walked_in_turn(scheduler_class):
    options = {"reverse_variance": "small"} if scheduler_class.__name__.startswith("Analytic") else {}
    ours = made(scheduler_class, FLOW, **options)
    ours.set_timesteps(timesteps=[500.0, 500.0, 100.0], sigmas=[0.5, 0.4, 0.1])
    x, visited = noise(1, 4), []
    for t in [500.0, 500.0, 100.0]:
        x = ours.step(torch.zeros_like(x), t, x).prev_sample
        visited.append(ours.step_index)
    assert visited == [1, 2, 3]


def test_the_network_is_told_where_x_is_in_spacings_of_ours():
    """CogView4 gives timesteps and sigmas, of which it shifts the sigmas: here both only say how many."""
    ours = DDIMScheduler.from_config(FlowEuler(shift=3.0).config, timestep_spacing="logsnr")
    ours.set_timesteps(timesteps=[1000.0, 667.0, 334.0, 1.0], sigmas=[1.0, 0.667, 0.334, 0.001])
    told = ours.timesteps / 1000
    torch.testing.assert_close(3 * told / (1 + 2 * told), ours.sigmas[:-1])
    ours.set_timesteps(4)
    torch.testing.assert_close(ours.timesteps, 1000 * ours.sigmas[:-1])


def test_what_pipelines_make_mu_of_crosses_though_a_default():
    stock = FlowEuler(use_dynamic_shifting=True)
    config = DDIMScheduler.from_config(stock.config).config
    for key in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        assert key in stock.config["_use_default_values"]
        assert config[key] == stock.config[key]


def test_the_prediction_type_of_cosine_is_read_though_a_default():
    stock = diffusers.CosineDPMSolverMultistepScheduler()
    assert "prediction_type" in stock.config["_use_default_values"]
    ours = DDIMScheduler.from_config(stock.config)
    assert ours.config.prediction_type == "v_prediction"
    again = DDIMScheduler.from_config(ours.config, prediction_type="epsilon")
    assert again.config.prediction_type == "epsilon"


def test_explicit_sigmas_count_but_on_flow():
    sigmas = [80.0, 10.0, 1.0, 0.1]
    ours = made(DDIMScheduler, EDM, timestep_spacing="logsnr")
    ours.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.sigmas[:-1], torch.tensor(sigmas))
    with pytest.raises(ValueError, match="ramp"):
        ours.set_timesteps(sigmas=[0.0, 0.9, 1.0])
