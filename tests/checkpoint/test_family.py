"""The members of the family beside text to video: recognised, read, written and read back in every layout."""

import dataclasses
import json
import math
import pathlib
import shutil
import struct

import numpy as np
import pytest

from tests.checkpoint import trees
from tests.checkpoint.trees import assert_same_state, bits, state_dict
from wan_jax.checkpoint import convert, open_checkpoint
from wan_jax.checkpoint.family import assemble_config, infer_conditioning
from wan_jax.checkpoint.formats.tensors import BFLOAT16, TensorInfo
from wan_jax.checkpoint.layouts.official import IMAGE_ENCODER as OFFICIAL_IMAGE_ENCODER
from wan_jax.checkpoint.layouts.official import model_type as official_model_type
from wan_jax.checkpoint.layouts.official import vae_file as official_vae
from wan_jax.checkpoint.tables import expanded_table, infer_config, num_layers, parameter_table
from wan_jax.config import ImageEncoderConfig, VAEConfig, WanConfig
from wan_jax.errors import InputError
from wan_jax.presets import PRESETS, WAN22_VAE

# Widths of heads are the released ones, 128 and 80, which files without configs do not tell.
CLIP = ImageEncoderConfig(image_size=28, patch_size=14, dim=160, num_layers=3, num_heads=2, ffn_dim=44)
DENOISER = trees.CONFIG.denoiser
TI2V_VAE = dataclasses.replace(
    WAN22_VAE,
    base_dim=6,
    decoder_base_dim=8,
    dim_mult=(1, 1, 2, 2),
    num_res_blocks=1,
)


def small(release: str, **changes) -> WanConfig:
    """A small model of a release's structure, as it is recognised."""
    config = dataclasses.replace(
        PRESETS[release],
        name="custom",
        text_encoder=trees.CONFIG.text_encoder,
        vae=TI2V_VAE if release == "ti2v-5b" else trees.CONFIG.vae,
        denoiser=dataclasses.replace(DENOISER, **changes),
    )
    return dataclasses.replace(config, image_encoder=CLIP) if config.image_encoder else config


CONFIGS = {
    "i2v-a14b": small("i2v-a14b", in_channels=36),
    "ti2v-5b": small("ti2v-5b", in_channels=48, out_channels=48),
    "i2v-14b": small("i2v-14b-720p", in_channels=36, image_dim=CLIP.dim),
    "flf2v-14b": small("flf2v-14b-720p", in_channels=36, image_dim=CLIP.dim, image_position_length=10),
}
WITH_CLIP = ("i2v-14b", "flf2v-14b")


def components(config: WanConfig) -> list[str]:
    return ["text_encoder", "vae", *(["image_encoder"] if config.image_encoder else []), *config.experts]


def states(config: WanConfig, naming: str) -> dict[str, dict]:
    """What the trees below hold: CLIP in float16, as released, the text encoder in bfloat16."""
    dtypes = {"text_encoder": "bfloat16", "image_encoder": "float16"}
    return {name: state_dict(name, naming, dtypes.get(name, "float32"), config) for name in components(config)}


