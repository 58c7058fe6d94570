"""Open a page in the browser on which samplers race and images are edited, for a run folder, a Hub id or any pipeline.

It needs gradio: pip install "diffusers-dpm[app]".
"""

from dataclasses import dataclass


@dataclass(kw_only=True)
class AppOptions:
    """page"""

    host: str = "127.0.0.1"
    """address to serve it at; 0.0.0.0 is for all who reach this machine"""
    port: int | None = None
    """port (default: the first free one from 7860)"""
    share: bool = False
    """open a public address, by a tunnel of gradio's"""
    cpu: bool = False
    """use the CPU even if there is an accelerator"""


def run(model: str, options: AppOptions) -> None:
    from diffusers_dpm.app import build_app

    build_app(model, options.cpu).launch(server_name=options.host, server_port=options.port, share=options.share)
