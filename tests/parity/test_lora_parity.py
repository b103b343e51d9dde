"""LoRA files against diffusers' own converters."""

import numpy as np
import pytest
import safetensors.torch

from tests.lora import lora_files
from tests.lora.lora_files import CONFIG, MODULES, pairs, save, tensors
from tests.parity.torch_trees import as_torch
from wan_jax.lora.files import open_lora

BLOCK_MODULES = {name: module for name, module in MODULES.items() if name.startswith("blocks.")}


@pytest.mark.parametrize("dialect", ["comfyui", "comfyui A B", "kohya"])
def test_diffusers_converts_the_same_changes(dialect, tmp_path):
    """diffusers' converters from the other dialects, as an oracle for names and scales of what they keep."""
    from diffusers.loaders import lora_conversion_utils as theirs

    content = pairs(modules=BLOCK_MODULES if dialect == "kohya" else MODULES)
    # Their converters take an alpha for blocks only.
    stored = {
        name: tensor
        for name, tensor in tensors(dialect, content, 2.0).items()
        if "blocks" in name or not name.endswith("alpha")
    }
    if dialect != "kohya":
        biases = [name for name in lora_files.wholes()[0] if name.endswith("diff_b") and "norm" not in name]
        stored |= {name: tensor for name, tensor in lora_files.wholes()[0].items() if name in biases[:2]}
    convert = (
        theirs._convert_musubi_wan_lora_to_diffusers
        if dialect == "kohya"
        else theirs._convert_non_diffusers_wan_lora_to_diffusers
    )
    converted = convert(as_torch(stored))
    safetensors.torch.save_file(converted, tmp_path / "converted.safetensors")
    ours = open_lora(save(tmp_path / "ours.safetensors", stored), CONFIG)
    back = open_lora(tmp_path / "converted.safetensors", CONFIG)
    assert ours.changes["both"].keys() == back.changes["both"].keys()
    assert len(ours.changes["both"]) >= len(content)
    for name, change in ours.changes["both"].items():
        # They fold the scale into both factors, which rounds; the head's differs in nothing.
        np.testing.assert_allclose(ours.delta(change), back.delta(back.changes["both"][name]), rtol=2e-6, atol=1e-6)
