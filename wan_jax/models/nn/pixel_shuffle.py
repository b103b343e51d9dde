"""Frames and pixels moved into channels and back: what the Wan2.2 VAE has besides convolutions (wan/modules/vae2_2.py).

No function has parameters. Activations are channels-last: [batch, time, height, width, channels].
"""

import jax
import jax.numpy as jnp
from einops import rearrange, reduce


def pixel_unshuffle(x: jax.Array, size: int) -> jax.Array:
    """[B, T, H, W, C] -> [B, T, H / size, W / size, C * size^2], the pixels of a square column by column."""
    if size == 1:
        return x
    return rearrange(x, "b t (h row) (w column) c -> b t h w (c column row)", row=size, column=size)


def pixel_shuffle(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `pixel_unshuffle`."""
    if size == 1:
        return x
    return rearrange(x, "b t h w (c column row) -> b t (h row) (w column) c", row=size, column=size)


def avg_down_3d(x: jax.Array, channels: int, *, time: int, space: int) -> jax.Array:
    """[B, T, H, W, C] -> [B, T / time, H / space, W / space, channels] in float32: the original's AvgDown3D.

    Moves blocks of frames and pixels into channels and takes the mean of each group of consecutive channels. A single
    first frame is paired with zeros before it.
    """
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)])
    x = rearrange(x, "b (t a) (h row) (w column) c -> b t h w (c a row column)", a=time, row=space, column=space)
    return reduce(x, "b t h w (c group) -> b t h w c", "mean", c=channels)


def dup_up_3d(x: jax.Array, channels: int, *, time: int, space: int) -> jax.Array:
    """[B, T, H, W, C] -> [B, time * T, space * H, space * W, channels]: the original's DupUp3D.

    Repeats channels and moves them to blocks of frames and pixels.
    """
    x = jnp.repeat(x, channels * time * space**2 // x.shape[-1], axis=-1)
    return rearrange(x, "b t h w (c a row column) -> b (t a) (h row) (w column) c", a=time, row=space, column=space)
