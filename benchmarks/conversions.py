"""Do converted networks compute what the papers' own do, and have they as many parameters?

    python -m benchmarks.conversions     # from the root of the repository; writes results/conversions.{json,md}

The originals are those of tests/original_networks.py, built from the flags in the repositories' READMEs at full width,
with random weights: the published weights are not here. U-Nets see images of 32x32 (64x64 where they halve them six
times), classifiers those of their own size. The figures are the largest differences of any value, in float32; of the
gradient by the image, divided by its largest value.
"""

import gc
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from benchmarks.common import Results, make_parser, parse, show, table
from diffusers_dpm.conversion.convert import convert_weights
from diffusers_dpm.conversion.options import ConvertOptions
from tests.original_networks import PUBLISHED, OpenAIClassifier, randomised


LARGEST_SIDE = 32  # of U-Nets, but for those with more levels
NARROW = {"num_channels": 64, "num_res_blocks": 1, "classes": 3}  # for --smallest
TIMES = torch.tensor([612.5])


def measure(name, smallest):
    cls, flags = PUBLISHED[name]
    options = ConvertOptions()
    if smallest:
        narrow = NARROW if flags.classes else {**NARROW, "classes": None}
        flags = replace(flags, **narrow)
        heads = "attention_head_dim" if flags.num_head_channels else "num_attention_heads"
        if cls.__name__.startswith("OpenAI"):
            options = ConvertOptions(**{heads: flags.num_head_channels or flags.num_heads})
        options.resolution = flags.image_size
        options.qkv_order = "new" if flags.use_new_attention_order else "legacy"
    network = randomised(cls(flags))
    converted = convert_weights(network.state_dict(), options).network
    side = flags.image_size if cls is OpenAIClassifier else max(LARGEST_SIDE, 2 ** (len(flags.widths) - 1))
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    row = {"class": type(converted).__name__, "side": side}
    row |= {"original_parameters": parameters(network), "parameters": parameters(converted)}
    return row | (classifier_differences if cls is OpenAIClassifier else unet_differences)(network, converted, x)


def parameters(network):
    return sum(weight.numel() for weight in network.parameters())


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


def markdown(rows):
    lines = []
    for row in rows:
        numbers = [f"{row[key]:.0e}" if key in row else "" for key in ("epsilon", "variance", "logits", "gradient")]
        counts = [f"{row[key]:,}" for key in ("original_parameters", "parameters")]
        lines.append([f"`{row['network']}`", f"`{row['class']}`", *counts, *numbers])
    return (
        table(
            ["network", "class", "parameters, original", "converted", "noise", "variance", "logits", "gradient"], lines
        )
        + "\n"
    )


def main():
    parser = make_parser(__doc__, "conversions.json")
    arguments = parse(parser)
    results = Results(arguments.output, {"smallest": arguments.smallest})
    names, rows = list(PUBLISHED)[:: 5 if arguments.smallest else 1], []
    for name in tqdm(names, unit="network"):
        rows.append(results.row("rows", {"network": name}, lambda name=name: measure(name, arguments.smallest)))
        gc.collect()
    show(arguments.output, markdown(rows))


if __name__ == "__main__":
    main()
