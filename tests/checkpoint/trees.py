"""Small random checkpoints in every published layout, made from the tables of names."""

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors.torch
import torch

from tests import originals
from wan_jax.checkpoint.layouts.diffusers import FOLDERS as DIFFUSERS_FOLDERS
from wan_jax.checkpoint.layouts.official import model_type as official_model_type
from wan_jax.checkpoint.tables import Naming, expanded_table
from wan_jax.config import DenoiserConfig, TextEncoderConfig, VAEConfig, WanConfig

# Awkward dims, except where a layout without configs needs the released head width of 128 to tell the heads.
CONFIG = WanConfig(
    name="custom",
    denoiser=DenoiserConfig(num_layers=2, dim=256, num_heads=2, ffn_dim=52, text_dim=28, freq_dim=22),
    text_encoder=TextEncoderConfig(vocab_size=67, dim=28, num_layers=2, num_heads=3, head_dim=10, ffn_dim=44),
    vae=VAEConfig(base_dim=6, dim_mult=(1, 1, 2), num_res_blocks=1, temporal_downsample=(False, True)),
)
COMPONENTS = ("text_encoder", "vae", "high_noise", "low_noise")
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = {"tokenizer.json": '{"version": "1.0"}', "spiece.model": "pieces"}

StateDict = Mapping[str, torch.Tensor]


def state_dict(component: str, naming: Naming, dtype: str = "float32", config: WanConfig = CONFIG) -> dict:
    """A random PyTorch state dict; the values depend on the component and the tensor alone."""
    model = config.model(component)
    tensors = {}
    for mapping in expanded_table(model):
        seed = int.from_bytes(f"{component} {mapping.name}".encode()[-8:], "little") % 2**63
        values = np.random.default_rng(seed).standard_normal(mapping.torch_shape, np.float32)
        tensors[mapping.stored_name(naming)] = torch.from_numpy(values).to(TORCH_DTYPES[dtype])
    return tensors


def write_tokenizer(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True)
    for name, text in TOKENIZER_FILES.items():
        (folder / name).write_text(text)


