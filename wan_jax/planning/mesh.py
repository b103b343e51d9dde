"""What a run needs on a mesh: memory of each device, seconds, and the strategy that "auto" takes.

Memory is `plan.Plan`'s bookkeeping with every array in the parts that the strategy cuts it into; scratch is always the
formula's. Seconds are those of one device over the devices that share the work, and what communication cannot hide:

- Ulysses, tensor: all that is exchanged, at `LINK`; nothing of it hides.
- ring, fsdp: what is sent, where that takes longer than the work beside it.
- pipeline: stages that wait while the pipe fills, with the prompt and the negative prompt in it.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import jax

from wan_jax.checkpoint.layouts import abstract_model
from wan_jax.config import WanConfig
from wan_jax.diffusion.experts import as_pair
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.models.compiled import CompiledModels
from wan_jax.models.nn.causal_conv import Cache
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.planning.memory import Plan, Prediction, Report, memory_limit
from wan_jax.planning.time import RATES, decode_scratch, denoiser_flops, encode_scratch
from wan_jax.runtime.offload import PROFILES, Profile

# Bytes per second that a device sends to its neighbours, assumed: NVLink 4 has 450e9 at best.
LINK = 300e9

Mesh = str | Mapping[str, int] | MeshSpec | None  # what a user may say; "auto" chooses


class MeshPlan(Plan):
    """The bookkeeping of one device of a mesh. Arguments beside `strategy` are those of `Plan`."""

    def __init__(
        self,
        config: WanConfig,
        settings: SamplingParams,
        dtype: str,
        vae_dtype: str = "float32",
        *,
        strategy: MeshSpec,
        device: jax.Device | None = None,
        adapter_bytes: int = 0,
    ):
        programs = CompiledModels(exact=dtype == "float32")
        super().__init__(
            config, settings, dtype, vae_dtype, device=device, programs=programs, adapter_bytes=adapter_bytes
        )
        self.compiled = False
        self.strategy = strategy
        spread = Placement.planned(strategy)
        for name, model, parts in (
            ("denoiser", config.denoiser, spread),
            ("text_encoder", config.text_encoder, spread.for_text(config.text_encoder)),
        ):
            tree = abstract_model(model)
            places = parts.shardings(tree)
            itemsize = {
                path: size // math.prod(tree[path].shape) for path, size in self._weights[name].items() if path in tree
            }
            self._weights[name] |= {
                path: itemsize[path] * math.prod(places[path].shard_shape(info.shape)) for path, info in tree.items()
            }
        self.token_parts = strategy.ring * strategy.fsdp * strategy.ulysses

    def _all_weights(self) -> int:
        """Of two experts a device may have one."""
        whole = super()._all_weights()
        return whole if self.strategy.experts == 1 else whole - sum(self._weights["denoiser"].values())

    def estimated_scratch(self, profile: Profile) -> dict[str, int]:
        """The formula of one device, with a part of the tokens, heads, features and pixels.

        Two layers whose parts were gathered come on top (fsdp), and the inputs and outputs of all videos in a pipeline.
        """
        strategy, denoiser, item = self.strategy, self.config.denoiser, self.dtype.itemsize
        sizes = super().estimated_scratch(profile)
        tokens, features = -(-self._tokens() // self.token_parts), denoiser.ffn_dim // strategy.tensor
        denoise = tokens * (4 * denoiser.dim + item * (denoiser.dim + 2 * features))
        denoise += item * 2 * denoiser.dim * features + self._context_bytes()
        if strategy.ring > 1:  # float32 partial results of two turns, and keys and values that arrive
            denoise += tokens * denoiser.dim * (8 + 2 * item) // (strategy.ulysses * strategy.fsdp * strategy.tensor)
        if strategy.fsdp > 1:
            denoise += (
                2
                * strategy.fsdp
                * sum(size for path, size in self._weights["denoiser"].items() if path.startswith("blocks."))
                // (denoiser.num_layers // strategy.pipeline)
            )
        if strategy.pipeline > 1:
            denoise += 2 * 2 * tokens * denoiser.dim * 4
        sizes["denoise"] = denoise
        width, height = self.settings.size
        tile = width, -(-height // strategy.devices)
        # As many latent frames are decoded at once as there are tiles; at full resolution see models/vae.py, Decoder.
        frames = 4 // self.vae_dtype.itemsize if strategy.devices > 1 else 1
        sizes["decode"] = decode_scratch(self.config.vae, self.vae_dtype, width, height, frames)
        if "encode" in sizes:
            sizes["encode"] = encode_scratch(self.config.vae, self.vae_dtype, *tile, self._encoded_frames)
        return sizes

    def _context_bytes(self) -> int:
        """A context's keys and values are cut by layers and heads."""
        return super()._context_bytes() // (self.strategy.pipeline * self.strategy.tensor)

    def _cache_bytes(self, cache: Cache) -> int:
        """The VAE's cache lies in tiles."""
        return super()._cache_bytes(cache) // self.strategy.devices

    def _seconds(self, profile: Profile) -> dict[str, float]:
        """Of one video. See the module's docstring for what is assumed."""
        alone = super()._seconds(profile)
        if not alone:
            return {}
        rates, strategy, config = RATES[self.device.device_kind], self.strategy, self.config.denoiser
        forward = denoiser_flops(config, self._tokens()) / rates.denoiser
        forwards = alone["denoise"] / forward
        steps = alone["denoise"] / alone["step"]
        shared = self.token_parts * strategy.tensor
        item, tokens = self.dtype.itemsize, self._tokens() / self.token_parts
        exchanged, group = 0.0, strategy.fsdp * strategy.ulysses
        exchanged += 4 * tokens * config.dim / strategy.tensor * (group - 1) / group  # queries, keys, values, results
        exchanged += 3 * tokens * config.dim * 2 * (strategy.tensor - 1) / strategy.tensor  # three sums a layer
        around = 2 * tokens * config.dim / strategy.tensor * (strategy.ring - 1)
        layer = sum(size for path, size in self._weights["denoiser"].items() if path.startswith("blocks."))
        layer //= config.num_layers // strategy.pipeline
        gathered = layer * (strategy.fsdp - 1)
        work = forward / shared / config.num_layers
        attention = work / 2
        per_layer = work + exchanged * item / LINK
        per_layer += max(0.0, around * item / LINK - attention) + max(0.0, gathered / LINK - work)
        one = per_layer * config.num_layers
        in_flight = 2 if forwards > steps else 1
        if strategy.pipeline > 1:
            one *= (in_flight + strategy.pipeline - 1) / (in_flight * strategy.pipeline)
        guided = forwards - steps  # steps with two forwards
        denoise = one * (steps + (0 if strategy.cfg > 1 else guided))
        parts = {
            "text": strategy.devices // self._text_copies(),
            "decode": strategy.devices,
            "encode": strategy.devices,
        }
        stages = {name: alone[name] / parts.get(name, 1) for name in self.stages if name in alone}
        stages["denoise"] = denoise
        return stages | {"step": denoise / steps, "total": sum(stages.values())}

    def _text_copies(self) -> int:
        return Placement.planned(self.strategy).for_text(self.config.text_encoder).strategy.data

    def predict(self, profile: Profile = PROFILES["resident"]) -> Prediction:
        return super().predict(profile)


