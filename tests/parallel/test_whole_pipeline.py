"""One seed gives one video on every mesh: the whole pipeline on 8 devices and on one, in float32."""

import numpy as np
import pytest

from tests.test_image_to_video import I2V, picture
from wan_jax.checkpoint import memory_checkpoint
from wan_jax.config import WanConfig
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.generation.requests import make_requests
from wan_jax.parameters import named_parameters
from wan_jax.pipeline import WanPipeline
from wan_jax.runtime.progress import Bars
from wan_jax.testing.models import DEMO, random_pipeline
from wan_jax.text.tokenizer import Tokenizer

SMALL = {"size": (48, 32), "frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def checkpoint(tokenizer_folder):
    def make(config: WanConfig):
        pipeline = random_pipeline(config, Tokenizer.from_pretrained(tokenizer_folder), "float32")
        models = {"text_encoder": pipeline.text_encoder, "vae": pipeline.vae, **pipeline.denoisers}
        components = {name: named_parameters(model) for name, model in models.items()}
        return memory_checkpoint(config, components, tokenizer_folder)

    return make


def load(checkpoint, mesh) -> WanPipeline:
    return WanPipeline.from_checkpoint(checkpoint, "float32", mesh=mesh)


def assert_same(latents: np.ndarray, alone: np.ndarray) -> None:
    assert np.abs(latents - alone).max() < 1e-5 * np.abs(alone).max()  # sums in another order


@pytest.fixture(scope="module")
def text_to_video(checkpoint):
    made = checkpoint(DEMO)
    return made, load(made, None)(["a red circle", "a cat"], **SMALL)


def test_a_video_on_a_mesh(text_to_video):
    made, alone = text_to_video
    video = load(made, "cfg2-ulysses4")("a red circle", **SMALL)
    assert_same(video.latents, alone[0].latents)
    # A value at the edge between two of 255 levels may fall to either side.
    assert np.abs(video.frames.astype(int) - alone[0].frames).max() <= 1
    assert video.metadata["mesh"] == "cfg2-ulysses4"


def latents_of(pipeline: WanPipeline, *prompts: str, **choices) -> np.ndarray:
    return np.stack([result.latents for result in pipeline.results(make_requests(prompts, SMALL | choices))])


def test_attention_window(text_to_video):
    made, _ = text_to_video
    alone, spread = (latents_of(load(made, each), "a red circle", attention_window=0) for each in (None, "ulysses2"))
    assert_same(spread, alone)
    with pytest.raises(InputError, match="ring knows no attention_window"):
        WanPipeline.from_checkpoint(made, "float32", mesh="ring2", request=SamplingParams(attention_window=0))


@pytest.mark.parametrize("mesh", ["fsdp2-tensor2", "experts2-ulysses2"])
def test_weights_in_8_bits(text_to_video, mesh):
    made, _ = text_to_video
    alone, spread = (latents_of(load(made, each), "a red circle", weights="int8") for each in (None, mesh))
    assert_same(spread, alone)


def test_a_batch_in_parts(text_to_video):
    made, alone = text_to_video
    pipeline = load(made, {"data": 2, "fsdp": 2, "tensor": 2})
    latents = latents_of(pipeline, "a red circle", "a cat")
    assert_same(latents, np.stack([video.latents for video in alone]))
    with pytest.raises(InputError, match="a batch of 1 cannot be divided over data 2"):
        latents_of(pipeline, "a cat")


def test_experts_on_devices_of_their_own(text_to_video):
    """Two videos in flight, through the same call."""
    made, alone = text_to_video
    pipeline = load(made, "experts2-cfg2")
    latents = latents_of(pipeline, "a red circle", "a cat")
    assert_same(latents, np.stack([video.latents for video in alone]))


def test_auto_says_what_it_chose(text_to_video, capsys):
    made, _ = text_to_video
    pipeline = WanPipeline.from_checkpoint(made, "float32", mesh="auto", on_event=Bars())
    assert str(pipeline.placement.mesh_spec) == "cfg2-ulysses4"
    assert "mesh cfg2-ulysses4 for 8 devices: the prompt and the negative prompt apart" in capsys.readouterr().err


def test_image_to_video_on_a_mesh(checkpoint):
    made, request = checkpoint(I2V), SamplingParams("a", image=picture(0), **SMALL).resolve(I2V)
    assert_same(*(next(load(made, mesh).results([request])).latents for mesh in ("pipeline2-ring2", None)))
