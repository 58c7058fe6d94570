"""Features of images, and the images that samples are compared with."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusers_dpm.errors import DiffusersDPMError, user_error
from diffusers_dpm.networks import load_part, quiet
from diffusers_dpm.pipelines import NoisyClassifier
from diffusers_dpm.records import fingerprint, read_json, read_tensors, weights_hash, write_tensors


FEATURES_FILE = "features.json"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class ClassifierFeatures(nn.Module):
    """uint8 images (B, C, H, W) -> the input of a classifier's last layer, (B, num_features).

    Args:
        classifier: trained on clean images, and never the one that guides: it would grade itself.
    """

    def __init__(self, classifier: NoisyClassifier):
        super().__init__()
        self.classifier = classifier.eval()
        head: Any = classifier.head
        self.num_features = head.out.in_features
        self.name = f"clean classifier {weights_hash(classifier)[:12]}"

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inputs: list[torch.Tensor] = []
        with self.classifier.head.out.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
            self.classifier(images.float() / 127.5 - 1, 0)
        return inputs[0]


def to_rgb(images: torch.Tensor, name: str) -> torch.Tensor:
    """Grey images repeated to RGB. Raises DiffusersDPMError, naming the network, for other numbers of channels."""
    if images.shape[1] not in (1, 3):
        raise DiffusersDPMError(f"{name} reads grey and RGB images, these have {images.shape[1]} channels")
    return images.expand(-1, 3, -1, -1)


class InceptionFeatures(nn.Module):
    """uint8 images (B, C, H, W) -> the 2048 pooled features of the InceptionV3 of 2015, by torch-fidelity's port.

    Grey images are repeated to RGB.

    Args:
        weights: torch-fidelity's file of weights; default: where its own download leaves it, and fetched if need be.

    Raises:
        DiffusersDPMError: no torch-fidelity, no such file, or it cannot be fetched.
    """

    num_features = 2048
    name = "InceptionV3 of torch-fidelity"

    def __init__(self, weights: str | Path | None = None):
        from torchmetrics.image.fid import NoTrainInceptionV3  # of the extra `train`

        super().__init__()
        if find_spec("torch_fidelity") is None:
            raise DiffusersDPMError('InceptionV3 needs torch-fidelity: pip install "diffusers-dpm[inception]"')
        path = str(find_inception_weights(weights))
        self.network = NoTrainInceptionV3("inception-v3-compat", [str(self.num_features)], path)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(to_rgb(images, "InceptionV3"))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of the 1008 classes, without bias, as the Inception Score takes them."""
        return features.to(self.network.fc.weight.device) @ self.network.fc.weight.T


def find_inception_weights(weights: str | Path | None = None, url: str = INCEPTION_URL) -> Path:
    """The file, or by default torch-fidelity's, which is fetched if it is not there."""
    name = url.rsplit("/", 1)[-1]
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / name)
    if path.is_file():
        return path
    if weights is not None:
        raise DiffusersDPMError(f"no weights of InceptionV3 at {path}: {name} is among the releases of torch-fidelity")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        raise DiffusersDPMError(f"the weights of InceptionV3 could not be fetched from {url} ({error})") from error
    return path


