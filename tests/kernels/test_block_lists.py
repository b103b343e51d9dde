import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.kernels.attention.block_lists import BlockLists, along_time, from_key_ranges, temporal_window

pytestmark = pytest.mark.quick

SHAPE = (5, 7, 9)  # 63 tokens a frame: no edge of a frame or a place falls on a block
LENGTH = 5 * 7 * 9


def frames_and_places(shape, order):
    """The frame and the place of each token."""
    frames, height, width = shape
    grid = np.arange(frames * height * width).reshape(frames, height * width)
    if order == "place first":
        grid = grid.T
    return np.divmod(grid.ravel(), height * width)


@pytest.mark.parametrize("window", [0, 1, 3, 10])
@pytest.mark.parametrize("key_block", [32, 64])
def test_temporal_window_sees_the_frames_around(window, key_block):
    lists = temporal_window(SHAPE, window, query_tile=64, key_block=key_block)
    frame, _ = frames_and_places(SHAPE, "frame first")
    expected = abs(frame[:, None] - frame[None, :]) <= window
    np.testing.assert_array_equal(lists.mask(LENGTH, LENGTH), expected)


def test_along_time_sees_one_place_in_all_frames():
    lists = along_time(SHAPE, query_tile=64, key_block=32)
    _, place = frames_and_places(SHAPE, "place first")
    np.testing.assert_array_equal(lists.mask(LENGTH, LENGTH), place[:, None] == place[None, :])


def test_lists_are_as_short_as_they_can_be():
    """Blocks that nobody sees are not listed; those that all of a tile see wholly need no range."""
    lists = temporal_window((8, 8, 8), 1, query_tile=64, key_block=64)  # a frame is a tile and a block
    assert lists.counts.tolist() == [2, 3, 3, 3, 3, 3, 3, 2]
    assert not lists.partial_counts.any()
    lists = temporal_window((8, 8, 8), 1, query_tile=64, key_block=32)
    assert lists.counts.tolist() == [4, 6, 6, 6, 6, 6, 6, 4]
    # Half a frame a block: the window's ends are whole blocks still.
    assert not lists.partial_counts.any()
    # 720p: the lists of a window of 2 frames keep little more than 5/21 of the work, and 1/21 per frame of edges.
    lists = temporal_window((21, 45, 80), 2)
    kept = int(lists.counts.sum()) * lists.query_tile * lists.key_block / 75_600**2
    assert 0.2 < kept < 0.24


def test_queries_that_see_nothing():
    ranges = np.array([[0, 0]] * 4 + [[2, 6]] * 4 + [[0, 0], [0, 8], [0, 8], [0, 8]])
    lists = from_key_ranges(ranges, 8, query_tile=4, key_block=4)
    assert lists.counts.tolist() == [0, 2, 2]
    assert lists.partial_counts.tolist() == [0, 2, 2]
    keys = np.arange(8)
    expected = (ranges[:, :1] <= keys) & (keys < ranges[:, 1:])
    np.testing.assert_array_equal(lists.mask(12, 8), expected)


def test_mask_of_lists_per_head():
    indices = jnp.array([[[1, 0]], [[2, 0]]], jnp.int32)
    lists = BlockLists(indices, jnp.array([[2], [1]], jnp.int32), query_tile=4, key_block=2)
    expected = np.array([[1, 1, 1, 1, 0], [0, 0, 0, 0, 1]], bool)[:, None].repeat(3, axis=1)
    np.testing.assert_array_equal(lists.mask(3, 5), expected)


@pytest.mark.parametrize(
    ("indices", "counts", "message"),
    [
        ((3, 2), (3,), "do not fit 500 queries"),
        ((5, 4, 2), (5, 4), "do not fit 500 queries"),  # 3 heads
        ((1, 1, 1, 4, 2), (1, 1, 1, 4), "do not fit 500 queries"),
        ((4, 9), (4,), "do not fit 300 keys"),
        ((4, 0), (4,), "do not fit 300 keys"),
        ((4, 2), (1, 4), "block counts"),
    ],
)
def test_shapes_that_do_not_fit(indices, counts, message):
    lists = BlockLists(jnp.zeros(indices, jnp.int32), jnp.zeros(counts, jnp.int32))
    with pytest.raises(ValueError, match=message):
        lists.check(batch=2, heads=3, query_length=500, key_length=300)


@pytest.mark.parametrize("lead", [(), (1,), (3,), (1, 1), (2, 1), (1, 3), (2, 3)])
def test_leading_axes_that_fit(lead):
    lists = BlockLists(jnp.zeros((*lead, 4, 2), jnp.int32), jnp.zeros((*lead, 4), jnp.int32))
    lists.check(batch=2, heads=3, query_length=500, key_length=300)


def test_bad_ranges():
    with pytest.raises(ValueError, match="leaves the 8 keys"):
        from_key_ranges(np.array([[0, 9]]), 8)
    with pytest.raises(ValueError, match="sees nothing"):
        temporal_window(SHAPE, -1)
    lists = from_key_ranges(np.array([[0, 8]] * 7), 8)
    with pytest.raises(ValueError, match="do not fit 6 queries"):
        lists.check(batch=1, heads=1, query_length=6, key_length=8)
