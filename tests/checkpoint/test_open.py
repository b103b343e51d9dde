"""Opening and loading every published layout: configs, names, values, notes; and everything that must be refused."""

import dataclasses
import json
import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint import trees
from tests.checkpoint.trees import CONFIG, bits, state_dict
from wan_jax.assets import NANO_WEIGHTS
from wan_jax.checkpoint import convert, open_checkpoint
from wan_jax.checkpoint.components import load_component
from wan_jax.checkpoint.family import assemble_config
from wan_jax.checkpoint.formats.tensors import BFLOAT16, TensorInfo
from wan_jax.checkpoint.tables import (
    expanded_table,
    infer_denoiser,
    infer_text_encoder,
    infer_vae,
    num_layers,
    parameter_table,
)
from wan_jax.config import ImageEncoderConfig, PerExpert, SamplingConfig, WanConfig
from wan_jax.errors import InputError
from wan_jax.models.build import abstract_model
from wan_jax.presets import PRESETS


def stacked(component: str, tensors, naming: str, dtype=np.float32) -> dict[str, np.ndarray]:
    """What loading must give: every tensor rearranged and stacked, computed the plain way."""
    config = CONFIG.model(component)
    result = {}
    for mapping in parameter_table(config):
        layers = range(num_layers(config)) if mapping.per_layer else [0]
        parts = [
            mapping.at(layer).from_torch(tensors[mapping.at(layer).stored_name(naming)].astype(np.float32))
            for layer in layers
        ]
        result[mapping.stacked_name] = (np.stack(parts) if mapping.per_layer else parts[0]).astype(dtype)
    return result


