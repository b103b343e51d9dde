"""What a run needs on a mesh: memory of each device, seconds, and the mesh that "auto" takes.

Memory is that of `planning.memory.Plan` with every array in the parts that the mesh cuts it into; workspace is always
the formula's. Seconds are those of one device over the devices that share the work, and what communication cannot hide:

- Ulysses, tensor: all that is exchanged, at `LINK`; nothing of it hides.
- ring, fsdp: what is sent, where that takes longer than the work beside it.
- pipeline: stages that wait while the pipe fills, with the prompt and the negative prompt in it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import jax

from wan_jax.config import WanConfig
from wan_jax.diffusion.experts import as_pair
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.models.nn.causal_conv import CacheArrays
from wan_jax.parallel.mesh_spec import ONE_DEVICE, MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import ParameterInfo
from wan_jax.planning.memory import Plan, Prediction, choose_profile, memory_limit
from wan_jax.planning.report import Report, device_limit, host_limit
from wan_jax.planning.time import RATES, decode_workspace, denoiser_flops, encode_workspace
from wan_jax.runtime.offload import PROFILES, Profile

# Bytes per second that a device sends to its neighbours, assumed: NVLink 4 has 450e9 at best.
LINK = 300e9

Mesh = str | Mapping[str, int] | MeshSpec | None  # what a user may say; "auto" chooses


class MeshPlan(Plan):
    """The bookkeeping of one device of a mesh. Arguments beside `mesh_spec` are those of `Plan`."""

    def __init__(
        self,
        config: WanConfig,
        settings: SamplingParams,
        dtype: str,
        vae_dtype: str,
        mesh_spec: MeshSpec,
        *,
        device: jax.Device | None = None,
        adapter_bytes: int = 0,
    ):
        self.mesh_spec = mesh_spec
        super().__init__(config, settings, dtype, vae_dtype, device=device, adapter_bytes=adapter_bytes)
        self.compiled = False
        self.token_parts = mesh_spec.ring * mesh_spec.fsdp * mesh_spec.ulysses

    def _bytes_of(self, name: str, tree: Mapping[str, ParameterInfo]) -> dict[str, int]:
        """Of the part of each parameter that a device has."""
        shardings = Placement.planned(self.mesh_spec).model_shardings(self.config.model(name), tree)
        return {
            path: info.dtype.itemsize * math.prod(shardings[path].shard_shape(info.shape))
            for path, info in tree.items()
        }

    def weight_bytes(self) -> int:
        """Of two experts a device may have one."""
        whole, expert = super().weight_bytes(), sum(self._weights["denoiser"].values()) + self._copied_bytes
        return whole if self.mesh_spec.experts == 1 else whole - expert

    def estimated_workspace(self, profile: Profile) -> dict[str, int]:
        """The formula of one device, with a part of the tokens, heads, features and pixels.

        Two gathered layers come on top (fsdp), and the inputs and outputs of all videos in a pipeline.
        """
        mesh_spec, denoiser, item = self.mesh_spec, self.config.denoiser, self.dtype.itemsize
        sizes = super().estimated_workspace(profile)
        tokens, features = -(-self.tokens // self.token_parts), denoiser.ffn_dim // mesh_spec.tensor
        denoise = tokens * (4 * denoiser.dim + item * (denoiser.dim + 2 * features))
        denoise += item * 2 * denoiser.dim * features + self._context_bytes()
        if mesh_spec.ring > 1:  # float32 partial results of two hops, and keys and values that arrive
            denoise += tokens * denoiser.dim * (8 + 2 * item) // (mesh_spec.ulysses * mesh_spec.fsdp * mesh_spec.tensor)
        if mesh_spec.fsdp > 1:
            denoise += 2 * mesh_spec.fsdp * self._layer_bytes
        if mesh_spec.pipeline > 1:
            denoise += 2 * 2 * tokens * denoiser.dim * 4
        sizes["denoise"] = denoise
        width, height = self.settings.size
        tile = width, -(-height // mesh_spec.devices)
        # As many latent frames are decoded at once as there are tiles; at full resolution see models/vae.py, Decoder.
        frames = 4 // self.vae_dtype.itemsize if mesh_spec.devices > 1 else 1
        sizes["decode"] = decode_workspace(self.config.vae, self.vae_dtype, width, height, frames)
        if "encode" in sizes:
            sizes["encode"] = encode_workspace(self.config.vae, self.vae_dtype, *tile, self._encoded_frames)
        return sizes

    @property
    def _layer_bytes(self) -> int:
        """A device's part of a layer's weights."""
        layers = self.config.denoiser.num_layers // self.mesh_spec.pipeline
        return sum(size for path, size in self._weights["denoiser"].items() if path.startswith("blocks.")) // layers

    def _context_bytes(self) -> int:
        """A context's keys and values are split by layers and heads."""
        return super()._context_bytes() // (self.mesh_spec.pipeline * self.mesh_spec.tensor)

    def _cache_bytes(self, cache: CacheArrays) -> int:
        """The VAE's cache is in tiles."""
        return super()._cache_bytes(cache) // self.mesh_spec.devices

    def _seconds(self, profile: Profile) -> dict[str, float]:
        """Of one video. See the module's docstring for what is assumed."""
        alone = super()._seconds(profile)
        if not alone:
            return {}
        rates, mesh_spec, config = RATES[self.device.device_kind], self.mesh_spec, self.config.denoiser
        forward = denoiser_flops(config, self.tokens) / rates.denoiser
        forwards = alone["denoise"] / forward
        steps = alone["denoise"] / alone["step"]
        shared = self.token_parts * mesh_spec.tensor
        item, tokens = self.dtype.itemsize, self.tokens / self.token_parts
        exchanged, group = 0.0, mesh_spec.fsdp * mesh_spec.ulysses
        exchanged += 4 * tokens * config.dim / mesh_spec.tensor * (group - 1) / group  # queries, keys, values, results
        exchanged += 3 * tokens * config.dim * 2 * (mesh_spec.tensor - 1) / mesh_spec.tensor  # three sums a layer
        around = 2 * tokens * config.dim / mesh_spec.tensor * (mesh_spec.ring - 1)
        gathered = self._layer_bytes * (mesh_spec.fsdp - 1)
        work = forward / shared / config.num_layers
        attention = work / 2
        per_layer = work + exchanged * item / LINK
        per_layer += max(0.0, around * item / LINK - attention) + max(0.0, gathered / LINK - work)
        one = per_layer * config.num_layers
        in_flight = 2 if forwards > steps else 1
        if mesh_spec.pipeline > 1:
            one *= (in_flight + mesh_spec.pipeline - 1) / (in_flight * mesh_spec.pipeline)
        guided = forwards - steps  # steps with two forwards
        denoise = one * (steps + (0 if mesh_spec.cfg > 1 else guided))
        text = Placement.planned(mesh_spec).for_text(self.config.text_encoder).mesh_spec
        parts = {"text": text.tensor, "decode": mesh_spec.devices, "encode": mesh_spec.devices}
        stages = {name: alone[name] / parts.get(name, 1) for name in self.stages if name in alone}
        stages["denoise"] = denoise
        return stages | {"step": denoise / steps, "total": sum(stages.values())}

    def predict(self, profile: Profile = PROFILES["resident"]) -> Prediction:
        return super().predict(profile)


