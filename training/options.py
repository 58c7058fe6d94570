"""Options of the training commands: one flat dataclass, from the command line or one YAML or JSON file.

Each group of options is a dataclass; a command's options inherit from the groups that it needs.
"""

from dataclasses import dataclass, field
from typing import Literal

from diffusers_dpm.options import DataSourceOptions
from diffusers_dpm.training.classifier_presets import CLASSIFIER_PRESETS
from diffusers_dpm.training.loss import LossType, PredictionType, Weighting
from diffusers_dpm.training.unet_presets import PRESETS


@dataclass
class DataOptions(DataSourceOptions):
    """The same for training."""

    split: str = field(default="train", metadata={"help": "part of the data to train on"})
    random_flip: bool = field(
        default=False, metadata={"help": "mirror half of the images left to right (never digits or text)"}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "processes that decode data too large for that"})


@dataclass
class AugmentationOptions:
    _argument_group_name = "augmentation"

    random_shift: int = field(default=0, metadata={"help": "move images by up to so many pixels each way"})
    random_crop: bool = field(
        default=False, metadata={"help": "enlarge parts of images, whose sides are 0.8 to 1 of the image's"}
    )


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    preset: str | None = field(
        default=None,
        metadata={"choices": tuple(PRESETS), "help": "U-Net (default: the one made for the images' size)"},
    )
    unet_config: str | None = field(
        default=None, metadata={"help": "UNet2DModel config.json, or its folder, instead of a preset"}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "dropout in residual blocks (default: the config's; presets 0.1)"}
    )
    init: Literal["papers", "torch"] = field(default="papers", metadata={"help": "papers: last layers start at zero"})
    class_conditional: bool = field(default=False, metadata={"help": "the network gets the labels"})
    class_dropout_prob: float = field(
        default=0.0, metadata={"help": "part of the images trained without label; adds a class that means none"}
    )


@dataclass
class ClassifierOptions:
    _argument_group_name = "model"

    preset: str | None = field(
        default=None,
        metadata={"choices": tuple(CLASSIFIER_PRESETS), "help": "classifier (default: made for the images' size)"},
    )
    classifier_config: str | None = field(
        default=None, metadata={"help": "NoisyClassifier config.json, or its folder, instead of a preset"}
    )
    init_from_unet: bool = field(
        default=False, metadata={"help": "start from the encoder of the run's U-Net, instead of a preset"}
    )
    pool: Literal["adaptive", "attention", "spatial"] | None = field(
        default=None, metadata={"help": "the classifier's head (default: the config's; presets adaptive)"}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "dropout in residual blocks (default: the config's; presets none)"}
    )
    num_classes: int | None = field(
        default=None, metadata={"help": "number of classes; must fit the labels (default: the data's)"}
    )


@dataclass
class NoiseScheduleOptions:
    _argument_group_name = "noise schedule"

    num_train_timesteps: int = field(default=1000, metadata={"help": "number of noise levels T"})
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "cosine", "sigmoid", "laplace"] = field(
        default="linear", metadata={"help": "form of the noise schedule"}
    )
    beta_start: float = field(default=0.0001, metadata={"help": "first beta, where the form has one"})
    beta_end: float = field(default=0.02, metadata={"help": "last beta, where the form has one"})
    rescale_betas_zero_snr: bool = field(
        default=False, metadata={"help": "end in pure noise; not with epsilon prediction"}
    )
    prediction_type: PredictionType = field(default="epsilon", metadata={"help": "what the network learns to return"})
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"] = field(
        default="fixed_small",
        metadata={"help": "reverse variance saved with the model (the DDPM paper's FID: fixed_large)"},
    )
    clip_sample: bool = field(default=True, metadata={"help": "clip predicted images to [-1, 1] when sampling"})


@dataclass
class LossOptions:
    _argument_group_name = "loss"

    loss_type: LossType = field(default="l2", metadata={"help": "distance to the target"})
    huber_delta: float = field(default=1.0, metadata={"help": "where huber turns linear"})
    weighting: Weighting = field(
        default="none", metadata={"help": "weight by noise level; simple: L_simple's, for every target"}
    )
    min_snr_gamma: float = field(default=5.0, metadata={"help": "gamma of min_snr"})
    p2_gamma: float = field(default=1.0, metadata={"help": "gamma of p2"})
    p2_k: float = field(default=1.0, metadata={"help": "k of p2"})


