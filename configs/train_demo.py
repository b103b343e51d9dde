"""Trains the small model that ships with the package for a few steps, on any machine.

All it needs is a folder of videos with metadata.jsonl: --config.data.folder=videos
"""

from ml_collections import ConfigDict

from wan_jax.cli.train import train_recipe


def get_config() -> ConfigDict:
    config = train_recipe()
    config.output = "outputs/train_demo"
    config.dtype = "float32"
    config.data.buckets = "96x64x17,64x96x17"
    config.data.batch_size = 4
    config.trainer.steps = 20
    config.trainer.save_every = 10
    config.trainer.log_every = 5
    config.trainer.optimizer.warmup_steps = 5
    return config
