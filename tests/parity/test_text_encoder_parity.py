"""The text encoder against transformers' UMT5EncoderModel, with the weights copied through the real name table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import UMT5Config, UMT5EncoderModel
from transformers.activations import NewGELUActivation
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from wan_jax.checkpoint.tables.text_encoder import text_encoder_table
from wan_jax.config import TextEncoderConfig
from wan_jax.models.text_encoder import TextEncoder, gelu, relative_position_buckets
from wan_jax.parameters import with_parameters

# Awkward on purpose: no dimension equals another, and num_heads * head_dim (30) is not dim.
CONFIG = TextEncoderConfig(vocab_size=97, dim=28, num_layers=3, num_heads=5, head_dim=6, ffn_dim=44)


def umt5_config(config: TextEncoderConfig) -> UMT5Config:
    return UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        d_kv=config.head_dim,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.eps,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,  # as in the published config
        attn_implementation="eager",  # what the official code computes; sdpa rounds elsewhere in bfloat16
    )


def random_original(config: TextEncoderConfig, dtype: torch.dtype) -> UMT5EncoderModel:
    """A UMT5 encoder in which every parameter is random, norms and bias tables included."""
    generator = torch.Generator().manual_seed(0)
    model = UMT5EncoderModel(umt5_config(config)).eval()
    model.encoder.embed_tokens.weight = model.shared.weight  # some releases of transformers 5 lose this tie
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            elif name == "shared.weight" or "relative_attention_bias" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model.to(dtype)


def ported(model: UMT5EncoderModel, config: TextEncoderConfig, dtype) -> TextEncoder:
    """Our encoder with the original's weights."""
    tensors = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    arrays = {}
    for mapping in text_encoder_table(config):
        layers = [mapping.at(layer) for layer in range(config.num_layers)] if mapping.per_layer else [mapping]
        parameters = [layer.from_torch(tensors[layer.names.diffusers]) for layer in layers]
        arrays[mapping.stacked_name] = jnp.asarray(np.stack(parameters) if mapping.per_layer else parameters[0], dtype)
    return with_parameters(lambda: TextEncoder(config, dtype=dtype, rngs=nnx.Rngs(0)), arrays)


def batch(lengths: list[int], padded: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, also under the padding, and the mask of the given lengths."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (len(lengths), padded), dtype=np.int32)
    mask = (np.arange(padded) < np.array(lengths)[:, None]).astype(np.int32)
    return tokens, mask


def run_original(model: UMT5EncoderModel, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        hidden = model(torch.from_numpy(tokens), torch.from_numpy(mask)).last_hidden_state
    return hidden.float().numpy() * mask[..., None]  # rows of padding are meaningless


def run_ours(encoder: TextEncoder, tokens: np.ndarray, mask: np.ndarray, **compiler_options) -> np.ndarray:
    call = jax.jit(lambda encoder, tokens, mask: encoder(tokens, mask), compiler_options=compiler_options)
    return np.asarray(call(encoder, tokens, mask)).astype(np.float32)


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    "config",
    [CONFIG, dataclasses.replace(CONFIG, num_buckets=12, max_distance=50, eps=1e-3)],
    ids=["published buckets", "other buckets"],
)
@pytest.mark.parametrize(("lengths", "padded"), [([7, 1, 4], 7), ([512, 300, 1], 512)], ids=["short", "long"])
def test_float32(config, lengths, padded):
    original = random_original(config, torch.float32)
    tokens, mask = batch(lengths, padded)
    expected = run_original(original, tokens, mask)
    ours = run_ours(ported(original, config, jnp.float32), tokens, mask)
    # Both run in float32 with sums of at most 512 terms: about ten units of 6e-8 after 3 layers (measured: 7e-7).
    assert relative_error(ours, expected) < 5e-6


def test_bfloat16_rounds_where_the_original_rounds():
    """With no excess precision, what is left are sums in another order that fall on the other side of a rounding."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    original = random_original(config, torch.bfloat16)
    tokens, mask = batch([512, 300, 5], 512)
    expected = run_original(original, tokens, mask)
    ours = run_ours(ported(original, config, jnp.bfloat16), tokens, mask, xla_allow_excess_precision=False)
    # Measured 0.9999 and 2e-5; the least visible change (the GELU's cube rounded once, not twice) gives 0.984 and 7e-4.
    assert np.mean((ours == expected)[mask == 1]) > 0.998
    assert relative_error(ours, expected) < 2e-4


def test_bfloat16_as_xla_likes():
    """XLA may skip roundings between a matmul and what follows it: an error of a few units of 2**-8."""
    original = random_original(CONFIG, torch.bfloat16)
    tokens, mask = batch([512, 300, 5], 512)
    expected = run_original(original, tokens, mask)
    ours = run_ours(ported(original, CONFIG, jnp.bfloat16), tokens, mask)
    assert relative_error(ours, expected) < 0.02  # measured 0.01; bfloat16 itself is 0.012 away from float32


def test_gelu_of_every_bfloat16_number():
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    values = values[torch.isfinite(values) & (values.abs() > 1e-30)]  # XLA flushes denormal results to zero
    values = values[values.abs() < 1e12]  # whose cubes are finite
    expected = NewGELUActivation()(values).float().numpy()
    ours = np.asarray(jax.jit(gelu)(jnp.asarray(values.float().numpy(), jnp.bfloat16))).astype(np.float32)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (12, 50), (8, 20), (64, 256), (33, 100)])
def test_buckets(num_buckets, max_distance):
    config = umt5_config(dataclasses.replace(CONFIG, num_buckets=num_buckets, max_distance=max_distance))
    attention = UMT5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    position = torch.arange(512)
    expected = attention._relative_position_bucket(position[None, :] - position[:, None]).numpy()
    np.testing.assert_array_equal(relative_position_buckets(512, num_buckets, max_distance), expected)
