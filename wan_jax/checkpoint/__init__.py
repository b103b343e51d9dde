"""Checkpoints: every published layout in, Orbax, diffusers and the official layout out; no PyTorch."""

from wan_jax.checkpoint.checkpoint import Checkpoint, CheckpointInfo, ComponentInfo, open_checkpoint
from wan_jax.checkpoint.convert import ConversionSummary, convert

__all__ = ["Checkpoint", "CheckpointInfo", "ComponentInfo", "ConversionSummary", "convert", "open_checkpoint"]
