"""The environment that the command line sets, and that a second process finds every program in the compile cache."""

import os
import subprocess
import sys

import jax
import pytest

from wan_jax.runtime import xla_flags

SMALL = ["--size", "48x32", "--frames", "5", "--steps", "2", "--dtype", "float32", "--quiet"]

# Runs the command and prints how many programs were looked for, and how many were compiled.
PROGRAM = """
import sys
from wan_jax.runtime import xla_flags
from wan_jax.cli.main import main
xla_flags.use_compile_cache()  # as main does, but before the import below
import jax.monitoring
counts = {"/jax/compilation_cache/cache_hits": 0, "/jax/compilation_cache/cache_misses": 0}
def count(event, **_):
    if event in counts:
        counts[event] += 1
jax.monitoring.register_event_listener(count)
code = main(sys.argv[1:])
print(*counts.values())
sys.exit(code)
"""


def test_a_second_process_compiles_nothing(diffusers_tree, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", PROGRAM, "generate", "--checkpoint", str(diffusers_tree), *SMALL]

    def run(*arguments: str) -> tuple[int, int]:
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        hits, misses = done.stdout.splitlines()[-1].split()
        return int(hits), int(misses)

    hits, misses = run("a red circle")
    assert misses > 10
    hits, misses = run("a blue square", "--steps", "3", "--guidance", "2,5", "--shift", "5", "--seed", "7")
    assert hits > 10
    assert misses == 0


@pytest.fixture
def environment(monkeypatch):
    """An environment without any of the variables, put back afterwards."""
    names = [
        "XLA_FLAGS",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB",
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
    ]
    for name in names:
        monkeypatch.setenv(name, "")  # so that monkeypatch knows what to put back
        monkeypatch.delenv(name)
    return monkeypatch


def test_what_is_set(environment):
    xla_flags.configure()
    xla_flags.use_compile_cache()
    assert float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == 0.95
    assert int(os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]) > 0
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].endswith(os.path.join("wan_jax", "compile"))
    assert "XLA_FLAGS" not in os.environ


def test_the_users_own_values_stay(environment):
    own = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "7",
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3",
    }
    for name, value in own.items():
        environment.setenv(name, value)
    xla_flags.configure()
    xla_flags.use_compile_cache()
    assert {name: os.environ[name] for name in own} == own


def test_jax_has_not_started_when_the_command_line_sets_them():
    done = subprocess.run([sys.executable, "-c", "import sys, wan_jax.cli.main; sys.exit('jax' in sys.modules)"])
    assert done.returncode == 0


def test_options_of_a_step_on_several_gpus(monkeypatch):
    """XLA knows them, and none takes the place of what the user says."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert xla_flags.step_options(on_a_mesh=False) == xla_flags.CUBLASLT_OPTIONS
    options = xla_flags.step_options(on_a_mesh=True)
    assert options == xla_flags.CUBLASLT_OPTIONS | xla_flags.MESH_OPTIONS
    jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()  # raises for an option that is not known
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    assert xla_flags.step_options(on_a_mesh=True) == xla_flags.CUBLASLT_OPTIONS


@pytest.mark.parametrize(
    ("variable", "value", "messages"),
    [
        ("JAX_PLATFORMS", "cuda", ["JAX_PLATFORMS=cuda", "pip install"]),
        ("JAX_PLATFORMS", "toaster", ["toaster", "unset it"]),
        ("XLA_FLAGS", "--xla_toaster=1", ["XLA_FLAGS", "xla_toaster"]),
        ("XLA_FLAGS", "/toaster", ["XLA_FLAGS", "/toaster"]),
        ("JAX_ENABLE_X64", "toaster", ["JAX_ENABLE_X64", "toaster"]),
    ],
)
def test_an_environment_without_a_device_is_one_line(variable, value, messages):
    if value == "cuda" and any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("there is one")
    environment = os.environ | {variable: value}
    command = [sys.executable, "-m", "wan_jax.cli.main", "plan", "--preset", "nano"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert all(message in line for message in messages), line
