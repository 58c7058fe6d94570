"""Options as a command line."""

from diffusers_dpm.options import flag


def as_arguments(options):
    """--name=value for each option that is not None, --name value ... for a list, --name or --no-name for a flag."""
    arguments = []
    for name, value in vars(options).items():
        if isinstance(value, bool):
            arguments.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, list):
            arguments += [flag(name), *map(str, value)]
        elif value is not None:
            arguments.append(f"{flag(name)}={value}")
    return arguments
