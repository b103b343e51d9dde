"""What `wan-jax plan` prints: the predictions for each memory profile, for people and as JSON."""

from dataclasses import dataclass
from typing import Any

from wan_jax.config import WanConfig
from wan_jax.diffusion.params import DTYPES, PROFILE_NAMES, SamplingParams, check_name
from wan_jax.errors import InputError
from wan_jax.planning.memory import Plan, Prediction, memory_limit
from wan_jax.runtime.offload import PROFILES


@dataclass(frozen=True)
class Report:
    """Predictions for the profiles asked for. str() is for people."""

    plan: Plan
    predictions: tuple[Prediction, ...]
    device_memory: int | None  # bytes that JAX may use
    reason: str | None = None  # for the mesh, where "auto" chose it

    def fits(self, prediction: Prediction) -> bool | None:
        """None where the device's memory is not known."""
        return None if self.device_memory is None else prediction.fits(self.device_memory)

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
            verdict = {True: "fits", False: "does not fit", None: ""}[self.fits(each)]
            lines.append(
                f"{each.profile:<9} {_gib(each.peak_bytes):>11} {stages} {_gib(each.host_bytes):>12} {times}  {verdict}"
            )
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
        if self.device_memory is None:
            lines.append("How much memory the device has is not known; say it with --device-memory.")
        else:
            lines.append(f"Best: {self.best}." if self.best else "None fits: take a smaller size or fewer frames.")
        return "\n".join(lines)


def report(
    config: WanConfig,
    settings: SamplingParams,
    dtype: str,
    profile: str = "auto",
    device_memory: float | None = None,
    vae_dtype: str = "float32",
) -> Report:
    """Predicts one profile, or all of them for "auto".

    `device_memory` is in GiB and takes the place of what the default device has.
    """
    check_name("dtype", dtype, DTYPES)
    check_name("VAE dtype", vae_dtype, DTYPES)
    check_name("profile", profile, PROFILE_NAMES)
    if device_memory is not None and not device_memory > 0:
        raise InputError(f"device memory {device_memory:g}: give GiB, more than 0")
    plan = Plan(config, settings, dtype, vae_dtype)
    profiles = PROFILES.values() if profile == "auto" else [PROFILES[profile]]
    limit = memory_limit(plan.device) if device_memory is None else int(device_memory * 2**30)
    return Report(plan, tuple(plan.predict(each) for each in profiles), limit)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
