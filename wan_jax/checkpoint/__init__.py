"""Checkpoints: every published layout in, Orbax, diffusers and the official layout out; no PyTorch."""

from wan_jax.checkpoint.checkpoint import Checkpoint, CheckpointInfo, ComponentInfo, open_checkpoint

__all__ = ["Checkpoint", "CheckpointInfo", "ComponentInfo", "open_checkpoint"]
