"""Histograms of masks against NumPy, small parts against SciPy's labelling, and the rounding of confidences."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import label

from multisa.kernels import absorb_small_parts, confidence_levels, histogram, joint_histogram

UInt8 = npt.NDArray[np.uint8]


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (37, 41), (2, 5, 7), (257, 263)])
def test_counts_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(len(shape))
    rows = random.integers(0, 256, shape, dtype=np.uint8)
    columns = random.integers(0, 5, shape, dtype=np.uint8)
    for values in (rows, columns, rows[::2], columns.T):
        np.testing.assert_array_equal(histogram(values), np.bincount(values.ravel(), minlength=256))
    pairs = rows.astype(np.int64) * 256 + columns
    expected = np.bincount(pairs.ravel(), minlength=256 * 256).reshape(256, 256)
    np.testing.assert_array_equal(joint_histogram(rows, columns), expected)
    np.testing.assert_array_equal(joint_histogram(rows.T, columns.T), expected)


def test_other_arrays_are_refused() -> None:
    bytes_ = np.zeros((2, 3), np.uint8)
    numbers = np.zeros((2, 3), np.int64)
    with pytest.raises(TypeError, match="values: got int64, expected an array of uint8"):
        histogram(numbers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="columns: got int64"):
        joint_histogram(bytes_, numbers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got shapes \(2, 3\) and \(3, 2\)"):
        joint_histogram(bytes_, bytes_.T)


def test_confidence_levels_are_clipped_and_rounded() -> None:
    given = np.array([-1, 0, 0.2, 0.5, 0.6, 1, 2], np.float32)
    assert confidence_levels(given).tolist() == [0, 0, 51, 128, 153, 255, 255]


def number_parts(labels: UInt8) -> npt.NDArray[np.int64]:
    """The connected parts of a mask, numbered from 1; 0 where it is 255."""
    parts = np.zeros(labels.shape, np.int64)
    for class_id in np.setdiff1d(labels, [255]):
        found, _ = label(labels == class_id)
        parts[found > 0] = found[found > 0] + parts.max()
    return parts


def borders(parts: npt.NDArray[np.int64]) -> dict[int, Counter[int]]:
    """The lengths of the borders of each part with each neighbour."""
    found: dict[int, Counter[int]] = {}
    for one, other in ((parts[1:], parts[:-1]), (parts[:, 1:], parts[:, :-1])):
        for pair in zip(one.flat, other.flat, strict=True):
            for mine, neighbour in (pair, pair[::-1]):
                if mine != neighbour and mine and neighbour:
                    found.setdefault(int(mine), Counter())[int(neighbour)] += 1
    return found


def first_of_largest(labels: UInt8, kept: Sequence[int]) -> list[int]:
    """For each class of `kept` in the mask, the first pixel of its largest part, of equals of the first part."""
    numbers, first, areas = np.unique(number_parts(labels), return_index=True, return_counts=True)
    rows = sorted(zip(-areas, first, numbers, strict=True))
    found = [[at for _, at, number in rows if number and labels.flat[at] == class_id] for class_id in kept]
    return [pixels[0] for pixels in found if pixels]


def absorb_one_by_one(labels: UInt8, min_pixels: int, kept: Sequence[int] = ()) -> UInt8:
    """`absorb_small_parts` as it is described: the parts are found anew after each."""
    labels = labels.copy()
    pixels = first_of_largest(labels, kept)
    while True:
        parts = number_parts(labels)
        numbers, first, areas = np.unique(parts, return_index=True, return_counts=True)
        staying = {int(parts.flat[pixel]) for pixel in pixels}
        touching = {number: lengths for number, lengths in borders(parts).items() if number not in staying}
        small = [row for row in zip(areas, first, numbers, strict=True) if row[0] < min_pixels and row[2] in touching]
        if not small:
            return labels
        number = int(min(small)[2])
        ids = {neighbour: int(labels[parts == neighbour][0]) for neighbour in touching[number]}
        labels[parts == number] = min((-length, ids[other]) for other, length in touching[number].items())[1]


@settings(max_examples=150, deadline=None)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.sampled_from((0, 1, 2, 7, 255))),
    st.integers(1, 30),
    st.lists(st.sampled_from((0, 1, 2, 7, 9, 255)), max_size=4),
)
def test_small_parts_are_absorbed_as_described(labels: UInt8, min_pixels: int, kept: list[int]) -> None:
    before = labels.copy()
    absorbed = absorb_small_parts(labels, min_pixels, kept)
    np.testing.assert_array_equal(absorbed, absorb_one_by_one(labels, min_pixels, kept))
    assert set(kept) & set(np.unique(before)) <= set(np.unique(absorbed))
    np.testing.assert_array_equal(labels, before)


@pytest.mark.parametrize("min_pixels", [2, 9, 50, 10**12])
def test_small_parts_of_rows_longer_than_a_word(min_pixels: int) -> None:
    rng = np.random.default_rng(min_pixels)
    blocks = np.kron(rng.integers(0, 3, (6, 5)), np.ones((7, 13))).astype(np.uint8)
    labels = np.where(rng.random(blocks.shape) < 0.05, rng.choice([1, 2, 255], blocks.shape), blocks).astype(np.uint8)
    expected = absorb_one_by_one(labels, min_pixels)
    np.testing.assert_array_equal(absorb_small_parts(labels, min_pixels), expected)
    turned = np.asfortranarray(labels)
    np.testing.assert_array_equal(absorb_small_parts(turned, min_pixels), expected)


def test_a_speck_in_a_speck_ends_in_what_surrounds_both() -> None:
    labels = np.full((9, 9), 4, np.uint8)
    labels[3:6, 3:6] = 2
    labels[4, 4] = 1
    assert (absorb_small_parts(labels, 10) == 4).all()
    assert (absorb_small_parts(labels, 9) == np.where(labels == 1, 2, labels)).all()
    labels[4, 4] = 255
    assert (absorb_small_parts(labels, 9) == np.where(labels == 2, 4, labels)).all()


def test_of_equal_parts_the_first_is_kept() -> None:
    labels = np.full((6, 9), 4, np.uint8)
    labels[1, 6:8] = labels[3:5, 1] = labels[5, 8] = 2
    first = np.full_like(labels, 4)
    first[1, 6:8] = 2
    for kept in ([2], [2, 4, 2], [3, 2]):
        np.testing.assert_array_equal(absorb_small_parts(labels, 3, kept), first)
    assert (absorb_small_parts(labels, 3, [4]) == 4).all()
    first[3:5, 1] = 2  # large enough by itself
    np.testing.assert_array_equal(absorb_small_parts(labels, 2, [2]), first)


def test_parts_without_a_neighbour_stay() -> None:
    labels = np.array([[3, 255, 2], [255, 255, 255], [1, 1, 1]], np.uint8)
    np.testing.assert_array_equal(absorb_small_parts(labels, 100), labels)
    np.testing.assert_array_equal(absorb_small_parts(np.zeros((1, 1), np.uint8), 2), [[0]])


def test_small_parts_of_other_arguments() -> None:
    with pytest.raises(TypeError, match="labels: got int64, expected an array of uint8 class ids"):
        absorb_small_parts(np.zeros((2, 3), np.int64), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels: got shape \[2, 0\], expected \[H, W\]"):
        absorb_small_parts(np.zeros((2, 0), np.uint8), 4)
    with pytest.raises(ValueError, match="min_pixels: got 0, expected at least 1"):
        absorb_small_parts(np.zeros((2, 3), np.uint8), 0)
    with pytest.raises(ValueError, match=r"kept: got \[1, 256\], expected ids of 0\.\.255"):
        absorb_small_parts(np.zeros((2, 3), np.uint8), 4, [1, 256])
    with pytest.raises(TypeError, match="kept: got float, expected an integer"):
        absorb_small_parts(np.zeros((2, 3), np.uint8), 4, [1.0])  # type: ignore[list-item]
