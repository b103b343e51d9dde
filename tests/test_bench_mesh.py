"""`wan-jax bench mesh` with the demo's model on 8 devices of the CPU."""

import json

import jax
import pytest

from wan_jax.bench_mesh import alone, default_meshes, is_exchange, length, union
from wan_jax.cli import main
from wan_jax.config import get_preset
from wan_jax.demo import DEMO
from wan_jax.models import parameters
from wan_jax.models.parameters import ParameterInfo, random_parameters
from wan_jax.parallel.spread import Spread
from wan_jax.parallel.strategy import Strategy

SMALL = ["--preset", "demo", "--size", "48x32", "--frames", "5", "--repeats", "1", "--dtype", "float32"]


def test_a_table_of_meshes(tmp_path, capsys):
    path = tmp_path / "mesh.json"
    meshes = ["single", "ulysses2", "cfg2-fsdp2"]
    assert main(["bench", "mesh", *(f"--mesh={mesh}" for mesh in meshes), *SMALL, "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    single, ulysses, apart = report["rows"]
    assert [row["mesh"] for row in report["rows"]] == meshes
    assert single["step_scaling"] == 1
    assert ulysses["step_scaling"] == single["step_seconds"] / ulysses["step_seconds"]
    assert ulysses["forward_scaling"] > 0
    assert "forward_seconds" not in apart  # a forward alone leaves half of the devices without work
    assert ulysses["weight_bytes"] == single["weight_bytes"]
    assert 0.5 < apart["weight_bytes"] / single["weight_bytes"] < 0.55  # all but vectors in halves
    assert apart["memory_bytes"] > apart["weight_bytes"]
    for row in report["rows"]:
        assert row["difference_to_first"] < 1e-5  # sums in another order
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(meshes)
    assert lines[-1].startswith("cfg2-fsdp2 ")


@pytest.mark.parametrize("part", ["vae", "video"])
def test_vae_and_video_on_a_mesh(part, tmp_path):
    path = tmp_path / "part.json"
    assert main(["bench", part, "--mesh", "cfg2", *SMALL, "--steps", "2", "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["mesh"] == "cfg2"
    assert all(row["seconds"] >= 0 for row in report["rows"])
    assert report["rows"]


def test_a_mesh_that_fails_is_a_row(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr("wan_jax.bench_mesh.MeshBench.measure", fail)
    path = tmp_path / "mesh.json"
    assert main(["bench", "mesh", "--mesh", "ring2", *SMALL, "--output", str(path)]) == 0
    assert json.loads(path.read_text())["rows"][0]["error"] == "RuntimeError: no memory"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mesh", "--mesh", "ulysses3"], "mesh ulysses3: 4 heads cannot be divided over ulysses 3"),
        (["mesh", "--mesh", "ring64"], "mesh ring64: needs 64 devices and there are 8"),
        (["mesh", "--mesh", "data2"], "mesh data2: a batch of 1 cannot be divided"),
        (["mesh", "--prompts", "0"], "give at least 1"),
        (["denoiser", "--mesh", "ring2"], "bench vae and video run on one; bench mesh compares them"),
        (["vae", "--mesh", "ring2", "--mesh", "ring4"], "bench mesh compares them"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(["bench", *arguments, *SMALL]) == 2
    assert message in capsys.readouterr().err


def test_default_meshes():
    assert default_meshes(get_preset("t2v-a14b"), 4) == [
        *("single", "ulysses4", "cfg2-ulysses2", "ring4", "tensor4", "fsdp4", "pipeline4")
    ]
    assert default_meshes(DEMO, 1) == ["single"]
    assert "ulysses8" not in default_meshes(DEMO, 8)


def test_time_in_exchange():
    """Kernels of two streams: [0, 4] and [6, 10] exchange, [2, 7] and [9, 12] compute."""
    exchanges, others = [(6, 10), (0, 3), (1, 4)], [(2, 7), (9, 12)]
    assert union(exchanges) == [(0, 4), (6, 10)]
    assert length(union(exchanges)) == 8
    assert alone(exchanges, others) == 4  # [0, 2] and [7, 9]
    assert is_exchange("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)")
    assert is_exchange("MemcpyP2P")
    assert not is_exchange("MemcpyD2D")
    assert not is_exchange("cudnn_generated_fort_native_sdpa")


def test_random_parameters_on_a_mesh_are_those_of_one_device(monkeypatch):
    monkeypatch.setattr(parameters, "LARGE", 1000)
    tree = {
        "large.kernel": ParameterInfo((2, 64, 48), jax.numpy.float32, ("layers", "embed", "mlp")),
        "small.kernel": ParameterInfo((8, 4), jax.numpy.float32, ("embed", None)),
    }
    places = Spread.over(Strategy(fsdp=2, tensor=2)).shardings(tree)
    spread, whole = (random_parameters(tree, 0, "float32", shardings) for shardings in (places, None))
    for name in tree:
        assert spread[name].sharding == places[name]
        assert (jax.device_get(spread[name]) == jax.device_get(whole[name])).all()
