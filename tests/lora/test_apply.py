"""LoRAs on a pipeline: the base stays exact, nothing compiles twice, every profile; the command line and recipes."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.trees import load_file, save
from wan_jax import Lora, WanPipeline, read_video
from wan_jax.checkpoint import convert, open_checkpoint
from wan_jax.cli.main import main
from wan_jax.cli.options import Options
from wan_jax.cli.recipes import load_recipe
from wan_jax.config import DenoiserConfig
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.lora import merge_loras, open_loras, save_lora
from wan_jax.lora.apply import adapter_bytes
from wan_jax.models.nn.linear import Adapter
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import named_parameters
from wan_jax.planning.memory import Plan
from wan_jax.runtime.offload import PROFILES
from wan_jax.testing.models import DEMO, random_pipeline
from wan_jax.text.tokenizer import Tokenizer

SMALL = {"size": (48, 32), "frames": 5, "steps": 2, "shift": 5.0, "seed": 3}
LINEARS = ("self_attention.query", "self_attention.output", "cross_attention.key", "feed_forward.up")
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **more: COMPILED.append(str(more.get("fun_name"))) if "backend_compile" in event else None
)


def write(path: pathlib.Path, seed: int, rank: int, config: DenoiserConfig, *, dtype=jnp.float32, bias: bool = True):
    """A LoRA of some Linears and a bias, in ComfyUI's names."""
    random = np.random.default_rng(seed)
    layers, dim = config.num_layers, config.dim
    shapes = {f"blocks.{name}": (layers, dim, config.ffn_dim if name.endswith("up") else dim) for name in LINEARS}
    shapes["text_embedding.linear_1"] = (config.text_dim, dim)
    adapters = {
        name: Adapter(
            jnp.asarray(random.standard_normal((*shape[:-1], rank)), dtype),
            jnp.asarray(0.05 * random.standard_normal((*shape[:-2], rank, shape[-1])), dtype),
            jnp.full((*shape[:-2], rank), 0.5, jnp.float32),
            axes=(None, None),
        )
        for name, shape in shapes.items()
    }
    save_lora(path, adapters, config, "comfyui")
    if bias:
        tensors = load_file(path)
        change = random.standard_normal(dim, np.float32)
        save(path, tensors | {"diffusion_model.blocks.1.self_attn.v.diff_b": change})
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    kinds = {"a": (1, 9, "float32"), "b": (2, 16, "float32"), "c": (3, 17, "float32"), "half": (4, 12, "bfloat16")}
    return {
        name: write(folder / f"{name}.safetensors", seed, rank, DEMO.denoiser, dtype=dtype)
        for name, (seed, rank, dtype) in kinds.items()
    }


def make(tokenizer_folder, profile: str = "resident") -> WanPipeline:
    placement = Placement(offload=PROFILES[profile])
    return random_pipeline(DEMO, Tokenizer.from_pretrained(tokenizer_folder), placement=placement)


@pytest.fixture(scope="module")
def pipe(tokenizer_folder):
    return make(tokenizer_folder)


def latents(pipe: WanPipeline, **choices) -> np.ndarray:
    return next(pipe.results([SamplingParams("a red circle", **SMALL, **choices)])).latents


def test_set_and_unset_give_back_every_bit(pipe, files):
    arrays = {name: named_parameters(denoiser) for name, denoiser in pipe.denoisers.items()}
    bits = {
        name: {key: np.asarray(array).view(np.uint16).copy() for key, array in each.items()}
        for name, each in arrays.items()
    }
    before = latents(pipe)
    (report,) = pipe.set_loras([Lora(files["a"], 0.8)])
    assert report.as_json()["low_rank"] == 4 * DEMO.denoiser.num_layers + 1
    assert report.as_json()["added_whole"] == 1
    changed = latents(pipe)
    assert np.abs(changed - before).max() > 0.01
    pipe.set_loras([])
    np.testing.assert_array_equal(latents(pipe), before)
    for name, denoiser in pipe.denoisers.items():
        for key, array in named_parameters(denoiser).items():
            assert array is arrays[name][key]
            np.testing.assert_array_equal(np.asarray(array).view(np.uint16), bits[name][key])
    pipe.set_loras([Lora(files["a"], 0.8)])
    np.testing.assert_array_equal(latents(pipe), changed)
    pipe.set_loras([Lora(files["a"], 0.0)])  # adapters of strength 0: the base, from another program
    np.testing.assert_allclose(latents(pipe), before, atol=0.01 * np.abs(changed - before).max())


def test_strengths_and_files_of_the_same_rank_compile_nothing(pipe, files):
    pipe.set_loras([Lora(files["a"], 0.8), Lora(files["a"], 0.3, "low_noise")])
    pipe.set_loras([Lora(files["a"], 0.8)])
    latents(pipe)
    COMPILED.clear()
    seen = []
    for loras in ([Lora(files["a"], 0.2)], [Lora(files["b"], -1.0)], [Lora(files["a"], 0.1, e) for e in EXPERTS]):
        pipe.set_loras(loras)
        seen.append(latents(pipe))
    assert COMPILED == []
    assert min(np.abs(one - other).max() for one, other in itertools.pairwise(seen)) > 1e-3
    pipe.set_loras([files["half"]])
    latents(pipe)
    assert set(COMPILED) <= {"jit(_transposed)"}  # brings the factors of another dtype to float32; no step
    pipe.set_loras([files["c"]])  # 17 columns are filled up to 32
    latents(pipe)
    assert any("step" in name for name in COMPILED)  # so the count counts


