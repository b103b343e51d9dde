"""Several processes as one: how they find each other, which of them writes, and what ends a run that hangs.

Every process runs the same program on devices of its own; the mesh is over all of them. `find_cluster` reads where a
process stands from flags or from what started it; docs/multi_host.md shows launches.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import jax
import numpy as np

from wan_jax.errors import InputError
from wan_jax.runtime.events import Event

PORT = 9473  # of the first process, unless something says otherwise
HANG_SECONDS = 1800.0  # of several processes, unless --hang-seconds says otherwise
EXIT_HUNG = 3


@dataclass(frozen=True)
class Cluster:
    """Where a process stands. None: JAX finds out itself (Cloud TPU)."""

    coordinator: str | None = None  # HOST:PORT of the first process
    processes: int | None = None
    process_id: int | None = None

    def join(self) -> None:
        """Waits for the other processes. Must come before anything runs on a device."""
        jax.distributed.initialize(self.coordinator, self.processes, self.process_id)


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
        port = PORT + int(_variable(environment, "SLURM_JOB_ID")) % 1000
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
    try:
        count, index = int(processes or ""), int("" if process_id is None else process_id)
    except ValueError:
        raise InputError(f"{name}: {processes!r} processes and process {process_id!r} are no whole numbers") from None
    if count < 1 or not 0 <= index < count:
        raise InputError(f"{name}: {index} must be from 0 to {count - 1}, one less than the number of processes")
    if count == 1:
        return None
    address = coordinator or ""
    if not re.fullmatch(r"[^\s:]+(:\d+)?", address):
        raise InputError(f"coordinator {address!r}: give HOST:PORT of the first process")
    return Cluster(address if ":" in address else f"{address}:{PORT}", count, index)


def _variable(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise InputError(f"{name} is not set, which the other processes are found by; set it or give --coordinator")
    return environment[name]


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: "gpu[03-05,07],x1" -> "gpu03"."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if not match:
        raise InputError(f"SLURM_STEP_NODELIST {nodes!r}: not a list of nodes; give --coordinator")
    return "".join(part or "" for part in match.groups())


def is_primary() -> bool:
    """Whether this process writes files and shows progress."""
    return jax.process_index() == 0


def broadcast_from_process_0(flags: list[bool]) -> list[bool]:
    """What the first process has, in every process."""
    if jax.process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(np.array(flags))).astype(bool).tolist()


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
                self._end(EXIT_HUNG)
                return
