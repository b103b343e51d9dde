"""Which member of the family a checkpoint is: from its models' configs to one WanConfig with the release's defaults."""

import dataclasses
import re

from wan_jax.config import DenoiserConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.errors import InputError
from wan_jax.presets import PRESETS

MASK_CHANNELS = VAEConfig().temporal_stride  # one for each frame in a latent frame


def another_family(place: object, why: str) -> InputError:
    return InputError(
        f"{place}: checkpoint of another family: {why}; wan_jax runs the text-to-video and image-to-video models of "
        "Wan2.1 and Wan2.2"
    )


def assemble_config(
    place: str,
    denoiser: DenoiserConfig,
    *,
    conditioning: str,
    experts: int,
    text_encoder: TextEncoderConfig | None,
    vae: VAEConfig | None,
    image_encoder: ImageEncoderConfig | None = None,
    boundary: float | None = None,
) -> WanConfig:
    """One config of all components, with the sampling defaults of the release that has this structure.

    `conditioning` is from `infer_conditioning`. Absent components keep the release's config. Raises InputError where
    the components do not fit together.
    """
    if text_encoder is not None and text_encoder.dim != denoiser.text_dim:
        raise another_family(
            place, f"the text encoder gives {text_encoder.dim} features, the denoiser takes {denoiser.text_dim}"
        )
    if vae is not None and vae.z_dim != denoiser.out_channels:
        raise another_family(
            place, f"the VAE has {vae.z_dim} latent channels, the denoiser makes {denoiser.out_channels}"
        )
    if image_encoder is not None and image_encoder.dim != denoiser.image_dim:
        raise another_family(
            place, f"the image encoder gives {image_encoder.dim} features, the denoiser takes {denoiser.image_dim}"
        )
    release = _nearest_release(place, denoiser, experts, conditioning)
    sampling = release.sampling
    if experts == 1:
        sampling = dataclasses.replace(sampling, boundary=None)
    elif boundary is not None:
        sampling = dataclasses.replace(sampling, boundary=boundary)
    whole = denoiser == release.denoiser and experts == len(release.experts) and conditioning == release.conditioning
    return WanConfig(
        name=release.name if whole else "custom",
        denoiser=denoiser,
        text_encoder=text_encoder or release.text_encoder,
        vae=vae or release.vae,
        sampling=sampling,
        image_encoder=image_encoder or (None if denoiser.image_dim is None else release.image_encoder),
        conditioning=conditioning,
    )


def _nearest_release(place: str, denoiser: DenoiserConfig, experts: int, conditioning: str) -> WanConfig:
    """The preset of the same structure and, among several, of the nearest width.

    Wan2.1 I2V for 480p and for 720p differ in nothing but their weights' values and the sizes that they were trained
    for; they are told apart by "480p" in the path.
    """

    def difference(preset: WanConfig) -> tuple:
        return (
            preset.denoiser.text_length != denoiser.text_length,
            preset.conditioning != conditioning,
            (preset.denoiser.image_position_length is None) != (denoiser.image_position_length is None),
            (preset.denoiser.image_dim is None) != (denoiser.image_dim is None),
            len(preset.experts) != experts,
            abs(preset.denoiser.dim - denoiser.dim),
            preset.name.endswith("480p") != (_size_in_path(place) == "480p"),
        )

    return min(PRESETS.values(), key=difference)


def _size_in_path(place: str) -> str | None:
    """The last of "480p" and "720p" in a path; None where neither is."""
    return next(iter(re.findall("480p|720p", place.lower())[::-1]), None)


def infer_conditioning(place: object, config: DenoiserConfig, stated: str | None = None) -> str:
    """How a denoiser is conditioned, by its channels and by what the checkpoint states, if anything.

    By channels alone, a denoiser with TI2V-5B's 48 channels takes a first frame. Raises InputError where channels and
    statement differ, or for channels of no model of ours.
    """
    channels = f"the denoiser takes {config.in_channels} channels and gives {config.out_channels}"
    if config.in_channels == config.out_channels:
        by_channels = ["text", "first_frame"]
        if config.out_channels == PRESETS["ti2v-5b"].denoiser.out_channels:
            by_channels.reverse()
    elif config.in_channels == 2 * config.out_channels + MASK_CHANNELS:
        by_channels = ["image_latents"]
    else:
        raise another_family(place, channels)
    if stated is not None and stated not in by_channels:
        raise another_family(place, f"it says that its conditioning is {stated!r}, and {channels}")
    if config.image_dim is not None and "image_latents" not in by_channels:
        raise another_family(place, f"it attends to images, and {channels}")
    return stated or by_channels[0]


def recognition_notes(place: str, config: WanConfig, states_sampling: bool) -> list[str]:
    """What a user should know of how a checkpoint was recognised."""
    notes = []
    if config.name.startswith("i2v-14b-") and _size_in_path(place) is None:
        notes.append(
            f"{place}: taken for {config.name}; the releases for 480p and 720p have one structure, and only a path "
            "with 480p in it tells (override size and shift)"
        )
    whole = [preset.name for preset in PRESETS.values() if preset.denoiser == config.denoiser]
    if config.name == "custom" and len(config.experts) == 1 and whole:
        notes.append(f"{place}: one expert of {whole[0]}, which needs both")
    elif config.name == "custom" and not states_sampling:
        nearest = _nearest_release(place, config.denoiser, len(config.experts), config.conditioning)
        notes.append(
            f"{place}: has the structure of no release, and its layout says no sampling values: they are those of "
            f"{nearest.name} (override size, steps, shift and guidance)"
        )
    return notes
