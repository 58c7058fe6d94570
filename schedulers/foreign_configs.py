"""Which Gaussian path the config of a scheduler of diffusers means: the one place that translates or refuses.

Configs are recognised by their keys, since only one that comes from a file names its class.
"""

import inspect
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import diffusers


# Keys of schedulers whose networks are no denoisers at given noise levels, or were distilled for one sampler.
REFUSED = {
    "s_min": "KarrasVeScheduler, whose networks take sigmas that its own grid squares",
    "clip_denoised": "consistency models",
    "stages": "Helios, which changes the resolution between stages",
    "num_policy_substeps": "policy flow models",
    "mask_token_id": "masked tokens, not Gaussian noise",
    "num_vec_classes": "discrete diffusion, not Gaussian noise",
    "schedule_mode": "protein backbones",
    "corrector_selection": "discrete diffusion, not Gaussian noise",
    "entropy_bound": "discrete diffusion, not Gaussian noise",
    "block_length": "discrete diffusion, not Gaussian noise",
}
REFUSED_CLASSES = {
    "IPNDMScheduler": "a path that its config does not say",
    "FlowMapEulerDiscreteScheduler": "flow maps, whose networks are told two timesteps",
}
FLOW_FLAGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
# What may be said beside `process`, and changes it: `from_config(pipe.scheduler.config, flow_shift=5.0)`.
PROCESS_KEYS = {
    *("shift", "flow_shift", "use_flow_sigmas", "use_dynamic_shifting", "time_shift_type", "invert_sigmas"),
    *("shift_terminal", "stochastic_sampling", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho"),
    *("timestep_type", "snr_shift_scale", "scaler", "s", "beta_min", "beta_max", "sampling_eps", *FLOW_FLAGS),
}
# What pipelines of flow matching read from the config to find `mu`, and which may be there by default only.
SHIFT_KEYS = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
ORIGIN = "_process_keys"  # config key: the `PROCESS_KEYS` that `process` was made of; none of a process that was given


LITERALS = ("true", "false", "yes", "no", "on", "off", "none", "null")


def check_words(config: Mapping[str, Any]) -> None:
    """Check that no number and no boolean is text: "false" would be taken for true, and "1000" for a name.

    No key of any scheduler has a value that reads like one, but for those of an underscore: versions, names, hashes.
    Of what is nested `process` alone is read.

    Raises:
        ValueError: names the key and the value.
    """
    process = config.get("process")
    for key, value in [*config.items(), *(process.items() if isinstance(process, Mapping) else ())]:
        for leaf in value if isinstance(value, (list, tuple)) else (value,):
            is_text = isinstance(leaf, str) and not key.startswith("_")
            if is_text and (leaf.strip().lower() in LITERALS or is_number(leaf)):
                raise ValueError(f"{key}={leaf!r} is text: write numbers, true, false and null without quotes.")


def check_types(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check that keys have values of the kind that their defaults are of: a number or a boolean, which may be None.

    Raises:
        ValueError: names the key and the value; no number is NaN.
    """
    for key, default in defaults.items():
        value = config.get(key, default)
        if isinstance(default, bool):
            if value not in (True, False, None):
                raise ValueError(f"{key}={value!r} must be True or False.")
        elif isinstance(default, Real):
            is_real = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
            if not is_real or (isinstance(default, int) and value % 1):
                raise ValueError(f"{key}={value!r} must be a {'whole ' * isinstance(default, int)}number.")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def said(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of its process."""
    return {key: config[key] for key in sorted(PROCESS_KEYS & config.keys())}


def with_process(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """What takes the place of keys of a config when some of `PROCESS_KEYS` change; `ORIGIN` is among it.

    Raises:
        ValueError: as `translated` and `check_words`; or the process was given by itself, or is another than the
            config's.
    """
    check_words({**config, **changes})
    changes = dict(changes)
    if "flow_shift" in changes and "shift" in config and not {**config, **changes}.get("use_flow_sigmas"):
        changes["shift"] = changes["flow_shift"]  # one thing, of two names
    given, new = config.get("process"), {**config, **changes}
    if given is not None and not config.get(ORIGIN):
        if changes:
            raise ValueError(f"{changes} would change process={given}: give that.")
        return {ORIGIN: None}
    if given is not None and said(new) == config[ORIGIN]:
        return {ORIGIN: config[ORIGIN]}
    found = translated(new)
    if changes and "process" in found and "use_flow_sigmas" not in changes and not translated(config):
        raise ValueError(f"{changes}: this config is of another process.")
    return {**changes, **found, **({ORIGIN: said(new)} if "process" in found else {})}


def translated_classes() -> list[type]:
    """diffusers' schedulers, beyond those of DDPM's process, whose configs have a meaning here."""
    names = [
        *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "EDMEuler", "EDMDPMSolverMultistep", "ScoreSdeVe"),
        *("LTXEulerAncestralRF", "CogVideoXDDIM", "CogVideoXDPM", "DDPMWuerstchen", "SASolver"),
    ]
    found = [getattr(diffusers, f"{name}Scheduler", None) for name in names]
    found.append(getattr(diffusers.schedulers, "ScoreSdeVpScheduler", None))  # not among diffusers' own names
    return [each for each in found if inspect.isclass(each)]


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ours that say what a foreign config means: `process`, and what goes with it; {} for DDPM's betas.

    Raises:
        ValueError: the config is of a process that is none of ours, or contradicts itself.
    """
    config = {**defaults_of(config.get("_class_name")), **config}
    for key, whose in REFUSED.items():
        if config.get(key) is not None:
            raise ValueError(f"{key}={config[key]!r} is of {whose}: use diffusers' class.")
    if config.get("prediction_type") == "trigflow":
        raise ValueError("prediction_type='trigflow' is of a distilled model: use diffusers' SCMScheduler.")
    if config.get("scale_factors"):
        raise ValueError(f"scale_factors={config['scale_factors']} changes the resolution: use diffusers' class.")
    try:
        found = next((found for rule in RULES if (found := rule(config)) is not None), {})
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is missing in the config of this process.") from None
    if "process" in found and found["process"]["kind"] != "vp":
        found.setdefault("clip_sample", False)  # of latents or unbounded data; stock schedulers of these cannot clip
    for key, value in (("prediction_type", "flow_prediction"), ("use_dynamic_shifting", True)):
        if not found and config.get(key) == value:
            raise ValueError(f"{key}={value!r} without flow sigmas: give use_flow_sigmas=True as well.")
    return found


def defaults_of(class_name: Any) -> dict[str, Any]:
    """The defaults of a scheduler of diffusers, of which a file may leave out any; {} for other classes.

    Raises:
        ValueError: the class is one of `REFUSED_CLASSES`.
    """
    if class_name in REFUSED_CLASSES:
        raise ValueError(f"_class_name={class_name!r} is of {REFUSED_CLASSES[class_name]}: use diffusers' class.")
    libraries = (diffusers, diffusers.schedulers) if isinstance(class_name, str) else ()
    stock = next((getattr(each, class_name) for each in libraries if hasattr(each, class_name)), None)
    if not inspect.isclass(stock) or not hasattr(stock, "from_config"):
        return {}
    parameters = inspect.signature(stock.__init__).parameters.items()
    return {key: each.default for key, each in parameters if each.default is not inspect.Parameter.empty}


def edm(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """EDMEuler, EDMDPMSolverMultistep, CosineDPMSolverMultistep."""
    if "sigma_schedule" not in config:
        if config.get("sigma_data") is not None and "shift" not in config:
            raise ValueError(f"sigma_data={config['sigma_data']} without sigma_schedule: not a config of EDM.")
        return None
    if (kind := config.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type={kind!r} has no meaning for EDM: choose 'epsilon' or 'v_prediction'.")
    named = {key: config[key] for key in ("sigma_min", "sigma_max", "sigma_data", "rho") if key in config}
    # Of the three only Cosine has an order and no type of algorithm; ours have both, and keep the clock that they had.
    clock = "atan" if "solver_order" in config and "algorithm_type" not in config else "log"
    clock = (config.get("process") or {}).get("clock", clock)
    process = {"kind": "edm", **named, "clock": clock, "grid": config["sigma_schedule"]}
    return {"process": process, "prediction_type": kind}  # Cosine's default is another than ours


def continuous_euler(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """EulerDiscrete as Stable Video Diffusion has it."""
    if config.get("timestep_type", "discrete") == "discrete":
        return None
    if config["timestep_type"] != "continuous" or config.get("prediction_type") != "v_prediction":
        kinds = f"timestep_type={config['timestep_type']!r}, prediction_type={config.get('prediction_type')!r}"
        raise ValueError(f"{kinds} is no known process; 'continuous' needs 'v_prediction'.")
    if not (config.get("sigma_max") and config.get("sigma_min")):
        raise ValueError(
            "timestep_type='continuous' needs sigma_min and sigma_max, as Stable Video Diffusion has them."
        )
    if config.get("use_beta_sigmas"):
        raise ValueError("use_beta_sigmas=True with timestep_type='continuous': give timestep_spacing='beta'.")
    ends = {"sigma_min": config["sigma_min"], "sigma_max": config["sigma_max"]}
    grid = "exponential" if config.get("use_exponential_sigmas") else "karras"
    return {"process": {"kind": "edm", **ends, "sigma_data": 1.0, "clock": "log", "grid": grid}}


def sigmas_of_flow(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """FlowMatchEuler after Cosmos 2 has registered its range of sigma."""
    if "shift" not in config or config.get("sigma_max") is None or config.get("sigma_data") is None:
        return None
    grid = "exponential" if config.get("use_exponential_sigmas") else "karras"
    ends = {"sigma_min": config["sigma_min"], "sigma_max": config["sigma_max"]}
    scale = config.get("num_train_timesteps", 1000)
    process = {"kind": "ve", **ends, "grid": grid, "scale": scale, "own_grid": True}
    return {"process": process, "prediction_type": "epsilon"}


def flow_matching(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """FlowMatchEuler, FlowMatchHeun, LTXEulerAncestralRF, and other solvers with `use_flow_sigmas`."""
    mode = bool(config.get("use_flow_sigmas")) and "FlowMatch" not in str(config.get("_class_name"))
    # A mode that is on is newer than keys of FlowMatchEuler that were kept.
    # LTXEulerAncestralRF has no more than s_noise; EDMScheduler has it beside betas.
    ltx = "s_noise" in config and ("beta_start" not in config or (config.get("process") or {}).get("kind") == "flow")
    own = not mode and ("shift" in config or ltx)
    if not own and not mode:
        return None
    over = [name for flag, name in FLOW_FLAGS.items() if config.get(flag)]
    if len(over) > 1:
        raise ValueError(f"only one of {', '.join(FLOW_FLAGS)} can be True; got {over}.")
    process: dict[str, Any] = {
        "kind": "flow",
        "num_train_timesteps": config.get("num_train_timesteps", 1000),
        "shift": config.get("shift" if own else "flow_shift", 1.0),
        "spacing": "euler" if own else "unipc" if "predict_x0" in config else "dpm",
    }
    if config.get("use_dynamic_shifting"):
        process["dynamic"] = config.get("time_shift_type", "exponential")
    if config.get("shift_terminal"):
        process["terminal"] = config["shift_terminal"]
    if config.get("invert_sigmas"):
        process["inverted"] = True
    if over:
        process["over"] = over[0]
        process |= {key: config[key] for key in ("sigma_min", "sigma_max") if config.get(key) is not None}
    if config.get("stochastic_sampling"):
        process["stochastic"] = True
    return {"process": process, **({"prediction_type": "flow_prediction"} if own else {})}


def cogvideox(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """CogVideoXDDIM, CogVideoXDPM: the betas at another SNR."""
    scale = config.get("snr_shift_scale")
    if scale is None:
        return None
    keys = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    betas = {key: config[key] for key in keys if key in config}  # its defaults are not those of DDPM
    return betas if scale == 1 else {"process": {"kind": "vp", "snr_shift_scale": scale}, **betas}


def wuerstchen(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """DDPMWuerstchen: its continuous cosine at 1,000 timesteps, as its pipelines read it from other schedulers."""
    if "scaler" not in config:
        return None
    process = {"kind": "vp", "scaler": config["scaler"], "offset": config["s"]}
    return {"process": process, "num_train_timesteps": 1000, "clip_sample": False}


def score_sde(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """ScoreSdeVe and ScoreSdeVp, whose samplers are those of `ScoreSDEScheduler`."""
    if "snr" in config and "sampling_eps" in config:
        ends = {"sigma_min": config["sigma_min"], "sigma_max": config["sigma_max"]}
        return {"process": {"kind": "ve", **ends}, "prediction_type": "score", "corrector": "langevin"}
    if "beta_min" not in config:
        return None
    process = {"kind": "vp_linear", **{key: config[key] for key in ("beta_min", "beta_max") if key in config}}
    process["epsilon"] = config.get("sampling_eps", 1e-3)
    return {"process": process, "prediction_type": "epsilon", "predictor": "euler_maruyama"}


RULES = (edm, continuous_euler, sigmas_of_flow, flow_matching, cogvideox, wuerstchen, score_sde)