@dataclass
class OptimizationOptions:
    _argument_group_name = "optimisation"

    max_train_steps: int = field(default=20_000, metadata={"help": "optimiser steps in all, resumed ones included"})
    batch_size: int = field(
        default=128, metadata={"help": "images per optimiser step, over all processes and accumulation"}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "parts that each process computes its batch in"}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    lr_scheduler: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "after the warm-up: constant, or down to 0 at the end"}
    )
    lr_warmup_steps: int = field(default=500, metadata={"help": "optimiser steps of linear warm-up"})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta 1"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta 2"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon"})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm; 0 does not clip"})
    timestep_sampling: Literal["stratified", "uniform", "loss-second-moment"] = field(
        default="stratified",
        metadata={"help": "noise levels of a batch: spread evenly, independent, or more where the loss is large"},
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "precision of the network (default: as accelerate is configured, else no)"}
    )
    cpu: bool = field(default=False, metadata={"help": "use the CPU even if there is an accelerator"})
    seed: int = field(default=0, metadata={"help": "weights, data order and noise all follow from it"})


@dataclass
class ClassifierOptimizationOptions(OptimizationOptions):
    max_train_steps: int = field(default=10_000, metadata={"help": "optimiser steps in all, resumed ones included"})
    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate"})
    lr_scheduler: Literal["constant", "linear", "cosine"] = field(
        default="linear", metadata={"help": "after the warm-up: constant, or down to 0 at the end"}
    )
    adam_weight_decay: float = field(default=0.05, metadata={"help": "AdamW's weight decay"})


@dataclass
class EMAOptions:
    _argument_group_name = "EMA"

    ema: bool = field(
        default=True, metadata={"help": "keep a moving average of the weights; it is what gets saved as the model"}
    )
    ema_decay: float = field(default=0.9999, metadata={"help": "largest decay"})
    ema_warmup: bool = field(
        default=True,
        metadata={"help": "decay 1 - (1 + step / inv_gamma)^-power up to ema_decay; off: ema_decay throughout"},
    )
    ema_inv_gamma: float = field(default=1.0, metadata={"help": "inv_gamma of the warm-up"})
    ema_power: float = field(default=0.75, metadata={"help": "power of the warm-up"})


@dataclass
class RunFolderOptions:
    _argument_group_name = "run folder"

    output_dir: str | None = field(default=None, metadata={"help": "run folder; it becomes the trained pipeline"})


@dataclass
class CheckpointOptions:
    _argument_group_name = "checkpoints"

    checkpoint_every: int = field(
        default=1000, metadata={"help": "optimiser steps between checkpoints; 0: only at the end"}
    )
    checkpoints_total_limit: int = field(default=2, metadata={"help": "checkpoints kept; 0 keeps all"})
    resume: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "latest",
            "metavar": "PATH",
            "help": "go on from PATH, or from the run's latest checkpoint",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "delete an earlier run in the same folder"})
    dry_run: bool = field(default=False, metadata={"help": "print what would run; write nothing"})


@dataclass
class HubOptions:
    _argument_group_name = "Hub"

    push_to_hub: str | None = field(
        default=None,
        metadata={"metavar": "ORG/NAME", "help": "publish the trained pipeline, as `diffusers-dpm publish` does"},
    )
    hub_private: bool = field(default=False, metadata={"help": "the repository is, or is created, private"})


@dataclass
class LoggingOptions:
    _argument_group_name = "logging"

    log_with: Literal["tensorboard", "none"] = field(
        default="tensorboard", metadata={"help": "log in the run folder's logs/"}
    )
    log_every: int = field(default=50, metadata={"help": "optimiser steps per log entry, which is their mean"})


@dataclass
class SampleOptions:
    _argument_group_name = "samples"

    sample_every: int = field(default=1000, metadata={"help": "optimiser steps between sample grids; 0: none"})
    sample_steps: int = field(default=25, metadata={"help": "DDIM steps of the sample grids"})
    num_samples: int = field(
        default=16, metadata={"help": "images in a sample grid, of the raw and of the EMA weights each"}
    )


@dataclass
class EvaluationOptions:
    _argument_group_name = "held-out accuracy"

    eval_split: str | None = field(
        default=None, metadata={"help": "part of the data to measure on (default: measure only with --eval-data)"}
    )
    eval_data: str | None = field(default=None, metadata={"help": "as --data, if it is not the same"})
    eval_draws: int = field(default=4, metadata={"help": "noises for each image in each range of timesteps"})
