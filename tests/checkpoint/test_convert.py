"""Conversions in every direction, bit by bit; what reads the result; and every way a conversion can be cut short."""

import dataclasses
import fcntl
import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
from collections import namedtuple

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint import trees
from tests.checkpoint.trees import CONFIG, assert_same_state, bits, load, load_pickle, state_dict
from wan_jax.checkpoint import convert, open_checkpoint
from wan_jax.checkpoint.layouts import WRITABLE
from wan_jax.checkpoint.layouts.wan_jax import config_from_json
from wan_jax.errors import InputError
from wan_jax.models.build import abstract_model
from wan_jax.presets import PRESETS

TARGETS = ("orbax", "diffusers", "official")


def assert_official(tree, expected: dict[str, dict]) -> None:
    """An official tree holds exactly these state dicts."""
    assert_same_state(load(tree / "high_noise_model"), expected["high_noise"])
    assert_same_state(load(tree / "low_noise_model"), expected["low_noise"])
    text_encoder = load_pickle(tree / "models_t5_umt5-xxl-enc-bf16.pth")
    assert_same_state(text_encoder, expected["text_encoder"])
    assert_same_state(load_pickle(tree / "Wan2.1_VAE.pth"), expected["vae"])
    assert_tokenizer(tree / "google" / "umt5-xxl")


def assert_tokenizer(folder) -> None:
    assert {file.name: file.read_text() for file in folder.iterdir()} == trees.TOKENIZER_FILES


def official_states(dtype: str) -> dict[str, dict]:
    """What write_official stores: the text encoder is always bfloat16, the VAE float32."""
    dtypes = {"text_encoder": "bfloat16", "vae": "float32"}
    return {name: state_dict(name, "official", dtypes.get(name, dtype)) for name in trees.COMPONENTS}


@pytest.mark.parametrize(
    ("dtype", "path"),
    [
        ("float32", ()),
        ("float32", ("orbax",)),
        ("bfloat16", ("orbax",)),
        ("bfloat16", ("diffusers",)),
        ("bfloat16", ("orbax", "diffusers", "orbax")),
    ],
)
def test_official_comes_back_bit_by_bit(tmp_path, dtype, path):
    tree = trees.write_official(tmp_path / "source", dtype)
    for number, to in enumerate((*path, "official")):
        destination = tmp_path / f"{number}_{to}"
        summary = convert(tree, destination, to=to)
        assert summary.layout == to
        tree = destination
    assert_official(tree, official_states(dtype))


def test_mixed_dtypes_stay_mixed(tmp_path):
    """diffusers keeps norms and tables of a bfloat16 denoiser in float32."""
    tensors = state_dict("denoiser", "official", "bfloat16")
    for name in tensors:
        if "modulation" in name or "norm3" in name:
            tensors[name] = tensors[name].astype(np.float32)
    trees.write_official_expert(tmp_path / "source", tensors)
    summary = convert(tmp_path / "source", tmp_path / "ours")
    assert summary.components[0].dtypes.keys() == {"bfloat16", "float32"}
    convert(tmp_path / "ours", tmp_path / "back", to="official")
    assert_same_state(load(tmp_path / "back"), tensors)


@pytest.mark.parametrize("layout", ["official", "diffusers", "comfyui"])
def test_a_converted_checkpoint_loads_as_its_source(layout, request, tmp_path):
    fixture = {"diffusers": "diffusers_layout_tree"}.get(layout, f"{layout}_tree")
    source = open_checkpoint(request.getfixturevalue(fixture))
    convert(source.path, tmp_path / "ours")
    ours = open_checkpoint(tmp_path / "ours")
    assert ours.layout == "orbax"
    assert ours.config == source.config
    assert ours.components == source.components
    assert (ours.tokenizer_folder is None) == (source.tokenizer_folder is None)
    for component in source.components:
        # What was float8 is stored in bfloat16.
        dtype = "bfloat16" if layout == "comfyui" else "float32"
        expected, loaded = source.load(component, dtype), ours.load(component, dtype)
        assert expected.keys() == loaded.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(bits(loaded[name]), bits(array), err_msg=f"{component} {name}")


def test_layers_are_stored_apart(official_tree, tmp_path):
    convert(official_tree, tmp_path / "ours")
    names = open_checkpoint(tmp_path / "ours").part("high_noise").store.tensors
    assert names["blocks.1.self_attention.query.kernel"].shape == (256, 256)
    assert names["patch_embedding.kernel"].shape == (64, 256)
    manifest = json.loads((tmp_path / "ours" / "wan_jax.json").read_text())
    assert manifest["format"] == 1
    assert config_from_json(manifest["config"]) == CONFIG
    assert manifest["components"]["text_encoder"]["dtypes"] == {"bfloat16": len(state_dict("text_encoder", "official"))}


