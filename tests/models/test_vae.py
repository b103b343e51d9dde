"""The VAE that streams over time, against the same network written over the whole sequence."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from wan_jax.config import VAEConfig
from wan_jax.models.nn.causal_conv import overlap_add
from wan_jax.models.vae import VAE
from wan_jax.parameters import abstract_parameters, named_parameters, with_parameters


def vae_config(
    z_dim: int, base_dim: int, dim_mult: tuple[int, ...], temporal: tuple[bool, ...], **changes
) -> VAEConfig:
    return VAEConfig(
        z_dim=z_dim,
        base_dim=base_dim,
        dim_mult=dim_mult,
        num_res_blocks=1,
        temporal_downsample=temporal,
        latents_mean=tuple(np.linspace(-0.5, 0.7, z_dim).tolist()),
        latents_std=tuple(np.linspace(0.8, 2.5, z_dim).tolist()),
        **changes,
    )


CONFIGS = {
    "as_wan21": vae_config(4, 3, (1, 2, 4, 4), (False, True, True)),
    "one_halving": vae_config(3, 6, (1, 2), (True,)),
    "time_first": vae_config(2, 4, (1, 3, 2), (True, False)),
    "no_time": vae_config(2, 6, (1, 1), (False,)),
    # Halved to 3 channels, never to one: its norm would be its sign, which no tolerance bounds.
    "odd_widths": vae_config(2, 6, (1, 1, 1), (True, True)),
    "as_wan22": vae_config(4, 4, (1, 2, 4, 4), (False, True, True), decoder_base_dim=6, patch_size=2, residual=True),
    "time_first_wan22": vae_config(3, 4, (1, 4, 2), (True, False), residual=True),
}
# Compilation is most of these tests' time, and the networks are tiny.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LATENT_FRAMES = 5
HEIGHT, WIDTH = 2, 3  # of latents


def make_vae(config: VAEConfig, dtype=jnp.float32) -> VAE:
    """Random parameters everywhere, norms' scales and biases included."""
    generator = np.random.default_rng(0)  # jax.random would compile for every shape
    arrays = {}
    for name, info in abstract_parameters(lambda: build(config)).items():
        noise = generator.standard_normal(info.shape, np.float32)
        kernel = noise * math.prod(info.shape[:-1]) ** -0.5
        values = {"kernel": kernel, "scale": 1 + 0.3 * noise, "bias": 0.2 * noise}[name.rsplit(".")[-1]]
        arrays[name] = jnp.asarray(values, jnp.float32)
    return with_parameters(lambda: build(config, dtype), arrays)


