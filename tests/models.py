"""What the tests sample from: networks in closed form, tiny real networks, run folders, rows that stand for fits."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import BaseOutput
from PIL import Image

from diffusers_dpm.pipelines import ADMUNet2DModel, DPMPipeline, NoisyClassifier
from diffusers_dpm.schedulers import AnalyticDPMScheduler, CalibratedScheduler, DDPMScheduler, DPMSolverScheduler
from diffusers_dpm.schedulers.gaussian_paths import path_of
from diffusers_dpm.schedulers.scheduling_calibrated import CONDITIONS


# Closed forms --------------------------------------------------------------------------------------------------------


def path(pipe, **arguments):
    """All x_t of a walk of a DPMPipeline, (steps + 1, B, C, H, W)."""
    arguments = {"num_inference_steps": 12, "output_type": "pt", **arguments}
    return pipe(return_trajectory=True, **arguments).trajectory.latents


def prediction(kind, x0, epsilon, alpha, sigma):
    """What a network of a prediction type returns."""
    return {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}[kind]


class MixtureNetwork(ModelMixin, ConfigMixin):
    """The best network for images whose pixels are independent draws from sum_k w_k N(means[k], deviations[k]^2).

    With `num_class_embeds` it is that of the component that the label names. It computes in float64, whatever it
    returns, and refuses to do so in training mode. `calls` holds its arguments.

    Args:
        means: a number for each component, or a row of numbers, one for each column of the image.
        deviations: a number for each component.
        weights: of the components; None for equal ones.
        scale: factor of epsilon that makes the network wrong.
        learns_variance: adds as many channels of nan, which nobody is to read; "npr" and "sn" add the best heads of
            Extended Analytic-DPM.
    """

    strict = True

    @register_to_config
    def __init__(
        self,
        means=(0.0,),
        deviations=(0.5,),
        weights=None,
        prediction_type="epsilon",
        num_class_embeds=None,
        scale=1.0,
        learns_variance=False,
        rescale_betas_zero_snr=False,
        in_channels=1,
        sample_size=4,
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        chain = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": rescale_betas_zero_snr}
        self.schedule = DDPMScheduler(**chain).schedule
        self.means = torch.tensor(means, dtype=torch.float64).view(len(means), 1, 1, 1, -1)
        self.deviations = torch.tensor(deviations, dtype=torch.float64).view(-1, 1, 1, 1, 1)
        self.log_weights = torch.tensor(weights or [1 / len(means)] * len(means), dtype=torch.float64).log()
        self.calls = []
        self.fail_at = None  # index of the call that is interrupted

    def at(self, t, x):
        return self.schedule.at(torch.as_tensor(t), x)

    def components(self, x, t):
        """(x - mean, variance) of x_t in each component, and the level, (K, B, C, H, W)."""
        alpha, sigma = self.at(t, x)
        return x - alpha * self.means, (alpha * self.deviations) ** 2 + sigma**2, alpha, sigma

    def returned(self, x0, epsilon, alpha, sigma):
        return prediction(self.config.prediction_type, x0, epsilon, alpha, sigma)

    def log_densities(self, centred, variances):
        """log p(x_t, k) up to a constant, pixel by pixel."""
        return self.log_weights.view(-1, 1, 1, 1, 1) - 0.5 * variances.log() - centred**2 / (2 * variances)

    def forward(self, sample, timestep, class_labels=None, **others):
        assert not (self.strict and self.training)
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        modes = (sample.requires_grad, torch.is_grad_enabled(), self.training)
        self.calls.append({"x": sample, "t": timestep, "class_labels": class_labels, "modes": modes, **others})
        centred, variances, alpha, sigma = self.components(sample.double(), timestep)
        if class_labels is None:
            parts = self.log_densities(centred, variances).softmax(dim=0)
        else:
            parts = torch.nn.functional.one_hot(class_labels, len(self.means)).T.double()[..., None, None, None]
        epsilon = self.config.scale * (parts * sigma * centred / variances).sum(0)
        x0 = (parts * (self.means + alpha * self.deviations**2 / variances * centred)).sum(0)
        output = self.returned(x0, epsilon, alpha, sigma).to(sample.dtype)
        if learns := self.config.learns_variance:
            posterior = self.means + alpha * self.deviations**2 / variances * centred
            spread = (parts * (posterior**2 + (self.deviations * sigma) ** 2 / variances)).sum(0) - x0**2
            exact = epsilon / self.config.scale
            squares = spread * (alpha / sigma) ** 2 + (exact**2 if learns == "sn" else (exact - epsilon) ** 2)
            head = squares if learns in ("npr", "sn") else torch.full_like(squares, math.nan)
            output = torch.cat([output, head.to(output.dtype)], dim=1)
        return UNet2DOutput(sample=output)


class ImageMixtureNetwork(MixtureNetwork):
    """The same for images all of whose pixels come from one component; allowed in training mode.

    Between training timesteps sigma / alpha is linear, as in diffusers' schedulers with real-valued timesteps; in
    ours, log alpha is.
    """

    strict = False

    @register_to_config
    def __init__(
        self,
        means=((-0.8, 0.1), (0.5, -0.3)),
        deviations=(0.3, 0.2),
        prediction_type="epsilon",
        num_class_embeds=None,
        rescale_betas_zero_snr=False,
        in_channels=1,
        sample_size=2,
    ):
        config = {"prediction_type": prediction_type, "num_class_embeds": num_class_embeds}
        config |= {"rescale_betas_zero_snr": rescale_betas_zero_snr}
        super().__init__(means, deviations, **config, in_channels=in_channels, sample_size=sample_size)

    def level(self, t):
        """(alpha, sigma)."""
        low, high = self.schedule[math.floor(t)], self.schedule[math.ceil(t)]
        if low is high:
            return low[:2]
        ratio = low.sigma / low.alpha + (t % 1) * (high.sigma / high.alpha - low.sigma / low.alpha)
        return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)

    def at(self, t, x):
        return self.level(float(t))

    def log_densities(self, centred, variances):
        return super().log_densities(centred, variances).sum(dim=(2, 3, 4), keepdim=True)

    def logits(self, x, t):
        """log p(x_t, k) up to a constant, (B, K)."""
        return self.log_densities(*self.components(x.double(), t)[:2]).flatten(1).T


class ImageMixtureClassifier(ModelMixin, ConfigMixin):
    """The exact noisy classifier of `ImageMixtureNetwork`'s data; `calls` holds the timesteps."""

    @register_to_config
    def __init__(self, num_classes=2, in_channels=1, sample_size=2):
        super().__init__()
        self.mixture = ImageMixtureNetwork()
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls = []

    def forward(self, sample, timestep):
        self.calls.append(timestep.item())
        return self.weight * self.mixture.logits(sample, timestep)


