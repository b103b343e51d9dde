"""The loss of a denoiser: flow matching, each expert on its own range of noise levels.

    x_sigma = (1 - sigma) x_0 + sigma noise,    loss = mean |v(x_sigma, 1000 sigma, text) - (noise - x_0)|^2

(Lipman et al., Flow Matching, arXiv 2210.02747; Liu et al., Rectified Flow, arXiv 2209.03003). Sigmas are drawn as
sampling spreads its steps: evenly, or with a logit-normal density (Esser et al., arXiv 2403.03206), then shifted with
the model's own shift. What falls to an expert is that distribution within its range.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.scipy.special import log_ndtr
from jax.typing import DTypeLike

from wan_jax.config import DenoiserConfig, WanConfig
from wan_jax.diffusion.schedule import TRAIN_TIMESTEPS, shift_sigmas
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.placement import REPLICATED, SINGLE, Placement
from wan_jax.parallel.sharding import gather_outside_layers, state_specs
from wan_jax.parameters import with_parameters
from wan_jax.planning.time import denoiser_flops
from wan_jax.training.adapters import with_adapters
from wan_jax.training.config import NoiseConfig


def sigma_range(config: WanConfig, expert: str) -> tuple[float, float]:
    """The noise levels of an expert: timesteps from 1000 boundary up are the high-noise expert's."""
    boundary = config.sampling.boundary
    if boundary is None:
        return 0.0, 1.0
    return (boundary, 1.0) if expert == "high_noise" else (0.0, boundary)


def draw_sigmas(keys: jax.Array, noise: NoiseConfig, shift: float, bounds: tuple[float, float]) -> jax.Array:
    """Noise levels [b] within `bounds`, one for each key, distributed as `noise` says."""
    low, high = (shift_sigmas(bound, 1 / shift) for bound in bounds)  # the inverse of a shift is the inverse shift
    if noise.distribution == "uniform":
        base = jax.vmap(partial(jax.random.uniform, minval=low, maxval=high))(keys)
    else:
        lower, upper = ((_logit(bound) - noise.logit_mean) / noise.logit_std for bound in (low, high))
        normal = truncated_normal(jax.vmap(jax.random.uniform)(keys), lower, upper)
        base = jax.nn.sigmoid(noise.logit_mean + noise.logit_std * normal)
    return jnp.clip(shift_sigmas(base, shift), *bounds)


def truncated_normal(shares: jax.Array, lower: float, upper: float) -> jax.Array:
    """Quantiles of the normal distribution within bounds, in float32 also where these are far out in a tail.

    The logarithm of the distribution function is inverted by bisection: the function itself, by which
    `jax.random.truncated_normal` draws, is 0 or 1 there, and all draws are one.
    """
    if lower + upper > 0:  # only the lower tail is resolved
        return -truncated_normal(1 - shares, -upper, -lower)
    low, high = max(lower, min(upper, 0.0) - 15), min(upper, 15.0)
    log_low, log_high = log_ndtr(jnp.float32(low)), log_ndtr(jnp.float32(high))
    wanted = log_high + jnp.log(shares + (1 - shares) * jnp.exp(log_low - log_high))

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = (ends[0] + ends[1]) / 2
        below = log_ndtr(middle) < wanted
        return jnp.where(below, middle, ends[0]), jnp.where(below, ends[1], middle)

    return lax.fori_loop(0, 32, halve, (jnp.full_like(shares, low), jnp.full_like(shares, high)))[0]


def high_noise_share(config: WanConfig, noise: NoiseConfig) -> float:
    """The share of all examples that should fall to the high-noise expert."""
    if noise.high_noise_share is not None:
        return noise.high_noise_share
    base = shift_sigmas(config.sampling.boundary, 1 / model_shift(config, noise))
    if noise.distribution == "uniform":
        return 1 - base
    return 0.5 * math.erfc((_logit(base) - noise.logit_mean) / noise.logit_std / math.sqrt(2))


def model_shift(config: WanConfig, noise: NoiseConfig) -> float:
    return config.sampling.shift if noise.shift is None else noise.shift


