"""Do converted networks compute what the papers' own do, and have they as many parameters?

    python -m benchmarks.conversions     # from the root of the repository; writes results/conversions.{json,md}

The originals are those of tests/original_networks.py, built from the flags in the repositories' READMEs at full width,
with random weights: the published weights are not here. U-Nets see images of 32x32 (64x64 where they halve them six
times), classifiers those of their own size. The figures are the largest differences of any value, in float32; of the
gradient by the image, divided by its largest value.
"""

import gc
from dataclasses import replace
from functools import partial

import torch
from tqdm.auto import tqdm

from benchmarks.common import Results, make_parser, parse, show, table
from diffusers_dpm.conversion.convert import architecture_of, convert_weights
from diffusers_dpm.conversion.options import ConvertOptions
from tests.original_networks import PUBLISHED, HoUNet, OpenAIClassifier, randomised


LARGEST_SIDE = 32  # of U-Nets, but for those with more levels
NARROW = {"num_channels": 64, "num_res_blocks": 1}  # for --smallest
VALUES = ("epsilon", "variance", "logits", "gradient")
TIMES = torch.tensor([612.5])


def original(name, smallest):
    """(class, flags, options of the conversion) of a published network, or of a narrow one of its kind."""
    cls, flags = PUBLISHED[name]
    if not smallest:
        return cls, flags, ConvertOptions()
    flags = replace(flags, **NARROW, classes=flags.classes and 3)
    options = ConvertOptions(resolution=flags.image_size)
    if cls is not HoUNet:
        options.attention_head_dim = flags.num_head_channels
        options.num_attention_heads = None if flags.num_head_channels else flags.num_heads
        options.qkv_order = "new" if flags.use_new_attention_order else "legacy"
    return cls, flags, options


def count(name, smallest):
    """Parameters on both sides, without numbers in them."""
    cls, flags, options = original(name, smallest)
    with torch.device("meta"):
        network = cls(flags)
    found = architecture_of({key: tuple(value.shape) for key, value in network.state_dict().items()}, options)
    return {"class": found.cls.__name__, "original": parameters(network), "converted": parameters(found.build())}


def parameters(network):
    return sum(weight.numel() for weight in network.parameters())


def compare(name, smallest):
    """The largest differences, and the standard deviation of what the original returns."""
    cls, flags, options = original(name, smallest)
    network = randomised(cls(flags))
    converted = convert_weights(network.state_dict(), options).network
    side = flags.image_size if cls is OpenAIClassifier else max(LARGEST_SIDE, 2 ** (len(flags.widths) - 1))
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    difference = classifier_differences if cls is OpenAIClassifier else unet_differences
    return {"side": side, **difference(network, converted, x)}


@torch.no_grad()
def unet_differences(network, converted, x):
    labels = torch.tensor([1]) if hasattr(network, "label_emb") else None
    expected = network(x, TIMES) if labels is None else network(x, TIMES, labels)
    difference = (converted(x, TIMES, class_labels=labels).sample - expected).abs()
    found = {"std": expected.std().item(), "epsilon": difference[:, :3].max().item()}
    return found | ({"variance": difference[:, 3:].max().item()} if difference.shape[1] == 6 else {})


def classifier_differences(network, converted, x):
    logits, gradients = [], []
    for model in (network, lambda x, t: converted(x, t).logits):
        x = x.detach().requires_grad_()
        logits.append(model(x, TIMES))
        gradients.append(torch.autograd.grad(logits[-1].log_softmax(dim=1)[:, 1].sum(), x)[0])
    found = {"std": logits[0].std().item(), "logits": (logits[1] - logits[0]).abs().max().item()}
    return found | {"gradient": ((gradients[1] - gradients[0]).abs().max() / gradients[0].abs().max()).item()}


ABOUT = """
The numbers of parameters are also those of the networks that the authors' code builds (guided-diffusion 22e0df8,
improved-diffusion 1bc7bbb, pytorch_diffusion 304bdff; compared once, by hand, as were the outputs of narrow ones:
6e-6 at most). In print, improved-diffusion's README says 270M of `improved-imagenet64-classes`.
"""


def markdown(counts, differences):
    lines = []
    for row in counts:
        measured = differences.get(row["network"], {})
        found = [f"{measured[key]:.0e}" if key in measured else "" for key in VALUES]
        numbers = [f"{row['original']:,}", f"{row['converted']:,}"]
        lines.append([f"`{row['network']}`", f"`{row['class']}`", *numbers, *found])
    return table(["network", "class", "parameters, original", "converted", *VALUES], lines) + "\n" + ABOUT


def main():
    arguments = parse(make_parser(__doc__, "conversions.json"))
    small = arguments.smallest
    results, differences = Results(arguments.output, {"smallest": small}), {}
    names = list(PUBLISHED)[:: 5 if small else 1]
    counts = [results.row("parameters", {"network": name}, partial(count, name, small)) for name in names]
    for name in tqdm(sorted(names, key=lambda name: PUBLISHED[name][1].image_size), unit="network"):
        differences[name] = results.row("differences", {"network": name}, partial(compare, name, small))
        gc.collect()
    show(arguments, markdown(counts, differences))


if __name__ == "__main__":
    main()
