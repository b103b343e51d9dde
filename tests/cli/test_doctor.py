"""`wan-jax doctor` and what is said of devices that lack memory."""

import json

import jax
import pytest

from wan_jax.cli.main import main
from wan_jax.errors import InputError
from wan_jax.presets import PRESETS
from wan_jax.runtime import devices
from wan_jax.runtime.events import Run
from wan_jax.runtime.offload import PROFILES


def test_what_doctor_says(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"wan_jax", "python", "jax", "jaxlib", "flax", "orbax-checkpoint", "av"} <= found["versions"].keys()
    assert [each["platform"] for each in found["devices"]] == [each.platform for each in jax.devices()]
    assert {"downloads", "here"} <= found["disk"].keys()
    assert [each["model"] for each in found["models"]] == list(PRESETS)
    assert all(list(each["device_bytes"]) == list(PROFILES) for each in found["models"])
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("jaxlib", "Attention", *PRESETS))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."), "device"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate pinned host memory"), "host"),
        (MemoryError(), "host"),
    ],
)
def test_memory_that_is_out_is_named_with_what_to_do(error, memory):
    run = Run(lambda event: None)
    run.advice = lambda: "take less"
    with pytest.raises(InputError, match=f"denoise: out of {memory} memory.*take less"), run.stage("denoise"):
        raise error
    assert "wan-jax plan" in str(devices.explain(error))


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="no luck"), Run(lambda event: None).stage("denoise"):
        raise RuntimeError("no luck")
    assert devices.explain(RuntimeError("no luck")) is None


@pytest.mark.parametrize(("asked", "signs", "count"), [("", ["plugin cuda12"], 1), ("cpu", ["plugin"], 0), ("", [], 0)])
def test_a_fall_back_to_the_cpu_is_said(monkeypatch, asked, signs, count):
    monkeypatch.setattr(devices, "asked_platforms", lambda: asked)
    monkeypatch.setattr(devices, "accelerators", lambda: signs)
    assert len(devices.fallback()) == count
