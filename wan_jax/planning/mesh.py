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

import jax

from wan_jax.config import WanConfig
from wan_jax.diffusion.experts import as_pair
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.models.build import abstract_model
from wan_jax.models.compiled import CompiledModels
from wan_jax.models.nn.causal_conv import Cache
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.planning.memory import Plan, Prediction, choose_profile, memory_limit
from wan_jax.planning.report import Report
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
        vae_dtype: str = "float32",
        *,
        mesh_spec: MeshSpec,
        device: jax.Device | None = None,
        adapter_bytes: int = 0,
    ):
        programs = CompiledModels(exact=dtype == "float32")
        super().__init__(
            config, settings, dtype, vae_dtype, device=device, programs=programs, adapter_bytes=adapter_bytes
        )
        self.compiled = False
        self.mesh_spec = mesh_spec
        placement = Placement.planned(mesh_spec)
        for name, model, parts in (
            ("denoiser", config.denoiser, placement),
            ("text_encoder", config.text_encoder, placement.for_text(config.text_encoder)),
        ):
            tree = abstract_model(model)
            places = parts.parameter_shardings(tree)
            itemsize = {
                path: size // math.prod(tree[path].shape) for path, size in self._weights[name].items() if path in tree
            }
            self._weights[name] |= {
                path: itemsize[path] * math.prod(places[path].shard_shape(info.shape)) for path, info in tree.items()
            }
        self.token_parts = mesh_spec.ring * mesh_spec.fsdp * mesh_spec.ulysses

    def weight_bytes(self) -> int:
        """Of two experts a device may have one."""
        whole = super().weight_bytes()
        return whole if self.mesh_spec.experts == 1 else whole - sum(self._weights["denoiser"].values())

    def estimated_workspace(self, profile: Profile) -> dict[str, int]:
        """The formula of one device, with a part of the tokens, heads, features and pixels.

        Two layers whose parts were gathered come on top (fsdp), and the inputs and outputs of all videos in a pipeline.
        """
        mesh_spec, denoiser, item = self.mesh_spec, self.config.denoiser, self.dtype.itemsize
        sizes = super().estimated_workspace(profile)
        tokens, features = -(-self.tokens // self.token_parts), denoiser.ffn_dim // mesh_spec.tensor
        denoise = tokens * (4 * denoiser.dim + item * (denoiser.dim + 2 * features))
        denoise += item * 2 * denoiser.dim * features + self._context_bytes()
        if mesh_spec.ring > 1:  # float32 partial results of two turns, and keys and values that arrive
            denoise += tokens * denoiser.dim * (8 + 2 * item) // (mesh_spec.ulysses * mesh_spec.fsdp * mesh_spec.tensor)
        if mesh_spec.fsdp > 1:
            denoise += (
                2
                * mesh_spec.fsdp
                * sum(size for path, size in self._weights["denoiser"].items() if path.startswith("blocks."))
                // (denoiser.num_layers // mesh_spec.pipeline)
            )
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

    def _context_bytes(self) -> int:
        """A context's keys and values are cut by layers and heads."""
        return super()._context_bytes() // (self.mesh_spec.pipeline * self.mesh_spec.tensor)

    def _cache_bytes(self, cache: Cache) -> int:
        """The VAE's cache lies in tiles."""
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
        layer = sum(size for path, size in self._weights["denoiser"].items() if path.startswith("blocks."))
        layer //= config.num_layers // mesh_spec.pipeline
        gathered = layer * (mesh_spec.fsdp - 1)
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
        parts = {
            "text": mesh_spec.devices // self._text_copies(),
            "decode": mesh_spec.devices,
            "encode": mesh_spec.devices,
        }
        stages = {name: alone[name] / parts.get(name, 1) for name in self.stages if name in alone}
        stages["denoise"] = denoise
        return stages | {"step": denoise / steps, "total": sum(stages.values())}

    def _text_copies(self) -> int:
        return Placement.planned(self.mesh_spec).for_text(self.config.text_encoder).mesh_spec.data

    def predict(self, profile: Profile = PROFILES["resident"]) -> Prediction:
        return super().predict(profile)


def candidates(config: WanConfig, devices: int, guided: bool) -> Iterator[MeshSpec]:
    """Meshes of all devices, the best first: those with all weights everywhere, then those in parts.

    The prompt and the negative prompt side by side exchange nothing; Ulysses exchanges less than the ring, and the ring
    has no limit.
    """
    for axis in ("ulysses", "fsdp"):
        for cfg in (2, 1) if guided and devices % 2 == 0 else (1,):
            rest = devices // cfg
            for group in (size for size in range(rest, 0, -1) if rest % size == 0):
                mesh_spec = MeshSpec(cfg=cfg, ring=rest // group, **{axis: group})
                try:
                    mesh_spec.check(config)
                except InputError:
                    continue
                if group > 1 or axis == "ulysses":
                    yield mesh_spec
                    break  # the largest group that divides


def choose_mesh(
    config: WanConfig,
    settings: SamplingParams,
    dtype: str,
    vae_dtype: str = "float32",
    *,
    devices: int | None = None,
    memory: int | None = None,
    adapter_bytes: int = 0,
) -> tuple[MeshSpec, str]:
    """What "auto" takes, and one line that says why.

    Args:
      devices: how many there are; those of the machine if None.
      memory: bytes of each; the device's own limit if None. Where that is not known, everything is taken to fit.
    """
    devices = jax.device_count() if devices is None else devices
    memory = memory_limit(jax.local_devices()[0]) if memory is None else memory
    guided = any(scale != 1 for scale in as_pair(settings.guidance))
    tried: list[tuple[int, MeshSpec]] = []
    for mesh_spec in candidates(config, devices, guided):
        plan = MeshPlan(config, settings, dtype, vae_dtype, mesh_spec=mesh_spec, adapter_bytes=adapter_bytes)
        prediction = plan.predict()
        if memory is None or prediction.fits(memory):
            return mesh_spec, _reason(config, mesh_spec, devices, prediction, memory, tried)
        tried.append((prediction.peak_bytes, mesh_spec))
    assert memory is not None  # nothing was too large otherwise
    least, mesh_spec = min(tried, key=lambda each: each[0])
    return mesh_spec, (
        f"mesh {mesh_spec}: no mesh of {devices} devices fits into {memory / 2**30:.1f} GiB; this one needs the least, "
        f"{least / 2**30:.1f} GiB"
    )


def _reason(
    config: WanConfig,
    mesh_spec: MeshSpec,
    devices: int,
    prediction: Prediction,
    memory: int | None,
    tried: list[tuple[int, MeshSpec]],
) -> str:
    why = []
    if mesh_spec.cfg > 1:
        why.append("the prompt and the negative prompt apart")
    if mesh_spec.ulysses > 1:
        why.append(f"{config.denoiser.num_heads} heads over {mesh_spec.ulysses}")
    if mesh_spec.fsdp > 1:
        why.append(f"weights and {config.denoiser.num_heads} heads over {mesh_spec.fsdp}, since they do not fit whole")
    if mesh_spec.ring > 1:
        why.append(f"tokens around {mesh_spec.ring}")
    room = "" if memory is None else f" of {memory / 2**30:.1f}"
    needs = f"{prediction.peak_bytes / 2**30:.1f}{room} GiB a device"
    return (
        f"mesh {mesh_spec} for {devices} device{'s' * (devices > 1)}: {', '.join(why) or 'nothing to share'}; {needs}"
    )


def resolve(
    mesh: str | Mapping[str, int] | MeshSpec,
    config: WanConfig,
    settings: SamplingParams,
    dtype: str,
    vae_dtype: str,
    profile: str = "auto",
    *,
    devices: int | None = None,
    memory: int | None = None,
    adapter_bytes: int = 0,
) -> tuple[MeshSpec, str | None]:
    """The mesh that a user asks for, and why if it was chosen. Raises InputError for one that cannot be used."""
    if profile not in ("auto", "resident"):
        raise InputError(
            f"profile {profile}: on a mesh weights stay on the devices; use resident, and fsdp to cut them"
        )
    if mesh == "auto":
        return choose_mesh(
            config, settings, dtype, vae_dtype, devices=devices, memory=memory, adapter_bytes=adapter_bytes
        )
    mesh_spec = MeshSpec.parse(mesh)
    mesh_spec.check(config)
    return mesh_spec, None


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
) -> tuple[Placement, CompiledModels]:
    """Where a pipeline's arrays are, and its compiled functions, of which choosing may have compiled some.

    Args:
      mesh: what the user asks for; None for one device.
      profile: a name in PROFILES, or "auto".
      note: called with what "auto" chose.

    Raises:
      InputError: a mesh or profile that cannot be used.
    """
    mesh_spec, exact = MeshSpec(), dtype == "float32"
    if mesh is not None:
        mesh_spec, reason = resolve(mesh, config, settings, dtype, vae_dtype, profile, adapter_bytes=adapter_bytes)
        if reason is not None:
            note(reason)
    if jax.process_count() > 1 and mesh is not None:
        if mesh_spec.devices != jax.device_count():
            raise InputError(
                f"mesh {mesh_spec}: has {mesh_spec.devices} devices; with several processes it must have all "
                f"{jax.device_count()}"
            )
        if mesh_spec.experts > 1:
            raise InputError(
                f"mesh {mesh_spec}: experts need one process; start one for all devices, or leave them out"
            )
    placement = Placement.over(mesh_spec)
    programs = CompiledModels(exact, placement)
    if not placement.is_single:
        return placement, programs
    offload = PROFILES.get(profile) or choose_profile(config, settings, dtype, vae_dtype, programs, adapter_bytes)
    if profile == "auto" and offload.idle_on_host:
        note(f"memory profile {offload.name}: the device has no room for more")
    return replace(placement, offload=offload), programs


def report_mesh(
    config: WanConfig,
    settings: SamplingParams,
    dtype: str,
    mesh: str,
    device_memory: float | None = None,
    vae_dtype: str = "float32",
    profile: str = "auto",
    devices: int | None = None,
) -> Report:
    """What `wan-jax plan --mesh` prints; `device_memory` is in GiB, of each device."""
    if devices is not None and devices < 1:
        raise InputError(f"devices {devices}: give at least 1")
    memory = memory_limit(jax.local_devices()[0]) if device_memory is None else int(device_memory * 2**30)
    mesh_spec, reason = resolve(mesh, config, settings, dtype, vae_dtype, profile, devices=devices, memory=memory)
    plan = MeshPlan(config, settings, dtype, vae_dtype, mesh_spec=mesh_spec)
    return Report(plan, (plan.predict(),), memory, reason)