def write_official_expert(
    folder: pathlib.Path, tensors: StateDict, config: WanConfig | None = CONFIG, shards: int = 2
) -> None:
    """One expert as the release has it: config.json, numbered shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        denoiser = config.denoiser
        content = {
            "_class_name": "WanModel",
            "_diffusers_version": "0.33.0",
            "model_type": official_model_type(config),
            "text_len": 512,
            "in_dim": denoiser.in_channels,
            "out_dim": denoiser.out_channels,
            "eps": 1e-6,
            "dim": denoiser.dim,
            "ffn_dim": denoiser.ffn_dim,
            "freq_dim": denoiser.freq_dim,
            "num_heads": denoiser.num_heads,
            "num_layers": denoiser.num_layers,
        }
        (folder / "config.json").write_text(json.dumps(content))
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = names[shard::shards]
        safetensors.torch.save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_official(folder: pathlib.Path, dtype: str = "float32") -> pathlib.Path:
    """The tree of Wan2.2: two experts, UMT5 and the VAE as .pth files, the tokenizer."""
    for expert in ("high_noise", "low_noise"):
        write_official_expert(folder / f"{expert}_model", state_dict(expert, "official", dtype))
    text_encoder = state_dict("text_encoder", "official", "bfloat16")
    torch.save(text_encoder, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(state_dict("vae", "official"), folder / "Wan2.1_VAE.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def diffusers_models(dtype: str = "float32") -> dict:
    """The four models of CONFIG in diffusers and transformers, with the values of `state_dict`."""
    text, vae, denoiser = CONFIG.text_encoder, CONFIG.vae, CONFIG.denoiser
    models = {
        expert: originals.denoiser(
            0,
            num_layers=denoiser.num_layers,
            num_attention_heads=denoiser.num_heads,
            attention_head_dim=denoiser.head_dim,
            ffn_dim=denoiser.ffn_dim,
            text_dim=denoiser.text_dim,
            freq_dim=denoiser.freq_dim,
            rope_max_seq_len=1024,
        )
        for expert in ("high_noise", "low_noise")
    }
    models["vae"] = originals.vae(
        0,
        base_dim=vae.base_dim,
        dim_mult=list(vae.dim_mult),
        num_res_blocks=vae.num_res_blocks,
        temperal_downsample=list(vae.temporal_downsample),
        scale_factor_temporal=vae.temporal_stride,
        scale_factor_spatial=vae.spatial_stride,
    )
    models["text_encoder"] = originals.text_encoder(
        0,
        text.vocab_size,
        d_model=text.dim,
        d_kv=text.head_dim,
        d_ff=text.ffn_dim,
        num_layers=text.num_layers,
        num_heads=text.num_heads,
        tie_word_embeddings=True,
    )
    for component, model in models.items():
        stored = "float32" if component == "vae" else dtype
        tensors = state_dict(component, "diffusers", stored)
        if component == "text_encoder":
            tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
        for name, parameter in model.named_parameters():
            parameter.data = tensors.pop(name)
        assert not tensors.keys() - {"encoder.embed_tokens.weight"}
    return models


def write_diffusers(folder: pathlib.Path, dtype: str = "float32", max_shard_size: str = "1MB") -> pathlib.Path:
    """The tree that diffusers and transformers themselves save, with their wrong flow_shift."""
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875, "tokenizer": ["transformers", "T5TokenizerFast"]}
    for component, model in diffusers_models(dtype).items():
        name = DIFFUSERS_FOLDERS[component]
        model.save_pretrained(folder / name, max_shard_size=max_shard_size)
        library = "transformers" if component == "text_encoder" else "diffusers"
        index[name] = [library, type(model).__name__]
    originals.scheduler("unipc", 3.0).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    write_tokenizer(folder / "tokenizer")
    return folder


def quantize(tensors: StateDict, spelling: str, per_row: bool) -> dict[str, torch.Tensor]:
    """fp8_scaled: float8 weights of Linears beside a scale, and the marker tensors that come with them."""
    result = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        linear = name.endswith(".weight") and tensor.ndim == 2 and "embedding.weight" not in name
        if not linear or "relative" in name or "shared" in name:
            result[name] = tensor
            continue
        weight = tensor.float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 448 if per_row else weight.abs().max() / 448
        layer = name.removesuffix(".weight")
        result[name] = (weight / scale).to(torch.float8_e4m3fn)
        result[f"{layer}.{spelling}"] = scale
        result[f"{layer}.scale_input" if spelling == "scale_weight" else f"{layer}.comfy_quant"] = torch.ones(1)
    return result


def write_comfyui(
    folder: pathlib.Path, *, spelling: str | None = "scale_weight", per_row: bool = False, prefix: str = ""
) -> pathlib.Path:
    """ComfyUI's folders; `spelling` None leaves the denoisers in bfloat16."""
    for expert, noise in (("high_noise", "high_noise"), ("low_noise", "low_noise")):
        tensors = state_dict(expert, "official", "bfloat16")
        if spelling:
            tensors = quantize(tensors, spelling, per_row)
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        save(folder / "diffusion_models" / f"wan2.2_t2v_{noise}_14B_fp8_scaled.safetensors", tensors)
    text_encoder = quantize(state_dict("text_encoder", "diffusers", "bfloat16"), "scale_weight", per_row=False)
    text_encoder["spiece_model"] = torch.zeros(5, dtype=torch.uint8)
    save(folder / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", text_encoder)
    save(folder / "vae" / "wan_2.1_vae.safetensors", state_dict("vae", "official"))
    return folder


def save(path: pathlib.Path, tensors: StateDict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(dict(tensors), path, {"format": "pt"})


def bits(array) -> np.ndarray:
    """The bits of a torch, NumPy or JAX array of floats, for exact comparisons."""
    if isinstance(array, torch.Tensor):
        array = array.detach().contiguous()
        if array.dtype == torch.bfloat16:
            return array.view(torch.int16).numpy().view(np.uint16)
        array = array.numpy()
    array = np.ascontiguousarray(array)
    assert array.dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
    return array.view(f"u{array.dtype.itemsize}")


def assert_same_state(actual: StateDict, expected: StateDict) -> None:
    """Same names, shapes, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        np.testing.assert_array_equal(bits(actual[name]), bits(tensor), err_msg=name)