class PathNetwork(ImageMixtureNetwork):
    """The same on any path, which `process` names. It sees the scaled x, and checks it against what it is told.

    Args:
        tolerance: of the mean square of x, relative; None for no check.
    """

    @register_to_config
    def __init__(
        self,
        process=None,
        prediction_type="epsilon",
        means=(0.0,),
        deviations=(0.5,),
        num_class_embeds=None,
        tolerance=None,
        in_channels=1,
        sample_size=2,
    ):
        super().__init__(means, deviations, prediction_type, num_class_embeds, False, in_channels, sample_size)
        self.schedule = path_of(process)

    def at(self, t, x):
        return self.schedule.at(torch.as_tensor(t).double(), x.double())

    def scale(self, t):
        scales = [
            self.schedule.input_scale(self.schedule.level(time)) for time in torch.as_tensor(t).flatten().tolist()
        ]
        return torch.tensor(scales, dtype=torch.float64)[:, None, None, None]

    def components(self, x, t):
        return super().components(x / self.scale(t), t)

    def returned(self, x0, epsilon, alpha, sigma):
        p, q = self.schedule.predictions[self.config.prediction_type](alpha, sigma)
        return p * x0 + q * epsilon

    def forward(self, sample, timestep, class_labels=None, **others):
        if self.config.tolerance is not None:
            alpha, sigma = self.at(timestep, sample)
            data = (self.means**2 + self.deviations**2).mean()
            expected = (alpha**2 * data + sigma**2) * self.scale(timestep) ** 2
            assert abs((sample.double().square() / expected).mean() - 1) < self.config.tolerance
        return super().forward(sample, timestep, class_labels, **others)


class PathClassifier(ImageMixtureClassifier):
    """The exact noisy classifier of a `PathNetwork`'s data, which sees what the network sees."""

    @register_to_config
    def __init__(self, process=None, means=(), deviations=(), num_classes=2, in_channels=1, sample_size=2):
        super().__init__(num_classes, in_channels, sample_size)
        self.mixture = PathNetwork(process, "epsilon", means, deviations)


