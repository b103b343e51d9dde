"""One model over all GPUs of a machine, beside one GPU and beside diffusers' context parallelism, in one run.

    python -m benchmarks.mesh --output DIR [--seconds 540] [--parts forwards,peer,...]

Random weights, bfloat16. Parts in the order of their importance, each in processes of its own; one begins only if the
time that it takes is left, and is ended at its limit. DIR/mesh.json is written after every figure. For n GPUs:

    forwards   1280x720, 81 frames: one GPU's forward; a guided step (two forwards) on cfg2, or cfg2-ulysses<n/2>; a
               forward on ulysses<n>, tensor<n>, fsdp<n>, ring<n>, each traced for its time in exchange
    peer       diffusers' denoiser at that size: Ulysses over n GPUs, cuDNN attention, repeated blocks compiled
    pipeline   832x480, two prompts at once: one GPU's forward of both; a guided step on pipeline2, four microbatches
    decode     the VAE at 1280x720, on one GPU and on n
    video      prompt to mp4 at 1280x720 on the mesh of the guided step; a run of 40 steps by arithmetic
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",  # so that NCCL does not use NVLink's multicast, which shared hosts may not offer
    "PYTHONUNBUFFERED": "1",
}
HANG_SECONDS = 75.0
WRONG = 0.05  # latents that differ by this much of the largest; in bfloat16 meshes differ by some thousandths
STEPS = 40
# Seconds that must be left for a part to begin, and its limit.
PARTS = {"forwards": (60, 290), "peer": (45, 150), "pipeline": (35, 100), "decode": (40, 120), "video": (85, 240)}


@dataclass
class Run:
    """One run of the benchmark: what there is to measure with, and what has been measured."""

    folder: pathlib.Path
    until: float  # of time.monotonic()
    gpus: int
    demo: bool = False
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def options(self, size: str) -> list[str]:
        """Which model and size: arguments of all processes."""
        if self.demo:
            return ["--preset", "demo", "--size", "48x32", "--frames", "5"]
        return ["--preset", "t2v-a14b", "--size", size, "--frames", "81"]

    @property
    def together(self) -> str:
        """The mesh with the prompt and the negative prompt apart."""
        return "cfg2" if self.gpus == 2 else f"cfg2-ulysses{self.gpus // 2}"

    def bench(self, part: str, size: str, limit: float, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "wan_bench", part, *self.options(size), *arguments]
        return self.process(f"bench {part}", command, limit)

    def process(self, name: str, command: list[str], limit: float) -> dict[str, Any]:
        """Runs a command that is given --output; returns what it wrote there, and what went wrong."""
        result = self.folder / "process.json"
        result.unlink(missing_ok=True)
        limit = min(limit, self.left)
        start = time.monotonic()
        with open(self.folder / "errors.log", "a+") as errors:
            errors.write(f"--- {' '.join(command)}\n")
            errors.flush()
            before = errors.tell()
            # In a session of its own: its processes end with it, and none of them keeps a GPU.
            process = subprocess.Popen(
                [*command, "--output", str(result)], env=os.environ | ENVIRONMENT, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
            failure: dict[str, Any] = {}
            try:
                if code := process.wait(max(1.0, limit)):
                    failure["error"] = f"exit code {code}"
            except subprocess.TimeoutExpired:
                failure["error"] = f"ended after {limit:.0f} s"
            finally:
                if process.poll() is None or failure:
                    _end(process)
            errors.seek(before)
            if failure:
                failure["stderr"] = errors.read()[-2000:]
        figures = json.loads(result.read_text()) if result.exists() else {}
        seconds = time.monotonic() - start
        print(f"({name}: {seconds:.0f} s, {self.left:.0f} s left{', ' if failure else ''}", end="", flush=True)
        print(failure.get("error", ""), end=")\n", flush=True)
        return {**figures, **failure, "process_seconds": seconds}

    def meshes(self, part: str, size: str, limit: float, meshes: list[str], *arguments: str) -> None:
        """`bench mesh`, started again without the mesh at which it hung or crashed."""
        rows = self.report[part].setdefault("rows", [])
        until = time.monotonic() + limit
        while meshes and min(until - time.monotonic(), self.left) > 20:
            chosen = [f"--mesh={mesh}" for mesh in meshes]
            hang = ["--hang-seconds", f"{HANG_SECONDS:g}"]
            figures = self.bench("mesh", size, until - time.monotonic(), *chosen, *arguments, *hang, "--repeats", "1")
            rows += figures.pop("rows", [])
            self.report[part].setdefault("processes", []).append(figures)
            done = {row["mesh"] for row in rows}
            meshes = [mesh for mesh in meshes if mesh not in done]
            if meshes:
                rows.append({"mesh": meshes.pop(0), "error": figures.get("error", "no row")})
            self.save()

    def save(self) -> None:
        self.report["summary"] = summary(self.report, self.gpus)
        (self.folder / "mesh.json").write_text(json.dumps(self.report, indent=1) + "\n")

    # The parts.

    def forwards(self, limit: float) -> None:
        count = self.gpus
        meshes = ["single", self.together, *(f"{axis}{count}" for axis in ("ulysses", "tensor", "fsdp", "ring"))]
        self.meshes("forwards", "1280x720", limit, meshes, "--forwards")

    def peer(self, limit: float) -> None:
        launch = ["torch.distributed.run", "--standalone", "--local-addr=localhost", f"--nproc-per-node={self.gpus}"]
        command = [sys.executable, "-m", *launch, "-m", "benchmarks.mesh_peer", *self.options("1280x720")]
        self.report["peer"] = self.process("diffusers", command, limit)

    def pipeline(self, limit: float) -> None:
        self.meshes("pipeline", "832x480", limit, ["single", "pipeline2"], "--forwards", "--prompts", "2")

    def decode(self, limit: float) -> None:
        until = time.monotonic() + limit
        for mesh in ("single", self.together):  # the mesh's programs are the video's, too
            arguments = ["--mesh", mesh, "--vae-dtype", "bfloat16", "--repeats", "2"]
            self.report["decode"][mesh] = self.bench("decode", "1280x720", until - time.monotonic(), *arguments)
            self.save()

    def video(self, limit: float) -> None:
        steps = 4 if self.left > 125 else 2
        arguments = ["--mesh", self.together, "--vae-dtype", "bfloat16", "--steps", str(steps), "--repeats", "1"]
        self.report["video"] = {"steps": steps, **self.bench("video", "1280x720", limit, *arguments)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "benchmarks/results"))
    )
    parser.add_argument("--seconds", type=float, default=540, help="for all (default 540)")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--gpus", type=int, help="(default: all that there are)")
    parser.add_argument("--demo", action="store_true", help="small models, to try the script without GPUs")
    values = parser.parse_args()
    values.output.mkdir(parents=True, exist_ok=True)
    gpus = values.gpus or count_gpus()
    run = Run(values.output, time.monotonic() + values.seconds, gpus, values.demo)
    run.report = {"benchmark": "mesh", "gpus": gpus, "weights": "random", "dtype": "bfloat16"}
    for part in values.parts.split(","):
        least, limit = PARTS[part]
        run.report[part] = {}
        if run.left < least:
            run.report[part] = {"error": f"left out: {run.left:.0f} s left, and it takes at least {least}"}
        else:
            try:
                getattr(run, part)(limit)
            except Exception as error:
                run.report[part]["error"] = repr(error)[:500]
        run.save()
    print(json.dumps(run.report["summary"], indent=1))


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def count_gpus() -> int:
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    return len(listed.stdout.splitlines())


def summary(report: dict[str, Any], gpus: int) -> dict[str, float]:
    """The ratios that the figures at hand allow."""
    found: dict[str, float] = {}
    rows = {row["mesh"]: row for row in report.get("forwards", {}).get("rows", [])}
    forwards = seconds_of_forwards(report.get("forwards", {}))
    single = forwards.pop("single", None)
    for mesh, row in rows.items():
        if single and "step_seconds" in row:
            found[f"two forwards on one GPU over a guided step on {mesh}"] = 2 * single / row["step_seconds"]
        if single and mesh in forwards:
            found[f"forward on one GPU over {mesh}"] = single / forwards[mesh]
    theirs = report.get("peer", {}).get("seconds")
    if theirs and forwards:
        found["our fastest forward over diffusers'"] = min(forwards.values()) / theirs
    whole, parts = rows.get(f"ulysses{gpus}", {}), rows.get(f"fsdp{gpus}", {})
    if {"forward_seconds", "weight_bytes"} <= whole.keys() & parts.keys():
        found["weights on a GPU, fsdp over whole"] = parts["weight_bytes"] / whole["weight_bytes"]
        found["forward, fsdp over whole weights"] = parts["forward_seconds"] / whole["forward_seconds"]
    rows = {row["mesh"]: row for row in report.get("pipeline", {}).get("rows", [])}
    one, two = rows.get("single", {}).get("forward_seconds"), rows.get("pipeline2", {}).get("step_seconds")
    if one and two:  # two GPUs alone would make each of the step's evaluations of both prompts on one of them
        found["throughput of pipeline2 over two GPUs"] = one / two
    decodes = [each["rows"][0]["seconds"] for each in report.get("decode", {}).values() if each_has_rows(each)]
    if len(decodes) == 2:
        found["decode on one GPU over all"] = decodes[0] / decodes[1]
    video = {row["name"]: row["seconds"] for row in report.get("video", {}).get("rows", [])}
    if "video, total" in video:
        steps = report["video"]["steps"]
        found["seconds of a guided step in a video"] = video["video, denoise"] / steps
        found[f"seconds of a video of {STEPS} steps"] = (
            video["video, total"] + (STEPS - steps) * video["video, denoise"] / steps
        )
    return found


def seconds_of_forwards(part: dict[str, Any]) -> dict[str, float]:
    """By mesh, those whose latents are one GPU's."""
    return {
        row["mesh"]: row["forward_seconds"]
        for row in part.get("rows", [])
        if "forward_seconds" in row and row.get("difference_to_first", 0.0) < WRONG
    }


def each_has_rows(part: Any) -> bool:
    return isinstance(part, dict) and bool(part.get("rows"))


if __name__ == "__main__":
    main()
