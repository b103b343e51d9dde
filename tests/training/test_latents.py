"""The cache of encoded examples: what is encoded again, and what is not."""

from types import SimpleNamespace

import numpy as np
from flax import nnx

from wan_jax import Video
from wan_jax.testing.tokenizer import train_small_tokenizer
from wan_jax.text.tokenizer import Tokenizer
from wan_jax.training.latents import encode_examples
from wan_jax.training.videos import Bucket, Example


def test_another_tokenizer_encodes_captions_again(tmp_path):
    """Other ids are another text to the encoder; videos are not concerned."""
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    Video(frames, fps=16).save(tmp_path / "clip.mp4")
    for name, texts in (("one", ["a cat"]), ("other", ["another dog"])):
        train_small_tokenizer(texts, 200, tmp_path / name)
    encoded = []

    def encode_prompts(prompts):
        encoded.append(prompts)
        return np.ones((1, 4, 3), np.float32)

    def encode(name: str):
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        pipeline = SimpleNamespace(
            vae=model,
            text_encoder=model,
            tokenizer=Tokenizer.from_pretrained(tmp_path / name),
            config=SimpleNamespace(denoiser=SimpleNamespace(text_length=4)),
            encode=lambda frames: np.zeros((16, 2, 2, 2), np.float32),
            encode_prompts=encode_prompts,
        )
        bucket = Bucket(16, 16, 5)
        (record,) = encode_examples(
            [Example(tmp_path / "clip.mp4", "a cat")], [bucket], pipeline, tmp_path / "cache", 16.0, print
        )[bucket]
        return record

    one, again, other = encode("one"), encode("one"), encode("other")
    assert len(encoded) == 2
    assert one == again
    assert one.text != other.text
    assert one.latents == other.latents
