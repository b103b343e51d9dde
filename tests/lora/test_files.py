"""LoRA files: every dialect by the formula, adversarial files, writing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests.lora import lora_files
from tests.lora.lora_files import CONFIG, DIALECTS, MODULES, pairs, save, tensors, write
from wan_jax.checkpoint.tables import expanded_table
from wan_jax.checkpoint.tables.denoiser import denoiser_table
from wan_jax.config import DenoiserConfig, SamplingConfig, WanConfig
from wan_jax.errors import InputError
from wan_jax.lora import Lora, open_loras, save_lora
from wan_jax.lora.apply import AdaptedDenoiser
from wan_jax.lora.files import ActiveLora, open_lora
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.nn.linear import Adapter
from wan_jax.parameters import named_parameters
from wan_jax.runtime.offload import single_device
from wan_jax.testing.models import random_model

TWO = WanConfig(name="two", denoiser=CONFIG)
ONE = WanConfig(name="one", denoiser=CONFIG, sampling=SamplingConfig(boundary=None))
BLOCK_MODULES = {name: module for name, module in MODULES.items() if name.startswith("blocks.")}

HERE = lambda axes: single_device(jax.devices()[0], on_host=False)  # noqa: E731
MERGE, MERGE_LAYERS = jax.jit(Adapter.merged), jax.jit(jax.vmap(Adapter.merged))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request):
    return random_model(Denoiser, CONFIG, request.param)


def active(path: str, strength: float = 1.0) -> ActiveLora:
    file = open_lora(path, CONFIG)
    return ActiveLora(file, file.changes_of("denoiser"), strength)


def adapted(base: Denoiser, *loras: ActiveLora) -> Denoiser:
    return AdaptedDenoiser(base, HERE).with_loras(loras)


def effective(model: Denoiser, config: DenoiserConfig = CONFIG) -> dict[str, np.ndarray]:
    """Every parameter, layer by layer, as a forward pass uses it."""
    arrays = {name: array for name, array in named_parameters(model).items() if ".adapter." not in name}
    for name in {name.partition(".adapter.")[0] for name in named_parameters(model) if ".adapter." in name}:
        module = model
        for part in name.split("."):
            module = getattr(module, part)
        merge = MERGE if module.kernel[...].ndim == 2 else MERGE_LAYERS
        arrays[f"{name}.kernel"] = merge(module.adapter, module.kernel[...])
    found = {}
    for mapping in denoiser_table(config):
        array = np.asarray(arrays[mapping.stacked_name])
        if mapping.per_layer:
            found |= {mapping.at(layer).name: array[layer] for layer in range(config.num_layers)}
        else:
            found[mapping.name] = array
    return found


def assert_changed(model: Denoiser, base: Denoiser, changes: dict[str, np.ndarray]) -> None:
    """Every parameter is the base's plus its change, rounded once; those without a change are the same bits."""
    before, after = effective(base), effective(model)
    assert set(changes) <= set(before)
    for name, array in after.items():
        assert array.dtype == before[name].dtype
        if name not in changes:
            np.testing.assert_array_equal(array, before[name], err_msg=name)
            continue
        exact = np.float64(before[name]) + changes[name]
        assert np.abs(changes[name]).max() > 1e-3, name
        # Half a unit in the last place; and, on top, what float32 adds in: a few roundings of sums of this size.
        digits = 7 if array.dtype == jnp.bfloat16 else 23
        unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - digits)
        bound = 0.5 * unit + 8 * 2.0**-24 * (np.abs(exact) + np.abs(changes[name]).max())
        assert (np.abs(np.float64(array) - exact) <= bound).all(), name


def scaled(changes: dict[str, np.ndarray], strength: float) -> dict[str, np.ndarray]:
    return {name: strength * change for name, change in changes.items()}


