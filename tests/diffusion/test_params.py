"""A request: the preset fills it in, text is read, every wrong choice is told in one line, pictures are read once."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
from PIL import Image

from wan_jax.config import OFFICIAL_NEGATIVE_PROMPT, PerExpert, WanConfig
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.fields import documented, knobs
from wan_jax.generation.requests import make_requests
from wan_jax.media.image import Picture
from wan_jax.presets import PRESETS, get_preset

pytestmark = pytest.mark.quick

A14B, I2V = get_preset("t2v-a14b"), get_preset("i2v-a14b")
A14B_LATENTS = (16, 1, 2, 2)  # of one frame of 16x16


def test_none_is_the_default():
    assert SamplingParams("a", seed=None, noise=None) == SamplingParams("a")
    assert [each.seed for each in make_requests(["a", "b"], {"seed": [None, 3]})] == [0, 3]


def test_latents_are_copied_when_they_are_checked():
    latents = np.zeros(A14B_LATENTS, np.float32)
    request = SamplingParams("a", size=(16, 16), frames=1, initial_latents=latents).resolve(A14B)
    latents[:] = np.nan
    assert not np.isnan(request.initial_latents).any()


@pytest.mark.parametrize(
    "latents", [{}, object(), b"a", 1j, 10**400, ("a", "b")], ids=lambda value: type(value).__name__
)
def test_what_is_no_latents(latents):
    with pytest.raises(InputError, match="latents"):
        SamplingParams("a", initial_latents=latents).resolve(A14B)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_is_no_name_of_a_picture(name):
    with pytest.raises(InputError, match="image"):
        SamplingParams("a", image=name).resolve(I2V)


def test_too_many_steps():
    with pytest.raises(InputError, match="steps"):
        SamplingParams("a", steps=1e300).resolve(A14B)


@pytest.mark.parametrize("prompt", [None, 5])
def test_what_is_no_prompt(prompt):
    with pytest.raises(InputError, match="prompt"):
        make_requests(prompt, {})


@pytest.mark.parametrize("count", [0, -1, 1.5, "two", [2], True])
def test_what_is_no_number_of_videos(count):
    with pytest.raises(InputError, match="num_videos"):
        make_requests("a", {}, count)


def test_preset_fills_in():
    request = SamplingParams("a cat").resolve(A14B)
    assert request.size == (1280, 720)
    assert (request.frames, request.fps, request.steps, request.shift) == (81, 16, 40, 12.0)
    assert request.guidance == PerExpert(low=3.0, high=4.0)
    assert (request.boundary, request.attention) == (0.875, None)
    assert request.negative_prompt == OFFICIAL_NEGATIVE_PROMPT
    assert request.latents_shape(A14B) == (16, 21, 90, 160)
    assert request.resolve(A14B) is request


def test_choices_win():
    request = SamplingParams(size=(832, 480), frames=5, guidance=6, negative_prompt="", shift=5, fps=24).resolve(A14B)
    assert request.guidance == (6.0, 6.0)
    assert (request.negative_prompt, request.fps) == ("", 24)
    assert request.latents_shape(A14B) == (16, 2, 60, 104)


def test_values_may_be_text():
    request = SamplingParams(
        "a", size="832*480", frames="5", steps="4, 2", guidance="1,3.5", shift="5", solver="euler,unipc", seed="3"
    )
    assert (request.size, request.frames, request.seed) == ((832, 480), 5, 3)
    assert (request.steps, request.guidance) == (PerExpert(low=4, high=2), PerExpert(low=1.0, high=3.5))
    assert (request.shift, request.solver) == (5.0, ("euler", "unipc"))
    assert SamplingParams(steps=[4, 2]) == SamplingParams(steps=PerExpert(high=2, low=4)) == SamplingParams(steps="4,2")
    assert SamplingParams(steps="40").steps == 40


@pytest.mark.parametrize(
    ("choice", "parts"),
    [
        ({"size": (1280, 721)}, ["size 1280x721", "height", "720 or 736"]),
        ({"size": (8, 16)}, ["size 8x16", "width", "use 16"]),
        ({"size": (16,)}, ["size (16,)", "(width, height)"]),
        ({"size": "1280"}, ["size '1280'", "WIDTHxHEIGHT"]),
        ({"size": "-16x16"}, ["size '-16x16'", "WIDTHxHEIGHT"]),
        ({"frames": 80}, ["frames 80", "4n + 1", "77 or 81"]),
        ({"frames": 0}, ["frames 0", "1 or 5"]),
        ({"frames": 5.5}, ["frames 5.5", "whole number"]),
        ({"frames": float("nan")}, ["frames nan", "whole number"]),
        ({"frames": True}, ["frames True", "whole number"]),
        ({"fps": 0}, ["fps 0", "at least 1"]),
        ({"steps": 0}, ["steps is 0"]),
        ({"steps": (4, 0)}, ["steps is 0"]),
        ({"steps": (4, 2.5)}, ["steps 2.5", "whole number"]),
        ({"steps": (1, 2, 3)}, ["steps (1, 2, 3)", "a pair"]),
        ({"steps": "4.5"}, ["steps '4.5'", "LOW,HIGH"]),
        ({"steps": "1,2,3"}, ["steps '1,2,3'", "LOW,HIGH"]),
        ({"steps": {"low": 4}}, ["steps {'low': 4}", "whole number"]),
        ({"shift": 0}, ["shift is 0.0", "above 0"]),
        ({"shift": 10**400}, ["shift 1000", "must be a number"]),
        ({"guidance": float("nan")}, ["guidance (nan, nan)", "finite"]),
        ({"guidance": (1, 2, 3)}, ["guidance (1, 2, 3)", "a pair"]),
        ({"guidance": "high"}, ["guidance 'high'", "LOW,HIGH"]),
        ({"guidance": ""}, ["guidance ''", "LOW,HIGH"]),
        ({"boundary": 2}, ["boundary 2", "0 to 1"]),
        ({"solver": ("euler", "unipcc")}, ["'unipcc'", "'unipc'"]),
        ({"solver": 3}, ["solver 3", "text"]),
        ({"solver": "a,b,c"}, ["solver 'a,b,c'", "LOW,HIGH"]),
        ({"schedule": ("lightx2v", "official"), "solver": ("euler", "unipc")}, ["steps of each expert"]),
        ({"schedule": ("lightx2v", "official"), "steps": (4, 2)}, ["'lightx2v'", "'unipc'"]),
        ({"seed": -1}, ["seed -1", "2**64"]),
        ({"solver": "unipcc"}, ["'unipcc'", "did you mean 'unipc'"]),
        ({"schedule": "oficial"}, ["'oficial'", "did you mean 'official'"]),
        ({"noise": "numpy"}, ["unknown noise 'numpy'"]),
        ({"attention": "pallas"}, ["unknown attention 'pallas'", "did you mean 'pallas_"]),
        ({"prompt": 5}, ["prompt 5", "text"]),
        ({"initial_latents": "none.npy"}, ["none.npy", "does not exist"]),
        ({"initial_latents": np.zeros((16, 2, 4, 7))}, ["shape (16, 2, 4, 7)", "needs (16, 21, 90, 160)"]),
    ],
)
def test_bad_choices(choice, parts):
    with pytest.raises(InputError) as error:
        SamplingParams(**choice).resolve(A14B)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), error.value


def test_choices_for_each_expert():
    request = SamplingParams(
        steps=(4, 2), guidance=[1, 3.5], solver=("euler", "unipc"), schedule=("lightx2v", "official"), shift=5
    ).resolve(A14B)
    assert (request.steps, request.guidance) == ((4, 2), (1.0, 3.5))
    assert (request.solver, request.schedule) == (("euler", "unipc"), ("lightx2v", "official"))
    assert request.make_schedule().high_noise_steps == 2
    assert SamplingParams(solver=("euler", "euler")).resolve(A14B).solver == "euler"
    assert json.loads(json.dumps(request.as_json()))["guidance"] == [1.0, 3.5]


@pytest.mark.parametrize(
    ("choice", "part"),
    [
        ({"steps": (4, 2)}, "steps 4,2"),
        ({"steps": (2, 2), "schedule": "lightx2v", "solver": "euler"}, "steps 2,2"),
        ({"guidance": (1, 3)}, "guidance (1.0, 3.0)"),
        ({"solver": ("euler", "unipc")}, "solver (euler, unipc)"),
        ({"boundary": 0.9}, "boundary 0.9"),
    ],
)
def test_one_expert_has_one_choice(choice, part):
    with pytest.raises(InputError, match="two experts but the model has one") as error:
        SamplingParams(**choice).resolve(get_preset("t2v-1.3b"))
    assert part in str(error.value)
    request = SamplingParams(guidance=(2, 2), solver=("euler", "euler")).resolve(get_preset("t2v-1.3b"))
    assert request.solver == "euler"


def test_pictures_are_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40)).save("first.png")
    Image.new("RGB", (30, 40)).save("last.png")
    request = SamplingParams("a", image="first.png", last_image="last.png").resolve(I2V)
    assert (request.image.name, request.image.size, request.last_image.size) == ("first.png", (60, 40), (60, 40))
    assert request.size == (1168, 768)  # the image's shape
    monkeypatch.setattr(Picture, "cover", None)
    again = dataclasses.replace(request, seed=4, last_image=None).resolve(I2V)
    assert again.image is request.image
    with pytest.raises(InputError, match="give an image"):
        SamplingParams("a").resolve(I2V)
    assert SamplingParams().resolve(I2V).size == (1280, 720)  # a plan needs no picture


def test_requests_of_a_call():
    one, two = make_requests(["a", "b"], {"seed": 5, "negative_prompt": ["x", "y"], "shift": None})
    assert (one.prompt, one.seed, one.negative_prompt) == ("a", 5, "x")
    assert (two.prompt, two.seed, two.negative_prompt) == ("b", 6, "y")
    assert [each.seed for each in make_requests(["a", "b"], {"seed": [9, 3]})] == [9, 3]
    assert [each.seed for each in make_requests(["a", "b"], {}, num_videos=2)] == [0, 1, 2, 3]
    own = SamplingParams("c", seed=7)
    assert make_requests(own, {}) == [own]
    assert [each.seed for each in make_requests([own, own], {}, num_videos=2)] == [7, 8, 7, 8]
    assert make_requests(own, {"steps": 3})[0].steps == 3
    start = np.zeros((2, 16, 2, 4, 6), np.float32)
    assert make_requests(["a", "b"], {"initial_latents": start})[1].initial_latents.shape == (16, 2, 4, 6)
    with pytest.raises(InputError, match="seed has 3 values for 2 videos"):
        make_requests(["a", "b"], {"seed": [1, 2, 3]})
    with pytest.raises(InputError, match="unknown argument 'stpes'; did you mean 'steps'"):
        make_requests("a", {"stpes": 3})
    with pytest.raises(InputError, match="'height'; did you mean 'size'"):
        make_requests("a", {"height": 480})
    with pytest.raises(InputError, match="no prompts"):
        make_requests([], {})


def test_python_shows_the_fields():
    @documented(SamplingParams)
    def call(prompt, **params):
        """Does.

        Args:
            **params: see SamplingParams.
        """

    assert list(inspect.signature(call).parameters) == [each.name for each in knobs(SamplingParams)]
    assert "steps: number of denoising steps" in call.__doc__


def test_presets():
    wan21 = {"t2v-14b", "t2v-1.3b", "i2v-14b-480p", "i2v-14b-720p", "flf2v-14b-720p"}
    assert set(PRESETS) == wan21 | {"t2v-a14b", "i2v-a14b", "ti2v-5b", "nano"}
    assert {name for name, preset in PRESETS.items() if len(preset.experts) == 1} == wan21 | {"ti2v-5b"}
    for preset in PRESETS.values():  # the mask has as many channels as frames in a latent frame
        given = 4 + preset.vae.z_dim if preset.conditioning == "image_latents" else 0
        assert preset.denoiser.in_channels == preset.vae.z_dim + given
        assert preset.denoiser.out_channels == preset.vae.z_dim
        assert (preset.image_encoder is None) == (preset.denoiser.image_dim is None)
    assert get_preset("flf2v-14b-720p").denoiser.image_position_length == 514
    with pytest.raises(InputError, match="unknown conditioning 'image_latent'; did you mean 'image_latents'"):
        WanConfig(conditioning="image_latent")
    assert A14B.experts == ("high_noise", "low_noise")
    assert get_preset("t2v-1.3b").experts == ("denoiser",)
    assert A14B.size_multiple == (16, 16)
    with pytest.raises(InputError, match="unknown preset 't2v-a14'; did you mean 't2v-a14b'"):
        get_preset("t2v-a14")