def build(config: VAEConfig, dtype=jnp.float32) -> VAE:
    return VAE(config, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


def random_latents(config: VAEConfig, frames: int = LATENT_FRAMES, batch: int = 2) -> np.ndarray:
    shape = (batch, config.z_dim, frames, HEIGHT, WIDTH)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def random_video(config: VAEConfig, frames: int, batch: int = 2) -> np.ndarray:
    shape = (batch, frames, HEIGHT * config.spatial_stride, WIDTH * config.spatial_stride, 3)
    return np.random.default_rng(2).uniform(-1, 1, shape).astype(np.float32)


# The oracle: the encoder and decoder over a whole sequence without caches. `p` holds parameters by name.


def conv(x, p, name, *, strides=(1, 1, 1), time=(0, 0), space=(1, 1)):
    kernel = p[f"{name}.kernel"]
    kernel = kernel[None] if kernel.ndim == 4 else kernel
    y = lax.conv_general_dilated(
        x,
        kernel,
        strides,
        (time, space, space) if kernel.shape[1] > 1 else (time, (0, 0), (0, 0)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        precision=lax.Precision.HIGHEST,
    )
    return y + p[f"{name}.bias"]


def causal(x, p, name):
    return conv(x, p, name, time=(2, 0))


def norm(x, p, name):
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.maximum(length, 1e-12) * math.sqrt(x.shape[-1]) * p[f"{name}.scale"]


def residual_block(x, p, name):
    y = causal(jax.nn.silu(norm(x, p, f"{name}.norm_1")), p, f"{name}.conv_1")
    y = causal(jax.nn.silu(norm(y, p, f"{name}.norm_2")), p, f"{name}.conv_2")
    return y + (conv(x, p, f"{name}.shortcut") if f"{name}.shortcut.kernel" in p else x)


def middle(x, p, name):
    x = residual_block(x, p, f"{name}.block_1")
    y = norm(x, p, f"{name}.attention.norm")
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    qkv = exact("bthwc,cd->bthwd", y, p[f"{name}.attention.qkv.kernel"]) + p[f"{name}.attention.qkv.bias"]
    query, key, value = jnp.split(qkv.reshape(*x.shape[:2], -1, 3 * x.shape[-1]), 3, axis=-1)
    weights = jax.nn.softmax(exact("btqc,btkc->btqk", query, key) / math.sqrt(x.shape[-1]), axis=-1)
    y = exact("btqk,btkc->btqc", weights, value).reshape(x.shape)
    y = exact("bthwc,cd->bthwd", y, p[f"{name}.attention.projection.kernel"])
    return residual_block(x + y + p[f"{name}.attention.projection.bias"], p, f"{name}.block_2")


def downsample(x, p, name):
    x = conv(x, p, f"{name}.conv", strides=(1, 2, 2), space=(0, 1))
    if f"{name}.time_conv.kernel" in p:
        later = [conv(x, p, f"{name}.time_conv", strides=(2, 1, 1))] if x.shape[1] > 1 else []
        x = jnp.concatenate([x[:, :1], *later], axis=1)
    return x


def upsample(x, p, name):
    if f"{name}.time_conv.kernel" in p and x.shape[1] > 1:
        doubled = conv(x[:, 1:], p, f"{name}.time_conv", time=(2, 0))
        even, odd = jnp.split(doubled, 2, axis=-1)
        later = jnp.stack([even, odd], axis=2).reshape(x.shape[0], -1, *x.shape[2:])
        x = jnp.concatenate([x[:, :1], later], axis=1)
    x = x[:, :, jnp.arange(2 * x.shape[2]) // 2][:, :, :, jnp.arange(2 * x.shape[3]) // 2]
    return conv(x, p, f"{name}.conv")


def stages(x, p, name, resample, shortcut):
    for stage in range(4):
        if f"{name}.stages.{stage}.blocks.0.conv_1.kernel" not in p:
            continue
        before = x
        for block in range(2):
            if f"{name}.stages.{stage}.blocks.{block}.conv_1.kernel" in p:
                x = residual_block(x, p, f"{name}.stages.{stage}.blocks.{block}")
        path = f"{name}.stages.{stage}.{resample.__name__}"
        if resamples := f"{path}.conv.kernel" in p:
            x = resample(x, p, path)
        x = shortcut(before, x, time=1 + (f"{path}.time_conv.kernel" in p), space=1 + resamples)
    return x


def no_shortcut(before, x, time, space):
    return x


def average_shortcut(before, x, time, space):
    """Adds means over groups of what has the index ((channel * time + frame) * space + row) * space + column."""
    before = jnp.pad(before, [(0, 0), (time - 1, 0), (0, 0), (0, 0), (0, 0)])
    size = before.shape[-1] * time * space**2 // x.shape[-1]
    t, h, w, channel, member = np.ogrid[tuple(slice(n) for n in (*x.shape[1:], size))]
    index = channel * size + member
    t, h, w = (
        t * time + index // space**2 % time,
        h * space + index // space % space,
        w * space + index % space,
    )
    return x + before[:, t, h, w, index // space**2 // time].mean(axis=-1)


def repeat_shortcut(before, x, time, space):
    """Adds what has such an index, divided by how often a value is repeated; the last stage has no shortcut."""
    if space == 1:
        return x
    frames = before.shape[1] * time
    repeats = x.shape[-1] * time * space**2 // before.shape[-1]
    t, h, w, channel = np.ogrid[:frames, : x.shape[2], : x.shape[3], : x.shape[4]]
    index = ((channel * time + t % time) * space + h % space) * space + w % space
    return x + before[:, t // time, h // space, w // space, index // repeats][:, time - 1 :]


def pixels_of_channels(size):
    """(channel of the image, column and row in its square), in the order of the folded channels."""
    return list(itertools.product(range(3), range(size), range(size)))


def head(x, p, name):
    return causal(jax.nn.silu(norm(x, p, f"{name}.norm_out")), p, f"{name}.conv_out")


@functools.partial(fast_jit, static_argnames="config")
def encode_full_sequence(p, frames, config):
    size = config.patch_size
    squares = [frames[:, :, row::size, column::size, c] for c, column, row in pixels_of_channels(size)]
    x = causal(jnp.stack(squares, axis=-1), p, "encoder.conv_in")
    x = stages(x, p, "encoder", downsample, average_shortcut if config.residual else no_shortcut)
    x = head(middle(x, p, "encoder.middle"), p, "encoder")
    mean = conv(x, p, "quant_conv")[..., : config.z_dim]
    return jnp.moveaxis((mean - np.array(config.latents_mean)) / np.array(config.latents_std), -1, 1)


@functools.partial(fast_jit, static_argnames="config")
def decode_full_sequence(p, latents, config):
    x = jnp.moveaxis(latents, 1, -1) * np.array(config.latents_std) + np.array(config.latents_mean)
    x = middle(causal(conv(x, p, "post_quant_conv"), p, "decoder.conv_in"), p, "decoder.middle")
    x = stages(x, p, "decoder", upsample, repeat_shortcut if config.residual else no_shortcut)
    x = head(x, p, "decoder")
    size = config.patch_size
    frames = jnp.zeros((*x.shape[:2], size * x.shape[2], size * x.shape[3], 3))
    for index, (c, column, row) in enumerate(pixels_of_channels(size)):
        frames = frames.at[:, :, row::size, column::size, c].set(x[..., index])
    return frames


@functools.cache
def make_case(name: str):
    """A VAE and the oracle's results for LATENT_FRAMES; a shorter sequence's are their beginning."""
    config = CONFIGS[name]
    vae = make_vae(config)
    latents = random_latents(config)
    video = random_video(config, 1 + config.temporal_stride * (LATENT_FRAMES - 1))
    parameters = named_parameters(vae)
    frames = decode_full_sequence(parameters, latents, config)
    assert frames.shape == video.shape
    return vae, latents, np.array(frames), video, np.array(encode_full_sequence(parameters, video, config))


def assert_close(actual: jax.Array, expected: np.ndarray, time_axis: int) -> None:
    """Every frame within 1e-5 of its length: float32 rounds to 6e-8, through twenty layers; measured up to 2e-6.

    A frame of history that is missing, stale or doubled changes it by more than 1e-2.
    """
    actual = np.asarray(actual)
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    axes = tuple(axis for axis in range(5) if axis != time_axis)
    error = np.sqrt(np.sum((actual - expected) ** 2, axis=axes) / np.sum(expected**2, axis=axes))
    assert error.max() < 1e-5, error


decode = fast_jit(lambda vae, latents, chunk: vae.decode(latents, chunk=chunk), static_argnums=2)
encode = fast_jit(lambda vae, video, chunk: vae.encode(video, chunk=chunk), static_argnums=2)

SPLITS = [  # config, latent frames, chunk
    ("as_wan21", 1, 1),
    ("as_wan21", 5, 3),
    ("one_halving", 2, 1),
    ("one_halving", 3, 2),
    ("one_halving", 5, 1),
    ("time_first", 5, 2),
    ("no_time", 3, 3),
    ("odd_widths", 5, 3),
    ("as_wan22", 5, 3),
    ("time_first_wan22", 4, 1),
]


@pytest.mark.parametrize(("name", "length", "chunk"), SPLITS)
def test_decode_equals_full_sequence(name, length, chunk):
    vae, latents, frames, _, _ = make_case(name)
    expected = frames[:, : 1 + vae.config.temporal_stride * (length - 1)]
    assert_close(decode(vae, latents[:, :, :length], chunk), expected, time_axis=1)


@pytest.mark.parametrize(("name", "length", "chunk"), SPLITS)
def test_encode_equals_full_sequence(name, length, chunk):
    vae, _, _, video, latents = make_case(name)
    video = video[:, : 1 + vae.config.temporal_stride * (length - 1)]
    assert_close(encode(vae, video, chunk), latents[:, :, :length], time_axis=2)


def test_host_loop_makes_the_same_frames():
    vae, latents, expected, _, _ = make_case("as_wan21")
    first, cache = fast_jit(lambda vae, latents: vae.decode_step(None, latents))(vae, latents[:, :, :1])
    pieces, shapes = [first], jax.tree.map(jnp.shape, cache)
    decode_step = fast_jit(lambda vae, cache, latents: vae.decode_step(cache, latents), donate_argnums=1)
    for t in (1, 3):
        frames, cache = decode_step(vae, cache, latents[:, :, t : t + 2])
        assert jax.tree.map(jnp.shape, cache) == shapes
        pieces.append(frames)
    assert_close(np.concatenate(pieces, axis=1), expected, time_axis=1)


def test_host_loop_makes_the_same_latents():
    vae, _, _, video, expected = make_case("one_halving")
    first, cache = fast_jit(lambda vae, frame: vae.encode_step(None, frame))(vae, video[:, :1])
    rest, _ = fast_jit(lambda vae, cache, frames: vae.encode_step(cache, frames))(vae, cache, video[:, 1:])
    assert_close(np.concatenate([first, rest], axis=2), expected, time_axis=2)


def test_default_config_has_the_published_parameters():
    """wan/modules/vae2_1.py makes 194 tensors with 126,892,531 numbers."""
    tree = abstract_parameters(lambda: VAE(VAEConfig(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert len(tree) == 194
    assert sum(math.prod(info.shape) for info in tree.values()) == 126_892_531
    assert tree["encoder.stages.2.downsample.time_conv.kernel"].shape == (3, 1, 1, 384, 384)
    assert tree["decoder.stages.1.blocks.0.shortcut.kernel"].shape == (1, 1, 1, 192, 384)
    assert tree["decoder.middle.attention.qkv.kernel"].axes == ("conv_in", "conv_out")
    assert "decoder.stages.2.upsample.time_conv.kernel" not in tree
    assert {info.dtype for info in tree.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["one_halving", "time_first_wan22"])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_memory_does_not_grow_with_time(direction, name):
    config = CONFIGS[name]
    vae = make_vae(config)

    def temporary_bytes(frames: int) -> int:
        if direction == "decode":
            lowered = decode.lower(vae, random_latents(config, frames, batch=1), 1)
        else:
            lowered = encode.lower(vae, random_video(config, 2 * frames - 1, batch=1), 1)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # Only the transposed copy of the latents grows; video is 16 times as large. Buffers are aligned to 64 bytes.
    latents_bytes = 4 * random_latents(config, 24, batch=1).size
    assert temporary_bytes(32) <= temporary_bytes(8) + latents_bytes + 256


@pytest.mark.parametrize("changes", [{}, {"decoder_base_dim": 12, "patch_size": 2, "residual": True}])
def test_bfloat16_stays_near_float32(changes):
    config = vae_config(4, 8, (1, 2, 4, 4), (False, True, True), **changes)
    latents = random_latents(config, 3)
    exact = np.asarray(decode(make_vae(config), latents, 1))
    rounded = np.asarray(decode(make_vae(config, jnp.bfloat16), latents, 1))
    assert rounded.dtype == np.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    # bfloat16 rounds by up to 4e-3, and some thirty roundings add up like a random walk: measured 0.8e-2 to 1.3e-2.
    assert 1e-3 < error < 2e-2, error


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("taps", [2, 3])
def test_overlap_add_is_a_convolution_over_time(taps, frames):
    """Chunk by chunk, against NumPy's convolution of each channel over the whole sequence."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 12, 1, 2, 3), np.float32)
    kernel = generator.standard_normal((taps, 3), np.float32)
    expected = np.zeros_like(x)
    for index in np.ndindex(2, 1, 2, 3):
        batch, *_, channel = index
        sequence = (batch, slice(None), *index[1:])
        # Our last tap is for the frame itself, NumPy's first.
        expected[sequence] = np.convolve(x[sequence], kernel[::-1, channel])[:12]
    past = (jnp.zeros((2, 1, 1, 2, 3)),) * (taps - 1)
    pieces = []
    for start in range(0, 12, frames):
        chunk = x[:, start : start + frames]
        totals, past = overlap_add([chunk * tap for tap in kernel], past)
        assert len(totals) == frames
        pieces += totals
    # Sums of three products of order 1, in another order.
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=0, atol=2e-6)


def test_bad_input_is_named():
    vae = make_vae(CONFIGS["as_wan21"])
    with pytest.raises(ValueError, match=r"cannot take 15 frames; give 1 \+ a multiple of 4"):
        jax.eval_shape(vae.encode, jnp.zeros((1, 15, 16, 16, 3)))
    with pytest.raises(ValueError, match="divisible by 8"):
        vae.encode(jnp.zeros((1, 5, 16, 20, 3)))
    with pytest.raises(ValueError, match="batch, 4, time, height, width"):
        vae.decode(jnp.zeros((1, 16, 2, 2, 2)))
    with pytest.raises(ValueError, match="takes one frame; it got 2"):
        vae.decode_step(None, jnp.zeros((1, 4, 2, 2, 2)))
    with pytest.raises(ValueError, match="multiple of 4 frames; it got 3"):
        vae.encode_step((), jnp.zeros((1, 3, 16, 16, 3)))
    with pytest.raises(ValueError, match="chunk is 0"):
        vae.decode(jnp.zeros((1, 4, 2, 2, 2)), chunk=0)
    with pytest.raises(ValueError, match="divisible by 16"):
        make_vae(CONFIGS["as_wan22"]).encode(jnp.zeros((1, 5, 32, 24, 3)))
    with pytest.raises(ValueError, match="channels of a stage do not divide by those before it"):
        vae_config(4, 3, (1, 2, 4), (False, True), decoder_base_dim=4, residual=True)
