"""Image to video through the one pipeline, on the demo's structure with random weights; parity is in tests/parity/."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from wan_jax import read_video
from wan_jax.cli.main import main
from wan_jax.config import ImageEncoderConfig
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.generation.extension import extension, following
from wan_jax.media.image import frames_to_encode
from wan_jax.media.video import Video
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import named_parameters
from wan_jax.presets import PRESETS
from wan_jax.runtime.offload import PROFILES
from wan_jax.testing.models import DEMO, random_pipeline, write_demo
from wan_jax.text.tokenizer import Tokenizer

I2V = replace(
    DEMO, name="demo-i2v", denoiser=replace(DEMO.denoiser, in_channels=16 + 4 + 16), conditioning="image_latents"
)
WITH_CLIP = replace(
    I2V,
    denoiser=replace(I2V.denoiser, image_dim=24),
    image_encoder=ImageEncoderConfig(image_size=56, dim=24, num_layers=2, num_heads=2, ffn_dim=40),
)
TI2V = replace(DEMO, name="demo-ti2v", conditioning="first_frame")
SMALL = {"size": (48, 32), "frames": 9, "steps": 2}


def picture(seed: int, width: int = 48, height: int = 32) -> np.ndarray:
    """A smooth image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def i2v(tokenizer):
    return random_pipeline(I2V, tokenizer, "float32")


@pytest.fixture(scope="module")
def ti2v(tokenizer):
    return random_pipeline(TI2V, tokenizer, "float32")


@pytest.fixture(scope="module")
def t2v(tokenizer):
    return random_pipeline(DEMO, tokenizer, "float32")


def test_images_matter(i2v):
    first, last = picture(0), picture(1)
    latents = i2v("a", image=first, **SMALL).latents
    np.testing.assert_array_equal(i2v("a", image=Image.fromarray(first), **SMALL).latents, latents)
    for changed in ({"image": last}, {"image": first, "last_image": last}, {"image": first, "last_image": first}):
        assert np.abs(i2v("a", **changed, **SMALL).latents - latents).max() > 1e-3


def test_the_first_frame_is_the_image(ti2v):
    first = picture(0)
    video = ti2v("a", image=first, **SMALL)
    # Pixels become floats on the host here and on the device there: one rounding, through some twenty layers.
    np.testing.assert_allclose(video.latents[:, :1], ti2v.encode(first[None]), rtol=0, atol=1e-5)
    assert np.abs(video.latents[:, 1:] - ti2v("a", image=picture(1), **SMALL).latents[:, 1:]).max() > 1e-3
    text_alone = ti2v("a", **SMALL)
    assert np.abs(text_alone.latents - video.latents).max() > 1e-3


def test_size_follows_the_image():
    tall = SamplingParams("a", image=picture(0, 100, 200))
    assert tall.resolve(I2V).size == (80, 160)  # the area of 160x96, one to two
    assert replace(tall, size=(48, 32)).resolve(I2V).size == (48, 32)


def test_a_batch_shares_the_image(i2v):
    videos = i2v(["a", "b"], image=picture(0), **SMALL)
    alone = i2v("b", image=picture(0), seed=1, **SMALL)
    np.testing.assert_allclose(videos[1].latents, alone.latents, atol=1e-4)  # another batch size adds in another order


def test_an_image_is_encoded_once_and_another_compiles_nothing(i2v, compiled):
    i2v("a", image=picture(2), last_image=picture(4), **SMALL)
    i2v("a", image=picture(2), **SMALL)
    compiled.clear()
    again = i2v("b", image=picture(2), **SMALL)
    assert "encode" not in again.seconds
    another = i2v("b", image=picture(3), last_image=picture(4), **SMALL)
    assert another.seconds["encode"] > 0
    assert compiled == []


def test_the_image_encoder_streams_too(tokenizer):
    """It waits in host memory as the others."""
    resident, stream = (
        random_pipeline(WITH_CLIP, tokenizer, "float32", placement=Placement(offload=PROFILES[name]))
        for name in ("resident", "stream")
    )
    request = SamplingParams("a", image=picture(0), **SMALL).resolve(WITH_CLIP)
    first, second = (next(pipe.results([request])) for pipe in (resident, stream))
    # XLA:CPU may fuse float32 sums of the two programs in other orders.
    np.testing.assert_allclose(first.latents, second.latents, rtol=0, atol=1e-4)
    assert second.seconds["image"] > 0
    kinds = {array.sharding.memory_kind for array in named_parameters(stream.image_encoder).values()}
    assert kinds == {"pinned_host"}


