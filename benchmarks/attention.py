"""Times attention on a GPU: cuDNN, every variant of the Pallas kernel, block lists, cross-attention; checks each.

    python -m benchmarks.attention [--output DIR] [--seconds N] [--only NAME,...] [--parts PART,...]

Variants are timed in turn, round after round, so that heat and clocks touch all alike; a time is the median over the
rounds. Errors are ||ours - reference|| / ||reference|| against float32 on a sample of query rows. A kernel that hangs
or crashes is named and left out, and the rest goes on in a new process. Results go to DIR/attention.json (DIR: $OUT, or
benchmarks/results).
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wan_jax.kernels.attention import pallas_gpu
from wan_jax.kernels.attention.block_lists import BlockLists, along_time, temporal_window
from wan_jax.kernels.attention.pallas_gpu import Tuning

ROUNDS = 7
HANGS_AFTER = 40  # seconds for one call, its first included
PARTS = ("720p", "checks", "lists", "cross", "480p")
HEADS, HEAD_DIM = 40, 128
LATENTS = {"720p": (21, 45, 80), "480p": (21, 30, 52)}  # tokens: frames, height, width


def named(*tunings: Tuning) -> dict[str, Tuning]:
    """By what they are: "free 128/2 fixed" has blocks of 128 keys, two stages and a fixed maximum."""
    return {f"{t.schedule} {t.key_block}/{t.stages} {'running' if t.running_maximum else 'fixed'}": t for t in tunings}


DENSE = named(
    Tuning(),
    Tuning(running_maximum=True),
    Tuning(key_block=64, stages=3),
    Tuning(key_block=64, stages=4),
    Tuning("ping_pong", 192),
    Tuning("ping_pong", 128, stages=3),
    Tuning("two_stage_ping_pong", 192),
    Tuning("two_stage_ping_pong", 128, stages=3),
)
FOR_LISTS = named(
    Tuning(),
    Tuning("ping_pong", 128),
    Tuning("ping_pong", 192),
    Tuning("two_stage_ping_pong", 128),
    Tuning("two_stage_ping_pong", 128, stages=3),
    Tuning("two_stage_ping_pong", 192),
)
FOR_CROSS = named(
    Tuning(running_maximum=True),
    Tuning(),
    Tuning(key_block=64, stages=4, running_maximum=True),
    Tuning("ping_pong", 128, running_maximum=True),
)


@dataclasses.dataclass
class Entry:
    """One compiled function in a group of the same inputs."""

    name: str
    tflop: float  # of the work it keeps
    compiled: Callable | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    error: float | None = None
    clock_mhz: float | None = None
    power_watt: float | None = None
    tuning: Tuning | None = None
    reference: tuple[jax.Array, jax.Array] | None = None  # rows, and what they should be
    calls: int = 1  # back to back in one timing

    def row(self, group: str, baseline: float | None) -> dict:
        median = statistics.median(self.times)
        return {
            "group": group,
            "name": self.name,
            "milliseconds": 1e3 * median,
            "spread": (max(self.times) - min(self.times)) / median,
            "tflop_per_second": self.tflop / median,
            "over_cudnn": baseline / median if baseline else None,
            "relative_error": self.error,
            "clock_mhz": self.clock_mhz,
            "power_watt": self.power_watt,
            "tuning": dataclasses.asdict(self.tuning) if self.tuning else None,
            "times": self.times,
        }


class Bench:
    def __init__(self, until: float, only: set[str], skip: set[str], folder: pathlib.Path):
        self.until, self.only, self.skip, self.folder = until, only, skip, folder
        self.result: dict = {"rows": [], "done": []}
        self.rows: list[dict] = self.result["rows"]
        self.pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 4) - 2))

    def out_of_time(self, what: str) -> bool:
        late = time.time() > self.until
        if late:
            print(f"{what}: skipped, out of time", flush=True)
        return late

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Ends the process if what it holds takes too long, leaving behind the name."""
        (self.folder / "running").write_text(name)
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def save(self) -> None:
        (self.folder / "attention.json").write_text(json.dumps(self.result, indent=1) + "\n")

    def compile(self, group: str, functions: dict[str, tuple[Entry, Callable]], arguments: tuple) -> list[Entry]:
        """Traces one after the other, compiles beside each other; failures print a line."""
        pending: list[tuple[Entry, Future]] = []
        for name, (entry, function) in functions.items():
            measured = any(row["group"] == group and row["name"] == name for row in self.rows)
            if measured or name in self.skip or (self.only and name not in self.only) or self.out_of_time(name):
                continue
            try:
                lowered = jax.jit(function).lower(*arguments)
                pending.append((entry, self.pool.submit(lowered.compile)))
            except Exception as failure:
                report(name, failure)
        entries = []
        for entry, future in pending:
            try:
                entry.compiled = future.result()
                entries.append(entry)
            except Exception as failure:
                report(entry.name, failure)
        return entries

    def run(
        self, group: str, functions: dict[str, tuple[Entry, Callable]], arguments: tuple, sample_clocks: bool = False
    ) -> None:
        """Compiles, checks and times a group; the entry "cudnn" is what the others are compared with."""
        start = time.monotonic()
        entries = []
        for entry in self.compile(group, functions, arguments):
            try:
                with self.running(entry.name):
                    output = jax.block_until_ready(entry.compiled(*arguments))  # type: ignore[misc]
                if entry.reference is not None:
                    entry.error = float(relative_error(output, *entry.reference))
                entries.append(entry)
            except Exception as failure:
                report(entry.name, failure)
        compiled = time.monotonic()
        for _ in range(ROUNDS):
            for entry in list(entries):
                try:
                    with self.running(entry.name):
                        entry.times.append(timed(entry, arguments))
                except Exception as failure:
                    report(entry.name, failure)
                    entries.remove(entry)
        for entry in entries if sample_clocks else ():
            with self.running(entry.name):
                entry.clock_mhz, entry.power_watt = under_load(entry, arguments)
        baseline = next((statistics.median(e.times) for e in entries if e.name == "cudnn"), None)
        for entry in entries:
            row = entry.row(group, baseline)
            self.rows.append(row)
            print(line(row), flush=True)
        self.save()
        print(
            f"({group}: compiled in {compiled - start:.0f} s, timed in {time.monotonic() - compiled:.0f} s)", flush=True
        )


