"""Wan2.2-T2V-A14B with LightX2V's distilled LoRAs at 1280x720: four steps, two of each expert, no guidance.

Four forwards instead of eighty, at timesteps 1000, 937.5, 833.3 and 625. Other strengths or files, or more steps of one
expert (low-noise expert first):
--config.lora_high='("FILE:0.8",)' --config.lora_low='("FILE",)' --config.steps=4,2
"""

from ml_collections import ConfigDict

from wan_jax import recipe


def get_config() -> ConfigDict:
    config = recipe("t2v-a14b-4step")
    config.prompt = "Two cats in boxing gear and bright gloves fight on a spotlighted stage."
    return config