def released_clip(config: WanConfig) -> dict[str, np.ndarray]:
    """The official file: both towers, one projection to queries, keys and values, and axes of size 1."""
    state = {}
    for name, tensor in states(config, "diffusers")["image_encoder"].items():
        name = name.replace("vision_model.encoder.layers", "visual.transformer")
        module, _, kind = name.rpartition(".")
        if module.endswith((".k_proj", ".v_proj")):
            continue
        if module.endswith(".q_proj"):
            stored = states(config, "diffusers")["image_encoder"]
            original = name.replace("visual.transformer", "vision_model.encoder.layers")
            parts = [stored[original.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            state[f"{module.removesuffix('.self_attn.q_proj')}.attn.to_qkv.{kind}"] = np.concatenate(parts)
            continue
        for theirs, ours in (
            ("vision_model.embeddings.class_embedding", "visual.cls_embedding"),
            ("vision_model.embeddings.position_embedding.weight", "visual.pos_embedding"),
            ("vision_model.embeddings.patch_embedding", "visual.patch_embedding"),
            ("vision_model.pre_layrnorm", "visual.pre_norm"),
            ("vision_model.post_layernorm", "visual.post_norm"),
            (".self_attn.out_proj", ".attn.proj"),
            (".layer_norm", ".norm"),
            (".mlp.fc1", ".mlp.0"),
            (".mlp.fc2", ".mlp.2"),
        ):
            name = name.replace(theirs, ours)
        leading = {"visual.cls_embedding": (1, 1), "visual.pos_embedding": (1,)}.get(name, ())
        state[name] = tensor.reshape(*leading, *tensor.shape)
    return state


TEXT_TOWER = {
    "log_scale": np.float32(2.6592),
    "visual.head": np.ones((CLIP.dim, 6), np.float32),
    "textual.token_embedding.weight": np.ones((7, 5), np.float32),
    "textual.blocks.0.attn.q.weight": np.ones((5, 5), np.float32),
}


def write_official(folder: pathlib.Path, config: WanConfig) -> pathlib.Path:
    held = states(config, "official")
    for expert in config.experts:
        place = folder if expert == "denoiser" else folder / f"{expert}_model"
        trees.write_official_expert(place, held[expert], config=config)
    trees.save_pickle(folder / "models_t5_umt5-xxl-enc-bf16.pth", held["text_encoder"])
    trees.save_pickle(folder / official_vae(config.vae), held["vae"])
    if config.image_encoder:
        trees.save_pickle(folder / OFFICIAL_IMAGE_ENCODER, released_clip(config) | TEXT_TOWER)
    trees.write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


@pytest.fixture(scope="module")
def official_trees(tmp_path_factory):
    return {name: write_official(tmp_path_factory.mktemp(name), config) for name, config in CONFIGS.items()}


def assert_loads(checkpoint, component: str, config: WanConfig) -> None:
    """The stored values, rearranged and stacked."""
    stored = states(config, "diffusers")[component]
    loaded = checkpoint.load(component, "float32")
    model = config.model(component)
    for mapping in parameter_table(model):
        layers = range(num_layers(model)) if mapping.per_layer else [0]
        parts = [
            mapping.at(layer).from_torch(stored[mapping.at(layer).names.diffusers].astype(np.float32))
            for layer in layers
        ]
        expected = np.stack(parts) if mapping.per_layer else parts[0]
        assert loaded[mapping.stacked_name].dtype == np.float32
        np.testing.assert_array_equal(loaded.pop(mapping.stacked_name), expected, err_msg=mapping.name)
    assert not loaded


@pytest.mark.parametrize("name", CONFIGS)
def test_official_trees(official_trees, name):
    checkpoint = open_checkpoint(official_trees[name])
    config = CONFIGS[name]
    assert checkpoint.config == config
    assert set(checkpoint.components) == set(components(config))
    (note,) = checkpoint.notes
    assert "structure of no release" in note
    for component in checkpoint.components:
        assert_loads(checkpoint, component, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_official_trees_come_back_bit_by_bit(official_trees, tmp_path, name):
    """Through every other layout; the tower of texts alone stays behind, which is said."""
    tree, config = official_trees[name], CONFIGS[name]
    for to in ("orbax", "diffusers", "official"):
        summary = convert(tree, tmp_path / to, to=to)
        tree = tmp_path / to
        assert open_checkpoint(tree).config == config
    held = states(config, "official")
    for expert in config.experts:
        folder = tree if expert == "denoiser" else tree / f"{expert}_model"
        assert_same_state(trees.load(folder), held[expert])
        assert json.loads((folder / "config.json").read_text())["model_type"] == official_model_type(config)
    assert_same_state(trees.load_pickle(tree / official_vae(config.vae)), held["vae"])
    if name in WITH_CLIP:
        assert_same_state(trees.load_pickle(tree / OFFICIAL_IMAGE_ENCODER), released_clip(config))
        assert any("without CLIP's text tower" in note for note in summary.notes)


# ComfyUI


def write_comfyui(folder: pathlib.Path, config: WanConfig, clip: dict[str, np.ndarray]) -> pathlib.Path:
    held = states(config, "official")
    for expert in config.experts:
        trees.save(folder / "diffusion_models" / f"wan_i2v_{expert}.safetensors", held[expert])
    trees.save(folder / "vae" / "wan_vae.safetensors", held["vae"])
    trees.save(folder / "clip_vision" / "clip_vision_h.safetensors", clip)
    return folder


def clip_files() -> dict[str, dict[str, np.ndarray]]:
    """CLIP as ComfyUI, transformers 5 and the official release name its tensors, with what they hold beside it."""
    prefixed = states(CONFIGS["i2v-14b"], "diffusers")["image_encoder"]
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in prefixed.items()}
    positions = np.arange(5)[None]
    return {
        "comfyui": prefixed
        | {
            "visual_projection.weight": np.ones((6, 160), np.float32),
            "vision_model.embeddings.position_ids": positions,
        },
        "transformers": bare,
        "official": released_clip(CONFIGS["i2v-14b"]) | TEXT_TOWER,
    }


@pytest.mark.parametrize("naming", ["comfyui", "transformers", "official"])
def test_comfyui(tmp_path, naming):
    config = CONFIGS["i2v-14b"]
    checkpoint = open_checkpoint(write_comfyui(tmp_path, config, clip_files()[naming]))
    assert checkpoint.config == dataclasses.replace(config, text_encoder=PRESETS["i2v-14b-720p"].text_encoder)
    assert set(checkpoint.components) == {"denoiser", "vae", "image_encoder"}
    for component in checkpoint.components:
        assert_loads(checkpoint, component, config)


def test_comfyui_of_ti2v(tmp_path):
    config = CONFIGS["ti2v-5b"]
    tree = write_comfyui(tmp_path, config, {})
    (tree / "clip_vision" / "clip_vision_h.safetensors").unlink()
    checkpoint = open_checkpoint(tree)
    assert checkpoint.config == dataclasses.replace(config, text_encoder=PRESETS["ti2v-5b"].text_encoder)
    assert set(checkpoint.components) == {"denoiser", "vae"}


def test_comfyui_of_wan22(tmp_path):
    config = CONFIGS["i2v-a14b"]
    checkpoint = open_checkpoint(write_comfyui(tmp_path, config, clip_files()["comfyui"]))
    assert checkpoint.config == dataclasses.replace(config, text_encoder=PRESETS["i2v-a14b"].text_encoder)
    assert any("clip_vision_h.safetensors: ignored, it is no part" in note for note in checkpoint.notes)
    alone = open_checkpoint(tmp_path / "diffusion_models" / "wan_i2v_high_noise.safetensors")
    assert alone.config.conditioning == "image_latents"
    assert alone.config.sampling.boundary is None


# What says which member it is.


def infos(config, naming: str = "official") -> dict[str, TensorInfo]:
    rows = expanded_table(config)
    return {mapping.stored_name(naming): TensorInfo(mapping.torch_shape, BFLOAT16, "") for mapping in rows}


RELEASED = [name for name in PRESETS if name != "nano"]  # nano's shapes do not tell its heads and text_length


@pytest.mark.parametrize("name", RELEASED)
def test_presets_are_recognised_by_their_shapes(name):
    preset = PRESETS[name]
    denoiser = infer_config(type(preset.denoiser), "", infos(preset.denoiser), "official")
    assert denoiser == preset.denoiser
    conditioning = infer_conditioning("", denoiser)
    config = assemble_config(
        f"ComfyUI/{name}_fp16",
        denoiser,
        conditioning=conditioning,
        experts=len(preset.experts),
        text_encoder=None,
        vae=None,
    )
    assert config == preset


@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_clip_is_recognised_by_its_shapes(naming):
    for config in (ImageEncoderConfig(), CLIP):
        assert infer_config(ImageEncoderConfig, "", infos(config, naming), naming) == config


def write_header(path: pathlib.Path, config) -> None:
    """A safetensors file of a model in bfloat16 whose data is a hole: it takes no room on the disk."""
    header, offset = {}, 0
    for mapping in expanded_table(config):
        end = offset + 2 * math.prod(mapping.torch_shape)
        header[mapping.names.official] = {"dtype": "BF16", "shape": mapping.torch_shape, "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + offset)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("i2v-a14b", 2 * 14_288_901_184), ("ti2v-5b", 4_999_787_712), ("i2v-14b-480p", 16_394_878_784)],
)
def test_info_names_the_released_models(tmp_path, name, parameters):
    preset = PRESETS[name]
    for expert in preset.experts:
        folder = "" if expert == "denoiser" else f"{expert}_model"
        write_header(tmp_path / name / folder / "diffusion_pytorch_model.safetensors", preset.denoiser)
    info = open_checkpoint(tmp_path / name).info()
    assert f"{name}, official layout, {parameters:,} parameters" in str(info)
    assert "holds no text_encoder and no vae" in str(info)


def test_i2v_of_either_size(tmp_path):
    """Nothing in the files tells them apart."""
    for name, size, notes in (
        ("mine", "720p", 1),
        ("Wan2.1-I2V-14B-480P", "480p", 0),
        ("480p/Wan2.1-I2V-14B-720P", "720p", 0),
    ):
        write_header(tmp_path / name / "wan.safetensors", PRESETS["i2v-14b-480p"].denoiser)
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.config == PRESETS[f"i2v-14b-{size}"]
        said = [note for note in checkpoint.notes if "taken for i2v-14b-720p" in note]
        assert len(said) == notes


def test_one_expert_of_two(tmp_path):
    write_header(tmp_path / "wan2.2_i2v_high_noise_14B.safetensors", PRESETS["i2v-a14b"].denoiser)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.name == "custom"
    assert any("one expert of i2v-a14b, which needs both" in note for note in checkpoint.notes)


def test_a_denoiser_that_says_what_it_is(tmp_path):
    """Without TI2V-5B's channels, config.json tells that a first frame is taken."""
    tree = trees.write_official_expert(tmp_path, state_dict("denoiser", "official"))
    assert open_checkpoint(tmp_path).config.conditioning == "text"
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "ti2v"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    assert tree is None
    assert checkpoint.config.conditioning == "first_frame"
    assert checkpoint.config.sampling == PRESETS["ti2v-5b"].sampling


# What must be refused or said.


def test_clip_that_is_missing(official_trees, tmp_path):
    tree = shutil.copytree(official_trees["i2v-14b"], tmp_path / "tree")
    (tree / OFFICIAL_IMAGE_ENCODER).unlink()
    checkpoint = open_checkpoint(tree)
    assert any("holds no image_encoder" in note for note in checkpoint.notes)
    with pytest.raises(InputError, match=r"tree: has no image_encoder; it holds denoiser, text_encoder, vae$"):
        checkpoint.load("image_encoder")


def test_clip_that_is_not_needed(official_trees, tmp_path):
    tree = shutil.copytree(official_trees["i2v-a14b"], tmp_path / "tree")
    shutil.copy(official_trees["i2v-14b"] / OFFICIAL_IMAGE_ENCODER, tree)
    checkpoint = open_checkpoint(tree)
    assert checkpoint.config == CONFIGS["i2v-a14b"]
    assert f"{tree / OFFICIAL_IMAGE_ENCODER}: ignored, it is no part of this model" in checkpoint.notes


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_damaged_clip_that_is_not_needed(official_trees, tmp_path, layout):
    tree = tmp_path / "tree"
    convert(official_trees["i2v-a14b"], tree, to=layout)
    file = tree / OFFICIAL_IMAGE_ENCODER
    if layout == "diffusers":
        file = tree / "image_encoder"
        file.mkdir()
        index = json.loads((tree / "model_index.json").read_text())
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        (tree / "model_index.json").write_text(json.dumps(index))
    else:
        file.write_bytes(b"PK\x03\x04 truncated")
    checkpoint = open_checkpoint(tree)
    assert checkpoint.config == CONFIGS["i2v-a14b"]
    assert f"{file}: ignored, it is no part of this model" in checkpoint.notes


QKV = "visual.transformer.1.attn.to_qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({QKV: np.zeros((481, 160), np.float32)}, "3 tensors are missing"),
        ({QKV: np.zeros((483, 160), np.float32)}, rf"{QKV}\[query\] has \[161, 160\] and needs \[160, 160\]"),
        (
            {"visual.cls_embedding": np.zeros((1, 2, 160), np.float32)},
            r"visual.cls_embedding has \[1, 2, 160\] and needs \[160\]",
        ),
        ({"visual.pre_norm.bias": None}, "1 tensor is missing: visual.pre_norm.bias"),
        ({"visual.extra": np.zeros(1, np.float32)}, "1 tensor is unexpected: visual.extra"),
        ({"visual.patch_embedding.weight": np.zeros((80, 3, 14, 14), np.float32)}, "51 tensors are of the wrong shape"),
    ],
)
def test_clip_that_does_not_fit(official_trees, tmp_path, change, message):
    tree = shutil.copytree(official_trees["i2v-14b"], tmp_path / "tree")
    state = {name: t for name, t in (released_clip(CONFIGS["i2v-14b"]) | change).items() if t is not None}
    trees.save_pickle(tree / OFFICIAL_IMAGE_ENCODER, state)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(tree)
    assert "\n" not in str(error.value)


def test_bits_of_float16(official_trees):
    """CLIP is released in float16; nothing is lost on the way to float32."""
    part = open_checkpoint(official_trees["i2v-14b"]).part("image_encoder")
    assert {part.info(mapping).dtype.name for mapping in part.table} == {"float16"}
    mapping = next(mapping for mapping in part.table if mapping.name == "blocks.2.attention.value.kernel")
    expected = states(CONFIGS["i2v-14b"], "diffusers")["image_encoder"][mapping.names.diffusers]
    np.testing.assert_array_equal(bits(next(part.read_torch([mapping]))), bits(expected))


def test_vae_of_the_wrong_kind(official_trees, tmp_path):
    tree = shutil.copytree(official_trees["i2v-a14b"], tmp_path / "tree")
    (tree / official_vae(VAEConfig())).unlink()
    shutil.copy(official_trees["ti2v-5b"] / official_vae(WAN22_VAE), tree)
    with pytest.raises(InputError, match="the VAE has 48 latent channels, the denoiser makes 16"):
        open_checkpoint(tree)
