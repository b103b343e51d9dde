"""Two checkouts of this repository beside each other, on one machine, in one run.

    python benchmarks/compare_trees.py --old DIR --new DIR --output DIR [--seconds 470] [--parts denoiser,text,...]

Each checkout runs in a process of its own. Both processes stay alive, each with a part of the devices' memory, and
take turns (old, new, new, old, ...), so that both see the same card at the same temperature. Random weights, the same
in both checkouts if both draw them alike; the largest difference between their latents is reported. Parts:

    denoiser   one expert: compile time of the guided step without a compile cache, guided steps, forwards
    decode     the VAE's decode in bfloat16
    text       encoding two prompts
    cold       a new process with the compile cache that the parts before have filled: from its start to the end of the
               first guided step
    meshes     on two devices or more: forwards on ulysses, ring and tensor, a guided step on cfg

A part begins only while time is left. DIR/compare_trees.json is written after every part; the table comes last.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

GUIDANCE = 4.0
TREES = ("old", "new")
# Seconds that must be left for a part to begin.
PARTS = {"denoiser": 200, "decode": 70, "text": 30, "cold": 75, "meshes": 70}
# What results/ measured on one and on two H200 at 1280x720x81: seconds.
PREDICTED = {
    "step compile": 5.2,
    "step": 18.8,
    "forward": 9.35,
    "decode": 1.72,
    "text": 0.033,
    "cold, to the first step's end": 30.0,
    "ulysses2 forward": 4.99,
    "ring2 forward": 4.88,
    "tensor2 forward": 5.12,
    "cfg2 step": 9.49,
}


# The child process: one checkout, named by PYTHONPATH, that does what it is told line by line.


class Checkout:
    """The benchmark modules of the checkout on the path, and the expert they built last."""

    def __init__(self, options: dict[str, Any]):
        self.is_old = importlib.util.find_spec("wan_bench") is None
        self.parts = importlib.import_module("wan_jax.bench" if self.is_old else "wan_bench.parts")
        self.meshes = importlib.import_module("wan_jax.bench_mesh" if self.is_old else "wan_bench.meshes")
        self.rows: list[Any] = []
        config = self.parts.get_config(options["preset"])
        size, frames = options["size"], options["frames"]
        if self.is_old:
            settings = self.parts.Settings.resolve(config, size=self.parts.parse_size(size), frames=frames)
        else:
            settings = self.parts.SamplingParams(size=size, frames=frames).resolve(config)
        self.bench = self.parts.Bench(config, settings, "bfloat16", "bfloat16", 3, self.rows.append)
        self.mesh_bench = self.meshes.MeshBench(config, settings, "bfloat16", 1, 1)
        self.expert: Any = None

    def start(self) -> dict[str, Any]:
        import jax

        return {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "jax": jax.__version__}

    def place(self, mesh: str = "single") -> dict[str, Any]:
        """Random weights on a mesh, after those of the mesh before are gone."""
        import jax

        self.expert = None
        start = time.perf_counter()
        self.expert = jax.block_until_ready(self.mesh_bench.expert(self.placement(mesh)))
        return {"seconds": time.perf_counter() - start}

    def placement(self, mesh: str) -> Any:
        if self.is_old:
            strategy = self.meshes.Strategy.parse(mesh)
            return self.meshes.Spread.over(strategy) if strategy.devices > 1 else None
        return self.meshes.Placement.over(self.meshes.MeshSpec.parse(mesh))

    def compile(self, guided: bool) -> dict[str, Any]:
        seconds, program = self.mesh_bench.compile(self.expert, guided)
        analysis: Any = program.memory_analysis()
        memory = {name: getattr(analysis, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}
        return {"seconds": seconds, "memory": memory, "instructions": program.as_text().count(" = ")}

    def step(self, guided: bool, latents: str) -> dict[str, Any]:
        seconds, result = self.mesh_bench.run(self.expert, GUIDANCE if guided else 1.0, 1)
        np.save(latents, np.asarray(result))
        return {"seconds": seconds[0]}

    def drop(self) -> dict[str, Any]:
        self.expert = None
        return {}

    def measure(self, part: str) -> dict[str, Any]:
        """A part of `wan-jax bench`: "decode" or "text"."""
        self.rows.clear()
        self.parts.PARTS[part](self.bench)
        row = self.rows[-1]
        return {"runs": list(row.seconds), "memory_bytes": row.memory_bytes}


def serve(options: dict[str, Any]) -> None:
    """Answers each line of standard input with one of standard output; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    checkout = Checkout(options)
    for line in sys.stdin:
        action, arguments = json.loads(line)
        try:
            answer = getattr(checkout, action)(**arguments)
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:1000]}
        print(json.dumps(answer), file=answers, flush=True)


