"""`wan-jax doctor`: what this machine has, what of it runs, and which models fit."""

import argparse
import json
import os
import pathlib
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wan_jax.errors import InputError

PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "av", "huggingface_hub", "tokenizers", "optax")


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "doctor", help="what this machine has, what of it runs, and which models fit", allow_abbrev=False
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_doctor)


def _doctor(values: argparse.Namespace) -> int:
    found = examine()
    print(json.dumps(found, ensure_ascii=False) if values.json else _for_people(found))
    return 0


def examine() -> dict[str, Any]:
    """What `--json` prints. Nothing is loaded or compiled, and what is wrong is a line of "problems"."""
    from wan_jax.runtime import devices, xla_flags
    from wan_jax.runtime.xla_flags import compile_cache_folder

    problems: list[str] = []
    folders = {"downloads": devices.download_folder(), "compile cache": compile_cache_folder(), "here": pathlib.Path()}
    found: dict[str, Any] = {
        "versions": _versions(),
        "host_memory": devices.host_memory(),
        "cpus": os.cpu_count(),
        "disk": {
            name: {"folder": str(folder), "free": devices.free_disk(folder)}
            for name, folder in folders.items()
            if folder is not None
        },
        "accelerators": devices.accelerators(),
        "driver": _driver(),
        "devices": [],
        "attention": None,
        "models": [],
        "problems": problems,
    }
    if missing := [name for name in ("libx264", "libvpx-vp9") if not _can_encode(name)]:
        problems.append(f"PyAV's FFmpeg lacks {' and '.join(missing)}; pip install --force-reinstall av")
    for name, place in found["disk"].items():
        if place["free"] < 2**30:
            problems.append(f"{place['folder']} ({name}) has {_gib(place['free'])} free")
    try:
        found["devices"] = [_device(each) for each in devices.find_devices()]
    except InputError as error:
        problems.append(str(error))
        return found
    problems += xla_flags.notes()
    found["attention"] = _attention()
    found["models"] = _models()
    return found


def _versions() -> dict[str, str | None]:
    import wan_jax

    versions: dict[str, str | None] = {
        "wan_jax": wan_jax.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    try:
        import av

        versions["libavcodec"] = ".".join(map(str, av.library_versions["libavcodec"]))
    except ImportError:
        pass
    return versions


def _can_encode(codec: str) -> bool:
    try:
        import av

        av.Codec(codec, "w")
    except (ImportError, ValueError):
        return False
    return True


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=3)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}"
    lines = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).split("\n")
    return lines[0].strip() or None


def _device(device: Any) -> dict[str, Any]:
    statistics = device.memory_stats() or {} if device.process_index == 0 else {}
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "memory": statistics.get("bytes_limit"),
        "in_use": statistics.get("bytes_in_use"),
    }


def _attention() -> str:
    """The implementation that runs self-attention at full size."""
    import jax
    import jax.numpy as jnp

    from wan_jax.kernels.attention import fastest

    tokens: Any = jax.ShapeDtypeStruct((1, 32760, 40, 128), jnp.bfloat16)
    return fastest(tokens, tokens, tokens)


def _models() -> list[dict[str, Any]]:
    """Of each preset at its own size: what each profile needs, by formula, and the first that fits."""
    import jax

    from wan_jax.diffusion.params import SamplingParams
    from wan_jax.planning.memory import Plan, memory_limit
    from wan_jax.presets import PRESETS
    from wan_jax.runtime.devices import host_memory
    from wan_jax.runtime.offload import PROFILES

    device, host, models = jax.local_devices()[0], host_memory(), []
    for name, config in PRESETS.items():
        request = SamplingParams().resolve(config)
        plan = Plan(config, request, "bfloat16")
        plan.compiled = False
        predictions = [plan.predict(profile) for profile in PROFILES.values()]
        if device.platform == "cpu":  # device and host are one
            fits = ["resident"] if host is None or predictions[0].peak_bytes <= host else []
        else:
            memory = memory_limit(device)
            fits = [each.profile for each in predictions if memory is None or each.fits(memory, host)]
        models.append(
            {
                "model": name,
                "size": list(request.size),
                "frames": request.frames,
                "device_bytes": {each.profile: each.peak_bytes for each in predictions},
                "host_bytes": plan.weight_bytes(),
                "disk_bytes": {"converted": plan.weight_bytes(), "download": plan.float32_bytes},
                "fits": fits[0] if fits else None,
            }
        )
    return models


def _for_people(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number or 'is missing'}" for name, number in found["versions"].items())
    host = "unknown memory" if found["host_memory"] is None else f"{_gib(found['host_memory'])} of memory"
    lines = [f"Versions:  {versions}", f"Host:      {found['cpus']} CPUs, {host}"]
    for index, device in enumerate(found["devices"]):
        room = "" if device["memory"] is None else f", {_gib(device['memory'])} for JAX"
        lines.append(f"{'Devices:' if index == 0 else '':<10} {device['platform']}: {device['kind']}{room}")
    if found["driver"]:
        lines.append(f"Driver:    {found['driver']}")
    if found["accelerators"]:
        lines.append(f"Seen:      {', '.join(found['accelerators'])}")
    if found["attention"]:
        lines.append(f"Attention: {found['attention']}")
    for name, place in found["disk"].items():
        lines.append(f"Disk:      {_gib(place['free'])} free in {place['folder']} ({name})")
    if found["models"]:
        profiles = list(found["models"][0]["device_bytes"])
        lines += ["", f"{'model':<16}{'size':>10}" + "".join(f"{name:>10}" for name in profiles)]
        lines[-1] += f"{'host':>10}{'disk':>10}  fits (GiB; by formula, nothing was compiled)"
        for model in found["models"]:
            sizes = [*model["device_bytes"].values(), model["host_bytes"], model["disk_bytes"]["download"]]
            cells = "".join(f"{size / 2**30:>10.1f}" for size in sizes)
            size = "x".join(map(str, model["size"]))
            lines.append(f"{model['model']:<16}{size:>10}{cells}  {model['fits'] or 'no'}")
    lines += ["", *(f"Problem: {problem}" for problem in found["problems"])] if found["problems"] else []
    return "\n".join(lines)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
