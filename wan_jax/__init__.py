"""Wan text-to-video and image-to-video models in JAX and Flax.

    from wan_jax import WanPipeline

    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.2-T2V-A14B", dtype="bfloat16")
    pipe("a cat boxes", size=(832, 480)).save("cat.mp4")

Everything public is named here; modules load when their names are first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wan_jax.config import PerExpert, WanConfig
    from wan_jax.errors import InputError
    from wan_jax.lora import Lora
    from wan_jax.media.video import Video, read_video
    from wan_jax.pipeline import WanPipeline
    from wan_jax.presets import PRESETS, get_preset

__version__ = "0.1.0"

_HOMES = {
    "PRESETS": "wan_jax.presets",
    "PerExpert": "wan_jax.config",
    "WanConfig": "wan_jax.config",
    "get_preset": "wan_jax.presets",
    "InputError": "wan_jax.errors",
    "Lora": "wan_jax.lora",
    "WanPipeline": "wan_jax.pipeline",
    "Video": "wan_jax.media.video",
    "read_video": "wan_jax.media.video",
}
__all__ = [
    "PRESETS",
    "InputError",
    "Lora",
    "PerExpert",
    "Video",
    "WanConfig",
    "WanPipeline",
    "get_preset",
    "read_video",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'wan_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