def candidates(config: WanConfig, request: SamplingParams, devices: int) -> Iterator[MeshSpec]:
    """Meshes of all devices, the best first: those with all weights everywhere, then those in parts.

    The prompt and the negative prompt side by side exchange nothing; Ulysses exchanges less than the ring, and the ring
    has no limit.
    """
    guided = any(scale != 1 for scale in as_pair(request.guidance))
    for axis in ("ulysses", "fsdp"):
        for cfg in (2, 1) if guided and devices % 2 == 0 else (1,):
            rest = devices // cfg
            for group in (size for size in range(rest, 0, -1) if rest % size == 0):
                mesh_spec = MeshSpec(cfg=cfg, ring=rest // group, **{axis: group})
                try:
                    request.check_mesh(config, mesh_spec)
                except InputError:
                    continue
                if group > 1 or axis == "ulysses":
                    yield mesh_spec
                    break  # the largest group that divides


def choose_mesh(
    plan_of: Callable[[MeshSpec], MeshPlan], devices: int | None = None, memory: int | None = None
) -> tuple[MeshPlan, str]:
    """Chooses the mesh that "auto" takes; returns its plan, and one line that says why.

    Args:
      plan_of: makes the plan of a run on a mesh: a `MeshPlan` that lacks its last argument.
      devices: the number of devices; those of the machine if None.
      memory: bytes of each; the device's own limit if None. Where that is not known, everything is taken to fit.
    """
    devices = jax.device_count() if devices is None else devices
    memory = memory_limit(jax.local_devices()[0]) if memory is None else memory
    single = plan_of(ONE_DEVICE)
    plans = []
    for mesh_spec in candidates(single.config, single.settings, devices):
        plans.append(plan_of(mesh_spec))
        prediction = plans[-1].predict()
        if memory is None or prediction.fits(memory):
            return plans[-1], _reason(plans[-1], prediction, memory)
    assert memory is not None
    least = min(plans, key=lambda plan: plan.predict().peak_bytes)
    return least, (
        f"mesh {least.mesh_spec}: no mesh of {devices} devices fits into {memory / 2**30:.1f} GiB; this one needs the "
        f"least, {least.predict().peak_bytes / 2**30:.1f} GiB"
    )


def _reason(plan: MeshPlan, prediction: Prediction, memory: int | None) -> str:
    mesh_spec, heads = plan.mesh_spec, f"{plan.config.denoiser.num_heads} heads"
    reasons = {
        "cfg": "the prompt and the negative prompt apart",
        "ulysses": f"{heads} over {mesh_spec.ulysses}",
        "fsdp": f"weights and {heads} over {mesh_spec.fsdp}, since they do not fit whole",
        "ring": f"tokens around {mesh_spec.ring}",
    }
    why = ", ".join(reason for axis, reason in reasons.items() if axis in mesh_spec.axes) or "nothing to share"
    room = "" if memory is None else f" of {memory / 2**30:.1f}"
    count = f"{mesh_spec.devices} device{'s' * (mesh_spec.devices > 1)}"
    return f"mesh {mesh_spec} for {count}: {why}; {prediction.peak_bytes / 2**30:.1f}{room} GiB a device"


def resolve(
    mesh: str | Mapping[str, int] | MeshSpec,
    profile: str,
    plan_of: Callable[[MeshSpec], MeshPlan],
    devices: int | None = None,
    memory: int | None = None,
) -> tuple[MeshPlan, str | None]:
    """The plan of a run on the mesh that a user asks for, and why that mesh, if it was chosen.

    Raises InputError for a mesh or profile that cannot be used; arguments as of `choose_mesh`.
    """
    if profile not in ("auto", "resident"):
        raise InputError(
            f"profile {profile}: on a mesh weights stay on the devices; use resident, and fsdp to split them"
        )
    if mesh == "auto":
        return choose_mesh(plan_of, devices, memory)
    mesh_spec = MeshSpec.parse(mesh)
    single = plan_of(ONE_DEVICE)
    single.settings.check_mesh(single.config, mesh_spec)
    return plan_of(mesh_spec), None


def choose_placement(
    mesh: Mesh,
    profile: str,
    config: WanConfig,
    settings: SamplingParams,
    dtype: str,
    vae_dtype: str,
    *,
    adapter_bytes: int = 0,
    note: Callable[[str], None],
) -> Placement:
    """Where a pipeline's arrays are. Choosing may compile functions that the pipeline will run.

    Args:
      mesh: what the user asks for; None for one device.
      profile: a name in PROFILES, or "auto".
      note: called with what "auto" chose.

    Raises:
      InputError: a mesh or profile that cannot be used.
    """
    mesh_spec = ONE_DEVICE
    if mesh is not None:
        plan_of = partial(MeshPlan, config, settings, dtype, vae_dtype, adapter_bytes=adapter_bytes)
        plan, reason = resolve(mesh, profile, plan_of)
        mesh_spec = plan.mesh_spec
        if reason is not None:
            note(reason)
        if jax.process_count() > 1:
            _check_processes(mesh_spec)
    placement = Placement.over(mesh_spec)
    if not placement.is_single:
        return placement
    offload = PROFILES.get(profile) or choose_profile(config, settings, dtype, vae_dtype, adapter_bytes)
    if profile == "auto" and offload.idle_on_host:
        note(f"memory profile {offload.name}: the device has no room for more")
    return replace(placement, offload=offload)


def _check_processes(mesh_spec: MeshSpec) -> None:
    if mesh_spec.devices != jax.device_count():
        raise InputError(
            f"mesh {mesh_spec}: has {mesh_spec.devices} devices; with several processes it must have all "
            f"{jax.device_count()}"
        )
    if mesh_spec.experts > 1:
        raise InputError(f"mesh {mesh_spec}: experts need one process; start one for all devices, or leave them out")


def report_mesh(
    config: WanConfig,
    settings: SamplingParams,
    dtype: str,
    mesh: str,
    device_memory: float | None = None,
    vae_dtype: str = "float32",
    profile: str = "auto",
    devices: int | None = None,
    host_memory: float | None = None,
) -> Report:
    """What `wan-jax plan --mesh` prints; `device_memory` is in GiB, of each device."""
    if devices is not None and not 1 <= devices <= 2**16:
        raise InputError(f"devices {devices}: give at least 1, at most {2**16}")
    memory = device_limit(device_memory)
    plan, reason = resolve(mesh, profile, partial(MeshPlan, config, settings, dtype, vae_dtype), devices, memory)
    return Report(plan, (plan.predict(),), memory, reason, host_limit(host_memory))
