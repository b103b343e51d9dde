"""The text encoder by itself: its size, its bucket table, and that padding changes nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.config import TextEncoderConfig
from wan_jax.models.text_encoder import TextEncoder, gelu, relative_position_buckets
from wan_jax.parameters import abstract_parameters, named_parameters, with_parameters

CONFIG = TextEncoderConfig(vocab_size=50, dim=12, num_layers=3, num_heads=3, head_dim=5, ffn_dim=20)

encode = jax.jit(lambda encoder, tokens, mask: encoder(tokens, mask))


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))


def tokens_of(length: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (batch, length), dtype=np.int32)


def test_umt5_xxl_size():
    config = TextEncoderConfig()
    tree = abstract_parameters(lambda: TextEncoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(math.prod(info.shape) for info in tree.values()) == 5_680_910_336
    assert sum(config.num_layers if info.stacked else 1 for info in tree.values()) == 242
    assert all(info.dtype == jnp.bfloat16 for info in tree.values())


def test_names_shapes_and_axes():
    tree = abstract_parameters(lambda: TextEncoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    found = {name: (info.shape, info.axes) for name, info in tree.items()}
    block = {
        "attention_norm.scale": ((12,), ("embed",)),
        "attention.query.kernel": ((12, 15), ("embed", "heads")),
        "attention.key.kernel": ((12, 15), ("embed", "heads")),
        "attention.value.kernel": ((12, 15), ("embed", "heads")),
        "attention.output.kernel": ((15, 12), ("heads", "embed")),
        "attention.relative_bias": ((32, 3), (None, "heads")),
        "feed_forward_norm.scale": ((12,), ("embed",)),
        "feed_forward.gate.kernel": ((12, 20), ("embed", "mlp")),
        "feed_forward.up.kernel": ((12, 20), ("embed", "mlp")),
        "feed_forward.down.kernel": ((20, 12), ("mlp", "embed")),
    }
    assert found == {
        "embedding.table": ((50, 12), ("vocab", "embed")),
        **{f"blocks.{name}": ((3, *shape), ("layers", *axes)) for name, (shape, axes) in block.items()},
        "final_norm.scale": ((12,), ("embed",)),
    }


def test_layers_start_different(encoder):
    for name, array in named_parameters(encoder).items():
        if name.startswith("blocks.") and not name.endswith("scale"):
            assert not np.any(np.asarray(array[0]) == np.asarray(array[1])), name


def test_bucket_table():
    """Distances 0 to 7 have a bucket each; then the published table's ranges, the last of which never ends."""
    expected = [*range(8)]
    for bucket, last in zip(range(8, 16), (11, 15, 22, 31, 45, 63, 90, 511), strict=True):
        expected += [bucket] * (last + 1 - len(expected))
    buckets = relative_position_buckets(512, 32, 128)
    assert buckets.dtype == np.int32
    np.testing.assert_array_equal(buckets[511, ::-1], expected)  # keys at and before the query
    np.testing.assert_array_equal(buckets[0, 1:], np.array(expected[1:]) + 16)  # keys after the query


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_changes_nothing(dtype):
    """Whatever ids the padding has the rows are the same bit by bit; and a prompt alone gives the same rows."""
    encoder = TextEncoder(CONFIG, dtype=dtype, rngs=nnx.Rngs(0))
    tokens = tokens_of(40, batch=3)
    lengths = np.array([9, 40, 1])
    mask = np.arange(40) < lengths[:, None]
    hidden = np.asarray(encode(encoder, tokens, mask))
    assert hidden.dtype == dtype
    assert not np.any(hidden[~mask])
    assert np.all(np.any(hidden[mask] != 0, axis=-1))
    other = np.asarray(encode(encoder, np.where(mask, tokens, (tokens + 7) % CONFIG.vocab_size), mask.astype(np.int32)))
    np.testing.assert_array_equal(other, hidden)
    for prompt, length in enumerate(lengths):
        alone = encode(encoder, tokens[prompt : prompt + 1, :length], np.ones((1, length), np.int32))
        # Only the order of sums differs: 40 terms of float32, or one rounding of bfloat16 per layer.
        tolerance = 1e-5 if dtype == jnp.float32 else 0.05
        np.testing.assert_allclose(
            np.asarray(alone[0], np.float32), hidden[prompt, :length].astype(np.float32), rtol=0, atol=tolerance
        )


def test_positions_matter(encoder):
    """Without the relative bias an encoder cannot see the order of its tokens."""
    tokens = tokens_of(20)
    mask = np.ones_like(tokens)
    forward = encode(encoder, tokens, mask)
    backward = encode(encoder, tokens[:, ::-1], mask)[:, ::-1]
    assert np.abs(forward - backward).max() > 0.1


def test_compute_dtype_may_differ_from_the_stored_one():
    encoder = TextEncoder(CONFIG, dtype=jnp.float32, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {array.dtype for array in named_parameters(encoder).values()} == {jnp.dtype(jnp.bfloat16)}
    tokens = tokens_of(6)
    hidden = encode(encoder, tokens, np.ones_like(tokens))
    assert hidden.dtype == jnp.float32
    arrays = {name: array.astype(jnp.float32) for name, array in named_parameters(encoder).items()}
    widened = with_parameters(lambda: TextEncoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)), arrays)
    np.testing.assert_array_equal(encode(widened, tokens, np.ones_like(tokens)), hidden)


def test_gelu_in_float32_is_the_usual_one():
    x = jnp.linspace(-6, 6, 1001, dtype=jnp.float32)
    # The same formula in another order of multiplication; 6 has a unit in the last place of 5e-7.
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=True), rtol=0, atol=1e-6)