def candidates(config: WanConfig, devices: int, guided: bool) -> Iterator[MeshSpec]:
    """Strategies that use all devices, the best first: those with all weights everywhere, then those in parts.

    The prompt and the negative prompt side by side exchange nothing; Ulysses exchanges less than the ring, and the ring
    has no limit.
    """
    for axis in ("ulysses", "fsdp"):
        for cfg in (2, 1) if guided and devices % 2 == 0 else (1,):
            rest = devices // cfg
            for group in (size for size in range(rest, 0, -1) if rest % size == 0):
                strategy = MeshSpec(cfg=cfg, ring=rest // group, **{axis: group})
                try:
                    strategy.check(config)
                except InputError:
                    continue
                if group > 1 or axis == "ulysses":
                    yield strategy
                    break  # the largest group that divides


def choose_strategy(
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
    for strategy in candidates(config, devices, guided):
        plan = MeshPlan(config, settings, dtype, vae_dtype, strategy=strategy, adapter_bytes=adapter_bytes)
        prediction = plan.predict()
        if memory is None or prediction.fits(memory):
            return strategy, _reason(config, strategy, devices, prediction, memory, tried)
        tried.append((prediction.peak_bytes, strategy))
    assert memory is not None  # nothing was too large otherwise
    least, strategy = min(tried, key=lambda each: each[0])
    return strategy, (
        f"mesh {strategy}: no mesh of {devices} devices fits into {memory / 2**30:.1f} GiB; this one needs the least, "
        f"{least / 2**30:.1f} GiB"
    )


def _reason(
    config: WanConfig,
    strategy: MeshSpec,
    devices: int,
    prediction: Prediction,
    memory: int | None,
    tried: list[tuple[int, MeshSpec]],
) -> str:
    why = []
    if strategy.cfg > 1:
        why.append("the prompt and the negative prompt apart")
    if strategy.ulysses > 1:
        why.append(f"{config.denoiser.num_heads} heads over {strategy.ulysses}")
    if strategy.fsdp > 1:
        why.append(f"weights and {config.denoiser.num_heads} heads over {strategy.fsdp}, since they do not fit whole")
    if strategy.ring > 1:
        why.append(f"tokens around {strategy.ring}")
    room = "" if memory is None else f" of {memory / 2**30:.1f}"
    needs = f"{prediction.peak_bytes / 2**30:.1f}{room} GiB a device"
    return f"mesh {strategy} for {devices} device{'s' * (devices > 1)}: {', '.join(why) or 'nothing to share'}; {needs}"


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
    """The strategy that a user asks for, and why if it was chosen. Raises InputError for one that cannot be used."""
    if profile not in ("auto", "resident"):
        raise InputError(
            f"profile {profile}: on a mesh weights stay on the devices; use resident, and fsdp to cut them"
        )
    if mesh == "auto":
        return choose_strategy(
            config, settings, dtype, vae_dtype, devices=devices, memory=memory, adapter_bytes=adapter_bytes
        )
    strategy = MeshSpec.parse(mesh)
    strategy.check(config)
    return strategy, None


def spread_over(
    mesh: Mesh,
    config: WanConfig,
    settings: SamplingParams,
    dtype: str,
    vae_dtype: str,
    profile: str,
    adapter_bytes: int,
    note: Callable[[str], None],
) -> Placement | None:
    """The devices of a pipeline; None for one alone. `note` is told what "auto" chose."""
    if mesh is None:
        return None
    strategy, reason = resolve(mesh, config, settings, dtype, vae_dtype, profile, adapter_bytes=adapter_bytes)
    if reason is not None:
        note(reason)
    if jax.process_count() > 1 and strategy.devices != jax.device_count():
        raise InputError(
            f"mesh {strategy}: has {strategy.devices} devices; with several processes it must have all "
            f"{jax.device_count()}"
        )
    if jax.process_count() > 1 and strategy.experts > 1:
        raise InputError(f"mesh {strategy}: experts need one process; start one for all devices, or leave them out")
    return Placement.over(strategy) if strategy.devices > 1 else None


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
    strategy, reason = resolve(mesh, config, settings, dtype, vae_dtype, profile, devices=devices, memory=memory)
    plan = MeshPlan(config, settings, dtype, vae_dtype, strategy=strategy)
    return Report(plan, (plan.predict(),), memory, reason)
