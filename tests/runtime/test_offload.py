"""Memory profiles: where weights lie, that no copy stays behind, and that no bit of a result changes."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax import WanPipeline
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import plan_segments
from wan_jax.diffusion.solvers import get_solver
from wan_jax.diffusion.step import Expert, compile_step
from wan_jax.errors import InputError
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.nn.linear import Linear
from wan_jax.models.nn.stacked_layers import scan_layers, stack_layers
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import abstract_parameters, dotted, named_parameters
from wan_jax.runtime import offload as memory
from wan_jax.runtime.events import FramesDecoded, StageDone, StepDone
from wan_jax.runtime.offload import PROFILES, Memory, abstract_array, on_host, place, single_device, streams
from wan_jax.testing.models import DEMO, random_pipeline
from wan_jax.text.tokenizer import Tokenizer

SMALL = {"size": (48, 32), "frames": 5, "steps": 3, "shift": 5.0, "seed": 3}
MODELS = ("text_encoder", "vae", "high_noise", "low_noise")


@pytest.fixture(scope="module")
def pipelines(tokenizer_folder):
    """The same weights under every profile, put where they wait."""
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    return {
        name: random_pipeline(DEMO, tokenizer, placement=Placement(offload=profile))
        for name, profile in PROFILES.items()
    }


@pytest.fixture(scope="module")
def videos(pipelines):
    return {profile: pipeline("a red circle", **SMALL) for profile, pipeline in pipelines.items()}


def kinds(model: nnx.Module) -> dict[str, str]:
    return {name: array.sharding.memory_kind for name, array in named_parameters(model).items()}


def models(pipeline: WanPipeline) -> dict[str, nnx.Module]:
    return {"text_encoder": pipeline.text_encoder, "vae": pipeline.vae, **pipeline.denoisers}


@pytest.mark.parametrize("profile", ["swap", "stream"])
def test_no_bit_changes(videos, profile):
    np.testing.assert_array_equal(videos[profile].latents, videos["resident"].latents)
    np.testing.assert_array_equal(videos[profile].frames, videos["resident"].frames)


def test_encoding_frees_what_it_copied(pipelines, videos):
    gc.collect()  # what other tests left
    live = len(jax.live_arrays())
    latents = pipelines["swap"].encode(videos["swap"].frames)
    gc.collect()
    assert len(jax.live_arrays()) == live
    np.testing.assert_array_equal(latents, pipelines["resident"].encode(videos["swap"].frames))


@pytest.mark.parametrize("profile", PROFILES)
def test_weights_wait_where_the_profile_says_also_after_a_run(pipelines, videos, profile):
    expected = "device" if profile == "resident" else "pinned_host"
    for name, model in models(pipelines[profile]).items():
        assert set(kinds(model).values()) == {expected}, name
        assert not any(array.is_deleted() for array in named_parameters(model).values()), name


@pytest.mark.parametrize("name", MODELS)
def test_running_models(pipelines, name):
    with pipelines["swap"].memory.on_device(models(pipelines["swap"])[name]) as running:
        assert set(kinds(running).values()) == {"device"}
    assert all(array.is_deleted() for array in named_parameters(running).values())

    waiting = models(pipelines["stream"])[name]
    with pipelines["stream"].memory.on_device(waiting) as running:
        for parameter, kind in kinds(running).items():
            assert kind == ("pinned_host" if streams(parameter) else "device"), parameter
        assert any(map(streams, kinds(running))) == (name != "vae")
    for parameter, array in named_parameters(running).items():
        assert array.is_deleted() != streams(parameter), parameter

    resident = models(pipelines["resident"])[name]
    with pipelines["resident"].memory.on_device(resident) as running:
        assert running is resident


def test_an_error_frees_the_copies_too(pipelines):
    with pytest.raises(KeyboardInterrupt), pipelines["swap"].memory.on_device(pipelines["swap"].vae) as running:
        raise KeyboardInterrupt
    assert all(array.is_deleted() for array in named_parameters(running).values())


def test_one_expert_at_a_time(pipelines):
    """While an expert runs, no copy of the text encoder or of the other expert is on the device."""
    pipeline, resident = pipelines["swap"], pipelines["resident"]
    denoiser, encoder = pipeline.denoisers["high_noise"], pipeline.text_encoder
    down = [model.blocks.feed_forward.down.kernel.get_value() for model in (denoiser, encoder)]
    counts = []

    def on_device(array: jax.Array) -> int:
        return sum(
            other.shape == array.shape and other.dtype == array.dtype and other.sharding.memory_kind == "device"
            for other in jax.live_arrays()
        )

    names = {StepDone: "denoise", FramesDecoded: "decode"}

    def count(event):
        if (name := names.get(type(event), event.stage if isinstance(event, StageDone) else None)) is not None:
            counts.append((name, *map(on_device, down)))

    gc.collect()
    pipeline("a blue square", **SMALL, on_event=count)
    assert len(resident.denoisers) == 2  # beside the resident pipeline's three models, which have the same shapes
    assert [count for count in counts if count[0] == "text"] == [("text", 2, 2)]
    assert [count for count in counts if count[0] == "denoise"][: SMALL["steps"]] == [("denoise", 3, 1)] * SMALL[
        "steps"
    ]
    assert {count for count in counts if count[0] == "decode"} == {("decode", 2, 1)}


def test_prefetch_where_there_is_room(pipelines, videos, monkeypatch):
    pipeline = pipelines["swap"]
    calls = []
    real = Memory.prefetch
    monkeypatch.setattr(Memory, "prefetch", lambda self, model: calls.append(real(self, model)) or calls[-1])
    pipeline("a red circle", **SMALL)
    assert calls
    assert not any(calls)  # a CPU does not say how much it has

    calls.clear()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 40)
    again = pipeline("a red circle", **SMALL)
    assert calls.count(True) == 1
    np.testing.assert_array_equal(again.latents, videos["resident"].latents)
    assert not pipeline.memory.copies


def test_an_interrupted_run_leaves_nothing(pipelines, monkeypatch):
    pipeline = pipelines["swap"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 40)

    def interrupt(*args, **kwargs):
        assert pipeline.memory.copies
        raise KeyboardInterrupt

    finish = Memory.on_device
    calls = []

    def on_device(self, model):
        calls.append(model)
        if model is pipeline.denoisers["low_noise"]:
            interrupt()
        return finish(self, model)

    monkeypatch.setattr(Memory, "on_device", on_device)
    with pytest.raises(KeyboardInterrupt):
        pipeline("a red circle", **SMALL)
    assert not pipeline.memory.copies


def test_prefetched_and_never_used(pipelines, monkeypatch):
    keeper, vae = pipelines["swap"].memory, pipelines["swap"].vae
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 40)
    assert keeper.prefetch(vae)
    assert not keeper.prefetch(vae)
    (placed,) = keeper.copies
    keeper.drop_prefetched()
    assert all(array.is_deleted() for array in named_parameters(placed).values())
    assert not any(array.is_deleted() for array in named_parameters(vae).values())


def test_threads_share_a_copy(pipelines, monkeypatch):
    """Two threads that run one model have one copy of it, which lives until both are done."""
    keeper, vae = pipelines["swap"].memory, pipelines["swap"].vae
    first_is_done = threading.Event()
    both_run = threading.Barrier(2, timeout=60)

    def run(is_first: bool) -> tuple[nnx.Module, bool]:
        with keeper.on_device(vae) as running:
            both_run.wait()
            if not is_first:
                assert first_is_done.wait(60)
                keeper.drop_prefetched()  # as the end of another run does
            alive = not any(array.is_deleted() for array in named_parameters(running).values())
        if is_first:
            first_is_done.set()
        return running, alive

    with ThreadPoolExecutor(2) as threads:
        (running, alive), (other, other_alive) = threads.map(run, (True, False))
    assert running is other
    assert alive
    assert other_alive
    assert not keeper.copies
    assert all(array.is_deleted() for array in named_parameters(running).values())


def test_many_threads_use_and_prefetch(pipelines, monkeypatch):
    """Every block sees its model whole, whatever other threads prefetch and drop; nothing is left."""
    pipeline = pipelines["swap"]
    keeper, pair = pipeline.memory, list(pipeline.denoisers.values())
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 40)

    def run(index: int) -> bool:
        with keeper.on_device(pair[index % 2]) as running:
            keeper.prefetch(pair[(index + 1) % 2])
            ok = bool(jnp.isfinite(running.head.linear.kernel[...]).all())
        keeper.drop_prefetched()
        return ok

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(24)))
    assert not keeper.copies


def test_streamed_parameters_are_nearly_all():
    tree = abstract_parameters(lambda: Denoiser(DEMO.denoiser, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    stacked = {name for name, info in tree.items() if info.stacked}
    assert {name for name in stacked if not streams(name)} == {name for name in stacked if not name.endswith("kernel")}
    assert not any(streams(name) for name in tree.keys() - stacked)


@pytest.fixture
def layers():
    class Layer(nnx.Module):
        def __init__(self, size, **options):
            self.read = Linear(size, size, axes=(None, None), **options)
            self.unread = Linear(size, size, axes=(None, None), **options)

        def __call__(self, x):
            return jnp.tanh(self.read(x))

    return stack_layers(Layer, 5, 8, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


def fetched(layers, names=(".kernel",)):
    device = jax.devices()[0]
    return place(
        layers, {name: single_device(device, name.endswith(tuple(names))) for name in named_parameters(layers)}
    )


def run(layers, x, offsets):
    def step(x, layer, offset):
        y = layer(x) + offset
        return y, (y.sum(), {"offset": offset})

    return scan_layers(step, x, layers, offsets)


@pytest.mark.parametrize("names", [(".kernel",), (".bias",), (".kernel", ".bias")])
def test_scan_layers_from_host_memory(layers, names):
    x, offsets = jnp.linspace(-1, 1, 16).reshape(2, 8), jnp.arange(5.0)
    here, there = jax.jit(run)(layers, x, offsets), jax.jit(run)(fetched(layers, names), x, offsets)
    jax.tree.map(np.testing.assert_array_equal, here, there)
    assert here[1][0].shape == (5,)


def test_one_layer_alone(layers):
    first = jax.tree.map(lambda array: array[:1], layers)
    x, offsets = jnp.ones((2, 8)), jnp.zeros(1)
    here, there = jax.jit(run)(first, x, offsets), jax.jit(run)(fetched(first), x, offsets)
    jax.tree.map(np.testing.assert_array_equal, here, there)


def test_shapes_in_the_place_of_layers(layers):
    """What is compiled from shapes is what is compiled from the arrays: otherwise no copy is asked for."""
    there = fetched(layers)
    shapes = jax.tree.map(lambda array: abstract_array(array.shape, array.dtype, array.sharding), there)
    if not on_host(shapes.read.kernel.get_value()):
        assert jax.__version_info__ < (0, 11)  # and the plan asks a formula
        return
    inputs = jnp.ones((2, 8)), jnp.zeros(5)
    assert "device_put" in str(jax.make_jaxpr(run)(shapes, *inputs))
    assert str(jax.make_jaxpr(run)(shapes, *inputs)) == str(jax.make_jaxpr(run)(there, *inputs))


@pytest.mark.parametrize("profile", PROFILES)
def test_the_step_takes_parameters_where_they_are(pipelines, profile):
    segment, *_ = plan_segments(make_schedule("official", "euler", 1, 5.0), get_solver("euler"), 1.0, None)
    denoiser = pipelines[profile].denoisers["low_noise"]
    with pipelines[profile].memory.on_device(denoiser) as running:
        expert = Expert.prepare(running, jnp.zeros((1, DEMO.denoiser.text_length, DEMO.denoiser.text_dim)))
        state = segment.solver.init(jnp.zeros((1, DEMO.denoiser.in_channels, 1, 4, 6)))
        (parameters, *_), _ = compile_step(expert, segment, state).input_shardings
        shardings = jax.tree.leaves(parameters, is_leaf=lambda node: node is None)  # None: the step does not read it
        names = [dotted(path) for path, _ in nnx.state(running).flat_state()]
    kinds = {name: sharding.memory_kind for name, sharding in zip(names, shardings, strict=True) if sharding}
    assert kinds == {name: "pinned_host" if profile == "stream" and streams(name) else "device" for name in kinds}
    assert any(map(streams, kinds))


def test_copies_are_asked_for_one_layer_ahead_and_only_of_what_is_read(layers):
    jaxpr = jax.make_jaxpr(run)(fetched(layers), jnp.ones((2, 8)), jnp.zeros(5)).jaxpr
    (loop,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "while"]
    body = loop.params["body_jaxpr"].jaxpr
    copies = [equation for equation in body.eqns if equation.primitive.name == "device_put"]
    assert [copy.outvars[0].aval.shape for copy in copies] == [(8, 8)]  # `read`, not `unread`
    (product,) = [equation for equation in body.eqns if equation.primitive.name == "dot_general"]
    assert product.invars[1] in body.invars  # this turn computes with what the turn before fetched
    assert copies[0].outvars[0] in body.outvars


def test_layers_on_the_device_are_scanned_as_ever(layers):
    jaxpr = jax.make_jaxpr(run)(layers, jnp.ones((2, 8)), jnp.zeros(5)).jaxpr
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert "scan" in names
    assert "device_put" not in str(jaxpr)


def test_loading(diffusers_tree):
    pipeline = WanPipeline.from_pretrained(diffusers_tree, "float32", profile="stream")
    for name, model in models(pipeline).items():
        assert set(kinds(model).values()) == {"pinned_host"}, name
    resident = WanPipeline.from_pretrained(diffusers_tree, "float32")  # auto: a CPU has room for everything
    assert resident.placement.offload.name == "resident"
    assert set(kinds(resident.vae).values()) == {"device"}
    with pytest.raises(InputError, match="unknown profile 'swop'; did you mean 'swap'"):
        WanPipeline.from_pretrained(diffusers_tree, "float32", profile="swop")
