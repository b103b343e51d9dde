"""The pipeline's own behaviour, on the demo's structure with random weights; parity is in tests/parity/."""

import gc
import inspect
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.diffusion.params import SamplingParams
from wan_jax.diffusion.state import SamplingState
from wan_jax.errors import Cancelled, InputError
from wan_jax.parameters import named_parameters
from wan_jax.pipeline import WanPipeline
from wan_jax.runtime.events import CancelToken, FramesDecoded, Run, StageDone, StageStarted, StepDone
from wan_jax.testing.models import DEMO, random_pipeline
from wan_jax.text import encoder
from wan_jax.text.tokenizer import Tokenizer

SHAPE = (16, 2, 4, 6)  # 48x32, 5 frames
SMALL = {"size": (48, 32), "frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def pipe(tokenizer_folder):
    return random_pipeline(DEMO, Tokenizer.from_pretrained(tokenizer_folder), "float32")


def test_video(pipe):
    video = pipe("a red circle", **SMALL)
    assert video.frames.shape == (5, 32, 48, 3)
    assert video.frames.dtype == np.uint8
    assert video.latents.shape == SHAPE
    assert video.latents.dtype == np.float32
    assert video.metadata["prompt"] == "a red circle"
    assert set(video.seconds) == {"text", "compile", "denoise", "decode"}


def test_seed_prompt_and_guidance_matter(pipe):
    video = pipe("a red circle", **SMALL, seed=1)
    np.testing.assert_array_equal(pipe("a red circle", **SMALL, seed=1).latents, video.latents)
    for changed in (
        pipe("a red circle", **SMALL, seed=2),
        pipe("a blue square", **SMALL, seed=1),
        pipe("a red circle", **SMALL, seed=1, guidance=7.0),
        pipe("a red circle", **SMALL, seed=1, negative_prompt="red"),
        pipe("a red circle", **SMALL, seed=1, shift=3.0),
        pipe("a red circle", **SMALL, seed=1, noise="torch"),
    ):
        assert np.abs(changed.latents - video.latents).max() > 1e-3


def test_without_guidance_the_negative_prompt_is_not_encoded(pipe, monkeypatch):
    encoded, tokenize = [], Tokenizer.__call__
    monkeypatch.setattr(
        Tokenizer, "__call__", lambda self, prompts, *n: encoded.extend(prompts) or tokenize(self, prompts, *n)
    )
    pipe("a new circle", **SMALL, guidance=1, negative_prompt="very blurry")
    assert encoded == ["a new circle"]
    pipe("a new circle", **SMALL, guidance=(1, 2), negative_prompt="very blurry")
    assert encoded == ["a new circle", "very blurry"]


def test_choices_for_each_expert(pipe):
    """Two steps with guidance, three without; every number belongs to one expert."""
    recipe = {"size": (48, 32), "frames": 5, "shift": 5.0, "guidance": (1.0, 3.0)}
    recipe |= {"solver": ("euler", "unipc"), "schedule": ("lightx2v", "official")}
    video = pipe("a red circle", **recipe, steps=(3, 2))
    assert video.metadata["steps"] == (3, 2)
    assert video.metadata["solver"] == ("euler", "unipc")
    for changed in ({"steps": (2, 3)}, {"guidance": (3.0, 1.0)}, {"solver": ("euler", "euler")}):
        other = pipe("a red circle", **recipe | {"steps": (3, 2)} | changed)
        assert np.abs(other.latents - video.latents).max() > 1e-3


def test_lightx2v_four_steps_written_out(pipe):
    """x_0 = x - sigma v, then x_0 + sigma_next v; fractional timesteps; two steps of each expert, no guidance."""
    start = np.random.default_rng(1).standard_normal((1, *SHAPE)).astype(np.float32)
    recipe = {"steps": 4, "schedule": "lightx2v", "solver": "euler", "shift": 5.0, "guidance": 1.0}
    video = pipe("a red circle", **SMALL | recipe, initial_latents=start[0])

    text = pipe.encode_prompts(["a red circle"])
    sigmas = [1.0, 0.9375, 5 / 6, 0.625, 0.0]
    x = start
    for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        denoiser = pipe.denoisers["high_noise" if index < 2 else "low_noise"]
        run = jax.jit(lambda model, x, t, text: model(x, t, model.encode_context(text)))
        v = np.asarray(run(denoiser, jnp.asarray(x), jnp.full((1,), 1000 * sigma, jnp.float32), text))
        x = (x - sigma * v) + following * v
    # Four steps of float32 roundings, of values up to 4, in another order.
    np.testing.assert_allclose(video.latents, x[0], atol=2e-5)


def test_list_of_prompts(pipe):
    videos = pipe(["a red circle", "a blue square"], **SMALL)
    assert [video.metadata["prompt"] for video in videos] == ["a red circle", "a blue square"]
    assert [video.metadata["seed"] for video in videos] == [0, 1]


def test_initial_latents(pipe):
    start = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    one = pipe("a", **SMALL, initial_latents=start)
    two = pipe(["a", "b"], **SMALL, initial_latents=np.stack([start, start]))
    np.testing.assert_allclose(two[0].latents, one.latents, atol=1e-4)  # another batch size may add in another order


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((16, 2, 4, 5), np.float32), r"latents have shape \(16, 2, 4, 5\); 48x32 with 5 frames needs"),
        (np.full(SHAPE, np.nan, np.float32), "NaN or infinity"),
        (np.zeros((3, *SHAPE), np.float32), "initial_latents has 3 values for 1 videos"),
    ],
)
def test_bad_initial_latents(pipe, latents, message):
    with pytest.raises(InputError, match=message):
        pipe("a", **SMALL, initial_latents=latents)


