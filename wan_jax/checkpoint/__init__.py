"""Checkpoints: every published layout in, Orbax, diffusers and the official layout out; no PyTorch."""

from wan_jax.checkpoint.api import Checkpoint, CheckpointInfo, ComponentInfo, open_checkpoint
from wan_jax.checkpoint.convert import ConversionSummary, convert, verify
from wan_jax.checkpoint.memory import memory_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "ComponentInfo",
    "ConversionSummary",
    "convert",
    "memory_checkpoint",
    "open_checkpoint",
    "verify",
]