class TransformerFeatures(nn.Module):
    """uint8 images (B, C, H, W) -> what an image model of transformers makes of them, (B, num_features).

    They are prepared by the model's own processor, on the CPU. Features are the `pooler_output`, or the mean of
    `last_hidden_state` over tokens or positions where there is none or its weights are missing, as in checkpoints of
    `ViTForImageClassification`. Of a model of images and text they are those of its `vision_model`. Grey images are
    repeated to RGB.

    Args:
        where: folder or Hub id.

    Raises:
        DiffusersDPMError: no image model, no processor, or other weights are missing.
    """

    def __init__(self, where: str):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel  # slow to import
        from transformers.utils import logging

        refusal = f"{where} is not an image model of transformers, here or online"
        with user_error(refusal, OSError, ImportError), quiet(logging):  # what it would warn of is handled below
            # not torchvision's way to resize, which gives other features and may not be there
            self.process = AutoImageProcessor.from_pretrained(where, use_fast=False)
            model, loaded = AutoModel.from_pretrained(where, output_loading_info=True)
        missing = sorted(loaded["missing_keys"])
        if others := [key for key in missing if "pooler" not in key]:
            raise DiffusersDPMError(f"{where} lacks weights: {', '.join(others[:3])}")
        self.pooled = not missing
        self.network = getattr(model, "vision_model", model).float().eval()
        weights = [value for key, value in self.network.state_dict().items() if self.pooled or "pooler" not in key]
        probe = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        height, width = self.prepare(probe).shape[2:]
        self.name = f"{type(self.network).__name__} {fingerprint(weights)[:12]} at {height}x{width}"
        self.num_features = self(probe).shape[1]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """The network's input, float (B, 3, H', W')."""
        arrays = list(to_rgb(images, type(self.network).__name__).permute(0, 2, 3, 1).cpu().numpy())
        return self.process(arrays, input_data_format="channels_last", return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = self.network(self.prepare(images).to(next(self.parameters()).device))
        features = output.get("pooler_output") if self.pooled else None
        if features is None:
            hidden = output.last_hidden_state  # (B, tokens, C) or (B, C, H, W)
            features = hidden.mean(dim=1 if hidden.ndim == 3 else (2, 3))
        return features.flatten(1)


FeatureExtractor = ClassifierFeatures | InceptionFeatures | TransformerFeatures


def load_features(where: str, inception_weights: str | None = None) -> FeatureExtractor:
    """The extractor in a folder that `diffusers-dpm train-features` wrote, "inception", or a model of transformers.

    Args:
        where: folder, "inception", or the Hub id of a model of transformers.
        inception_weights: as `InceptionFeatures`.

    Raises:
        DiffusersDPMError: there is none; a classifier that was not trained for this.
    """
    if where == "inception":
        return InceptionFeatures(inception_weights)
    folder = Path(where)
    if (folder / FEATURES_FILE).is_file():
        return ClassifierFeatures(load_part(NoisyClassifier, where))
    config = folder / "config.json"
    if folder.exists() and not (config.is_file() and "model_type" in read_json(config)):
        need = f"no {FEATURES_FILE}, which 'diffusers-dpm train-features' writes, and no model of transformers"
        why = "A classifier for guidance will not do, it would grade its own work"
        raise DiffusersDPMError(f"{where} holds {need}. {why}")
    return TransformerFeatures(where)


def extract(extractor: FeatureExtractor, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """float32 (N, num_features) on the CPU.

    Raises:
        DiffusersDPMError: images with other channels than the extractor reads.
    """
    device = next(extractor.parameters()).device
    images = images.clone(memory_format=torch.contiguous_format)  # by their strides, convolutions round differently
    with user_error(extractor.name):
        return torch.cat([extractor(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, rounded."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        name: data set and split, in words.
        images: uint8 (N, C, H, W).
        features: float32 (N, num_features).
        hash: SHA-256 of the images.
    """

    name: str
    images: torch.Tensor
    features: torch.Tensor
    hash: str

    @classmethod
    def of(cls, name: str, images: torch.Tensor, extractor: FeatureExtractor, cache: Path) -> "Reference":
        """With the features from the folder `cache`, if it has those of the same images and extractor."""
        digest = fingerprint([images])
        path = cache / f"{digest[:16]}-{extractor.name.replace(' ', '-')}.safetensors"
        try:
            features = read_tensors(path)[1]["features"]
            whole = features.shape == (len(images), extractor.num_features) and bool(features.isfinite().all())
        except (DiffusersDPMError, KeyError):  # not there, or damaged
            whole = False
        if not whole:
            features = extract(extractor, images)
            cache.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {"features": features})
        return cls(name, images, features, digest)
