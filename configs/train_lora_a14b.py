"""A LoRA of Wan2.2-T2V-A14B's low-noise expert at 832x480, 33 frames: fits a GPU of 80 GB.

For the other expert, `--config.experts=high_noise` with another output.
"""

from ml_collections import ConfigDict

from wan_jax.cli.train import train_recipe


def get_config() -> ConfigDict:
    config = train_recipe()
    config.checkpoint = "Wan-AI/Wan2.2-T2V-A14B"
    config.output = "outputs/train_lora_a14b_low_noise"
    config.experts = "low_noise"
    config.data.folder = "videos"
    config.data.buckets = "832x480x33,480x832x33,624x624x33"
    config.data.batch_size = 4
    config.lora.rank = 32
    config.lora.alpha = 32.0
    config.trainer.accumulation = 4
    config.trainer.steps = 2000
    config.trainer.save_every = 250
    config.trainer.ema_decay = 0.99
    config.trainer.optimizer.learning_rate = 2e-4
    config.trainer.optimizer.schedule = "constant"
    return config
