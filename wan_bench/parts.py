"""`wan-jax bench`: seconds, FLOP/s and memory of one part of a model, with random weights.

Speed does not depend on the weights' values, as long as they are neither constant nor zero. Every part is compiled
before it is timed; a time is the median of several runs. `matmul` is the rate of a large bfloat16 product, measured in
the same run: what the device gives at best, at the clock that its power allows.
"""

import json
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.config import PerExpert, WanConfig
from wan_jax.diffusion.params import DTYPES, SamplingParams, check_name
from wan_jax.errors import InputError
from wan_jax.kernels.attention import BACKENDS, attention
from wan_jax.kernels.precision import gelu, gelu_in_epilogue
from wan_jax.media.codec import Codec, decode_function, encode_function
from wan_jax.media.video import VideoWriter
from wan_jax.models.denoiser import CrossAttentionKV, Denoiser
from wan_jax.models.nn.norms import layer_norm
from wan_jax.models.nn.rope import apply_rope, rope_tables
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import SINGLE, Placement
from wan_jax.planning.time import decode_flops, denoiser_flops, encode_flops
from wan_jax.presets import get_preset
from wan_jax.runtime import xla_flags
from wan_jax.runtime.compiled import CompiledFunction, workspace_bytes
from wan_jax.runtime.devices import bytes_of_a_device, matmul_rate, peak_bytes, seconds_of
from wan_jax.runtime.events import Run
from wan_jax.runtime.files import check_writable
from wan_jax.runtime.offload import Memory
from wan_jax.testing.models import DEMO, random_model, random_pipeline
from wan_jax.testing.tokenizer import train_small_tokenizer
from wan_jax.text.encoder import encode_text_function
from wan_jax.text.tokenizer import Tokenizer

PROMPT = "Two cats in boxing gear and bright gloves fight on a spotlighted stage."


@dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    seconds: tuple[float, ...]  # of each run
    flops: float | None = None  # of one run
    memory_bytes: int | None = None  # of the program: arguments, results and workspace
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self, matmul: float) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "seconds": self.median, "runs": list(self.seconds)}
        if self.flops is not None:
            rate = self.flops / self.median
            row |= {"flops": self.flops, "tflop_per_second": rate / 1e12, "fraction_of_matmul": rate / matmul}
        if self.memory_bytes is not None:
            row["memory_bytes"] = self.memory_bytes
        return row | self.extra


@dataclass(frozen=True)
class Bench:
    """What is measured: one model, one size.

    Attributes:
        repeats: timed runs of each part.
        vae_dtype: of the VAE; the other models take `dtype`.
        on_row: called with each row as it is done.
        placement: the devices of the VAE and of a whole video.
    """

    config: WanConfig
    settings: SamplingParams
    dtype: str = "bfloat16"
    vae_dtype: str = "float32"
    repeats: int = 5
    on_row: Callable[[Row], None] = lambda row: None
    placement: Placement = SINGLE

    @property
    def latents_shape(self) -> tuple[int, int, int, int]:
        return self.settings.latents_shape(self.config)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along frames, height and width."""
        frames, height, width = (
            size // step for size, step in zip(self.latents_shape[1:], self.config.denoiser.patch_size, strict=True)
        )
        return frames, height, width

    @property
    def tokens(self) -> int:
        return int(np.prod(self.grid))

    def time(
        self, name: str, function: Callable, *args: Any, flops: float | None = None, options: Any = None, **extra: Any
    ) -> Row:
        """Compiles function(*args), runs it `repeats` times after a warm-up, and reports."""
        start = time.perf_counter()
        compiled = jax.jit(function, compiler_options=options).lower(*args).compile()
        extra = {"compile_seconds": time.perf_counter() - start, **extra}
        analysis: Any = compiled.memory_analysis()
        memory = analysis.argument_size_in_bytes + workspace_bytes(compiled)
        return self.report(name, seconds_of(partial(compiled, *args), self.repeats), flops, memory, **extra)

    def report(
        self, name: str, seconds: list[float], flops: float | None = None, memory: int | None = None, **extra: Any
    ) -> Row:
        row = Row(name, tuple(seconds), flops, memory, extra)
        self.on_row(row)
        return row


def normal(shape: tuple[int, ...], dtype: Any = jnp.float32, seed: int = 1) -> jax.Array:
    """Drawn in float32: bfloat16 draws take few distinct values."""
    draw = jax.jit(lambda key: jax.random.normal(key, shape).astype(dtype))
    return draw(jax.random.key(seed))


def get_config(preset: str) -> WanConfig:
    """A preset, or the demo's model."""
    return DEMO if preset == DEMO.name else get_preset(preset)


