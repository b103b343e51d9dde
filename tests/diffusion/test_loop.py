"""The denoise loop around a stand-in model: which expert, which guidance, what is compiled and what is kept."""

import gc
import weakref
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from wan_jax.config import DenoiserConfig, PerExpert
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import plan_segments, plan_steps
from wan_jax.diffusion.solvers import SOLVERS, get_solver
from wan_jax.diffusion.step import Expert, compile_step
from wan_jax.errors import InputError
from wan_jax.models.denoiser import Denoiser
from wan_jax.parameters import named_parameters, with_parameters
from wan_jax.runtime.events import Run, StepDone

SHAPE = (2, 3, 2, 4, 5)  # B C F h w
TOKENS, TEXT_DIM = 7, 6

evaluations: list[int] = []  # grows by one each time that a Counted runs
compilations: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: (
        compilations.append(event) if event.endswith("jaxpr_to_mlir_module_duration") else None
    )
)


class Context(NamedTuple):
    key: jax.Array  # [L, B, T, C]


class StandIn(nnx.Module):
    """The interface of the denoiser, and a velocity that depends on everything it is given."""

    traces = 0

    def __init__(self, rngs: nnx.Rngs, num_layers: int = 2, channels: int = SHAPE[1]):
        self.projection = nnx.Param(jax.random.normal(rngs.params(), (TEXT_DIM, channels)), axes=(None, None))
        self.kernel = nnx.Param(
            0.5 * jax.random.normal(rngs.params(), (num_layers, channels, channels)), axes=(None,) * 3
        )

    def encode_context(self, text: jax.Array) -> Context:
        return Context(jnp.stack([(layer + 1) * text @ self.projection[...] for layer in range(self.kernel.shape[0])]))

    def __call__(self, latents: jax.Array, timesteps: jax.Array, context: Context) -> jax.Array:
        StandIn.traces += 1
        assert timesteps.shape == (latents.shape[0],)
        assert timesteps.dtype == jnp.float32

        def layer(x, inputs):
            kernel, key = inputs
            return jnp.tanh(
                jnp.einsum("b c f h w, c d -> b d f h w", x, kernel) + key.mean(1)[:, :, None, None, None]
            ), None

        x, _ = lax.scan(layer, latents + timesteps[:, None, None, None, None] / 1000, (self.kernel[...], context.key))
        return x


class Counted(StandIn):
    """Also counts how often it runs, compiled or not."""

    def __call__(self, latents: jax.Array, timesteps: jax.Array, context: Context) -> jax.Array:
        jax.debug.callback(lambda: evaluations.append(1))
        return super().__call__(latents, timesteps, context)


def make_expert(seed: int, model: type[StandIn] = StandIn) -> Expert:
    """Random weights and random text."""
    rngs = nnx.Rngs(seed)
    positive, negative = 0.3 * jax.random.normal(rngs.text(), (2, SHAPE[0], TOKENS, TEXT_DIM))
    return Expert.prepare(model(rngs), positive, negative)


@pytest.fixture
def experts() -> dict[str, Expert]:
    return {"high_noise": make_expert(0), "low_noise": make_expert(1), "denoiser": make_expert(2)}


def noise(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), SHAPE)


def sample(latents, schedule, solver, guidance, boundary, get_expert, on_step=None) -> jax.Array:
    return denoise(latents, plan_segments(schedule, solver, guidance, boundary), get_expert, Run(on_step))


def plain_loop(latents, schedule, solver, guidance, boundary, experts, steps: int | None = None) -> jax.Array:
    """What `denoise` should compute, written out; with one solver, and of the first `steps` steps alone."""
    call = jax.jit(lambda denoiser, *inputs: denoiser(*inputs))
    coefficients, state = solver.coefficients(schedule), solver.init(latents)
    for index, timestep in enumerate(schedule.timesteps[:steps]):
        high = boundary is not None and bool(timestep >= 1000 * boundary)
        if schedule.high_noise_steps is not None:
            high = index < schedule.high_noise_steps
        expert = experts["denoiser" if boundary is None else "high_noise" if high else "low_noise"]
        timesteps = jnp.full(latents.shape[:1], timestep)
        conditional = call(expert.denoiser, state.latents, timesteps, expert.cond)
        unconditional = call(expert.denoiser, state.latents, timesteps, expert.uncond)
        velocity = unconditional + guidance[high] * (conditional - unconditional)
        state = solver.step(state, velocity, jax.tree.map(lambda values, index=index: values[index], coefficients))
    return state.latents


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("boundary", [0.875, None])
def test_denoise_equals_the_plain_loop(solver, boundary, experts):
    schedule = make_schedule("official", solver, 6, 12.0)
    guidance = (2.0, 3.5) if boundary is not None else (2.0, 2.0)
    arguments = noise(), schedule, get_solver(solver), guidance, boundary
    result = sample(*arguments, experts.__getitem__)
    assert result.dtype == jnp.float32
    # The same operations fused differently: a few float32 roundings a step of values around 1.
    np.testing.assert_allclose(result, plain_loop(*arguments, experts), atol=5e-6)


