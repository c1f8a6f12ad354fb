"""Run lengths against pycocotools, byte by byte, and against decoding them again."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco

from multisa.kernels import encode_rle

UInt8 = npt.NDArray[np.uint8]
MASKS = Path(__file__).resolve().parents[3] / "shared/data/voc-animals/SegmentationClass"


def check(mask: UInt8) -> None:
    """Every class as pycocotools has it, and both counts decode to it."""
    classes = encode_rle(mask)
    assert [runs.class_id for runs in classes] == np.unique(mask).tolist()
    for runs in classes:
        inside = mask == runs.class_id
        oracle = coco.encode(np.asfortranarray(inside.astype(np.uint8)))
        assert runs.compressed == oracle["counts"]
        assert runs.area == coco.area(oracle) == inside.sum()
        assert list(runs.box) == coco.toBbox(oracle).tolist()
        assert runs.columns.dtype == runs.rows.dtype == np.uint32
        by_column, by_row = (np.repeat(np.arange(len(c)) % 2, c) for c in (runs.columns, runs.rows))
        np.testing.assert_array_equal(by_column.reshape(mask.shape[::-1]).T, inside)
        np.testing.assert_array_equal(by_row.reshape(mask.shape), inside)
        assert (runs.columns[1:] > 0).all() and (runs.rows[1:] > 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (2, 3), (13, 17), (64, 64), (65, 129), (200, 67)])
@pytest.mark.parametrize("ids", [1, 2, 7, 256])
def test_noise(size: tuple[int, int], ids: int) -> None:
    check(np.random.default_rng(ids).integers(0, ids, size, dtype=np.uint8))


@pytest.mark.parametrize("value", [0, 3, 255])
def test_one_class(value: int) -> None:
    (runs,) = encode_rle(np.full((5, 4), value, np.uint8))
    assert (runs.class_id, runs.area, runs.box) == (value, 20, (0, 0, 4, 5))
    assert runs.columns.tolist() == runs.rows.tolist() == [0, 20]


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.sampled_from((0, 1, 255))))
def test_any_mask(mask: UInt8) -> None:
    check(mask)


def test_long_runs_and_large_jumps() -> None:
    mask = np.zeros((700, 900), np.uint8)
    mask[100:600, 200:800] = 4
    mask[350, 500] = 9
    check(mask)


def test_views_equal_their_copies() -> None:
    mask = np.random.default_rng(2).integers(0, 3, (40, 60), dtype=np.uint8)
    for view in (mask[::2, 1::3], mask.T, mask[::-1]):
        assert not view.flags.c_contiguous
        check(view)


def test_masks_of_photographs() -> None:
    if not MASKS.exists():
        pytest.skip(f"no masks at {MASKS}")
    for path in sorted(MASKS.glob("*.png"))[::200]:
        check(np.array(Image.open(path)))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros((4, 4)), TypeError, "got float64"),
        ([[0]], TypeError, "got list"),
        (np.zeros(4, np.uint8), ValueError, r"got shape \[4\]"),
        (np.zeros((4, 0), np.uint8), ValueError, r"got shape \[4, 0\]"),
    ],
)
def test_bad_masks(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode_rle(mask)