def test_no_prompts(pipe):
    with pytest.raises(InputError, match="no prompts"):
        pipe([], **SMALL)


def test_bfloat16_stays_near_float32(pipe, tokenizer_folder):
    half = random_pipeline(DEMO, Tokenizer.from_pretrained(tokenizer_folder), "bfloat16")
    exact = pipe("a red circle", **SMALL).latents
    distance = np.linalg.norm(half("a red circle", **SMALL).latents - exact) / np.linalg.norm(exact)
    print(f"bfloat16 against float32, 2 steps: {distance:.4f}")
    # Weights and activations round to 8 bits (2^-9 = 0.2 % each); guidance of 4 multiplies what the two passes differ
    # by, and the text encoder's error comes on top. Weights are cut rather than rounded here, which doubles theirs.
    assert 1e-4 < distance < 0.05


def test_latents_are_there_before_any_frame(pipe):
    result = next(pipe.results([SamplingParams("a red circle", **SMALL)]))
    assert "decode" not in result.seconds
    assert result.latents.shape == SHAPE
    chunks = list(result.frames())
    assert [len(chunk) for chunk in chunks] == [1, 4]
    np.testing.assert_array_equal(np.concatenate(chunks), pipe("a red circle", **SMALL).frames)


def test_rows_of_a_batch_are_single_runs(pipe):
    rows = {"seed": [7, 3], "negative_prompt": ["blurry", "grey"]}
    own = [{name: values[index] for name, values in rows.items()} for index in range(2)]
    alone = [pipe("a", **SMALL, **own[0]), pipe("b", **SMALL, **own[1])]
    for single, row in zip(alone, pipe(["a", "b"], **SMALL, **rows), strict=True):
        np.testing.assert_allclose(row.latents, single.latents, rtol=0, atol=1e-5 * np.abs(single.latents).max())
        assert row.metadata == single.metadata
    three = pipe("a", **SMALL, num_videos=3, seed=6)
    assert [video.metadata["seed"] for video in three] == [6, 7, 8]
    requests = [SamplingParams("a", **SMALL, guidance=1.0), SamplingParams("a", **SMALL, guidance=5.0)]
    for request, row in zip(requests, pipe(requests), strict=True):
        single = pipe(request)
        np.testing.assert_allclose(row.latents, single.latents, rtol=0, atol=2e-5 * np.abs(single.latents).max())
    with pytest.raises(InputError, match="steps 3: videos of one batch"):
        pipe([requests[0], SamplingParams("a", **SMALL | {"steps": 3})])


