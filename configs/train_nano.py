"""The nano model, from nothing: `wan-jax train --config configs/train_nano.py [--config.stages=text=60,vae=400]`.

The defaults are for one H200. Two GPUs train the experts side by side, each in a process of its own
(CUDA_VISIBLE_DEVICES) with --config.experts=high_noise or low_noise and the same output.
"""

from ml_collections import ConfigDict

from wan_nano.recipe import nano_recipe


def get_config() -> ConfigDict:
    config = nano_recipe()
    config.output = "outputs/train_nano"
    config.stages = "text=60,vae=400,experts=800,decoder=100"
    return config