def device_facts() -> dict[str, Any]:
    """What every report says of the device: its name, versions, and the rate of its matrix products now."""
    xla_flags.configure()
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.client.platform_version.split("\n")[0],
        "jax": jax.__version__,
        "matmul_tflop_per_second": matmul_rate() / 1e12,
    }


def denoiser_inputs(bench: Bench, model: Denoiser) -> tuple[jax.Array, jax.Array, CrossAttentionKV]:
    """(latents, timesteps, context) of one forward."""
    config = bench.config.denoiser
    text = normal((1, config.text_length, config.text_dim), model.dtype)
    context = jax.jit(lambda model, text: model.encode_context(text))(model, text)
    return normal((1, *bench.latents_shape)), jnp.array([500.0]), context


def time_forward(bench: Bench, name: str, model: Denoiser, inputs: Sequence[Any], as_in_a_step: bool = True) -> Row:
    """One forward, compiled as the denoising step is, or as any program of JAX."""
    in_epilogue = as_in_a_step and jax.devices()[0].device_kind.startswith("NVIDIA")

    def forward(model: Denoiser, *inputs: Any) -> jax.Array:
        with gelu_in_epilogue(in_epilogue):
            return model(*inputs)

    flops = denoiser_flops(bench.config.denoiser, bench.tokens)
    options = xla_flags.CUBLASLT_OPTIONS if in_epilogue else None
    return bench.time(name, forward, model, *inputs, flops=flops, options=options)


def bench_denoiser(bench: Bench, plot: pathlib.Path | None = None) -> None:
    """One forward of one expert; with `plot`, also what the parts of its layers take, and a picture."""
    model = random_model(Denoiser, bench.config.denoiser, bench.dtype)
    forward = time_forward(bench, "forward", model, denoiser_inputs(bench, model))
    if plot is not None:
        rows = [forward, *denoiser_parts(bench, model)]
        draw_parts(bench, rows, plot)


def denoiser_parts(bench: Bench, model: Denoiser) -> list[Row]:
    """Times the parts of one layer, each as a program of its own; `extra["count"]` says how often it occurs in a layer.

    Alone a part cannot be fused with its neighbours, so the sum may exceed the forward a little.
    """
    config, dtype = bench.config.denoiser, jnp.dtype(bench.dtype)
    length, dim, heads, width = bench.tokens, config.dim, config.num_heads, config.head_dim
    x = normal((1, length, dim))
    y = x.astype(dtype)
    query, key, value = (normal((1, length, heads, width), dtype, seed) for seed in range(3))
    text = normal((1, config.text_length, heads, width), dtype)
    row = normal((1, 1, dim))
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    rotary = rope_tables(bench.grid, width)
    products = {
        "products of attention": (6, lambda block, y: block.self_attention.query(y), dim * dim),
        "product up": (1, lambda block, y: block.feed_forward.up(y), dim * config.ffn_dim),
    }
    rows = []

    def part(name: str, count: int, function: Callable, *args: Any, flops: float | None = None) -> None:
        rows.append(bench.time(name, function, *args, flops=flops, count=count))

    part("self-attention", 1, attention, query, key, value, flops=4.0 * length**2 * dim)
    part("cross-attention", 1, attention, query, text, text, flops=4.0 * length * config.text_length * dim)
    for name, (count, function, size) in products.items():
        part(name, count, function, block, y, flops=2.0 * length * size)
    wide = normal((1, length, config.ffn_dim), dtype)
    down = 2.0 * length * dim * config.ffn_dim
    part("product down", 1, lambda block, wide: block.feed_forward.down(wide), block, wide, flops=down)
    part("GELU", 1, gelu, wide)
    del wide
    norm = block.self_attention.query_norm
    part("norm of queries, keys", 3, lambda norm, y: norm(y), norm, y)
    part("rotary positions", 2, lambda query, rotary: apply_rope(query, rotary), query, rotary)
    part("layer norm, modulation", 3, lambda x, row: (layer_norm(x, config.eps) * row + row).astype(dtype), x, row)
    part("gate, residual", 3, lambda x, y, row: x + row * y, x, y, row)
    return rows


