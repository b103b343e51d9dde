"""Predictions: the bookkeeping against real arrays, the formulas against measured figures, and what is printed."""

import json
from types import SimpleNamespace

import jax
import pytest

from wan_jax import plan as planning
from wan_jax.cli import main
from wan_jax.config import get_preset
from wan_jax.demo import DEMO, random_pipeline
from wan_jax.diffusion.sampler import plan_steps
from wan_jax.memory import PROFILES, Memory
from wan_jax.models.parameters import named_parameters
from wan_jax.plan import Plan, Prediction, choose_profile, denoiser_flops, report
from wan_jax.program import Programs
from wan_jax.settings import Settings
from wan_jax.tokenizer import Tokenizer

A14B = get_preset("t2v-a14b")
SIZES = {"480p": (832, 480), "720p": (1280, 720)}
SMALL = {"size": (48, 32), "frames": 5, "steps": 2, "shift": 5.0}
GIB = 2**30


def plan_of(size: str, device_kind: str = "NVIDIA H200") -> Plan:
    plan = Plan(A14B, Settings.resolve(A14B, size=SIZES[size]), "bfloat16")
    plan.device = SimpleNamespace(device_kind=device_kind, platform="cpu")
    return plan


def test_weights_are_those_of_the_pipeline(tokenizer_folder):
    pipeline = random_pipeline(DEMO, Tokenizer.from_pretrained(tokenizer_folder))
    sizes = {
        name: sum(array.nbytes for array in named_parameters(model).values())
        for name, model in {"text": pipeline.text_encoder, "vae": pipeline.vae, **pipeline.denoisers}.items()
    }
    plan = Plan(DEMO, Settings.resolve(DEMO, **SMALL), "bfloat16")
    inputs = plan._input_bytes
    everything = sum(sizes.values())
    assert plan.without_scratch(PROFILES["resident"]) == {stage: everything + inputs[stage] for stage in inputs}
    assert plan.without_scratch(PROFILES["swap"]) == {
        "text": sizes["text"] + inputs["text"],
        "denoise": sizes["low_noise"] + inputs["denoise"],
        "decode": sizes["vae"] + inputs["decode"],
    }
    streamed = plan.without_scratch(PROFILES["stream"])
    with_layers = plan.without_scratch(PROFILES["swap"])
    for stage, model in {"text": pipeline.text_encoder, "denoise": pipeline.denoisers["low_noise"]}.items():
        kernels = [array.nbytes for name, array in named_parameters(model).items() if name.endswith(".kernel")]
        blocks = [
            array.nbytes
            for name, array in named_parameters(model).items()
            if name.startswith("blocks.") and name.endswith(".kernel")
        ]
        assert sum(blocks) <= sum(kernels)
        assert streamed[stage] == with_layers[stage] - sum(blocks)
    assert plan.predict(PROFILES["resident"]).host_bytes == 0
    assert plan.predict(PROFILES["swap"]).host_bytes == everything


def test_full_size_weights():
    # 2 x 14.29e9 + 5.68e9 parameters in bfloat16, 0.127e9 in float32.
    assert plan_of("480p")._all_weights() == pytest.approx(69.0e9, rel=0.005)


@pytest.mark.parametrize(("size", "flops"), [("480p", 1.68e15), ("720p", 6.52e15)])
def test_flops(size, flops):
    # Embeddings and head are not counted: 0.1 %.
    assert denoiser_flops(A14B.denoiser, plan_of(size)._tokens()) == pytest.approx(flops, rel=0.005)


@pytest.mark.parametrize(
    ("size", "profile", "gib"),
    # memory_analysis() of the step as jax 0.11.2 compiles it for an H200.
    [("480p", "resident", 3.09), ("480p", "stream", 3.65), ("720p", "resident", 6.28), ("720p", "stream", 6.83)],
)
def test_formula_for_denoising_is_a_little_above_what_is_compiled(size, profile, gib):
    scratch = plan_of(size).estimated_scratch(PROFILES[profile])["denoise"] / GIB
    assert gib <= scratch <= 1.15 * gib


@pytest.mark.parametrize(
    ("size", "vae_dtype", "gib"),
    [("480p", "float32", 1.05), ("480p", "bfloat16", 0.61), ("720p", "float32", 2.39), ("720p", "bfloat16", 1.38)],
)
def test_formula_for_decoding_is_a_little_above_what_is_compiled(size, vae_dtype, gib):
    plan = Plan(A14B, Settings.resolve(A14B, size=SIZES[size]), "bfloat16", vae_dtype)
    assert gib <= plan.estimated_scratch(PROFILES["resident"])["decode"] / GIB <= 1.15 * gib


@pytest.mark.parametrize(("size", "forward", "decode"), [("480p", 2.94, 1.52), ("720p", 11.25, 3.70)])
def test_seconds_on_an_h200(size, forward, decode):
    """Within a tenth of what benchmarks/results/generate_full_size_h200.json says."""
    plan = plan_of(size)
    seconds = plan.predict(PROFILES["resident"]).seconds
    assert seconds["step"] == pytest.approx(2 * forward, rel=0.1)
    assert seconds["decode"] == pytest.approx(decode, rel=0.1)
    assert seconds["total"] == pytest.approx(40 * seconds["step"] + seconds["text"] + seconds["decode"], rel=1e-6)
    swapped, streamed = (plan.predict(PROFILES[name]).seconds for name in ("swap", "stream"))
    assert swapped["step"] == seconds["step"]
    assert seconds["total"] < swapped["total"] < 1.02 * seconds["total"]
    assert seconds["step"] < streamed["step"] < 1.1 * seconds["step"]


