"""Several processes as one: how they find each other, which of them writes, and what ends a run that fails or hangs.

Every process runs the same program on devices of its own; the mesh is over all of them. `find_cluster` reads where a
process stands from flags or from what started it; docs/multi_host.md shows launches.
"""

import contextlib
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import jax
import numpy as np

from wan_jax.errors import InputError
from wan_jax.runtime.events import Event

PORT = 9473  # of the first process, unless something says otherwise
HANG_SECONDS = 1800.0  # of several processes, unless --hang-seconds says otherwise
HEARTBEAT_SECONDS = 30  # without a sign of a process, after which JAX ends the others
GRACE_SECONDS = 10.0  # for other processes to fail too, or to come as far
EXIT_HUNG = 3
EXIT_ELSEWHERE = 4  # another process failed


@dataclass(frozen=True)
class Cluster:
    """Where a process stands. None: JAX finds out itself (Cloud TPU)."""

    coordinator: str | None = None  # HOST:PORT of the first process
    processes: int | None = None
    process_id: int | None = None

    def join(self) -> None:
        """Waits for the other processes, once. Must come before anything runs on a device.

        Raises:
            InputError: the others did not come, or the address cannot be used.
        """
        if jax.distributed.is_initialized():
            return
        try:
            jax.distributed.initialize(
                self.coordinator, self.processes, self.process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
            )
        except (RuntimeError, ValueError) as error:
            where = f"process {self.process_id} of {self.processes} at {self.coordinator}"
            raise InputError(f"{where} did not find the others: {' '.join(str(error).split())}") from error


