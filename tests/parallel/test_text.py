"""The text encoder in parts on several devices encodes what it encodes on one, in float32."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.config import TextEncoderConfig
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.parallel.collectives import TENSOR
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import SINGLE, Placement
from wan_jax.parameters import abstract_parameters
from wan_jax.runtime.offload import place
from wan_jax.testing.models import random_model
from wan_jax.text.encoder import encode_text_function

# Four parts at most: 8 devices make two copies of them.
CONFIG = TextEncoderConfig(vocab_size=52, dim=12, num_layers=2, num_heads=4, head_dim=5, ffn_dim=24)


@pytest.mark.parametrize(("devices", "parts"), [(8, 4), (3, 1)])
def test_parts_give_the_encoding_of_one_device(devices: int, parts: int) -> None:
    encoder = random_model(TextEncoder, CONFIG, "float32")
    placement = Placement.over(MeshSpec(ring=devices))
    places = placement.for_text(CONFIG).parameter_shardings(
        abstract_parameters(lambda: TextEncoder(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    )
    in_parts = place(encoder, places)
    table, query = in_parts.embedding.table, in_parts.blocks.attention.query.kernel
    assert places["embedding.table"].mesh.shape[TENSOR] == parts
    assert table[...].addressable_shards[0].data.shape == (52 // parts, 12)
    assert query[...].addressable_shards[0].data.shape == (2, 12, 20 // parts)

    tokens = np.random.default_rng(1).integers(0, 52, (2, 9), dtype=np.int32)
    mask = np.arange(9) < np.array([[9], [4]])
    alone = np.asarray(encode_text_function(SINGLE)(encoder, tokens, mask))
    together = encode_text_function(placement)(in_parts, tokens, mask)
    assert together.sharding.is_fully_replicated
    assert np.abs(np.asarray(together) - alone).max() < 1e-5 * np.abs(alone).max()  # sums in another order