def test_guidance_of_one_halves_a_step():
    settings = Settings.resolve(A14B, guidance=1.0)
    plan = Plan(A14B, settings, "bfloat16")
    plan.device = SimpleNamespace(device_kind="NVIDIA H200", platform="cpu")
    guided = plan_of("720p").predict(PROFILES["resident"])
    alone = plan.predict(PROFILES["resident"])
    assert alone.seconds["step"] == pytest.approx(guided.seconds["step"] / 2)
    assert alone.device_bytes["denoise"] < guided.device_bytes["denoise"]


def test_unknown_device_has_no_seconds():
    assert plan_of("480p", "Toaster").predict(PROFILES["swap"]).seconds == {}


@pytest.mark.parametrize("name", ["resident", "stream"])
def test_what_is_planned_is_what_runs(tokenizer_folder, name):
    """Programs compiled for a plan, from shapes alone, are those that the pipeline runs: nothing compiles again."""
    settings, profile = Settings.resolve(DEMO, **SMALL), PROFILES[name]
    programs = Programs(exact=False)
    plan = Plan(DEMO, settings, "bfloat16", programs=programs)
    plan.compiled = True
    prediction = plan.predict(profile)
    assert all(size > 0 for size in plan.scratch(profile).values())
    assert prediction.peak_bytes == max(prediction.device_bytes.values())
    if not plan.compiles(profile):
        assert jax.__version_info__ < (0, 11)
        assert plan.scratch(profile) == plan.estimated_scratch(profile)
        return

    pipeline = random_pipeline(DEMO, Tokenizer.from_pretrained(tokenizer_folder))
    pipeline.memory = Memory(profile)
    pipeline._programs = programs
    seconds = pipeline("a red circle", **SMALL).seconds
    # Looking a program up takes well under a millisecond; compiling one takes a tenth of a second or more.
    assert seconds["compile"] < 0.05


def test_only_streaming_has_programs_of_its_own(monkeypatch):
    plan = Plan(DEMO, Settings.resolve(DEMO, **SMALL), "float32")
    plan.compiled = True
    asked = []
    monkeypatch.setattr(plan, "_compiled_scratch", lambda profile: asked.append(profile.name) or {})
    for profile in PROFILES.values():
        plan.scratch(profile)
        plan.scratch(profile)
    assert asked == [name for name in ("resident", "stream") if plan.compiles(PROFILES[name])]


def test_choice(monkeypatch):
    settings = Settings.resolve(A14B, size=SIZES["480p"])
    assert choose_profile(A14B, settings, "bfloat16").name == "resident"  # a CPU does not say what it has
    peaks = {name: Plan(A14B, settings, "bfloat16").predict(profile).peak_bytes for name, profile in PROFILES.items()}
    for name, peak in peaks.items():
        monkeypatch.setattr(planning, "memory_limit", lambda device, peak=peak: int(1.05 * peak))
        assert choose_profile(A14B, settings, "bfloat16").name == name
    monkeypatch.setattr(planning, "memory_limit", lambda device: 1)
    assert choose_profile(A14B, settings, "bfloat16").name == "stream"


@pytest.mark.parametrize(("size", "profile", "gib"), [("480p", "swap", 46), ("480p", "stream", 23)])
def test_targets(size, profile, gib):
    assert plan_of(size).predict(PROFILES[profile]).fits(gib * GIB)


def test_some_memory_stays_in_reserve():
    prediction = Prediction("swap", {"text": 10, "denoise": 1000}, 0)
    assert not prediction.fits(1010)
    assert prediction.fits(1050)


def test_report():
    text = str(report(A14B, Settings.resolve(A14B, size=SIZES["480p"]), "bfloat16", device_memory=46))
    lines = text.splitlines()
    assert lines[0] == "t2v-a14b 832x480, 81 frames, 40 steps, bfloat16; cpu, 46.0 GiB for JAX"
    assert [line.split()[0] for line in lines[2:5]] == ["resident", "swap", "stream"]
    assert lines[2].endswith("does not fit")
    assert lines[3].endswith("  fits")
    assert "formula" in text
    assert "no measured rates for 'cpu'" in text
    assert lines[-1] == "Best: swap."
    unknown = str(report(A14B, Settings.resolve(A14B), "bfloat16", "stream"))
    assert "--device-memory" in unknown
    assert "Best" not in unknown
    assert "None fits" in str(report(A14B, Settings.resolve(A14B), "bfloat16", device_memory=1))


def test_command(capsys):
    assert main(["plan", "--preset", "t2v-1.3b", "--size", "832x480", "--device-memory", "80", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["model"] == "t2v-1.3b"
    assert content["best"] == "resident"
    assert content["device_memory"] == 80 * GIB
    assert content["scratch"] == "formula"
    assert [each["profile"] for each in content["profiles"]] == ["resident", "swap", "stream"]
    assert all(each["peak_bytes"] == max(each["device_bytes"].values()) for each in content["profiles"])
    assert main(["plan", "--profile", "swap", "--frames", "17"]) == 0
    assert "17 frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "t2v-a14"], "did you mean 't2v-a14b'"),
        (["--profile", "swop"], "did you mean 'swap'"),
        (["--dtype", "half"], "unknown dtype 'half'"),
        (["--frames", "6"], "must be 4n + 1"),
        (["--device-memory", "-3"], "device memory -3: give GiB"),
    ],
)
def test_bad_input(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_allocated():
    before = len(jax.live_arrays())
    plan_of("720p").predict(PROFILES["stream"])
    assert len(jax.live_arrays()) == before
    assert set(plan_steps(Settings.resolve(A14B).make_schedule(), 0.875)) == {"high_noise", "low_noise"}
