"""Recipes are options by another road: the same names, the same checks."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from tests.lora.test_apply import write as write_lora
from tests.quick_compiles import quick_compiles  # noqa: F401
from wan_jax import Lora, WanPipeline
from wan_jax.checkpoint import open_checkpoint
from wan_jax.checkpoint.hub import HUB_FILE, local_lora
from wan_jax.cli.main import main
from wan_jax.cli.options import Options
from wan_jax.cli.recipes import RECIPES, get_recipe, load_recipe, recipe
from wan_jax.diffusion.guidance import guidance_by_expert
from wan_jax.diffusion.segments import plan_steps
from wan_jax.errors import InputError
from wan_jax.lora.names import guess_expert
from wan_jax.presets import get_preset

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


SAMPLING = [path for path in sorted(CONFIGS.glob("*.py")) if not path.stem.startswith("train_")]


@pytest.mark.parametrize("path", SAMPLING, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    options = load_recipe(["--config", str(path)])
    assert options.prompt


def test_overrides():
    options = load_recipe(
        [f"--config={CONFIGS / 't2v_a14b_480p.py'}", "--config.steps=30", "--config.guidance=3,4", "--config.shift=5"]
    )
    assert (options.steps, options.guidance, options.shift, options.size) == (30, (3, 4), 5.0, (832, 480))


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes(name):
    """In a config and by name they are the same options, the preset of their model can do them, and nothing is guided
    that has been distilled."""
    by_name = Options(**get_recipe(name))
    assert Options(**recipe(name).to_dict()) == by_name
    file = CONFIGS / f"{name.replace('-', '_')}.py"
    assert dataclasses.replace(load_recipe(["--config", str(file)]), prompt=None) == by_name
    config = get_preset(name.rpartition("-")[0])
    settings = by_name.resolve(config)
    schedule = settings.make_schedule()
    experts = plan_steps(schedule, settings.boundary)
    distilled = {"low_noise": by_name.lora_low, "high_noise": by_name.lora_high}
    scales = guidance_by_expert(settings.guidance, tuple(experts))
    assert {expert: scale == 1 for expert, scale in scales.items()} == {
        expert: bool(loras) for expert, loras in distilled.items()
    }
    high = experts.count("high_noise")
    assert (high, len(experts) - high) == ((2, 2) if name.endswith("4step") else (2, 4))
    if name.endswith("4step"):
        np.testing.assert_array_equal(schedule.timesteps, np.float32([1000, 937.5, 5000 / 6, 625]))
    for lora in (*by_name.lora_high, *by_name.lora_low):
        assert HUB_FILE.fullmatch(lora)
        expert, _ = guess_expert(pathlib.Path(lora).stem, {})
        assert lora in distilled[expert]


def test_a_mistyped_recipe(capsys):
    with pytest.raises(InputError, match="unknown recipe 't2v-4step'; did you mean 't2v-a14b-4step'"):
        recipe("t2v-4step")
    assert main(["generate", "a", "--recipe", "t2v-4step"]) == 2
    assert "unknown recipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["t2v-a14b-4step", "t2v-a14b-mixed"])
def test_generate_by_recipe(name, diffusers_tree, tmp_path, monkeypatch, capsys):
    """The recipe's options, with others over them, are the run that Python makes of the same."""
    monkeypatch.chdir(tmp_path)
    config = open_checkpoint(diffusers_tree).config.denoiser
    low = f"{write_lora(tmp_path / 'low.safetensors', 1, 4, config)}:0.5"
    high = write_lora(tmp_path / "high.safetensors", 2, 4, config)
    loras = ["--lora-low", low] + (["--lora-high", high] if name == "t2v-a14b-4step" else [])
    arguments = ["a red circle", "--recipe", name, "--checkpoint", str(diffusers_tree), *loras, "--shift", "6"]
    small = ["--size", "48x32", "--frames", "5", "--dtype", "float32", "--save-latents", "end.npy", "--json", "--quiet"]
    assert main(["generate", *arguments, *small]) == 0
    report = json.loads(capsys.readouterr().out)

    pipe = WanPipeline.from_pretrained(diffusers_tree, "float32")
    files = [Lora.parse(low, "low_noise")]
    if name == "t2v-a14b-4step":
        own = {"steps": (2, 2), "solver": "euler", "schedule": "lightx2v", "guidance": (1.0, 1.0)}
        files.append(Lora.parse(high, "high_noise"))
    else:
        own = {
            "steps": (4, 2),
            "solver": ("euler", "unipc"),
            "schedule": ("lightx2v", "official"),
            "guidance": (1.0, 4.0),
        }
    pipe.set_loras(files)
    video = pipe("a red circle", size=(48, 32), frames=5, shift=6.0, **own)
    np.testing.assert_array_equal(np.load("end.npy"), video.latents)
    assert {key: report["settings"][key] for key in own} == json.loads(json.dumps(own))
    assert report["settings"]["shift"] == 6.0
    assert len(report["settings"]["loras"]) == len(files)


def test_loras_of_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *args: asked.append(args) or str(tmp_path / "kept.safetensors")
    )
    assert local_lora("them/Loras/fast/high.safetensors") == tmp_path / "kept.safetensors"
    assert asked == [("them/Loras", "fast/high.safetensors")]
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"LoRA nobody/nothing/x.safetensors .* downloaded"):
        local_lora("nobody/nothing/x.safetensors")
    for name in ("x.safetensors", "nobody/x.safetensors", "/a/b/c/x.safetensors", "../a/b/x.safetensors"):
        with pytest.raises(InputError, match="no such file"):
            local_lora(name)


@pytest.mark.quick
def test_defaults_are_those_of_the_options():
    assert Options(**recipe().to_dict()) == Options()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.stpes=30"], "unknown key 'stpes'; did you mean 'steps'"),
        (["--config.frames=many"], "invalid literal for int"),
        (["--foo=1"], "Unknown command line flag 'foo'"),
        (["word"], "unknown argument 'word'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        load_recipe(["--config", str(CONFIGS / "demo_cpu.py"), *arguments])
    assert "\n" not in str(error.value)


def test_bad_recipe_files(tmp_path):
    misspelt = tmp_path / "misspelt.py"
    misspelt.write_text(
        "from wan_jax.cli.recipes import recipe\n\ndef get_config():\n"
        "    c = recipe()\n    c.gudance = '3'\n    return c\n"
    )
    with pytest.raises(InputError, match="unknown key 'gudance'; did you mean 'guidance'"):
        load_recipe(["--config", str(misspelt)])
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(["--config", str(tmp_path / "none.py")])
    with pytest.raises(InputError, match="name a recipe"):
        load_recipe([])
