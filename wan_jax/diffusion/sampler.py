"""The one denoise loop.

The solver, the expert of each step and the guidance are policies that the loop calls. One function is compiled, for one
step; everything numeric is an argument of it, so that seed, guidance, shift and number of steps never recompile, and
the second expert runs the executable of the first. jax.jit's own cache keeps the executables.

On a pipeline of devices the function that is compiled is one turn of all stages, and a step of all videos is several.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
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
from wan_jax.diffusion.experts import by_expert
from wan_jax.diffusion.guidance import classifier_free_guidance, guidance_by_expert
from wan_jax.diffusion.schedule import TRAIN_TIMESTEPS, Schedule
from wan_jax.diffusion.solvers import Solver
from wan_jax.errors import InputError
from wan_jax.kernels.precision import gelu_in_epilogue
from wan_jax.models.nn.layers import on_host
from wan_jax.parallel import collectives, stages
from wan_jax.parallel.collectives import CFG, PIPELINE
from wan_jax.parallel.placement import Placement, gather_outside_layers
from wan_jax.runtime.xla_flags import step_options


@dataclass(frozen=True, eq=False)
class Expert:
    """A denoiser and what it attends to. The contexts are the expert's own: each projects the text itself."""

    denoiser: nnx.Module
    positive: Any  # Context of the prompts
    negative: Any = None  # Context of the negative prompts; needed only for guidance
    spread: Placement | None = None  # over which devices the arrays lie; None: one device

    @classmethod
    def prepare(
        cls,
        denoiser: nnx.Module,
        positive: jax.Array,
        negative: jax.Array | None = None,
        image: jax.Array | None = None,
        spread: Placement | None = None,
    ) -> "Expert":
        """Computes the contexts from encoded text, [B, text_length, text_dim] each, and an image's features."""
        graphdef, parameters = nnx.split(denoiser)
        encode = partial(_encode_context, graphdef, spread, parameters, image=image)
        return cls(denoiser, encode(positive), None if negative is None else encode(negative), spread)


@dataclass(frozen=True)
class StepReport:
    """What `denoise` tells its caller after each step."""

    index: int  # of the step that is done, from 0
    total: int
    expert: str
    seconds: float
    compile_seconds: float  # spent before this step, and not part of `seconds`; 0 if nothing was compiled


def plan_steps(schedule: Schedule, boundary: float | None) -> list[str]:
    """Names the expert of each step: "high_noise" where timestep >= 1000 * boundary, else "low_noise".

    A schedule that was made of each expert's number of steps says itself where they change. With boundary None there is
    one expert, "denoiser". Raises InputError for a boundary outside [0, 1].
    """
    if boundary is None:
        return ["denoiser"] * schedule.num_steps
    if not 0 <= boundary <= 1:
        raise InputError(f"boundary {boundary} is not between 0 and 1; presets have 0.875 or 0.9")
    if (high := schedule.high_noise_steps) is not None:
        return ["high_noise"] * high + ["low_noise"] * (schedule.num_steps - high)
    return ["high_noise" if t >= boundary * TRAIN_TIMESTEPS else "low_noise" for t in schedule.timesteps.tolist()]


def denoise(
    latents: jax.Array,
    schedule: Schedule,
    solver: Solver | tuple[Solver, Solver],
    guidance: float | tuple[float, float],
    boundary: float | None,
    get_expert: Callable[[str], Expert],
    on_step: Callable[[StepReport], None] | None = None,
    conditioning: Conditioning = TEXT_ONLY,
) -> jax.Array:
    """Turns noise into latents of videos.

    Args:
        latents: float32 [B, C, F, h, w] at the schedule's first noise level; left intact.
        schedule: the noise levels; see `make_schedule`.
        solver: see `get_solver`; one, whose history goes on over the change of experts, or a pair (low-noise expert,
            high-noise expert). Where they differ, the second one starts afresh from the latents at the change, as on a
            schedule that begins there: another solver's history means nothing to it.
        guidance: (low-noise expert, high-noise expert) or one number. An expert whose scale is 1 is evaluated once per
            step instead of twice.
        boundary: see `plan_steps`.
        get_expert: gives the expert of a name. Called once per unbroken run of its steps, after the loop has dropped
            the expert before it, so that the caller may swap weights.
        on_step: called after each step.
        conditioning: the frames that are known beforehand.

    Returns:
        float32 [B, C, F, h, w], without noise.

    Raises:
        InputError: a boundary, solver or guidance that cannot be used, or guidance without a negative context.
    """
    segments = plan_segments(schedule, solver, guidance, boundary)
    state = segments[0].run.solver.init(conditioning.restore(latents))
    for segment in segments:
        # The call holds the only reference to the expert, so that it is gone before the next one is asked for.
        state = run_segment(segment, get_expert(segment.expert), state, conditioning, on_step)
    return state.latents