def bench_attention(bench: Bench) -> None:
    """Every implementation that runs here, at the lengths of self- and of cross-attention."""
    config, dtype = bench.config.denoiser, jnp.dtype(bench.dtype)
    for name, key_length in (("self", bench.tokens), ("cross", config.text_length)):
        query, key, value = (
            normal((1, length, config.num_heads, config.head_dim), dtype, seed)
            for seed, length in enumerate((bench.tokens, key_length, key_length))
        )
        flops = 4.0 * bench.tokens * key_length * config.dim
        for implementation, backend in BACKENDS.items():
            logits_bytes = 4 * config.num_heads * bench.tokens * key_length
            too_large = implementation == "reference" and logits_bytes > 2**30
            if not too_large and backend.supports(query, key, value) is None:
                run = partial(attention, implementation=implementation)
                bench.time(f"{name} {implementation}", run, query, key, value, flops=flops)


def bench_text(bench: Bench) -> None:
    """Two prompts, one after the other, as the pipeline encodes them."""
    config = bench.config.text_encoder
    model = random_model(TextEncoder, config, bench.dtype)
    length = bench.config.denoiser.text_length
    tokens = jax.random.randint(jax.random.key(0), (1, length), 3, config.vocab_size, jnp.int32)
    encode = encode_text_function(SINGLE)
    args = model, tokens, jnp.ones_like(tokens)
    encode.compile(*args)
    weights = config.num_layers * config.dim * (4 * config.num_heads * config.head_dim + 3 * config.ffn_dim)
    flops = 2 * (2.0 * length * weights + config.num_layers * 4.0 * length**2 * config.num_heads * config.head_dim)
    seconds = seconds_of(lambda: [encode(*args), encode(*args)], bench.repeats)
    bench.report(f"two prompts of {length} tokens", seconds, flops)


def bench_vae(bench: Bench) -> None:
    """Both ways of the VAE."""
    model = random_model(VAE, bench.config.vae, bench.vae_dtype, placement=bench.placement)
    bench_encode(bench, model)
    bench_decode(bench, model=model)


def bench_encode(bench: Bench, model: VAE) -> None:
    """Encoding a video as image to video does, float32 frames sent while those before are encoded."""
    (width, height), count = bench.settings.size, bench.settings.frames
    frames = np.random.default_rng(0).uniform(-1, 1, (count, height, width, 3)).astype(np.float32)
    exact = bench.dtype == "float32"
    codec = Codec(model, exact, Memory(bench.placement.offload), bench.placement)
    inputs = frames[:1], frames[1 : 1 + bench.config.vae.temporal_stride]
    flops = encode_flops(bench.config.vae, width * height * count)
    call = partial(codec.encode, frames, Run())
    time_vae(bench, f"encode {bench.vae_dtype}", model, encode_function(exact, bench.placement), inputs, call, flops)


