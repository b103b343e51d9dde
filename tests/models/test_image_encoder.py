import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.config import ImageEncoderConfig
from wan_jax.models.image_encoder import ImageEncoder
from wan_jax.parameters import abstract_parameters

TINY = ImageEncoderConfig(image_size=21, patch_size=7, dim=22, num_layers=3, num_heads=2, ffn_dim=36)


def random_images(batch: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 21, 21, 3)), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_shapes_and_dtypes(dtype):
    encoder = ImageEncoder(TINY, dtype=dtype, rngs=nnx.Rngs(0))
    features = jax.jit(lambda encoder, images: encoder(images))(encoder, random_images())
    assert features.shape == (2, 3 * 3 + 1, 22)
    assert features.dtype == jnp.float32


def test_the_last_block_is_not_read():
    def run(factor: float) -> jax.Array:
        encoder = ImageEncoder(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0))
        kernel = encoder.blocks.feed_forward.up.kernel
        kernel.set_value(kernel[...].at[-1].multiply(factor))
        encoder.output_norm.scale.set_value(encoder.output_norm.scale[...] * factor)
        return encoder(random_images())

    np.testing.assert_array_equal(run(1.0), run(3.0))


@pytest.mark.quick
def test_full_size():
    tree = abstract_parameters(lambda: ImageEncoder(ImageEncoderConfig(), dtype=jnp.float32, rngs=nnx.Rngs(0)))
    # ViT-H/14: 632.08 million with its projection of 1280 x 1024, which Wan does not use.
    assert sum(int(np.prod(info.shape)) for info in tree.values()) == 632_076_800 - 1280 * 1024
    assert tree["blocks.attention.query.kernel"].axes == ("layers", "embed", "heads")
    assert tree["blocks.feed_forward.down.kernel"].axes == ("layers", "mlp", "embed")
    encoder = nnx.eval_shape(lambda: ImageEncoder(ImageEncoderConfig(), dtype=jnp.float32, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    assert jax.eval_shape(lambda encoder, images: encoder(images), encoder, images).shape == (1, 257, 1280)


@pytest.mark.parametrize("shape", [(2, 22, 21, 3), (2, 3, 21, 21), (21, 21, 3)])
def test_images_that_do_not_fit(shape):
    encoder = ImageEncoder(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"the image encoder needs \[B, 21, 21, 3\]"):
        encoder(jnp.zeros(shape))
