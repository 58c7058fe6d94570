"""Which sampler of score-based models is how good at equal calls, on DDPM's process, VE, flow matching and EDM?

    for process in vp ve flow edm; do
        diffusers-dpm train --data digits --process $process --output-dir runs/$process
    done
    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    python benchmarks/score_samplers.py runs/vp runs/ve runs/flow runs/edm --exact vp ve flow edm

writes results/score_samplers.{json,md}. Fréchet distance of samples from the training digits, and for ODEs the RMS
distance from the solution for the same noise (200 steps of DPM-Solver++(2M), even in log(alpha / sigma), as are the
grids of ours, but for Heun's, which are the usual ones of the process). "exact" is the network that makes no error,
in closed form, for data that are the training digits, each blurred by 0.05: what is wrong there is the sampler's
doing. Nothing is clipped on the way. Every sampler begins with the same noise; the noise on the way is seeded alike.
Heun takes as many steps as n calls allow. "k:" are the rules of k-diffusion on the grid of Karras et al. 2022. Each
measurement is kept: an interrupted call continues where it stopped.
"""

import math
from collections.abc import Callable
from functools import cache, cached_property, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import diffusers
import torch
from calibrated import Model
from common import Judge, Results, add_features, digits, make_parser, parse, rms, show, table
from ode_error import sample
from tqdm.auto import tqdm

from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler, EDMScheduler, ScoreSDEScheduler


COUNTS = (10, 20, 50)
MANY = (100, 200)  # calls of the samplers that the papers give thousands, on VE
EVEN = {"timestep_spacing": "logsnr"}
CHURN = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}  # EDM's settings for ImageNet
OURS: dict[str, tuple[type, dict[str, Any]]] = {
    "DPM-Solver++ 2M bh2": (DPMSolverScheduler, {"unic": "bh2", **EVEN}),
    "Heun": (EDMScheduler, {}),
    "Heun, churn": (EDMScheduler, CHURN),
    "Heun, churn at little noise": (EDMScheduler, {**CHURN, "s_tmax": 1.0}),
    "SDE-DPM-Solver++ 2M": (DPMSolverScheduler, {"algorithm_type": "sde-dpmsolver++", **EVEN}),
    "ancestral": (ScoreSDEScheduler, {"predictor": "ancestral", **EVEN}),
    "Euler-Maruyama": (ScoreSDEScheduler, {"predictor": "euler_maruyama", **EVEN}),
    "reverse diffusion": (ScoreSDEScheduler, EVEN),
    "reverse diffusion, Langevin": (ScoreSDEScheduler, {"corrector": "langevin", "snr": 0.16, **EVEN}),
}
ODES = ("DPM-Solver++ 2M bh2", "Heun")
PC = "diffusers ScoreSdeVe"
SLOW = ("Euler-Maruyama", "reverse diffusion", "reverse diffusion, Langevin", PC)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
STOCK: dict[str, dict[str, tuple[type, dict[str, Any]]]] = {
    "vp": {
        "diffusers UniPC": (diffusers.UniPCMultistepScheduler, {}),
        "diffusers Heun": (diffusers.HeunDiscreteScheduler, {}),
        "diffusers SDE-DPM-Solver++ 2M": (
            diffusers.DPMSolverMultistepScheduler,
            {"algorithm_type": "sde-dpmsolver++", "use_lu_lambdas": True},
        ),
        "diffusers DDPM": (diffusers.DDPMScheduler, {"timestep_spacing": "trailing"}),
    },
    "ve": {},
    "flow": {
        "diffusers UniPC": (diffusers.UniPCMultistepScheduler, FLOW),
        "diffusers FlowMatchEuler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
        "diffusers FlowMatchHeun": (diffusers.FlowMatchHeunDiscreteScheduler, {}),
    },
    "edm": {
        "diffusers EDMEuler": (diffusers.EDMEulerScheduler, {}),
        "diffusers EDM DPM++ 2M": (diffusers.EDMDPMSolverMultistepScheduler, {}),
    },
}
RANDOM = {*OURS, "diffusers DDPM", "diffusers SDE-DPM-Solver++ 2M", "k: Euler ancestral", PC} - {*ODES}
MOST_NOISE = 80.0  # of k-diffusion's grid, in sigma / alpha, where a process begins at pure noise
BLUR = 0.05  # of the exact model's data
EXACT = {
    "vp": {},
    "ve": {"process": {"kind": "ve", "sigma_min": 0.01, "sigma_max": 50.0}, "prediction_type": "score"},
    "flow": {"process": {"kind": "flow"}, "prediction_type": "flow_prediction"},
    "edm": {"process": {"kind": "edm", "sigma_data": 0.85}},
}
Denoiser = Callable[[torch.Tensor, float], torch.Tensor]  # x_0 of x = x_0 + sigma epsilon