def added(*all_changes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for changes in all_changes:
        for name, change in changes.items():
            total[name] = total.get(name, 0) + change
    return total


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_the_formula(base, dialect, tmp_path):
    """All Linears of the model, ranks from 3 to 5, alpha 2, strength 0.7; kohya's files hold blocks only."""
    content = pairs(modules=BLOCK_MODULES if dialect == "kohya" else MODULES)
    has_alpha = DIALECTS[dialect][4] or dialect in ("diffusers", "peft")
    path = write(tmp_path / "x.safetensors", dialect, content, alpha=2.0)
    expected = lora_files.formula(content, 2.0 if has_alpha else None)
    assert_changed(adapted(base, active(path, 0.7)), base, scaled(expected, 0.7))
    report = open_lora(path, CONFIG).as_json()
    assert report["low_rank"] == len(content)
    assert report["ranks"] == [3, 4, 5]
    assert not report["ignored"]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_factors_in_half_precision_multiply_exactly(base, dtype, tmp_path):
    content = {
        name: tuple(factor.astype(dtype).astype(np.float32) for factor in factors) for name, factors in pairs().items()
    }
    path = write(tmp_path / "x.safetensors", "comfyui", content, dtype=dtype)
    assert_changed(adapted(base, active(path)), base, lora_files.formula(content))


def test_whole_changes_with_factors_and_without(base, tmp_path):
    """diff, diff_b, diff_m and norm diffs; head.head has factors and a diff, which are rounded together."""
    wholes, expected = lora_files.wholes()
    content = pairs()
    path = save(tmp_path / "x.safetensors", tensors("comfyui", content, 2.0) | wholes)
    changes = added(lora_files.formula(content, 2.0), expected)
    model = adapted(base, active(path, 0.5))
    assert_changed(model, base, scaled(changes, 0.5))
    assert open_lora(path, CONFIG).as_json()["added_whole"] == len(wholes)
    before, after = named_parameters(base), named_parameters(model)
    shared = {name for name in before if after[name] is before[name]}
    assert shared == {name for name in before if name not in {_stacked(ours) for ours in expected}}


def _stacked(ours: str) -> str:
    return ".".join(part for part in ours.split(".") if not part.isdigit())


def test_several_loras_add_up_and_scales_change_without_reading(base, tmp_path):
    first, second = pairs(rank=3, seed=1), pairs(rank=17, seed=2, modules=BLOCK_MODULES)
    wholes, whole_changes = lora_files.wholes()
    wholes, whole_changes = (
        {name: value for name, value in each.items() if "head" not in name} for each in (wholes, whole_changes)
    )
    one = write(tmp_path / "1.safetensors", "diffusers", first, alpha=1.5)
    two = save(tmp_path / "2.safetensors", tensors("kohya", second, dtype=ml_dtypes.bfloat16) | wholes)
    second = {name: tuple(f.astype(ml_dtypes.bfloat16).astype(np.float32) for f in fs) for name, fs in second.items()}
    changes = lora_files.formula(first, 1.5), added(lora_files.formula(second), whole_changes)
    holder = AdaptedDenoiser(base, HERE)
    model = holder.with_loras([active(one, 0.7), active(two, -0.4)])
    assert_changed(model, base, added(scaled(changes[0], 0.7), scaled(changes[1], -0.4)))
    # 3 to 5 and 17 to 19 columns, filled up to 32.
    assert model.blocks.self_attention.query.adapter.down.shape == (2, 36, 32)
    assert model.head.linear.adapter.down.shape == (36, 16)

    again = holder.with_loras([active(one, 0.1), active(two, 0.0)])
    assert_changed(again, base, scaled(changes[0], 0.1))
    assert again.head.linear.adapter.down[...] is model.head.linear.adapter.down[...]
    assert nnx.split(again)[0] == nnx.split(model)[0]
    assert holder.with_loras([]) is base


def test_a_file_that_was_rewritten_is_read_again(tmp_path):
    base = random_model(Denoiser, CONFIG, "float32")
    holder = AdaptedDenoiser(base, HERE)
    for seed in (0, 1):
        path = write(tmp_path / "x.safetensors", "comfyui", pairs(seed=seed))
        model = holder.with_loras([active(path)])
    assert_changed(model, base, lora_files.formula(pairs(seed=1)))


def test_peft_bias_patterns_and_rslora(tmp_path):
    base = random_model(Denoiser, CONFIG, "float32")
    names = ["blocks.0.self_attention.query", "blocks.1.self_attention.query", "head.linear"]
    content = {name: factors for name, factors in pairs(4).items() if name in names}
    bias = np.linspace(-1, 1, 36, dtype=np.float32)
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"blocks.1.attn1.to_q": 2, "^head": 5}, "use_rslora": True}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}
    stored = tensors("diffusers", content) | {"transformer.blocks.0.attn1.to_q.lora_B.bias": bias}
    path = save(tmp_path / "x.safetensors", stored, metadata)
    scales = {name: alpha / len(content[name][0]) ** 0.5 for name, alpha in zip(names, (8, 2, 8), strict=True)}
    changes = {f"{name}.kernel": (np.float64(up) @ down).T * scales[name] for name, (down, up) in content.items()}
    changes["blocks.0.self_attention.query.bias"] = scales[names[0]] * np.float64(bias)
    assert_changed(adapted(base, active(path)), base, changes)