EXPERTS = ("high_noise", "low_noise")


def test_each_expert_its_own(pipe, files):
    pipe.set_loras([])
    plain = latents(pipe)
    pipe.set_loras([Lora(files["a"], expert="low_noise")])
    low = latents(pipe)
    pipe.set_loras([Lora(files["a"], expert="high_noise")])
    high = latents(pipe)
    assert named_parameters(pipe.denoisers["low_noise"]).keys() < named_parameters(pipe.denoisers["high_noise"]).keys()
    pipe.set_loras([Lora(files["a"], expert="low_noise"), Lora(files["a"], expert="high_noise")])
    np.testing.assert_array_equal(latents(pipe), _both(pipe, files))
    for one, other in ((plain, low), (plain, high), (low, high)):
        assert np.abs(one - other).max() > 1e-3


def test_around_8_bits(pipe, files):
    pipe.set_loras([])
    plain, plain_8_bit = latents(pipe), latents(pipe, weights="int8")
    pipe.set_loras([files["a"]])
    adapted, adapted_8_bit = latents(pipe), latents(pipe, weights="int8")
    change = np.abs(adapted - plain).mean()
    for ours, exact in ((plain_8_bit, plain), (adapted_8_bit, adapted)):
        assert 0 < np.abs(ours - exact).mean() < change / 3
    pipe.set_loras([])
    np.testing.assert_array_equal(latents(pipe, weights="int8"), plain_8_bit)


def _both(pipe, files) -> np.ndarray:
    pipe.set_loras([files["a"]])
    return latents(pipe)


@pytest.mark.parametrize("profile", ["swap", "stream"])
def test_every_memory_profile_gives_the_same_bits(pipe, files, tokenizer_folder, profile):
    loras = [Lora(files["a"], 0.8), Lora(files["b"], 0.5, "low_noise")]
    pipe.set_loras(loras)
    other = make(tokenizer_folder, profile)
    other.set_loras(loras)
    np.testing.assert_array_equal(latents(other), latents(pipe))
    np.testing.assert_array_equal(latents(other, weights="int8"), latents(pipe, weights="int8"))
    parameters = named_parameters(other.denoisers["low_noise"])
    assert {array.sharding.memory_kind for array in parameters.values()} == {"pinned_host"}
    assert not any(array.is_deleted() for array in parameters.values())
    other.set_loras([])
    pipe.set_loras([])
    np.testing.assert_array_equal(latents(other), latents(pipe))


def test_a_bad_file_leaves_the_loras_as_they_are(pipe, files, tmp_path):
    pipe.set_loras([files["a"]])
    before = pipe.denoisers
    wrong = save_small(tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match="match nothing in this model"):
        pipe.set_loras([files["b"], wrong])
    assert pipe.denoisers is before
    assert pipe.loras == (Lora(files["a"]),)


def save_small(path: pathlib.Path) -> str:
    save(path, {"diffusion_model.blocks.0.attn.lora_A.weight": np.zeros((2, 3), np.float32)})
    return str(path)


def test_the_video_names_its_loras(pipe, files):
    pipe.set_loras([Lora(files["a"], 0.25, "low_noise")])
    metadata = pipe.metadata(SamplingParams("a", **SMALL).resolve(DEMO))
    assert metadata["loras"] == [{"file": files["a"], "strength": 0.25, "expert": "low_noise"}]
    pipe.set_loras([])
    assert "loras" not in pipe.metadata(SamplingParams("a", **SMALL).resolve(DEMO))


def test_the_plan_knows_the_adapters(pipe, files):
    pipe.set_loras([files["c"], Lora(files["a"], expert="high_noise")])
    for name, active in open_loras(pipe.loras, DEMO).by_expert.items():
        held = named_parameters(pipe.denoisers[name])
        nbytes = sum(array.nbytes for key, array in held.items() if ".adapter." in key)
        assert adapter_bytes(active, DEMO.denoiser) == nbytes
    settings = SamplingParams(**SMALL).resolve(DEMO)
    without, with_adapters = (Plan(DEMO, settings, "bfloat16", adapter_bytes=n) for n in (0, 1000))
    for profile, experts in (("resident", 2), ("swap", 1), ("stream", 1)):
        before, after = (plan.without_workspace(PROFILES[profile]) for plan in (without, with_adapters))
        assert after["denoise"] - before["denoise"] == experts * 1000


# The command line and recipes, on a checkpoint that diffusers saved.

COMMAND = ["--size", "48x32", "--frames", "5", "--steps", "2", "--dtype", "float32", "--quiet"]


