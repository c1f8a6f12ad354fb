"""Histograms of masks against NumPy, and the rounding of confidences."""

import numpy as np
import pytest

from multisa.kernels import confidence_levels, histogram, joint_histogram


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