# The parent process.


@dataclasses.dataclass
class Child:
    """A process of one checkout."""

    name: str
    process: subprocess.Popen

    def ask(self, action: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """Raises RuntimeError if the process reports an error, ends, or does not answer in `limit` seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        start = time.monotonic()
        timer = threading.Timer(max(limit, 1.0), self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps([action, arguments]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise RuntimeError(f"{self.name}: the process ended in {action} after {time.monotonic() - start:.0f} s")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {action}: {answer['error']}")
        text = json.dumps(arguments)
        print(f"  {self.name} {action} {text[:80]} {answer.get('seconds', time.monotonic() - start):.3f} s", flush=True)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclasses.dataclass
class Comparison:
    """What is compared, and what has been measured: figures[name][tree] is a list of seconds."""

    trees: dict[str, pathlib.Path]
    output: pathlib.Path
    scratch: pathlib.Path
    options: dict[str, Any]
    until: float
    memory_fraction: str
    figures: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    children: dict[str, Child] = dataclasses.field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def run(self, parts: list[str]) -> None:
        for part in parts:
            if self.left < PARTS[part] * self.options["pace"]:
                self.report[f"{part} error"] = f"left out: {self.left:.0f} s left"
                continue
            print(f"{part}: {self.left:.0f} s left", flush=True)
            try:
                getattr(self, part)()
            except RuntimeError as error:
                self.report[f"{part} error"] = str(error)
                print(error, flush=True)
                self.end()
            self.save()
        self.end()

    def pair(self) -> dict[str, Child]:
        """Both processes, started where they do not run."""
        if not self.children:
            self.children = {name: self.start(name) for name in TREES}
            for name, child in self.children.items():
                self.report[f"start {name}"] = child.ask("start", self.left)
        return self.children

    def start(self, name: str) -> Child:
        environment = {
            "PYTHONPATH": os.pathsep.join([str(self.trees[name]), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.scratch / "cache" / name),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": self.memory_fraction,
            "NCCL_NVLS_ENABLE": "0",  # so that NCCL does not use NVLink's multicast, which shared hosts may not offer
        }
        with open(self.output / f"errors_{name}.log", "a") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", __file__, "--serve", json.dumps(self.options)],
                env=os.environ | environment, cwd=self.scratch, text=True, stderr=errors,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        return Child(name, process)

    def end(self) -> None:
        for child in self.children.values():
            child.end()
        self.children = {}

    def turns(self, rounds: int) -> Iterator[Child]:
        """old, new, new, old, ...: each checkout once in each round."""
        for round_ in range(rounds):
            for name in TREES if round_ % 2 == 0 else reversed(TREES):
                yield self.pair()[name]

    def add(self, figure: str, child: Child, *seconds: float) -> None:
        self.figures.setdefault(figure, {name: [] for name in TREES})[child.name].extend(seconds)

    def denoiser(self) -> None:
        for child in self.turns(1):
            child.ask("place", self.left)
        self.expert("", guided=True, rounds=2)
        self.expert("", guided=False, rounds=3)
        for child in self.turns(1):
            child.ask("drop", self.left)

    def expert(self, mesh: str, guided: bool, rounds: int) -> None:
        """Compiles one step of the expert in its place, then times it: a first run for warmth, then `rounds`."""
        name = f"{mesh} {'step' if guided else 'forward'}".strip()
        files = {tree: str(self.scratch / f"latents_{tree}.npy") for tree in TREES}
        for child in self.turns(1):
            answer = child.ask("compile", self.left, guided=guided)
            self.add(f"{name} compile", child, answer["seconds"])
            self.report[f"{name} program {child.name}"] = answer
        for child in self.turns(1):
            child.ask("step", self.left, guided=guided, latents=files[child.name])
        for child in self.turns(rounds):
            answer = child.ask("step", self.left, guided=guided, latents=files[child.name])
            self.add(name, child, answer["seconds"])
        old, new = (np.load(files[tree]) for tree in TREES)
        self.report[f"{name} difference of latents"] = float(np.abs(new - old).max() / np.abs(old).max())
        self.save()

    def decode(self) -> None:
        self.part("decode", rounds=2)

    def text(self) -> None:
        self.part("text", rounds=2)

    def part(self, part: str, rounds: int) -> None:
        """A part of `wan-jax bench`. It compiles in each round, in the first one without a compile cache."""
        for child in self.turns(rounds):
            answer = child.ask("measure", self.left, part=part)
            self.add(part, child, *answer["runs"])
            self.report.setdefault(f"{part} {child.name}", []).append(answer)

    def cold(self) -> None:
        self.end()
        for name in TREES:
            start = time.monotonic()
            child = self.start(name)
            try:
                child.ask("place", self.left)
                child.ask("compile", self.left, guided=True)
                ready = time.monotonic()
                child.ask("step", self.left, guided=True, latents=str(self.scratch / f"latents_{name}.npy"))
                self.add("cold, to the first step's start", child, ready - start)
                self.add("cold, to the first step's end", child, time.monotonic() - start)
            finally:
                child.end()

    def meshes(self) -> None:
        self.pair()
        devices = self.report["start old"]["devices"]
        if devices < 2:
            raise RuntimeError(f"{devices} device: meshes need two")
        for mesh in (f"ulysses{devices}", f"ring{devices}", f"tensor{devices}", "cfg2"):
            if self.left < PARTS["meshes"] * self.options["pace"]:
                self.report[f"{mesh} error"] = f"left out: {self.left:.0f} s left"
                continue
            try:
                for child in self.turns(1):
                    child.ask("place", self.left, mesh=mesh)
                self.expert(mesh, guided=mesh == "cfg2", rounds=2)
            except RuntimeError as error:
                self.report[f"{mesh} error"] = str(error)
                print(error, flush=True)
                self.end()

    def save(self) -> None:
        report = {"benchmark": "compare_trees", **self.options, "weights": "random", "dtype": "bfloat16"}
        report |= {"figures": self.figures, **self.report}
        (self.output / "compare_trees.json").write_text(json.dumps(report, indent=1) + "\n")

    def table(self) -> str:
        lines = [f"{'seconds (median)':<34} {'old':>10} {'new':>10} {'new/old':>8} {'predicted':>10}"]
        for name, seconds in self.figures.items():
            if not all(seconds.values()):
                continue
            old, new = (statistics.median(seconds[tree]) for tree in TREES)
            predicted = PREDICTED.get(name)
            lines.append(f"{name:<34} {old:>10.4f} {new:>10.4f} {new / old:>8.4f} {predicted if predicted else '':>10}")
        lines += [f"{name}: {value}" for name, value in self.report.items() if "error" in name or "difference" in name]
        for name in sorted({key.rsplit(" ", 1)[0] for key in self.report if " program " in key}):
            memory = [self.report[f"{name} {tree}"] for tree in TREES if f"{name} {tree}" in self.report]
            lines.append(f"{name}: " + "; ".join(f"{each['memory']} {each['instructions']}" for each in memory))
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--old", type=pathlib.Path, help="a checkout")
    parser.add_argument("--new", type=pathlib.Path, default=pathlib.Path(__file__).parents[1], help="(default: this)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "outputs")))
    parser.add_argument("--seconds", type=float, default=470, help="for all (default 470)")
    parser.add_argument("--parts", default="denoiser,decode,text,cold", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--preset", default="t2v-a14b")
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--pace", type=float, default=1.0, help="scales the seconds that parts are taken to need")
    parser.add_argument("--memory-fraction", default="0.46", help="of a device, for each checkout (default 0.46)")
    values = parser.parse_args()
    if values.serve is not None:
        return serve(values.serve)
    output = values.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        comparison = Comparison(
            {"old": values.old.resolve(), "new": values.new.resolve()},
            output,
            pathlib.Path(scratch),
            {name: getattr(values, name) for name in ("preset", "size", "frames", "pace")},
            time.monotonic() + values.seconds,
            values.memory_fraction,
        )
        try:
            comparison.run(values.parts.split(","))
        finally:
            comparison.end()
        print(comparison.table())
    return None


if __name__ == "__main__":
    main()
