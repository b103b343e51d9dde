"""`wan-jax bench mesh`: one forward and one guided step on each mesh, with random weights made on the devices.

seconds     the mean of the steps after the first; of `prompts` videos together
scaling     against the row "single", where only forwards are timed a guided step against two of them
memory      of the first device: its parts of weights and contexts, and the program's workspace
exchange    time in which a device sends or receives (NCCL's kernels, and copies from GPU to GPU), and the part of it
            in which nothing else runs there: means over the devices (trace.py), in one traced forward, or in a guided
            step where prompts are apart (cfg) or layers are (pipeline). NCCL's kernels wait for the slowest device, and
            that counts. GPUs only.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from wan_bench.parts import device_facts, get_config, normal
from wan_bench.trace import traced
from wan_jax.config import WanConfig
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.params import DTYPES, SamplingParams, check_name
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import Segment, plan_segments
from wan_jax.diffusion.solvers import get_solver
from wan_jax.diffusion.step import Expert, compile_step
from wan_jax.errors import InputError
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.runtime.compiled import workspace_bytes
from wan_jax.runtime.distributed import Watchdog
from wan_jax.runtime.events import Event, Run, StepDone
from wan_jax.runtime.files import check_writable
from wan_jax.testing.models import random_model

GUIDANCE = 4.0


@dataclass(frozen=True)
class MeshBench:
    """What is measured on every mesh: one expert of a model at one size.

    Attributes:
        forwards: no guided steps, but where a forward alone leaves devices without work.
        heartbeat: called whenever something is done, with what it is.
    """

    config: WanConfig
    settings: SamplingParams
    dtype: str
    prompts: int
    repeats: int
    forwards: bool = False
    heartbeat: Callable[[str], None] = lambda what: None

    def expert(self, placement: Placement) -> Expert:
        """Random weights in their places; the same numbers on every mesh."""
        config = self.config.denoiser
        model = random_model(Denoiser, config, self.dtype, placement=placement)
        shape = self.prompts, config.text_length, config.text_dim
        text, negative = placement.put_batch([normal(shape, self.dtype, seed) for seed in (1, 2)])
        return Expert.prepare(model, text, negative, placement=placement)

    def run(self, expert: Expert, guidance: float, steps: int) -> tuple[list[float], jax.Array]:
        """Seconds of each step, and the latents."""
        seconds: list[float] = []

        def on_event(step: Event) -> None:
            assert isinstance(step, StepDone)
            seconds.append(step.seconds)
            self.heartbeat(f"step {len(seconds)} of {steps}")

        result = denoise(self.noise(expert), euler_steps(steps, guidance), lambda name: expert, Run(on_event))
        return seconds, result

    def noise(self, expert: Expert) -> jax.Array:
        return expert.placement.put_batch(self._noise)

    @functools.cached_property
    def _noise(self) -> jax.Array:
        return normal((self.prompts, *self.settings.latents_shape(self.config)))

    def measure(self, mesh_spec: MeshSpec, row: dict[str, Any]) -> np.ndarray:
        """Fills in a row, figure by figure; returns the latents that the last run came to."""
        start = time.perf_counter()
        expert = jax.block_until_ready(self.expert(Placement.over(mesh_spec)))
        row["place_seconds"] = time.perf_counter() - start
        first = jax.devices()[0]
        row["weight_bytes"] = sum(
            shard.data.nbytes
            for array in jax.tree.leaves(nnx.state(expert.denoiser))
            for shard in array.addressable_shards
            if shard.device == first
        )
        apart = mesh_spec.cfg > 1 or mesh_spec.pipeline > 1  # what a forward alone does not fill
        parts = (["forward"] if not apart else []) + (["step"] if apart or not self.forwards else [])
        latents = None
        for part in parts:
            row[f"compile_{part}_seconds"], program = self.compile(expert, guided=part == "step")
            self.heartbeat(f"compiled the {part}")
            analysis: Any = program.memory_analysis()
            row["memory_bytes"] = analysis.argument_size_in_bytes + workspace_bytes(program)
            seconds, latents = self.run(expert, GUIDANCE if part == "step" else 1.0, 1 + self.repeats)
            row |= {f"{part}_runs": seconds[1:], f"{part}_seconds": float(np.mean(seconds[1:]))}
        if mesh_spec.devices > 1 and first.platform == "gpu":
            row["traced"] = "guided step" if apart else "forward"
            row |= traced(lambda: jax.block_until_ready(self.run(expert, GUIDANCE if apart else 1.0, 1)[1]))
        return np.asarray(latents)

    def compile(self, expert: Expert, guided: bool) -> tuple[float, jax.stages.Compiled]:
        """Seconds, and the program."""
        start, (segment,) = time.perf_counter(), euler_steps(1, GUIDANCE)
        used = expert if guided else Expert(expert.denoiser, expert.cond, None, expert.placement)
        step = compile_step(used, segment, segment.solver.init(self.noise(expert)))
        return time.perf_counter() - start, step


def euler_steps(steps: int, guidance: float) -> list[Segment]:
    return plan_segments(make_schedule("official", "euler", steps, 5.0), get_solver("euler"), guidance, None)


def default_meshes(config: WanConfig, devices: int) -> list[str]:
    """One of each kind over all devices, those that the model allows."""
    found = ["single"]
    if devices < 2:
        return found
    for names in (("ulysses",), ("cfg", "ulysses"), ("ring",), ("tensor",), ("fsdp",), ("pipeline",)):
        sizes = {"cfg": 2, "ulysses": devices // 2} if len(names) == 2 else {names[0]: devices}
        mesh_spec = MeshSpec(**sizes)
        try:
            mesh_spec.check(config)
        except InputError:
            continue
        found.append(str(mesh_spec))
    return found


def run(
    meshes: Sequence[str] = (),
    *,
    preset: str = "t2v-a14b",
    size: Any = None,
    frames: int | None = None,
    dtype: str = "bfloat16",
    prompts: int = 1,
    repeats: int = 2,
    forwards: bool = False,
    hang_seconds: float | None = None,
    output: pathlib.Path | None = None,
    on_line: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures each mesh, prints a table, and returns the report, which `output` (JSON) gets after each row.

    What fails on one mesh is in its row and does not keep the others from being measured. Devices that wait for each
    other for ever end the process (exit code 3) once nothing has moved for `hang_seconds`.

    Raises:
        InputError: an option or mesh that cannot be used.
    """
    check_name("dtype", dtype, DTYPES)
    if repeats < 1 or prompts < 1:
        raise InputError(f"repeats {repeats} and prompts {prompts}: give at least 1")
    if output is not None:
        check_writable(output)
    config = get_config(preset)
    settings = SamplingParams(size=size, frames=frames).resolve(config)
    mesh_specs = [MeshSpec.parse(mesh) for mesh in meshes or default_meshes(config, jax.device_count())]
    for mesh_spec in mesh_specs:
        mesh_spec.check(config, prompts=prompts)
        mesh_spec.make_mesh()
    width, height = settings.size
    report: dict[str, Any] = {
        "benchmark": "mesh",
        **device_facts(),
        "devices": jax.device_count(),
        "preset": config.name,
        "size": [width, height],
        "frames": settings.frames,
        "prompts": prompts,
        "dtype": dtype,
        "weights": "random",
        "rows": [],
    }
    on_line(f"{config.name} {width}x{height}, {settings.frames} frames, {dtype}, {prompts} at once; {report['device']}")
    titles = f"{'mesh':<24} {'forward':>9} {'scaling':>8} {'step':>9} {'scaling':>8} {'memory':>10}"
    on_line(f"{titles} {'exchange':>9} {'alone':>8}")
    with Watchdog(hang_seconds) as watchdog:
        bench = MeshBench(config, settings, dtype, prompts, repeats, forwards, watchdog.heartbeat)
        firsts: dict[str, np.ndarray] = {}  # the first latents of each kind of run
        for mesh_spec in mesh_specs:
            row: dict[str, Any] = {"mesh": str(mesh_spec), "devices": mesh_spec.devices}
            watchdog.heartbeat(f"mesh {mesh_spec}")
            try:
                latents = bench.measure(mesh_spec, row)
                first = firsts.setdefault("step" if "step_seconds" in row else "forward", latents)
                row["difference_to_first"] = float(np.abs(latents - first).max() / np.abs(first).max())
            except Exception as error:
                row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            report["rows"].append(row)
            add_scaling(row, report["rows"])
            if output is not None:
                output.write_text(json.dumps(report, indent=1) + "\n")
            on_line(format_row(row))
    return report


def add_scaling(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """How many times as fast a mesh is as one device."""
    single = next((each for each in rows if each["mesh"] == "single"), {})
    if "forward_seconds" in single:
        single = {"step_seconds": 2 * single["forward_seconds"]} | single
    for part in ("forward", "step"):
        if f"{part}_seconds" in row and f"{part}_seconds" in single:
            row[f"{part}_scaling"] = single[f"{part}_seconds"] / row[f"{part}_seconds"]


def format_row(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['mesh']:<24} {row['error'][:90]}"

    def number(name: str, width: int, text: str = "{:.4f}", scale: float = 1.0) -> str:
        return f"{text.format(row[name] / scale) if name in row else '':>{width}}"

    return " ".join(
        [
            f"{row['mesh']:<24}",
            number("forward_seconds", 9),
            number("forward_scaling", 8, "{:.2f}"),
            number("step_seconds", 9),
            number("step_scaling", 8, "{:.2f}"),
            number("memory_bytes", 10, "{:.2f} GiB", 2**30),
            number("exchange_seconds", 9),
            number("exchange_alone_seconds", 8) if "exchange" not in row else "not measured",
        ]
    )
