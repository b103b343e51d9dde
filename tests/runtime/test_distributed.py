"""Two real processes of two devices each make what one process makes; one that hangs ends both."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from wan_jax.cli.main import main
from wan_jax.errors import InputError
from wan_jax.runtime.distributed import EXIT_HUNG, Cluster, Watchdog, broadcast_from_process_0, find_cluster, first_host
from wan_jax.testing.models import write_demo

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ["a red circle", "--size", "48x32", "--frames", "5", "--steps", "2", "--dtype", "float32", "--quiet"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts") / "demo"
    write_demo(folder, "orbax")
    return folder


def run(checkpoint, folder, *arguments: str, hangs: int | None = None) -> list[tuple[int, str]]:
    """Two processes: exit code and standard error of each; process i writes to folder/i."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(2):
        own = folder / str(index)
        own.mkdir(parents=True)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path.home() / ".cache" / "wan_jax" / "tests"),
            "PYTHONPATH": str(ROOT),
            "HANGS": "" if hangs is None else "yes" if index == hangs else "other",
        }
        flags = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process-id", str(index)]
        command = [sys.executable, "-m", "tests.runtime.process", "generate", *SMALL, "--checkpoint", str(checkpoint)]
        command += [*flags, "--mesh", "cfg2-fsdp2", *arguments]
        command += ["--save-latents", str(own / "latents.npy"), "--output", str(own / "out.mp4")]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    results = [(process.communicate(timeout=240)[1], process.returncode) for process in started]
    return [(code, errors) for errors, code in results]


def test_two_processes_make_the_latents_of_one(checkpoint, tmp_path):
    # Prompt and negative prompt in different processes, layers in parts on both.
    for code, errors in run(checkpoint, tmp_path / "two"):
        assert code == 0, errors
    alone = tmp_path / "latents.npy"
    arguments = ["--checkpoint", str(checkpoint), "--save-latents", str(alone), "--output", str(tmp_path / "out.mp4")]
    assert main(["generate", *SMALL, *arguments]) == 0
    two, one = np.load(tmp_path / "two" / "0" / "latents.npy"), np.load(alone)
    assert np.abs(two - one).max() < 1e-5 * np.abs(one).max()  # sums in another order
    assert (tmp_path / "two" / "0" / "out.mp4").stat().st_size > 0
    assert list((tmp_path / "two" / "1").iterdir()) == []  # only the first process writes


def test_a_process_that_hangs_ends_the_run(checkpoint, tmp_path):
    results = run(checkpoint, tmp_path, "--hang-seconds", "1000", hangs=1)
    code, errors = results[1]
    assert code == EXIT_HUNG, errors
    message = r"process 1 of 2: nothing has moved for 2 s since: step 1 of 2 \(\w+ expert\); ending the run"
    assert re.search(message, errors)
    # The other waits for it, and says so itself, or is ended because it is gone.
    code, errors = results[0]
    assert code != 0


def test_watchdog():
    ended = threading.Event()
    codes = []
    with Watchdog(0.2, end=lambda code: (codes.append(code), ended.set())) as watchdog:
        watchdog.heartbeat("step 1")
        assert ended.wait(60)
    assert codes == [EXIT_HUNG]
    with Watchdog(0.05, end=codes.append):
        pass  # over before
    with pytest.raises(InputError, match="give more than 0"):
        Watchdog(0)


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[03-05,07],x1", "SLURM_JOB_ID": "7012"}

WORKER_SET = {"LWS_LEADER_ADDRESS": "wan-0.wan", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0"}
JOB_SET = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM | {"SLURM_PROCID": "2"}, Cluster("gpu03:9485", 4, 2)),
        (WORKER_SET, Cluster("wan-0.wan:9473", 2, 0)),
        (JOB_SET, Cluster("h:1", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, Cluster()),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)  # fmt: skip
def test_the_environment(environment, cluster):
    assert find_cluster(environment=environment) == cluster
    assert find_cluster("first:1", 3, 2, environment) == Cluster("first:1", 3, 2)  # flags come first


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (("first:1", None, 0), {}, "belong together; give all three"),
        (("first:1", 2, 2), {}, "2 must be from 0 to 1"),
        ((None,) * 3, SLURM, "SLURM_PROCID is not set"),
        ((None,) * 3, SLURM | {"SLURM_PROCID": "x"}, "no whole numbers"),
        (("a b", 2, 0), {}, "give HOST:PORT"),
    ],
)
def test_refusals(flags, environment, message):
    with pytest.raises(InputError, match=message):
        find_cluster(*flags, environment)


def test_first_host():
    assert first_host("gpu[03-05,07],x1") == "gpu03"
    assert first_host("x1,gpu[03-05]") == "x1"
    assert first_host("a[1-2]b") == "a1b"


def test_one_process_decides_for_itself():
    assert broadcast_from_process_0([True, False]) == [True, False]
