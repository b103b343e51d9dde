"""Small random LoRA files in every dialect, with names written out by hand, and what they do by the formula."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from tests.checkpoint import trees
from wan_jax.config import DenoiserConfig

CONFIG = DenoiserConfig(num_layers=2, dim=36, num_heads=3, ffn_dim=52, text_dim=28, text_length=7, freq_dim=22)
# ours, official, diffusers; outputs, inputs
BLOCK = [
    *[
        (f"{ours}_attention.{name}", f"{official}_attn.{short}", f"{theirs}.{long}", 36, 36)
        for ours, official, theirs in (("self", "self", "attn1"), ("cross", "cross", "attn2"))
        for name, short, long in (
            ("query", "q", "to_q"),
            ("key", "k", "to_k"),
            ("value", "v", "to_v"),
            ("output", "o", "to_out.0"),
        )
    ],
    ("feed_forward.up", "ffn.0", "ffn.net.0.proj", 52, 36),
    ("feed_forward.down", "ffn.2", "ffn.net.2", 36, 52),
]
MODULES = {
    f"blocks.{layer}.{ours}": (f"blocks.{layer}.{official}", f"blocks.{layer}.{theirs}", outputs, inputs)
    for layer in range(2)
    for ours, official, theirs, outputs, inputs in BLOCK
} | {
    "time_projection": ("time_projection.1", "condition_embedder.time_proj", 216, 36),
    "text_embedding.linear_1": ("text_embedding.0", "condition_embedder.text_embedder.linear_1", 36, 28),
    "text_embedding.linear_2": ("text_embedding.2", "condition_embedder.text_embedder.linear_2", 36, 36),
    "time_embedding.linear_1": ("time_embedding.0", "condition_embedder.time_embedder.linear_1", 36, 22),
    "time_embedding.linear_2": ("time_embedding.2", "condition_embedder.time_embedder.linear_2", 36, 36),
    "head.linear": ("head.head", "proj_out", 64, 36),
}
PAIRS = {  # endings that people use, down and up
    "lora_down": (".lora_down.weight", ".lora_up.weight"),
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "mochi": (".lora_A", ".lora_B"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
    "_lora": ("_lora.down.weight", "_lora.up.weight"),
    "linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}
# name: (prefix, column, underscores, endings, alpha as a tensor)
DIALECTS = {
    "diffusers": ("transformer.", 1, False, "lora_A", False),
    "peft": ("base_model.model.", 1, False, "default", False),
    "comfyui": ("diffusion_model.", 0, False, "lora_down", True),
    "comfyui A B": ("diffusion_model.", 0, False, "lora_A", True),
    "model.diffusion_model": ("model.diffusion_model.", 0, False, "lora_down", True),
    "official without prefix": ("", 0, False, "default", False),
    "kohya": ("lora_unet_", 0, True, "lora_down", True),
    "kohya, diffusers' names": ("lora_unet_", 1, True, "lora_down", True),
    "mochi": ("diffusion_model.", 0, False, "mochi", False),
    "diffusers 3": ("unet.", 1, False, "lora.down", False),
    "diffusers 1": ("diffusion_model.", 0, False, "_lora", True),
    "transformers": ("transformer.", 1, False, "linear_layer", False),
}
Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]


def pairs(rank: int = 3, seed: int = 0, modules=MODULES) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Our module -> (down [rank, inputs], up [outputs, rank]); ranks differ from module to module by up to 2."""
    random = np.random.default_rng(seed)
    found = {}
    for index, (ours, (_, _, outputs, inputs)) in enumerate(modules.items()):
        own = rank + index % 3
        found[ours] = (
            random.standard_normal((own, inputs), np.float32) * np.float32(inputs**-0.5),
            random.standard_normal((outputs, own), np.float32) * np.float32(0.3),
        )
    return found


def tensors(dialect: str, content: Pairs, alpha: float | None = None, dtype=np.float32) -> dict[str, np.ndarray]:
    prefix, column, underscores, endings, alpha_tensor = DIALECTS[dialect]
    found = {}
    for ours, factors in content.items():
        module = MODULES[ours][column]
        stem = prefix + (module.replace(".", "_") if underscores else module)
        for ending, factor in zip(PAIRS[endings], factors, strict=True):
            found[stem + ending] = factor.astype(dtype)
        if alpha is not None and alpha_tensor:
            found[f"{stem}.alpha"] = np.float32(alpha)
    return found


def save(path: pathlib.Path, content: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> str:
    trees.save(path, content, metadata)
    return str(path)


def write(path: pathlib.Path, dialect: str, content: Pairs, alpha: float | None = None, dtype=np.float32) -> str:
    """A file of a dialect; alpha is a tensor, or PEFT's metadata, as the dialect has it."""
    metadata = {}
    if alpha is not None and dialect == "diffusers":
        metadata["lora_adapter_metadata"] = json.dumps({"transformer.lora_alpha": alpha, "transformer.r": 3})
    elif alpha is not None and dialect == "peft":
        path = path.with_name("adapter_model.safetensors")
        path.with_name("adapter_config.json").write_text(json.dumps({"lora_alpha": alpha, "r": 3}))
    return save(path, tensors(dialect, content, alpha, dtype), metadata)


def formula(content: Pairs, alpha: float | None = None) -> dict[str, np.ndarray]:
    """Our kernel -> its change at scale 1, float64 [inputs, outputs]."""
    return {
        f"{ours}.kernel": (np.float64(up) @ np.float64(down)).T * (1 if alpha is None else alpha / len(down))
        for ours, (down, up) in content.items()
    }


def wholes(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Whole changes by LightX2V's names, and the same by ours, as our parameters are shaped."""
    random = np.random.default_rng((seed, 7))
    shapes = {
        "blocks.1.self_attn.q.diff_b": ("blocks.1.self_attention.query.bias", (36,)),
        "blocks.0.ffn.2.diff_b": ("blocks.0.feed_forward.down.bias", (36,)),
        "blocks.0.diff_m": ("blocks.0.modulation", (1, 6, 36)),
        "blocks.1.norm3.diff": ("blocks.1.cross_attention_norm.scale", (36,)),
        "blocks.1.norm3.diff_b": ("blocks.1.cross_attention_norm.bias", (36,)),
        "blocks.0.cross_attn.norm_k.diff": ("blocks.0.cross_attention.key_norm.scale", (36,)),
        "head.diff_m": ("head.modulation", (1, 2, 36)),
        "head.head.diff": ("head.linear.kernel", (64, 36)),
        "head.head.diff_b": ("head.linear.bias", (64,)),
        "patch_embedding.diff": ("patch_embedding.kernel", (36, 16, 1, 2, 2)),
        "patch_embedding.diff_b": ("patch_embedding.bias", (36,)),
        "time_projection.1.diff_b": ("time_projection.bias", (216,)),
    }
    theirs, expected = {}, {}
    for name, (ours, shape) in shapes.items():
        value = 0.1 * random.standard_normal(shape, np.float32)
        theirs[f"diffusion_model.{name}"] = value
        if ours.endswith("kernel"):
            value = value.reshape(shape[0], -1).T
        expected[ours] = np.float64(value[0] if ours.endswith("modulation") else value)
    return theirs, expected
