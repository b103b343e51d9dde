"""The measuring program, held to videos of which all is known; the evaluation around it."""

import json
import types

import numpy as np
import pytest

from wan_jax.cli.options import Options
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.presets import get_preset
from wan_nano.captions import LANGUAGES
from wan_nano.classifier import Classifier
from wan_nano.digits import digit_atlas
from wan_nano.evaluate import (
    METRICS,
    Comparison,
    Evaluation,
    evaluate,
    judge,
    make_prompts,
    overridden,
    psnr,
    sign_test,
    wilson,
)
from wan_nano.measure import fit_circle, measure, nearest_speed
from wan_nano.render import render_scenes
from wan_nano.scenes import COLOURS, DISTANCE, KINDS, MOTIONS, SIZE_RATIO, SPEEDS, Scenes, held_out
from wan_nano.train_classifier import make_crops, train


@pytest.fixture(scope="module")
def prompts():
    return make_prompts(26, 10, ["en"])


@pytest.fixture(scope="module")
def videos(prompts):
    """Exactly what the prompts ask for, with handwriting that the classifier never saw."""

    def column(name, names, rest=0):
        return np.array(
            [[names.index(one[name]) for one in p.objects] + [rest] * (2 - len(p.objects)) for p in prompts], np.int32
        )

    scenes = Scenes(
        count=np.array([len(p.objects) for p in prompts], np.int32),
        kind=column("kind", KINDS),
        colour=column("colour", list(COLOURS)),
        motion=column("motion", MOTIONS),
        speed=column("speed", SPEEDS),
        background=np.arange(len(prompts), dtype=np.int32) % 4,
    )
    return render_scenes(5, scenes, digit_atlas(test=True))


@pytest.fixture(scope="module")
def classifier():
    return Classifier.load()


def scores(prompts, videos, classifier):
    evaluation = Evaluation("test", {}, list(prompts), [measure(video, classifier) for video in videos])
    return {metric: right / total for metric in METRICS for right, total in [evaluation.score(metric)] if total}


def test_what_the_prompts_ask_for_is_right(prompts, videos, classifier):
    found = scores(prompts, videos, classifier)
    print(found)
    # The classifier names 98.6 % of unseen handwriting; colours, motions and speeds of clean videos are never wrong
    # but for objects that hide each other.
    assert found["object and colour"] == 1
    assert found["motion"] == 1
    assert found["speed"] == 1
    assert found["shape or digit"] >= 0.92
    assert found["two objects' colours"] >= 0.9
    assert found["two objects"] >= 0.8


def test_decoded_videos_too(prompts, videos, classifier):
    """Blur and noise at about 32 dB, as decoding leaves them."""
    soft = videos.astype(np.float32)
    for axis in (2, 3):
        soft = 0.7 * soft + 0.15 * (np.roll(soft, 1, axis) + np.roll(soft, -1, axis))
    noise = np.random.default_rng(0).standard_normal(soft.shape, np.float32)
    soft = np.clip(soft + 5 * noise, 0, 255).astype(np.uint8)
    assert 28 < psnr(list(videos), list(soft)) < 36
    found = scores(prompts, soft, classifier)
    print(found)
    assert min(found["object and colour"], found["motion"]) >= 0.96
    assert found["shape or digit"] >= 0.88
    assert found["two objects"] >= 0.7


def test_other_videos_are_wrong(prompts, videos, classifier):
    """Videos of other prompts, and noise: chance."""
    ones = [n for n, prompt in enumerate(prompts) if len(prompt.objects) == 1]
    mixed = scores([prompts[n] for n in ones], videos[np.roll(ones, 3)], classifier)
    print(mixed)
    # One colour of 8, one kind of 18, one motion of 14; 26 draws.
    assert mixed["object and colour"] <= 0.4
    assert mixed["shape or digit"] <= 0.3
    assert mixed["motion"] <= 0.35
    noise = np.random.default_rng(0).integers(0, 256, (4, *videos.shape[1:]), dtype=np.uint8)
    random = scores(prompts[:4], noise, classifier)
    assert random["object and colour"] == random["motion"] == 0


def test_steadiness(videos, classifier):
    steady = measure(videos[0], classifier)
    assert steady.flicker < 0.1
    assert steady.objects[0].jitter < 0.4
    flickering = videos[0].astype(int) + 8 * (np.arange(33) % 2)[:, None, None, None] - 4
    assert measure(np.clip(flickering, 0, 255).astype(np.uint8), classifier).flicker > 4
    shaking = np.stack([np.roll(frame, 2 * (n % 2), axis=1) for n, frame in enumerate(videos[0])])
    assert measure(shaking, classifier).objects[0].jitter > 1


