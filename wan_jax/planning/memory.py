"""What a run will need on one device, before anything is loaded: memory and seconds under each memory profile.

Memory is bookkeeping over the stages of a run (text, image, encode, denoise, decode): the weights on the device in a
stage, from the abstract trees and the profile; its inputs, from their shapes; and its workspace. On an accelerator the
workspace is what XLA's analysis says of the compiled function that will run. XLA:CPU compiles other programs, which
need far more, so there a formula estimates it (`estimated_workspace`).

Seconds are floating-point operations over rates measured on the kind of device (`planning.time.RATES`).
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding

from wan_jax.config import ModelConfig, WanConfig
from wan_jax.diffusion.conditioning import TEXT_ONLY, Conditioning, FirstFrame, KnownFrames
from wan_jax.diffusion.params import WEIGHTS, SamplingParams
from wan_jax.diffusion.segments import Segment, plan_segments
from wan_jax.diffusion.solvers import get_solvers
from wan_jax.diffusion.step import Expert, compile_step
from wan_jax.errors import InputError
from wan_jax.media.codec import decode_function, encode_function
from wan_jax.models.build import abstract_model, build_model
from wan_jax.models.denoiser import CrossAttentionKV
from wan_jax.models.image_encoder import encode_image
from wan_jax.models.nn.causal_conv import CacheArrays
from wan_jax.models.nn.weights import quantize_layers
from wan_jax.models.vae import VAE
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import SINGLE
from wan_jax.parameters import ParameterInfo, abstract_parameters, dotted
from wan_jax.planning.time import RATES, decode_flops, decode_workspace, denoiser_flops, encode_flops, encode_workspace
from wan_jax.runtime.compiled import workspace_bytes
from wan_jax.runtime.devices import host_memory
from wan_jax.runtime.offload import PROFILES, Profile, abstract_array, on_host, single_device, streams
from wan_jax.text.encoder import encode_text_function

# By stage. Models that take images have them all, or all but "image".
MODELS = {"text": "text_encoder", "image": "image_encoder", "encode": "vae", "denoise": "denoiser", "decode": "vae"}

IMAGE_ENCODER_DTYPE = jnp.dtype(jnp.float32)

# What fragmentation may take of the memory that JAX may use, and everything else on the host of the host's.
RESERVE = 0.02
HOST_RESERVE = 0.1


@dataclass(frozen=True)
class Prediction:
    """What one profile needs."""

    profile: str
    device_bytes: Mapping[str, int]  # peak in each stage
    host_bytes: int  # pinned
    seconds: Mapping[str, float] = field(default_factory=dict)  # by stage, "step" and "total"; empty if not known

    @property
    def peak_bytes(self) -> int:
        return max(self.device_bytes.values())

    def fits(self, memory: int, host: int | None = None) -> bool:
        """Whether a device with so much memory has room, and a host with so much for what is pinned there."""
        return self.peak_bytes <= memory * (1 - RESERVE) and self.fits_host(host)

    def fits_host(self, host: int | None) -> bool:
        return host is None or self.host_bytes <= host * (1 - HOST_RESERVE)

    def as_json(self) -> dict[str, Any]:
        return {
            "profile": self.profile,
            "peak_bytes": self.peak_bytes,
            "device_bytes": dict(self.device_bytes),
            "host_bytes": self.host_bytes,
            "seconds": dict(self.seconds),
        }


class Plan:
    """The bookkeeping of one run of one model; nothing is allocated.

    Args:
      config: the model.
      settings: the run.
      dtype: of the text encoder and the denoisers.
      vae_dtype: of the VAE.
      device: where it would run; the default device if None.
      adapter_bytes: of an expert's LoRAs.
    """

    mesh_spec = MeshSpec()  # one device

    def __init__(
        self,
        config: WanConfig,
        settings: SamplingParams,
        dtype: str,
        vae_dtype: str = "float32",
        *,
        device: jax.Device | None = None,
        adapter_bytes: int = 0,
    ):
        self.config = config
        self.settings = settings
        self.dtype = jnp.dtype(dtype)
        self.vae_dtype = jnp.dtype(vae_dtype)
        self.device = jax.devices()[0] if device is None else device
        self.compiled = self.device.platform != "cpu"  # whether workspace comes from compiled functions
        self._workspace: dict[bool, Mapping[str, int]] = {}
        dtypes = {"text_encoder": self.dtype, "denoiser": self.dtype, "vae": self.vae_dtype}
        if config.image_encoder is not None:
            dtypes["image_encoder"] = IMAGE_ENCODER_DTYPE
        shapes = {name: _shapes(config.model(name), dtype) for name, dtype in dtypes.items()}
        stored = self._bytes_of("denoiser", shapes["denoiser"][1])
        shapes["denoiser"] = _shapes(config.denoiser, self.dtype, settings.weights)
        self._models = {name: model for name, (model, _) in shapes.items()}
        self._weights = {name: self._bytes_of(name, tree) for name, (_, tree) in shapes.items()}
        # Of kernels that have a copy in another format: they wait beside it.
        self._copied_bytes = sum(size for path, size in stored.items() if path not in self._weights["denoiser"])
        self._weights["denoiser"]["adapters"] = adapter_bytes

    def _bytes_of(self, name: str, tree: Mapping[str, ParameterInfo]) -> dict[str, int]:
        """Bytes of each parameter of a model on a device."""
        del name  # all of any model
        return {path: info.dtype.itemsize * math.prod(info.shape) for path, info in tree.items()}

    @property
    def stages(self) -> tuple[str, ...]:
        """Of a run, in order; images are encoded by the models that take them."""
        return tuple(
            stage
            for stage, model in MODELS.items()
            if model in self._models and (stage != "encode" or self._encoded_frames)
        )

    @property
    def _encoded_frames(self) -> int:
        """Frames that the VAE encodes."""
        return {"text": 0, "image_latents": self.settings.frames, "first_frame": 1}[self.config.conditioning]

    def predict(self, profile: Profile) -> Prediction:
        """What the run needs under a profile."""
        workspace = self.workspace(profile)
        device_bytes = {stage: size + workspace[stage] for stage, size in self.without_workspace(profile).items()}
        host_bytes = self.weight_bytes() if profile.idle_on_host else 0
        return Prediction(profile.name, device_bytes, host_bytes, self._seconds(profile))

    def without_workspace(self, profile: Profile) -> dict[str, int]:
        """Device bytes of weights and inputs in each stage."""
        inputs = self.input_bytes
        if not profile.idle_on_host:
            return {stage: self.weight_bytes() + inputs[stage] for stage in self.stages}
        return {
            stage: inputs[stage]
            + sum(
                size for path, size in self._weights[MODELS[stage]].items() if not profile.on_host(path, running=True)
            )
            for stage in self.stages
        }

    def weight_bytes(self) -> int:
        """Of all models together."""
        counts = {"denoiser": len(self.config.experts)}
        weights = sum(counts.get(name, 1) * sum(sizes.values()) for name, sizes in self._weights.items())
        return weights + counts["denoiser"] * self._copied_bytes

    @property
    def float32_bytes(self) -> int:
        """Of all models together with 4 bytes a parameter, the most that releases take."""
        counts = {"denoiser": len(self.config.experts)}
        return sum(
            counts.get(name, 1) * 4 * sum(math.prod(info.shape) for info in abstract_model(config).values())
            for name, config in ((name, self.config.model(name)) for name in self._models)
        )

    def workspace(self, profile: Profile) -> Mapping[str, int]:
        """Bytes that each stage takes beside weights and inputs."""
        if not self.compiles(profile):
            return self.estimated_workspace(profile)
        if profile.layers_on_host not in self._workspace:  # resident and swap run the same programs
            self._workspace[profile.layers_on_host] = self._compiled_workspace(profile)
        return self._workspace[profile.layers_on_host]

    def compiles(self, profile: Profile) -> bool:
        """Whether workspace comes from compiled functions. JAX 0.10 has no shapes for arrays in host memory."""
        return self.compiled and (not profile.layers_on_host or self._has_shapes_on_host)

    @functools.cached_property
    def _has_shapes_on_host(self) -> bool:
        return on_host(abstract_array((), jnp.float32, single_device(self.device, on_host=True)))

    def estimated_workspace(self, profile: Profile) -> dict[str, int]:
        """The workspace by formula: the largest set of arrays alive at one time.

        Denoise: at the feed-forward layer, the float32 residual stream, its normalised copy and both sides of GELU for
        every token; that layer's weights, which the loop slices out; one context, because guidance selects it. A
        streamed layer comes on top.
        Text: the same of 512 tokens, and the scores of all heads in float32, three times.
        Image: the residual stream, both sides of GELU, the scores of all heads.
        Encode, decode: see time.py.
        """
        denoiser, encoder, vae = self.config.denoiser, self.config.text_encoder, self.config.vae
        item = self.dtype.itemsize
        tokens = self.tokens
        layer = sum(size for path, size in self._weights["denoiser"].items() if streams(path)) // denoiser.num_layers
        denoise = tokens * (4 * denoiser.dim + item * (denoiser.dim + 2 * denoiser.ffn_dim))
        denoise += item * 2 * denoiser.dim * denoiser.ffn_dim + self._context_bytes()
        denoise += layer if profile.layers_on_host else 0
        length = denoiser.text_length
        encoder_layer = sum(size for path, size in self._weights["text_encoder"].items() if streams(path))
        text = 3 * 4 * encoder.num_heads * length**2 + length * item * (encoder.dim + 3 * encoder.ffn_dim)
        text += encoder_layer // encoder.num_layers * (2 if profile.layers_on_host else 1)
        decode = decode_workspace(vae, self.vae_dtype, *self.settings.size)
        sizes = {"text": text, "denoise": denoise, "decode": decode}
        if self._encoded_frames:
            sizes["encode"] = encode_workspace(vae, self.vae_dtype, *self.settings.size, self._encoded_frames)
        if (clip := self.config.image_encoder) is not None:
            width = 2 * clip.dim + 2 * clip.ffn_dim + 2 * clip.num_heads * clip.num_tokens
            sizes["image"] = IMAGE_ENCODER_DTYPE.itemsize * self._image_tokens() * width
        return sizes

    def _compiled_workspace(self, profile: Profile) -> dict[str, int]:
        models = {
            name: _placed(model, lambda path: single_device(self.device, profile.on_host(path, running=True)))
            for name, model in self._models.items()
        }
        text_encoder, denoiser, vae = models["text_encoder"], models["denoiser"], models["vae"]
        here = single_device(self.device, on_host=False)
        tokens = jax.ShapeDtypeStruct((1, self.config.denoiser.text_length), jnp.int32)
        text = encode_text_function(SINGLE).workspace_bytes(text_encoder, tokens, tokens)

        context = self._context(here)
        denoise, attention = 0, self.settings.attention_options
        for segment in self._segments:
            expert = Expert(denoiser.with_attention(attention), context, context if segment.is_guided else None)
            state = jax.eval_shape(segment.solver.init, self._latents())
            step = compile_step(expert, segment, state, self._conditioning())
            denoise = max(denoise, workspace_bytes(step))

        exact = self.dtype == jnp.float32
        decode_frames, encode_frames = decode_function(exact, SINGLE), encode_function(exact, SINGLE)
        frame = self._latent_frame(here)
        cache = _on(here, jax.eval_shape(_decode_cache, vae, frame))
        # The first call's result, the cache, is an input of those after it.
        decode = decode_frames.workspace_bytes(vae, None, frame) - _nbytes(cache)
        if self.settings.frames > 1:
            decode = max(decode, decode_frames.workspace_bytes(vae, cache, frame))
        sizes = {"text": text, "denoise": denoise, "decode": decode}
        if self._encoded_frames:
            first, following = self._frames(1, here), self._frames(self.config.vae.temporal_stride, here)
            cache = _on(here, jax.eval_shape(_encode_cache, vae, first))
            sizes["encode"] = encode_frames.workspace_bytes(vae, None, first) - _nbytes(cache)
            if self._encoded_frames > 1:
                following_bytes = encode_frames.workspace_bytes(vae, cache, following)
                sizes["encode"] = max(sizes["encode"], following_bytes)
        if (clip := self.config.image_encoder) is not None:
            shape = (self._image_tokens() // clip.num_tokens, clip.image_size, clip.image_size, 3)
            images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)
            sizes["image"] = encode_image.workspace_bytes(models["image_encoder"], images)
        return sizes

    @functools.cached_property
    def input_bytes(self) -> dict[str, int]:
        """Bytes of what each stage works on: encoded text; contexts and solver state; latents and the VAE's cache."""
        latents = self._latents()
        state = max(_nbytes(jax.eval_shape(segment.solver.init, latents)) for segment in self._segments)
        text = 2 * self.config.denoiser.text_length * self.config.denoiser.text_dim * self.dtype.itemsize
        contexts = self._context_bytes() * (2 if any(segment.is_guided for segment in self._segments) else 1)
        vae, frame = self._models["vae"], self._frames(self.config.vae.temporal_stride, None)
        cache = jax.eval_shape(_decode_cache, vae, self._latent_frame(None))
        sizes = {
            "text": text,
            "denoise": text + contexts + _nbytes(latents) + state + _nbytes(self._conditioning()),
            "decode": text + _nbytes(latents) + self._cache_bytes(cache),
        }
        if self._encoded_frames:
            cache = jax.eval_shape(_encode_cache, vae, self._frames(1, None))
            sizes["encode"] = text + _nbytes(latents) + self._cache_bytes(cache) + _nbytes(frame)
        if (clip := self.config.image_encoder) is not None:
            sizes["image"] = text + IMAGE_ENCODER_DTYPE.itemsize * self._image_tokens() * clip.dim
        return sizes

    def _seconds(self, profile: Profile) -> dict[str, float]:
        """Seconds by stage; nothing for a kind of device that was never measured."""
        rates = RATES.get(self.device.device_kind)
        if rates is None:
            return {}
        settings = self.settings
        encoder, pixels = self.config.text_encoder, math.prod(settings.size) * settings.frames
        bytes_of = {name: sum(sizes.values()) for name, sizes in self._weights.items()}
        forward = denoiser_flops(self.config.denoiser, self.tokens) / rates.denoiser
        if profile.layers_on_host:
            streamed = sum(size for path, size in self._weights["denoiser"].items() if streams(path))
            copies = streamed / rates.copy
            # Half of them hides behind the layer before; measured (benchmarks/NOTES.md).
            forward = max(forward + copies / 2, copies)
        forwards = sum(len(segment.steps) * (2 if segment.is_guided else 1) for segment in self._segments)
        weights_per_layer = 2 * encoder.dim * (4 * encoder.num_heads * encoder.head_dim + 3 * encoder.ffn_dim)
        text = 2 * self.config.denoiser.text_length * encoder.num_layers * weights_per_layer / rates.text
        vae = self.config.vae
        vae_rate = rates.vae_bfloat16 if self.vae_dtype == jnp.bfloat16 else rates.vae
        seconds = {"text": text, "denoise": forwards * forward, "decode": decode_flops(vae, pixels) / vae_rate}
        if self._encoded_frames:
            seconds["encode"] = encode_flops(vae, math.prod(settings.size) * self._encoded_frames) / vae_rate
        if profile.idle_on_host:
            seconds["text"] += bytes_of["text_encoder"] / rates.copy
            for stage in {"encode", "decode"} & seconds.keys():
                seconds[stage] += bytes_of["vae"] / rates.copy
        if profile.idle_on_host and not profile.layers_on_host:
            seconds["denoise"] += len(self._segments) * bytes_of["denoiser"] / rates.copy
        return seconds | {"step": forward * forwards / self._segments[0].total, "total": sum(seconds.values())}

    @functools.cached_property
    def _segments(self) -> list[Segment]:
        settings = self.settings
        solvers = get_solvers(settings.solver)
        return plan_segments(settings.make_schedule(), solvers, settings.guidance, settings.boundary)

    @property
    def tokens(self) -> int:
        """Of the latents of one video."""
        _, *sizes = self.settings.latents_shape(self.config)
        return math.prod(size // step for size, step in zip(sizes, self.config.denoiser.patch_size, strict=True))

    def _latents(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *self.settings.latents_shape(self.config)), jnp.float32)

    def _latent_frame(self, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
        channels, _, height, width = self.settings.latents_shape(self.config)
        return jax.ShapeDtypeStruct((1, channels, 1, height, width), jnp.float32, sharding=sharding)

    def _frames(self, count: int, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
        """Of a video, as they are encoded."""
        width, height = self.settings.size
        return jax.ShapeDtypeStruct((count, height, width, 3), jnp.float32, sharding=sharding)

    def _conditioning(self) -> Conditioning:
        """What the denoise loop is given of the images."""
        if self.config.conditioning == "text":
            return TEXT_ONLY
        if self.config.conditioning == "first_frame":
            frame: Any = self._latent_frame(None)
            known: Any = jax.ShapeDtypeStruct((1,), jnp.bool)
            return FirstFrame(frame, known)
        channels, *sizes = self.settings.latents_shape(self.config)
        stride = self.config.vae.temporal_stride
        array: Any = jax.ShapeDtypeStruct((1, stride + channels, *sizes), jnp.float32)
        return KnownFrames(array)

    def _image_tokens(self) -> int:
        """Rows of image features that the denoiser attends to."""
        assert self.config.image_encoder is not None
        return self.config.denoiser.image_position_length or self.config.image_encoder.num_tokens

    def _context(self, sharding: Sharding | None) -> CrossAttentionKV:
        config = self.config.denoiser

        def array(tokens: int) -> Any:
            shape = (config.num_layers, 1, tokens, config.num_heads, config.head_dim)
            return jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)

        text, image = array(config.text_length), None
        if self.config.image_encoder is not None:
            image = array(self._image_tokens())
        return CrossAttentionKV(text, text, image, image)

    def _cache_bytes(self, cache: CacheArrays) -> int:
        return _nbytes(cache)

    def _context_bytes(self) -> int:
        return _nbytes(self._context(None))


def choose_profile(
    config: WanConfig,
    settings: SamplingParams,
    dtype: str,
    vae_dtype: str = "float32",
    adapter_bytes: int = 0,
    memory: int | None = None,
    host: int | None = None,
) -> Profile:
    """The fastest profile that the default device and its host have room for, and "stream" where the device has none.

    `memory` and `host` take the place of the bytes that device and host say they have. Where the device does not say
    (CPUs), everything stays resident.

    Raises:
        InputError: the host has no room for the weights that the device has no room for.
    """
    memory = memory_limit(jax.devices()[0]) if memory is None else memory
    host = host_memory() if host is None else host
    plan = Plan(config, settings, dtype, vae_dtype, adapter_bytes=adapter_bytes)
    if memory is None and (host is None or plan.weight_bytes() <= host):
        return PROFILES["resident"]
    for profile in PROFILES.values():
        # Compiling takes long: not for a profile whose weights alone are too large.
        if (
            memory is not None
            and max(plan.without_workspace(profile).values()) < memory
            and plan.predict(profile).fits(memory, host)
        ):
            return profile
    if host is None or plan.weight_bytes() <= host:
        return PROFILES["stream"]
    kind, room = plan.device.device_kind, "" if memory is None else f" ({memory / 2**30:.1f} GiB)"
    raise InputError(
        f"{config.name}: neither {kind}{room} nor this host ({host / 2**30:.1f} GiB) has room for its weights, "
        f"{plan.weight_bytes() / 2**30:.1f} GiB; take a smaller model, or split them over devices with --mesh auto; "
        "wan-jax plan says what each needs; --profile resident tries all the same"
    )


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that JAX may use on the device; None where the backend does not say."""
    return (device.memory_stats() or {}).get("bytes_limit")


@functools.cache
def _shapes(
    config: ModelConfig, dtype: jnp.dtype, weights: str = "as_stored"
) -> tuple[Any, Mapping[str, ParameterInfo]]:
    """A model with jax.ShapeDtypeStruct for arrays, and its abstract tree."""

    def build() -> nnx.Module:
        return quantize_layers(build_model(config, dtype), WEIGHTS[weights])

    return nnx.eval_shape(build), abstract_parameters(build)


def _placed(model: Any, sharding: Callable[[str], Sharding]) -> Any:
    """The same with a sharding for each array."""
    graphdef, state = nnx.split(model)
    leaves = [
        (path, variable.replace(abstract_array(variable.shape, variable.dtype, sharding(dotted(path)))))
        for path, variable in state.flat_state()
    ]
    return nnx.merge(graphdef, nnx.State.from_flat_path(leaves))


def _on(sharding: Sharding, tree: Any) -> Any:
    """Shapes with a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _decode_cache(vae: VAE, frame: jax.Array) -> CacheArrays:
    return vae.decode_step(None, frame)[1]


def _encode_cache(vae: VAE, frames: jax.Array) -> CacheArrays:
    return vae.encode_step(None, frames[None])[1]


def _nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
