import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.config import DenoiserConfig
from wan_jax.kernels.attention import AttentionOptions
from wan_jax.models.denoiser import (
    CrossAttentionKV,
    Denoiser,
    sinusoidal_embedding,
)
from wan_jax.models.nn.rope import apply_rope, rope_frequencies, rope_tables
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import abstract_parameters, named_parameters, with_parameters
from wan_jax.presets import PRESETS
from wan_jax.runtime.offload import PROFILES, Memory, on_host, place

TINY = DenoiserConfig(
    num_layers=3,
    dim=60,
    num_heads=3,
    ffn_dim=52,
    in_channels=5,
    out_channels=4,
    text_dim=24,
    text_length=11,
    freq_dim=34,
)
TWO_IMAGES = dataclasses.replace(TINY, image_dim=22, image_position_length=10)
SIZES = (3, 4, 6)  # latent frames, height, width
TOKENS = 3 * 2 * 3


def random_denoiser(config: DenoiserConfig, dtype) -> Denoiser:
    """Every parameter random, norms and biases included; the same bfloat16 values whatever the compute dtype."""
    generator = np.random.default_rng(0)

    def build():
        return Denoiser(config, dtype=dtype, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    arrays = {}
    for name, info in abstract_parameters(build).items():
        noise = generator.normal(size=info.shape)
        if name.endswith("scale"):
            values = 1 + 0.3 * noise
        elif name.endswith("kernel"):
            values = noise * info.shape[-2] ** -0.5
        else:
            values = 0.3 * noise
        arrays[name] = jnp.asarray(values, jnp.bfloat16)
    return with_parameters(build, arrays)


def random_inputs(config: DenoiserConfig, batch: int = 2) -> tuple[jax.Array, jax.Array]:
    """Latents [B, C, F, h, w] and a text [B, T, text_dim]."""
    generator = np.random.default_rng(1)
    latents = generator.normal(size=(batch, config.in_channels, *SIZES))
    text = generator.normal(size=(batch, config.text_length, config.text_dim))
    return jnp.asarray(latents, jnp.float32), jnp.asarray(text, jnp.float32)


@jax.jit
def encode(denoiser, text):
    return denoiser.encode_context(text)


@jax.jit
def step(denoiser, latents, timesteps, context):
    return denoiser(latents, timesteps, context)


def forward(denoiser, latents, timesteps, text):
    return step(denoiser, latents, timesteps, encode(denoiser, text))


def relative_distance(x, y) -> float:
    return np.linalg.norm(np.asarray(x) - np.asarray(y)) / np.linalg.norm(np.asarray(y))


# The abstract tree


@pytest.mark.parametrize(
    ("preset", "count", "of_images"),
    [
        ("t2v-a14b", 14_288_491_584, 0),
        ("i2v-a14b", 14_288_901_184, 0),
        ("ti2v-5b", 4_999_787_712, 0),
        ("t2v-1.3b", 1_418_996_800, 0),
        ("i2v-14b-720p", 16_394_878_784, 5 * 40 + 8),  # keys and values of images in 40 layers; the embedding
        ("flf2v-14b-720p", 16_394_878_784 + 514 * 1280, 5 * 40 + 8 + 1),
    ],
)
def test_parameter_count(preset, count, of_images):
    tree = abstract_parameters(lambda: Denoiser(PRESETS[preset].denoiser, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(int(np.prod(info.shape)) for info in tree.values()) == count
    layers = PRESETS[preset].denoiser.num_layers
    tensors = sum(layers if info.stacked else 1 for info in tree.values())  # in a checkpoint
    assert tensors == 27 * layers + 15 + of_images
    assert all(info.dtype == jnp.bfloat16 and len(info.axes) == len(info.shape) for info in tree.values())


def test_full_size_forward_without_memory():
    config = PRESETS["t2v-a14b"].denoiser
    denoiser = nnx.eval_shape(lambda: Denoiser(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    latents = jax.ShapeDtypeStruct((2, 16, 21, 90, 160), jnp.float32)
    timesteps = jax.ShapeDtypeStruct((2,), jnp.float32)
    text = jax.ShapeDtypeStruct((2, 512, 4096), jnp.bfloat16)
    context = jax.eval_shape(lambda denoiser, text: denoiser.encode_context(text), denoiser, text)
    assert context.keys.shape == context.values.shape == (40, 2, 512, 40, 128)
    assert context.keys.dtype == context.values.dtype == jnp.bfloat16
    velocity = jax.eval_shape(lambda denoiser, *inputs: denoiser(*inputs), denoiser, latents, timesteps, context)
    assert (velocity.shape, velocity.dtype) == (latents.shape, jnp.float32)


def test_logical_axes():
    tree = abstract_parameters(lambda: Denoiser(TWO_IMAGES, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    axes = {name: info.axes for name, info in tree.items()}
    assert axes["blocks.cross_attention.image.key.kernel"] == ("layers", "embed", "heads")
    assert axes["image_embedding.linear_2.kernel"] == ("mlp", "embed")
    assert axes["blocks.self_attention.query.kernel"] == ("layers", "embed", "heads")
    assert axes["blocks.cross_attention.output.kernel"] == ("layers", "heads", "embed")
    assert axes["blocks.cross_attention.key_norm.scale"] == ("layers", "heads")
    assert axes["blocks.feed_forward.up.kernel"] == ("layers", "embed", "mlp")
    assert axes["blocks.feed_forward.down.kernel"] == ("layers", "mlp", "embed")
    assert axes["blocks.modulation"] == ("layers", None, "embed")
    assert axes["head.modulation"] == (None, "embed")
    # A strategy maps a name to a mesh axis, so no name may come twice in one parameter.
    for name, names in axes.items():
        used = [axis for axis in names if axis is not None]
        assert len(set(used)) == len(used), name


# Timesteps and positions


def test_timestep_embedding_golden_values():
    embedding = jax.jit(lambda t: sinusoidal_embedding(t, 256))(jnp.asarray([937.0]))[0]
    golden = {0: 0.69283062, 1: 0.15343250, 128: 0.72110039, 129: -0.98815912}
    for index, value in golden.items():
        assert abs(float(embedding[index]) - value) < 5e-7, index  # as below


@pytest.mark.parametrize("fraction", [0.0, 0.33337])
def test_timestep_embedding_agrees_with_float64(fraction):
    timesteps = np.float32(np.arange(1001) + fraction)
    angles = timesteps.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    ours = jax.jit(lambda t: sinusoidal_embedding(t, 256))(timesteps)
    # Angles of up to pi carry three float32 roundings (1.2e-7 each); a plain float32 product is off by 3e-5.
    assert np.abs(np.asarray(ours, np.float64) - expected).max() < 5e-7


def test_rotary_golden_frequencies():
    frames, rows, columns = rope_frequencies(128)
    assert (len(frames), len(rows), len(columns)) == (22, 21, 21)
    np.testing.assert_allclose(frames[[0, 1, 2, 21]], [1, 0.657933225, 0.432876128, 1.51991108e-4], rtol=1e-8)
    np.testing.assert_allclose(rows[[0, 1, 2, 20]], [1, 0.644946677, 0.415956216, 1.55051578e-4], rtol=1e-8)
    np.testing.assert_array_equal(rows, columns)


@pytest.mark.parametrize("head_dim", [12, 20, 128])
def test_rotation_agrees_with_complex128(head_dim):
    grid = (4, 3, 5)
    x = np.random.default_rng(0).normal(size=(2, 60, 3, head_dim)).astype(np.float32)
    positions = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), axis=-1).reshape(60, 3)
    frequencies = rope_frequencies(head_dim)
    angles = np.concatenate([np.outer(positions[:, axis], frequencies[axis]) for axis in range(3)], axis=-1)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    ours = apply_rope(jnp.asarray(x), rope_tables(grid, head_dim))
    # Values up to 5, tables rounded to float32: a few times 5 * 6e-8.
    assert np.abs(ours - expected).max() < 2e-6


# The forward pass


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_shapes_and_dtypes(dtype):
    latents, text = random_inputs(TINY)
    denoiser = Denoiser(TINY, dtype=dtype, rngs=nnx.Rngs(0))
    context = encode(denoiser, text)
    assert context.keys.shape == context.values.shape == (3, 2, 11, 3, 20)
    assert context.keys.dtype == context.values.dtype == dtype
    velocity = step(denoiser, latents, jnp.asarray([937.0, 12.0]), context)
    assert velocity.shape == (2, TINY.out_channels, *SIZES)
    assert velocity.dtype == jnp.float32
    assert bool(jnp.isfinite(velocity).all())


def test_scan_equals_a_loop_over_layers(monkeypatch):
    latents, text = random_inputs(TINY)
    denoiser = random_denoiser(TINY, jnp.float32)
    timesteps = jnp.asarray([937.0, 12.0])
    expected = forward(denoiser, latents, timesteps, text)
    loops = []

    def unrolled_scan(function, carry, xs, unroll):
        loops.append(function)
        outputs = []
        for layer in range(TINY.num_layers):
            carry, output = function(carry, jax.tree.map(lambda leaf, layer=layer: leaf[layer], xs))
            outputs.append(output)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    @jax.jit
    def unrolled(denoiser, latents, timesteps, text):
        return denoiser(latents, timesteps, denoiser.encode_context(text))

    monkeypatch.setattr(jax.lax, "scan", unrolled_scan)
    ours = unrolled(denoiser, latents, timesteps, text)
    assert len(loops) == 2  # the context's and the blocks'
    # The same float32 operations, fused differently.
    assert relative_distance(ours, expected) < 2e-6


def test_bfloat16_stays_near_float32():
    """Both have the same weights, in 24 layers. A float32 residual stream keeps the rounding errors of the layers from
    piling up: what is left, 3.2e-3, is less than one rounding to bfloat16 (2^-8 = 3.9e-3). With a residual stream in
    bfloat16 it would be 6.4e-3."""
    config = dataclasses.replace(TINY, num_layers=24)
    latents, text = random_inputs(config)
    timesteps = jnp.asarray([937.0, 100.0])
    expected = forward(random_denoiser(config, jnp.float32), latents, timesteps, text)
    velocity = forward(random_denoiser(config, jnp.bfloat16), latents, timesteps, text)
    distance = relative_distance(velocity, expected)
    assert 1e-4 < distance < 2**-8  # below 1e-4 nothing was computed in bfloat16


def test_bfloat16_distinguishes_neighbouring_timesteps():
    """bfloat16 would round 937 to 936."""
    latents, text = random_inputs(TINY, batch=1)
    denoiser = random_denoiser(TINY, jnp.bfloat16)
    velocities = [forward(denoiser, latents, jnp.asarray([t]), text) for t in (936.0, 937.0)]
    assert relative_distance(*velocities) > 1e-2


def test_new_timesteps_do_not_recompile():
    latents, text = random_inputs(TINY)
    denoiser = random_denoiser(TINY, jnp.float32)
    traces = []

    @jax.jit
    def traced_step(denoiser, latents, timesteps, context):
        traces.append(timesteps)
        return denoiser(latents, timesteps, context)

    context = encode(denoiser, text)
    velocities = [traced_step(denoiser, latents, jnp.full((2,), t), context) for t in (999.0, 500.5, 0.0)]
    assert len(traces) == 1
    assert relative_distance(velocities[0], velocities[1]) > 1e-2


def test_timesteps_for_each_frame():
    """The same values as when they are given for each token, one by one."""
    latents, text = random_inputs(TINY)
    denoiser = random_denoiser(TINY, jnp.float32)
    by_frame = jnp.asarray([[0.0, 500.0, 20.5], [937.0, 937.0, 12.0]])
    expected = forward(denoiser, latents, jnp.repeat(by_frame, TOKENS // 3, axis=1), text)
    # The small matrix products of the time embedding have other shapes, and may add in another order.
    assert relative_distance(forward(denoiser, latents, by_frame, text), expected) < 1e-6
    assert relative_distance(forward(denoiser, latents, by_frame[:, 0], text), expected) > 1e-3


def test_timesteps_for_each_token():
    latents, text = random_inputs(TINY)
    denoiser = random_denoiser(TINY, jnp.float32)
    timesteps = jnp.asarray([937.0, 12.0])
    expected = forward(denoiser, latents, timesteps, text)
    velocity = forward(denoiser, latents, jnp.repeat(timesteps[:, None], TOKENS, axis=1), text)
    assert relative_distance(velocity, expected) < 2e-6  # the same float32 operations on more rows


def test_rows_of_a_batch_do_not_mix():
    latents, text = random_inputs(TINY)
    denoiser = random_denoiser(TINY, jnp.float32)
    timesteps = jnp.asarray([937.0, 12.0])
    both = forward(denoiser, latents, timesteps, text)
    second = forward(denoiser, latents[1:], timesteps[1:], text[1:])
    assert relative_distance(both[1:], second) < 2e-6  # products of other shapes may sum in another order


def test_padding_of_the_text_is_attended():
    """The models were trained to attend to the zero rows after a text, so a row more or less changes the result."""
    latents, text = random_inputs(TINY)
    text = text.at[:, 5:].set(0)
    denoiser = random_denoiser(TINY, jnp.float32)
    context = encode(denoiser, text)
    shorter = CrossAttentionKV(context.keys[:, :, :-1], context.values[:, :, :-1])
    velocities = [step(denoiser, latents, jnp.asarray([937.0, 12.0]), some) for some in (context, shorter)]
    assert relative_distance(*velocities) > 1e-4


def test_attention_implementation_is_passed_on():
    latents, text = random_inputs(TINY)
    denoiser = random_denoiser(TINY, jnp.float32).with_attention(AttentionOptions("flash"))
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'"):
        forward(denoiser, latents, jnp.asarray([937.0, 12.0]), text)


@pytest.mark.parametrize(
    ("latents", "timesteps", "texts", "message"),
    [
        ((2, 5, 3, 5, 6), (2,), 2, r"latents of \[3, 5, 6\] .* do not divide into patches of \[1, 2, 2\]"),
        ((2, 5, 3, 4, 7), (2,), 2, r"latents of \[3, 4, 7\] .* do not divide into patches"),
        ((2, 4, 3, 4, 6), (2,), 2, r"the denoiser needs \[B, 5, F, h, w\]"),
        ((5, 3, 4, 6), (2,), 2, r"the denoiser needs \[B, 5, F, h, w\]"),
        ((2, 5, 3, 4, 6), (1,), 2, r"timesteps have shape \(1,\); give one of"),
        ((2, 5, 3, 4, 6), (2, 7), 2, r"timesteps have shape \(2, 7\)"),
        ((2, 5, 3, 4, 6), (2,), 1, "the context holds 1 texts and there are 2 latents"),
    ],
)
def test_shapes_that_do_not_fit(latents, timesteps, texts, message):
    denoiser = nnx.eval_shape(lambda: Denoiser(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    cross = jnp.zeros((3, texts, 11, 3, 20))
    with pytest.raises(ValueError, match=message):
        denoiser(jnp.zeros(latents), jnp.zeros(timesteps), CrossAttentionKV(cross, cross))


@pytest.mark.parametrize("shape", [(2, 7, 24), (2, 11, 23)])
def test_texts_that_do_not_fit(shape):
    denoiser = nnx.eval_shape(lambda: Denoiser(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"the denoiser needs \[B, 11, 24\]"):
        denoiser.encode_context(jnp.zeros(shape))


# Images


@jax.jit
def encode_with_image(denoiser, text, image):
    return denoiser.encode_context(text, image)


def random_image(tokens: int, batch: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=(batch, tokens, TWO_IMAGES.image_dim)), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_context_of_images(dtype):
    _, text = random_inputs(TINY)
    context = encode_with_image(Denoiser(TWO_IMAGES, dtype=dtype, rngs=nnx.Rngs(0)), text, random_image(10))
    assert context.keys.shape == context.values.shape == (3, 2, 11, 3, 20)
    assert context.image_keys.shape == context.image_values.shape == (3, 2, 10, 3, 20)
    assert {array.dtype for array in jax.tree.leaves(context)} == {jnp.dtype(dtype)}
    without = encode(Denoiser(TINY, dtype=dtype, rngs=nnx.Rngs(0)), text)
    assert len(jax.tree.leaves(without)) == 2  # no memory for images that a model does not attend to


def test_text_and_image_are_attended_apart():
    """Each has its own softmax: an image whose values are zero leaves the attention to the text as it was."""
    latents, text = random_inputs(TINY)
    denoiser = random_denoiser(TWO_IMAGES, jnp.float32)
    timesteps = jnp.asarray([937.0, 12.0])
    context = encode_with_image(denoiser, text, random_image(10))
    silent = dataclasses.replace(context, image_values=jnp.zeros_like(context.image_values))
    without = dataclasses.replace(context, image_keys=None, image_values=None)
    velocities = [step(denoiser, latents, timesteps, some) for some in (context, silent, without)]
    assert relative_distance(velocities[1], velocities[2]) < 1e-6  # float32 rounding
    assert relative_distance(velocities[0], velocities[2]) > 1e-2


def test_streamed_layers_with_images_change_no_bit():
    latents, text = random_inputs(TINY)
    denoiser = random_denoiser(TWO_IMAGES, jnp.float32)
    placement = Placement(offload=PROFILES["stream"])
    waiting = place(denoiser, dict.fromkeys(named_parameters(denoiser), placement.parameter_sharding(())))
    timesteps, image = jnp.asarray([937.0, 12.0]), random_image(10)
    expected = step(denoiser, latents, timesteps, encode_with_image(denoiser, text, image))
    with Memory(placement.offload).on_device(waiting) as running:
        assert on_host(running.blocks.cross_attention.image.key.kernel.get_value())
        context = encode_with_image(running, text, image)
        np.testing.assert_array_equal(step(running, latents, timesteps, context), expected)


def test_images_that_do_not_fit():
    def abstract(config):
        return nnx.eval_shape(lambda: Denoiser(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))

    text = jnp.zeros((2, 11, 24))
    with pytest.raises(ValueError, match=r"attends to an image's features; give them, \[B, image tokens, 22\]"):
        abstract(TWO_IMAGES).encode_context(text)
    with pytest.raises(ValueError, match="attends to no image"):
        abstract(TINY).encode_context(text, jnp.zeros((2, 10, 22)))
    for shape in ((2, 5, 22), (1, 10, 22), (2, 10, 21)):
        with pytest.raises(ValueError, match=r"the image's features have shape .* needs \[2, 10, 22\]"):
            abstract(TWO_IMAGES).encode_context(text, jnp.zeros(shape))