def test_metadata_names_the_images(i2v, tmp_path):
    path = tmp_path / "first.png"
    Image.fromarray(picture(0)).save(path)
    metadata = i2v("a", image=path, last_image=picture(1), **SMALL).metadata
    assert (metadata["image"], metadata["last_image"]) == (str(path), "48x32 pixels")


@pytest.mark.parametrize(
    ("config", "images", "message"),
    [
        (DEMO, {"image": 0}, "demo makes videos from text alone; leave the image out"),
        (I2V, {}, "demo-i2v makes videos from an image and a text; give an image"),
        (I2V, {"last_image": 0}, "a last image needs a first one"),
        (TI2V, {"image": 0, "last_image": 1}, "demo-ti2v takes a first image alone"),
        (replace(I2V, denoiser=replace(I2V.denoiser, image_position_length=514)), {"image": 0}, "give the last one"),
    ],
)
def test_images_that_the_model_cannot_use(config, images, message):
    with pytest.raises(InputError, match=message):
        SamplingParams("a", **{name: picture(seed) for name, seed in images.items()}).resolve(config)


def test_the_pipeline_checks_too(i2v, t2v):
    with pytest.raises(InputError, match="give an image"):
        i2v("a", **SMALL)
    with pytest.raises(InputError, match="from text alone"):
        t2v("a", image=picture(0), **SMALL)
    with pytest.raises(InputError, match="need more than one"):
        i2v("a", image=picture(0), last_image=picture(1), size=(48, 32), frames=1, steps=1)


def test_a_last_image_of_another_shape_is_cut():
    request = SamplingParams("a", image=picture(0, 48, 32), last_image=picture(1, 100, 200), frames=9).resolve(I2V)
    assert request.last_image.size == request.image.size
    frames = frames_to_encode(I2V, request.image, request.last_image, (80, 48), 9)
    assert frames.shape == (9, 48, 80, 3)
    assert (frames[1:-1] == 0).all()
    assert np.abs(frames[[0, -1]]).max(axis=(1, 2, 3)).min() > 0.5


