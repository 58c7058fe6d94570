"""Options of the training commands: flat dataclasses, filled from the command line or one YAML or JSON file."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tyro.constructors import PrimitiveConstructorSpec

from diffusers_dpm.options import DataSourceOptions


PresetName = Literal[
    "1x1", "digits-8x8", "28x28", "cifar10-small", "cifar10-ddpm", "64x64", "adm-64", "adm-128", "adm-256"
]
Process = Literal["vp", "flow", "edm", "ve", "vp_linear", "subvp"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "score"]
LossType = Literal["l2", "l1", "huber", "sliced", "hybrid", "vlb"]
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"]
Tracker = Literal[
    "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio", "none"
]
Weighting = Literal["none", "simple", "min_snr", "p2", "likelihood"]

# `--resume` alone means the latest checkpoint.
PathOrLatest = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[PATH]",
        instance_from_str=lambda words: " ".join(words) or "latest",
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [value] if value else [],
    ),
]


@dataclass(kw_only=True)
class DataOptions(DataSourceOptions):
    """data"""

    split: str | None = None
    """split of the data to train on (default: train, or the only one); 'train[:90%]' is nine tenths of one, in a fixed
    random order, and 'train[90%:]' the rest, for --eval-split and the like"""
    random_flip: bool = False
    """mirror half of the images left to right (not for digits or text)"""
    dataloader_num_workers: int = 2
    """worker processes, used only if the data exceeds --cache-gigabytes"""


@dataclass(kw_only=True)
class AugmentationOptions:
    """augmentation"""

    random_shift: int = 0
    """shift images by up to this many pixels in each direction"""
    random_crop: bool = False
    """enlarge a random part of the image, with sides 0.8 to 1 times the image's"""


@dataclass(kw_only=True)
class ModelOptions:
    """model"""

    preset: PresetName | None = None
    """U-Net (default: the one for the images' size, derived where there is no preset)"""
    unet_config: str | None = None
    """UNet2DModel config.json, its folder or a run folder, instead of a preset"""
    init_from: str | None = None
    """run folder or Hub id of a model to go on with: its averaged weights and its noise schedule, not a preset"""
    dropout: float | None = None
    """dropout in residual blocks (default: the config's; presets 0.1)"""
    init: Literal["papers", "torch"] = "papers"
    """papers: last layers start at zero"""
    class_conditional: bool = False
    """condition the network on the class labels"""
    class_dropout_prob: float = 0.0
    """fraction of images trained without label; adds a class for unlabelled images"""


@dataclass(kw_only=True)
class ClassifierOptions:
    """model"""

    preset: PresetName | None = None
    """classifier (default: the one for the images' size, derived where there is no preset)"""
    classifier_config: str | None = None
    """NoisyClassifier config.json, or its folder, instead of a preset"""
    init_from_unet: bool = False
    """start from the encoder of the run's U-Net instead of a preset"""
    pool: Literal["adaptive", "attention", "spatial"] | None = None
    """head of the classifier (default: the config's; presets adaptive)"""
    dropout: float | None = None
    """dropout in residual blocks (default: the config's; presets none)"""
    num_classes: int | None = None
    """number of classes; must fit the labels (default: the data's)"""


@dataclass(kw_only=True)
class FeatureOptions:
    """model"""

    num_features: int = 64
    """length of a feature vector, a multiple of 8 up to 64; longer vectors need more images"""


@dataclass(kw_only=True)
class VarianceOptions:
    """model"""

    target: Literal["npr", "sn"] = "npr"
    """what the head estimates; npr: the square of what the network's prediction leaves of the noise; sn: the square of
    the noise"""


@dataclass(kw_only=True)
class ProcessOptions:
    """process"""

    process: Process = "vp"
    """vp: DDPM's, in T timesteps; flow: flow matching; edm: Karras et al.'s; ve, vp_linear, subvp: Song et al.'s SDEs,
    in continuous time"""
    sigma_min: float | None = None
    """least noise of edm (default: 0.002) and ve (0.01)"""
    sigma_max: float | None = None
    """most noise of edm (default: 80) and ve (50)"""
    sigma_data: float | None = None
    """root mean square of the pixels, for edm (default: 0.5, as published)"""


