"""How LoRA files name what they change.

A key is a prefix, a module and an ending: "diffusion_model." "blocks.3.ffn.0" ".lora_down.weight". Modules are those of
the official and of the diffusers names of the table (checkpoint/tables), as they stand or, as kohya's tools write them,
with underscores for dots ("lora_unet_" "blocks_3_ffn_0" ".lora_down.weight").

    diffusers, PEFT               transformer.blocks.0.attn1.to_q.lora_A.weight, .lora_B.weight; alpha in the metadata
    official, ComfyUI, LightX2V   diffusion_model.blocks.0.self_attn.q.lora_down.weight (or .lora_A.weight),
                                  .lora_up.weight, .alpha, .diff, .diff_b; diffusion_model.blocks.0.diff_m
    kohya, musubi                 lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up.weight, .alpha
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from wan_jax.checkpoint.tables.mapping import ParamMapping

# A pair of factors, their alpha, and what is added as it is: to the weight, to the bias, to the modulation.
Part = Literal["down", "up", "alpha", "diff", "up_bias", "diff_b", "diff_m"]
Leaf = Literal["weight", "bias", "modulation"]

ENDINGS: dict[str, Part] = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_B.default.bias": "up_bias",
    ".alpha": "alpha",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    ".diff_m": "diff_m",
}
LEAVES: dict[Part, Leaf] = {
    **dict.fromkeys(("down", "up", "alpha", "diff"), "weight"),
    **dict.fromkeys(("up_bias", "diff_b"), "bias"),
    "diff_m": "modulation",
}
LOW_NOISE_PREFIX = "transformer_2."  # diffusers' name for the second expert
OTHER_METHODS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_mid.": "LoRA for convolutions",
}
_ENDING = re.compile(f"({'|'.join(map(re.escape, ENDINGS))})$")  # the search finds the longest that fits
# Files may hold several of them, one after the other.
_PREFIXES = re.compile(
    r"^(diffusion_model\.|transformer\.|transformer_2\.|model\.|base_model\.|unet\.|pipe\.dit\."
    r"|lora_unet_|lora_transformer_|lycoris_)+"
)
EXPERT_METADATA = "wan_expert"  # our own key in a file's metadata
# Words after "high" or "low" that make them mean something else than noise.
NOT_NOISE = ("res", "resolution", "rank", "quality", "vram", "poly", "light", "key", "angle", "contrast", "detail")


@dataclass(frozen=True)
class Key:
    """A stored name, taken apart."""

    name: str
    module: str  # without prefixes
    part: Part
    low_noise: bool  # whether its prefix names the second expert


def parse_key(name: str) -> Key | None:
    """None for a name that ends like nothing known."""
    match = _ENDING.search(name)
    if match is None:
        return None
    module = without_prefixes(name[: match.start()])
    return Key(name, module, ENDINGS[match[0]], name.startswith(LOW_NOISE_PREFIX))


def without_prefixes(name: str) -> str:
    return _PREFIXES.sub("", name)


def modules(table: Iterable[ParamMapping]) -> dict[str, dict[Leaf, ParamMapping]]:
    """Every spelling of every module of a table -> its parameters.

    A table of modulations is the "modulation" of the module around it, and a module of its own.
    """
    found: dict[str, dict[Leaf, ParamMapping]] = {}

    def add(module: str, leaf: Leaf, mapping: ParamMapping) -> None:
        for spelling in (module, module.replace(".", "_")):
            other = found.setdefault(spelling, {}).setdefault(leaf, mapping)
            if other != mapping:
                raise ValueError(f"{spelling} is both {mapping.name} and {other.name}")

    for mapping in table:
        for name in (mapping.names.official, mapping.names.diffusers):
            module, _, last = name.rpartition(".")
            if last in ("weight", "bias"):
                add(module, "weight" if last == "weight" else "bias", mapping)
            else:
                add(name, "weight", mapping)
                if module:
                    add(module, "modulation", mapping)
    return found


def guess_expert(stem: str, metadata: Mapping[str, str]) -> tuple[str | None, str]:
    """Which expert a file is for ("high_noise", "low_noise"), as far as it tells, and what tells it."""
    if metadata.get(EXPERT_METADATA) in ("high_noise", "low_noise"):
        return metadata[EXPERT_METADATA], EXPERT_METADATA
    titles = [text for name, text in metadata.items() if name.endswith(("title", "name"))]
    for text, evidence in ((stem, "by its name"), *((title, f"its title is {title!r}") for title in titles)):
        words = re.findall(r"[a-z]+", text.lower())
        found = {
            level
            for word, following in itertools.pairwise([*words, ""])
            for level in ("high", "low")
            if word in (f"{level}noise", f"{level}model") or (word == level and following not in NOT_NOISE)
        }
        if len(found) == 1:
            return f"{found.pop()}_noise", evidence
    return None, ""
