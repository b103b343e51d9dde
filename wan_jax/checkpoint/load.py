"""Models of a checkpoint, each loaded straight to where it will wait."""

from collections.abc import Collection
from functools import partial
from typing import Any

from wan_jax.checkpoint.api import Checkpoint
from wan_jax.errors import InputError
from wan_jax.models.build import abstract_model, build_model
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import with_parameters
from wan_jax.runtime.events import Run
from wan_jax.text.tokenizer import Tokenizer


def load_models(
    checkpoint: Checkpoint,
    components: Collection[str] | None,
    dtype: str,
    vae_dtype: str,
    placement: Placement,
    run: Run,
) -> dict[str, Any]:
    """Loads components ("vae", "high_noise", ...) where the placement lets them wait; `run` is told of every tensor.

    None loads all that there are. Raises InputError where one is missing, or one that a pipeline needs.
    """
    needed = ("text_encoder", "vae", *checkpoint.config.experts) if components is None else components
    for component in needed:  # before any is loaded
        checkpoint.part(component)
    by_expert = placement.by_expert(checkpoint.config.experts)
    dtypes = {"vae": vae_dtype, "image_encoder": "float32"}  # the official code has float16 for the latter
    models = {}
    for component in components or checkpoint.components:
        config = checkpoint.config.model(component)
        places = by_expert.get(component, placement).model_shardings(config, abstract_model(config))
        with run.transfers("load") as report:
            arrays = checkpoint.load(component, dtype, places, report, vae_dtype=vae_dtype)
        models[component] = with_parameters(partial(build_model, config, dtypes.get(component, dtype)), arrays)
    return models


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Raises InputError where the checkpoint has none."""
    if checkpoint.tokenizer_folder is None:
        raise InputError(f"{checkpoint.path} holds no tokenizer; put the folder of google/umt5-xxl beside its files")
    vocab_size = checkpoint.config.text_encoder.vocab_size if "text_encoder" in checkpoint.parts else None
    return Tokenizer.from_pretrained(checkpoint.tokenizer_folder, vocab_size=vocab_size)
