"""Wan2.2-I2V-A14B with LightX2V's distilled LoRAs: four steps, two of each expert, no guidance.

Give the picture: --config.image=first.png. The video has its shape, with the area of 1280x720.
"""

from ml_collections import ConfigDict

from wan_jax import recipe


def get_config() -> ConfigDict:
    config = recipe("i2v-a14b-4step")
    config.prompt = "The camera moves slowly towards the scene while everything in it comes alive."
    return config
