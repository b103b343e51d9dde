"""The VAE in tiles on several devices makes what it makes on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.models.test_vae import CONFIGS, fast_jit, make_vae
from wan_jax.media.codec import decode_function, encode_function
from wan_jax.models.vae import VAE
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.parallel.tiles import frame_mesh
from wan_jax.parameters import named_parameters
from wan_jax.runtime.offload import place

Sizes = tuple[int, int]


def inputs(vae: VAE, size: Sizes) -> tuple[jax.Array, np.ndarray]:
    """Two latent frames of that height and width, and a video of as many."""
    generator, config = np.random.default_rng(3), vae.config
    latents = generator.standard_normal((1, config.z_dim, 2, *size), np.float32)
    pixels = (side * config.spatial_stride for side in size)
    return jnp.asarray(latents), generator.integers(0, 256, (1 + config.temporal_stride, *pixels, 3), np.uint8)


@functools.cache
def decode_and_encode(name: str, size: Sizes, devices: int) -> tuple[np.ndarray, np.ndarray]:
    vae = make_vae(CONFIGS[name])
    latents, video = inputs(vae, size)

    def run(vae: VAE, latents: jax.Array, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        return vae.decode(latents), vae.encode(frames)

    if devices > 1:
        mesh = frame_mesh(jax.devices()[:devices], *size)
        run = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return tuple(map(np.asarray, fast_jit(run)(vae, latents, video[None] / np.float32(128) - 1)))


@pytest.mark.parametrize(
    ("name", "size", "devices"),
    [
        # Tiles of 3 and 2 rows of latents; of 2, 2, 1 and none at all.
        ("as_wan21", (5, 3), 2),
        ("as_wan22", (5, 3), 4),
        ("time_first", (2, 7), 4),  # columns: of 2, 2, 2 and 1
    ],
)
def test_tiles_give_the_frames_and_latents_of_one_device(name: str, size: Sizes, devices: int) -> None:
    results = zip(decode_and_encode(name, size, devices), decode_and_encode(name, size, 1), strict=True)
    for tiled, alone in results:
        assert tiled.shape == alone.shape
        assert np.abs(tiled - alone).max() < 1e-5 * np.abs(alone).max()  # sums in another order


def test_programs_step_by_step_on_three_devices_in_bfloat16() -> None:
    def run(placement: Placement) -> list[np.ndarray]:
        vae = make_vae(CONFIGS["one_halving"], jnp.bfloat16)
        latents, video = inputs(vae, (4, 3))
        vae = place(vae, dict.fromkeys(named_parameters(vae), placement.sharding()))
        decode, encode = decode_function(True, placement), encode_function(True, placement)
        first, cache = decode(vae, None, latents[:, :, :1])
        second, _ = decode(vae, cache, latents[:, :, 1:])
        third, cache = encode(vae, None, jnp.asarray(video[:1]))
        fourth, _ = encode(vae, cache, jnp.asarray(video[1:]))
        return [np.asarray(x) for x in (first[0], second[0], third, fourth)]

    for tiled, alone in zip(run(Placement.over(MeshSpec(ring=3))), run(Placement()), strict=True):
        assert tiled.shape == alone.shape
        assert tiled.dtype == alone.dtype
        difference = np.abs(tiled.astype(np.float32) - alone)
        # Tiles take more frames at once, so that sums over time are rounded less often: measured 0.11 levels of a pixel
        # on average, and 0.4 % of the largest latent.
        assert difference.mean() < 0.2 if alone.dtype == np.uint8 else difference.max() < 1e-2 * np.abs(alone).max()
