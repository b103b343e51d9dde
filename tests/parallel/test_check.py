"""Meshes that cannot be, each refused in one line that names what can; and what "auto" takes."""

import dataclasses
import json
from functools import partial

import pytest

from wan_jax.cli.main import main
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.planning.mesh import MeshPlan, choose_mesh, resolve
from wan_jax.presets import get_preset

pytestmark = pytest.mark.quick

A14B = get_preset("t2v-a14b")  # 40 heads, 40 layers
FIVE_HEADS = dataclasses.replace(A14B, denoiser=dataclasses.replace(A14B.denoiser, num_heads=5, dim=640))
GIB = 2**30


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("ulises4", "ulysses"),
        ("ulysses", "write axes and sizes like cfg2-ulysses2, or auto"),
        ("cfg2-cfg2", "cfg is named twice"),
        ({"ring": 0}, "whole number"),
        ("experts3", "t2v-a14b has 2 experts; use experts2, or none"),
        ("cfg3", "cfg can be 1 or 2"),
        ("tensor3", "40 heads cannot be divided over tensor 3; use 1, 2, 4, 5, 8 or 10, or ring"),
        ("ulysses3", "40 heads cannot be divided over ulysses 3; use 1, 2, 4, 5, 8 or 10, or ring"),
        ("fsdp16", "40 heads cannot be divided over fsdp 16"),
        ("fsdp4-ulysses4", "40 heads cannot be divided over fsdp times ulysses 16"),
        ("tensor4-ulysses4", "10 heads on each part of tensor 4 cannot be divided over ulysses 4; use 1, 2, 5 or 10"),
        ("pipeline3", "40 layers cannot be divided over pipeline 3; use 1, 2, 4, 5, 8 or 10"),
    ],
)
def test_illegal_meshes(mesh, message):
    with pytest.raises(InputError) as error:
        MeshSpec.parse(mesh).check(A14B)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_widths_that_do_not_divide():
    denoiser = dataclasses.replace(A14B.denoiser, ffn_dim=13825)
    with pytest.raises(InputError, match="ffn_dim 13825 cannot be divided over tensor 4; use 1, 5 or 7"):
        MeshSpec(tensor=4).check(dataclasses.replace(A14B, denoiser=denoiser))


def test_prompts_and_devices():
    with pytest.raises(InputError, match="a batch of 3 cannot be divided over data 2; use 1 or 3, or give more"):
        MeshSpec(data=2).check(A14B, prompts=3)
    MeshSpec(data=3).check(A14B, prompts=3)
    with pytest.raises(InputError, match="needs 16 devices and there are 8; use a smaller one, or auto"):
        MeshSpec(ring=16).make_mesh()


def test_the_devices_that_are_left():
    assert MeshSpec.parse({"data": -1, "fsdp": 2}) == MeshSpec(data=4, fsdp=2)
    with pytest.raises(InputError, match="data has size -1"):
        MeshSpec.parse({"data": -1, "fsdp": -1})


def test_five_heads_go_in_a_ring():
    with pytest.raises(InputError, match="5 heads cannot be divided over ulysses 4; use 1 or 5, or ring"):
        MeshSpec(ulysses=4).check(FIVE_HEADS)
    MeshSpec(ring=4).check(FIVE_HEADS)
    assert auto(4, config=FIVE_HEADS) == "cfg2-ring2"


def test_streaming_is_refused():
    settings = SamplingParams().resolve(A14B)
    with pytest.raises(InputError, match="profile swap: on a mesh weights stay on the devices"):
        resolve("ring2", "swap", plan_of(A14B, settings))


def plan_of(config, settings):
    return partial(MeshPlan, config, settings, "bfloat16", "float32")


def auto(devices: int, gib: float | None = None, guidance: float | None = None, config=A14B) -> str:
    settings = SamplingParams(size=(1280, 720), frames=81, guidance=guidance).resolve(config)
    memory = None if gib is None else int(gib * GIB)
    return str(choose_mesh(plan_of(config, settings), devices, memory)[0].mesh_spec)


def test_auto():
    assert auto(1) == "single"
    assert auto(4) == "cfg2-ulysses2"
    assert auto(4, guidance=1) == "ulysses4"
    assert auto(32) == "cfg2-ring2-ulysses8"
    assert auto(3) == "ring3"
    assert auto(4, gib=139) == "cfg2-ulysses2"


def test_a_plan_says_why(capsys):
    arguments = ["plan", "--mesh", "auto", "--devices", "4", "--device-memory", "139"]
    assert main(arguments) == 0
    assert "mesh cfg2-ulysses2 for 4 devices: the prompt and the negative prompt apart" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reason"].startswith("mesh cfg2-ulysses2 for 4 devices")


def test_auto_cuts_weights_that_do_not_fit():
    assert auto(4, gib=60) == "cfg2-fsdp2"
    assert auto(4, gib=34) == "fsdp4"
    _, reason = choose_mesh(plan_of(A14B, SamplingParams().resolve(A14B)), 4, 24 * GIB)
    assert reason.startswith("mesh fsdp4 for 4 devices")  # both experts and the text encoder fit
    settings = SamplingParams(size=(1280, 720), frames=81).resolve(A14B)
    plan, reason = choose_mesh(plan_of(A14B, settings), 4, 4 * GIB)
    assert (str(plan.mesh_spec), "no mesh of 4 devices fits into 4.0 GiB" in reason) == ("fsdp4", True)
    _, reason = choose_mesh(plan_of(A14B, settings), 4, 60 * GIB)
    assert "weights and 40 heads over 2, since they do not fit whole" in reason
    assert "\n" not in reason