def test_an_alpha_of_zero_is_none(tmp_path):
    base = random_model(Denoiser, CONFIG, "float32")
    path = write(tmp_path / "x.safetensors", "kohya", pairs(modules=BLOCK_MODULES), alpha=0.0)
    assert_changed(adapted(base, active(path)), base, lora_files.formula(pairs(modules=BLOCK_MODULES)))


# Which expert.


def test_a_file_for_both_experts_of_diffusers(tmp_path):
    high, low = pairs(seed=1), pairs(seed=2)
    second = {f"transformer_2.{name.partition('.')[2]}": t for name, t in tensors("diffusers", low).items()}
    path = save(tmp_path / "x.safetensors", tensors("diffusers", high) | second)
    opened = open_loras([Lora(path)], TWO)
    for expert, content in (("high_noise", high), ("low_noise", low)):
        (lora,) = opened.by_expert[expert]
        change = lora.changes["head.linear.kernel"]
        expected = lora_files.formula(content)["head.linear.kernel"].T
        np.testing.assert_allclose(lora.file.delta(change), expected, atol=1e-6)
    opened = open_loras([Lora(path, expert="low_noise")], TWO)
    assert [len(opened.by_expert[expert]) for expert in ("high_noise", "low_noise")] == [0, 1]
    with pytest.raises(InputError, match="changes only high_noise, low_noise, not denoiser"):
        open_loras([Lora(path)], ONE)
    only = save(tmp_path / "y.safetensors", second)
    with pytest.raises(InputError, match="changes only low_noise, not high_noise"):
        open_loras([Lora(only, expert="high_noise")], TWO)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("wan2.2_t2v_A14b_high_noise_lora_rank64_4step", "high_noise"),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16", "high_noise"),
        ("style-lowNoise-v2", "low_noise"),
        ("high_noise_model", "high_noise"),
        ("my_low", "low_noise"),
        ("high_res_style", None),
        ("low-rank-adapter", None),
        ("highlands", None),
        ("slow_motion", None),
        ("high_to_low", None),
    ],
)
def test_names_that_tell_the_expert(name, hint, tmp_path):
    path = write(tmp_path / f"{name}.safetensors", "comfyui", pairs())
    assert open_lora(path, CONFIG).expert_hint[0] == hint
    notes = open_loras([Lora(path)], TWO).notes
    assert len(notes) == (1 if hint is None else 2)
    if hint is not None:
        right = hint.removesuffix("_noise")
        assert all(part in notes[1] for part in (f"{name}.safetensors", f"{right}_noise", f"--lora-{right}"))
        assert len(open_loras([Lora(path, expert=f"{right}_noise")], TWO).notes) == 1
    assert len(open_loras([Lora(path)], ONE).notes) == 1


def test_titles_and_our_own_metadata_tell_the_expert(tmp_path):
    stored = tensors("comfyui", pairs())
    titled = save(tmp_path / "a.safetensors", stored, {"modelspec.title": "Cats (LOW)"})
    assert "its title is 'Cats (LOW)'" in open_loras([Lora(titled)], TWO).notes[1]
    certain = save(tmp_path / "b.safetensors", stored, {"wan_expert": "high_noise"})
    assert len(open_loras([Lora(certain, expert="high_noise")], TWO).by_expert["high_noise"]) == 1
    for expert in ("both", "low_noise"):
        with pytest.raises(InputError, match="was made for the high_noise expert, by its metadata; use --lora-high"):
            open_loras([Lora(certain, expert=expert)], TWO)


