"""The stream for PNG against zlib, which takes it apart again."""

import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from multisa.kernels import deflate_mask

UInt8 = npt.NDArray[np.uint8]


def filtered(mask: UInt8) -> bytes:
    """What the stream must hold: each row minus the one above, the filter's number before it."""
    rows = np.diff(mask, axis=0, prepend=np.zeros((1, mask.shape[1]), np.uint8))
    return np.insert(rows, 0, 2, axis=1).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 70_001), (300, 1), (5, 258), (5, 259), (5, 260), (33, 517), (400, 300)])
@pytest.mark.parametrize("ids", [1, 2, 5, 256])
@pytest.mark.parametrize("width", [1, 9])
def test_zlib_reads_it(size: tuple[int, int], ids: int, width: int) -> None:
    noise = np.random.default_rng(ids).integers(0, ids, size, dtype=np.uint8)
    mask = np.repeat(noise, width, axis=1)[:, : size[1]]
    assert zlib.decompress(deflate_mask(mask)) == filtered(mask)


def test_every_length_of_a_match() -> None:
    for length in range(1, 600):
        mask = np.array([[1] + [7] * length + [1]], np.uint8)
        assert zlib.decompress(deflate_mask(mask)) == filtered(mask), length


def test_codes_that_would_be_too_long() -> None:
    # Counts like Fibonacci's make a code as deep as there are ids; deflate's end at 15 bits. No two
    # neighbours are alike, so that all are literals and counted as they are here.
    counts = [2, 3]  # after the row's filter and the end of the block, which occur once each
    while len(counts) < 19:
        counts.append(counts[-1] + counts[-2])
    ids = np.repeat(np.arange(10, 29, dtype=np.uint8), counts)[::-1]
    mask = np.empty((1, len(ids)), np.uint8)
    half = (len(ids) + 1) // 2
    mask[0, ::2], mask[0, 1::2] = ids[:half], ids[half:]
    assert (np.diff(mask) != 0).all()
    assert zlib.decompress(deflate_mask(mask)) == filtered(mask)


@settings(max_examples=100, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 300)), elements=st.integers(0, 255)))
def test_any_mask(mask: UInt8) -> None:
    assert zlib.decompress(deflate_mask(mask)) == filtered(mask)


def test_noise_hardly_grows() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (500, 400), dtype=np.uint8)
    assert len(deflate_mask(noise)) < 1.01 * noise.size


def test_views_and_threads_give_the_same_bytes() -> None:
    mask = np.random.default_rng(2).integers(0, 3, (80, 60), dtype=np.uint8)
    assert deflate_mask(mask.T) == deflate_mask(mask.T.copy())
    masks = [mask[i:] for i in range(20)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(deflate_mask, masks)) == [deflate_mask(one) for one in masks]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros((4, 4), np.int64), TypeError, "got int64"),
        (np.zeros((1, 4, 4), np.uint8), ValueError, r"got shape \[1, 4, 4\]"),
        (np.zeros((0, 4), np.uint8), ValueError, r"got shape \[0, 4\]"),
    ],
)
def test_bad_masks(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        deflate_mask(mask)