# k-diffusion's rules: the steps through `sigmas`, of which the last is 0 --------------------------------------------


def euler_ancestral(denoise: Denoiser, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    for s, t in pairwise(sigmas):
        up = math.sqrt(t**2 * (s**2 - t**2) / s**2)
        x = x + (x - denoise(x, s)) / s * (math.sqrt(t**2 - up**2) - s) + up * torch.randn_like(x)
    return x


def dpm_plus_plus_2m(denoise: Denoiser, x: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    before, width = None, 0.0
    for s, t in pairwise(sigmas):
        x0, h = denoise(x, s), math.log(s / t) if t else math.inf
        weight = h / (2 * width) if before is not None and t else 0.0
        target = x0 if before is None else (1 + weight) * x0 - weight * before
        x, before, width = t / s * x - math.expm1(-h) * target, x0, h
    return x


def two_calls(denoise: Denoiser, x: torch.Tensor, sigmas: list[float], midpoint: bool = False) -> torch.Tensor:
    """Heun's rule, or DPM-2's, whose second call is half-way in log(sigma); the last step is Euler's."""
    for s, t in pairwise(sigmas):
        slope = (x - denoise(x, s)) / s
        if t:
            m = math.sqrt(s * t) if midpoint else t
            y = x + (m - s) * slope
            second = (y - denoise(y, m)) / m
            slope = second if midpoint else (slope + second) / 2
        x = x + (t - s) * slope
    return x


K_RULES: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {  # (rule, whether a step takes two calls)
    "k: Euler ancestral": (euler_ancestral, False),
    "k: DPM++ 2M": (dpm_plus_plus_2m, False),
    "k: Heun": (two_calls, True),
    "k: DPM-2": (partial(two_calls, midpoint=True), True),
}


def karras(low: float, high: float, n: int) -> list[float]:
    ramp = torch.linspace(high ** (1 / 7), low ** (1 / 7), n, dtype=torch.float64)
    return [*(ramp**7).tolist(), 0.0]


def score_sde_ve(config: Any, network: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    """The loop of ScoreSdeVePipeline: a corrector's and a predictor's call at each of n / 2 levels."""
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=config["sigma_min"], sigma_max=config["sigma_max"], snr=0.16)
    scheduler.set_timesteps(n // 2)
    scheduler.set_sigmas(n // 2)
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].expand(len(x))
        x = scheduler.step_correct(network(x, sigma), x).prev_sample
        output = scheduler.step_pred(network(x, sigma), t, x)
        x = output.prev_sample
    return output.prev_sample_mean


class ExactModel:
    """The posterior mean for the training digits, each blurred by `BLUR`, as the network of a process."""

    def __init__(self, kind: str):
        self.scheduler, self.facts = DDIMScheduler(**EXACT[kind]), {"run": f"exact {kind}"}
        self.data = digits("train")[0].flatten(1).double()

    def noise(self, num_images: int) -> torch.Tensor:
        return torch.randn(num_images, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def network(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        schedule, flat = self.scheduler.schedule, x.double().flatten(1)
        t = t.expand(len(x))
        flat = flat / schedule.scale_input(torch.ones_like(flat), t)
        alpha, sigma = schedule.at(t, flat)
        variance = (alpha * BLUR) ** 2 + sigma**2
        scores = (alpha * flat @ self.data.T - alpha**2 * self.data.square().sum(1) / 2) / variance
        nearest = scores.softmax(dim=1) @ self.data
        x0 = nearest + alpha * BLUR**2 / variance * (flat - alpha * nearest)
        p, q = schedule.predictions[self.scheduler.config.prediction_type](alpha, sigma)
        return (p * x0 + q * (flat - alpha * x0) / sigma).view_as(x).to(x.dtype)


class Samplers:
    """What samplers make of a model and the same noise."""

    def __init__(self, model: Any, images: int):
        self.model = model
        self.config = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False).config
        self.process = dict(self.config.process or {"kind": "vp"})
        self.x = model.noise(images).double()
        self.solution = cache(lambda: self.draw("DPM-Solver++ 2M", 200))

    def cells(self, counts: tuple[int, ...], many: tuple[int, ...]) -> list[tuple[str, int]]:
        """(sampler, calls), all that are measured."""
        names = [*OURS, *K_RULES, *STOCK[self.process["kind"]]]
        if self.process["kind"] != "ve":
            return [*product(names, counts)]
        return [*product([*names, PC], counts), *product(SLOW, many)]

    @cached_property
    def schedulers(self) -> dict[str, Any]:
        """Name -> scheduler, of ours and of diffusers'."""
        kind = self.process["kind"]
        ends = {key: self.process[key] for key in ("sigma_min", "sigma_max", "sigma_data") if key in self.process}
        unclipped = {"clip_sample": False}
        built = {name: c.from_config(self.config, **unclipped, **keys) for name, (c, keys) in OURS.items()}
        built["DPM-Solver++ 2M"] = DPMSolverScheduler.from_config(self.config, **unclipped, **EVEN)
        if kind == "vp":
            return built | {n: c.from_config(self.config, **unclipped, **keys) for n, (c, keys) in STOCK[kind].items()}
        return built | {name: c(**ends, **keys) for name, (c, keys) in STOCK[kind].items()}

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """x_0 of x_0 + sigma epsilon."""
        scheduler = self.schedulers["Heun"]
        schedule = scheduler.schedule
        t = schedule.timestep_of(torch.tensor(-math.log(sigma), dtype=torch.float64))
        level = schedule.level(t.item())
        x = level.alpha * x
        return scheduler.predict_x0(self.model.network(x * schedule.input_scale(level), t.float()), x, level)

    @torch.no_grad()
    def draw(self, name: str, n: int) -> torch.Tensor:
        torch.manual_seed(0)
        if name == PC:
            return score_sde_ve(self.process, self.model.network, self.x.float(), n).double()
        if name not in K_RULES:
            return sample(self.schedulers[name], self.model.network, self.x, n)[0]
        rule, twice = K_RULES[name]
        schedule = self.schedulers["Heun"].schedule
        low, high = (math.exp(-schedule.level(t).lambda_) for t in (schedule.cleanest, schedule.noisiest))
        sigmas = karras(low, min(high, MOST_NOISE), (n + 1) // 2 if twice else n)
        return rule(self.denoise, self.x * sigmas[0], sigmas)

    def measure(self, judge: Judge, name: str, n: int) -> dict[str, Any]:
        drawn = self.draw(name, n)
        row = judge.distance(drawn.clamp(-1, 1).float())
        return row | ({} if name in RANDOM else {"rms": rms(drawn - self.solution())})


def markdown(rows: list[dict[str, Any]]) -> str:
    parts = []
    for run in dict.fromkeys(row["run"] for row in rows):
        lines: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            if row["run"] == run:
                lines.setdefault(row["sampler"], {})[row["n"]] = row
        counts = sorted({n for line in lines.values() for n in line})
        measured = [n for n in counts if any("rms" in line.get(n, {}) for line in lines.values())]
        cells = [
            [
                name,
                *(f"{line[n]['frechet']:.2f} ± {line[n]['frechet_error']:.2f}" if n in line else "" for n in counts),
                *(f"{line[n]['rms']:.4f}" if "rms" in line.get(n, {}) else "" for n in measured),
            ]
            for name, line in lines.items()
        ]
        head = ["sampler", *(f"Fréchet, {n} calls" for n in counts), *(f"RMS, {n} calls" for n in measured)]
        parts += [f"{run}:", table(head, cells)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    numbers = {"images": (500, "of each sampler"), "batch_size": (250, "images in a network call")}
    parser = make_parser(__doc__, "score_samplers.json", **numbers)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="models of the digits")
    parser.add_argument("--exact", nargs="+", choices=EXACT, default=[], help="processes, with the exact network")
    add_features(parser)
    arguments = parse(parser)
    counts, many = COUNTS, MANY
    if arguments.smallest:
        arguments.images, counts, many = 20, (4,), ()
    judge = Judge(arguments.features)
    results = Results(arguments.output, {"images": arguments.images, "judge": judge.facts})
    models = [partial(Model, run, arguments.batch_size, any_process=True) for run in arguments.runs]
    for build in [*models, *(partial(ExactModel, kind) for kind in arguments.exact)]:
        samplers = Samplers(build(), arguments.images)
        for name, n in tqdm(samplers.cells(counts, many), unit="loop", desc=samplers.model.facts["run"]):
            key = {**samplers.model.facts, "kind": samplers.process["kind"], "sampler": name, "n": n}
            results.row("rows", key, partial(samplers.measure, judge, name, n))
    show(arguments, markdown(results.values["rows"]))


if __name__ == "__main__":
    main()