@pytest.mark.parametrize("low", SOLVERS)
@pytest.mark.parametrize("high", SOLVERS)
def test_solver_of_each_expert(low, high, experts):
    """Two solvers are two runs, the second from the latents of the first; one solver is one run."""
    schedule = make_schedule("official", (low, high), (3, 2), 5.0, 0.875)
    solvers = PerExpert(high=get_solver(high), low=get_solver(low))
    reports: list[StepDone] = []
    result = sample(noise(), schedule, solvers, (1.0, 2.0), 0.875, experts.__getitem__, reports.append)
    assert [(report.step, report.total, report.expert) for report in reports] == [
        *((step, 5, "high_noise") for step in (1, 2)),
        *((step, 5, "low_noise") for step in (3, 4, 5)),
    ]
    if low == high:
        expected = plain_loop(noise(), schedule, solvers.low, (1.0, 2.0), 0.875, experts)
    else:
        first = plain_loop(noise(), schedule, solvers.high, (1.0, 2.0), 0.875, experts, steps=2)
        expected = plain_loop(first, schedule.after(2), solvers.low, (1.0, 2.0), 0.875, experts)
    # The same operations fused differently: a few float32 roundings a step of values around 1.
    np.testing.assert_allclose(result, expected, atol=5e-6)


@pytest.mark.parametrize("guidance", [1.0, (1.0, 3.0), 3.0])
def test_evaluations(guidance):
    """How often the denoiser runs: once a step without guidance, twice with."""
    experts = {name: make_expert(0, Counted) for name in ("high_noise", "low_noise")}
    evaluations.clear()
    schedule = make_schedule("official", ("euler", "unipc"), (4, 2), 5.0, 0.875)
    solvers = get_solver("euler"), get_solver("unipc")
    sample(noise(), schedule, solvers, guidance, 0.875, experts.__getitem__)
    jax.effects_barrier()
    low, high = guidance if isinstance(guidance, tuple) else (guidance, guidance)
    assert len(evaluations) == 2 * (1 if high == 1 else 2) + 4 * (1 if low == 1 else 2)


def test_one_executable_for_each_solver_with_and_without_guidance(experts):
    jax.clear_caches()
    StandIn.traces = 0
    solvers = get_solver("euler"), get_solver("unipc")
    for steps in ((4, 2), (1, 3)):
        schedule = make_schedule("official", ("euler", "unipc"), steps, 5.0, 0.875)
        sample(noise(), schedule, solvers, (1.0, 3.0), 0.875, experts.__getitem__)
    assert StandIn.traces == 2
    sample(noise(), schedule, solvers, (4.0, 1.0), 0.875, experts.__getitem__)
    assert StandIn.traces == 4
    sample(noise(), schedule, solvers[::-1], (1.0, 3.0), 0.875, experts.__getitem__)
    assert StandIn.traces == 4


def test_each_expert_has_its_guidance(experts):
    """Swapping (low, high) must show; so must leaving one expert's guidance out."""
    schedule = make_schedule("official", "unipc", 6, 12.0)
    results = [
        sample(noise(), schedule, get_solver("unipc"), guidance, 0.875, experts.__getitem__)
        for guidance in ((2.0, 3.5), (3.5, 2.0), (2.0, 1.0), 2.0)
    ]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert np.abs(first - second).max() > 1e-3


