"""Two real processes of two devices each make what one process makes; one that hangs ends both."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.lora.test_apply import write as write_lora
from tests.test_image_to_video import I2V
from wan_jax import read_video
from wan_jax.cli.main import main
from wan_jax.errors import InputError
from wan_jax.runtime.distributed import (
    EXIT_ELSEWHERE,
    EXIT_HUNG,
    Cluster,
    Watchdog,
    broadcast_from_process_0,
    find_cluster,
    first_host,
)
from wan_jax.testing.models import DEMO, write_demo

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ["a red circle", "--size", "48x32", "--frames", "5", "--steps", "2", "--dtype", "float32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts") / "demo"
    write_demo(folder, "orbax")
    return folder


def run(*commands: list[str], goes_wrong: dict[int, dict[str, str]] | None = None) -> list[tuple[int, str, str]]:
    """Two processes that run commands one after the other: exit code of the last, standard output, standard error.

    In arguments "{i}" is the process. `goes_wrong` gives variables of each that tests/runtime/process.py reads.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(2):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path.home() / ".cache" / "wan_jax" / "tests"),
            "PYTHONPATH": str(ROOT),
            **(goes_wrong or {}).get(index, {}),
        }
        flags = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process-id", str(index), "--quiet"]
        own = [[part.replace("{i}", str(index)) for part in [*command, *flags]] for command in commands]
        command = [sys.executable, "-m", "tests.runtime.process", json.dumps(own)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))
    ended = [process.communicate(timeout=600) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, ended, strict=True)]


def generate(checkpoint: pathlib.Path, folder: pathlib.Path, *arguments: str) -> list[str]:
    for index in range(2):
        (folder / str(index)).mkdir(parents=True, exist_ok=True)
    files = ["--save-latents", f"{folder}/{{i}}/latents.npy", "--output", f"{folder}/{{i}}/out.mp4"]
    return ["generate", *SMALL, "--checkpoint", str(checkpoint), "--mesh", "cfg2-fsdp2", *files, *arguments]


def test_two_processes_make_what_one_makes(checkpoint, tmp_path):
    """Prompt and negative prompt in different processes, layers in parts on both; LoRAs with whole changes, too."""
    two, one = tmp_path / "two", tmp_path / "one"
    lora = write_lora(tmp_path / "lora.safetensors", 1, 9, DEMO.denoiser)
    small = ["--size", "48x32", "--frames", "5", "--steps", "2", "--dtype", "float32"]
    measure = ["--one", "1", "--two", "0", "--languages", "en", "--batch", "1", "--mesh", "cfg2-fsdp2"]
    results = run(
        generate(checkpoint, two / "plain"),
        generate(checkpoint, two / "lora", "--lora", lora),
        ["decode", f"{two}/plain/0/latents.npy", "--checkpoint", str(checkpoint), "--output", f"{two}/{{i}}.mp4"],
        ["evaluate", "--checkpoint", str(checkpoint), *small, *measure, "--report", f"{two}/{{i}}.json"],
    )
    for code, output, errors in results:
        assert code == 0, errors
        assert re.findall(r"^(\w+) (\d+)$", output, re.MULTILINE) == [("generate", "0")] * 2 + [("decode", "0")]
    for kind, arguments in (("plain", []), ("lora", ["--lora", lora])):
        command = generate(checkpoint, one / kind, *arguments, "--mesh", "single", "--quiet")
        assert main([part.replace("{i}", "0") for part in command]) == 0
        made, wanted = (np.load(where / kind / "0" / "latents.npy") for where in (two, one))
        assert np.abs(made - wanted).max() < 1e-5 * np.abs(wanted).max(), kind  # sums in another order
        assert (two / kind / "0" / "out.mp4").stat().st_size > 0
        assert list((two / kind / "1").iterdir()) == []  # only the first process writes
    plain, changed = (np.load(one / kind / "0" / "latents.npy") for kind in ("plain", "lora"))
    assert np.abs(plain - changed).max() > 0.01
    assert {path.name for path in two.iterdir() if path.is_file()} == {"0.mp4", "0.json"}


