"""Runs of masks against the encoders of pycocotools, and against what they stand for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_reference

from multisa.kernels import encode_rle
from multisa.runtime.writers.base import RowRuns, encode_rows, ordered_rows, row_runs
from multisa.runtime.writers.label_studio import encode_label_studio_rle


@st.composite
def masks(draw) -> np.ndarray:
    height, width, block = draw(st.tuples(*[st.integers(1, 40)] * 2, st.integers(1, 12)))
    ids = draw(st.lists(st.integers(0, 255), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    small = random.choice(ids, (height // block + 1, width // block + 1))
    return np.kron(small, np.ones((block, block), np.int64))[:height, :width].astype(np.uint8)


@given(mask=masks())
def test_run_lengths_are_those_of_pycocotools(mask: np.ndarray) -> None:
    encoded = encode_rle(mask)
    assert [m.class_id for m in encoded] == np.unique(mask).tolist()
    for one in encoded:
        expected = coco_reference.encode(np.asfortranarray(mask == one.class_id))
        assert one.compressed.decode() == expected["counts"].decode()
        assert one.area == coco_reference.area(expected)
        assert list(one.box) == coco_reference.toBbox(expected).tolist()


def test_long_runs_of_coco() -> None:
    mask = np.zeros((3000, 2000), np.uint8)
    mask[:, 700] = 1
    mask[5, 900:] = 1
    expected = coco_reference.encode(np.asfortranarray(mask == 1))
    assert encode_rle(mask)[1].compressed.decode() == expected["counts"].decode()


@given(mask=masks())
def test_row_runs_cover_the_mask(mask: np.ndarray) -> None:
    flat = np.full(mask.size, -1)
    for runs in row_runs(mask[:, ::-1]):
        for start, end in zip(runs.starts, runs.ends, strict=True):
            assert (flat[start:end] == -1).all() and end > start
            flat[start:end] = runs.class_id
    assert (flat == mask[:, ::-1].ravel()).all()


def _two_long_runs() -> np.ndarray:
    """Runs longer than one length can say, of the class and of what is not."""
    mask = np.zeros((200, 200), np.uint8)
    mask[100:] = 1
    mask[3, 5:80] = 1
    return mask


# Made by Label Studio's own encoder (label-studio-sdk 2.1.2, converter/brush.py: mask2rle); tests/importers
# compares with it as it is installed.
@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (np.ones((1, 1), np.uint8), "00 00 00 04 39 1b fc 7f e0"),
        (np.array([[0, 1, 1, 0], [0, 0, 0, 1]], np.uint8), "00 00 00 20 39 1b fc 60 13 ff df 00 8f fc"),
        (np.ones((10, 1639), np.uint8), "00 01 00 18 39 1b ff ff ff ff e0 02 ff e0"),  # a short rest of a long run
        (_two_long_runs(), "00 02 71 00 39 1b ff 09 73 00 e0 25 7f ff ff fc 03 96 ef 80 7f ff ff fe 70 ff fe"),
    ],
)
def test_brushes(mask: np.ndarray, code: str) -> None:
    (runs,) = (runs for runs in row_runs(mask) if runs.class_id)
    assert encode_label_studio_rle(runs, mask.size) == bytes.fromhex(code)


def test_brushes_of_more_than_the_header_counts_are_refused() -> None:
    runs = RowRuns(1, np.array([0]), np.array([1]))
    with pytest.raises(ValueError, match="at most 1073741823"):
        encode_label_studio_rle(runs, 2**30)


class Parts:
    """Parts of shards that are made when they are asked for."""

    def __init__(self, indices: list[list[int]]) -> None:
        self.indices, self.read = indices, 0

    def parts(self, writer: str):
        for shard in self.indices:
            self.read += 1
            yield encode_rows((index, [b"%d" % index, b"x"]) for index in shard)


@pytest.mark.parametrize(
    "shards",
    [
        [],
        [[]],
        [[0, 1], [2, 3], [4]],
        [[0, 3], [], [5, 9], [1, 4], [7], [], [2], [8]],
        [[10], [9], [8], []],
        [[], [3], [], [1, 2]],
    ],
)
def test_rows_come_by_index_whatever_the_order_of_the_shards(shards: list[list[int]]) -> None:
    rows = list(ordered_rows(Parts(shards), "s"))
    assert [index for index, _ in rows] == sorted(index for shard in shards for index in shard)
    assert all(fields == [b"%d" % index, b"x"] for index, fields in rows)


def test_rows_are_read_one_shard_at_a_time() -> None:
    folder = Parts([[shard] for shard in range(50)])
    rows = ordered_rows(folder, "s")
    next(rows)
    assert folder.read <= 50 + 2  # looked through once for the order, then one by one