def test_guidance_1_needs_no_negative_context(experts):
    schedule = make_schedule("official", "euler", 4, 12.0)
    arguments = noise(), schedule, get_solver("euler")
    without = {name: replace(expert, uncond=None) for name, expert in experts.items()}
    result = sample(*arguments, 1.0, 0.875, without.__getitem__)
    # Official: two passes whose difference times 1 is added back, which rounds a little.
    np.testing.assert_allclose(result, plain_loop(*arguments, (1.0, 1.0), 0.875, experts), atol=5e-6)
    only_high = {**experts, "low_noise": without["low_noise"]}
    mixed = sample(*arguments, (1.0, 3.0), 0.875, only_high.__getitem__)
    np.testing.assert_allclose(mixed, plain_loop(*arguments, (1.0, 3.0), 0.875, experts), atol=5e-6)
    with pytest.raises(InputError, match="guidance 3 of expert 'low_noise' needs a negative prompt"):
        sample(*arguments, 3.0, 0.875, only_high.__getitem__)


def test_guidance_1_skips_the_second_pass(experts):
    """A negative context that would poison the result is not looked at."""
    poisoned = {name: replace(e, uncond=Context(jnp.full_like(e.uncond.key, jnp.nan))) for name, e in experts.items()}
    schedule = make_schedule("official", "unipc", 3, 12.0)
    arguments = noise(), schedule, get_solver("unipc")
    assert np.isfinite(sample(*arguments, 1.0, 0.875, poisoned.__getitem__)).all()
    assert not np.isfinite(sample(*arguments, 1.01, 0.875, poisoned.__getitem__)).any()