def test_two_processes_take_images(tmp_path):
    checkpoint = tmp_path / "i2v"
    write_demo(checkpoint, "orbax", I2V)
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "black.png")
    folder = tmp_path / "made"
    extend = ["extend", f"{folder}/0/out.mp4", *SMALL, "--checkpoint", str(checkpoint), "--mesh", "cfg2-fsdp2"]
    results = run(
        generate(checkpoint, folder, "--image", str(tmp_path / "black.png")),
        [*extend, "--output", f"{folder}/{{i}}/longer.mp4"],
    )
    for code, _, errors in results:
        assert code == 0, errors
    assert len(read_video(folder / "0" / "longer.mp4").frames) == 9
    assert list((folder / "1").iterdir()) == []


def test_a_full_disk_lets_no_process_wait(checkpoint, tmp_path):
    """Each prompt of a file fails in the first process; both go on, and both know in the end."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    files = generate(checkpoint, tmp_path / "one", "--prompts", str(prompts))
    files.remove(SMALL[0])
    for commands, codes in (([files], [1, 1]), ([generate(checkpoint, tmp_path / "two")], [1, EXIT_ELSEWHERE])):
        (first, _, first_errors), (second, _, errors) = run(*commands, goes_wrong={0: {"FULL_DISK": "yes"}})
        assert [first, second] == codes, first_errors + errors
        assert "File too large" in first_errors
        assert ("2 of 2 videos failed" if second == 1 else "ended with process 0") in errors


def test_a_process_that_fails_ends_the_others(checkpoint, tmp_path):
    (waits, _, errors), (fails, _, own_errors) = run(generate(checkpoint, tmp_path), goes_wrong={1: {"FAILS": "yes"}})
    assert waits == EXIT_ELSEWHERE, errors
    assert "ended with process 1: RuntimeError: no such luck" in errors
    assert fails == 1, own_errors


def test_a_process_that_hangs_ends_the_run(checkpoint, tmp_path):
    command = generate(checkpoint, tmp_path, "--hang-seconds", "1000")
    results = run(command, goes_wrong={0: {"HANGS": "other"}, 1: {"HANGS": "yes"}})
    code, _, errors = results[1]
    assert code == EXIT_HUNG, errors
    message = r"process 1 of 2: nothing has moved for 2 s since: step 1 of 2 \(\w+ expert\); ending the run"
    assert re.search(message, errors)
    # The other waits for it, is told, or loses patience too.
    assert results[0][0] in (EXIT_HUNG, EXIT_ELSEWHERE), results[0]


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
        (("first:1", 0, 0), {}, "processes 0"),
        (("first:1", -2, 0), {}, "processes -2"),
        (("first:99999", 2, 0), {}, "PORT"),
        (("first:x", 2, 0), {}, "PORT"),
        (("first:", 2, 0), {}, "PORT"),
        (("", 2, 0), {}, "HOST"),
        (("a:1:2", 2, 0), {}, "HOST"),
        (
            (None,) * 3,
            SLURM | {"SLURM_PROCID": "2", "SLURM_JOB_ID": "70_12"} | {"SLURM_STEP_NODELIST": "["},
            "NODELIST",
        ),
        ((None,) * 3, SLURM | {"SLURM_PROCID": "2", "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID"),
        ((None,) * 3, SLURM | {"SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "gpu[03"}, "SLURM_STEP_NODELIST"),
        ((None,) * 3, SLURM | {"SLURM_PROCID": "2", "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST"),
        ((None,) * 3, SLURM | {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "four"}, "'four'"),
        ((None,) * 3, SLURM | {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": ""}, "processes"),
        ((None,) * 3, SLURM | {"SLURM_PROCID": "4"}, "SLURM_PROCID"),
        ((None,) * 3, WORKER_SET | {"LWS_GROUP_SIZE": "2.0"}, "LWS"),
        ((None,) * 3, JOB_SET | {"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX"),
        ((None,) * 3, {"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES"),
        ((None,) * 3, SLURM, "SLURM_PROCID is not set"),
        ((None,) * 3, SLURM | {"SLURM_PROCID": "x"}, "no whole number"),
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
    assert first_host("r[1-2]n[03,05-07],x[1]") == "r1n03"


def test_one_process_decides_for_itself():
    assert broadcast_from_process_0([True, False]) == [True, False]