def assert_loads(checkpoint, naming: str, dtype: str = "float32", denoiser_dtype: str = "float32"):
    """Every component loads with the names and shapes of its model and the values that were stored."""
    assert set(checkpoint.components) == set(trees.COMPONENTS)
    for component in trees.COMPONENTS:
        stored = "float32" if component == "vae" else "bfloat16" if component == "text_encoder" else denoiser_dtype
        if naming == "diffusers":
            stored = "float32"
        target = jnp.dtype("float32" if component == "vae" else dtype)
        expected = stacked(component, state_dict(component, naming, stored), naming, target)
        loaded = checkpoint.load(component, dtype)
        model = abstract_model(CONFIG.model(component))
        assert {name: info.shape for name, info in model.items()} == {name: a.shape for name, a in loaded.items()}
        for name, array in expected.items():
            assert loaded[name].dtype == target
            np.testing.assert_array_equal(bits(loaded[name]), bits(array), err_msg=f"{component} {name}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_official(official_tree, dtype):
    checkpoint = open_checkpoint(official_tree)
    assert checkpoint.layout == "official"
    assert checkpoint.config == CONFIG
    assert checkpoint.config.experts == ("high_noise", "low_noise")
    assert checkpoint.tokenizer_folder == official_tree / "google" / "umt5-xxl"
    (note,) = checkpoint.notes
    assert "structure of no release" in note  # and the layout has no place for the sampling defaults
    assert_loads(checkpoint, "official", dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diffusers(diffusers_layout_tree, dtype):
    checkpoint = open_checkpoint(str(diffusers_layout_tree))
    assert checkpoint.layout == "diffusers"
    assert checkpoint.config == CONFIG
    assert checkpoint.tokenizer_folder == diffusers_layout_tree / "tokenizer"
    assert_loads(checkpoint, "diffusers", dtype)


def test_the_flow_shift_of_a_release_loses_and_is_reported(tmp_path):
    """Published trees hold 3.0 where the release uses another shift. The nano model is a release."""
    tree = shutil.copytree(NANO_WEIGHTS, tmp_path / "tree")
    change_json(tree / "scheduler" / "scheduler_config.json", flow_shift=3)
    checkpoint = open_checkpoint(tree)
    assert checkpoint.config.sampling == PRESETS["nano"].sampling
    (note,) = checkpoint.notes
    assert "flow_shift 3 is not used" in note
    assert "5" in note


OWN = SamplingConfig(
    size=(96, 64), frames=9, fps=8, steps=7, shift=3.0, guidance=PerExpert(low=1.5, high=2.5), boundary=0.8,
    solver="euler", schedule="diffusers", negative_prompt="blurry",
)  # fmt: skip


@pytest.mark.parametrize("to", ["diffusers", "orbax"])
def test_a_model_that_is_no_release_keeps_its_sampling_defaults(official_tree, tmp_path, to):
    checkpoint = open_checkpoint(official_tree)
    own = dataclasses.replace(checkpoint, config=dataclasses.replace(CONFIG, sampling=OWN))
    convert(own, tmp_path / "tree", to=to)
    back = open_checkpoint(tmp_path / "tree")
    assert back.config.sampling == OWN
    assert isinstance(back.config.sampling.guidance, PerExpert)
    summary = convert(back, tmp_path / "official", to="official")  # which has no place for them
    assert any("no place for" in note and "shift" in note for note in summary.notes)
    assert any("no release" in note for note in open_checkpoint(tmp_path / "official").notes)


def test_a_foreign_diffusers_tree_that_is_no_release(diffusers):
    """Its scheduler's shift counts, and what it does not say is what diffusers does: nothing of a release."""
    change_json(diffusers / "scheduler" / "scheduler_config.json", flow_shift=3)
    index = json.loads((diffusers / "model_index.json").read_text())
    del index["_wan_jax_sampling"]
    (diffusers / "model_index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(diffusers)
    sampling = checkpoint.config.sampling
    assert (sampling.shift, sampling.size, sampling.steps, sampling.guidance) == (3.0, (832, 480), 50, (5.0, 5.0))
    assert (sampling.boundary, sampling.negative_prompt) == (0.875, "")
    (note,) = checkpoint.notes
    assert "shift 3" in note
    assert "no release" in note


def test_the_boundary_of_a_diffusers_tree_counts(diffusers_layout_tree, tmp_path):
    tree = shutil.copytree(diffusers_layout_tree, tmp_path / "tree")
    change_json(tree / "model_index.json", boundary_ratio=0.9)
    assert open_checkpoint(tree).config.sampling.boundary == 0.9


@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_one_expert(official_tree, diffusers_layout_tree, tmp_path, naming):
    """Wan2.1: one denoiser, at the top of the official tree."""
    tree = tmp_path / "tree"
    if naming == "official":
        trees.write_official_expert(tree, state_dict("denoiser", "official"))
        for file in official_tree.glob("*.pth"):
            shutil.copy(file, tree)
    else:
        shutil.copytree(diffusers_layout_tree, tree)
        shutil.rmtree(tree / "transformer_2")
        change_json(tree / "model_index.json", transformer_2=[None, None], boundary_ratio=None)
    checkpoint = open_checkpoint(tree)
    assert set(checkpoint.components) == {"denoiser", "text_encoder", "vae"}
    assert checkpoint.config.experts == ("denoiser",)
    own = dataclasses.replace(CONFIG.sampling, boundary=None)
    assert checkpoint.config.sampling == (PRESETS["t2v-1.3b"].sampling if naming == "official" else own)


def test_an_experts_folder_alone(official_tree):
    checkpoint = open_checkpoint(official_tree / "high_noise_model")
    assert checkpoint.components == ("denoiser",)
    assert checkpoint.config.denoiser == CONFIG.denoiser
    assert any("holds no text_encoder and no vae" in note for note in checkpoint.notes)
    with pytest.raises(InputError, match="has no vae; it holds denoiser"):
        checkpoint.load("vae")


def test_an_official_folder_without_its_config(tmp_path):
    tensors = state_dict("denoiser", "official")
    trees.write_official_expert(tmp_path / "tree", tensors, config=None)
    checkpoint = open_checkpoint(tmp_path / "tree")
    assert checkpoint.layout == "official"
    assert checkpoint.config.denoiser == CONFIG.denoiser


def test_released_dimensions_are_inferred_from_shapes_alone():
    def infos(config, naming):
        rows = expanded_table(config)
        return {mapping.stored_name(naming): TensorInfo(mapping.torch_shape, BFLOAT16, "") for mapping in rows}

    released = [preset for preset in PRESETS.values() if preset.name != "nano"]
    for preset in released:
        assert infer_denoiser("", infos(preset.denoiser, "official")) == preset.denoiser
    for preset in released:
        assert infer_vae("", infos(preset.vae, "official")) == preset.vae
    config = WanConfig()
    for naming in ("official", "diffusers"):
        assert infer_text_encoder("", infos(config.text_encoder, naming), naming) == config.text_encoder


@pytest.mark.parametrize(
    ("spelling", "per_row", "prefix"),
    [
        ("scale_weight", False, ""),
        ("scale_weight", True, "model.diffusion_model."),
        ("weight_scale", False, "diffusion_model."),
        ("weight_scale", True, ""),
    ],
)
def test_comfyui_fp8_scaled(tmp_path, spelling, per_row, prefix):
    tree = trees.write_comfyui(tmp_path, spelling=spelling, per_row=per_row, prefix=prefix)
    checkpoint = open_checkpoint(tree)
    assert checkpoint.layout == "comfyui"
    assert checkpoint.config == CONFIG
    assert checkpoint.tokenizer_folder is None
    assert sum("float8" in note for note in checkpoint.notes) == 3
    for component, naming in (("high_noise", "official"), ("low_noise", "official"), ("text_encoder", "diffusers")):
        quantized = trees.quantize(
            state_dict(component, naming, "bfloat16"),
            spelling if naming == "official" else "scale_weight",
            per_row and naming == "official",
        )
        expected = {}
        for name, tensor in quantized.items():
            layer = name.removesuffix(".weight")
            scale = quantized.get(f"{layer}.{spelling}", quantized.get(f"{layer}.scale_weight"))
            expected[name] = (
                tensor.astype(np.float32) * scale.astype(np.float32)
                if tensor.dtype == trees.FLOAT8 and scale is not None
                else tensor
            )
        for dtype in ("float32", "bfloat16"):  # rounded once, from the product in float32
            plain = stacked(component, expected, naming, jnp.dtype(dtype))
            loaded = checkpoint.load(component, dtype)
            for name, array in plain.items():
                np.testing.assert_array_equal(bits(loaded[name]), bits(array), err_msg=f"{component} {name}")
    vae = stacked("vae", state_dict("vae", "official"), "official")
    for name, array in checkpoint.load("vae", "bfloat16").items():
        np.testing.assert_array_equal(array, vae[name])


def test_comfyui_files_given_as_a_pair(comfyui_tree):
    files = sorted((comfyui_tree / "diffusion_models").iterdir())
    checkpoint = open_checkpoint(files)
    assert set(checkpoint.components) == {"high_noise", "low_noise"}
    assert open_checkpoint(files[0]).components == ("denoiser",)


@pytest.mark.parametrize("folder", ["tokenizer", "google/umt5-xxl"])
def test_comfyui_with_a_tokenizer_beside(comfyui_tree, tmp_path, folder):
    tree = shutil.copytree(comfyui_tree, tmp_path / "tree")
    trees.write_tokenizer(tree / folder)
    trees.save(tree / "vae" / "taew2_1.safetensors", {"decoder.1.weight": np.zeros(3, np.float32)})
    checkpoint = open_checkpoint(tree)
    assert checkpoint.tokenizer_folder == tree / folder
    assert any("taew2_1.safetensors: ignored" in note for note in checkpoint.notes)


def test_plain_fp8_without_any_scale(tmp_path):
    tensors = {
        name: tensor.astype(ml_dtypes.float8_e5m2) for name, tensor in state_dict("denoiser", "official").items()
    }
    trees.save(tmp_path / "wan2.1_t2v.safetensors", tensors)
    checkpoint = open_checkpoint(tmp_path / "wan2.1_t2v.safetensors")
    expected = stacked("denoiser", tensors, "official")
    for name, array in checkpoint.load("denoiser", "float32").items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("held", [("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")])
def test_other_names_of_the_embedding(comfyui_tree, tmp_path, held):
    tree = shutil.copytree(comfyui_tree, tmp_path / "tree")
    tensors = state_dict("text_encoder", "diffusers", "bfloat16")
    embedding = tensors.pop("shared.weight")
    path = tree / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    trees.save(path, tensors | {name: embedding.copy() for name in held})
    loaded = open_checkpoint(tree).load("text_encoder", "float32")
    np.testing.assert_array_equal(loaded["embedding.table"], embedding.astype(np.float32))
    if len(held) == 2:  # a copy that some versions of transformers leave at random values
        trees.save(path, tensors | {"shared.weight": embedding, "encoder.embed_tokens.weight": embedding + 1})
        with pytest.raises(InputError, match=r"shared\.weight and encoder\.embed_tokens\.weight must be equal"):
            open_checkpoint(tree).load("text_encoder")


def test_loading_reports_progress_and_takes_shardings(official_tree):
    checkpoint = open_checkpoint(official_tree)
    seen = []
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loaded = checkpoint.load("low_noise", "float32", sharding, progress=lambda *report: seen.append(report))
    assert all(array.sharding == sharding for array in loaded.values())
    total = checkpoint.info().components[0].nbytes
    assert seen[-1] == ("low_noise", total, total)
    assert len(seen) == checkpoint.info().components[0].tensors
    per_name = load_component(
        checkpoint.part("vae"), np.dtype(np.float32), dict.fromkeys(abstract_model(CONFIG.vae), sharding)
    )
    assert all(array.sharding == sharding for array in per_name.values())


def test_info(official_tree):
    info = open_checkpoint(official_tree).info()
    sizes = {component.name: component for component in info.components}
    assert sizes["vae"].dtypes == {"float32": sizes["vae"].tensors}
    assert sizes["text_encoder"].dtypes == {"bfloat16": sizes["text_encoder"].tensors}
    expected = sum(tensor.size for tensor in state_dict("vae", "official").values())
    assert sizes["vae"].parameters == expected
    assert sizes["vae"].nbytes == 4 * expected
    text = str(info)
    assert "official layout" in text
    assert f"{expected:,} parameters" in text


# What must be refused.


def change_json(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(path) -> str:
    with pytest.raises(InputError) as error:
        open_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def official(official_tree, tmp_path):
    return shutil.copytree(official_tree, tmp_path / "official")


@pytest.fixture
def diffusers(diffusers_layout_tree, tmp_path):
    return shutil.copytree(diffusers_layout_tree, tmp_path / "diffusers")


def rewrite_expert(folder: pathlib.Path, change) -> None:
    tensors = state_dict("high_noise", "official")
    change(tensors)
    shutil.rmtree(folder)
    trees.write_official_expert(folder, tensors)


def remove_two(tensors):
    del tensors["blocks.1.ffn.0.bias"], tensors["head.modulation"]


def add_one(tensors):
    tensors["blocks.0.extra.weight"] = np.zeros(2, np.float32)


def transpose_one(tensors):
    tensors["blocks.1.ffn.0.weight"] = tensors["blocks.1.ffn.0.weight"].T


def make_integer(tensors):
    tensors["blocks.1.ffn.0.weight"] = tensors["blocks.1.ffn.0.weight"].astype(np.int8)


def remove_layer(tensors):
    for name in [name for name in tensors if name.startswith("blocks.1.")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (remove_two, ["2 tensors are missing", "blocks.1.ffn.0.bias", "head.modulation"]),
        (add_one, ["1 tensor is unexpected: blocks.0.extra.weight"]),
        (transpose_one, ["1 tensor is of the wrong shape: blocks.1.ffn.0.weight has [256, 52] and needs [52, 256]"]),
        (make_integer, ["of an unexpected dtype", "blocks.1.ffn.0.weight is int8"]),
        (remove_layer, ["27 tensors are missing", "and 24 more"]),
    ],
)
def test_tensors_that_do_not_fit(official, change, messages):
    rewrite_expert(official / "high_noise_model", change)
    refused = refusal(official)
    assert all(message in refused for message in messages), refused
    assert "high_noise_model" in refused


def test_a_missing_and_a_truncated_shard(official):
    shard = official / "low_noise_model" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert f"truncated: its header says {len(content)} bytes, the file has {len(content) - 100}" in refusal(official)
    shard.unlink()
    assert f"shard {shard.name} is missing" in refusal(official)


def test_incomplete_trees(official, diffusers, tmp_path):
    shutil.rmtree(official / "low_noise_model")
    assert "low_noise_model/ is missing" in refusal(official)
    shutil.rmtree(diffusers / "vae")
    assert "config.json: missing" in refusal(diffusers)
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "not a checkpoint that wan_jax knows" in refusal(tmp_path / "empty")
    (tmp_path / "file.bin").touch()
    assert "must be .safetensors" in refusal(tmp_path / "file.bin")


def test_a_pickle_with_code_in_an_official_tree(official):
    class Code:
        def __reduce__(self):
            return print, ("executed",)

    trees.archive(official / "Wan2.1_VAE.pth", pickle.dumps({"conv1.weight": Code()}, 2), {})
    assert "refused: the pickle wants to call" in refusal(official)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"in_channels": 36}, "takes 36 channels and gives 16"),
        ("transformer/config.json", {"image_dim": 1280}, "added_kv_proj_dim is None, not 256"),
        ("transformer/config.json", {"image_dim": 22, "added_kv_proj_dim": 256}, "it attends to images, and the"),
        ("transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, "_class_name is 'WanVACE"),
        ("transformer/config.json", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ("vae/config.json", {"patch_size": 2}, "in_channels is 3, not 12"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type is 't5'"),
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, "its pipeline is WanVACEPipeline"),
        (
            "model_index.json",
            {"_class_name": "WanImageToVideoPipeline"},
            "its conditioning is 'image_latents'",
        ),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is AutoencoderTiny"),
    ],
)
def test_another_family_in_the_diffusers_layout(diffusers, file, changes, message):
    change_json(diffusers / file, **changes)
    for config in ("transformer", "transformer_2"):
        if file.startswith("transformer/"):
            change_json(diffusers / config / "config.json", **changes)
    refused = refusal(diffusers)
    assert "another family" in refused
    assert message in refused


def test_parts_that_do_not_fit_together():
    text_encoder = dataclasses.replace(CONFIG.text_encoder, dim=30)
    rest = {"conditioning": "text", "experts": 2, "text_encoder": CONFIG.text_encoder, "vae": CONFIG.vae}
    with pytest.raises(InputError, match="the text encoder gives 30 features, the denoiser takes 28"):
        assemble_config("here", CONFIG.denoiser, **rest | {"text_encoder": text_encoder})
    denoiser = dataclasses.replace(CONFIG.denoiser, in_channels=8, out_channels=8)
    with pytest.raises(InputError, match="the VAE has 16 latent channels, the denoiser makes 8"):
        assemble_config("here", denoiser, **rest)
    with pytest.raises(InputError, match="the image encoder gives 1280 features, the denoiser takes None"):
        assemble_config("here", CONFIG.denoiser, **rest, image_encoder=ImageEncoderConfig())


def test_damaged_configs(diffusers):
    change_json(diffusers / "transformer" / "config.json", num_layers="many")
    assert "num_layers: 'many' is not a whole number" in refusal(diffusers)
    change_json(diffusers / "transformer" / "config.json", num_layers=1)
    assert "the two experts differ: num_layers is 1 and 2; are they from one release?" in refusal(diffusers)
    (diffusers / "transformer" / "config.json").write_text("{")
    assert "not valid JSON" in refusal(diffusers)
    change_json(diffusers / "model_index.json", transformer=[None, None])
    assert "names no transformer" in refusal(diffusers)


def with_channels(count: int):
    def change(tensors):
        weight = tensors["patch_embedding.weight"]
        tensors["patch_embedding.weight"] = np.zeros((weight.shape[0], count, *weight.shape[2:]), np.float32)

    return change


def image_embedder(tensors):
    tensors["img_emb.proj.0.weight"] = np.zeros(1280, np.float32)


def vace(tensors):
    tensors["vace_blocks.0.after_proj.weight"] = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_channels(48), "takes 48 channels and gives 16"),  # Wan2.1 Fun Control
        (image_embedder, "it attends to images, and the denoiser takes 16 channels"),
        (vace, "it has vace_blocks.0.after_proj.weight"),
    ],
)
def test_another_family_by_its_tensors(tmp_path, change, message):
    tensors = state_dict("denoiser", "official")
    change(tensors)
    trees.save(tmp_path / "wan.safetensors", tensors)
    refused = refusal(tmp_path)
    assert "another family" in refused
    assert message in refused


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (
            "i2v",
            "high_noise_model: checkpoint of another family: it says that its conditioning is 'image_latents', and",
        ),
        ("s2v", "model_type is 's2v', not one of t2v, i2v, flf2v, ti2v"),
    ],
)
def test_another_familys_official_config(official, model_type, message):
    change_json(official / "high_noise_model" / "config.json", model_type=model_type)
    assert message in refusal(official)


