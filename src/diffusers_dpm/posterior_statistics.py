"""The mean posterior variance of x_0 at each noise level: the statistics that Analytic-DPM samples with.

    statistics = estimate_statistics(pipe.unet, pipe.scheduler, images)    # once for a checkpoint
    statistics.save("statistics.json")
    pipe.scheduler = statistics.scheduler(pipe.scheduler)                  # an AnalyticDPMScheduler

The statistic of each training timestep is the mean posterior variance C_t = E tr Cov[x_0 | x_t] / d, of d = C H W
dimensions. With k_t = sigma_t^2 / alpha_t^2, one pass of the network gives two estimates of it:

- residual: E|x_0 - x_0_hat|^2 / d = k_t E|epsilon - epsilon_hat|^2 / d, the training loss. It is the best variance for
  the mean that the network has, exact or not, and its Monte-Carlo error is small everywhere.
- analytic: k_t (1 - E|epsilon_hat|^2 / d) (Bao et al. 2022, https://arxiv.org/abs/2201.06503, eq. 8 and 10), as
  published. It takes the network for exact. At high noise it is the difference of two numbers near 1 times a large
  k_t: there it is mostly noise, and what one samples with is the range that it is clipped to.

On a process in continuous time, such as flow matching, the "timesteps" 0 .. T-1 of this file are places of
`NoiseSchedule.trained_lambdas`, cleanest first.

Both are kept as C_t and not as E|epsilon_hat|^2, which float32 or a process that ends in pure noise would spoil.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.numpy import load_file

from diffusers_dpm.errors import DiffusersDPMError, check_at_least
from diffusers_dpm.image_batches import choose_images
from diffusers_dpm.networks import (
    NoProgress,
    Progress,
    checked_labels,
    network_output,
    noise_schedule_of,
    prediction_type_of,
    whole_config,
)
from diffusers_dpm.pipelines.networks import evaluation_mode
from diffusers_dpm.plots import plot_file
from diffusers_dpm.processes import Processes
from diffusers_dpm.random_streams import Stream, normal
from diffusers_dpm.records import Record, ResultStore, fingerprint, provenance, weights_hash
from diffusers_dpm.schedulers.noise_schedule import NoiseSchedule, VPNoiseSchedule, affine
from diffusers_dpm.schedulers.scheduling_analytic_dpm import AnalyticDPMScheduler


Pair = tuple[int, int]  # (place of an image among the chosen ones, place of a timestep among the computed ones)


@dataclass(frozen=True)
class PosteriorStatistics(Record):
    """C_t of a checkpoint for t = 0 .. T-1, unclipped, with the standard errors of the estimates.

    Attributes:
        residual, analytic: the two estimates, T floats each; None where there is no such estimate.
        residual_error, analytic_error: their standard errors over the images; None where they are unknown.
        timesteps: those that were computed, ascending; the others are interpolated, see `interpolate`.
        schedule_hash: of the noise schedule.
        prediction_type: of the network.
        num_images: how many images were averaged over; None if unknown.
        weights: SHA-256 of the network's weights; None if unknown.
        provenance: of the statistics; for people, nothing depends on it.
        ends: in continuous time, the cleanest and the noisiest timestep; else None.

    Raises:
        ValueError: no estimate at all, or lists of different lengths.
    """

    title: ClassVar[str] = "statistics"

    residual: list[float] | None
    analytic: list[float] | None
    residual_error: list[float] | None
    analytic_error: list[float] | None
    timesteps: list[int]
    schedule_hash: str
    prediction_type: str
    num_images: int | None = None
    weights: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    ends: list[float] | None = None

    def __post_init__(self) -> None:
        lists = (self.residual, self.analytic, self.residual_error, self.analytic_error)
        lengths = {len(values) for values in lists if values is not None}
        if self.residual is None and self.analytic is None:
            raise DiffusersDPMError("residual=None and analytic=None: statistics need at least one of them.")
        if len(lengths) > 1:
            raise DiffusersDPMError(f"the lists of the statistics have different lengths: {sorted(lengths)}.")

    def ms_eps(self, schedule: NoiseSchedule) -> list[float]:
        """E|epsilon_hat|^2 / d for t = 0 .. T-1, from `analytic`: what Bao et al. store, with their index t + 1.

        Raises:
            ValueError: there is no analytic estimate, or it is of another schedule.
        """
        if self.analytic is None:
            raise DiffusersDPMError("ms_eps is a form of the analytic estimate, but here analytic=None.")
        if (own := self.schedule_hash) != schedule.hash:
            raise DiffusersDPMError(f"statistics of schedule_hash={own[:12]}, not of {schedule.hash[:12]}.")
        ratios = torch.exp(2 * schedule.trained_lambdas())
        return (1 - torch.tensor(self.analytic, dtype=torch.float64) * ratios).tolist()

    def scheduler(self, scheduler: Any, **options: Any) -> AnalyticDPMScheduler:
        """An `AnalyticDPMScheduler` with the config of `scheduler`, these statistics, and `options` of its own.

        Raises:
            ValueError: the statistics are of another noise schedule; options that do not exist.
        """
        if self.residual is None:
            options = {"reverse_variance": "analytic", **options}
        analytic = AnalyticDPMScheduler.from_config(whole_config(scheduler), **options)
        analytic.set_statistics(self)
        return analytic

    def plot(self, path: str | Path) -> None:
        """The estimates over the timesteps that were computed, with their standard errors, as a picture."""
        with plot_file(Path(path), (7, 4)) as (_, ((panel,),)):
            for name in ("residual", "analytic"):
                values, errors = getattr(self, name), getattr(self, f"{name}_error")
                if values is not None:
                    bars = None if errors is None else [errors[t] for t in self.timesteps]
                    panel.errorbar(
                        self.timesteps, [values[t] for t in self.timesteps], bars, label=name, elinewidth=0.5
                    )
            panel.set(xlabel="timestep", ylabel="mean posterior variance", yscale="log")
            panel.legend()


def interpolate(schedule: NoiseSchedule, timesteps: Sequence[int], values: Sequence[float]) -> list[float]:
    """`values` at all of 0 .. T-1, linear in log sigma_t: in log C between two positive values, else in C itself.

    On any path sigma_t is that of the variance-preserving x_t of the same SNR.
    Towards t = 0, C_t becomes proportional to sigma_t^2 and falls by orders of magnitude between neighbours of a
    coarse grid. From 50 even timesteps of 1000 this form is right to 7 %, and above t = 50 to 0.2 %, where one linear
    in t would be off by 68 % and 3 % (data of four variances, 1 to 0.001). The analytic estimate may be zero or
    negative where it is mostly noise. Computed values stay as they are, bit for bit.
    """
    if isinstance(schedule, VPNoiseSchedule):
        everywhere = schedule.sigma.log().numpy()
    else:
        everywhere = torch.nn.functional.logsigmoid(-2 * schedule.trained_lambdas()).numpy() / 2
    places, points = everywhere[list(timesteps)], np.array(values, dtype=np.float64)
    logarithms = np.log(points, out=np.full_like(points, np.nan), where=points > 0)
    curve = np.exp(np.interp(everywhere, places, logarithms))
    curve = np.where(np.isnan(curve), np.interp(everywhere, places, points), curve)
    curve[list(timesteps)] = points
    return curve.tolist()


@torch.no_grad()
def estimate_statistics(
    unet: Any,
    scheduler: Any,
    images: Any,
    num_samples: int = 256,
    *,
    timesteps: Iterable[int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    class_labels: Sequence[int] | torch.Tensor | None = None,
    accelerator: Any = None,
    folder: str | Path | None = None,
    save_every: float = 60.0,
    keep: bool = False,
    progress: Progress | None = None,
) -> PosteriorStatistics:
    """Both estimates of C_t from one network call for each of `num_samples` images and each timestep.

    The images are drawn by the seed, and the noise of an image at a timestep is a function of (seed, index of the
    image in the data, timestep) alone. So neither batch size, number of processes, choice of timesteps nor an
    interruption changes the result, beyond the rounding of the network in other batches; more samples include fewer.
    With `accelerator` every process must make the call, and gets the result.

    A class-conditional network gets the true labels. Guidance is no part of the statistics: it moves the mean only.

    Args:
        unet: a `UNet2DModel` with C or 2C output channels, on its device.
        scheduler: any diffusers scheduler of a known process: the noise schedule and prediction_type.
        images: training images as the network knows them, or latents: a tensor (N, C, H, W), a map-style data set, or
            an iterable of batches, which is read whole. An item or batch is the images, (images, labels), or a dict of
            "images" and "labels".
        num_samples: number of images to average over, at least 2; all, if the data has fewer.
        timesteps: where to compute; 0 and T-1 are added, and the others interpolated. Default: everywhere.
        batch_size: (image, timestep) pairs in a network call.
        seed: of the choice of images and of the noise, at least 0.
        class_labels: (N,), for a class-conditional network, if `images` does not hold them.
        accelerator: an `accelerate.Accelerator` whose processes share the work, with the network on its device.
        folder: keeps partial results, from which the same call goes on after an interruption. Deleted when done.
        save_every: seconds between saves; an exception, KeyboardInterrupt included, also saves.
        keep: leave `folder` to the caller, who deletes it when the statistics are written.
        progress: gets `update(n)` for n (image, timestep) pairs, those of other processes and of `folder` included.

    Raises:
        ValueError: images or labels that do not fit the network, arguments out of range, an unknown noise schedule, a
            network output that is not finite, or a folder with partial results of other settings.
    """
    schedule = noise_schedule_of(scheduler)
    grid = computed_timesteps(timesteps, len(schedule.trained_lambdas()))
    check_at_least(2, num_samples=num_samples)
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, seed=seed)
    (x0, labels), indices, num_available = choose_images(images, class_labels, num_samples, seed)
    labels = checked_labels(unet, x0, labels)
    problem = Problem(unet, schedule, prediction_type_of(scheduler), grid, x0, labels, indices, seed)
    processes = Processes(accelerator)
    settings = {} if folder is None else problem.settings()
    store = ResultStore(folder, settings, process=processes.rank, save_every=save_every)
    with evaluation_mode(unet):
        values = measure(problem, batch_size, processes, store, NoProgress() if progress is None else progress)
    if processes.is_main:
        store.save_values(values) if keep else store.delete()
    processes.wait()
    estimates = values.unbind(-1)
    means = (estimate.mean(dim=0).tolist() for estimate in estimates)
    lines = (*means, *map(standard_errors, estimates))
    residual, analytic, residual_error, analytic_error = (interpolate(schedule, grid, line) for line in lines)
    facts = provenance(seed=seed, dtype=str(unet.dtype).removeprefix("torch."), images_available=num_available)
    weights = weights_hash(unet) if isinstance(unet, torch.nn.Module) else None
    origin = (grid, schedule.hash, problem.prediction_type, len(x0), weights)
    ends = None if schedule.is_discrete else [schedule.cleanest, schedule.noisiest]
    return PosteriorStatistics(residual, analytic, residual_error, analytic_error, *origin, facts, ends)


@dataclass(frozen=True)
class Problem:
    """What to measure: N images at n timesteps.

    Attributes:
        unet, schedule, prediction_type: the network and its process.
        timesteps: n, ascending.
        images, labels: (N, C, H, W), and (N,) or None.
        indices: of the images in their data set.
        seed: of the noise.
    """

    unet: Any
    schedule: NoiseSchedule
    prediction_type: str
    timesteps: list[int]
    images: torch.Tensor
    labels: torch.Tensor | None
    indices: list[int]
    seed: int

    @cached_property
    def told(self) -> torch.Tensor:
        """What the network is told at each place: real-valued in continuous time."""
        schedule, places = self.schedule, torch.arange(len(self.schedule.trained_lambdas()))
        return places if schedule.is_discrete else schedule.timestep_of(schedule.trained_lambdas())

    def evaluate(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """The contribution of each pair to (residual, analytic): float64 (len(pairs), 2), on the network's device.

        Where alpha is 0, k_t is infinite and epsilon_hat says nothing. There the analytic value is the difference of
        the second moments, |x_0|^2 - |x_0_hat|^2, whose mean is C_t for an exact network at any noise level.
        """

        def mean_square(x: torch.Tensor) -> torch.Tensor:
            return x.square().flatten(1).mean(dim=1)

        places = [(row, self.timesteps[place]) for row, place in pairs]
        keys = [(self.seed, Stream.STATISTICS, self.indices[row], t) for row, t in places]
        noise = torch.stack([normal(self.images.shape[1:], *key) for key in keys])
        rows, device = [row for row, _ in places], self.unet.device
        x0, t = self.images[rows].to(device, torch.float64), self.told[[t for _, t in places]].to(device)
        alpha, sigma = self.schedule.at(t, x0)
        x_t = alpha * x0 + sigma * noise.to(device, torch.float64)
        labels = None if self.labels is None else self.labels[rows].to(device)
        output = network_output(self.unet, self.schedule.scale_input(x_t, t), t, labels)
        conversion = self.schedule.conversion(self.prediction_type, alpha, sigma)
        x0_hat, epsilon_hat = (affine(factors, x_t, output) for factors in conversion)
        alpha, sigma = alpha.flatten(), sigma.flatten()
        published = (sigma / alpha) ** 2 * (1 - mean_square(epsilon_hat))
        analytic = torch.where(alpha > 0, published, mean_square(x0) - mean_square(x0_hat))
        return torch.stack([mean_square(x0 - x0_hat), analytic], dim=1)

    def settings(self) -> dict[str, Any]:
        """All that the values depend on, as JSON."""
        return {
            "schedule_hash": self.schedule.hash,
            "prediction_type": self.prediction_type,
            "seed": self.seed,
            "timesteps": self.timesteps,
            "dtype": str(self.unet.dtype),
            "images": fingerprint([self.images] if self.labels is None else [self.images, self.labels]),
            "weights": weights_hash(self.unet),
        }


def standard_errors(values: torch.Tensor) -> list[float]:
    """Those of means over the images, (N, n) -> n floats."""
    return (values.std(dim=0) / math.sqrt(len(values))).tolist()


def computed_timesteps(timesteps: Iterable[int] | None, num_train_timesteps: int) -> list[int]:
    """Ascending, with both ends.

    Raises:
        ValueError: one outside 0 .. T-1.
    """
    last = num_train_timesteps - 1
    grid = sorted({0, last, *(range(num_train_timesteps) if timesteps is None else map(int, timesteps))})
    if grid[0] < 0 or grid[-1] > last:
        raise DiffusersDPMError(f"timesteps must lie in 0 .. {last}, got {grid[0]} .. {grid[-1]}.")
    return grid


def measure(
    problem: Problem, batch_size: int, processes: Processes, store: ResultStore, progress: Progress
) -> torch.Tensor:
    """Values of all (image, timestep) pairs in whole batches, which processes take in turn; float64 (N, n, 2).

    A batch holds the same pairs for any number of processes and in a resumed call, so that its rounding is the same.
    """
    saved = store.load_values((len(problem.images), len(problem.timesteps), 2))
    processes.wait()  # until all have read what others will write over
    pairs = saved[..., 0].isnan().nonzero().tolist()
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    own = torch.full_like(saved, math.nan)
    progress.update(saved[..., 0].numel() - len(pairs))
    numbers = range(processes.rank, len(batches), processes.count)
    try:
        for number, values in one_late((number, problem.evaluate(batches[number])) for number in numbers):
            values = values.cpu()
            if bad := [i for (_, i), fine in zip(batches[number], values.isfinite().all(1), strict=True) if not fine]:
                raise DiffusersDPMError(f"the predictions at timestep {problem.timesteps[bad[0]]} are not finite.")
            own[tuple(torch.tensor(batches[number]).T)] = values
            first = number - processes.rank  # the other processes are as far
            progress.update(sum(map(len, batches[first : first + processes.count])))
            if store.is_due():
                store.save_values(merged(saved, own))
    except BaseException:
        store.save_values(merged(saved, own))
        raise
    if processes.count > 1:  # each value is NaN in all processes but one
        own = processes.sum(own.nan_to_num())
    return merged(saved, own)


def one_late(items: Iterator[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
    """Each item once the next is begun: the noise of a batch is drawn while the device computes the one before."""
    previous = next(items, None)
    for item in chain(items, [None]):
        if previous is not None:
            yield previous
        previous = item


def merged(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """`first`, and `second` where it is NaN."""
    return torch.where(first.isnan(), second, first)


def import_ms_eps(
    path: str | Path,
    schedule: VPNoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    num_images: int | None = None,
    weights: str | None = None,
    allow_pickle: bool = False,
) -> PosteriorStatistics:
    """Statistics from a vector of E|epsilon_hat|^2 / d, the form in which those of Bao et al. are distributed.

    The result has the analytic estimate alone, without errors: a residual cannot be had from it.

    Args:
        path: .npy, .npz, .safetensors (one array, or the one named ms_eps) or .json (a list, or a dict with ms_eps) of
            T values, or T + 1 of which the first means nothing. Any other file is taken for one of `torch.save`.
        schedule: that the statistics are of; the file does not say.
        prediction_type: of the network; the file does not say.
        num_images: over which they are averaged, if the source says.
        weights: `weights_hash` of the network, if the source says: the commands refuse them for any other.
        allow_pickle: read files of `torch.save`, which can run any code: only from sources that you trust.

    Raises:
        ValueError: the file cannot be read, or is a pickle without `allow_pickle`; a wrong number of values, negative
            ones or some not finite; a schedule that ends in pure noise, where ms_eps says nothing.
    """
    values, num = read_vector(Path(path), allow_pickle), len(schedule)
    if not isinstance(schedule, VPNoiseSchedule):
        raise DiffusersDPMError(f"ms_eps is of a DDPM process, not of a {type(schedule).__name__}.")
    if values.shape not in ((num,), (num + 1,)):
        raise DiffusersDPMError(f"{path} has shape {values.shape}, not {num} values or {num + 1} with a dummy first.")
    values = values[-num:]
    if not (np.isfinite(values) & (values >= 0)).all():
        raise DiffusersDPMError(f"{path} holds {values.min():g} .. {values.max():g}; they must be finite and >= 0.")
    if schedule.alpha[-1] == 0:
        raise DiffusersDPMError(f"ms_eps gives no C_t at timestep {num - 1}, where alpha=0: use estimate_statistics.")
    analytic = torch.exp(-2 * schedule.lambda_) * (1 - torch.from_numpy(values))
    return PosteriorStatistics(
        residual=None,
        analytic=analytic.tolist(),
        residual_error=None,
        analytic_error=None,
        timesteps=list(range(num)),
        schedule_hash=schedule.hash,
        prediction_type=prediction_type,
        num_images=num_images,
        weights=weights,
        provenance={"imported_from": Path(path).name},
    )


def read_vector(path: Path, allow_pickle: bool) -> np.ndarray:
    """The file's vector as float64."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": lambda path: np.load(path, allow_pickle=False),
        ".npz": lambda path: dict(np.load(path, allow_pickle=False)),
        ".safetensors": load_file,
        ".json": lambda path: json.loads(path.read_text()),
    }
    if path.suffix not in readers and not allow_pickle:
        raise DiffusersDPMError(
            f"{path} is not one of {', '.join(readers)}; for a torch.save file that you trust pass allow_pickle=True."
        )
    try:
        values = readers.get(path.suffix, read_pickle)(path)
        if isinstance(values, Mapping):
            values = values["ms_eps"] if "ms_eps" in values or len(values) != 1 else next(iter(values.values()))
        return np.asarray(values, dtype=np.float64)
    except KeyError as error:
        raise DiffusersDPMError(f"{path} holds several arrays and none is named ms_eps.") from error
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        raise DiffusersDPMError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def read_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)