def bench_decode(bench: Bench, model: VAE | None = None) -> None:
    """Decoding a video as the pipeline does, frames fetched as uint8."""
    if model is None:
        model = random_model(VAE, bench.config.vae, bench.vae_dtype, placement=bench.placement)
    latents = np.asarray(normal(bench.latents_shape))
    exact, chunk = bench.dtype == "float32", bench.placement.mesh_spec.devices
    codec = Codec(model, exact, Memory(bench.placement.offload), bench.placement)
    inputs = latents[None, :, :1], latents[None, :, 1 : 1 + chunk]
    flops = decode_flops(bench.config.vae, math.prod(bench.settings.size) * bench.settings.frames)
    name = f"decode {bench.vae_dtype}, chunks of {chunk}"
    call = lambda: list(codec.decode(latents, Run()))  # noqa: E731
    time_vae(bench, name, model, decode_function(exact, bench.placement), inputs, call, flops, chunk=chunk)


def time_vae(
    bench: Bench,
    name: str,
    model: VAE,
    function: CompiledFunction,
    inputs: tuple[np.ndarray, np.ndarray],
    call: Callable[[], Any],
    flops: float,
    **extra: Any,
) -> None:
    """Compiles `function` for the first input and for the following ones, which take a cache; then times `call`."""
    start = time.perf_counter()
    first, following = bench.placement.put(inputs)
    _, cache = function(model, None, first)
    step_bytes = function.workspace_bytes(model, None, first)
    if following.size:
        step_bytes = function.workspace_bytes(model, cache, following)
    compile_seconds = time.perf_counter() - start
    held = bytes_of_a_device((model, cache))
    del cache
    seconds = seconds_of(call, bench.repeats)
    bench.report(name, seconds, flops, held + step_bytes, compile_seconds=compile_seconds, **extra)