@pytest.mark.parametrize("guidance", [1.0, (2.0, 3.0)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_numbers_do_not_recompile(solver, guidance, experts):
    jax.clear_caches()
    StandIn.traces = 0
    schedule = make_schedule("official", solver, 6, 12.0)
    # The two experts have one trace together; guidance does not add one, its two passes are a loop.
    sample(noise(), schedule, get_solver(solver), guidance, 0.875, experts.__getitem__)
    assert StandIn.traces == 1
    other_guidance = 1.0 if guidance == 1.0 else (5.5, 0.0)
    others = {"high_noise": make_expert(3), "low_noise": make_expert(4)}
    latents = noise(seed=7)
    compilations.clear()
    for kind, steps, shift in (("diffusers", 9, 5.0), ("official", 1, 3.0), ("official", 6, 12.0)):
        schedule = make_schedule(kind, solver, steps, shift)
        sample(latents, schedule, get_solver(solver), other_guidance, 0.9, others.__getitem__)
        sample(latents, schedule, get_solver(solver), other_guidance, 0.5, experts.__getitem__)
    assert StandIn.traces == 1
    assert compilations == []


def test_placement_does_not_recompile(experts):
    """Weights that are committed to their device commit the state to it, from the second step on."""
    schedule = make_schedule("official", "unipc", 6, 12.0)
    committed = {**experts, "high_noise": jax.device_put(experts["high_noise"].denoiser, jax.devices()[0])}
    committed["high_noise"] = replace(experts["high_noise"], denoiser=committed["high_noise"])
    latents = noise()
    sample(latents, schedule, get_solver("unipc"), 2.0, 0.875, experts.__getitem__)
    compilations.clear()
    sample(latents, schedule, get_solver("unipc"), 2.0, 0.875, committed.__getitem__)
    assert compilations == []


def test_compiling_ahead_with_abstract_arrays(experts):
    """The step can be compiled before there are weights or latents."""
    jax.clear_caches()
    schedule, solver = make_schedule("official", "unipc", 6, 12.0), get_solver("unipc")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        nnx.eval_shape(lambda: make_expert(0).denoiser),
    )
    contexts = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), context)
        for context in (experts["high_noise"].cond, experts["high_noise"].uncond)
    ]
    state = jax.eval_shape(solver.init, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    solver.init(noise())  # compiles the copies that init makes
    StandIn.traces = 0
    (segment,) = plan_segments(make_schedule("diffusers", "unipc", 1, 3.0), solver, 3.0, None)
    compile_step(Expert(abstract, *contexts), segment, state)
    assert StandIn.traces == 1
    latents = noise()
    compilations.clear()
    sample(latents, schedule, solver, 2.0, 0.875, experts.__getitem__)
    assert StandIn.traces == 1
    assert compilations == []


def test_reports(experts):
    jax.clear_caches()
    reports: list[StepDone] = []
    schedule = make_schedule("official", "unipc", 6, 12.0)
    sample(noise(), schedule, get_solver("unipc"), 2.0, 0.875, experts.__getitem__, reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert {report.total for report in reports} == {6}
    assert [report.expert for report in reports] == plan_steps(schedule, 0.875)
    assert all(report.seconds > 0 for report in reports)
    compile_seconds = [report.compile_seconds for report in reports]
    switch = plan_steps(schedule, 0.875).index("low_noise")
    assert compile_seconds[0] > 10 * compile_seconds[switch]  # the second expert finds the executable
    assert compile_seconds[0] > reports[0].seconds
    assert all(compile_seconds[i] == 0 for i in range(6) if i not in (0, switch))


def test_experts_are_asked_for_once_and_dropped():
    """The caller may swap weights: when the second expert is asked for, nothing holds the first any more."""
    asked, alive = [], []

    def get_expert(name: str) -> Expert:
        gc.collect()
        asked.append(name)
        assert all(reference() is None for reference in alive)
        expert = make_expert(len(asked))
        alive.extend(weakref.ref(x) for x in jax.tree.leaves((nnx.state(expert.denoiser), expert.cond, expert.uncond)))
        return expert

    sample(noise(), make_schedule("official", "unipc", 6, 12.0), get_solver("unipc"), 2.0, 0.875, get_expert)
    assert asked == ["high_noise", "low_noise"]
    assert len(alive) == 2 * 4


def test_interrupt_between_steps(experts):
    latents = noise()
    before = np.asarray(latents).copy()

    def interrupt(report: StepDone) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(
            latents, make_schedule("official", "unipc", 6, 12.0), get_solver("unipc"), 2.0, None, experts.get, interrupt
        )
    np.testing.assert_array_equal(latents, before)  # the caller's latents are not what the step donates


def test_memory_of_a_guided_step():
    """Guidance costs one context (the chosen of two), no second set of activations; the state is updated in place."""
    channels, layers, tokens = 16, 4, 4096
    shape = (1, channels, 2, 32, 32)
    (segment,) = plan_segments(make_schedule("official", "unipc", 6, 12.0), get_solver("unipc"), 3.0, None)
    text = jnp.ones((1, tokens, TEXT_DIM))
    guided = Expert.prepare(StandIn(nnx.Rngs(0), layers, channels), text, text)
    state = segment.solver.init(jnp.ones(shape))
    sizes = {}
    for name, expert in (("plain", replace(guided, uncond=None)), ("guided", guided)):
        sizes[name] = compile_step(expert, segment, state).memory_analysis()
    latents_bytes = state.latents.nbytes
    assert sizes["guided"].alias_size_in_bytes == 4 * latents_bytes
    extra = sizes["guided"].temp_size_in_bytes - sizes["plain"].temp_size_in_bytes
    # One context and both velocities, but not the model's input before its layers.
    assert extra <= guided.cond.key.nbytes + 2.5 * latents_bytes


def test_with_the_denoiser():
    """Two experts of the real model, the second one built as a checkpoint is loaded, in one executable."""
    config = DenoiserConfig(num_layers=2, dim=24, num_heads=2, ffn_dim=40, text_dim=TEXT_DIM, text_length=TOKENS)
    shape = (1, config.in_channels, 2, 4, 6)

    def build(seed: int = 0) -> Denoiser:
        return Denoiser(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))

    text = jax.random.normal(jax.random.key(0), (2, 1, TOKENS, TEXT_DIM))
    denoisers = {"high_noise": build(0), "low_noise": with_parameters(build, named_parameters(build(1)))}
    experts = {name: Expert.prepare(denoiser, *text) for name, denoiser in denoisers.items()}
    reports: list[StepDone] = []
    latents = jax.random.normal(jax.random.key(1), shape)
    arguments = latents, make_schedule("official", "unipc", 6, 12.0), get_solver("unipc"), (2.0, 3.0), 0.875
    first = plan_segments(*arguments[1:])[0]
    compile_step(experts["high_noise"], first, first.solver.init(latents))
    compilations.clear()
    result = sample(*arguments, experts.__getitem__, reports.append)
    assert compilations == []
    assert {report.expert for report in reports} == {"high_noise", "low_noise"}
    # The same operations fused differently; matrix products of some 20 terms add to the roundings.
    np.testing.assert_allclose(result, plain_loop(*arguments, experts), atol=1e-5)
