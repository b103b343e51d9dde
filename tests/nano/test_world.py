"""Scenes, captions and pictures of the procedural world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.errors import InputError
from wan_jax.text.tokenizer import Tokenizer
from wan_nano.captions import LANGUAGES, write_captions
from wan_nano.data import chunks, make_chunk, train_tokenizer
from wan_nano.digits import digit_atlas, digit_textures, load_digits, save_digits
from wan_nano.render import DISTANCES, draw_opacities, draw_paths, render_batch, render_scenes
from wan_nano.scenes import COLOURS, KINDS, MOTIONS, NEVER_ROTATE, SHAPES, draw_scenes, held_out
from wan_nano.vocab import FRAMES


@pytest.fixture(scope="module")
def atlas():
    return jnp.asarray(digit_atlas())


def test_scenes_are_a_function_of_the_seed():
    one, same, other = draw_scenes(3, 50), draw_scenes(3, 50), draw_scenes(4, 50)
    for name, array in one.as_dict().items():
        np.testing.assert_array_equal(array, same.as_dict()[name])
    assert (one.kind != other.kind).any()


@pytest.mark.parametrize("want", [False, True])
def test_held_out_combinations_stay_apart(want):
    scenes = draw_scenes(0, 3000, want_held_out=want)
    assert (held_out(scenes.kind, scenes.colour, scenes.motion) == want).all()
    assert (scenes.colour[:, 0] != scenes.colour[:, 1]).all()
    assert scenes.count.min() == 1
    assert scenes.count.max() == 2
    rotating = scenes.kind[scenes.motion == MOTIONS.index("rotate")]
    assert not {KINDS[kind] for kind in rotating} & set(NEVER_ROTATE)


def test_training_sees_every_pair_of_attributes():
    """What is held out are triples: each object in each colour, and each of both in each motion, is trained on."""
    kind, colour, motion = np.meshgrid(*map(np.arange, (len(KINDS), len(COLOURS), len(MOTIONS))), indexing="ij")
    trained = ~held_out(kind, colour, motion)
    assert 0.85 < trained.mean() < 0.95
    for axis in range(3):
        assert trained.any(axis=axis).all()


def test_captions():
    scenes = draw_scenes(0, 400)
    captions = write_captions(scenes, 0)
    assert [row[0].text for row in captions] == [row[0].text for row in write_captions(scenes, 0)]
    texts = {language: [row[n].text for row in captions] for n, language in enumerate(LANGUAGES)}
    for language, lines in texts.items():
        assert len(set(lines)) > 390, language  # many phrasings
        assert not any("{" in text or "None" in text for text in lines)
    # Every attribute can be told from the words: the same attribute has its own, another attribute has others.
    for kind, word in (("ring", "hoop"), ("moon", "月牙"), ("heart", "ハート")):
        index = KINDS.index(kind)
        for language, lines in texts.items():
            for text, row, count in zip(lines, scenes.kind, scenes.count, strict=True):
                if word in text:
                    assert index in row[:count], (language, text)
    red = list(COLOURS).index("red")
    for n, words in enumerate((("red", "crimson", "scarlet"), ("红",), ("赤",))):
        for row, colours, kinds, count in zip(captions, scenes.colour, scenes.kind, scenes.count, strict=True):
            has_red = red in colours[:count]
            text = row[n].text.lower().replace("粉红", "")
            assert any(word in text for word in words) == has_red, (text, kinds)


def test_some_sentence_frames_are_held_out():
    for trained, kept in FRAMES.values():
        for name in ("one", "two", "one_on", "two_on"):
            assert len(getattr(kept, name)) >= 2
            assert not set(getattr(trained, name)) & set(getattr(kept, name))


def test_tokens(tmp_path):
    train_tokenizer(tmp_path, 1024)
    chunk = make_chunk(5, tmp_path, 64, number=200)
    assert chunk["tokens"].shape == chunk["mask"].shape == (200, 3, 64)
    assert chunk["tokens"].max() < 1024
    # Nothing is cut, and nothing of the grammar is unknown (id 2).
    assert chunk["mask"].sum(axis=-1).max() < 64
    assert not (chunk["tokens"] == 2).any()
    first, second = (next(chunks(start, tmp_path, 64, workers=0, number=4)) for start in (0, 1))
    assert (first["tokens"] != second["tokens"]).any()
    tokens, mask = Tokenizer.from_pretrained(tmp_path)(["一个红色的圆", "a red circle", "赤い円"], 64)
    assert mask.sum(axis=1).tolist() == [8, 5, 5]  # a token for each character, or for each word; and an end
    del tokens


def test_shapes_fill_the_unit_circle():
    axis = np.linspace(-1.5, 1.5, 151)
    x, y = np.meshgrid(axis, axis)
    areas = {}
    for name, distance in DISTANCES.items():
        inside = np.asarray(distance(jnp.asarray(x), jnp.asarray(y))) < 0
        assert np.hypot(x, y)[inside].max() < 1.25, name
        areas[name] = inside.mean() * 9
    assert tuple(DISTANCES) == SHAPES
    assert 0.8 < min(areas.values()) < max(areas.values()) < 3.0, areas


def test_opacities_are_antialiased(atlas):
    pictures = np.asarray(draw_opacities(jax.random.key(0), jnp.arange(len(KINDS)), atlas))
    assert pictures.min() == 0
    assert pictures.max() == 1
    between = ((pictures > 0.05) & (pictures < 0.95)).any(axis=(1, 2))
    assert between.all()


def test_videos(atlas):
    scenes = draw_scenes(1, 6)
    videos = np.asarray(render_batch(0, scenes.as_dict(), atlas, frames=5, size=(48, 32)))
    assert videos.shape == (6, 5, 32, 48, 3)
    assert -1 <= videos.min() < videos.max() <= 1
    again = render_batch(0, scenes.as_dict(), atlas, frames=5, size=(48, 32))
    np.testing.assert_array_equal(videos, again)
    assert (np.asarray(render_batch(1, scenes.as_dict(), atlas, frames=5, size=(48, 32))) != videos).any()


def test_a_shape_of_ones_own(atlas):
    """The first object is drawn by it and the second is not: a shape without end hides all but what is in front."""
    scenes = draw_scenes(0, 4, pairs=1.0)
    scenes.kind[:] = KINDS.index("circle")
    videos = render_scenes(0, scenes, atlas, frames=1, size=(32, 32), shape=lambda x, y: jnp.full_like(x + y, -1.0))
    first = np.array(list(COLOURS.values()))[scenes.colour[:, 0]]
    assert np.abs(videos - 255 * first[:, None, None, None]).max() <= 1  # rounded to one of 255 levels


@pytest.mark.parametrize("size", [(96, 96), (128, 64)])
def test_objects_stay_in_the_frame(size):
    scenes = draw_scenes(2, 64)
    draw = jax.jit(jax.vmap(lambda key, scene: draw_paths(key, scene, 33, size)))
    paths = draw(jax.random.split(jax.random.key(0), 64), scenes.as_dict())
    extent = np.array(size) / min(size)
    margin = np.asarray(paths.radius)[..., None]
    centre = np.asarray(paths.centre)
    single = scenes.count == 1
    for inside in (centre[single, 0] - margin[single, 0], extent - centre[single, 0] - margin[single, 0]):
        assert inside.min() > -0.02  # a path that is a little too long for the frame is centred
    gap = np.linalg.norm(centre[:, 0] - centre[:, 1], axis=-1) / (margin[:, 0, :, 0] + margin[:, 1, :, 0])
    apart = gap.min(axis=1)[~single]
    assert (apart > 0.9).mean() > 0.85  # two objects seldom pass through each other


def test_digits(tmp_path):
    images, digits = load_digits()
    assert images.shape == (1797, 8, 8)
    assert images.max() == 1
    save_digits(tmp_path / "digits.npz")
    again, labels = load_digits(tmp_path / "digits.npz")
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(digits, labels)
    assert digit_textures(images[:3]).shape == (3, 32, 32)
    train, test = digit_atlas(), digit_atlas(test=True)
    assert train.shape[0] == test.shape[0] == 10
    assert train.shape[1] > 3 * test.shape[1]
    with pytest.raises(InputError, match="does not exist"):
        load_digits(tmp_path / "none.npz")