@dataclass(frozen=True)
class _Run:
    """Steps that share a solver's history, from `first` on."""

    first: int
    schedule: Schedule  # of these steps alone
    solver: Solver
    coefficients: Any

    @classmethod
    def starting_at(cls, first: int, schedule: Schedule, solver: Solver) -> "_Run":
        rest = schedule.after(first)
        return cls(first, rest, solver, solver.coefficients(rest))


@dataclass(frozen=True, eq=False)
class Segment:
    """An unbroken run of one expert's steps."""

    expert: str
    steps: list[int]
    run: _Run
    scale: float  # of guidance


def plan_segments(
    schedule: Schedule,
    solver: Solver | tuple[Solver, Solver],
    guidance: float | tuple[float, float],
    boundary: float | None,
) -> list[Segment]:
    """What each expert does, in order; arguments and errors as of `denoise`."""
    names = plan_steps(schedule, boundary)
    experts = tuple(dict.fromkeys(names))
    scales, solvers = guidance_by_expert(guidance, experts), by_expert("solver", solver, experts)
    segments: list[Segment] = []
    run = _Run.starting_at(0, schedule, solvers[names[0]])
    for name, group in itertools.groupby(range(schedule.num_steps), key=names.__getitem__):
        steps = list(group)
        if solvers[name] != run.solver:
            run = _Run.starting_at(steps[0], schedule, solvers[name])
        segments.append(Segment(name, steps, run, scales[name]))
    return segments


def run_segment(
    segment: Segment,
    expert: Expert,
    state: Any,
    conditioning: Conditioning,
    on_step: Callable[[StepReport], None] | None,
) -> Any:
    """Runs consecutive steps of one expert: solver state before them -> solver state after them."""
    run, scale = segment.run, segment.scale
    if scale == 1:
        expert = replace(expert, negative=None)
    elif expert.negative is None:
        raise InputError(
            f"guidance {scale:g} of expert {segment.expert!r} needs a negative prompt; give one, or use guidance 1"
        )
    if segment.steps[0] == run.first > 0:
        state = run.solver.init(state.latents)
    start = time.perf_counter()
    step = compile_step(expert, run.schedule, run.solver, state, conditioning)
    compile_seconds = time.perf_counter() - start
    arrays = nnx.state(expert.denoiser), expert.positive, expert.negative
    total = run.first + run.schedule.num_steps
    carry = jax.tree.map(_zeros, _carry(expert, state))
    start = time.perf_counter()
    for numbers, done in _calls(expert, run, segment.steps, len(state.latents)):
        carry = step(*arrays, carry, conditioning, *numbers, np.float32(scale))
        if done is None:
            continue
        # Waiting here makes the reported seconds true and lets Ctrl-C in; it costs far less than a step.
        jax.block_until_ready(carry)
        if on_step is not None:
            on_step(StepReport(done, total, segment.expert, time.perf_counter() - start, compile_seconds))
        start, compile_seconds = time.perf_counter(), 0.0
    return carry.state if isinstance(carry, PipelineState) else carry


class PipelineState(NamedTuple):
    """What the stages of a pipeline hand on from one turn to the next."""

    state: Any  # the solver's, of all videos
    hidden: Any  # tokens of the video that arrived at each stage
    velocity: Any  # of the evaluation before


