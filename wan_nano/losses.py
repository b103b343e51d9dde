"""What each part of the nano model is trained to do: losses of the text encoder, the VAE, its decoder and the experts.

They have the form that wan_jax.training.step asks for: loss(parameters, frozen, batch, keys) -> (mean, figures), with
parameters as float32 arrays by name. `compute` is the dtype of the models' products.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from wan_jax.config import ModelConfig, WanConfig
from wan_jax.kernels.attention import AttentionOptions
from wan_jax.models.build import build_model
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parameters import named_parameters, with_parameters
from wan_jax.training.config import NoiseConfig
from wan_jax.training.denoiser_loss import draw_sigmas, flow_matching_errors
from wan_nano.scenes import BACKGROUNDS, COLOURS, KINDS, MOTIONS, SPEEDS, Scenes
from wan_nano.whole_video import decode_whole, encode_moments

Parameters = Mapping[str, jax.Array]
Figures = dict[str, jax.Array]

# What a caption says, by attribute, and in how many ways; one more stands for "not mentioned" or "no such object".
OBJECT_ATTRIBUTES = {"kind": len(KINDS), "colour": len(COLOURS), "motion": len(MOTIONS), "speed": len(SPEEDS)}
ATTRIBUTES = {
    **{f"{name}_{index + 1}": count + 1 for index in range(2) for name, count in OBJECT_ATTRIBUTES.items()},
    "background": len(BACKGROUNDS) + 1,
}
KL_WEIGHT = 5e-4
SQUARED_WEIGHT = 4.0
DECODER = ("decoder.", "post_quant_conv.")  # how names of the VAE's parameters begin that encoding does not need


def model_of(config: ModelConfig, parameters: Parameters, compute: DTypeLike) -> Any:
    """The model of these float32 parameters, which computes in `compute`."""
    return with_parameters(partial(build_model, config, compute), parameters)


# The text encoder


def attribute_labels(scenes: Scenes, names_background: np.ndarray) -> np.ndarray:
    """What captions of scenes say: [N, attributes] int32, in the order of ATTRIBUTES."""
    columns = []
    for index in range(2):
        absent = scenes.count <= index
        for name, count in OBJECT_ATTRIBUTES.items():
            columns.append(np.where(absent, count, getattr(scenes, name)[:, index]))
    columns.append(np.where(names_background, scenes.background, len(BACKGROUNDS)))
    return np.stack(columns, axis=1).astype(np.int32)


def init_readout(dim: int, seed: int = 0) -> dict[str, jax.Array]:
    """Parameters of what reads attributes from the text encoder; training needs them, nothing else does."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(generator.standard_normal(shape) * shape[0] ** -0.5, jnp.float32)

    return {
        "readout.queries.kernel": normal(dim, len(ATTRIBUTES)),
        "readout.value.kernel": normal(dim, dim),
        **{f"readout.{name}.kernel": normal(dim, count) for name, count in ATTRIBUTES.items()},
    }


def read_attributes(readout: Parameters, hidden: jax.Array, mask: jax.Array) -> list[jax.Array]:
    """Logits of every attribute, each by one attention over the text, as a denoiser's cross-attention would read it."""
    hidden = hidden.astype(jnp.float32)
    scores = hidden @ readout["readout.queries.kernel"]  # [B, T, attributes]
    weights = jax.nn.softmax(jnp.where(mask[..., None].astype(bool), scores, -1e9), axis=1)
    read = jnp.einsum("b t a, b t d -> b a d", weights, hidden @ readout["readout.value.kernel"])
    return [read[:, index] @ readout[f"readout.{name}.kernel"] for index, name in enumerate(ATTRIBUTES)]