@dataclass(kw_only=True)
class NoiseScheduleOptions:
    """noise schedule"""

    num_train_timesteps: int = 1000
    """number of noise levels T; of flow, the timestep of pure noise"""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "cosine", "sigmoid", "laplace"] = "linear"
    """shape of the noise schedule"""
    beta_start: float = 0.0001
    """first beta, if the shape has one; of vp_linear and subvp, a thousandth of beta(0)"""
    beta_end: float = 0.02
    """last beta, if the shape has one; of vp_linear and subvp, a thousandth of beta(1)"""
    rescale_betas_zero_snr: bool = False
    """end in pure noise; not with epsilon prediction"""
    prediction_type: PredictionType | None = None
    """what the network predicts; vp: epsilon (default), sample or v_prediction; flow: flow_prediction (default) or
    sample; edm: epsilon (default), which is its name for F, or v_prediction, -F; others: what they have"""
    variance_type: VarianceType = "fixed_small"
    """reverse variance saved with the model (the DDPM paper's FID: fixed_large); learned_range: the network predicts
    it, between both, in a second half of its channels"""
    clip_sample: bool = True
    """clip predicted images to [-1, 1] when sampling"""


@dataclass(kw_only=True)
class LossOptions:
    """loss"""

    loss_type: LossType | None = None
    """distance to the target (default: l2, and hybrid for learned_range); sliced: sliced score matching, l2 in
    expectation (networks of epsilon or the score); vlb: the variational bound in bits per dimension, of the
    --variance-type; hybrid: l2 + 0.001 vlb for the variance alone"""
    num_levels: int | None = None
    """number of values of a pixel, for vlb, hybrid and bits per dimension (default: from the depth of the files)"""
    huber_delta: float = 1.0
    """where huber turns linear"""
    weighting: Weighting = "none"
    """weight by noise level; none: 1 on the target, or on epsilon for a score; simple: that of L_simple, for any
    target; likelihood: g^2 of the SDE (ve, vp_linear, subvp)"""
    min_snr_gamma: float = 5.0
    """gamma of min_snr"""
    p2_gamma: float = 1.0
    """gamma of p2"""
    p2_k: float = 1.0
    """k of p2"""


@dataclass(kw_only=True)
class OptimizationOptions:
    """optimisation"""

    max_train_steps: int = 20_000
    """optimiser steps in total, including those before a resume"""
    batch_size: int = 128
    """images per optimiser step, over all processes and accumulation steps"""
    gradient_accumulation_steps: int = 1
    """parts into which each process splits its batch"""
    learning_rate: float = 2e-4
    """peak learning rate"""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """after the warm-up: constant, or decay to 0"""
    lr_warmup_steps: int = 500
    """optimiser steps of linear warm-up"""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """adamw-8bit: with moments of 8 bits, a quarter of the memory; needs bitsandbytes"""
    adam_beta1: float = 0.9
    """AdamW's beta 1"""
    adam_beta2: float = 0.999
    """AdamW's beta 2"""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon"""
    adam_weight_decay: float = 0.0
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """largest norm of the gradient; 0: no clipping"""
    timestep_sampling: Literal["stratified", "uniform", "loss-second-moment", "logit-normal"] = "stratified"
    """timesteps of a batch: evenly spread, independent, or (vp) more often where the loss is large; or (flow) evenly
    spread over SD3's distribution"""
    p_mean: float | None = None
    """mean of log(sigma / alpha), for edm (default: -1.2) and logit-normal (0)"""
    p_std: float | None = None
    """standard deviation of log(sigma / alpha), for edm (default: 1.2) and logit-normal (1)"""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """precision of the network (default: accelerate's configuration, else no)"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass: less memory, more time"""
    compile: bool = False
    """compile the network by torch.compile: minutes at the start, then faster steps"""
    cpu: bool = False
    """use the CPU even if there is an accelerator"""
    seed: int = 0
    """seed of weights, data order and noise"""


@dataclass(kw_only=True)
class ClassifierOptimizationOptions(OptimizationOptions):
    """optimisation"""

    max_train_steps: int = 10_000
    learning_rate: float = 3e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    adam_weight_decay: float = 0.05


@dataclass(kw_only=True)
class FeatureOptimizationOptions(ClassifierOptimizationOptions):
    """optimisation"""

    max_train_steps: int = 3000
    learning_rate: float = 1e-3


@dataclass(kw_only=True)
class VarianceOptimizationOptions(OptimizationOptions):
    """optimisation"""

    max_train_steps: int = 3000
    learning_rate: float = 1e-3
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_steps: int = 100


@dataclass(kw_only=True)
class EMAOptions:
    """EMA"""

    ema: bool = True
    """keep a moving average of the weights and save it as the model"""
    ema_decay: float = 0.9999
    """largest decay"""
    ema_warmup: bool = True
    """decay 1 - (1 + step / inv_gamma)^-power up to ema_decay; off: always ema_decay"""
    ema_inv_gamma: float = 1.0
    """inv_gamma of the warm-up"""
    ema_power: float = 0.75
    """power of the warm-up"""


@dataclass(kw_only=True)
class SnapshotOptions:
    """EMA of any length afterwards"""

    ema_snapshot_every: int = 0
    """optimiser steps between snapshots of two averages, from which 'diffusers-dpm ema' makes one of any length; 0:
    none. A snapshot is twice as large as the model"""


