"""Trains the classifier that `measure` judges with: python -m wan_nano.train_classifier."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wan_nano.classifier import CROP, WEIGHTS, WIDTHS, Classifier, log_probabilities
from wan_nano.digits import digit_atlas
from wan_nano.measure import OPAQUE, crop
from wan_nano.render import draw_opacities
from wan_nano.scenes import KINDS


def init(seed: int) -> dict[str, jax.Array]:
    generator = np.random.default_rng(seed)
    parameters: dict[str, np.ndarray] = {}
    for index, (before, after) in enumerate(itertools.pairwise(WIDTHS)):
        kernel = generator.standard_normal((3, 3, before, after)) * (2 / (9 * before)) ** 0.5
        parameters |= {f"conv_{index}.kernel": kernel, f"conv_{index}.bias": np.zeros(after)}
    features = WIDTHS[-1] * (CROP >> (len(WIDTHS) - 1)) ** 2
    parameters["head.kernel"] = generator.standard_normal((features, len(KINDS))) * features**-0.5
    parameters["head.bias"] = np.zeros(len(KINDS))
    return {name: jnp.asarray(array, jnp.float32) for name, array in parameters.items()}


def make_crops(seed: int, atlas: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Labelled crops of clean objects, part of them blurred and noisy as decoded videos are."""
    generator = np.random.default_rng(seed)
    kinds = generator.integers(0, len(KINDS), number)
    opacities = np.array(draw_opacities(jax.random.key(seed), jnp.asarray(kinds), jnp.asarray(atlas)))
    blur = generator.random((number, 1, 1)).astype(np.float32) * 0.5
    for axis in (1, 2):
        opacities = (1 - blur) * opacities + blur / 2 * (np.roll(opacities, 1, axis) + np.roll(opacities, -1, axis))
    noise = generator.standard_normal(opacities.shape, np.float32) * 0.08 * generator.random((number, 1, 1), np.float32)
    opacities = np.clip(opacities + noise * (opacities > 0.02), 0, 1)
    opacities[opacities < OPAQUE] = 0
    return np.stack([crop(one) for one in opacities]), kinds


def train(
    crops: np.ndarray, kinds: np.ndarray, *, steps: int = 2000, batch: int = 128, seed: int = 0, rate: float = 2e-3
) -> Classifier:
    """AdamW on cross-entropy."""
    parameters = init(seed)
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=1e-3)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, state, crops, kinds):
        def loss(parameters):
            return -jnp.take_along_axis(log_probabilities(parameters, crops), kinds[:, None], axis=1).mean()

        updates, state = optimizer.update(jax.grad(loss)(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    state = optimizer.init(parameters)
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        index = generator.integers(0, len(crops), batch)
        parameters, state = step(parameters, state, crops[index], kinds[index])
    return Classifier({name: np.asarray(array) for name, array in parameters.items()})


def main() -> None:
    """Trains the judge and reports its accuracy on handwriting that it never saw."""
    judge = train(*make_crops(0, digit_atlas(), 40_000), steps=4000)
    judge.save()
    judge = Classifier.load()
    crops, kinds = make_crops(1, digit_atlas(test=True), 8000)
    right = judge(crops).argmax(axis=1) == kinds
    digits = kinds >= KINDS.index("0")
    print(f"shapes {right[~digits].mean():.2%}  digits {right[digits].mean():.2%}  {WEIGHTS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
