"""`wan-jax bench` with the demo's model on the CPU: what it writes, prints and refuses."""

import json

import numpy as np
import pytest

from wan_bench.parts import Row
from wan_jax.cli.main import main
from wan_jax.models.denoiser import Denoiser
from wan_jax.parameters import ParameterInfo, abstract_parameters
from wan_jax.planning.time import denoiser_flops
from wan_jax.runtime.devices import seconds_of
from wan_jax.testing import models
from wan_jax.testing.models import DEMO, random_parameters

SMALL = ["--preset", "demo", "--size", "48x32", "--frames", "5", "--steps", "2", "--repeats", "2"]
TOKENS = 2 * 2 * 3


@pytest.fixture
def bench(tmp_path, capsys):
    def run(*arguments: str) -> tuple[dict, list[str]]:
        path = tmp_path / "bench.json"
        assert main(["bench", *arguments, *SMALL, "--output", str(path)]) == 0
        return json.loads(path.read_text()), capsys.readouterr().out.splitlines()

    return run


def test_denoiser(bench, tmp_path):
    report, lines = bench("denoiser", "--plot", str(tmp_path / "parts.png"))
    assert (report["device"], report["preset"], report["size"], report["frames"]) == ("cpu", "demo", [48, 32], 5)
    forward, *parts = report["rows"]
    assert forward["name"] == "forward"
    assert forward["flops"] == denoiser_flops(DEMO.denoiser, TOKENS)
    assert forward["seconds"] == np.median(forward["runs"])
    assert forward["tflop_per_second"] == pytest.approx(forward["flops"] / forward["seconds"] / 1e12)
    fraction = forward["tflop_per_second"] / report["matmul_tflop_per_second"]
    assert forward["fraction_of_matmul"] == pytest.approx(fraction)
    weights = sum(2 * info.shape[0] * int(np.prod(info.shape[1:])) for info in parameters_of_the_denoiser().values())
    assert forward["memory_bytes"] > weights / 2  # the forward reads all but the cross-attentions' keys and values
    # Multiplications and additions of the parts are those of the blocks.
    counted = sum(row["count"] * row.get("flops", 0) for row in parts)
    assert DEMO.denoiser.num_layers * counted == pytest.approx(forward["flops"])
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")
    assert len(lines) == 3 + len(report["rows"])


def parameters_of_the_denoiser() -> dict[str, ParameterInfo]:
    from flax import nnx

    return abstract_parameters(lambda: Denoiser(DEMO.denoiser, dtype="bfloat16", rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("attention", {"self reference", "self chunked", "cross reference", "cross chunked"}),
        ("text", {"two prompts of 512 tokens"}),
        ("vae", {"encode bfloat16", "decode bfloat16, chunks of 1"}),
        ("video", {f"video, {stage}" for stage in ("denoise", "compile", "decode", "save", "total")}),
    ],
)
def test_part(bench, part, names):
    report, _ = bench(part, "--vae-dtype", "bfloat16")
    rows = {row["name"]: row for row in report["rows"]}
    assert names <= rows.keys()
    assert all(len(row["runs"]) == 2 for row in rows.values())
    assert all(rows[name]["seconds"] > 0 for name in names if name != "video, compile")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["denoisr"], "did you mean 'denoiser'"),
        (["vae", "--repeats", "0"], "repeats 0: give at least 1"),
        (["vae", "--plot", "x.png"], "use it with bench denoiser"),
        (["vae", "--output", "nowhere/x.json"], "output folder nowhere does not exist"),
        (["vae", "--preset", "t2v"], "unknown preset 't2v'"),
        (["vae", "--size", "50x32"], "the width must be a multiple of 16"),
    ],
)
def test_bad_input(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_median():
    assert Row("x", (3.0, 1.0, 2.0)).median == 2.0
    calls = []
    assert len(seconds_of(lambda: calls.append(1), repeats=3, calls=2)) == 3
    assert len(calls) == 1 + 3 * 2  # one warms up


def test_large_parameters_repeat_a_block(monkeypatch):
    monkeypatch.setattr(models, "LARGE", 2**12)
    tree = {
        "blocks.linear.kernel": ParameterInfo((3, 700, 900), np.dtype(np.float32), ("layers", None, None)),
        "blocks.norm.scale": ParameterInfo((3, 5000), np.dtype(np.float32), ("layers", None)),
    }
    arrays = random_parameters(tree, 0, "float32")
    kernel, scale = (np.asarray(arrays[name]) for name in tree)
    # Half a million draws: the mean and the deviation of a normal distribution within five of their errors.
    assert abs(kernel[0].mean()) < 5 * 700**-0.5 / kernel[0].size ** 0.5
    assert kernel[0].std() == pytest.approx(700**-0.5, rel=5 * (2 * kernel[0].size) ** -0.5)
    assert scale.mean() == pytest.approx(1, abs=0.01)
    assert np.linalg.matrix_rank(kernel[0]) == 700
    assert not np.array_equal(kernel[0], kernel[1])