def _carry(expert: Expert, state: Any) -> Any:
    """The carry of the compiled step: the solver state, or a PipelineState around it with the shapes of the rest."""
    spread = _in_stages(expert.spread)
    if spread is None:
        return state
    denoiser: Any = expert.denoiser
    config, strategy = denoiser.config, spread.strategy
    _, *shape = state.latents.shape
    tokens = math.prod(size // patch for size, patch in zip(shape[1:], config.patch_size, strict=True))
    parts = strategy.ring * strategy.fsdp * strategy.ulysses
    groups = strategy.data * strategy.cfg
    return PipelineState(
        state,
        spread.abstract((groups * strategy.pipeline, -(-tokens // parts) * parts, config.dim), spread.stages),
        spread.abstract((groups, *shape), spread.evaluation),
    )


def _zeros(array: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    return array if isinstance(array, jax.Array) else jnp.zeros(array.shape, array.dtype, device=array.sharding)


def _in_stages(spread: Placement | None) -> Placement | None:
    """The same where it is a pipeline, else None."""
    return spread if spread is not None and spread.strategy.pipeline > 1 else None


def _calls(expert: Expert, run: _Run, steps: Sequence[int], videos: int) -> Iterator[tuple[tuple, int | None]]:
    """The numbers of each call of the compiled step, and the step that is done with it.

    Those are the solver's coefficients and the timestep; on a pipeline the coefficients of the last stage's video, and
    a timestep for each stage, its video, whether it evaluates the prompt, and whether the last one's step is done.
    """

    def numbers(index: int) -> tuple[Any, np.ndarray]:
        return jax.tree.map(lambda values: values[index], run.coefficients), run.schedule.timesteps[index]

    first, spread = steps[0] - run.first, _in_stages(expert.spread)
    if spread is None:
        for index in steps:
            yield numbers(index - run.first), index
        return
    strategy = spread.strategy
    evaluations = 1 if expert.negative is None or strategy.cfg > 1 else 2
    for turn in stages.turns(len(steps), videos // strategy.data, strategy.pipeline, evaluations):
        coefficients, _ = numbers(first + turn.steps[-1])
        timesteps = run.schedule.timesteps[first + turn.steps]
        done = None if turn.done is None else steps[turn.done]
        yield (coefficients, (timesteps, turn.videos, turn.is_positive, np.bool_(turn.finishes))), done


def compile_step(
    expert: Expert, schedule: Schedule, solver: Solver, state: Any, conditioning: Conditioning = TEXT_ONLY
) -> jax.stages.Compiled:
    """Compiles the step that `denoise` will run, or finds it compiled.

    Args:
        expert: its arrays may be abstract (jax.ShapeDtypeStruct, with the shardings that the real ones will have).
            Without a negative context the step has no guidance.
        schedule: any schedule; its numbers and length do not matter.
        solver: see `get_solver`.
        state: `solver.init(latents)`, or what jax.eval_shape gives for it.
        conditioning: its arrays, too, may be abstract.

    Returns:
        The executable; its `memory_analysis()` says what a step needs.
    """
    graphdef, parameters = nnx.split(expert.denoiser)
    numbers, _ = next(_calls(expert, _Run.starting_at(0, schedule, solver), [0], state.latents.shape[0]))
    # Only a state spread over a mesh asks for its place; any other follows the parameters. Lowered as it is, a state
    # that came out of a step would differ from the first one by being committed to a device, and compile anew.
    state, conditioning = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding if isinstance(x.sharding, NamedSharding) else None
        ),
        (_carry(expert, state), conditioning),
    )
    # As shapes with a sharding, arrays in host memory would be taken for arrays on the device and never be fetched.
    arrays = jax.tree.map(
        lambda x: x if on_host(x) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        (parameters, expert.positive, expert.negative),
    )
    on_nvidia = _on_nvidia(parameters)
    options = step_options(expert.spread is not None) if on_nvidia else {}
    step = _sample_step(tuple(options.items()))
    with gelu_in_epilogue(on_nvidia):
        return step.lower(
            graphdef, solver, expert.spread, *arrays, state, conditioning, *numbers, np.float32(1)
        ).compile()


def _on_nvidia(arrays: Any) -> bool:
    """Whether arrays, or shapes with shardings, lie on NVIDIA GPUs."""
    sharding = jax.tree.leaves(arrays)[0].sharding
    device = jax.devices()[0] if sharding is None else next(iter(sharding.device_set))
    return device.platform == "gpu" and device.device_kind.startswith("NVIDIA")


def _spread_step(graphdef, solver, spread, parameters, positive, negative, state, conditioning, *numbers):
    arguments = parameters, positive, negative, state, conditioning, numbers
    if spread is None:
        return _step(graphdef, solver, *arguments)
    step, state_specs = _step, spread.batch
    if _in_stages(spread) is not None:
        step, state_specs = _turn, PipelineState(spread.batch, spread.stages, spread.evaluation)
    contexts = spread.context, spread.context
    known = jax.tree.map(lambda x: spread.batch if x.ndim and len(x) > 1 else PartitionSpec(), conditioning)
    in_specs = spread.state_specs(parameters), *contexts, state_specs, known, PartitionSpec()
    return spread.shard_map(partial(step, graphdef, solver), in_specs, state_specs)(*arguments)


def _step(graphdef, solver, parameters, positive, negative, state, conditioning, numbers):
    coefficients, timestep, scale = numbers
    denoiser = nnx.merge(graphdef, gather_outside_layers(parameters))
    timesteps = jnp.full(state.latents.shape[:1], timestep)

    def evaluate(is_positive: jax.Array) -> jax.Array:
        context = jax.tree.map(partial(jnp.where, is_positive), positive, negative)
        # Without the barrier XLA embeds the latents once for both turns and keeps that, the size of all activations
        # between two layers, in memory beside the second turn's own.
        latents, t, _ = lax.optimization_barrier((state.latents, timesteps, is_positive))
        return denoiser(*conditioning.inputs(latents, t), context)

    if negative is None:
        velocity = denoiser(*conditioning.inputs(state.latents, timesteps), positive)
    elif collectives.size(CFG) > 1:
        conditional, unconditional = lax.all_gather(evaluate(lax.axis_index(CFG) == 0), CFG)
        velocity = classifier_free_guidance(conditional, unconditional, scale)
    else:
        # A loop of two turns, so that the denoiser is compiled once and its activations exist once.
        conditional, unconditional = lax.map(evaluate, jnp.array([True, False]))
        velocity = classifier_free_guidance(conditional, unconditional, scale)
    return _solve(solver, state, velocity, coefficients, conditioning)


def _turn(graphdef, solver, parameters, positive, negative, queue, conditioning, numbers):
    """Each stage takes a video through its layers, and the last stage's video makes its step if it is due."""
    coefficients, (timesteps, videos, is_positive, finishes), scale = numbers
    denoiser = nnx.merge(graphdef, gather_outside_layers(parameters))

    def row(tree: Any, video: jax.Array, axis: int = 0) -> Any:
        """A video's part; arrays of one row or without rows are for all videos."""
        return jax.tree.map(lambda x: x if x.ndim == 0 else lax.dynamic_slice_in_dim(x, video, 1, axis), tree)

    stage = lax.axis_index(PIPELINE)
    video, known, context = videos[stage], row(conditioning, videos[stage]), row(positive, videos[stage], axis=1)
    if negative is not None:
        here = is_positive[stage] if collectives.size(CFG) == 1 else lax.axis_index(CFG) == 0
        context = jax.tree.map(partial(jnp.where, here), context, row(negative, video, axis=1))
    inputs = known.inputs(row(queue.state.latents, video), timesteps[stage, None])
    hidden, newest = denoiser.run_stage(queue.hidden, *inputs, context)

    velocity, last = newest, videos[-1]
    if negative is not None:
        conditional, unconditional = queue.velocity, newest
        if collectives.size(CFG) > 1:
            conditional, unconditional = lax.all_gather(newest, CFG)
        velocity = classifier_free_guidance(conditional, unconditional, scale)
    before = row(queue.state, last)
    after = _solve(solver, before, velocity, coefficients, row(conditioning, last))
    after = jax.tree.map(partial(jnp.where, finishes), after, before)
    state = jax.tree.map(lambda x, one: lax.dynamic_update_slice_in_dim(x, one, last, 0), queue.state, after)
    return PipelineState(state, hidden, newest)


def _solve(solver, state, velocity, coefficients, conditioning):
    state = solver.step(state, velocity.astype(jnp.float32), coefficients)
    return state._replace(latents=conditioning.restore(state.latents))


@cache
def _sample_step(options: tuple[tuple[str, bool | int | str], ...]) -> Any:
    """The jitted step with these compiler options."""
    static = "graphdef", "solver", "spread"
    return jax.jit(
        _spread_step, static_argnames=static, donate_argnames="state", compiler_options=dict(options) or None
    )


@partial(jax.jit, static_argnames=("graphdef", "spread"))
def _encode_context(graphdef, spread, parameters, text, image):
    def run(parameters, text, image):
        denoiser = nnx.merge(graphdef, gather_outside_layers(parameters))
        return denoiser.encode_context(text) if image is None else denoiser.encode_context(text, image)

    if spread is None:
        return run(parameters, text, image)
    in_specs = spread.state_specs(parameters), spread.batch, spread.batch
    return spread.shard_map(run, in_specs, spread.context)(parameters, text, image)