def test_what_the_user_asks_for():
    assert Lora.parse("a.safetensors") == Lora("a.safetensors", 1.0)
    assert Lora.parse("a.safetensors:0.5", "low_noise") == Lora("a.safetensors", 0.5, "low_noise")
    assert Lora.parse("C:/a.safetensors:-2") == Lora("C:/a.safetensors", -2.0)
    assert Lora.parse("C:/a.safetensors") == Lora("C:/a.safetensors")
    with pytest.raises(InputError, match="strength nan is not a finite number"):
        Lora.parse("a:nan")
    with pytest.raises(InputError, match="unknown expert of a LoRA 'high'; did you mean 'high_noise'"):
        Lora("a", expert="high")
    with pytest.raises(InputError, match="one has one expert, no high_noise one"):
        open_loras([Lora(__file__, expert="high_noise")], ONE)


# Files that must be refused, in one line.


def refusal(path, config=CONFIG) -> str:
    with pytest.raises(InputError) as error:
        open_lora(path, config)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_missing_damaged_and_empty_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04" + b"pickled" * 100)
    assert "not a safetensors file" in refusal(tmp_path / "x.safetensors")
    assert "changes nothing that this model has" in refusal(save(tmp_path / "y.safetensors", {}))


def test_unknown_keys_name_the_nearest(tmp_path):
    stored = tensors("comfyui", pairs())
    stored["diffusion_model.blocks.0.self_atn.q.lora_down.weight"] = np.zeros((3, 36), np.float32)
    stored["diffusion_model.blocks.1.norm1.diff"] = np.zeros(36, np.float32)  # a norm without a weight
    stored["lora_te_encoder_q.alpha"] = np.zeros((), np.float32)
    stored["diffusion_model.blocks.0.self_attn.norm_q.diff_b"] = np.zeros(36, np.float32)  # a norm without a bias
    message = refusal(save(tmp_path / "x.safetensors", stored))
    assert f"4 of its {len(stored)} keys match nothing in this model: " in message
    assert "blocks.0.self_atn.q.lora_down.weight (nearest: blocks.0.self_attn.q" in message
    assert message.endswith(" and 1 more")


