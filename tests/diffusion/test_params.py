"""Every choice a user can get wrong, and the line that tells them."""

import pytest

from wan_jax.config import OFFICIAL_NEGATIVE_PROMPT, WanConfig
from wan_jax.diffusion.params import Settings, parse_guidance, parse_names, parse_size, parse_steps
from wan_jax.errors import InputError
from wan_jax.presets import PRESETS, get_preset

A14B = get_preset("t2v-a14b")


def test_preset_fills_in():
    settings = Settings.resolve(A14B)
    assert settings.size == (1280, 720)
    assert (settings.frames, settings.fps, settings.steps, settings.shift) == (81, 16, 40, 12.0)
    assert settings.guidance == (3.0, 4.0)
    assert settings.negative_prompt == OFFICIAL_NEGATIVE_PROMPT
    assert settings.latents_shape(A14B) == (16, 21, 90, 160)


def test_choices_win():
    settings = Settings.resolve(A14B, size=(832, 480), frames=5, guidance=6, negative_prompt="", shift=5)
    assert settings.guidance == (6.0, 6.0)
    assert settings.negative_prompt == ""
    assert settings.latents_shape(A14B) == (16, 2, 60, 104)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"size": (1280, 721)}, "size 1280x721: the height must be a multiple of 16; use 720 or 736"),
        ({"size": (8, 16)}, "size 8x16: the width must be a multiple of 16; use 16"),
        ({"size": (16,)}, r"size \(16,\): give \(width, height\)"),
        ({"frames": 80}, r"frames 80: must be 4n \+ 1; use 77 or 81"),
        ({"frames": 0}, r"frames 0: must be 4n \+ 1; use 1 or 5"),
        ({"frames": 5.5}, "frames 5.5: must be a whole number"),
        ({"steps": 0}, "steps is 0; give a whole number"),
        ({"shift": 0}, "shift is 0.0; give a number above 0"),
        ({"guidance": float("nan")}, r"guidance \(nan, nan\): must be finite"),
        ({"guidance": (1, 2, 3)}, r"guidance \(1, 2, 3\): give one value, or a pair"),
        ({"guidance": "3"}, "guidance '3': must be a number"),
        ({"frames": float("nan")}, "frames nan: must be a whole number"),
        ({"steps": (4, 0)}, "steps is 0; give a whole number"),
        ({"steps": (4, 2.5)}, "steps 2.5: must be a whole number"),
        ({"steps": (1, 2, 3)}, r"steps \(1, 2, 3\): give one value, or a pair"),
        ({"solver": ("euler", "unipcc")}, "'unipcc'; did you mean 'unipc'"),
        ({"solver": 3}, "solver 3: must be a name"),
        ({"schedule": ("lightx2v", "official"), "solver": ("euler", "unipc")}, "need the steps of each expert"),
        ({"schedule": ("lightx2v", "official"), "steps": (4, 2)}, "solver for schedule 'lightx2v'.*'unipc'"),
        ({"seed": -1}, "seed -1: must not be negative"),
        ({"solver": "unipcc"}, r"solver .*'unipcc'; did you mean 'unipc'\? \(known: unipc, dpm\+\+, euler\)"),
        ({"schedule": "oficial"}, "unknown schedule 'oficial'; did you mean 'official'"),
        ({"noise": "numpy"}, "unknown noise 'numpy'"),
    ],
)
def test_bad_choices(choice, message):
    with pytest.raises(InputError, match=message) as error:
        Settings.resolve(A14B, **choice)
    assert "\n" not in str(error.value)


def test_choices_for_each_expert():
    settings = Settings.resolve(
        A14B, steps=(4, 2), guidance=[1, 3.5], solver=("euler", "unipc"), schedule=("lightx2v", "official"), shift=5
    )
    assert (settings.steps, settings.guidance) == ((4, 2), (1.0, 3.5))
    assert (settings.solver, settings.schedule) == (("euler", "unipc"), ("lightx2v", "official"))
    assert settings.boundary == 0.875
    assert settings.make_schedule().high_noise_steps == 2
    assert Settings.resolve(A14B, solver=("euler", "euler")).solver == "euler"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"steps": (4, 2)}, "steps 4,2 are for two experts but the model has one; give one number"),
        ({"steps": (2, 2), "schedule": "lightx2v", "solver": "euler"}, "steps 2,2 are for two experts but the model"),
        ({"guidance": (1, 3)}, r"guidance \(1.0, 3.0\) is for two experts but the model has one; give one value"),
        ({"solver": ("euler", "unipc")}, r"solver \(euler, unipc\) is for two experts but the model has one"),
    ],
)
def test_one_expert_has_one_choice(choice, message):
    with pytest.raises(InputError, match=message):
        Settings.resolve(get_preset("t2v-1.3b"), **choice)
    assert Settings.resolve(get_preset("t2v-1.3b"), guidance=(2, 2), solver=("euler", "euler")).solver == "euler"


def test_parse_size():
    assert parse_size("1280x720") == parse_size("1280*720") == parse_size("1280X720") == (1280, 720)
    for text in ("1280", "1280x", "axb", "-16x16"):
        with pytest.raises(InputError, match="WIDTHxHEIGHT"):
            parse_size(text)


def test_parse_guidance():
    assert parse_guidance("3.5") == 3.5
    assert parse_guidance("3,4") == (3.0, 4.0)
    for text in ("", "a", "1,2,3"):
        with pytest.raises(InputError, match="LOW,HIGH"):
            parse_guidance(text)


def test_parse_steps_and_names():
    assert parse_steps("40") == 40
    assert parse_steps("4,2") == (4, 2)
    assert parse_names("solver", "unipc") == "unipc"
    assert parse_names("solver", "euler, unipc") == ("euler", "unipc")
    for text in ("", "4.5", "1,2,3"):
        with pytest.raises(InputError, match=r"steps .*: write one whole number, or LOW,HIGH"):
            parse_steps(text)
    with pytest.raises(InputError, match="solver 'a,b,c': write one name, or LOW,HIGH"):
        parse_names("solver", "a,b,c")


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
