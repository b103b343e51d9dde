"""Known frames in the denoise loop: the mask, what the denoiser gets, what stays, and that nothing recompiles."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.config import DenoiserConfig
from wan_jax.diffusion.conditioning import FirstFrame, KnownFrames, known_frames, known_frames_mask
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import plan_segments
from wan_jax.diffusion.solvers import SOLVERS, get_solver
from wan_jax.diffusion.step import Expert
from wan_jax.models.denoiser import Denoiser
from wan_jax.runtime.events import Run

SHAPE = (2, 4, 3, 4, 6)  # B z T h w
STRIDE = 4
KNOWN = jnp.ones(1, bool)

compilations: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: (
        compilations.append(event) if event.endswith("jaxpr_to_mlir_module_duration") else None
    )
)


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("frames", "known"), [(1, [0]), (5, [0]), (81, [0]), (9, [0, 8]), (121, [0, 120])])
def test_mask_follows_the_official_construction(frames, known):
    mask = np.zeros((1, frames, 2, 3))
    mask[:, known] = 1
    mask = np.concatenate([np.repeat(mask[:, :1], 4, axis=1), mask[:, 1:]], axis=1)
    mask = mask.reshape(1, (frames + 3) // 4, 4, 2, 3).swapaxes(1, 2)[0]
    ours = known_frames_mask(known, frames, STRIDE)
    np.testing.assert_array_equal(np.broadcast_to(ours[..., None, None], mask.shape), mask)


def test_known_frames_come_after_the_noise_and_the_mask_first():
    latents, encoded = random(0, *SHAPE), random(1, 1, *SHAPE[1:])
    inputs, timesteps = known_frames(encoded, [0, 8], STRIDE).inputs(latents, jnp.array([7.0, 7.0]))
    assert inputs.shape == (2, 4 + 4 + 4, 3, 4, 6)
    np.testing.assert_array_equal(timesteps, [7, 7])
    np.testing.assert_array_equal(inputs[:, :4], latents)
    np.testing.assert_array_equal(inputs[:, 4:8, 0], 1)
    np.testing.assert_array_equal(inputs[:, 4:8, 1], 0)
    np.testing.assert_array_equal(inputs[:, 4:7, 2], 0)
    np.testing.assert_array_equal(inputs[:, 7, 2], 1)
    np.testing.assert_array_equal(inputs[:, 8:], np.broadcast_to(encoded, SHAPE))


def test_first_frame_has_timestep_0():
    latents, frame = random(0, *SHAPE), random(1, 1, 4, 1, 4, 6)
    conditioning = FirstFrame(frame, KNOWN)
    inputs, timesteps = conditioning.inputs(latents, jnp.array([500.0, 20.0]))
    np.testing.assert_array_equal(inputs, latents)
    np.testing.assert_array_equal(timesteps, [[0, 500, 500], [0, 20, 20]])
    restored = conditioning.restore(latents)
    np.testing.assert_array_equal(restored[:, :, :1], np.broadcast_to(frame, (2, 4, 1, 4, 6)))
    np.testing.assert_array_equal(restored[:, :, 1:], latents[:, :, 1:])


def test_a_first_frame_that_is_not_known_changes_nothing():
    latents = random(0, *SHAPE)
    conditioning = FirstFrame.unknown(*SHAPE[1:2], *SHAPE[3:])
    inputs, timesteps = conditioning.inputs(latents, jnp.array([500.0, 20.0]))
    np.testing.assert_array_equal(inputs, latents)
    np.testing.assert_array_equal(timesteps, [[500] * 3, [20] * 3])
    np.testing.assert_array_equal(conditioning.restore(latents), latents)


def make_expert(in_channels: int) -> Expert:
    config = DenoiserConfig(
        num_layers=1,
        dim=24,
        num_heads=2,
        ffn_dim=40,
        text_dim=6,
        text_length=5,
        in_channels=in_channels,
        out_channels=SHAPE[1],
    )
    return Expert.prepare(Denoiser(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), *random(9, 2, SHAPE[0], 5, 6))


def plain_loop(latents, schedule, solver, guidance, expert, known, image) -> jax.Array:
    """Written from the official loops: i2v concatenates `image`, ti2v blends it in before each step and after it."""
    coefficients = solver.coefficients(schedule)
    mask = np.ones((1, 1, *SHAPE[2:]), np.float32)
    mask[:, :, 0] = 0
    call = jax.jit(lambda denoiser, *inputs: denoiser(*inputs))

    def blend(latents):
        return (1 - mask) * image + mask * latents if known == "first_frame" else latents

    state = solver.init(blend(latents))
    for index, timestep in enumerate(schedule.timesteps):
        if known == "first_frame":
            inputs = state.latents
            timesteps = jnp.asarray(np.tile((mask[0, 0, :, ::2, ::2] * timestep).reshape(1, -1), (SHAPE[0], 1)))
        else:
            inputs = jnp.concatenate([state.latents, jnp.concatenate([image] * SHAPE[0])], axis=1)
            timesteps = jnp.full(SHAPE[0], timestep)
        conditional, unconditional = (
            call(expert.denoiser, inputs, timesteps, context) for context in (expert.cond, expert.uncond)
        )
        velocity = unconditional + guidance * (conditional - unconditional)
        state = solver.step(state, velocity, jax.tree.map(lambda values, index=index: values[index], coefficients))
        state = replace(state, latents=blend(state.latents))
    return state.latents


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("known", ["first_frame", "known_frames"])
def test_loop_equals_the_official_one(known, solver):
    schedule = make_schedule("official", solver, 4, 5.0)
    if known == "first_frame":
        image = random(1, 1, SHAPE[1], 1, *SHAPE[3:])
        expert, conditioning = make_expert(SHAPE[1]), FirstFrame(image, KNOWN)
    else:
        image = random(1, 1, 8, *SHAPE[2:])
        expert, conditioning = make_expert(SHAPE[1] + 8), KnownFrames(image)
    noise = random(2, *SHAPE)
    segments = plan_segments(schedule, get_solver(solver), 3.0, None)
    result = denoise(noise, segments, lambda name: expert, Run(), conditioning)
    expected = plain_loop(noise, schedule, get_solver(solver), 3.0, expert, known, image)
    # The same operations fused differently: float32 roundings of values around 1 over four steps.
    np.testing.assert_allclose(result, expected, atol=2e-5)
    if known == "first_frame":
        np.testing.assert_array_equal(result[:, :, :1], np.broadcast_to(image, (2, 4, 1, 4, 6)))


def test_another_image_and_none_compile_nothing():
    expert = make_expert(SHAPE[1])
    schedule, solver = make_schedule("official", "unipc", 3, 5.0), get_solver("unipc")

    def run(conditioning: FirstFrame) -> None:
        noise = random(2, *SHAPE)
        compilations.clear()
        denoise(noise, plan_segments(schedule, solver, 3.0, None), lambda name: expert, Run(), conditioning)

    images = [FirstFrame(random(seed, 1, SHAPE[1], 1, *SHAPE[3:]), KNOWN) for seed in (1, 2)]
    for conditioning in (images[0], images[1], FirstFrame.unknown(SHAPE[1], *SHAPE[3:])):
        run(conditioning)
    assert compilations == []
