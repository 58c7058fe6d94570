"""How noisy is sliced score matching, beside denoising score matching, which has the same expectation?

    diffusers-dpm train --data digits --output-dir runs/digits
    python benchmarks/score_matching.py runs/digits  # writes results/score_matching.{json,md}

The variance of the gradient is the trace of its covariance, of one image with one draw of noise (and of probes), from
batches. Both losses see the same images and noise. A network of the noise or of the score, in evaluation mode.
"""

import math
from typing import Any

import torch
from common import make_parser, parse, save, show, table, versions

from diffusers_dpm.data import load_images
from diffusers_dpm.networks import load_pipeline, noise_schedule_of
from diffusers_dpm.training import DenoisingLoss


LAMBDAS = (3.0, 1.0, 0.0, -1.0, -2.0)  # log(alpha / sigma), from little noise to much
NAMES = {"l2": "denoising", "sliced": "sliced"}


def variances(loss: DenoisingLoss, unet: Any, images: torch.Tensor, t: torch.Tensor, size: int) -> dict[str, float]:
    """Variance of value and of gradient for one image, and the squared length of the mean gradient.

    Args:
        images: (N, C, H, W), in batches of `size`, each with noise of its own.
        t: (N,).
    """
    parameters, values = list(unet.parameters()), []
    total, squares, batches = [torch.zeros_like(p) for p in parameters], 0.0, len(images) // size
    for number, (x0, times) in enumerate(zip(images.split(size), t.split(size), strict=True)):
        torch.manual_seed(number)  # noise, then probes
        losses = loss(unet, x0, times, torch.randn_like(x0))
        gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True, materialize_grads=True)
        values.append(losses.detach())
        squares += sum(gradient.square().sum().item() for gradient in gradients)
        torch._foreach_add_(total, gradients)
    of_mean = sum((part / batches).square().sum().item() for part in total)
    of_batch = (squares / batches - of_mean) * batches / (batches - 1)
    signal = max(of_mean - of_batch / batches, 0.0)  # without what the noise adds
    return {"value": torch.cat(values).var().item(), "gradient": size * of_batch, "signal": signal}


def measure(arguments: Any) -> list[dict[str, Any]]:
    pipeline = load_pipeline(str(arguments.run), any_process=True)
    unet, schedule = pipeline.unet.eval(), noise_schedule_of(pipeline.scheduler)
    prediction, size = pipeline.scheduler.config.get("prediction_type") or "epsilon", arguments.batch_size
    prediction = "score" if getattr(schedule, "kind", "vp") == "ve" else prediction
    data, batches = load_images("digits"), 2 if arguments.smallest else arguments.batches
    order = torch.randint(len(data), (size * batches,), generator=torch.Generator().manual_seed(0))
    images, rows = data[order.tolist()]["images"], []
    for lambda_ in LAMBDAS[:1] if arguments.smallest else LAMBDAS:
        t = schedule.timestep_of(torch.tensor([lambda_], dtype=torch.float64)).expand(len(images))
        t = t.round().long() if schedule.is_discrete else t.float()
        row: dict[str, Any] = {"lambda": lambda_, "t": t[0].item()}
        for loss_type, name in NAMES.items():
            row[name] = variances(DenoisingLoss(schedule, prediction, loss_type), unet, images, t, size)
        rows.append(row)
        print(row, flush=True)
    return rows


def markdown(rows: list[dict[str, Any]], arguments: Any) -> str:
    lines = []
    for row in rows:
        denoising, sliced = row["denoising"], row["sliced"]
        values = [row["lambda"], row["t"], denoising["value"], sliced["value"], denoising["gradient"]]
        values += [sliced["gradient"], sliced["gradient"] / (denoising["gradient"] or math.nan)]
        lines.append([f"{value:.3g}" for value in values])
    head = [
        "log(alpha / sigma)",
        "t",
        "loss, denoising",
        "loss, sliced",
        "gradient, denoising",
        "gradient, sliced",
        "ratio",
    ]
    about = f"Of one image, for the digits network of {arguments.run.name}."
    return f"# Variance of denoising and of sliced score matching\n\n{about}\n\n{table(head, lines)}\n"


def main() -> None:
    numbers = {"batches": (64, "batches at each level"), "batch_size": (16, "images in a batch")}
    arguments = parse(make_parser(__doc__, "score_matching.json", "run of the digits", **numbers))
    rows = measure(arguments)
    save(arguments.output, {"versions": versions(), "rows": rows})
    show(arguments, markdown(rows, arguments))


if __name__ == "__main__":
    main()