def test_experts_of_different_kinds(official):
    rewrite_expert(official / "high_noise_model", with_channels(36))
    (official / "high_noise_model" / "config.json").unlink()
    assert "the two experts differ: in_channels is 36 and 16" in refusal(official)


def test_two_vaes(official):
    shutil.copy(official / "Wan2.1_VAE.pth", official / "Wan2.2_VAE.pth")
    assert "both Wan2.1_VAE.pth and Wan2.2_VAE.pth are a VAE; keep the one of this model" in refusal(official)


def vae_of_48_channels(tensors):
    tensors["conv2.weight"] = np.zeros((48, 48, 1, 1, 1), np.float32)


def test_a_vae_of_another_family(official):
    tensors = state_dict("vae", "official")
    vae_of_48_channels(tensors)
    trees.save_pickle(official / "Wan2.1_VAE.pth", tensors)
    assert "its VAE has 48 latent channels" in refusal(official)


def rename(folder: pathlib.Path, old: str, new: str) -> None:
    (folder / "diffusion_models" / old).rename(folder / "diffusion_models" / new)


HIGH = "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
LOW = "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"


def test_ambiguous_comfyui_folders(comfyui_tree, official_tree, tmp_path):
    tree = shutil.copytree(comfyui_tree, tmp_path / "tree")
    rename(tree, LOW, "wan2.2.safetensors")
    assert "wan2.2.safetensors does not say whether it is the high or the low noise one" in refusal(tree)
    rename(tree, "wan2.2.safetensors", "another_high.safetensors")
    assert "are a high noise; keep one" in refusal(tree)
    shutil.rmtree(tree / "diffusion_models")
    assert "holds no denoiser" in refusal(tree)
    with pytest.raises(InputError, match="only ComfyUI files can be opened together"):
        open_checkpoint([comfyui_tree / "vae" / "wan_2.1_vae.safetensors", official_tree])