def report(name: str, failure: Exception) -> None:
    print(f"{name}: FAILED {type(failure).__name__}: {' '.join(str(failure).split())[-300:]}", flush=True)


def timed(entry: Entry, arguments: tuple) -> float:
    """Seconds a call takes."""
    assert entry.compiled
    start = time.perf_counter()
    for _ in range(entry.calls):
        output = entry.compiled(*arguments)
    jax.block_until_ready(output)
    return (time.perf_counter() - start) / entry.calls


def under_load(entry: Entry, arguments: tuple, seconds: float = 1.2) -> tuple[float | None, float | None]:
    """Clock in MHz and power in watts while the function runs."""
    assert entry.compiled
    calls = max(2, int(seconds / statistics.median(entry.times)))
    for _ in range(calls):
        output = entry.compiled(*arguments)
    time.sleep(seconds / 2)
    try:
        query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0"]
        clock, power = map(float, subprocess.run(query, capture_output=True, text=True, timeout=5).stdout.split(","))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, None
    finally:
        jax.block_until_ready(output)
    return clock, power


def line(row: dict) -> str:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if row[key] is not None else "-".rjust(int(form.split(".")[0]))

    return (
        f"{row['group']:<16} {row['name']:<22} {row['milliseconds']:9.3f} ms  {row['tflop_per_second']:6.1f} TFLOP/s  "
        f"x{number('over_cudnn', '5.3f')} cudnn  error {number('relative_error', '7.5f')}  "
        f"{number('clock_mhz', '5.0f')} MHz {number('power_watt', '4.0f')} W"
    )


def normal(seed: int, length: int, heads: int = HEADS, head_dim: int = HEAD_DIM, batch: int = 1) -> jax.Array:
    """Drawn in float32: bfloat16 draws take few distinct values, whose rounding errors do not average out."""
    draw = jax.jit(
        lambda key: jax.random.normal(key, (batch, length, heads, head_dim), jnp.float32).astype(jnp.bfloat16)
    )
    return draw(jax.random.key(seed))