@pytest.mark.parametrize(
    ("name", "method"),
    [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA"), ("lora_magnitude_vector.weight", "DoRA")],
)
def test_other_methods_are_named(name, method, tmp_path):
    stored = tensors("comfyui", pairs()) | {f"diffusion_model.blocks.0.ffn.0.{name}": np.zeros((3, 3), np.float32)}
    assert f"belongs to a {method}, which is not supported" in refusal(save(tmp_path / "x.safetensors", stored))


def test_half_pairs_doubles_and_bad_alphas(tmp_path):
    path, stored = tmp_path / "x.safetensors", tensors("comfyui", pairs(), 1.0)
    query = "diffusion_model.blocks.0.self_attn.q"

    def message(**changes) -> str:
        changed = stored | {f"{query}.{name}": tensor for name, tensor in changes.items()}
        return refusal(save(path, {name: tensor for name, tensor in changed.items() if tensor is not None}))

    assert f"{query}.lora_down.weight stands without its up factor" in message(**{"lora_up.weight": None})
    assert "stands without its down factor" in message(**{"lora_down.weight": None})
    lonely = {"lora_down.weight": None, "lora_up.weight": None}
    assert f"{query}.alpha stands without its down factor" in message(**lonely)
    twice = message(**{"lora_A.weight": np.zeros((3, 36), np.float32)})
    assert all(name in twice for name in (f"{query}.lora_A.weight", f"{query}.lora_down.weight", "one parameter"))
    assert "must be one finite number" in message(alpha=np.float32("nan"))
    assert "must be one finite number" in message(alpha=np.ones(2, np.float32))
    assert "[3, 36] and" in message(**{"lora_up.weight": np.zeros((36, 4), np.float32)})
    assert "do not multiply" in message(**{"lora_up.weight": np.zeros((36, 4), np.float32)})
    assert "do not multiply" in message(**{"lora_down.weight": np.zeros(36, np.float32)})
    assert "which is no dtype of weights" in message(**{"lora_down.weight": np.zeros((3, 36), np.int8)})
    norm = {
        "norm_q.lora_down.weight": np.zeros((3, 36), np.float32),
        "norm_q.lora_up.weight": np.zeros((36, 3), np.float32),
    }
    changed = stored | {f"diffusion_model.blocks.0.self_attn.{name}": tensor for name, tensor in norm.items()}
    assert "norm_q.weight is a vector" in refusal(save(path, changed))


def test_wrong_shapes_and_wrong_models(tmp_path):
    path, stored = tmp_path / "x.safetensors", tensors("comfyui", pairs())
    name = "diffusion_model.blocks.0.ffn.0.lora_up.weight"
    wrong = stored | {name: stored[name][:50]}
    assert f"does not fit this model: {name} is [50, 5] and must be [52, 5]" in refusal(save(path, wrong))
    wrong = stored | {"diffusion_model.blocks.0.diff_m": np.zeros((6, 35), np.float32)}
    assert "blocks.0.diff_m is [6, 35] and must be [1, 6, 36]" in refusal(save(path, wrong))
    save(path, stored)
    assert refusal(path, dataclasses.replace(CONFIG, dim=60)).endswith("it is for a model of width 36")
    assert "changes layer 1, and this model has 1 layers" in refusal(path, dataclasses.replace(CONFIG, num_layers=1))
    small = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{name}.weight": np.zeros(shape, np.float32)
        for name, shape in (("down", (4, 1536)), ("up", (1536, 4)))
    }
    assert refusal(save(path, small)).endswith("it is for a model of width 1536 (t2v-1.3b)")
    whole = {mapping.names.official: np.zeros(mapping.torch_shape, np.float32) for mapping in expanded_table(CONFIG)}
    assert "is it a checkpoint?" in refusal(save(path, whole))


def test_bad_adapter_metadata(tmp_path):
    path, stored = tmp_path / "x.safetensors", tensors("diffusers", pairs())
    assert "is not a JSON object" in refusal(save(path, stored, {"lora_adapter_metadata": "{"}))
    assert "is a DoRA" in refusal(save(path, stored, {"lora_adapter_metadata": '{"transformer.use_dora": true}'}))


def test_image_keys_are_ignored_where_there_are_no_images(tmp_path):
    stored = tensors("comfyui", pairs())
    images = {
        "blocks.0.cross_attn.k_img.lora_down.weight": np.zeros((3, 36), np.float32),
        "blocks.0.cross_attn.k_img.lora_up.weight": np.zeros((36, 3), np.float32),
        "blocks.1.cross_attn.v_img.diff_b": np.zeros(36, np.float32),
        "blocks.1.cross_attn.norm_k_img.diff": np.zeros(36, np.float32),
        "img_emb.proj.1.lora_down.weight": np.zeros((3, 1280), np.float32),
        "img_emb.proj.4.diff": np.zeros(36, np.float32),
    }
    path = save(tmp_path / "x.safetensors", stored | {f"diffusion_model.{n}": t for n, t in images.items()})
    file = open_lora(path, CONFIG)
    assert set(file.ignored) == {f"diffusion_model.{name}" for name in images}
    assert str(file).endswith("6 keys ignored: image conditioning, which this model does not have")
    assert file.as_json()["matched"] == len(stored)
    kohya = save(
        tmp_path / "y.safetensors",
        tensors("kohya", pairs(modules=BLOCK_MODULES)) | {"lora_unet_blocks_0_cross_attn_k_img.alpha": np.float32(1.0)},
    )
    assert len(open_lora(kohya, CONFIG).ignored) == 1


