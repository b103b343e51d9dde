"""One step of sampling, as a pure function that is compiled.

Everything numeric is an argument of it (`StepInputs`), so that seed, guidance, shift and number of steps never
recompile, and the second expert runs the executable of the first. jax.jit's own cache keeps the executables. On a
pipeline of devices the compiled function is one tick of all stages, and a step of all videos is several ticks.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from wan_jax.diffusion.conditioning import TEXT_ONLY, Conditioning
from wan_jax.diffusion.guidance import classifier_free_guidance, per_video
from wan_jax.diffusion.segments import Segment
from wan_jax.diffusion.solvers import StepState
from wan_jax.kernels.attention import fastest
from wan_jax.kernels.precision import gelu_in_epilogue
from wan_jax.parallel import collectives, sharding, stages
from wan_jax.parallel.collectives import CFG, DATA, PIPELINE
from wan_jax.parallel.placement import SINGLE, Placement
from wan_jax.runtime.offload import on_host
from wan_jax.runtime.xla_flags import step_options


@dataclass(frozen=True, eq=False)
class Expert:
    """A denoiser and the keys and values that its cross-attention reads."""

    denoiser: Any
    cond: Any  # CrossAttentionKV of the prompts
    uncond: Any = None  # of the negative prompts; needed for guidance alone
    placement: Placement = SINGLE

    @classmethod
    def prepare(
        cls,
        denoiser: nnx.Module,
        cond: jax.Array,
        uncond: jax.Array | None = None,
        image: jax.Array | None = None,
        placement: Placement = SINGLE,
    ) -> "Expert":
        """Projects encoded texts, [B, text_length, text_dim], and an image's features, [B, image tokens, image_dim]."""
        graphdef, parameters = nnx.split(denoiser)
        encode = partial(_encode_context, graphdef, placement, parameters, image=image)
        return cls(denoiser, encode(cond), None if uncond is None else encode(uncond), placement)

    def attention_used(self, latents: tuple[int, ...]) -> str:
        """The implementation of self-attention that the step runs for latents of shape [B, C, F, h, w]."""
        options, config, spec = self.denoiser.attention, self.denoiser.config, self.placement.mesh_spec
        if options.implementation is not None:
            return options.implementation
        grid = tuple(size // patch for size, patch in zip(latents[2:], config.patch_size, strict=True))
        heads = config.num_heads // (spec.tensor * spec.ulysses * spec.fsdp)
        videos = 1 if spec.pipeline > 1 else latents[0] // spec.data
        shape = videos, math.prod(grid) // spec.ring, heads, config.head_dim
        query: Any = jax.ShapeDtypeStruct(shape, self.denoiser.dtype)
        lists = None if options.block_lists is None else jax.eval_shape(lambda: options.block_lists(grid))
        return fastest(query, query, query, block_lists=lists, return_lse=spec.ring > 1)


class PipelineState(NamedTuple):
    """What the stages of a pipeline hand on from one tick to the next."""

    state: StepState  # of all videos
    hidden: Any  # tokens of the video that arrived at each stage
    velocity: Any  # of the evaluation before


def initial_carry(expert: Expert, state: StepState) -> Any:
    """What the first call of the compiled step takes: the state, on a pipeline with zeros for what stages hand on."""
    carry = _abstract_carry(expert, state)
    return jax.tree.map(
        lambda x: x if isinstance(x, jax.Array) else jnp.zeros(x.shape, x.dtype, device=x.sharding), carry
    )


def _abstract_carry(expert: Expert, state: StepState) -> Any:
    """The same with shapes in the place of the zeros."""
    placement, spec = expert.placement, expert.placement.mesh_spec
    if spec.pipeline == 1:
        return state
    config = expert.denoiser.config
    _, *shape = state.latents.shape
    tokens = math.prod(size // patch for size, patch in zip(shape[1:], config.patch_size, strict=True))
    parts = spec.ring * spec.fsdp * spec.ulysses
    groups = spec.data * spec.cfg
    return PipelineState(
        state,
        placement.abstract((groups * spec.pipeline, -(-tokens // parts) * parts, config.dim), placement.stages),
        placement.abstract((groups, *shape), placement.evaluation),
    )


def compile_step(
    expert: Expert, segment: Segment, state: StepState, conditioning: Conditioning = TEXT_ONLY
) -> jax.stages.Compiled:
    """Compiles the step that `denoise` will run, or finds it compiled.

    Args:
        expert: its arrays may be abstract (jax.ShapeDtypeStruct, with the shardings that the real ones will have).
            Without `uncond` the step has no guidance.
        segment: any with the same solver; its numbers and length do not matter.
        state: `solver.init(latents)`, or what jax.eval_shape gives for it.
        conditioning: its arrays, too, may be abstract.

    Returns:
        The executable; its `memory_analysis()` says what a step needs.
    """
    graphdef, parameters = nnx.split(expert.denoiser)
    inputs = segment.inputs(np.zeros(len(state.latents), int))
    pipeline = expert.placement.mesh_spec.pipeline
    tick = None if pipeline == 1 else next(stages.ticks(1, 1, pipeline, 1)).tick
    # Only a state spread over a mesh asks for its place; any other follows the parameters. Lowered as it is, a state
    # that came out of a step would differ from the first one by being committed to a device, and compile anew.
    carry, conditioning = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding if isinstance(x.sharding, NamedSharding) else None
        ),
        (_abstract_carry(expert, state), conditioning),
    )
    # As shapes with a sharding, arrays in host memory would be taken for arrays on the device and never be fetched.
    arrays = jax.tree.map(
        lambda x: x if on_host(x) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        (parameters, expert.cond, expert.uncond),
    )
    on_nvidia = _on_nvidia(parameters)
    options = step_options(on_a_mesh=not expert.placement.is_single) if on_nvidia else {}
    step = _jitted_step(tuple(options.items()))
    with gelu_in_epilogue(on_nvidia):
        return step.lower(
            graphdef, segment.solver, expert.placement, *arrays, carry, conditioning, inputs, tick
        ).compile()


def _on_nvidia(arrays: Any) -> bool:
    """Whether arrays, or shapes with shardings, lie on NVIDIA GPUs."""
    sharding = jax.tree.leaves(arrays)[0].sharding
    device = jax.devices()[0] if sharding is None else next(iter(sharding.device_set))
    return device.platform == "gpu" and device.device_kind.startswith("NVIDIA")


@cache
def _jitted_step(options: tuple[tuple[str, bool | int | str], ...]) -> Any:
    """The jitted step with these compiler options."""
    static = "graphdef", "solver", "placement"
    return jax.jit(
        _placed_step, static_argnames=static, donate_argnames="state", compiler_options=dict(options) or None
    )


def _placed_step(graphdef, solver, placement, parameters, cond, uncond, state, conditioning, inputs, tick):
    step, state_specs = _step, placement.batch
    if placement.mesh_spec.pipeline > 1:
        step, state_specs = _pipeline_tick, PipelineState(placement.batch, placement.stages, placement.evaluation)
    contexts, known = (placement.context, placement.context), placement.batch_specs(conditioning)
    # The inputs are whole on every device, which takes its rows: processes pass them as NumPy arrays.
    in_specs = sharding.state_specs(parameters), *contexts, state_specs, known, PartitionSpec(), PartitionSpec()
    run = placement.run(partial(step, graphdef, solver), in_specs, state_specs)
    return run(parameters, cond, uncond, state, conditioning, inputs, tick)


def _step(graphdef, solver, parameters, cond, uncond, state, conditioning, inputs, tick):
    del tick
    inputs = collectives.split_axis(inputs, (DATA,), axis=0)
    denoiser = nnx.merge(graphdef, sharding.gather_outside_layers(parameters))

    def evaluate(is_conditional: jax.Array) -> jax.Array:
        context = jax.tree.map(partial(jnp.where, is_conditional), cond, uncond)
        # Without the barrier XLA embeds the latents once for both turns and keeps that, the size of all activations
        # between two layers, in memory beside the second turn's own.
        latents, timestep, _ = lax.optimization_barrier((state.latents, inputs.timestep, is_conditional))
        return denoiser(*conditioning.inputs(latents, timestep), context)

    if uncond is None:
        velocity = denoiser(*conditioning.inputs(state.latents, inputs.timestep), cond)
    elif collectives.size(CFG) > 1:
        conditional, unconditional = lax.all_gather(evaluate(lax.axis_index(CFG) == 0), CFG)
        velocity = classifier_free_guidance(conditional, unconditional, inputs.guidance)
    else:
        # A loop of two turns, so that the denoiser is compiled once and its activations exist once.
        conditional, unconditional = lax.map(evaluate, jnp.array([True, False]))
        velocity = classifier_free_guidance(conditional, unconditional, inputs.guidance)
    return _solve(solver, state, velocity, inputs, conditioning)


def _pipeline_tick(graphdef, solver, parameters, cond, uncond, carry, conditioning, inputs, tick):
    """Each stage takes a video through its layers, and the last stage's video makes its step if it is due."""
    inputs = collectives.split_axis(inputs, (DATA,), axis=0)
    denoiser = nnx.merge(graphdef, sharding.gather_outside_layers(parameters))

    def row(tree: Any, video: jax.Array, axis: int = 0) -> Any:
        """A video's part; arrays of one row are for all videos."""
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, video, 1, axis), tree)

    stage = lax.axis_index(PIPELINE)
    video, last = tick.videos[stage], tick.videos[-1]
    context = row(cond, video, axis=1)
    if uncond is not None:
        conditional = tick.is_conditional[stage] if collectives.size(CFG) == 1 else lax.axis_index(CFG) == 0
        context = jax.tree.map(partial(jnp.where, conditional), context, row(uncond, video, axis=1))
    arrived = row((carry.state.latents, inputs.timestep), video)
    hidden, newest = denoiser.run_stage(carry.hidden, *row(conditioning, video).inputs(*arrived), context)

    velocity, last_inputs = newest, row(inputs, last)
    if uncond is not None:
        conditional, unconditional = carry.velocity, newest
        if collectives.size(CFG) > 1:
            conditional, unconditional = lax.all_gather(newest, CFG)
        velocity = classifier_free_guidance(conditional, unconditional, last_inputs.guidance)
    before = row(carry.state, last)
    after = _solve(solver, before, velocity, last_inputs, row(conditioning, last))
    after = jax.tree.map(partial(jnp.where, tick.finishes), after, before)
    state = jax.tree.map(lambda x, one: lax.dynamic_update_slice_in_dim(x, one, last, 0), carry.state, after)
    return PipelineState(state, hidden, newest)


def _solve(solver, state, velocity, inputs, conditioning):
    coefficients = jax.tree.map(lambda x: per_video(x, velocity), inputs.coefficients)
    state = solver.step(state, velocity.astype(jnp.float32), coefficients)
    return replace(state, latents=conditioning.restore(state.latents))


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def _encode_context(graphdef, placement, parameters, text, image):
    def encode(parameters, text, image):
        denoiser = nnx.merge(graphdef, sharding.gather_outside_layers(parameters))
        return denoiser.encode_context(text) if image is None else denoiser.encode_context(text, image)

    in_specs = sharding.state_specs(parameters), placement.batch, placement.batch
    return placement.run(encode, in_specs, placement.context)(parameters, text, image)
