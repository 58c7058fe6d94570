"""Which sampler of score-based models is how good at equal calls, on DDPM's process, VE, flow matching and EDM?

    for process in vp ve flow edm; do
        diffusers-dpm train --data digits --process $process --output-dir runs/$process
    done
    diffusers-dpm train-features --data digits --eval-split test --output-dir runs/digits-features
    python benchmarks/score_samplers.py runs/vp runs/ve runs/flow runs/edm  # writes results/score_samplers.{json,md}

Fréchet distance of samples from the training digits, and for ODEs the RMS distance from the solution for the same
noise (200 steps of DPM-Solver++(2M), even in log(alpha / sigma), as are the grids of ours, but for Heun's, which are
the usual ones of the process). Nothing is clipped on the way. Every sampler begins with the same noise; the noise on
the way is seeded alike. Heun takes as many steps as n calls allow. Each measurement is kept: an interrupted call
continues where it stopped.
"""

from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import Judge, Results, add_features, make_parser, parse, show, table
from ode_error import rms, sample
from tqdm.auto import tqdm

from diffusers_dpm.networks import load_pipeline
from diffusers_dpm.schedulers import DDIMScheduler, DPMSolverScheduler, EDMScheduler, ScoreSDEScheduler


COUNTS = (10, 20, 50)
EVEN = {"timestep_spacing": "logsnr"}
CHURN = {"s_churn": 20.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}  # of EDM's settings for ImageNet, half
OURS: dict[str, tuple[type, dict[str, Any]]] = {
    "DPM-Solver++ 2M bh2": (DPMSolverScheduler, {"unic": "bh2", **EVEN}),
    "Heun": (EDMScheduler, {}),
    "Heun, churn": (EDMScheduler, CHURN),
    "Heun, churn at little noise": (EDMScheduler, {**CHURN, "s_tmax": 1.0}),
    "SDE-DPM-Solver++ 2M": (DPMSolverScheduler, {"algorithm_type": "sde-dpmsolver++", **EVEN}),
    "Euler-Maruyama": (ScoreSDEScheduler, {"predictor": "euler_maruyama", **EVEN}),
    "reverse diffusion": (ScoreSDEScheduler, EVEN),
    "reverse diffusion, Langevin": (ScoreSDEScheduler, {"corrector": "langevin", "snr": 0.16, **EVEN}),
}
ODES = ("DPM-Solver++ 2M bh2", "Heun")
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
PC = "diffusers ScoreSdeVe"
RANDOM = ("diffusers DDPM", "diffusers SDE-DPM-Solver++ 2M", PC)


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


class Run:
    """A trained model, and what samplers make of the same noise."""

    def __init__(self, folder: Path, images: int, batch_size: int):
        pipeline = load_pipeline(str(folder), any_process=True)
        self.name, self.unet, self.batch_size = folder.name, pipeline.unet, batch_size
        self.config = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False).config
        self.process = dict(self.config.process or {"kind": "vp"})
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        draws = torch.Generator().manual_seed(0)
        self.x = torch.randn(images, channels, size, size, generator=draws, dtype=torch.float64)
        self.solution = cache(lambda: self.draw("DPM-Solver++ 2M", 200))

    def network(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        whole = t if t.ndim else t.expand(len(x))
        pairs = zip(x.split(self.batch_size), whole.split(self.batch_size), strict=True)
        return torch.cat([self.unet(part.float(), times).sample for part, times in pairs]).to(x.dtype)

    def samplers(self) -> dict[str, Any]:
        """Name -> scheduler."""
        kind = self.process["kind"]
        ends = {key: self.process[key] for key in ("sigma_min", "sigma_max", "sigma_data") if key in self.process}
        unclipped = {"clip_sample": False}
        built = {name: c.from_config(self.config, **unclipped, **keys) for name, (c, keys) in OURS.items()}
        built["DPM-Solver++ 2M"] = DPMSolverScheduler.from_config(self.config, **unclipped, **EVEN)
        if kind == "vp":
            return built | {n: c.from_config(self.config, **unclipped, **keys) for n, (c, keys) in STOCK[kind].items()}
        return built | {name: c(**ends, **keys) for name, (c, keys) in STOCK[kind].items()}

    @torch.no_grad()
    def draw(self, name: str, n: int) -> torch.Tensor:
        torch.manual_seed(0)
        if name == PC:
            return score_sde_ve(self.process, self.network, self.x.float(), n).double()
        return sample(self.samplers()[name], self.network, self.x, n)[0]

    def measure(self, judge: Judge, name: str, n: int) -> dict[str, Any]:
        drawn = self.draw(name, n)
        row = judge.distance(drawn.clamp(-1, 1).float())
        deterministic = name in ODES or (name.startswith("diffusers") and name not in RANDOM)
        return row | ({"rms": rms(drawn - self.solution())} if deterministic else {})


def markdown(rows: list[dict[str, Any]], counts: tuple[int, ...]) -> str:
    parts = []
    for run in dict.fromkeys(row["run"] for row in rows):
        lines: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            if row["run"] == run and row["n"] in counts:
                lines.setdefault(row["sampler"], {})[row["n"]] = row
        cells = [
            [
                name,
                *(f"{cell['frechet']:.2f} ± {cell['frechet_error']:.2f}" for cell in line.values()),
                *(f"{cell['rms']:.4f}" if "rms" in cell else "" for cell in line.values()),
            ]
            for name, line in lines.items()
        ]
        head = ["sampler", *(f"Fréchet, {n} calls" for n in counts), *(f"RMS, {n} calls" for n in counts)]
        parts += [f"{run}:", table(head, cells)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    numbers = {"images": (500, "of each sampler"), "batch_size": (250, "images in a network call")}
    parser = make_parser(__doc__, "score_samplers.json", **numbers)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="models of the digits")
    add_features(parser)
    arguments = parse(parser)
    counts = COUNTS
    if arguments.smallest:
        arguments.images, counts = 20, (4,)
    judge = Judge(arguments.features)
    results = Results(arguments.output, {"images": arguments.images})
    for folder in arguments.runs:
        run = Run(folder, arguments.images, arguments.batch_size)
        kind = run.process["kind"]
        names = [*OURS, *STOCK[kind], *([PC] if kind == "ve" else [])]
        for name, n in tqdm([*product(names, counts)], unit="loop", desc=run.name):
            key = {"run": run.name, "kind": kind, "sampler": name, "n": n}
            results.row("rows", key, partial(run.measure, judge, name, n))
    show(arguments.output, markdown(results.values["rows"], counts))


if __name__ == "__main__":
    main()