# Writing.


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (12, 16.0), (7, 0.1)])
def test_what_is_written_reads_back_bit_by_bit(style, rank, alpha, tmp_path):
    base = random_model(Denoiser, CONFIG, "float32")
    random = np.random.default_rng(0)
    adapters = {}
    for name in ("blocks.cross_attention.key", "blocks.feed_forward.down", "head.linear"):
        *layers, inputs, outputs = named_parameters(base)[f"{name}.kernel"].shape
        adapters[name] = Adapter(
            jnp.asarray(random.standard_normal((*layers, inputs, rank)), jnp.bfloat16),
            jnp.asarray(random.standard_normal((*layers, rank, outputs)), jnp.bfloat16),
            jnp.full((*layers, rank), alpha / rank, jnp.float32),
            axes=(None, None),
        )
    path = tmp_path / "x.safetensors"
    save_lora(path, adapters, CONFIG, style, expert="low_noise", metadata={"title": "cats"})
    file = open_lora(path, CONFIG)
    assert file.expert_hint == ("low_noise", "wan_expert")
    assert file.store.metadata["title"] == "cats"
    model = adapted(base, ActiveLora(file, file.changes_of("low_noise"), 1.0))
    for name, adapter in adapters.items():
        module = model
        for part in name.split("."):
            module = getattr(module, part)
        read = module.adapter
        np.testing.assert_array_equal(read.down[..., :rank], adapter.down[...].astype(jnp.float32))
        np.testing.assert_array_equal(read.up[..., :rank, :], adapter.up[...].astype(jnp.float32))
        np.testing.assert_array_equal(read.scale[..., :rank], adapter.scale[...])
        for rest in (read.down[..., rank:], read.up[..., rank:, :], read.scale[..., rank:]):
            assert not np.asarray(rest).any()
    names = set(file.store.tensors)
    if style == "diffusers":
        assert {"transformer.proj_out.lora_A.weight", "transformer.blocks.1.attn2.to_k.lora_B.weight"} < names
        config = json.loads(file.store.metadata["lora_adapter_metadata"])
        assert (config["transformer.r"], config["transformer.lora_alpha"]) == (rank, pytest.approx(alpha))
    else:
        assert {"diffusion_model.head.head.alpha", "diffusion_model.blocks.0.ffn.2.lora_up.weight"} < names
    with pytest.raises(InputError, match="unknown style of LoRA files 'kohya'"):
        save_lora(path, adapters, CONFIG, "kohya")


def test_attention_to_images_and_convolution_factors(tmp_path):
    """Wan2.1 image to video has more Linears; a patch embedding's factors may have a convolution's axes."""
    config = dataclasses.replace(CONFIG, image_dim=20, in_channels=36)
    base = random_model(Denoiser, config, "float32")
    random = np.random.default_rng(3)
    stored, changes = {}, {}
    modules = {
        "blocks.1.cross_attn.k_img": (36, 36),
        "blocks.0.cross_attn.v_img": (36, 36),
        "img_emb.proj.1": (20, 20),
        "img_emb.proj.3": (36, 20),
    }
    for module, (outputs, inputs) in modules.items():
        stored[f"diffusion_model.{module}.lora_down.weight"] = random.random((2, inputs), np.float32)
        stored[f"diffusion_model.{module}.lora_up.weight"] = random.random((outputs, 2), np.float32)
    down, up = random.random((3, 36, 1, 2, 2), np.float32), random.random((36, 3, 1, 1, 1), np.float32)
    stored["diffusion_model.patch_embedding.lora_down.weight"] = down
    stored["diffusion_model.patch_embedding.lora_up.weight"] = up
    changes["patch_embedding.kernel"] = (up.reshape(36, 3) @ down.reshape(3, -1)).T
    file = open_lora(save(tmp_path / "x.safetensors", stored), config)
    assert not file.ignored
    assert len(file.changes["both"]) == 5
    model = adapted(base, ActiveLora(file, file.changes["both"], 1.0))
    before, after = effective(base, config), effective(model, config)
    for module in modules:
        (mapping,) = (mapping for mapping in expanded_table(config) if mapping.names.official == f"{module}.weight")
        name = f"diffusion_model.{module}"
        factors = stored[f"{name}.lora_up.weight"] @ stored[f"{name}.lora_down.weight"]
        changes[mapping.name] = factors.T
    for name, array in after.items():
        np.testing.assert_allclose(array, before[name] + changes.get(name, 0), atol=1e-5)  # sums in another order