class GaussianNetwork(torch.nn.Module):
    """The best network for data N(mean, covariance), (C, H, W) flattened; at real-valued timesteps too."""

    device = torch.device("cpu")

    def __init__(self, schedule, covariance, mean=0.0, prediction_type="epsilon", dtype=torch.float64, channels=1):
        super().__init__()
        self.schedule, self.covariance, self.mean = schedule, covariance, mean
        self.prediction_type, self.dtype, self.channels = prediction_type, dtype, channels

    def forward(self, x, t, class_labels=None):
        assert x.dtype == self.dtype
        flat = x.double().flatten(1)
        output = torch.empty_like(flat)
        for time in t.unique():
            output[t == time] = self.predict(flat[t == time], self.schedule.level(time.item()))
        output = output.view(x.shape).to(x.dtype)
        return UNet2DOutput(sample=torch.cat([output] + [torch.full_like(x, 7.0)] * (self.channels - 1), dim=1))

    def predict(self, x, level):
        total = level.alpha**2 * self.covariance + level.sigma**2 * torch.eye(x.shape[1], dtype=torch.float64)
        score = torch.linalg.solve(total, (x - level.alpha * self.mean).T).T
        x0 = self.mean + level.alpha * score @ self.covariance
        return prediction(self.prediction_type, x0, level.sigma * score, level.alpha, level.sigma)


class LinearClassifier(ModelMixin, ConfigMixin):
    """Two classes; log p(1 | x) / p(0 | x) is the sum of the pixels."""

    @register_to_config
    def __init__(self, num_classes=2, in_channels=1, sample_size=4):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.0, 1.0]], dtype=torch.float64))

    def forward(self, sample, timestep):
        return sample.flatten(1).sum(dim=1, keepdim=True) @ self.weight


class HeadClassifier(ModelMixin, ConfigMixin):
    """Logits that are linear in x_t, as an output with `.logits`; nan below the timestep `broken_below`."""

    @register_to_config
    def __init__(self, num_classes=3, in_channels=3, sample_size=8, broken_below=-1):
        super().__init__()
        torch.manual_seed(0)
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(in_channels * sample_size**2, num_classes)

    def forward(self, sample, timestep):
        if timestep < self.config.broken_below:
            sample = sample * torch.nan
        return BaseOutput(logits=self.head(self.dropout(sample.flatten(1))))


# Tiny real networks --------------------------------------------------------------------------------------------------

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def tiny_unet(channels=1, attention=False, **config):
    """A U-Net for 8x8 images with random weights, the same at every call; in evaluation mode, as when loaded."""
    torch.manual_seed(0)
    widths = config.get("block_out_channels", BLOCKS["block_out_channels"])
    prefix = "Attn" if attention else ""
    down = (*["DownBlock2D"] * (len(widths) - 1), f"{prefix}DownBlock2D")
    defaults = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": down,
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
        **BLOCKS,
    }
    return UNet2DModel(**{**defaults, **config}).eval()


def tiny_adm_unet(**config):
    """The same with four attention heads at every level and a wider embedding of the time, which diffusers has not."""
    plain = {
        key: value for key, value in tiny_unet(attention=True, **config).config.items() if not key.startswith("_")
    }
    return ADMUNet2DModel(**plain, num_attention_heads=4, time_proj_dim=12).eval()


def tiny_classifier(num_classes=3, std=1.0, **config):
    """A classifier of 8x8 grey images, the same at every call; with std=0 its last layer is zero, as in a new one."""
    torch.manual_seed(1)
    defaults = {"sample_size": 8, "in_channels": 1, **BLOCKS, "block_out_channels": (8,)}
    widths = {**defaults, **config}["block_out_channels"]
    defaults["down_block_types"] = ("DownBlock2D",) * len(widths)
    classifier = NoisyClassifier(num_classes, **{**defaults, **config}).eval()
    torch.nn.init.normal_(classifier.head.out.weight, std=std)
    return classifier


# Run folders ---------------------------------------------------------------------------------------------------------


def save_run(folder: Path, unet=None, **scheduler):
    """A run folder with a tiny network, or that one, and 20 timesteps; returns its pipeline."""
    config = {"num_train_timesteps": 20, "beta_end": 0.3, **scheduler}
    pipeline = DPMPipeline(unet or tiny_unet(), DDPMScheduler(**config))
    pipeline.save_pretrained(folder)
    return pipeline


def save_features(folder: Path, num_classes=10):
    """A classifier as a folder of features."""
    tiny_classifier(num_classes).save_pretrained(folder)
    (folder / "features.json").write_text(json.dumps({}))
    return folder


CLIP_PIXELS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.5, 0.5]}


def save_clip(folder: Path) -> None:
    """A tiny CLIP with random weights, and its tokenizer, which knows two words."""
    import transformers  # an extra
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 4, "max_position_embeddings": 8, "eos_token_id": 3}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"dark": 0, "bright": 1, "[UNK]": 2, "[EOS]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"pad_token": "[EOS]", "model_max_length": 8, "model_input_names": ["input_ids", "attention_mask"]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **options)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP_PIXELS))