def text_loss(config: WanConfig, compute: DTypeLike):
    """Captions of all languages have the same attributes; batch: tokens [b, T], mask [b, T], labels [b, attributes]."""

    def loss(parameters: Parameters, frozen: Any, batch: Any, keys: jax.Array) -> tuple[jax.Array, Figures]:
        del frozen, keys
        encoder = model_of(config.text_encoder, split(parameters, "readout.")[0], compute)
        hidden = encoder(batch["tokens"], batch["mask"])
        logits = read_attributes(parameters, hidden, batch["mask"])
        labels = jnp.unstack(batch["labels"], axis=1)
        losses = [
            -jnp.take_along_axis(jax.nn.log_softmax(one), label[:, None], axis=1).mean()
            for one, label in zip(logits, labels, strict=True)
        ]
        right = jnp.stack([one.argmax(-1) == label for one, label in zip(logits, labels, strict=True)])
        return sum(losses, start=jnp.float32(0)), {"all_right": right.all(axis=0).mean()}

    return loss


def split(parameters: Parameters, *prefixes: str) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the parameters whose names do not begin with a prefix, and those whose names do."""
    rest = {name: array for name, array in parameters.items() if not name.startswith(prefixes)}
    return rest, {name: array for name, array in parameters.items() if name not in rest}


def init_text_encoder(config: WanConfig, seed: int) -> dict[str, jax.Array]:
    """Fresh parameters. T5's attention has no 1/sqrt(head_dim): it is in the queries, as in T5's own initialisation."""
    parameters = named_parameters(TextEncoder(config.text_encoder, dtype=jnp.float32, rngs=nnx.Rngs(seed)))
    parameters["blocks.attention.query.kernel"] *= config.text_encoder.head_dim**-0.5
    parameters["blocks.attention.relative_bias"] *= 0.1
    return parameters


# The VAE


def init_vae(config: WanConfig, seed: int) -> dict[str, jax.Array]:
    """Fresh parameters whose latents carry little noise: they are of use to the decoder from the first step."""
    parameters = named_parameters(VAE(config.vae, dtype=jnp.float32, rngs=nnx.Rngs(seed)))
    z_dim = config.vae.z_dim
    parameters["quant_conv.kernel"] = parameters["quant_conv.kernel"].at[..., z_dim:].multiply(0.1)
    parameters["quant_conv.bias"] = parameters["quant_conv.bias"].at[z_dim:].set(-5.0)
    return parameters


def vae_loss(config: WanConfig, compute: DTypeLike):
    """Reconstruction, and a light pull of the latents to a normal distribution; batch: "videos" [b, F, H, W, 3]."""
    reconstruct = make_reconstruct(config, compute)

    def loss(parameters: Parameters, frozen: Any, batch: Any, keys: jax.Array) -> tuple[jax.Array, Figures]:
        del frozen
        error, figures, mean, log_variance = reconstruct(parameters, batch["videos"], keys)
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
        return error + KL_WEIGHT * divergence, {**figures, "divergence": divergence}

    return loss


def decoder_loss(config: WanConfig, compute: DTypeLike, noise_scale: float):
    """Reconstruction by the decoder; parameters: those of DECODER, frozen: the others, batch as of `vae_loss`.

    The latents have noise of `noise_scale` times the deviation that the encoder gives them.
    """
    reconstruct = make_reconstruct(config, compute, noise_scale)

    def loss(parameters: Parameters, frozen: Any, batch: Any, keys: jax.Array) -> tuple[jax.Array, Figures]:
        return reconstruct({**frozen, **parameters}, batch["videos"], keys)[:2]

    return loss


def make_reconstruct(config: WanConfig, compute: DTypeLike, noise_scale: float = 1.0):
    """reconstruct(parameters, videos, keys) -> error, figures, mean and log variance of the latents."""

    def reconstruct(parameters: Parameters, videos: jax.Array, keys: jax.Array):
        vae = model_of(config.vae, parameters, compute)
        mean, log_variance = encode_moments(vae, videos)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        difference = decode_whole(vae, mean + noise_scale * jnp.exp(0.5 * log_variance) * noise) - videos
        absolute, squared = jnp.abs(difference).mean(), jnp.square(difference).mean()
        return absolute + SQUARED_WEIGHT * squared, {"psnr": 10 * jnp.log10(4 / squared)}, mean, log_variance

    return reconstruct


def fold_normalisation(parameters: Parameters, mean: np.ndarray, std: np.ndarray) -> dict[str, jax.Array]:
    """The VAE that gives (latents - mean) / std for latents, and takes those: exact, and no config must know.

    The log variance that it gives is that of these latents.
    """
    z_dim = len(mean)
    scale = np.concatenate([1 / std, np.ones(z_dim)]).astype(np.float32)
    shift = np.concatenate([mean, 2 * np.log(std)]).astype(np.float32)
    kernel = parameters["post_quant_conv.kernel"]  # [1, 1, 1, z, z]
    return {
        **parameters,
        "quant_conv.kernel": parameters["quant_conv.kernel"] * scale,
        "quant_conv.bias": (parameters["quant_conv.bias"] - shift) * scale,
        "post_quant_conv.kernel": kernel * std.astype(np.float32)[:, None],
        "post_quant_conv.bias": parameters["post_quant_conv.bias"] + jnp.asarray(mean, jnp.float32) @ kernel[0, 0, 0],
    }


# The experts


def init_expert(config: WanConfig, seed: int) -> dict[str, jax.Array]:
    """Fresh parameters at which every block passes its input on: gates near zero, no velocity."""
    parameters = named_parameters(Denoiser(config.denoiser, dtype=jnp.float32, rngs=nnx.Rngs(seed)))
    for name in ("time_projection.kernel", "head.linear.kernel"):
        parameters[name] = jnp.zeros_like(parameters[name])
    return parameters


def expert_loss(
    config: WanConfig, compute: DTypeLike, *, dropout: float = 0.1, attention: str | None = None, unroll: bool = False
):
    """Flow matching of one expert in its own range of timesteps.

    batch: "latents" [b, C, F, h, w] and "texts" [b, languages, T, dim], of which one is drawn; it is replaced by that
    of the empty prompt, `frozen["empty"]` [T, dim], in a part `dropout` of the cases, for guidance. `frozen["range"]`
    [2] is the expert's `sigma_range`: an argument, so that one program trains every expert.
    """

    def build() -> Denoiser:
        return Denoiser(config.denoiser, dtype=compute, unroll=unroll, rngs=nnx.Rngs(0))

    def loss(parameters: Parameters, frozen: Any, batch: Any, keys: jax.Array) -> tuple[jax.Array, Figures]:
        keys_text, keys_noise, keys_sigma = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
        latents = batch["latents"].astype(jnp.float32)

        def choose(key: jax.Array, texts: jax.Array) -> jax.Array:
            key_language, key_dropout = jax.random.split(key)
            text = texts[jax.random.randint(key_language, (), 0, texts.shape[0])]
            return jnp.where(jax.random.bernoulli(key_dropout, dropout), frozen["empty"], text)

        texts = jax.vmap(choose)(keys_text, batch["texts"])
        sigmas = draw_sigmas(keys_sigma, NoiseConfig(), config.sampling.shift, tuple(frozen["range"]))
        denoiser = with_parameters(build, parameters).with_attention(AttentionOptions(attention))
        return flow_matching_errors(denoiser, latents, texts, sigmas, keys_noise).mean(), {}

    return loss


# What the experts learn from


def make_encode(config: WanConfig, compute: DTypeLike):
    """encode(parameters, captions, videos) -> {"latents": [b, C, F, h, w], "texts": [b, languages, T, dim]}.

    parameters: of "vae" and "text_encoder". captions: "tokens" and "mask" [b, languages, T]. videos: [b, F, H, W, 3].
    """

    def encode(parameters: Any, captions: Any, videos: jax.Array) -> dict[str, jax.Array]:
        vae = model_of(config.vae, parameters["vae"], compute)
        encoder = model_of(config.text_encoder, parameters["text_encoder"], compute)
        tokens, mask = (rearrange(captions[name], "b n t -> (b n) t") for name in ("tokens", "mask"))
        return {
            "latents": rearrange(encode_moments(vae, videos)[0], "b t h w z -> b z t h w"),
            "texts": rearrange(encoder(tokens, mask), "(b n) t d -> b n t d", n=captions["tokens"].shape[1]),
        }

    return encode