def test_events_of_a_call(pipe):
    events = []
    pipe("a red circle", **SMALL, on_event=events.append)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [(step.step, step.total, step.videos) for step in steps] == [(1, 2, (0,)), (2, 2, (0,))]
    assert {step.expert for step in steps} <= {"high_noise", "low_noise"}
    decoded = [event for event in events if isinstance(event, FramesDecoded)]
    assert [(event.done, event.total) for event in decoded] == [(1, 5), (5, 5)]
    started = [event.stage for event in events if isinstance(event, StageStarted)]
    assert started == [event.stage for event in events if isinstance(event, StageDone)]
    assert started[-2:] == ["denoise", "decode"]


@pytest.mark.parametrize("kind", [StepDone, FramesDecoded])
def test_cancelling_frees_the_device(pipe, kind):
    """Nothing of the run stays, no further step or chunk is made, and the pipeline goes on to work."""
    before = pipe("a red circle", **SMALL)
    gc.collect()
    held = sum(array.nbytes for array in jax.live_arrays())
    token, seen = CancelToken(), []

    def cancel(event):
        if isinstance(event, kind):
            seen.append(kind)  # not the event: on a CPU its frames are the device's
            token.cancel()

    with pytest.raises(Cancelled):
        pipe("a red circle", **SMALL | {"frames": 9}, on_event=cancel, cancel=token)
    assert len(seen) == 1
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) <= held
    np.testing.assert_array_equal(pipe("a red circle", **SMALL).latents, before.latents)


def test_a_call_goes_on_from_a_state(pipe, tmp_path):
    """The state after the first step, through a file, gives the same latents to the bit."""
    token, choices = CancelToken(), SMALL | {"steps": 3}

    def pause(event):
        if isinstance(event, StepDone) and event.step == 1:
            event.state().save(tmp_path / "state.npz")
            token.cancel()

    with pytest.raises(Cancelled):
        pipe("a red circle", **choices, on_event=pause, cancel=token)
    steps = []
    rest = pipe("a red circle", **choices, on_event=steps.append, state=SamplingState.load(tmp_path / "state.npz"))
    assert [event.step for event in steps if isinstance(event, StepDone)] == [2, 3]
    np.testing.assert_array_equal(rest.latents, pipe("a red circle", **choices).latents)


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": "a blue square"},
        {"prompt": ["a red circle", "a blue square"]},
        {"negative_prompt": "red"},
        {"seed": 1},
        {"size": (64, 32)},
        {"frames": 9},
        {"initial_latents": np.zeros(SHAPE, np.float32)},
        {"state": "state.npz"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_state_of_another_call_is_refused(pipe, changed):
    states: list[SamplingState] = []
    pipe("a red circle", **SMALL, on_event=lambda event: isinstance(event, StepDone) and states.append(event.state()))
    with pytest.raises(InputError, match="state"):
        pipe(**{"prompt": "a red circle", "state": states[0]} | SMALL | changed)


def test_a_listener_may_use_the_pipeline(pipe):
    made = []

    def listen(event):
        if isinstance(event, StageStarted) and event.stage == "text":
            made.append(pipe("within", **SMALL))

    thread = threading.Thread(target=pipe, args=("around",), kwargs=SMALL | {"on_event": listen}, daemon=True)
    thread.start()
    thread.join(120)
    assert made
    assert not thread.is_alive()


@pytest.mark.parametrize("requests", [[], 5, "two"])
def test_requests_of_results(pipe, requests):
    if requests == "two":
        first, second = pipe.results([SamplingParams(text, **SMALL) for text in ("one", "two")])
        assert (first.request.prompt, second.request.prompt) == ("one", "two")
        return
    with pytest.raises(InputError, match="prompt"):
        next(pipe.results(requests))


def test_an_error_while_decoding_frees_the_device(pipe):
    (result,) = pipe.results([SamplingParams("a red circle", size=(48, 32), frames=13, steps=2)])
    list(result.frames())
    gc.collect()
    before = len(jax.live_arrays())
    frames = result.frames()
    next(frames)
    with pytest.raises(RuntimeError, match="stop"):
        frames.throw(RuntimeError("stop"))
    gc.collect()
    assert len(jax.live_arrays()) <= before


def test_previews(pipe):
    shapes = []
    pipe("a", **SMALL, on_event=lambda event: isinstance(event, StepDone) and shapes.append(event.preview().shape))
    assert shapes == [(1, 2, 4, 6, 3)] * SMALL["steps"]


def test_attention_by_name(pipe):
    exact, chunked = (pipe("a red circle", **SMALL, attention=name) for name in (None, "chunked"))
    assert (chunked.metadata["attention"], chunked.metadata["attention_used"]) == ("chunked", "chunked")
    assert (exact.metadata["attention"], exact.metadata["attention_used"]) == (None, "reference")
    np.testing.assert_allclose(chunked.latents, exact.latents, rtol=0, atol=1e-4)


def test_attention_window(pipe):
    choices = SMALL | {"frames": 9}
    exact, wide, narrow = (pipe("a red circle", **choices, attention_window=window) for window in (None, 3, 0))
    assert (exact.metadata["attention_window"], narrow.metadata["attention_window"]) == (None, 0)
    np.testing.assert_allclose(wide.latents, exact.latents, rtol=0, atol=1e-4)
    assert np.abs(narrow.latents - exact.latents).mean() > 1e-4
    for wrong in ({"attention_window": -1}, {"attention_window": 1, "attention": "cudnn"}):
        with pytest.raises(InputError, match="attention_window"):
            pipe("a red circle", **choices, **wrong)


def test_weights_by_name(pipe):
    """8-bit copies are made once, change the video a little, and leave the stored weights as they are."""
    exact = pipe("a red circle", **SMALL)
    kernels = [named_parameters(each)["blocks.feed_forward.up.kernel"] for each in pipe.denoisers.values()]
    for name in ("int8", "float8"):
        first, again = (pipe("a red circle", **SMALL, weights=name) for _ in range(2))
        assert first.metadata["weights"] == name
        np.testing.assert_array_equal(first.latents, again.latents)
        error = np.abs(first.latents - exact.latents).mean() / np.abs(exact.latents).mean()
        assert 1e-5 < error < 0.1
    assert all(
        kernel is named_parameters(each)["blocks.feed_forward.up.kernel"]
        for kernel, each in zip(kernels, pipe.denoisers.values(), strict=True)
    )
    np.testing.assert_array_equal(pipe("a red circle", **SMALL).latents, exact.latents)
    with pytest.raises(InputError, match="unknown weights 'int4'"):
        pipe("a red circle", **SMALL, weights="int4")


def test_two_threads(pipe):
    """Two requests at a time on one pipeline give what each gives alone."""
    requests = [
        SamplingParams("a red circle", **SMALL, seed=5),
        SamplingParams("a blue square", **SMALL | {"steps": 3}),
    ]
    alone = [pipe(request) for request in requests]
    seen: list[list] = [[], []]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda n: pipe(requests[n], on_event=seen[n].append), range(2)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)
        np.testing.assert_array_equal(one.frames, other.frames)
        assert one.metadata == other.metadata
    assert [sum(isinstance(event, StepDone) for event in events) for events in seen] == [2, 3]


