"""Training: a loop for any loss, and what fine-tuning a denoiser needs around it."""

import importlib.util

from wan_jax.errors import InputError

REQUIREMENTS = ("optax", "grain", "tensorboardX")  # beside the package's own; the extra "train"


def check_installed() -> None:
    """Raises InputError where something that training needs is missing."""
    for name in REQUIREMENTS:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"training needs {name}; pip install 'wan_jax[train]'")
