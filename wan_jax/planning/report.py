"""What `wan-jax plan` prints: the predictions for each memory profile, for people and as JSON."""

from dataclasses import dataclass, replace
from typing import Any

import jax

from wan_jax.config import WanConfig
from wan_jax.diffusion.params import DTYPES, PROFILE_NAMES, SamplingParams, check_name
from wan_jax.errors import InputError
from wan_jax.parallel.placement import Placement
from wan_jax.planning.memory import Plan, Prediction, memory_limit
from wan_jax.runtime import devices
from wan_jax.runtime.devices import download_folder, free_disk
from wan_jax.runtime.offload import PROFILES


@dataclass(frozen=True)
class Report:
    """Predictions for the profiles asked for. str() is for people."""

    plan: Plan
    predictions: tuple[Prediction, ...]
    device_memory: int | None  # bytes that JAX may use
    reason: str | None = None  # for the mesh, where "auto" chose it
    host_memory: int | None = None  # bytes

    def fits(self, prediction: Prediction) -> bool | None:
        """None where the device's memory is not known."""
        return None if self.device_memory is None else prediction.fits(self.device_memory, self.host_memory)

    def verdict(self, prediction: Prediction) -> str:
        if not prediction.fits_host(self.host_memory):
            return "no room on this host"
        return {True: "fits", False: "does not fit", None: ""}[self.fits(prediction)]

    @property
    def best(self) -> str | None:
        """The fastest profile that fits; None where none does, or where that is not known."""
        return next((each.profile for each in self.predictions if self.fits(each)), None)

    def as_json(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "model": plan.config.name,
            "settings": plan.settings.as_json(),
            "dtype": plan.dtype.name,
            "vae_dtype": plan.vae_dtype.name,
            "device": plan.device.device_kind,
            "mesh": str(plan.mesh_spec),
            "devices": plan.mesh_spec.devices,
            "reason": self.reason,
            "device_memory": self.device_memory,
            "host_memory": self.host_memory,
            "disk": {
                "converted": plan.weight_bytes(),
                "download": plan.float32_bytes,
                "free": free_disk(download_folder()),
            },
            "scratch": "compiled" if plan.compiled else "formula",
            "profiles": [each.as_json() | {"fits": self.fits(each)} for each in self.predictions],
            "best": self.best,
        }

    def __str__(self) -> str:
        plan, settings = self.plan, self.plan.settings
        memory = "" if self.device_memory is None else f", {_gib(self.device_memory)} for JAX"
        count = plan.mesh_spec.devices
        mesh = f", each of {count} in mesh {plan.mesh_spec}" if count > 1 else ""
        titles = " ".join(f"{stage:>10}" for stage in plan.stages)
        lines = [
            f"{plan.config.name} {settings.size[0]}x{settings.size[1]}, {settings.frames} frames, "
            f"{settings.make_schedule().num_steps} steps, {plan.dtype.name}; {plan.device.device_kind}{memory}{mesh}",
            f"{'profile':<9} {'device peak':>11} {titles} {'pinned host':>12} {'a step':>8} {'a video':>9}",
        ]
        for each in self.predictions:
            stages = " ".join(f"{_gib(each.device_bytes[stage]):>10}" for stage in plan.stages)
            times = " ".join(
                f"{each.seconds[name]:>{width}.1f} s" if each.seconds else f"{'?':>{width + 2}}"
                for name, width in (("step", 6), ("total", 7))
            )
            peak, pinned = _gib(each.peak_bytes), _gib(each.host_bytes)
            lines.append(f"{each.profile:<9} {peak:>11} {stages} {pinned:>12} {times}  {self.verdict(each)}")
        if self.reason is not None:
            lines.insert(0, f"auto: {self.reason}")
        if count > 1:
            lines.append("Workspace is a formula's; seconds assume the links that wan_jax/planning/mesh.py states.")
        elif plan.compiled:
            formula = [each.profile for each in self.predictions if not plan.compiles(PROFILES[each.profile])]
            note = f"; for {formula[0]} a formula's, until JAX is 0.11" if formula else ""
            lines.append(f"Workspace is that of the programs as compiled for this device{note}.")
        else:
            lines.append(
                "Workspace is a formula's, for GPUs: programs compiled for the CPU at hand need other amounts."
            )
        if not self.predictions[0].seconds:
            lines.append(f"No seconds: wan_jax/planning/time.py has no measured rates for {plan.device.device_kind!r}.")
        cache = download_folder()
        host = "" if self.host_memory is None else f"; host memory {_gib(self.host_memory)}"
        lines.append(
            f"Files of weights: {_gib(plan.weight_bytes())} in {plan.dtype.name}, a download in float32 up to "
            f"{_gib(plan.float32_bytes)}; free in {cache}: {_gib(free_disk(cache))}{host}."
        )
        if self.device_memory is None:
            lines.append("How much memory the device has is not known; say it with --device-memory.")
        elif self.best:
            lines.append(f"Best: {self.best}.")
        else:
            fitting = " or ".join(what_fits(plan, self.device_memory, self.host_memory))
            lines.append(f"None fits: take {fitting or 'a smaller model'}.")
        return "\n".join(lines)


