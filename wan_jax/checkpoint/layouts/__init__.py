"""The layouts in which Wan checkpoints come, a file each.

A new layout is a file beside these with a `Layout` (base.py), and its entry in LAYOUTS. A layout with names of its own
gives tensors the names of a column of the tables (checkpoint/tables) as it opens them, as `ComfyFile` does.
"""

from pathlib import Path

from wan_jax.checkpoint.layouts.base import Layout
from wan_jax.checkpoint.layouts.comfyui import ComfyUILayout
from wan_jax.checkpoint.layouts.diffusers import DiffusersLayout
from wan_jax.checkpoint.layouts.official import OfficialLayout
from wan_jax.checkpoint.layouts.wan_jax import WanJaxLayout
from wan_jax.errors import InputError

# In the order in which they are asked: those with a file that names the layout first.
LAYOUTS: tuple[Layout, ...] = (WanJaxLayout(), DiffusersLayout(), OfficialLayout(), ComfyUILayout())
WRITABLE = {layout.name: layout for layout in LAYOUTS if layout.writes}
INCOMPLETE = "CONVERSION_INCOMPLETE"  # a file that marks what a conversion has not finished


def recognise(path: Path) -> Layout:
    """The layout of a folder or file. Raises InputError for anything that is no checkpoint."""
    if (path / INCOMPLETE).exists():
        raise InputError(f"{path}: left by an interrupted conversion; convert again (which removes it) or remove it")
    for layout in LAYOUTS:
        if layout.recognises(path):
            return layout
    if path.is_file():
        raise InputError(f"{path}: a single file must be .safetensors; otherwise give the checkpoint's folder")
    raise InputError(
        f"{path}: not a checkpoint that wan_jax knows (its own, the official tree, a diffusers tree or ComfyUI files)"
    )
