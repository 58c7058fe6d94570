"""Convert a checkpoint of guided-diffusion, improved-diffusion or Ho et al.'s DDPM into a run folder of diffusers.

The weights' names and shapes tell the architecture. What they do not tell are options; their defaults are those of the
published network of the same shapes, if there is one. A classifier goes beside the pipeline in OUTPUT.
"""

from diffusers_dpm.conversion.options import ConvertOptions


def run(checkpoint: str, output: str, options: ConvertOptions) -> None:
    from diffusers_dpm.conversion.convert import convert

    converted = convert(checkpoint, output, options)
    network = converted.network
    shapes = f"with the shapes of {converted.published}" if converted.published else "of no published shapes"
    print(f"{converted.family} {shapes}: {type(network).__name__} with {network.num_parameters():,} parameters")
    if converted.scheduler is not None:
        about = converted.scheduler.config
        shape = "1000 levels of a longer schedule" if about.trained_betas else about.beta_schedule
        print(f"process: T={about.num_train_timesteps}, {shape}, {about.variance_type}; see --help for what to change")
    print(f"written to {output}")