def find_cluster(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The cluster that flags describe, or else the environment; None for one process alone.

        SLURM           srun's SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, SLURM_PROCID
        Kubernetes      LeaderWorkerSet's LWS_LEADER_ADDRESS, LWS_GROUP_SIZE, LWS_WORKER_INDEX; for a JobSet
                        JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and its own JOB_COMPLETION_INDEX
        Cloud TPU       several TPU_WORKER_HOSTNAMES

    Raises:
        InputError: flags or variables that do not say all, or that contradict each other.
    """
    flags = coordinator, processes, process_id
    if any(flag is not None for flag in flags):
        if None in flags:
            raise InputError("--coordinator, --processes and --process-id belong together; give all three")
        return _checked(coordinator, processes, process_id, "--process-id")
    if (count := environment.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
        first = first_host(_variable(environment, "SLURM_STEP_NODELIST"))
        # Steps of different jobs on one node do not meet.
        port = PORT + _whole(_variable(environment, "SLURM_JOB_ID"), "SLURM_JOB_ID") % 1000
        return _checked(f"{first}:{port}", count, _variable(environment, "SLURM_PROCID"), "SLURM_PROCID")
    if (leader := environment.get("LWS_LEADER_ADDRESS")) is not None:
        index = _variable(environment, "LWS_WORKER_INDEX")
        return _checked(f"{leader}:{PORT}", _variable(environment, "LWS_GROUP_SIZE"), index, "LWS_WORKER_INDEX")
    if (address := environment.get("JAX_COORDINATOR_ADDRESS")) is not None:
        name = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environment else "JOB_COMPLETION_INDEX"
        return _checked(address, _variable(environment, "JAX_NUM_PROCESSES"), _variable(environment, name), name)
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return Cluster()
    return None


def _checked(
    coordinator: str | None, processes: str | int | None, process_id: str | int | None, name: str
) -> Cluster | None:
    count, index = _whole(processes, f"processes, beside {name}"), _whole(process_id, name)
    if count < 1:
        raise InputError(f"processes {count}, beside {name}: give at least 1")
    if not 0 <= index < count:
        raise InputError(f"{name}: {index} must be from 0 to {count - 1}, one less than the number of processes")
    if count == 1:
        return None
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:\[\]]+)(?::([0-9]{1,5}))?", coordinator or "")
    if match is None or not 0 < (port := int(match[2] or PORT)) < 2**16:
        raise InputError(
            f"coordinator {coordinator!r}: give HOST:PORT of the first process, PORT from 1 to {2**16 - 1}"
        )
    return Cluster(f"{match[1]}:{port}", count, index)


def _whole(value: str | int | None, name: str) -> int:
    try:
        return int("" if value is None else value)
    except ValueError:
        raise InputError(f"{name}: {value!r} is no whole number") from None


def _variable(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise InputError(f"{name} is not set, which the other processes are found by; set it or give --coordinator")
    return environment[name]


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: "gpu[03-05,07],x1" -> "gpu03"."""
    # A name is plain parts and ranges, of which the first number counts: "r[1-2]n[03,05]" -> "r1n03".
    match = re.match(r"(?:[^\s,\[\]]|\[\d+[-,\d]*\])+(?=,|$)", nodes)
    if not match:
        raise InputError(f"SLURM_STEP_NODELIST {nodes!r}: not a list of nodes; give --coordinator")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def is_primary() -> bool:
    """Whether this process writes files and shows progress."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def broadcast_from_process_0(flags: list[bool]) -> list[bool]:
    """What the first process has, in every process."""
    if not are_several():
        return flags
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(np.array(flags))).astype(bool).tolist()


def _service() -> Any:
    """The client of the service that joined processes share: small texts by key. None for one process alone.

    It needs no device, so that a process can say what happened while others wait for it in an exchange.
    """
    from jax._src import distributed  # JAX has no public way to it

    return distributed.global_state.client if are_several() else None


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Ends every process, with the reason, when the block fails in one of them.

    A process that waits for another in an exchange cannot be interrupted. So one that fails tells the service why, and
    a thread of each other process, which waits for that, prints it and ends its process with code 4. The block ends
    when all processes have come to its end.
    """
    service = _service()
    if service is None:
        yield
        return
    over, ending, end = threading.Event(), threading.Event(), f"wan_jax/end/{next(_blocks)}"
    watcher = threading.Thread(target=_watch_others, args=(service, over, ending), daemon=True, name="failures")
    watcher.start()
    try:
        yield
        service.wait_at_barrier(end, 2**31 - 1)  # one that fails ends the others before
        over.set()
        watcher.join(5)  # Python aborts where a thread still waits in the service at exit
    except BaseException as error:
        while ending.is_set():  # an exchange with one that is gone fails, too; the thread ends the process
            time.sleep(1)
        over.set()
        watcher.join(5)
        _tell_others(service, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise


def _tell_others(service: Any, reason: str) -> None:
    """Tells why this process ends, and waits until the others know."""
    from jax._src import distributed

    index, line = jax.process_index(), " ".join(reason.split())
    with contextlib.suppress(RuntimeError):  # another one was first, or the service is gone
        service.key_value_set("wan_jax/failed", f"process {index}: {line}")
    with contextlib.suppress(RuntimeError):
        service.key_value_set(f"wan_jax/heard/{index}", "")
        for other in range(jax.process_count()):
            service.blocking_key_value_get(f"wan_jax/heard/{other}", int(1000 * GRACE_SECONDS))
    # At exit JAX would wait for the others, which are gone. A thread that never ends keeps the service open till then.
    state = distributed.global_state
    kept = state.client, state.service
    threading.Thread(target=lambda _: threading.Event().wait(), args=(kept,), daemon=True).start()
    state.client = state.service = state.preemption_sync_manager = None


_blocks, _points = itertools.count(), itertools.count()  # the same in every process, which all do the same


def _watch_others(service: Any, over: threading.Event, ending: threading.Event) -> None:
    while not over.is_set():
        try:
            reason = service.blocking_key_value_get("wan_jax/failed", 1000)
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return  # JAX ends the process where the service is gone
        if over.wait(1.0) or reason.startswith(f"process {jax.process_index()}:"):  # ends by itself
            return
        ending.set()
        print(f"wan-jax: ended with {reason}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            service.key_value_set(f"wan_jax/heard/{jax.process_index()}", "")
        if is_primary():  # JAX's service goes with it, and aborts those that still end by themselves
            time.sleep(5)
        os._exit(EXIT_ELSEWHERE)


def all_came_here(wait: bool) -> bool:
    """Says that this process has come to a point which every process comes to; with `wait`, whether all others do.

    What fails in one process may be passed over only where no other one waits in an exchange with it.
    """
    if (service := _service()) is None:
        return True
    point = f"wan_jax/point/{next(_points)}"
    service.key_value_set(f"{point}/{jax.process_index()}", "")
    try:
        for other in range(jax.process_count() if wait else 0):
            service.blocking_key_value_get(f"{point}/{other}", int(1000 * GRACE_SECONDS))
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def draining(frames: Iterable[Any]) -> Iterator[None]:
    """Takes what is left of `frames` where the block fails: the devices of the other processes make them, too."""
    try:
        yield
    except Exception:
        if are_several():
            for _ in frames:
                pass
        raise


class Watchdog:
    """Ends the process when it has not been heard of for `seconds`; for use in a `with` block.

    A process that waits for another one in an exchange cannot be interrupted, so nothing is cleaned up: a line on
    standard error names the process and what it did last, and the exit code is 3.

    Attributes:
      seconds: more than the longest step and the compiling before it; None watches nothing.

    Args:
      seconds: see above.
      end: called at the end, instead of ending the process.
    """

    def __init__(self, seconds: float | None, end: Callable[[int], None] = os._exit):
        if seconds is not None and not seconds > 0:
            raise InputError(f"hang seconds {seconds:g}: give more than 0")
        self.seconds = seconds
        self._end = end
        self._last = "start"
        self._at = time.monotonic()
        self._over = threading.Event()

    def heartbeat(self, what: str) -> None:
        """Says that the process is alive, and what it has come to."""
        self._last, self._at = what, time.monotonic()

    def __call__(self, event: Event) -> None:
        """Listens to a run: every event is a heartbeat."""
        self.heartbeat(str(event))

    def __enter__(self) -> "Watchdog":
        self.heartbeat(self._last)
        if self.seconds is not None:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            if self.seconds is not None and time.monotonic() - self._at >= self.seconds:
                where = f"process {jax.process_index()} of {jax.process_count()}"
                print(
                    f"wan-jax: {where}: nothing has moved for {self.seconds:g} s since: {self._last}; ending the run",
                    file=sys.stderr,
                    flush=True,
                )
                if (service := _service()) is not None:
                    _tell_others(service, f"nothing has moved for {self.seconds:g} s since: {self._last}")
                self._end(EXIT_HUNG)
                return
