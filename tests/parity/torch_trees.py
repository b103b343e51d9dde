"""The checkpoints of tests/checkpoint as PyTorch and diffusers have them."""

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors.torch
import torch

from tests.checkpoint import trees
from tests.parity import originals
from wan_jax.checkpoint.layouts.diffusers import FOLDERS

StateDict = Mapping[str, torch.Tensor]


def as_torch(tensors: trees.StateDict) -> dict[str, torch.Tensor]:
    """Copies of the same values as PyTorch's tensors."""

    def convert(array: np.ndarray) -> torch.Tensor:
        array = np.array(array)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    return {name: convert(array) for name, array in tensors.items()}


def stored(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors of one model's folder, read by the safetensors library."""
    files = [safetensors.torch.load_file(file) for file in folder.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def diffusers_models(dtype: str = "float32") -> dict:
    """The four models of CONFIG in diffusers and transformers, with the values of `state_dict`."""
    text, vae, denoiser = trees.CONFIG.text_encoder, trees.CONFIG.vae, trees.CONFIG.denoiser
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
        tensors = as_torch(trees.state_dict(component, "diffusers", stored))
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
        name = FOLDERS[component]
        model.save_pretrained(folder / name, max_shard_size=max_shard_size)
        library = "transformers" if component == "text_encoder" else "diffusers"
        index[name] = [library, type(model).__name__]
    originals.scheduler("unipc", 3.0).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    trees.write_tokenizer(folder / "tokenizer")
    return folder


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