@dataclass(frozen=True)
class DenoiserLoss:
    """The loss of one or both experts, for `Trainer`.

    Parameters are {expert: {name: array}}: all of an expert's, or those of its adapters. `frozen` is {"empty_text":
    [text_length, text_dim]}, and with adapters {"experts": {expert: {name: array}}} beside it. Batches are {"latents":
    float32 [b, C, F, h, w], "text": [b, text_length, text_dim]}. Where both experts train, the first examples of a
    batch are the high-noise expert's, however it is cut into microbatches: these have "row" [b] too, the places of
    their examples in the whole batch.

    Attributes:
      experts: those that train.
      dtype: of products; parameters are rounded to it first, as sampling has them.
      remat: see `layers.scan_layers`.
      lora_scale: alpha / rank; None: the experts themselves are trained.
      placement: where parameters and batches are.
      batch_size: of the whole batch; None: there are no microbatches.
    """

    config: WanConfig
    experts: tuple[str, ...]
    noise: NoiseConfig
    dtype: DTypeLike
    remat: str | None = None
    lora_scale: float | None = None
    placement: Placement = SINGLE
    batch_size: int | None = None

    def __call__(
        self, parameters: Any, frozen: Any, batch: Mapping[str, jax.Array], keys: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        size = len(keys)
        total = self.batch_size or size
        microbatches = total // size
        metrics: dict[str, jax.Array] = {}
        value = jnp.float32(0)
        for expert, (count, weight) in self.counts(total).items():
            # Where counts do not divide, both experts see one row of the microbatch, which counts for its own.
            most = -(-count // microbatches)
            is_high = expert == self.experts[0]
            rows = slice(0, most) if is_high else slice(size - most, size)
            denoiser = self.denoiser(expert, parameters, frozen)
            examples = {name: batch[name][rows] for name in ("latents", "text")}
            errors = self._placed_errors(denoiser, expert, examples, frozen["empty_text"], keys[rows])
            if most * microbatches > count:
                places = batch["row"][rows]
                errors = errors * (places < count if is_high else places >= total - count)
            metrics[f"loss_{expert}"] = errors.sum() * microbatches / count
            value += weight * metrics[f"loss_{expert}"]
        return value, metrics if len(metrics) > 1 else {}

    def counts(self, size: int) -> dict[str, tuple[int, float]]:
        """How many examples of a batch each expert gets, and its weight in the loss; of one example both get it."""
        if len(self.experts) == 1:
            return {self.experts[0]: (size, 1.0)}
        share = high_noise_share(self.config, self.noise)
        if size == 1:
            return {"high_noise": (1, share), "low_noise": (1, 1 - share)}
        high = min(max(round(size * share), 1), size - 1)
        return {"high_noise": (high, high / size), "low_noise": (size - high, 1 - high / size)}

    def denoiser(self, expert: str, parameters: Any, frozen: Any) -> Denoiser:
        """The expert as it is now; gradients with respect to `parameters` go through."""

        # Gathered weights are never kept for the backward pass.
        remat = self.remat or ("weights" if self.placement.mesh_spec.fsdp > 1 else None)

        def build() -> Denoiser:
            return Denoiser(self.config.denoiser, dtype=self.dtype, remat=remat, rngs=nnx.Rngs(0))

        arrays = parameters[expert] if self.lora_scale is None else frozen["experts"][expert]
        arrays = {name: array.astype(self.dtype) for name, array in arrays.items()}
        denoiser = with_parameters(build, arrays)
        if self.lora_scale is None:
            return denoiser
        return with_adapters(denoiser, parameters[expert], self.lora_scale)

    def _placed_errors(
        self, denoiser: Denoiser, expert: str, batch: Mapping[str, jax.Array], empty_text: jax.Array, keys: jax.Array
    ) -> jax.Array:
        """`errors`, computed on all devices; an expert's examples need not divide over "data"."""
        graphdef, state = nnx.split(denoiser)

        def errors(state: nnx.State, batch: Any, empty_text: jax.Array, keys: jax.Array) -> jax.Array:
            return self.errors(nnx.merge(graphdef, gather_outside_layers(state)), expert, batch, empty_text, keys)

        count = len(keys)
        if missing := -count % self.placement.mesh_spec.data:  # devices without an example of their own repeat one
            rows = np.arange(count + missing) % count
            batch, keys = jax.tree.map(lambda array: array[rows], (batch, keys))
        rows_spec = self.placement.batch
        run = self.placement.run(errors, (state_specs(state), rows_spec, REPLICATED, rows_spec), rows_spec)
        return run(state, batch, empty_text, keys)[:count]

    def errors(
        self,
        denoiser: Denoiser,
        expert: str,
        batch: Mapping[str, jax.Array],
        empty_text: jax.Array,
        keys: jax.Array,
    ) -> jax.Array:
        """The squared error of each example, [b], averaged over its latents."""
        sigma_keys, noise_keys, drop_keys = jax.vmap(partial(jax.random.split, num=3), out_axes=1)(keys)
        shift = model_shift(self.config, self.noise)
        sigmas = draw_sigmas(sigma_keys, self.noise, shift, sigma_range(self.config, expert))
        dropped = jax.vmap(partial(jax.random.bernoulli, p=self.noise.caption_dropout))(drop_keys)
        text = jnp.where(dropped[:, None, None], empty_text, batch["text"]).astype(self.dtype)
        return flow_matching_errors(denoiser, batch["latents"], text, sigmas, noise_keys)


def flow_matching_errors(
    denoiser: Denoiser, latents: jax.Array, text: jax.Array, sigmas: jax.Array, keys: jax.Array
) -> jax.Array:
    """Returns the squared error of each example, [b], averaged over its latents.

    Args:
      denoiser: predicts the velocity.
      latents: float32 [b, C, F, h, w].
      text: [b, text_length, text_dim].
      sigmas: noise levels [b].
      keys: of the noise, [b].
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
    levels = sigmas[:, None, None, None, None]
    noisy = (1 - levels) * latents + levels * noise
    velocity = denoiser(noisy, TRAIN_TIMESTEPS * sigmas, denoiser.encode_context(text))
    return jnp.mean((velocity - (noise - latents)) ** 2, axis=(1, 2, 3, 4))


def training_flops(config: DenoiserConfig, tokens: int, *, weights: bool) -> float:
    """Floating-point operations that training one example needs; what is computed again does not count.

    Forward, and backward with respect to activations: once more the projections, and twice attention's products (four
    for its two). With `weights`, the gradients of the weights too: once more the projections.
    """
    forward = denoiser_flops(config, tokens)
    attention = 4.0 * config.num_layers * tokens * (tokens + config.text_length) * config.dim
    return (3 if weights else 2) * (forward - attention) + 3 * attention


def _logit(x: float) -> float:
    if not 0 < x < 1:  # the ends, but for a rounding
        return math.copysign(math.inf, x - 0.5)
    return math.log(x / (1 - x))
