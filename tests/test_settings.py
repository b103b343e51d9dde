"""Every choice a user can get wrong, and the line that tells them."""

import pytest

from wan_jax.config import OFFICIAL_NEGATIVE_PROMPT, PRESETS, WanConfig, get_preset
from wan_jax.errors import InputError
from wan_jax.settings import Settings, parse_guidance, parse_size

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
        ({"guidance": (1, 2, 3)}, "give one number, or a pair"),
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


def test_presets():
    wan21 = {"t2v-14b", "t2v-1.3b", "i2v-14b-480p", "i2v-14b-720p", "flf2v-14b-720p"}
    assert set(PRESETS) == wan21 | {"t2v-a14b", "i2v-a14b", "ti2v-5b"}
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