def test_prompts_are_unseen(prompts):
    every = make_prompts(4, 3)
    assert len(every) == 7 * len(LANGUAGES)
    assert len({prompt.text for prompt in every}) == len(every)
    for prompt in every:
        for one in prompt.objects:
            indices = KINDS.index(one["kind"]), list(COLOURS).index(one["colour"]), MOTIONS.index(one["motion"])
            assert held_out(*map(np.array, indices))
    # All languages ask for the same.
    by_language = {name: [p.objects for p in every if p.language == name] for name in LANGUAGES}
    assert by_language["en"] == by_language["zh"] == by_language["ja"]
    with pytest.raises(InputError, match="did you mean 'en'"):
        make_prompts(1, 1, ["eng"])


def test_classifier_learns():
    crops, kinds = make_crops(0, digit_atlas(), 1500)
    assert crops.shape == (1500, 32, 32)
    right = train(crops, kinds, steps=120)(crops[:500]).argmax(axis=1) == kinds[:500]
    assert right.mean() > 0.6  # of 18 kinds


def test_speeds():
    assert [nearest_speed(value, DISTANCE) for value in (0.2, 0.45, 0.9)] == ["slow", "normal", "fast"]
    assert [nearest_speed(value, SIZE_RATIO, ratio=True) for value in (1.3, 1.8, 2.2)] == list(SPEEDS)


def test_fit_circle():
    turn = np.linspace(0, 2, 20)
    centre, radius = fit_circle(np.stack([1 + 0.3 * np.cos(turn), 2 + 0.3 * np.sin(turn)], axis=1))
    np.testing.assert_allclose([*centre, radius], [1, 2, 0.3], atol=1e-9)


def test_intervals():
    # Newcombe 1998, table 1: 81 of 263 gives 0.2553 to 0.3662.
    np.testing.assert_allclose(wilson(81, 263), (0.2553, 0.3662), atol=5e-5)
    assert wilson(0, 0) == (0, 1)
    assert sign_test(0, 0) == 1
    assert sign_test(0, 5) == pytest.approx(2 / 32)


def test_evaluation(prompts, videos, tmp_path):
    """Two settings: one that makes what is asked for, one that shows every prompt the video of its neighbour."""
    subset = [*prompts[:5], *prompts[-3:]]
    right = {prompt.text: video for prompt, video in zip(prompts, videos, strict=True)}
    wrong = dict(zip(right, np.roll(videos, 1, axis=0), strict=True))
    config = get_preset("nano")

    def pipeline(answers):
        def results(requests):
            assert len({request.seed for request in requests}) > 1
            for request in requests:
                yield types.SimpleNamespace(frames=lambda request=request: iter([answers[request.prompt]]))

        return types.SimpleNamespace(config=config, results=results)

    settings = SamplingParams().resolve(config)
    runs = [("right", lambda: (pipeline(right), settings)), ("wrong", lambda: (pipeline(wrong), settings))]
    shown = []
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    first, second = evaluate(runs, subset, batch=3, output=report, sheet=sheet, show=shown.append)
    assert first.score("motion") == (5, 5)
    assert second.score("motion")[0] < 3
    assert len(shown) == 3
    assert "100.0 [57, 100]" in shown[0]
    assert "wrong against right: PSNR" in shown[2]
    content = json.loads(report.read_text())
    assert content["evaluations"][0]["scores"]["en"]["motion"]["right"] == 5
    assert content["comparisons"][0]["only_right_in"]["motion"][1] == 0
    assert sheet.stat().st_size > 0
    same = Comparison(first, first, psnr(list(videos), list(videos)))
    assert "PSNR inf" in str(same)
    assert same.changes("motion") == (0, 0)
    shorter = Comparison(first, second, psnr(list(videos), [video[:17] for video in videos]))
    assert "wrong against right: videos of another size" in str(shorter)
    assert shorter.as_json()["psnr"] is None


def test_judge_of_a_wrong_colour(prompts, videos, classifier):
    """Shape and motion are judged on their own."""
    (wanted,) = prompts[0].objects
    other = {**wanted, "colour": next(name for name in COLOURS if name != wanted["colour"])}
    verdict = judge(prompts[0].__class__("", "en", (other,), 0), measure(videos[0], classifier))
    assert not verdict["object and colour"]
    assert verdict["shape or digit"]
    assert verdict["motion"]


def test_overridden():
    options = overridden(Options(steps="20"), "steps=10 guidance=2,4 vae-dtype=bfloat16 lora=a.safetensors")
    assert (options.steps, options.guidance, options.vae_dtype, options.lora) == (
        *(10, (2, 4), "bfloat16"),
        ("a.safetensors",),
    )
    with pytest.raises(InputError, match="did you mean 'steps'"):
        overridden(Options(), "stepz=3")
    with pytest.raises(InputError, match="NAME=VALUE"):
        overridden(Options(), "steps")
    with pytest.raises(InputError, match="frames 'many'"):
        overridden(Options(), "frames=many")
