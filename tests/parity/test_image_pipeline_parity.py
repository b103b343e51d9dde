"""Whole runs from images against diffusers, for each kind of model that takes them; float32 on the CPU.

The images have the video's size, so that no resize comes between (tests/test_images.py compares resizing with the
official code, which diffusers does not follow), and CLIP's input is made here, as the official code makes it.
"""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline as DiffusersWanPipeline
from PIL import Image
from transformers import BatchFeature

from tests.parity import originals
from tests.prompts import PROMPTS
from wan_jax import WanPipeline

# Not square, an odd number of latent frames, sizes that are multiples of a token's 16 (TI2V: 32) and nothing more.
SIZES, FRAMES = {"ti2v-5b": (160, 96)}, 9
TOLERANCE = 3e-5  # ten times what was measured
NEGATIVE = "色调艳丽，过曝，静态"  # noqa: RUF001
MODELS = ("i2v-a14b", "i2v-14b", "flf2v-14b", "ti2v-5b")


def video_size(model: str) -> tuple[int, int]:
    return SIZES.get(model, (80, 48))


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def official_clip_input(images, return_tensors):
    """wan/modules/clip.py: CLIPModel.visual."""
    tensors = []
    for image in images if isinstance(images, list) else [images]:
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div(255).sub_(0.5).div_(0.5)
        tensors.append(torch.nn.functional.interpolate(tensor, size=(56, 56), mode="bicubic").mul_(0.5).add_(0.5))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return BatchFeature({"pixel_values": (torch.cat(tensors) - mean) / std})


@pytest.fixture(scope="module", params=MODELS)
def both(request, tokenizer_folder, tmp_path_factory):
    """(name, the original, our pipeline of the tree that it saves)."""
    folder = tmp_path_factory.mktemp("tree")
    original = originals.image_pipeline(tokenizer_folder, request.param)
    original.save_pretrained(folder)
    original.set_progress_bar_config(disable=True)
    if original.image_processor is not None:
        original.image_processor = official_clip_input
    return request.param, original, WanPipeline.from_pretrained(folder, dtype="float32")


def arguments(model: str, pipe: WanPipeline, solver: str) -> tuple[dict, dict]:
    """The same run for both: diffusers' arguments and ours."""
    size = video_size(model)
    stride, channels = pipe.config.vae.spatial_stride, pipe.config.vae.z_dim
    shape = channels, 3, size[1] // stride, size[0] // stride
    noise = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    guidance = (3.0, 4.5) if len(pipe.config.experts) == 2 else (3.0, 3.0)
    images = {"image": picture(1, size)}
    if model == "flf2v-14b":
        images["last_image"] = picture(2, size)
    theirs = {
        "prompt": PROMPTS[0],
        "negative_prompt": NEGATIVE,
        "width": size[0],
        "height": size[1],
        "num_frames": FRAMES,
        "num_inference_steps": 5,
        "guidance_scale": guidance[1],
        "guidance_scale_2": guidance[0] if len(pipe.config.experts) == 2 else None,
        "latents": torch.from_numpy(noise)[None],
    }
    ours = {
        "prompt": PROMPTS[0],
        "negative_prompt": NEGATIVE,
        "size": size,
        "frames": FRAMES,
        "steps": 5,
        "guidance": guidance,
        "shift": 5.0,
        "solver": solver,
        "schedule": "diffusers",
        "initial_latents": noise,
    }
    return theirs | images, ours | images


@torch.no_grad()
def decode(original, latents: torch.Tensor) -> np.ndarray:
    """What the pipeline does with its latents."""
    config = original.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    frames = original.vae.decode(latents / (1 / std) + mean).sample
    return original.video_processor.postprocess_video(frames, output_type="np")[0]


def compare(what: str, original, theirs: dict, video) -> None:
    latents = original(**theirs, output_type="latent").frames
    frames = decode(original, latents)
    error = originals.relative_error(video.latents, latents[0].numpy())
    difference = np.abs(video.frames.astype(int) - frames * 255).max()
    print(f"{what}: latents {error:.1e} relative, frames {difference:.2f} / 255")
    assert error < TOLERANCE
    # We truncate to uint8, as the official code does: up to 1 by itself.
    assert difference < 2


def test_whole_run(both):
    model, original, pipe = both
    theirs, ours = arguments(model, pipe, "unipc")
    original.scheduler = originals.scheduler("unipc", shift=5.0)
    compare(model, original, theirs, pipe(**ours))


@pytest.mark.parametrize("both", ["i2v-a14b"], indirect=True)
def test_last_image_of_an_i2v_model(both):
    """As diffusers does it, though the official code has no such option for it."""
    model, original, pipe = both
    theirs, ours = arguments(model, pipe, "euler")
    original.scheduler = originals.scheduler("euler", shift=5.0)
    last = {"last_image": picture(2, video_size(model))}
    compare("i2v-a14b with a last image", original, theirs | last, pipe(**ours | last))


@pytest.mark.parametrize("both", ["ti2v-5b"], indirect=True)
def test_text_alone_of_ti2v(both):
    model, image_original, pipe = both
    theirs, ours = arguments(model, pipe, "dpm++")
    components = {"tokenizer", "text_encoder", "transformer", "vae"}
    original = DiffusersWanPipeline(
        **{name: module for name, module in image_original.components.items() if name in components},
        scheduler=originals.scheduler("dpm++", shift=5.0),
        expand_timesteps=True,
    )
    original.set_progress_bar_config(disable=True)
    compare("ti2v-5b without an image", original, _without_image(theirs), pipe(**_without_image(ours)))


def _without_image(run: dict) -> dict:
    return {name: value for name, value in run.items() if name != "image"}
