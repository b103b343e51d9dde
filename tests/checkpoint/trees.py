"""Small random checkpoints in every published layout, made from the tables of names."""

import json
import pathlib
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import tokenizers

from wan_jax.checkpoint.formats.safetensors import SafetensorsFile, write_safetensors_file
from wan_jax.checkpoint.formats.tensors import TensorInfo
from wan_jax.checkpoint.formats.torch_pickle import TorchPickleFile, write_torch_pickle
from wan_jax.checkpoint.layouts import WRITABLE
from wan_jax.checkpoint.layouts.official import model_type
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


def _small_tokenizer() -> str:
    """tokenizer.json of the smallest tokenizer that could be UMT5's."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 2))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer.to_str()


TOKENIZER_FILES = {"tokenizer.json": _small_tokenizer(), "spiece.model": "pieces"}

StateDict = Mapping[str, np.ndarray]
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def state_dict(
    component: str, naming: Naming, dtype: str = "float32", config: WanConfig = CONFIG
) -> dict[str, np.ndarray]:
    """A random state dict; the values depend on the component and the tensor alone."""
    model = config.model(component)
    tensors = {}
    for mapping in expanded_table(model):
        seed = int.from_bytes(f"{component} {mapping.name}".encode()[-8:], "little") % 2**63
        values = np.random.default_rng(seed).standard_normal(mapping.torch_shape, np.float32)
        tensors[mapping.stored_name(naming)] = values.astype(np.dtype(dtype))
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
            "model_type": model_type(config),
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
        save(folder / file, {name: tensors[name] for name in held})
        weight_map |= dict.fromkeys(held, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_official(folder: pathlib.Path, dtype: str = "float32") -> pathlib.Path:
    """The tree of Wan2.2: two experts, UMT5 and the VAE as .pth files, the tokenizer."""
    for expert in ("high_noise", "low_noise"):
        write_official_expert(folder / f"{expert}_model", state_dict(expert, "official", dtype))
    text_encoder = state_dict("text_encoder", "official", "bfloat16")
    save_pickle(folder / "models_t5_umt5-xxl-enc-bf16.pth", text_encoder)
    save_pickle(folder / "Wan2.1_VAE.pth", state_dict("vae", "official"))
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def write_diffusers(folder: pathlib.Path, dtype: str = "float32") -> pathlib.Path:
    """A diffusers tree."""
    layout = WRITABLE["diffusers"]
    for component in COMPONENTS:
        tensors = state_dict(component, "diffusers", "float32" if component == "vae" else dtype)
        layout.write_component(
            folder, component, CONFIG, infos(tensors), lambda names, held=tensors: map(held.__getitem__, names)
        )
    layout.finish(folder, CONFIG, {component: {} for component in COMPONENTS}, tokenizer=True)
    write_tokenizer(folder / "tokenizer")
    return folder


def quantize(tensors: StateDict, spelling: str, per_row: bool) -> dict[str, np.ndarray]:
    """fp8_scaled: float8 weights of Linears beside a scale, and the marker tensors that come with them."""
    result = {"scaled_fp8": np.zeros(2, FLOAT8)}
    for name, tensor in tensors.items():
        linear = name.endswith(".weight") and tensor.ndim == 2 and "embedding.weight" not in name
        if not linear or "relative" in name or "shared" in name:
            result[name] = tensor
            continue
        weight = tensor.astype(np.float32)
        scale = np.abs(weight).max(axis=1, keepdims=True) / 448 if per_row else np.asarray(np.abs(weight).max() / 448)
        layer = name.removesuffix(".weight")
        result[name] = (weight / scale).astype(FLOAT8)
        result[f"{layer}.{spelling}"] = scale.astype(np.float32)
        marker = "scale_input" if spelling == "scale_weight" else "comfy_quant"
        result[f"{layer}.{marker}"] = np.ones(1, np.float32)
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
    text_encoder["spiece_model"] = np.zeros(5, np.uint8)
    save(folder / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", text_encoder)
    save(folder / "vae" / "wan_2.1_vae.safetensors", state_dict("vae", "official"))
    return folder


def infos(tensors: StateDict) -> dict[str, TensorInfo]:
    return {name: TensorInfo(array.shape, array.dtype, "") for name, array in tensors.items()}


def save(path: pathlib.Path, tensors: StateDict, metadata: Mapping[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors_file(path, infos(tensors), lambda names: map(tensors.__getitem__, names), metadata)


def save_pickle(path: pathlib.Path, tensors: StateDict) -> None:
    write_torch_pickle(path, infos(tensors), lambda names: map(tensors.__getitem__, names))


def archive(path: pathlib.Path, pickled: bytes, storages: Mapping[str, bytes], compression=zipfile.ZIP_STORED) -> None:
    """A file as torch.save lays it out, of any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            file.writestr(f"archive/data/{key}", data)


def load(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of the safetensors files of a folder."""
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        assert not held.keys() & found.keys()
        found |= held
    return found


def load_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.tensors}


def load_pickle(path: pathlib.Path) -> dict[str, np.ndarray]:
    file = TorchPickleFile(path)
    return {name: file.read(name) for name in file.tensors}


def bits(array) -> np.ndarray:
    """The bits of an array of floats, for exact comparisons."""
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