def report(
    config: WanConfig,
    settings: SamplingParams,
    dtype: str,
    profile: str = "auto",
    device_memory: float | None = None,
    vae_dtype: str = "float32",
    host_memory: float | None = None,
) -> Report:
    """Predicts one profile, or all of them for "auto".

    `device_memory` and `host_memory` are in GiB and take the place of what the default device and its host have.
    """
    check_name("dtype", dtype, DTYPES)
    check_name("VAE dtype", vae_dtype, DTYPES)
    check_name("profile", profile, PROFILE_NAMES)
    plan = Plan(config, settings, dtype, vae_dtype)
    profiles = PROFILES.values() if profile == "auto" else [PROFILES[profile]]
    predictions = tuple(plan.predict(each) for each in profiles)
    return Report(plan, predictions, device_limit(device_memory), None, host_limit(host_memory))


def device_limit(gib: float | None) -> int | None:
    """Bytes that JAX may use: what the user says, or else of the first device of this process."""
    return memory_limit(jax.local_devices()[0]) if gib is None else _nbytes("device memory", gib)


def host_limit(gib: float | None) -> int | None:
    """Bytes of host memory: what the user says, or else of this host."""
    return devices.host_memory() if gib is None else _nbytes("host memory", gib)


def _nbytes(name: str, gib: float) -> int:
    if not 0 < gib < 2**30:
        raise InputError(f"{name} {gib:g}: give GiB, more than 0")
    return int(gib * 2**30)


def what_fits(plan: Plan, memory: int | None, host: int | None) -> list[str]:
    """Changes of a run each of which alone would make it fit: a profile, a size, fewer frames. By formula.

    Args:
        memory, host: bytes; what is None is not known, and taken for enough.
    """
    memory, found = 2**62 if memory is None else memory, []

    def best(settings: SamplingParams) -> str | None:
        own = Plan(plan.config, settings, plan.dtype.name, plan.vae_dtype.name, device=plan.device)
        own.compiled = False
        return next((name for name, each in PROFILES.items() if own.predict(each).fits(memory, host)), None)

    settings, step = plan.settings, 32
    if plan.mesh_spec.devices == 1 and (profile := best(settings)):
        return [f"--profile {profile}"]
    (width, height), frames = settings.size, settings.frames
    for part in (0.75, 0.66, 0.5, 0.33, 0.25):
        size = max(step, round(width * part / step) * step), max(step, round(height * part / step) * step)
        if profile := best(replace(settings, size=size)):
            found.append(f"--size {size[0]}x{size[1]} (--profile {profile})")
            break
    fewer = (1 + 4 * (round(frames * part) // 4) for part in (0.75, 0.6, 0.5, 0.33, 0.2))
    for count in fewer:
        if profile := best(replace(settings, frames=count)):
            found.append(f"--frames {count} (--profile {profile})")
            break
    return found


def advice(config: WanConfig, request: SamplingParams, dtype: str, placement: Placement) -> str:
    """What to do where memory is out in a run of a resolved request, by the plan."""
    plan, profiles = Plan(config, request, dtype), list(PROFILES.values())
    plan.compiled = False
    later = profiles[profiles.index(placement.offload) + 1 :] if placement.is_single else []
    needs = [f"profile {each.name} (about {_gib(plan.predict(each).peak_bytes)})" for each in later]
    mesh = "a mesh (--mesh auto)" if placement.is_single else "fsdp or tensor in the mesh, or more devices"
    width, height = request.size
    run = f"{config.name} at {width}x{height} with {request.frames} frames, profile {placement.offload.name}"
    choices = [*needs, mesh, "a smaller size", "fewer frames", "fewer videos at once"]
    return f"{run}, mesh {placement.mesh_spec}: take {', '.join(choices[:-1])} or {choices[-1]}; see wan-jax plan"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
