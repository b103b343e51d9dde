"""Whole runs against diffusers: two experts, guidance, a Chinese prompt, given initial latents; float32 on the CPU."""

import numpy as np
import pytest
import torch

from tests.parity import originals
from tests.prompts import PROMPTS
from wan_jax import WanPipeline

# Not square, an odd number of latent frames, sizes that are multiples of 16 and of nothing more.
SIZE, FRAMES, LATENTS = (80, 48), 9, (16, 3, 6, 10)
GUIDANCE = (3.0, 4.0)  # low-noise expert, high-noise expert
TOLERANCE = 3e-5  # ten times what was measured
NEGATIVE = "色调艳丽，过曝，静态"  # noqa: RUF001


@pytest.fixture(scope="module")
def original(tokenizer_folder):
    return originals.pipeline(tokenizer_folder)


@pytest.fixture(scope="module")
def pipe(diffusers_tree):
    return WanPipeline.from_pretrained(diffusers_tree, dtype="float32")


@pytest.fixture(scope="module")
def initial_latents():
    return np.random.default_rng(7).standard_normal(LATENTS).astype(np.float32)


def run_original(original, initial_latents, output_type, *, prompt=PROMPTS[0], steps=7, **changes):
    arguments = {
        "prompt": prompt,
        "negative_prompt": NEGATIVE,
        "width": SIZE[0],
        "height": SIZE[1],
        "num_frames": FRAMES,
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE[1],
        "guidance_scale_2": GUIDANCE[0],
        "latents": torch.from_numpy(initial_latents)[None],
        "output_type": output_type,
    }
    original.set_progress_bar_config(disable=True)
    return original(**(arguments | changes)).frames


def run_ours(pipe, initial_latents, *, prompt=PROMPTS[0], steps=7, **changes):
    arguments = {
        "negative_prompt": NEGATIVE,
        "size": SIZE,
        "frames": FRAMES,
        "steps": steps,
        "guidance": GUIDANCE,
        "schedule": "diffusers",
        "initial_latents": initial_latents,
    }
    return pipe(prompt, **(arguments | changes))


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_whole_run(pipe, original, initial_latents, solver):
    original.scheduler = originals.scheduler(solver, shift=12.0)
    video = run_ours(pipe, initial_latents, solver=solver, shift=12.0)
    latents = run_original(original, initial_latents, "latent")[0].numpy()
    error = originals.relative_error(video.latents, latents)
    frames = run_original(original, initial_latents, "np")[0]
    difference = np.abs(video.frames.astype(int) - frames * 255).max()
    print(f"{solver}: latents {error:.1e} relative, frames {difference:.2f} / 255")
    # Float32 rounding through 14 forwards; measured 3e-6.
    assert error < TOLERANCE
    # We truncate to uint8, as the official code does: up to 1 by itself.
    assert difference < 2


def test_one_expert(tokenizer_folder, tmp_path, initial_latents):
    original = originals.pipeline(tokenizer_folder, experts=1, shift=5.0)
    original.save_pretrained(tmp_path)
    pipe = WanPipeline.from_pretrained(tmp_path, dtype="float32")
    latents = run_original(original, initial_latents, "latent", guidance_scale=5.0, guidance_scale_2=None)[0].numpy()
    video = run_ours(pipe, initial_latents, guidance=5.0, shift=5.0)
    assert originals.relative_error(video.latents, latents) < TOLERANCE


def test_no_guidance_computes_no_negative_pass(pipe, original, initial_latents):
    original.scheduler = originals.scheduler("unipc", shift=12.0)
    latents = run_original(original, initial_latents, "latent", guidance_scale=1.0, guidance_scale_2=1.0)[0].numpy()
    video = run_ours(pipe, initial_latents, guidance=1.0, shift=12.0)
    assert originals.relative_error(video.latents, latents) < TOLERANCE


def test_torch_noise_gives_the_video_of_a_diffusers_seed(pipe, original):
    original.scheduler = originals.scheduler("unipc", shift=12.0)
    generator = torch.Generator().manual_seed(42)
    latents = run_original(original, np.zeros(LATENTS, np.float32), "latent", latents=None, generator=generator)[0]
    video = run_ours(pipe, None, shift=12.0, noise="torch", seed=42)
    assert originals.relative_error(video.latents, latents.numpy()) < TOLERANCE


def test_batch_is_the_same_as_one_by_one(pipe, initial_latents):
    batch = run_ours(pipe, initial_latents, prompt=list(PROMPTS), steps=2)
    for prompt, video in zip(PROMPTS, batch, strict=True):
        alone = run_ours(pipe, initial_latents, prompt=prompt, steps=2)
        # Products of another batch size may add in another order.
        np.testing.assert_allclose(video.latents, alone.latents, rtol=0, atol=1e-4)
    assert np.abs(batch[0].latents - batch[1].latents).max() > 1e-2
