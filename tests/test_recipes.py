"""Recipes are options by another road: the same names, the same checks."""

import pathlib

import pytest

from wan_jax.errors import InputError
from wan_jax.options import Options
from wan_jax.recipes import load_recipe, recipe

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    options = load_recipe(["--config", str(path)])
    assert options.prompt


def test_overrides():
    options = load_recipe(
        [f"--config={CONFIGS / 't2v_a14b_480p.py'}", "--config.steps=30", "--config.guidance=3,4", "--config.shift=5"]
    )
    assert (options.steps, options.guidance, options.shift, options.size) == ("30", "3,4", 5.0, "832x480")


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
        "from wan_jax.recipes import recipe\n\ndef get_config():\n    c = recipe()\n    c.gudance = '3'\n    return c\n"
    )
    with pytest.raises(InputError, match="unknown key 'gudance'; did you mean 'guidance'"):
        load_recipe(["--config", str(misspelt)])
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(["--config", str(tmp_path / "none.py")])
    with pytest.raises(InputError, match="name a recipe"):
        load_recipe([])
