"""The presets: every official release (Wan-Video/Wan2.2, `wan/configs/`) and nano, by name.

`dataclasses.replace` makes variants.
"""

import dataclasses

from wan_jax.config import (
    OFFICIAL_NEGATIVE_PROMPT,
    DenoiserConfig,
    ImageEncoderConfig,
    PerExpert,
    SamplingConfig,
    TextEncoderConfig,
    VAEConfig,
    WanConfig,
)
from wan_jax.errors import unknown_name

# Normalisation of the latents' 48 channels (wan/modules/vae2_2.py).
WAN22_LATENTS_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
WAN22_LATENTS_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)

# The VAE of TI2V-5B (wan/modules/vae2_2.py).
WAN22_VAE = VAEConfig(
    z_dim=48,
    base_dim=160,
    decoder_base_dim=256,
    patch_size=2,
    residual=True,
    latents_mean=WAN22_LATENTS_MEAN,
    latents_std=WAN22_LATENTS_STD,
)

# Wan2.1's image-to-video models put "camera shake" before it, and FLF2V "camera cuts" before that.
I2V_NEGATIVE_PROMPT = "镜头晃动，" + OFFICIAL_NEGATIVE_PROMPT  # noqa: RUF001
FLF2V_NEGATIVE_PROMPT = "镜头切换，" + I2V_NEGATIVE_PROMPT  # noqa: RUF001

# The 14 B denoiser is the same in Wan2.1 and in each expert of Wan2.2, but for what it is given beside the noise: 4
# channels of mask and 16 of latents for image to video, and in Wan2.1 also the image's CLIP features.
_I2V_DENOISER = DenoiserConfig(in_channels=36)
_CLIP_DENOISER = dataclasses.replace(_I2V_DENOISER, image_dim=ImageEncoderConfig.dim)
_FLF2V_DENOISER = dataclasses.replace(_CLIP_DENOISER, image_position_length=2 * ImageEncoderConfig().num_tokens)

_WAN21_SAMPLING = SamplingConfig(steps=50, shift=5.0, guidance=PerExpert(low=5.0, high=5.0), boundary=None)
_I2V_SAMPLING = dataclasses.replace(_WAN21_SAMPLING, steps=40, negative_prompt=I2V_NEGATIVE_PROMPT)

PRESETS: dict[str, WanConfig] = {
    preset.name: preset
    for preset in (
        WanConfig(name="t2v-a14b"),
        WanConfig(
            name="i2v-a14b",
            denoiser=_I2V_DENOISER,
            sampling=SamplingConfig(shift=5.0, guidance=PerExpert(low=3.5, high=3.5), boundary=0.9),
            conditioning="image_latents",
        ),
        WanConfig(
            name="ti2v-5b",
            denoiser=DenoiserConfig(
                num_layers=30, dim=3072, num_heads=24, ffn_dim=14336, in_channels=48, out_channels=48
            ),
            vae=WAN22_VAE,
            sampling=dataclasses.replace(_WAN21_SAMPLING, size=(1280, 704), frames=121, fps=24),
            conditioning="first_frame",
        ),
        WanConfig(name="t2v-14b", sampling=_WAN21_SAMPLING),
        WanConfig(
            name="t2v-1.3b",
            denoiser=DenoiserConfig(num_layers=30, dim=1536, num_heads=12, ffn_dim=8960),
            sampling=dataclasses.replace(_WAN21_SAMPLING, size=(832, 480)),
        ),
        WanConfig(
            name="i2v-14b-480p",
            denoiser=_CLIP_DENOISER,
            sampling=dataclasses.replace(_I2V_SAMPLING, size=(832, 480), shift=3.0),
            image_encoder=ImageEncoderConfig(),
            conditioning="image_latents",
        ),
        WanConfig(
            name="i2v-14b-720p",
            denoiser=_CLIP_DENOISER,
            sampling=_I2V_SAMPLING,
            image_encoder=ImageEncoderConfig(),
            conditioning="image_latents",
        ),
        WanConfig(
            name="flf2v-14b-720p",
            denoiser=_FLF2V_DENOISER,
            sampling=dataclasses.replace(_WAN21_SAMPLING, shift=16.0, negative_prompt=FLF2V_NEGATIVE_PROMPT),
            image_encoder=ImageEncoderConfig(),
            conditioning="image_latents",
        ),
        # Ours: trained on the procedural world of wan_nano, small enough to ship in the package.
        WanConfig(
            name="nano",
            denoiser=DenoiserConfig(
                num_layers=5, dim=256, num_heads=4, ffn_dim=384, text_dim=128, text_length=64, freq_dim=64
            ),
            text_encoder=TextEncoderConfig(
                vocab_size=1024, dim=128, num_layers=3, num_heads=4, head_dim=32, ffn_dim=256
            ),
            vae=VAEConfig(
                base_dim=32,
                dim_mult=(1, 1, 2, 2),
                num_res_blocks=1,
                # Training folds the latents' mean and deviation into the 1x1x1 convolutions around them.
                latents_mean=(0.0,) * 16,
                latents_std=(1.0,) * 16,
            ),
            sampling=SamplingConfig(
                size=(96, 96), frames=33, steps=20, shift=5.0, guidance=PerExpert(low=3.0, high=3.0), negative_prompt=""
            ),
        ),
    )
}


def get_preset(name: str) -> WanConfig:
    """Returns the preset called `name`; raises InputError naming the nearest one."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