def test_the_call_shows_its_arguments(pipe):
    parameters = inspect.signature(pipe).parameters
    assert {"prompt", "size", "steps", "seed", "attention", "on_event", "cancel"} <= parameters.keys()
    assert "number of denoising steps" in WanPipeline.__call__.__doc__
    with pytest.raises(InputError, match="unknown argument 'stpes'; did you mean 'steps'"):
        pipe("a", stpes=3)


def test_notes_are_warnings_where_nobody_listens(pipe):
    with pytest.warns(UserWarning, match="21 frames are more than the 17") as caught:
        next(pipe.results([SamplingParams("a", size=(48, 32), frames=21, steps=1)]))
    assert caught[0].filename == __file__


def test_a_second_run_compiles_nothing(pipe, compiled):
    pipe("a red circle", **SMALL)
    compiled.clear()
    pipe("a green star", **SMALL | {"steps": 3}, guidance=(2.0, 5.0), shift=5.0, seed=9)
    assert compiled == []


def test_forgetting_prompts_keeps_those_in_use(pipe, monkeypatch):
    """Old prompts make room for new ones, also where a call names more than are remembered, and an old one again."""
    monkeypatch.setattr(encoder, "CACHED_PROMPTS", 2)
    separate = [pipe.encode_prompts([prompt]) for prompt in "abc"]
    together = pipe.encode_prompts([*"cab", ""])
    np.testing.assert_array_equal(together[:3], np.concatenate([separate[n] for n in (2, 0, 1)]))