@jax.jit
def exact_rows(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Float32 attention of a few query rows [B, rows, H, D], one head at a time; mask [rows, Sk]."""

    def head(qkv):
        q, k, v = (x.astype(jnp.float32) for x in qkv)
        logits = jnp.einsum("bqd,bkd->bqk", q, k, precision="highest") * q.shape[-1] ** -0.5
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(logits, axis=-1), v, precision="highest")

    return jnp.moveaxis(lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (query, key, value))), 0, 2)


def sample_rows(length: int) -> np.ndarray:
    """Rows of the first tile, of the middle, and of the last, unfinished, tile."""
    rows = np.concatenate([np.arange(32), length // 2 + np.arange(64), length - 1 - np.arange(160)])
    return np.unique(rows[(rows >= 0) & (rows < length)])


@jax.jit
def relative_error(output: jax.Array, rows: jax.Array, expected: jax.Array) -> jax.Array:
    difference = output[:, rows].astype(jnp.float32) - expected
    return jnp.linalg.norm(difference) / jnp.linalg.norm(expected)


def cudnn(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def ours(tuning: Tuning, lists: BlockLists | None = None):
    return lambda query, key, value: pallas_gpu.attention(query, key, value, tuning=tuning, block_lists=lists)


def self_attention(bench: Bench, name: str) -> None:
    length = int(np.prod(LATENTS[name]))
    tflop = 4e-12 * length * length * HEADS * HEAD_DIM
    arguments = tuple(normal(seed, length) for seed in range(3))
    rows = jnp.asarray(sample_rows(length))
    reference = rows, exact_rows(arguments[0][:, rows], *arguments[1:])
    functions = {"cudnn": (Entry("cudnn", tflop, reference=reference), cudnn)}
    for variant, tuning in DENSE.items():
        functions[variant] = Entry(variant, tflop, tuning=tuning, reference=reference), ours(tuning)
    bench.run(f"{name} dense", functions, arguments, sample_clocks=name == "720p")


def half_of_the_blocks(length: int, tuning: Tuning) -> BlockLists:
    """Every tile of queries sees a random half of the key blocks, in order."""
    tiles, blocks = -(-length // tuning.query_tile), -(-length // tuning.key_block)
    order = np.random.default_rng(0).random((tiles, blocks)).argsort(axis=1)[:, : blocks // 2]
    indices = jnp.asarray(np.sort(order, axis=1), jnp.int32)
    counts = jnp.full((tiles,), blocks // 2, jnp.int32)
    return BlockLists(indices, counts, query_tile=tuning.query_tile, key_block=tuning.key_block)


def block_lists(bench: Bench) -> None:
    """Half density, and what temporal patterns cost. TFLOP/s count the work kept, in whole blocks."""
    shape = LATENTS["720p"]
    length = int(np.prod(shape))
    arguments = tuple(normal(seed, length) for seed in range(3))
    rows = jnp.asarray(sample_rows(length))
    cases = {f"half {name}": (tuning, half_of_the_blocks(length, tuning)) for name, tuning in FOR_LISTS.items()}
    cases["window 5 frames"] = Tuning("ping_pong", 192), temporal_window(shape, 5, key_block=192)
    cases["along time"] = Tuning("ping_pong"), along_time(shape)
    functions = {}
    for name, (tuning, lists) in cases.items():
        pairs = int(lists.counts.sum()) * lists.query_tile * lists.key_block
        reference = rows, exact_rows(arguments[0][:, rows], *arguments[1:], mask_rows(lists, rows, length))
        entry = Entry(name, 4e-12 * pairs * HEADS * HEAD_DIM, tuning=tuning, reference=reference)
        functions[name] = entry, ours(tuning, lists)
    bench.run("720p lists", functions, arguments)


def mask_rows(lists: BlockLists, rows: jax.Array, length: int) -> jax.Array:
    """lists.mask for some rows only: the whole mask would take gigabytes."""
    tiles = rows // lists.query_tile
    part = dataclasses.replace(
        lists,
        indices=lists.indices[tiles],
        counts=lists.counts[tiles],
        partial_counts=None if lists.partial_counts is None else lists.partial_counts[tiles],
        key_ranges=None if lists.key_ranges is None else lists.key_ranges[rows],
        query_tile=1,
    )
    return part.mask(len(rows), length)


def cross_attention(bench: Bench) -> None:
    length, context = int(np.prod(LATENTS["720p"])), 512
    arguments = normal(0, length), normal(1, context), normal(2, context)
    rows = jnp.asarray(sample_rows(length))
    reference = rows, exact_rows(arguments[0][:, rows], *arguments[1:])
    tflop = 4e-12 * length * context * HEADS * HEAD_DIM
    functions = {"cudnn": (Entry("cudnn", tflop, reference=reference, calls=20), cudnn)}
    for name, tuning in FOR_CROSS.items():
        functions[name] = Entry(name, tflop, tuning=tuning, reference=reference, calls=20), ours(tuning)
    bench.run("720p cross 512", functions, arguments)


@dataclasses.dataclass
class Check:
    """A small case: its inputs, and what is special about it."""

    batch: int
    query_length: int
    key_length: int
    heads: int
    head_dim: int
    lists: BlockLists | None = None
    largest_key: float = 1.0

    def inputs(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        query = normal(0, self.query_length, self.heads, self.head_dim, self.batch)
        key = normal(1, self.key_length, self.heads, self.head_dim, self.batch)
        value = normal(2, self.key_length, self.heads, self.head_dim, self.batch)
        return query, key.at[:, self.key_length // 2].multiply(self.largest_key), value

    def is_right(self, output: jax.Array, lse: jax.Array) -> tuple[float, float, bool]:
        """(relative error, largest error of the log-sum-exp, whether both are small and unseeing rows give 0, -inf)."""
        query, key, value = self.inputs()
        mask = None if self.lists is None else self.lists.mask(self.query_length, self.key_length)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query.astype(jnp.float32), key.astype(jnp.float32), precision="highest")
        logits = logits * self.head_dim**-0.5
        logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
        seen = jnp.isfinite(logits.max(-1))
        expected = jnp.where(jnp.moveaxis(seen, 1, 2)[..., None], exact_rows(query, key, value, mask), 0.0)
        error = float(relative_error(output, jnp.arange(self.query_length), expected))
        lse_error = float(jnp.abs(jnp.where(seen, lse - jax.nn.logsumexp(logits, -1), 0.0)).max())
        return error, lse_error, error < 0.01 and lse_error < 1e-3 and bool((jnp.isneginf(lse) == ~seen).all())


def fits(tuning: Tuning, lists: BlockLists) -> bool:
    """Whether the kernel runs these lists so."""
    one_loop = lists.key_ranges is None or tuning.schedule != "two_stage_ping_pong"
    return one_loop and (lists.query_tile, lists.key_block) == (tuning.query_tile, tuning.key_block)


def checks(bench: Bench) -> None:
    """On the real hardware: lengths, widths, log-sum-exp, lists, empty lists, ranges, starting again."""
    schedules = named(
        Tuning(key_block=64),
        Tuning(key_block=64, running_maximum=True),
        Tuning("ping_pong", 64),
        Tuning("two_stage_ping_pong", 64),
        Tuning("two_stage_ping_pong", 192, running_maximum=True),
    )
    indices = jnp.array([[7, 1, 3], [2, 0, 0], [0, 0, 0]], jnp.int32)
    lists = BlockLists(indices, jnp.array([3, 1, 0], jnp.int32), key_block=64)
    ranges = jnp.stack([jnp.arange(300), jnp.arange(300) + 100], -1)
    partly = dataclasses.replace(lists, partial_counts=jnp.array([0, 1, 0], jnp.int32), key_ranges=ranges)
    cases = {
        "odd": Check(2, 333, 457, 3, 64),
        "one query": Check(1, 1, 700, 2, 128),
        "starts again": Check(1, 200, 700, 2, 64, largest_key=200.0),
        "lists": Check(1, 300, 500, 2, 64, lists),
        "an unfinished block seen whole": Check(1, 300, 500, 2, 64, partly),
        "window": Check(1, 5 * 7 * 9, 5 * 7 * 9, 2, 128, temporal_window((5, 7, 9), 1, key_block=64)),
    }
    pending: list[tuple[str, Check, Future]] = []
    for case, check in cases.items():
        for name, tuning in schedules.items():
            label = f"check {case}, {name}"
            if check.lists is not None and not fits(tuning, check.lists):
                continue
            if label in bench.skip or bench.out_of_time(label):
                continue
            run = functools.partial(pallas_gpu.attention, tuning=tuning, block_lists=check.lists, return_lse=True)
            try:
                lowered = jax.jit(run).lower(*check.inputs())
                pending.append((label, check, bench.pool.submit(lowered.compile)))
            except Exception as failure:
                report(label, failure)
    for label, check, future in pending:
        try:
            compiled, inputs = future.result(), check.inputs()
            with bench.running(label):
                output, lse = jax.block_until_ready(compiled(*inputs))
            error, lse_error, good = check.is_right(output, lse)
            row = {"group": "check", "name": label, "relative_error": error, "lse_error": lse_error, "good": good}
            bench.rows.append(row)
            print(f"{label}: error {error:.5f}, lse {lse_error:.1e} {'ok' if good else 'WRONG'}", flush=True)
        except Exception as failure:
            report(label, failure)


def matmul_rate() -> float:
    """TFLOP/s of a bf16 product of 8192^3, ten in a row: what the card gives at best."""
    x, y = (normal(seed, 8192, 1, 8192)[0, :, 0] for seed in range(2))
    entry = Entry("matmul", 2e-12 * 8192**3, compiled=jax.jit(jnp.dot).lower(x, y).compile(), calls=20)
    timed(entry, (x, y))
    return entry.tflop / statistics.median(timed(entry, (x, y)) for _ in range(5))


def measure(bench: Bench, parts: list[str]) -> None:
    functions = {
        "720p": lambda: self_attention(bench, "720p"),
        "480p": lambda: self_attention(bench, "480p"),
        "checks": lambda: checks(bench),
        "lists": lambda: block_lists(bench),
        "cross": lambda: cross_attention(bench),
    }
    device = jax.devices()[0]
    bench.result |= {
        "device": device.device_kind,
        "jax": jax.__version__,
        "platform": device.client.platform_version,
        "shapes": {name: [1, int(np.prod(latents)), HEADS, HEAD_DIM] for name, latents in LATENTS.items()},
        "rounds": ROUNDS,
    }
    if "matmul_tflop_per_second" not in bench.result:
        rate = bench.result["matmul_tflop_per_second"] = matmul_rate()
        print(f"{device.device_kind}, jax {jax.__version__}, matmul {rate:.0f} TFLOP/s", flush=True)
    for part in parts:
        if part not in bench.result["done"]:
            try:
                functions[part]()
            except Exception as failure:
                report(part, failure)
            bench.result["done"].append(part)
            bench.save()


def summary(rows: list[dict]) -> None:
    print("\nfastest first, by group:")
    timed_rows = [row for row in rows if "milliseconds" in row]
    for row in sorted(timed_rows, key=lambda row: (row["group"], row["milliseconds"])):
        print(line(row))
    wrong = [row["name"] for row in rows if row.get("good") is False]
    print(f"checks: {sum(row['group'] == 'check' for row in rows)}, wrong: {wrong or 'none'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "benchmarks/results"))
    )
    parser.add_argument("--seconds", type=float, default=400, help="start nothing new after this long")
    parser.add_argument("--only", default="", help="names of variants, with commas between")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to run, in order")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)  # when to stop, in time.time()
    parser.add_argument("--skip", default="", help=argparse.SUPPRESS)  # with semicolons: names of checks have commas
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    saved, running = options.output / "attention.json", options.output / "running"
    if options.child is not None:
        only, skip = (set(filter(None, names)) for names in (options.only.split(","), options.skip.split(";")))
        bench = Bench(options.child, only, skip, options.output)
        if saved.exists():
            bench.result = json.loads(saved.read_text())
            bench.rows = bench.result["rows"]
        measure(bench, options.parts.split(","))
        return
    saved.unlink(missing_ok=True)
    until, skipped = time.time() + options.seconds, list[str]()
    for _ in range(6):
        arguments = [*sys.argv[1:], "--child", str(until), "--skip", ";".join(skipped)]
        code = subprocess.run([sys.executable, "-m", "benchmarks.attention", *arguments]).returncode
        if code == 0:
            break
        name = running.read_text() if running.exists() else "before the first call"
        print(f"{name}: FAILED the process ended with {code}; going on without it", flush=True)
        skipped.append(name)
    running.unlink(missing_ok=True)
    if saved.exists():
        summary(json.loads(saved.read_text())["rows"])


if __name__ == "__main__":
    main()