LAYER = "blocks.0.ffn.0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{LAYER}.scale_weight": None}, f"{LAYER}.weight is float8_e4m3fn and its scale is missing"),
        ({f"{LAYER}.scale_weight": np.ones(3, np.float32)}, f"the scale of {LAYER}.weight has shape [3]"),
        ({f"{LAYER}.scale_weight": np.ones((1, 52), np.float32)}, f"the scale of {LAYER}.weight has shape [1, 52]"),
        ({f"{LAYER}.weight_scale": np.ones(1, np.float32)}, f"{LAYER}.weight has two scales"),
        ({f"{LAYER}.weight": np.ones((52, 256), np.float32)}, f"{LAYER}.weight is float32 with a scale"),
        ({"blocks.9.ffn.scale_weight": np.ones(1, np.float32)}, "1 tensor is unexpected: blocks.9.ffn.scale_weight"),
        ({f"diffusion_model.{LAYER}.weight": np.ones(1, np.float32)}, f"{LAYER}.weight is there twice"),
    ],
)
def test_scales_that_do_not_fit(tmp_path, changes, message):
    tensors = trees.quantize(state_dict("denoiser", "official", "bfloat16"), "scale_weight", per_row=False) | changes
    trees.save(tmp_path / "wan.safetensors", {name: t for name, t in tensors.items() if t is not None})
    if "blocks.9" in message:  # the number of layers is that of the highest index
        message = "tensors are missing: blocks.2."
    assert message in refusal(tmp_path)
