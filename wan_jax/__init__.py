"""Wan text-to-video and image-to-video models in JAX and Flax.

    import wan_jax

    wan_jax.configure()  # before JAX starts: use all of a GPU's memory
    pipe = wan_jax.WanPipeline.from_pretrained("Wan-AI/Wan2.2-T2V-A14B", dtype="bfloat16")
    pipe("a cat boxes", size=(832, 480)).save("cat.mp4")

Everything public is named here; modules load when their names are first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wan_jax.cli.recipes import recipe
    from wan_jax.config import PerExpert, WanConfig
    from wan_jax.diffusion.params import SamplingParams
    from wan_jax.diffusion.state import SamplingState
    from wan_jax.errors import Cancelled, InputError
    from wan_jax.generation.sampler import Result
    from wan_jax.lora import Lora
    from wan_jax.media.video import Video, read_video
    from wan_jax.pipeline import WanPipeline
    from wan_jax.presets import PRESETS, get_preset
    from wan_jax.runtime.events import CancelToken, StepDone
    from wan_jax.runtime.xla_flags import configure

__version__ = "0.1.0"

_HOMES = {
    "CancelToken": "wan_jax.runtime.events",
    "Cancelled": "wan_jax.errors",
    "InputError": "wan_jax.errors",
    "Lora": "wan_jax.lora",
    "PRESETS": "wan_jax.presets",
    "PerExpert": "wan_jax.config",
    "Result": "wan_jax.generation.sampler",
    "SamplingParams": "wan_jax.diffusion.params",
    "SamplingState": "wan_jax.diffusion.state",
    "StepDone": "wan_jax.runtime.events",
    "Video": "wan_jax.media.video",
    "WanConfig": "wan_jax.config",
    "WanPipeline": "wan_jax.pipeline",
    "configure": "wan_jax.runtime.xla_flags",
    "get_preset": "wan_jax.presets",
    "read_video": "wan_jax.media.video",
    "recipe": "wan_jax.cli.recipes",
}
__all__ = [  # noqa: RUF022 (mypy needs them spelled out)
    "CancelToken",
    "Cancelled",
    "InputError",
    "Lora",
    "PRESETS",
    "PerExpert",
    "Result",
    "SamplingParams",
    "SamplingState",
    "StepDone",
    "Video",
    "WanConfig",
    "WanPipeline",
    "configure",
    "get_preset",
    "read_video",
    "recipe",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'wan_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