def bench_video(bench: Bench) -> None:
    """Prompt to mp4 with all of the model; `repeats` runs after one of a single step, which compiles everything."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        train_small_tokenizer([PROMPT], min(512, bench.config.text_encoder.vocab_size), folder)
        tokenizer = Tokenizer.from_pretrained(folder)
        pipeline = random_pipeline(
            bench.config, tokenizer, bench.dtype, vae_dtype=bench.vae_dtype, placement=bench.placement
        )

        def run(prompt: str, settings: SamplingParams) -> dict[str, float]:
            request = replace(settings, prompt=prompt).resolve(bench.config)
            start = time.perf_counter()
            result = next(pipeline.results([request]))
            with VideoWriter(folder / "video.mp4", request.fps) as writer:
                for frames in result.frames():
                    writer.write(frames)
                saving = time.perf_counter()
            done = time.perf_counter()
            return {**result.seconds, "save": done - saving, "total": done - start}

        one_step = PerExpert(1, 1) if isinstance(bench.settings.steps, tuple) else 1
        run(PROMPT, replace(bench.settings, steps=one_step))
        # Another prompt each time, so that text is encoded too.
        runs = [run(f"{PROMPT} {number}", bench.settings) for number in range(bench.repeats)]
    for stage in runs[-1]:
        bench.report(f"video, {stage}", [seconds.get(stage, 0.0) for seconds in runs])


PARTS: dict[str, Callable[..., Any]] = {
    "denoiser": bench_denoiser,
    "attention": bench_attention,
    "text": bench_text,
    "vae": bench_vae,
    "decode": bench_decode,
    "video": bench_video,
}

ON_A_MESH = ("vae", "decode", "video")


def run(
    part: str,
    *,
    preset: str = "t2v-a14b",
    size: Any = None,
    frames: int | None = None,
    steps: Any = None,
    dtype: str = "bfloat16",
    vae_dtype: str = "float32",
    repeats: int = 5,
    mesh: str | None = None,
    output: pathlib.Path | None = None,
    plot: pathlib.Path | None = None,
    on_line: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs one part, prints a table, and returns the report, which `output` (JSON) gets after each row.

    Raises:
        InputError: an option that cannot be used.
    """
    check_name("benchmark", part, tuple(PARTS))
    check_name("dtype", dtype, DTYPES)
    check_name("VAE dtype", vae_dtype, DTYPES)
    if repeats < 1:
        raise InputError(f"repeats {repeats}: give at least 1")
    if plot is not None:
        if part != "denoiser":
            raise InputError("--plot shows where a forward's time goes: use it with bench denoiser")
        check_writable(plot, name="--plot", endings=plot_endings())
    if output is not None:
        check_writable(output)
    config = get_config(preset)
    settings = SamplingParams(
        size=size,
        frames=frames,
        steps=steps,
    ).resolve(config)
    placement = SINGLE
    if mesh is not None:
        if part not in ON_A_MESH:
            raise InputError(f"--mesh: bench {', '.join(ON_A_MESH)} run on one; bench mesh compares them")
        mesh_spec = MeshSpec.parse(mesh)
        mesh_spec.check(config, prompts=1)
        placement = Placement.over(mesh_spec)
    report: dict[str, Any] = {
        "benchmark": part,
        "mesh": mesh or "single",
        **device_facts(),
        "preset": config.name,
        "size": list(settings.size),
        "frames": settings.frames,
        "dtype": dtype,
        "vae_dtype": vae_dtype,
        "weights": "random",
        "rows": [],
    }
    matmul = report["matmul_tflop_per_second"] * 1e12
    width, height = settings.size
    on_line(f"{config.name} {width}x{height}, {settings.frames} frames, {dtype}; {report['device']}")
    on_line(f"{'':<32} {'seconds':>11} {'TFLOP/s':>9} {'of matmul':>10} {'memory':>11}")
    on_line(f"{'bfloat16 matmul':<32} {'':>11} {matmul / 1e12:>9.1f}")

    def on_row(row: Row) -> None:
        report["rows"].append(row.as_json(matmul))
        report["peak_bytes"] = peak_bytes()
        if output is not None:
            output.write_text(json.dumps(report, indent=1) + "\n")
        on_line(format_row(row, matmul))

    bench = Bench(config, settings, dtype, vae_dtype, repeats, on_row, placement)
    PARTS[part](bench, **({"plot": plot} if plot else {}))
    return report


def format_row(row: Row, matmul: float) -> str:
    line = f"{row.name:<32} {row.median:>11.5f}"
    if row.flops is not None:
        rate = row.flops / row.median
        line += f" {rate / 1e12:>9.1f} {rate / matmul:>10.2f}"
    if row.memory_bytes is not None:
        line = f"{line:<64} {row.memory_bytes / 2**30:>7.2f} GiB"
    return line


def plot_endings() -> tuple[str, ...]:
    """Endings of the files that can be drawn; raises InputError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise InputError("--plot needs matplotlib; pip install matplotlib") from None
    return tuple(f".{name}" for name in FigureCanvasAgg.get_supported_filetypes())


def draw_parts(bench: Bench, rows: list[Row], path: pathlib.Path) -> None:
    """A bar for each part of the layers, in seconds of a forward, and one for what is in none of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    forward, *parts = rows
    layers = bench.config.denoiser.num_layers
    seconds = {row.name: layers * row.extra["count"] * row.median for row in parts}
    seconds["the rest"] = max(0.0, forward.median - sum(seconds.values()))
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = axes.barh(list(seconds), list(seconds.values()))
    axes.bar_label(bars, [f" {value:.3g} s, {value / forward.median:.1%}" for value in seconds.values()])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel(f"seconds of a forward of {forward.median:.3g} s")
    width, height = bench.settings.size
    axes.set_title(f"{bench.config.name} {width}x{height}, {bench.settings.frames} frames, {bench.dtype}")
    figure.savefig(path, dpi=150)
