"""`wan-jax bench mesh` with the demo's model on 8 devices of the CPU."""

import json

import jax
import pytest

from wan_bench.meshes import MeshBench, default_meshes
from wan_jax.cli.main import main
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import ParameterInfo
from wan_jax.presets import get_preset
from wan_jax.testing import models
from wan_jax.testing.models import DEMO, random_parameters

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


@pytest.mark.parametrize("part", ["decode", "vae", "video"])
def test_parts_on_a_mesh(part, tmp_path):
    path = tmp_path / "part.json"
    steps = ["--steps", "2"] if part == "video" else []
    assert main(["bench", part, "--mesh", "cfg2", *SMALL, *steps, "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["mesh"] == "cfg2"
    assert all(row["seconds"] >= 0 for row in report["rows"])
    assert report["rows"]


def test_forwards_alone(tmp_path):
    path = tmp_path / "mesh.json"
    meshes = ["--mesh", "single", "--mesh", "cfg2"]
    assert main(["bench", "mesh", *meshes, *SMALL, "--forwards", "--hang-seconds", "300", "--output", str(path)]) == 0
    single, apart = json.loads(path.read_text())["rows"]
    assert "step_seconds" not in single
    assert apart["step_scaling"] == 2 * single["forward_seconds"] / apart["step_seconds"]


def test_what_is_measured_before_a_failure_stays(monkeypatch, tmp_path):
    run = MeshBench.run

    def fail_guided(self, expert, guidance, steps):
        if guidance != 1:
            raise RuntimeError("no\nmemory")
        return run(self, expert, guidance, steps)

    monkeypatch.setattr(MeshBench, "run", fail_guided)
    path = tmp_path / "mesh.json"
    assert main(["bench", "mesh", "--mesh", "ring2", *SMALL, "--output", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["error"] == "RuntimeError: no memory"
    assert row["forward_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mesh", "--mesh", "ulysses3"], "mesh ulysses3: 4 heads cannot be divided over ulysses 3"),
        (["mesh", "--mesh", "ring64"], "mesh ring64: needs 64 devices and there are 8"),
        (["mesh", "--mesh", "data2"], "mesh data2: a batch of 1 cannot be divided"),
        (["mesh", "--prompts", "0"], "give at least 1"),
        (["denoiser", "--mesh", "ring2"], "bench vae, decode, video run on one; bench mesh compares them"),
        (["vae", "--mesh", "ring2", "--mesh", "ring4"], "bench mesh compares them"),
        (["mesh", "--steps", "4"], "--steps: bench mesh measures single forwards and steps of the denoiser"),
        (["mesh", "--vae-dtype", "bfloat16"], "--vae-dtype: bench mesh measures"),
        (["mesh", "--plot", "a.png"], "--plot: bench mesh measures"),
        (["denoiser", "--prompts", "2"], "--prompts: bench denoiser measures one device or one mesh"),
        (["vae", "--forwards"], "--forwards: bench vae measures"),
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


def test_random_parameters_on_a_mesh_are_those_of_one_device(monkeypatch):
    monkeypatch.setattr(models, "LARGE", 1000)
    tree = {
        "large.kernel": ParameterInfo((2, 64, 48), jax.numpy.float32, ("layers", "embed", "mlp")),
        "small.kernel": ParameterInfo((8, 4), jax.numpy.float32, ("embed", None)),
    }
    places = Placement.over(MeshSpec(fsdp=2, tensor=2)).parameter_shardings(tree)
    spread, whole = (random_parameters(tree, 0, "float32", shardings) for shardings in (places, None))
    for name in tree:
        assert spread[name].sharding == places[name]
        assert (jax.device_get(spread[name]) == jax.device_get(whole[name])).all()
