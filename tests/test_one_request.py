"""The way of one prompt's options from the command line to the compiled step: short, down, and nothing twice."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.lora.test_apply import write as write_lora
from tests.test_image_to_video import I2V, picture
from wan_jax.cli.main import main
from wan_jax.diffusion.params import SamplingParams
from wan_jax.testing.models import write_demo

MOST_FUNCTIONS = 30


@pytest.fixture
def opened():
    """How often each file is opened from now on. An audit hook stays for ever, so that it is told when to stop."""
    counts: Counter[str] = Counter()
    counting = [True]

    def count(event: str, arguments: tuple) -> None:
        if event == "open" and counting[0] and isinstance(arguments[0], str | os.PathLike):
            counts[os.path.basename(arguments[0])] += 1

    sys.addaudithook(count)
    yield counts
    counting[0] = False


def test_the_way_of_one_request(tmp_path, monkeypatch, opened):
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path / "model", "orbax", I2V)
    Image.fromarray(picture(0)).save("first.png")
    write_lora(tmp_path / "style.safetensors", 1, 4, I2V.denoiser)
    opened.clear()
    resolved, functions = [], set()

    def profile(frame, event, argument):
        code = frame.f_code
        if event != "call" or f"{os.sep}wan_jax{os.sep}" not in code.co_filename:
            return
        if code is SamplingParams._check.__code__:
            resolved.append(frame.f_locals["self"].prompt)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(isinstance(frame.f_locals.get(name), SamplingParams) for name in names):
            functions.add(code.co_qualname)

    arguments = ["--checkpoint", "model", "--image", "first.png", "--lora", "style.safetensors", "--quiet"]
    small = ["--size", "48x32", "--frames", "5", "--steps", "2", "--dtype", "float32"]
    sys.setprofile(profile)
    try:
        assert main(["generate", "a red circle", *arguments, *small]) == 0
    finally:
        sys.setprofile(None)
    assert resolved.count("a red circle") == 1
    assert (opened["first.png"], opened["style.safetensors"]) == (1, 1)
    assert 3 < len(functions) <= MOST_FUNCTIONS, sorted(functions)


def test_help_loads_no_jax():
    program = (
        "import sys; from wan_jax.cli.main import main\ntry: main(sys.argv[1:])\nfinally: print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_prompts_of_a_file_share_nothing_that_they_change(tmp_path):
    """Requests are values: resolving one leaves it as it was."""
    request = SamplingParams("a", size="48x32", initial_latents=np.zeros((16, 2, 4, 6), np.float32), frames=5)
    before = dict(vars(request))
    request.resolve(I2V.__class__(name="t2v-a14b"))
    assert all(vars(request)[name] is value for name, value in before.items())
