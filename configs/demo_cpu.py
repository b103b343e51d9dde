"""The demo model (random weights) at a size that any CPU does in seconds."""

from ml_collections import ConfigDict

from wan_jax import recipe


def get_config() -> ConfigDict:
    config = recipe()
    config.prompt = "a red circle moves right"
    config.size = "96x64"
    config.frames = 17
    config.steps = "4"
    config.dtype = "float32"
    return config
