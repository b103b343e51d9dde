"""Converts a full-size random expert (14.3 billion parameters, bfloat16, six shards) and measures time and memory.

    python benchmarks/convert_full_size.py --folder /some/disk/with/60/GB

Writes the expert with official names, converts it in a fresh process whose peak resident memory is the system's own
figure, checks a sample of the result bit by bit, and records everything in benchmarks/results/.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from wan_jax.checkpoint import open_checkpoint
from wan_jax.checkpoint.formats.safetensors import SHARD_BYTES
from wan_jax.checkpoint.formats.tensors import TensorInfo
from wan_jax.checkpoint.layouts import WRITABLE
from wan_jax.checkpoint.tables import expanded_table
from wan_jax.config import WanConfig
from wan_jax.presets import PRESETS

RESULTS = pathlib.Path(__file__).parent / "results"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LIMIT_GIB = 6

# Run in a process of its own: the peak of ru_maxrss is that of the whole life of a process.
CHILD = """
import json, resource, sys
from wan_jax.checkpoint import convert
summary = convert(sys.argv[1], sys.argv[2])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "seconds": summary.seconds, "tensors": summary.tensors, "bytes": summary.nbytes,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "peak_vmhwm_bytes": int(status["VmHWM"].split()[0]) * 1024,
}))
"""


def random_weights(tensors: dict[str, TensorInfo], names: Sequence[str]) -> Iterator[np.ndarray]:
    """Random bits with the exponents of ordinary weights: cheap, finite, and not compressible."""
    for name in names:
        info = tensors[name]
        generator = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
        values = np.frombuffer(generator.bytes(info.nbytes), np.uint16) & 0x83FF | 0x3C00
        yield values.view(BFLOAT16).reshape(info.shape)


def write_expert(folder: pathlib.Path, config: WanConfig) -> dict[str, TensorInfo]:
    table = expanded_table(config.denoiser)
    tensors = {mapping.stored_name("official"): TensorInfo(mapping.torch_shape, BFLOAT16, "") for mapping in table}
    folder.mkdir(parents=True)
    official = WRITABLE["official"]
    official.write_component(folder, "denoiser", config, tensors, lambda names: random_weights(tensors, names))
    return tensors


def forget_cached(folder: pathlib.Path) -> None:
    """Writes a folder's files out and drops them from the page cache, so that the conversion reads the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def check_sample(source: pathlib.Path, destination: pathlib.Path) -> int:
    """Compares every 50th tensor bit by bit; returns how many."""
    before, after = open_checkpoint(source).part("denoiser"), open_checkpoint(destination).part("denoiser")
    sample = before.table[::50]
    for mapping, a, b in zip(sample, before.read_torch(sample), after.read_torch(sample), strict=True):
        if not np.array_equal(a.view(np.uint16), b.view(np.uint16)):
            raise SystemExit(f"{mapping.name} differs")
    return len(sample)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="scratch folder; about 58 GB are needed")
    parser.add_argument("--layers", type=int, help="fewer layers, to try it out (nothing is recorded)")
    parser.add_argument("--keep", action="store_true", help="leave source and result in the folder")
    arguments = parser.parse_args()

    config = PRESETS["t2v-14b"]
    if arguments.layers:
        config = dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, num_layers=arguments.layers))
    source, destination = arguments.folder / "high_noise_model", arguments.folder / "converted"
    try:
        start = time.perf_counter()
        tensors = write_expert(source, config)
        write_seconds = time.perf_counter() - start
        forget_cached(source)
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(source), str(destination)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        result = json.loads(child.stdout.splitlines()[-1])
        shards = len(list(source.glob("*.safetensors")))
        files = [file for file in destination.rglob("*") if file.is_file()]
        record = {
            "what": "convert a random full-size expert: official safetensors, bfloat16 -> Orbax",
            "parameters": sum(info.size for info in tensors.values()),
            "source_shards": shards,
            "shard_limit_bytes": SHARD_BYTES,
            **result,
            "bytes_per_second": result["bytes"] / result["seconds"],
            "destination_files": len(files),
            "destination_bytes": sum(file.stat().st_size for file in files),
            "write_source_seconds": write_seconds,
            "tensors_compared": check_sample(source, destination),
            "machine": {
                "cpus": os.cpu_count(),
                "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
                "load_average": os.getloadavg(),
            },
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
            },
        }
    finally:
        if not arguments.keep:
            shutil.rmtree(source, ignore_errors=True)
            shutil.rmtree(destination, ignore_errors=True)
    print(json.dumps(record, indent=2))
    if not arguments.layers:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "convert_full_size.json").write_text(json.dumps(record, indent=2) + "\n")
    if result["peak_rss_bytes"] > LIMIT_GIB << 30:
        raise SystemExit(f"peak resident memory {result['peak_rss_bytes'] / 2**30:.2f} GiB is over {LIMIT_GIB} GiB")


if __name__ == "__main__":
    main()