@dataclass(kw_only=True)
class RunFolderOptions:
    """run folder"""

    output_dir: str
    """folder of the run, which becomes the trained pipeline or features"""


@dataclass(kw_only=True)
class CheckpointOptions:
    """checkpoint"""

    checkpoint_every: int = 1000
    """optimiser steps between checkpoints; 0: only at the end"""
    checkpoints_total_limit: int = 2
    """number of checkpoints to keep; 0: all"""
    resume: PathOrLatest = None
    """resume from PATH, or from the run's latest checkpoint"""
    overwrite: bool = False
    """delete an earlier run in the same folder"""
    dry_run: bool = False
    """print what would run, and write nothing"""


@dataclass(kw_only=True)
class HubOptions:
    """Hub"""

    push_to_hub: str | None = None
    """publish the trained pipeline as ORG/NAME, as `diffusers-dpm publish` does"""
    hub_private: bool = False
    """create a private repository; an existing one must be private"""


@dataclass(kw_only=True)
class LoggingOptions:
    """logging"""

    log_with: list[Tracker] = field(default_factory=lambda: ["tensorboard"])
    """trackers that accelerate starts, or none; TensorBoard's files and metrics.csv are in logs/ of the run folder"""
    log_every: int = 50
    """optimiser steps per log entry, which is their mean"""


@dataclass(kw_only=True)
class SampleOptions:
    """sample"""

    sample_every: int = 1000
    """optimiser steps between sample grids; 0: none"""
    sample_steps: int = 25
    """DDIM steps of the sample grids"""
    num_samples: int = 16
    """images per sample grid, for the raw and the EMA weights each"""


@dataclass(kw_only=True)
class EvaluationOptions:
    """held-out accuracy"""

    eval_split: str | None = None
    """split of the data to measure on, such as test or 'train[90%:]' (default: measure only with --eval-data)"""
    eval_data: str | None = None
    """held-out data, as --data (default: --data); its split test, or the only one"""
    eval_draws: int = 4
    """noise draws per image and range of timesteps"""


@dataclass(kw_only=True)
class ValidationOptions(EvaluationOptions):
    """held-out loss"""

    eval_draws: int = 4
    """timesteps per image, at most 256 images"""
    eval_every: int = 1000
    """optimiser steps between measurements, which stand in the log entries; 0: none"""


@dataclass(kw_only=True)
class TrainingOptions(
    DataOptions,
    ModelOptions,
    NoiseScheduleOptions,
    ProcessOptions,
    LossOptions,
    OptimizationOptions,
    EMAOptions,
    SnapshotOptions,
    RunFolderOptions,
    CheckpointOptions,
    LoggingOptions,
    SampleOptions,
    ValidationOptions,
    HubOptions,
):
    """Options of `diffusers-dpm train`, described by its `--help`.

    Raises:
        DiffusersDPMError: a number is out of range.
    """

    # Disabled: augmentation would leak into the samples.
    random_shift: ClassVar[int] = 0
    random_crop: ClassVar[bool] = False


@dataclass(kw_only=True)
class ClassifierTrainingOptions(
    DataOptions,
    AugmentationOptions,
    ClassifierOptions,
    ClassifierOptimizationOptions,
    EMAOptions,
    CheckpointOptions,
    LoggingOptions,
    EvaluationOptions,
):
    """Options of `diffusers-dpm train-classifier`; raises as `TrainingOptions`."""

    ema_snapshot_every: ClassVar[int] = 0
    class_dropout_prob: ClassVar[float] = 0.0  # every image keeps its label


@dataclass(kw_only=True)
class FeatureTrainingOptions(
    DataOptions,
    RunFolderOptions,
    FeatureOptions,
    AugmentationOptions,
    FeatureOptimizationOptions,
    EMAOptions,
    CheckpointOptions,
    LoggingOptions,
    EvaluationOptions,
):
    """Options of `diffusers-dpm train-features`; raises as `TrainingOptions`."""

    ema_snapshot_every: ClassVar[int] = 0
    class_dropout_prob: ClassVar[float] = 0.0


@dataclass(kw_only=True)
class VarianceTrainingOptions(
    DataOptions,
    VarianceOptions,
    VarianceOptimizationOptions,
    EMAOptions,
    CheckpointOptions,
    LoggingOptions,
):
    """Options of `diffusers-dpm train-variance`; raises as `TrainingOptions`."""

    random_shift: ClassVar[int] = 0  # the statistics are those of the data
    random_crop: ClassVar[bool] = False
    ema_snapshot_every: ClassVar[int] = 0
    class_dropout_prob: ClassVar[float] = 0.0
    eval_data: ClassVar[None] = None
    eval_split: ClassVar[None] = None
