"""Calls from Python with wrong types and numbers: one line names the argument; what is not finite names its stage."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax import InputError, SamplingParams, WanPipeline
from wan_jax.diffusion.params import read_latents
from wan_jax.generation.requests import make_requests
from wan_jax.media.image import read_image
from wan_jax.testing.models import DEMO, random_pipeline
from wan_jax.text.tokenizer import Tokenizer

LATENTS = np.zeros((16, 2, 4, 6), np.float32)


@pytest.fixture(scope="module")
def pipe(tokenizer_folder) -> WanPipeline:
    return random_pipeline(DEMO, Tokenizer.from_pretrained(tokenizer_folder), "float32")


@pytest.mark.quick
@pytest.mark.parametrize("prompt", [None, b"a", {"a": 1}, 5, {"a"}, [b"a"], [5], [["a"]], [], "\udcff", ["a\ud800"]])
def test_prompts(prompt):
    with pytest.raises(InputError, match="prompt"):
        make_requests(prompt, {})


@pytest.mark.quick
@pytest.mark.parametrize("name", ["size", "frames", "steps", "guidance", "shift", "seed", "solver", "negative_prompt"])
@pytest.mark.parametrize("value", [b"12", {"a": 1}, object(), 1j, [None], np.zeros(7), float("nan"), float("inf")])
def test_fields(name, value):
    from wan_jax import get_preset

    with pytest.raises(InputError, match=name.partition("_")[0]) as error:
        SamplingParams("a", **{name: value}).resolve(get_preset("t2v-a14b"))
    assert "\n" not in str(error.value)


@pytest.mark.quick
def test_numbers_of_videos():
    for wrong in (0, -1, "two", 1.5, None, True):
        with pytest.raises(InputError, match="num_videos"):
            make_requests("a", {}, wrong)


@pytest.mark.quick
@pytest.mark.parametrize("image", [b"x", {"a": 1}, 5, "a\0b.png", [[1, 2], [3]], np.zeros((2, 2)), object(), "."])
def test_images(image):
    with pytest.raises(InputError, match="image"):
        read_image(image)


@pytest.mark.quick
@pytest.mark.parametrize("latents", [b"x", {"a": 1}, "a\0b.npy", [[1], [2, 3]], object(), "archive.npy", "short.npy"])
def test_latents(latents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("archive.npz", LATENTS)
    (tmp_path / "archive.npz").rename("archive.npy")
    np.save("short.npy", LATENTS)
    header = (tmp_path / "short.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(header.replace(b"(16, 2, 4, 6)", b"(16,2,4,6000)"))
    with pytest.raises(InputError, match="latents"):
        read_latents(latents)


def test_calls_of_a_pipeline(pipe):
    for chunk in (-1, 0, 1.5, "two", True):
        with pytest.raises(InputError, match="chunk"):
            pipe.decode(LATENTS, chunk=chunk)
    for latents in (None, LATENTS[0], LATENTS[:3], LATENTS[:, :0], "a.npy", np.full_like(LATENTS, np.nan)):
        with pytest.raises(InputError, match="latents"):
            pipe.decode(latents)
    for prompts in ("a", None, [], [None], [5]):
        with pytest.raises(InputError, match="prompts"):
            pipe.encode_prompts(prompts)
    for wrong in ({"on_event": 5}, {"cancel": True}, {"state": LATENTS}, {"num_videos": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            pipe("a", size=(48, 32), frames=5, steps=1, **wrong)
    for video in (None, "a.mp4", LATENTS):
        with pytest.raises(InputError, match="video"):
            pipe.extend(video, "a")
    with pytest.raises(InputError, match="prompt"):
        list(pipe.results([]))


@pytest.mark.parametrize(("part", "stage"), [("vae", "decoded frames"), ("text_encoder", "embeddings")])
def test_what_is_not_finite_is_named_with_its_stage(part, stage, pipe, tokenizer_folder):
    broken = random_pipeline(DEMO, Tokenizer.from_pretrained(tokenizer_folder), "float32")
    model = vars(broken)[part]
    nnx.update(model, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), nnx.state(model)))
    with pytest.raises(InputError, match=stage):
        broken("a", size=(48, 32), frames=5, steps=1, guidance=1)
