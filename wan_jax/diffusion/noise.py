"""The Gaussian noise from which a video starts: a function of the seed alone."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.errors import InputError


def initial_noise(seed: int, shape: tuple[int, ...], kind: str = "jax") -> jax.Array:
    """Draws one video's initial latents from a standard normal distribution.

    Args:
      seed: 0 <= seed < 2**64. A batch of videos stacks one call for each seed.
      shape: [C, F, h, w] of the latents.
      kind: "jax" (threefry), or "torch": what `torch.randn(shape, generator=torch.Generator().manual_seed(seed))` gives
        on a CPU, to about 1e-6. Like PyTorch's CPU generator, "torch" uses the low 32 bits of the seed only.

    Returns:
      float32 array of `shape`.

    Raises:
      InputError: unknown kind, seed out of range, or fewer than 16 elements with kind "torch".
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"seed {seed} is out of range; choose one from 0 to 2**64 - 1")
    if kind == "jax":
        return _threefry_normal(seed, shape)
    if kind == "torch":
        return jnp.asarray(_torch_normal(seed, prod(shape)).reshape(shape))
    raise InputError(f"unknown noise kind {kind!r}; use 'jax' or 'torch'")


def _threefry_normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    # The key is spelled out because jax.random.key(seed) drops the high 32 bits unless 64-bit types are enabled, and
    # the generator is pinned because both its kind and its algorithm are global settings.
    words = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    with jax.threefry_partitionable(True):
        return jax.random.normal(jax.random.wrap_key_data(words, impl="threefry2x32"), shape, jnp.float32)


def _torch_normal(seed: int, size: int) -> np.ndarray:
    """Float32 normals from MT19937 as PyTorch's CPU kernel makes them (ATen DistributionTemplates.h, normal_fill)."""
    if size < 16:  # PyTorch has another algorithm for these
        raise InputError(f"noise kind 'torch' needs at least 16 elements, not {size}; use kind 'jax'")
    generator = np.random.RandomState(seed & 0xFFFFFFFF)  # MT19937 with the classic seeding

    def normals(count: int) -> np.ndarray:
        """Box-Muller over groups of 16 uniforms: 8 radii, then 8 angles."""
        words = np.frombuffer(generator.bytes(4 * count), "<u4")
        uniform = (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)  # exact: 24 bits
        radius_uniform, angle_uniform = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
        # The angle is rounded to float32 as in PyTorch; the functions run in float64, so that every host agrees.
        angle = (np.float32(2 * np.pi) * angle_uniform).astype(np.float64)
        radius = np.sqrt(-2 * np.log(1 - radius_uniform.astype(np.float64)))
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)  # [groups, 2, 8]
        return pairs.reshape(-1).astype(np.float32)

    # PyTorch draws a uniform for every element; where 16 does not divide the size, the last 16 elements are then
    # replaced by a fresh group.
    whole, rest = divmod(size, 16)
    noise = normals(16 * whole)
    if rest:
        generator.bytes(4 * rest)
        noise = np.concatenate([noise[: size - 16], normals(16)])
    return noise