@pytest.mark.parametrize("to", TARGETS)
def test_the_dtype_wanted_is_rounded_once_and_spares_the_vae(official_tree, tmp_path, to):
    summary = convert(official_tree, tmp_path / "result", dtype="bfloat16", to=to)
    dtypes = {component.name: set(component.dtypes) for component in summary.components}
    assert dtypes == {name: {"float32" if name == "vae" else "bfloat16"} for name in trees.COMPONENTS}
    loaded = open_checkpoint(tmp_path / "result").load("low_noise", "float32")
    expected = (
        state_dict("low_noise", "official")["time_projection.1.weight"].astype(ml_dtypes.bfloat16).astype(np.float32).T
    )
    np.testing.assert_array_equal(loaded["time_projection.kernel"], expected)


def test_the_summary(official_tree, tmp_path):
    seen = []
    summary = convert(official_tree, tmp_path / "ours", progress=lambda *report: seen.append(report))
    states = official_states("float32")
    assert summary.tensors == sum(map(len, states.values())) == len(seen)
    expected = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in states.items()}
    assert {component.name: component.nbytes for component in summary.components} == expected
    assert summary.nbytes == sum(expected.values())
    assert {(name, total) for name, done, total in seen if done == total} == set(expected.items())
    assert f"{summary.tensors:,} tensors" in str(summary)
    assert 0 < summary.seconds < 100


# What must be refused, and what an interruption may leave.


