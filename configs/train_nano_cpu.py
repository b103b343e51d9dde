"""The nano model with small batches, to see on a CPU that everything runs: no videos worth watching come of it."""

from ml_collections import ConfigDict

from wan_nano.recipe import nano_recipe


def get_config() -> ConfigDict:
    config = nano_recipe(small=True)
    config.output = "outputs/train_nano_cpu"
    config.stages = "text=60,vae=60,experts=60,decoder=60"
    return config
