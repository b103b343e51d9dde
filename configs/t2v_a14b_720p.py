"""Wan2.2-T2V-A14B at 1280x720, 81 frames: the preset's own size and steps."""

from ml_collections import ConfigDict

from wan_jax import recipe


def get_config() -> ConfigDict:
    config = recipe()
    config.checkpoint = "Wan-AI/Wan2.2-T2V-A14B"
    config.prompt = "Two cats in boxing gear and bright gloves fight on a spotlighted stage."
    return config