def refusal(*arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        convert(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_destinations_and_options(official_tree, tmp_path):
    (tmp_path / "taken").mkdir()
    assert "taken: exists already" in refusal(official_tree, tmp_path / "taken")
    assert "nowhere does not exist" in refusal(official_tree, tmp_path / "nowhere" / "result")
    assert "unknown target layout 'flax'" in refusal(official_tree, tmp_path / "result", to="flax")
    assert "dtype float16 is no dtype" in refusal(official_tree, tmp_path / "result", dtype="float16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["taken"]


def test_too_little_disk(official_tree, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1234, 1234))
    message = refusal(official_tree, tmp_path / "result")
    nbytes = sum(t.nbytes for tensors in official_states("float32").values() for t in tensors.values())
    assert f"needs {nbytes + (64 << 20):,} bytes and 1,234 are free" in message
    assert not list(tmp_path.iterdir())


def test_a_broken_source_leaves_nothing(official_tree, tmp_path):
    tree = shutil.copytree(official_tree, tmp_path / "source")
    (tree / "low_noise_model" / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    assert "is missing" in refusal(tree, tmp_path / "result")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "changes",
    [
        {"vae": dataclasses.replace(CONFIG.vae, latents_mean=(0.5,) * 16)},
        {"text_encoder": dataclasses.replace(CONFIG.text_encoder, max_distance=64)},
    ],
)
def test_the_official_layout_refuses_what_it_would_lose(changes):
    (component,) = changes
    field = {"vae": "latents_mean", "text_encoder": "max_distance"}[component]
    with pytest.raises(InputError, match=f"no place for {component}'s {field}"):
        WRITABLE["official"].check_can_hold(dataclasses.replace(CONFIG, **changes), [component])
    for preset in PRESETS.values():
        if preset.name == "nano":  # ours, with a normalisation of its own, which only the diffusers layout says
            continue
        image_encoder = [] if preset.image_encoder is None else ["image_encoder"]
        WRITABLE["official"].check_can_hold(preset, ["text_encoder", "vae", *image_encoder, *preset.experts])


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(("error", "component"), [(RuntimeError("stop"), "high_noise"), (KeyboardInterrupt(), "vae")])
def test_an_exception_in_the_middle_leaves_nothing(official_tree, tmp_path, to, error, component):
    def stop(name, done, total):
        if name == component and done > total // 2:
            raise error

    with pytest.raises(type(error)):
        convert(official_tree, tmp_path / "result", to=to, progress=stop)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from wan_jax.checkpoint import convert

def kill(name, done, total):
    if name == sys.argv[4] and done == total:
        assert not {"torch", "safetensors", "diffusers"} & sys.modules.keys()  # conversion needs none of them
        os.kill(os.getpid(), signal.SIGKILL)

convert(sys.argv[1], sys.argv[2], to=sys.argv[3], progress=kill)
"""


@pytest.mark.parametrize("to", TARGETS)
def test_a_killed_conversion_leaves_nothing_that_loads(official_tree, tmp_path, to):
    result = tmp_path / "result"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), official_tree, result, to, "text_encoder"]
    killed = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()  # the experts were written already
    assert leftover.name == ".result.converting"
    assert len(list(leftover.rglob("*"))) > 3
    with pytest.raises(InputError, match="left by an interrupted conversion"):
        open_checkpoint(leftover)
    convert(official_tree, result, to=to)
    assert list(tmp_path.iterdir()) == [result]
    assert open_checkpoint(result).components


def test_the_scripts(official_tree, tmp_path, monkeypatch, capfd):
    folder = pathlib.Path(__file__).parents[2] / "convert"

    def run(to: str) -> int:
        script = str(folder / f"to_{to}.py")
        monkeypatch.setattr(sys, "argv", [script, str(official_tree), str(tmp_path / to), "--quiet"])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(script, run_name="__main__")
        return exit.value.code

    for to in TARGETS:
        assert run(to) == 0
        assert f"wrote {tmp_path / to} ({to})" in capfd.readouterr().out
        assert open_checkpoint(tmp_path / to).layout == to
    assert run("official") == 2
    assert "official: exists already; choose another name or remove it" in capfd.readouterr().err


def test_two_conversions_to_one_place(official_tree, tmp_path):
    running = tmp_path / ".result.converting"
    running.mkdir()
    (running / "precious").touch()
    descriptor = os.open(running, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another conversion is writing it" in refusal(official_tree, tmp_path / "result")
    assert (running / "precious").exists()
    os.close(descriptor)
    convert(official_tree, tmp_path / "result")
    assert [file.name for file in tmp_path.iterdir()] == ["result"]


@pytest.fixture
def ours(official_tree, tmp_path):
    convert(official_tree, tmp_path / "ours")
    return tmp_path / "ours"


def test_damaged_checkpoints_of_ours(ours):
    manifest = ours / "wan_jax.json"
    good = manifest.read_text()

    def message() -> str:
        with pytest.raises(InputError) as error:
            open_checkpoint(ours).load("vae")
        assert "\n" not in str(error.value)
        return str(error.value)

    manifest.write_text(good.replace('"format": 1', '"format": 2'))
    assert "format 2 is not 1" in message()
    manifest.write_text(good.replace('"num_heads": 2', '"heads": 2'))
    assert "damaged or from another version" in message()
    manifest.write_text(good.replace('"ffn_dim": 52', '"ffn_dim": 53'))
    assert "of the wrong shape" in message()
    manifest.write_text(good[:100])
    assert "not valid JSON" in message()
    manifest.write_text(good)
    shutil.rmtree(ours / "vae" / "state")
    assert "vae: not a readable Orbax tree" in message()
    shutil.rmtree(ours / "vae")
    assert "vae/ is missing" in message()
    manifest.unlink()
    assert "not a checkpoint that wan_jax knows" in message()


def test_lost_data_of_ours_is_found_when_loading(ours):
    checkpoint = open_checkpoint(ours)
    for data in (ours / "vae").rglob("d/*"):
        data.unlink()
    with pytest.raises(InputError, match="vae: not a readable Orbax tree"):
        checkpoint.load("vae")


def test_loading_leaves_arrays_on_the_device(ours):
    arrays = open_checkpoint(ours).load("high_noise", "bfloat16")
    assert all(isinstance(array, jax.Array) and array.dtype == jax.numpy.bfloat16 for array in arrays.values())


def test_a_checkpoint_of_the_first_format(tmp_path):
    """Written when the format was new: its names, its manifest and its arrays are still understood."""
    archive = pathlib.Path(__file__).with_name("orbax_format_1.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    checkpoint = open_checkpoint(tmp_path / "orbax")
    config = checkpoint.config
    assert config.conditioning == "image_latents"
    assert config.sampling.guidance == (2.0, 3.0)
    assert config.sampling.guidance.high == 3.0
    assert set(checkpoint.components) == {"text_encoder", "vae", "image_encoder", "denoiser"}
    for component in checkpoint.components:
        loaded = checkpoint.load(component, "float32")
        assert loaded.keys() == abstract_model(config.model(component)).keys()
        for name, array in loaded.items():
            expected = (np.arange(array.size, dtype=np.float32).reshape(array.shape) % 251 - 125) / 8
            np.testing.assert_array_equal(array, expected, err_msg=f"{component} {name}")
    assert "blocks.feed_forward.up.kernel" in checkpoint.load("denoiser")