def solver_rows(solver, *tables, factor=1.0, weights=None, classifier=None):
    """What `set_calibration` takes: the rows of a solver, with x_t's factor multiplied by `factor`.

    Args:
        tables: (guidance scale, number of steps or timesteps) of each table.
        weights, classifier: hashes of what the rows were fitted to.
    """
    fitted = []
    for scale, walk in tables:
        if isinstance(walk, int):
            solver.set_timesteps(min(walk, len(solver)))
        else:
            solver.set_timesteps(timesteps=walk)
        rows = [[factor * row.sample, *row.x0] for row in solver.updates]
        guide = {"guidance_scale": scale, **({"classifier": classifier} if scale and classifier else {})}
        fitted.append({"timesteps": solver.timesteps.tolist(), "rows": rows, **guide})
    conditions = {key: solver.config[key] for key in CONDITIONS}
    return {"tables": fitted, "schedule_hash": solver.schedule.hash, "weights": weights, **conditions}


def fitted_scheduler(scheduler, *tables, spacing="linspace", order=2, factor=0.9, **hashes):
    """A `CalibratedScheduler` for the scheduler's network, with rows that DPM-Solver does not have by default."""
    solver = DPMSolverScheduler.from_config(scheduler.config, solver_order=order, timestep_spacing=spacing)
    fitted = CalibratedScheduler.from_config(scheduler.config, guidance_scale=tables[0][0])
    fitted.set_calibration(solver_rows(solver, *tables, factor=factor, **hashes))
    return fitted


# A run that is published ---------------------------------------------------------------------------------------------

METRIC = {
    "scheduler": "DDIMScheduler",
    "options": {"timestep_spacing": "trailing"},
    "steps": 10,
    "metric": "FID",
    "value": 12.3456,
    "error": 0.05,
    "num_images": 50_000,
    "feature_extractor": "InceptionV3",
    "weights": "ema",
    "reference": "digits, test",
}


# Beside the pipeline in a run folder: the trainers' state, notes, and what measurements are computed from.
NOT_PUBLISHED = (
    *("checkpoints/step-00001000/optimizer.bin", "logs/events", "unet/notes.txt", "secret.txt"),
    *("classifier_training/training_options.json", "classifier_accuracy.json", "classifier_accuracy.png"),
    *(
        "likelihood.json",
        "likelihood_terms.csv",
        "rate_distortion.csv",
        "likelihood_elbo.safetensors",
        "likelihood_ode.safetensors",
    ),
    *("metrics.md", "metrics.png", "evaluation/reference.safetensors", "evaluation/cell-0/sampling.json"),
)


def make_run(folder: Path, *, extras: bool = False, num_train_timesteps: int = 1000, **unet) -> Path:
    """A run folder with a random network, as `diffusers-dpm train` and the commands after it leave it."""
    network = tiny_unet(attention=True, **unet)
    scheduler = save_run(folder, network, num_train_timesteps=num_train_timesteps, beta_end=0.02).scheduler
    (folder / "training_options.json").write_text(
        json.dumps({"data": "digits", "batch_size": 64, "ema": True, "checkpoint_every": 9})
    )
    (folder / "samples").mkdir()
    Image.new("L", (8, 8)).save(folder / "samples" / "step-00001000.png")
    for private in NOT_PUBLISHED:
        (folder / private).parent.mkdir(parents=True, exist_ok=True)
        (folder / private).write_text("private")
    if extras:
        add_extras(folder, scheduler)
    return folder


def add_extras(folder: Path, scheduler: DDPMScheduler) -> None:
    classifier = tiny_classifier(block_out_channels=(8, 16))
    for parameter in classifier.parameters():  # a new classifier's last layer is zero, and so are its logits
        torch.nn.init.normal_(parameter, std=0.1)
    classifier.save_pretrained(folder / "classifier")
    analytic = AnalyticDPMScheduler.from_config(scheduler.config)
    variances = np.linspace(0, 0.9, len(scheduler)).tolist()
    analytic.set_statistics({"residual": variances, "schedule_hash": analytic.schedule.hash})
    analytic.save_pretrained(folder / "analytic_dpm")
    (folder / "analytic_dpm" / "statistics.json").write_text("{}")
    fitted_scheduler(scheduler, (None, 2), (None, 5)).save_pretrained(folder / "calibrated")
    (folder / "calibrated" / "calibration.json").write_text("{}")
    (folder / "metrics.json").write_text(json.dumps({"rows": [METRIC]}))