@pytest.fixture(scope="module")
def style(diffusers_tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("style") / "style.safetensors"
    return write(path, 4, 4, open_checkpoint(diffusers_tree).config.denoiser, bias=True)


@pytest.fixture(scope="module")
def by_python(diffusers_tree, style):
    pipe = WanPipeline.from_pretrained(diffusers_tree, "float32")
    pipe.set_loras([Lora(style, 0.5), Lora(style, 0.25, "low_noise")])
    return pipe("a red circle", size=(48, 32), frames=5, steps=2).latents


def test_generate(diffusers_tree, style, by_python, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--lora", f"{style}:0.5", "--lora-low", f"{style}:0.25", "--save-latents", "end.npy", "--json"]
    assert main(["generate", "a red circle", "--checkpoint", str(diffusers_tree), *COMMAND, *options]) == 0
    np.testing.assert_array_equal(np.load("end.npy"), by_python)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = [
        {"file": style, "strength": 0.5, "expert": "both"},
        {"file": style, "strength": 0.25, "expert": "low_noise"},
    ]
    assert report["settings"]["loras"] == expected
    assert [each["file"] for each in report["loras"]] == [style]
    assert report["loras"][0]["ignored"] == {}
    assert read_video(tmp_path / "out.mp4").metadata["loras"] == expected


def test_errors_come_before_the_weights(diffusers_tree, style, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wan_jax.checkpoint.Checkpoint.load", None)
    command = ["generate", "a", "--checkpoint", str(diffusers_tree), *COMMAND]
    for file, message in (
        ("none.safetensors:2", "LoRA none.safetensors: no such file"),
        (save_small(tmp_path / "wrong.safetensors"), "1 of its 1 keys match nothing in this model"),
        (f"{style}:inf", "strength inf"),
    ):
        assert main([*command, "--lora-high", file]) == 2
        assert message in capsys.readouterr().err


def test_recipes(style, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from wan_jax.cli.recipes import recipe\n\ndef get_config():\n    c = recipe()\n"
        f"    c.prompt = 'a'\n    c.lora = ({style!r},)\n    return c\n"
    )
    options = load_recipe(["--config", str(path), "--config.lora_high=('x.safetensors:0.5',)"])
    assert options == Options(prompt="a", lora=(style,), lora_high=("x.safetensors:0.5",))


@pytest.mark.parametrize("to", ["orbax", "diffusers", "official"])
def test_a_merged_checkpoint_is_the_same_model(diffusers_tree, style, by_python, to, tmp_path, capsys):
    merge = ["--merge-lora", f"{style}:0.5", "--merge-lora-low", f"{style}:0.25"]
    assert main(["convert", str(diffusers_tree), str(tmp_path / "merged"), "--to", to, "--quiet", *merge]) == 0
    assert "style.safetensors: 9 low-rank changes of rank 4" in capsys.readouterr().out
    plain, merged = open_checkpoint(diffusers_tree), open_checkpoint(tmp_path / "merged")
    pipe = WanPipeline.from_pretrained(diffusers_tree, "float32")
    pipe.set_loras([Lora(style, 0.5), Lora(style, 0.25, "low_noise")])
    for component in plain.components:
        before, after = (checkpoint.load(component, "float32") for checkpoint in (plain, merged))
        adapted = named_parameters(pipe.denoisers[component]) if component in EXPERTS else {}
        changed = {name.partition(".adapter")[0] + ".kernel" for name in adapted if ".adapter." in name}
        assert len(changed) == (5 if adapted else 0)
        changed |= {"blocks.self_attention.value.bias"} if adapted else set()
        for name, array in after.items():
            if name not in changed:
                np.testing.assert_array_equal(array, before[name])
            elif name.endswith("kernel"):
                adapter = {part: adapted[f"{name[:-7]}.adapter.{part}"] for part in ("down", "up", "scale")}
                change = (adapter["down"] * adapter["scale"][..., None, :]) @ adapter["up"]
                np.testing.assert_allclose(array, before[name] + change, atol=1e-6)  # sums in another order
            else:
                np.testing.assert_array_equal(array, adapted[name])


def merged(path, lora: Lora):
    checkpoint = open_checkpoint(path)
    return merge_loras(checkpoint, open_loras([lora], checkpoint.config))


def test_merging_rounds_once(diffusers_tree, style, tmp_path):
    """To bfloat16: the float32 sum rounded, not the sum of what was rounded."""
    for dtype, name in ((None, "exact"), ("bfloat16", "half")):
        convert(merged(diffusers_tree, Lora(style, expert="high_noise")), tmp_path / name, dtype=dtype)
    exact, half = (
        open_checkpoint(tmp_path / name).load("high_noise", dtype)
        for name, dtype in (("exact", "float32"), ("half", "bfloat16"))
    )
    for name, array in exact.items():
        np.testing.assert_array_equal(half[name], array.astype(jnp.bfloat16), err_msg=name)


def test_merging_needs_the_expert(diffusers_tree, style, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        merged(diffusers_tree, Lora("none.safetensors"))
    convert(diffusers_tree, tmp_path / "official", to="official")
    with pytest.raises(InputError, match="has one expert, no low_noise one"):
        merged(tmp_path / "official" / "low_noise_model", Lora(style, expert="low_noise"))