@pytest.mark.parametrize("chunk", [1, 3])
def test_frames_arrive_while_later_ones_are_decoded(pipe, chunk):
    latents = np.random.default_rng(0).standard_normal((16, 6, 4, 6)).astype(np.float32)
    chunks = list(pipe.codec.decode(latents, Run(), chunk=chunk))
    assert [len(frames) for frames in chunks] == ([1, 4, 4, 4, 4, 4] if chunk == 1 else [1, 12, 8])
    frames = pipe.decode(latents, chunk=chunk)
    np.testing.assert_array_equal(np.concatenate(chunks), frames)
    # Another chunk may add in another order, and the cut to whole levels may then fall on the other side.
    np.testing.assert_allclose(frames.astype(int), pipe.decode(latents), rtol=0, atol=1)


def conditioning_frames(count: int) -> np.ndarray:
    """An image, then grey, as image to video encodes them; the grey takes no memory."""
    image = np.random.default_rng(0).uniform(-1, 1, (1, 32, 48, 3)).astype(np.float32)
    return np.concatenate([image, np.broadcast_to(np.float32(0), (count - 1, 32, 48, 3))])


def test_encoding_streams(pipe, monkeypatch):
    """The latents are those of the whole sequence, and only one latent frame's worth of frames travels at a time."""
    frames = conditioning_frames(13)
    sent, call = [], Run.call
    monkeypatch.setattr(Run, "call", lambda *args: sent.append(args[-1].shape) or call(*args))
    latents = pipe.encode(frames)
    monkeypatch.undo()
    assert sent == [(1, 32, 48, 3), *[(4, 32, 48, 3)] * 3]
    assert latents.shape == (16, 4, 4, 6)
    assert latents.dtype == np.float32
    expected = jax.jit(lambda vae, frames: vae.encode(frames))(pipe.vae, frames[None])[0]
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-5)  # float32 sums in another order
    np.testing.assert_array_equal(pipe.encode(frames[:1]), latents[:, :1])


def test_pixels_and_floats_give_the_same_latents(pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
    floats = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    # One rounding of the input, through some twenty layers.
    np.testing.assert_allclose(pipe.encode(pixels), pipe.encode(floats), rtol=0, atol=1e-5)
    np.testing.assert_allclose(pipe.encode(floats.astype(np.float64)), pipe.encode(floats), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((5, 32, 48), np.uint8), r"give \[frames, height, width, 3\]"),
        (np.zeros((0, 32, 48, 3), np.uint8), r"cannot encode frames of shape \(0,"),
        (np.zeros((4, 32, 48, 3), np.uint8), r"cannot encode 4 frames; give 4n \+ 1"),
        (np.zeros((1, 32, 44, 3), np.uint8), "of 44x32 pixels; give multiples of 8"),
        (np.zeros((1, 32, 48, 3), np.int64), "frames of int64; give uint8, or floats"),
        (np.full((1, 32, 48, 3), 255.0), "reach 255; give uint8"),
        (np.full((1, 32, 48, 3), np.nan), "reach nan"),
    ],
)
def test_bad_frames(pipe, frames, message):
    with pytest.raises(InputError, match=message):
        pipe.encode(frames)


def test_vae_in_bfloat16(pipe, diffusers_tree):
    video = WanPipeline.from_pretrained(diffusers_tree, "float32", vae_dtype="bfloat16")("a red circle", **SMALL)
    exact = WanPipeline.from_pretrained(diffusers_tree, "float32").decode(video.latents)
    # Some thirty roundings of 4e-3, and the cut to whole levels; measured 0.76 of 255.
    error = np.sqrt(np.mean((video.frames.astype(float) - exact) ** 2))
    print(f"bfloat16 VAE: {error:.2f} levels")
    assert 0 < error < 1.2
    with pytest.raises(InputError, match="unknown VAE dtype 'float16'"):
        WanPipeline.from_pretrained(diffusers_tree, vae_dtype="float16")


def test_decode_alone(pipe):
    video = pipe("a", **SMALL)
    np.testing.assert_array_equal(pipe.decode(video.latents), video.frames)
