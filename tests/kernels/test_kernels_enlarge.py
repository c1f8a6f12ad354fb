"""Enlarged probabilities against bilinear interpolation and argmax in float64, on every instruction set."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_checks import check_enlarged, enlarge_reference

from multisa.kernels import confidence_levels, enlarge_probabilities
from multisa.kernels.cpu import native

Float32 = npt.NDArray[np.float32]
SIDE = st.integers(1, 40)


def on_each_instruction_set() -> Iterator[str]:
    """Switch to each instruction set of this processor in turn."""
    before = native.instruction_set()
    try:
        for name in native.instruction_sets():
            native.choose_instruction_set(name)
            yield name
    finally:
        native.choose_instruction_set(before)


def maps(kind: str, classes: int, height: int, width: int, seed: int) -> Float32:
    """Softmax of noise, of waves (most cells have one class), or few values, so that most pixels have a tie."""
    rng = np.random.default_rng(seed)
    if kind == "ties":
        return rng.integers(0, 3, (classes, height, width)).astype(np.float32) / 2
    logits = rng.normal(size=(classes, height, width)) * 4
    if kind == "waves":
        y, x = np.mgrid[:height, :width]
        phase = rng.random((3, classes, 1, 1)) * 6
        logits = 5 * np.sin(y * phase[0] / 20 + x * phase[1] / 20 + phase[2])
    powers = np.exp(logits)
    return (powers / powers.sum(axis=0)).astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(("noise", "waves", "ties")),
    st.sampled_from((1, 2, 3, 7, 21, 256)),
    st.tuples(SIDE, SIDE),
    st.tuples(SIDE, SIDE),
    st.integers(0, 9),
)
def test_any_sizes(kind: str, classes: int, source: tuple[int, int], target: tuple[int, int], seed: int) -> None:
    probabilities = maps(kind, classes, *source, seed)
    ids = np.random.default_rng(seed).permutation(256)[:classes]
    for _ in on_each_instruction_set():
        labels, confidence = enlarge_probabilities(probabilities, target, ids.tolist())
        assert labels.dtype == confidence.dtype == np.uint8 and labels.shape == confidence.shape == target
        check_enlarged(labels, confidence, probabilities, ids)


@pytest.mark.parametrize("kind", ["noise", "waves"])
@pytest.mark.parametrize(("source", "target"), [((24, 32), (375, 500)), ((94, 125), (375, 500)), ((64, 80), (13, 17))])
def test_labels_of_images(kind: str, source: tuple[int, int], target: tuple[int, int]) -> None:
    probabilities = maps(kind, 7, *source, 3)
    reference = enlarge_reference(probabilities, target)
    first, second = np.sort(reference, axis=0)[-1:-3:-1]
    clear = first - second > 1e-6
    assert clear.mean() > 0.999
    for _ in on_each_instruction_set():
        labels, confidence = enlarge_probabilities(probabilities, target)
        np.testing.assert_array_equal(labels[clear], reference.argmax(axis=0)[clear])
        assert np.abs(confidence - confidence_levels(first.astype(np.float32)).astype(int)).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (5, 3), (40, 33)])
def test_equal_size_is_the_plain_argmax(size: tuple[int, int]) -> None:
    for kind in ("noise", "ties"):
        probabilities = maps(kind, 5, *size, 1)
        for _ in on_each_instruction_set():
            labels, confidence = enlarge_probabilities(probabilities, size, [5, 4, 3, 255, 1])
            expected = np.array([5, 4, 3, 255, 1], np.uint8)[probabilities.argmax(axis=0)]
            np.testing.assert_array_equal(labels, expected)
            np.testing.assert_array_equal(confidence, confidence_levels(probabilities.max(axis=0)))


def test_confidences_are_rounded_as_by_confidence_levels() -> None:
    halves = (np.arange(255, dtype=np.float32) + np.float32(0.5)) / np.float32(255)
    around = [np.nextafter(halves, np.float32(end)) for end in (0, 1)]
    probabilities = np.stack([halves, *around])[None]
    for _ in on_each_instruction_set():
        _, confidence = enlarge_probabilities(probabilities, (3, 255))
        np.testing.assert_array_equal(confidence, confidence_levels(probabilities[0]))


@pytest.mark.parametrize(("source", "scale"), [((1, 1), (3, 2)), ((9, 11), (8, 4)), ((20, 5), (2, 32))])
def test_the_first_of_equals_wins_where_the_arithmetic_is_exact(
    source: tuple[int, int], scale: tuple[int, int]
) -> None:
    size = (source[0] * scale[0], source[1] * scale[1])
    for seed in range(10):
        probabilities = maps("ties", 4, *source, seed)
        expected = enlarge_reference(probabilities, size).argmax(axis=0)
        for _ in on_each_instruction_set():
            np.testing.assert_array_equal(enlarge_probabilities(probabilities, size)[0], expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 0, 1, 2), (2, 0, 2, 1, 1, 0)])
def test_the_first_of_equals_wins(order: tuple[int, ...]) -> None:
    three = maps("waves", 3, 9, 11, 2)
    first = np.array([order.index(label) for label in range(3)], np.uint8)
    for _ in on_each_instruction_set():
        alone, confidence = enlarge_probabilities(three, (70, 90))
        labels, same = enlarge_probabilities(three[list(order)], (70, 90))
        np.testing.assert_array_equal(labels, first[alone])
        np.testing.assert_array_equal(same, confidence)


def test_threads_side_by_side_answer_alike() -> None:
    scenes = [maps("waves", 4, 20 + i, 31, i) for i in range(6)]
    alone = [enlarge_probabilities(scene, (150, 170)) for scene in scenes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda scene: enlarge_probabilities(scene, (150, 170)), scenes * 3))
    for index, results in enumerate(together):
        for got, expected in zip(results, alone[index % len(alone)], strict=True):
            np.testing.assert_array_equal(got, expected)


def test_any_memory_layout() -> None:
    probabilities = maps("noise", 3, 12, 10, 4)
    flipped = probabilities[:, ::-1, ::-1]
    for got, expected in zip(
        enlarge_probabilities(flipped, (31, 29)), enlarge_probabilities(flipped.copy(), (31, 29)), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.001, 1.001])
@pytest.mark.parametrize("at", [0, 66])
@pytest.mark.parametrize("size", [(40, 30), (3, 2), (6, 4)])
def test_values_outside_are_refused(value: float, at: int, size: tuple[int, int]) -> None:
    probabilities = maps("noise", 3, 6, 4, 0)
    probabilities.flat[at] = value
    for _ in on_each_instruction_set():
        with pytest.raises(ValueError, match=r"probabilities: got values from .*, expected \[0, 1\]"):
            enlarge_probabilities(probabilities, size)


def test_rounding_may_leave_the_range() -> None:
    probabilities = np.array([[[1 + 1e-6, 1 + 5e-6]], [[-1e-6, -5e-6]]], np.float32)
    for _ in on_each_instruction_set():
        labels, confidence = enlarge_probabilities(probabilities, (3, 50))
        assert (labels == 0).all() and (confidence == 255).all()
        assert (enlarge_probabilities(probabilities[1:], (3, 50))[1] == 0).all()


def test_arguments_that_cannot_be() -> None:
    good = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(TypeError, match="probabilities: got float64, expected a float32 array"):
        enlarge_probabilities(good.astype(np.float64), (5, 6))  # type: ignore[arg-type]
    for shape in ((3, 4), (0, 3, 4), (257, 3, 4), (2, 3, 0), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"expected \[C, h, w\] with C of 1..256"):
            enlarge_probabilities(np.zeros(shape, np.float32), (5, 6))
    with pytest.raises(ValueError, match="size: got 0, expected at least 1"):
        enlarge_probabilities(good, (5, 0))
    with pytest.raises(TypeError, match="size: got float"):
        enlarge_probabilities(good, (5.0, 6))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at most 2147483392 values in each; cut the image into tiles"):
        enlarge_probabilities(good, (50_000, 50_000))
    for size in (5, (5,), (5, 6, 7), "5 6"):
        with pytest.raises(ValueError, match=r"size: got .*, expected two whole numbers \(H, W\)"):
            enlarge_probabilities(good, size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected 2 ids of 0\.\.255"):
        enlarge_probabilities(good, (5, 6), [0, 256])
    with pytest.raises(ValueError, match=r"expected 2 ids of 0\.\.255"):
        enlarge_probabilities(good, (5, 6), [0, 1, 2])
    with pytest.raises(TypeError, match="class_ids: got float64"):
        enlarge_probabilities(good, (5, 6), [0.0, 1.0])  # type: ignore[list-item]
