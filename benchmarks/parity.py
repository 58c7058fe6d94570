"""How far are full loops of our schedulers from those of diffusers' classes of the same name?

    python -m benchmarks.parity        # from the root of the repository; writes results/parity.{json,md}

The figures are the largest differences of any value.
Both sides get the same start, generator and network (exact for a Gaussian mixture). They run at float32, as users run
them, and at float64 with exact tables given to diffusers: what remains there is the order of additions, so what is
more at float32 is rounding, mostly of diffusers' float32 tables. The configs avoid the deliberate differences (README,
"where we differ"), each of which has a test in tests/schedulers/test_parity.py.
"""

from itertools import product

import diffusers
import torch
from tqdm.auto import tqdm

from benchmarks.common import make_parser, parse, save, show, table, versions
from diffusers_dpm.schedulers import DDIMScheduler, DDPMScheduler
from tests.schedulers.helpers import with_exact_tables


PAIRS = {"DDPM": (DDPMScheduler, diffusers.DDPMScheduler), "DDIM": (DDIMScheduler, diffusers.DDIMScheduler)}
V_PREDICTION = {"prediction_type": "v_prediction"}
DYNAMIC = {"thresholding": True, "sample_max_value": 100.0, "dynamic_thresholding_ratio": 0.9}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False, **V_PREDICTION}
# name -> (class, config, keywords of step)
CONFIGS = {
    "DDPM fixed_small": ("DDPM", {}, {}),
    "DDPM fixed_large": ("DDPM", {"variance_type": "fixed_large"}, {}),
    "DDPM fixed_small, linspace": ("DDPM", {"timestep_spacing": "linspace"}, {}),
    "DDPM fixed_small, trailing": ("DDPM", {"timestep_spacing": "trailing"}, {}),
    "DDPM learned_range": ("DDPM", {"variance_type": "learned_range"}, {}),
    "DDPM v_prediction, cosine": ("DDPM", {"beta_schedule": "squaredcos_cap_v2", **V_PREDICTION}, {}),
    "DDPM sample, sigmoid": ("DDPM", {"prediction_type": "sample", "beta_schedule": "sigmoid"}, {}),
    "DDPM dynamic thresholding": ("DDPM", DYNAMIC, {}),
    "DDPM not clipped, v_prediction": ("DDPM", {"clip_sample": False, **V_PREDICTION}, {}),
    "DDIM eta 0": ("DDIM", {}, {}),
    "DDIM eta 0, epsilon re-derived": ("DDIM", {}, {"use_clipped_model_output": True}),
    "DDIM eta 0.5": ("DDIM", {}, {"eta": 0.5}),
    "DDIM eta 1": ("DDIM", {}, {"eta": 1.0}),
    "DDIM trailing": ("DDIM", {"timestep_spacing": "trailing"}, {}),
    "DDIM Stable Diffusion's config": ("DDIM", {**STABLE_DIFFUSION, "set_alpha_to_one": False, "steps_offset": 1}, {}),
    "DDIM zero terminal SNR": ("DDIM", ZERO_SNR, {}),
}


def network(schedule, prediction_type, variance_channels):
    """The best network for pixels distributed as 0.5 N(-0.6, 0.25^2) + 0.5 N(0.6, 0.25^2), in closed form."""

    def predict(x, t):
        alpha, sigma, _ = schedule[int(t)]
        total = (alpha * 0.25) ** 2 + sigma**2
        x0 = (alpha * 0.25**2 * x + sigma**2 * 0.6 * torch.tanh(alpha * 0.6 * x / total)) / total
        epsilon = (x - alpha * x0) / sigma
        mean = {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}[prediction_type]
        return torch.cat([mean, torch.cos(x)], dim=1) if variance_channels else mean

    return predict


def loop(scheduler, predict, steps, shape, dtype, keywords):
    """x after every step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    scheduler.set_timesteps(steps)
    path = []
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x, generator=generator, **keywords).prev_sample
        path.append(x)
    return torch.stack(path)


def measure(name, steps, shape):
    kind, config, keywords = CONFIGS[name]
    row = {"config": name, "steps": steps}
    for dtype in (torch.float32, torch.float64):
        ours, stock = (scheduler_class(**config) for scheduler_class in PAIRS[kind])
        if dtype == torch.float64:
            with_exact_tables(stock, ours.schedule)
        predict = network(ours.schedule, ours.config.prediction_type, "learned" in config.get("variance_type", ""))
        path, stock_path = (loop(s, predict, steps, shape, dtype, keywords) for s in (ours, stock))
        row[str(dtype).removeprefix("torch.")] = (path - stock_path).abs().max().item()
        row["largest_value"] = stock_path.abs().max().item()
    return row


def markdown(rows, steps):
    lines = []
    for name in CONFIGS:
        mine = [row for row in rows if row["config"] == name]
        numbers = [*(row["float32"] for row in mine), max(row["float64"] for row in mine)]
        lines.append([name, *(f"{number:.1e}" for number in numbers)])
    return table(["config", *(f"n = {n}" for n in steps), "float64"], lines) + "\n"


def main():
    parser = make_parser(__doc__, "parity.json")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 10, 50, 250], help="numbers of steps")
    parser.add_argument("--shape", type=int, nargs=4, default=[4, 3, 16, 16], help="batch, channels, height, width")
    arguments = parse(parser)
    steps, shape = ([2], [1, 1, 2, 2]) if arguments.smallest else (arguments.steps, arguments.shape)
    rows = [measure(name, n, shape) for name, n in tqdm([*product(CONFIGS, steps)], unit="loop")]
    save(arguments.output, {"versions": versions(), "shape": shape, "rows": rows})
    show(arguments, markdown(rows, steps))


if __name__ == "__main__":
    main()