def test_extend_joins_at_one_frame(ti2v):
    clip = ti2v("a", image=picture(0), **SMALL)
    longer = ti2v.extend(clip, "b", frames=9, steps=2, seed=4)
    following = ti2v("b", image=clip.frames[-1], **SMALL, seed=4)
    np.testing.assert_array_equal(longer.frames[:9], clip.frames)
    np.testing.assert_array_equal(longer.frames[9:], following.frames[1:])
    assert longer.metadata["prompt"] == "b"
    assert longer.metadata["image"] == "the last frame before"
    assert longer.metadata["extends"] == {"frames": 9, **clip.metadata}


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        ("i2v-a14b", (1920, 1080), (1280, 720)),
        ("i2v-a14b", (1080, 1920), (720, 1280)),
        ("i2v-a14b", (832, 480), (832, 480)),  # one that it can do stays
        ("i2v-a14b", (1920, 1088), (1264, 720)),
        ("ti2v-5b", (1920, 1080), (1248, 704)),
        ("ti2v-5b", (720, 480), (1152, 768)),
    ],
)
def test_a_clip_of_any_size_can_be_extended(model, size, expected):
    clip = Video(np.stack([picture(0, *size)] * 2), fps=30)
    request = extension(clip, SamplingParams("a"), PRESETS[model]).resolve(PRESETS[model])
    assert (request.size, request.image.size, request.fps) == (expected, expected, 30)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(16, [1, 2, 3, 4, 5]), (32, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]), (8, [2, 4]), (12.5, [1, 2, 3, 5])],
)
def test_what_follows_a_clip_has_its_rate_and_size(fps, expected):
    """The k-th frame of 16 a second shows from k / 16 s after the clip's last frame."""
    clip = Video(np.zeros((3, 40, 64, 3), np.uint8), fps=fps)
    made = np.zeros((6, 32, 48, 3), np.uint8) + (np.arange(6, dtype=np.uint8) * 10)[:, None, None, None]
    frames = np.concatenate(list(following(clip, [made[:1], made[1:]], 16)))
    assert frames.shape[1:] == (40, 64, 3)
    assert (frames[:, 0, 0, 0] // 10).tolist() == expected


@pytest.fixture(scope="module")
def i2v_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2v") / "checkpoint"
    write_demo(folder, "orbax", I2V)
    return str(folder)


COMMON = ["--frames", "9", "--steps", "2", "--dtype", "float32", "--quiet"]


def test_commands(i2v_checkpoint, tmp_path, monkeypatch, capsys):
    """generate from an image; extend what came out."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(0)).save("first.png")
    Image.fromarray(picture(1)).save("last.png")
    images = ["--image", "first.png", "--last-image", "last.png", "--size", "48x32"]
    assert main(["generate", "a", "--checkpoint", i2v_checkpoint, *images, *COMMON]) == 0
    clip = read_video("out.mp4")
    assert clip.frames.shape == (9, 32, 48, 3)
    assert (clip.metadata["image"], clip.metadata["last_image"]) == ("first.png", "last.png")

    grey = np.repeat(picture(0)[..., :1], 3, axis=-1)  # H.264 halves the resolution of colours
    still = Video(np.stack([grey] * 6), fps=24, metadata={"prompt": "c"})
    still.save("still.mp4")
    assert main(["extend", "still.mp4", "b", "--checkpoint", i2v_checkpoint, *COMMON, "--output", "longer.mp4"]) == 0
    longer = read_video("longer.mp4")
    assert (longer.frames.shape, longer.fps, longer.metadata["fps"]) == ((6 + 13, 32, 48, 3), 24, 24)
    # H.264 at constant rate factor 10, twice; another frame would be 20 levels away or more.
    assert np.abs(longer.frames[:6].astype(int) - still.frames).mean(axis=(1, 2, 3)).max() < 4
    assert np.abs(longer.frames[6].astype(int) - still.frames[-1]).mean() > 20
    assert longer.metadata["extends"] == {"frames": 6, "prompt": "c", "file": "still.mp4"}
    assert capsys.readouterr().out.split() == ["out.mp4", "longer.mp4"]


def test_an_interrupted_extension_keeps_its_latents(i2v_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Video(np.stack([picture(0)] * 3)).save("clip.mp4")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("wan_jax.media.video.VideoWriter.write", interrupt)
    assert main(["extend", "clip.mp4", "b", "--checkpoint", i2v_checkpoint, *COMMON]) == 130
    (kept,) = tmp_path.glob("*.latents.npy")
    assert f"kept in {kept.name}" in capsys.readouterr().err
    assert np.load(kept).shape == (16, 3, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--image", "none.png"], "image none.png does not exist"),
        (["generate", "a", "--image", "text.mp4"], "image text.mp4 cannot be read"),
        (["generate", "a"], "demo-i2v makes videos from an image and a text; give an image"),
        (["generate", "a", "--last-image", "a.png"], "a last image needs a first one"),
        (["extend", "none.mp4", "a"], "video none.mp4 does not exist"),
        (["extend", "text.mp4", "a"], "text.mp4 cannot be read as a video"),
        (["extend", "clip.mp4"], "give a prompt"),
        (["extend", "clip.mp4", "a", "--output", "x.avi"], "unknown ending"),
        (["extend", "odd.gif", "a"], "output out.mp4: .mp4 needs even sizes, not 41x32"),
        (["extend", "clip.mp4", "a", "--size", "40x32"], "size 40x32: the width must be a multiple of 16"),
        (["extend", "clip.mp4", "a", "--crf", "70"], "crf 70: is from 0 to 51"),
        (["generate", "a", "--image", "a.png", "--output", "x.gif", "--fps", "60"], "at most 50 frames"),
    ],
)
def test_one_line_errors(arguments, message, i2v_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("a red circle")
    Image.fromarray(picture(0)).save("a.png")
    Video(np.stack([picture(0)] * 3)).save("clip.mp4")
    Video(np.stack([picture(0, 41, 32)] * 3)).save("odd.gif")
    assert main([*arguments, "--checkpoint", i2v_checkpoint, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_without_images_cannot_extend(diffusers_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Video(np.stack([picture(0)] * 3)).save("clip.mp4")
    assert main(["extend", "clip.mp4", "b", "--checkpoint", str(diffusers_tree), *COMMON]) == 2
    assert "makes videos from text alone" in capsys.readouterr().err
