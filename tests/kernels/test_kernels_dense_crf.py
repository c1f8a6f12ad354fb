"""The dense CRF against pydensecrf, and its filter against the Gaussian it approximates."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from permutohedral_reference import GaussianFilter
from scipy.ndimage import gaussian_filter

from multisa.kernels import CrfParameters, DenseCRF, dense_crf

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

PSA = CrfParameters()
IRN = replace(PSA, bilateral_sxy=50.0, bilateral_srgb=5.0)
SOFT = CrfParameters(
    iterations=5, spatial_sxy=1.5, spatial_compat=2.0, bilateral_sxy=20.0, bilateral_srgb=8.0, bilateral_compat=4.0
)
NAMES = ("psa", "irn", "soft")
PARAMETERS = (PSA, IRN, SOFT)


def scene(labels: int, height: int, width: int, seed: int = 0) -> tuple[UInt8, Float32]:
    """Make an image of smooth regions with edges and noise, and blobs of class probabilities unlike them."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.standard_normal((height, width, 3)), (10, 10, 0))
    smooth = 200 * (smooth - smooth.min()) / max(float(np.ptp(smooth)), 1e-9)
    step = 50 * (gaussian_filter(rng.standard_normal((height, width)), 15) > 0)
    noisy = smooth + step[..., None] + rng.normal(0, 4, (height, width, 3))
    logits = 25 * gaussian_filter(rng.standard_normal((labels, height, width)), (0, 6, 6))
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=0)
    return noisy.clip(0, 255).astype(np.uint8), probabilities.astype(np.float32)


def require_pydensecrf() -> None:
    """Skip the test where the reference package is missing."""
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")


@pytest.mark.parametrize("parameters", PARAMETERS, ids=NAMES)
@pytest.mark.parametrize(
    ("labels", "height", "width"), [(2, 94, 125), (3, 97, 61), (7, 120, 160), (1, 20, 31), (4, 1, 40), (2, 37, 1)]
)
def test_parity_with_pydensecrf(parameters: CrfParameters, labels: int, height: int, width: int) -> None:
    require_pydensecrf()
    image, probabilities = scene(labels, height, width)
    expected = dense_crf(image, probabilities, parameters, backend="pydensecrf")
    belief = dense_crf(image, probabilities, parameters)
    assert belief.dtype == np.float32 and belief.shape == probabilities.shape
    assert np.abs(belief - expected).max() < 1e-4
    assert (belief.argmax(axis=0) == expected.argmax(axis=0)).all()


@pytest.mark.parametrize("parameters", PARAMETERS, ids=NAMES)
def test_parity_input_is_meaningful(parameters: CrfParameters) -> None:
    image, probabilities = scene(3, 94, 125)
    before, after = probabilities.argmax(axis=0), DenseCRF(image, parameters).infer(probabilities)
    changed = (before != after.argmax(axis=0)).mean()
    assert 0.05 < changed < 0.8
    assert len(np.unique(after.argmax(axis=0))) >= 2


def test_parity_on_a_whole_photo_size() -> None:
    require_pydensecrf()
    image, probabilities = scene(3, 375, 500)
    expected = dense_crf(image, probabilities, backend="pydensecrf")
    belief = DenseCRF(image).infer(probabilities)
    assert np.abs(belief - expected).max() < 1e-4
    assert (belief.argmax(axis=0) == expected.argmax(axis=0)).all()


@pytest.mark.parametrize("n_labels", [2, 3, 7])
def test_label_parity_with_pydensecrf(n_labels: int) -> None:
    require_pydensecrf()
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_labels

    image, probabilities = scene(n_labels, 60, 83)
    labels = probabilities.argmax(axis=0).astype(np.uint8)
    crf = DenseCRF2D(83, 60, n_labels)
    crf.setUnaryEnergy(unary_from_labels(labels, n_labels, gt_prob=0.7, zero_unsure=False))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=image.copy(), compat=10)
    expected = np.array(crf.inference(10)).reshape(n_labels, 60, 83)
    belief = DenseCRF(image, IRN).infer_labels(labels, n_labels)
    assert np.abs(belief - expected).max() < 1e-4
    assert (belief.argmax(axis=0) != labels).any()


def test_filters_are_those_of_the_numpy_reference() -> None:
    image, probabilities = scene(4, 40, 52, seed=3)
    y, x = np.indices((40, 52), dtype=np.float32).reshape(2, -1)
    position = np.stack([x, y])
    colour = image.reshape(-1, 3).T.astype(np.float32)
    spatial = GaussianFilter(position / np.float32(3))
    bilateral = GaussianFilter(np.concatenate([position / np.float32(80), colour / np.float32(13)]))
    unary = -np.log(probabilities.reshape(4, -1).clip(1e-5, 1)).T
    belief = np.exp(-unary) / np.exp(-unary).sum(axis=1, keepdims=True)
    for _ in range(PSA.iterations):
        logits = 3 * spatial(belief.astype(np.float32)) + 10 * bilateral(belief.astype(np.float32)) - unary
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        belief = powers / powers.sum(axis=1, keepdims=True)
    refined = DenseCRF(image).infer(probabilities)
    np.testing.assert_allclose(refined.reshape(4, -1).T, belief, atol=1e-4)


def test_absent_labels_take_no_part() -> None:
    image, probabilities = scene(3, 30, 40)
    among = np.zeros((21, 30, 40), np.float32)
    among[[0, 7, 20]] = probabilities
    refined = dense_crf(image, among)
    np.testing.assert_array_equal(refined[[0, 7, 20]], dense_crf(image, probabilities))
    assert refined.sum(axis=0) == pytest.approx(1, abs=1e-5)
    # Where no label is present, all of them are.
    nothing = dense_crf(image, np.zeros((3, 30, 40), np.float32))
    assert nothing == pytest.approx(1 / 3, abs=1e-5)


def test_as_many_labels_as_masks_can_hold() -> None:
    image, probabilities = scene(256, 9, 13)
    refined = dense_crf(image, probabilities)
    assert refined.sum(axis=0) == pytest.approx(1, abs=1e-4)
    many = np.zeros((1000, 9, 13), np.float32)
    many[:: 1000 // 255][:256] = probabilities
    np.testing.assert_array_equal(dense_crf(image, many)[:: 1000 // 255][:256], refined)


def test_read_only_image() -> None:
    image, probabilities = scene(3, 30, 40)
    expected = dense_crf(image, probabilities)
    image.setflags(write=False)
    probabilities.setflags(write=False)
    np.testing.assert_array_equal(dense_crf(image, probabilities), expected)


@pytest.mark.parametrize("labels", [1, 4, 5, 9, 17, 25, 40])
def test_batches_are_single_images(labels: int) -> None:
    scenes = [scene(labels, 20, 27, seed) for seed in range(3)]
    images, probabilities = (np.stack(arrays) for arrays in zip(*scenes, strict=True))
    refined = dense_crf(images, probabilities)
    for index, (image, maps) in enumerate(scenes):
        np.testing.assert_array_equal(refined[index], dense_crf(image, maps))


def test_permuted_labels_give_permuted_beliefs() -> None:
    image, probabilities = scene(5, 30, 40)
    order = [3, 0, 4, 1, 2]
    np.testing.assert_allclose(
        dense_crf(image, probabilities[order]), dense_crf(image, probabilities)[order], atol=1e-4
    )


def test_one_crf_serves_several_unaries() -> None:
    image, probabilities = scene(3, 40, 52)
    _, others = scene(4, 40, 52, seed=1)
    crf = DenseCRF(image)
    first = crf.infer(probabilities)
    np.testing.assert_array_equal(crf.infer(others), DenseCRF(image).infer(others))
    np.testing.assert_array_equal(crf.infer(probabilities), first)
    np.testing.assert_allclose(first.sum(axis=0), 1, atol=1e-5)


def test_one_label_is_certain() -> None:
    image, probabilities = scene(1, 12, 9)
    crf = DenseCRF(image)
    assert (crf.infer(probabilities) == 1).all()
    assert (crf.infer_labels(np.zeros((12, 9), np.uint8), 1) == 1).all()


def test_no_iteration_is_the_softmax_of_the_unary() -> None:
    image, probabilities = scene(3, 10, 11)
    belief = DenseCRF(image, replace(PSA, iterations=0)).infer(probabilities)
    np.testing.assert_allclose(belief, probabilities, atol=1e-4)


def test_strided_image_and_probabilities() -> None:
    image, probabilities = scene(3, 24, 30)
    flipped = dense_crf(image[:, ::-1], probabilities[:, :, ::-1])
    copied = dense_crf(image[:, ::-1].copy(), probabilities[:, :, ::-1].copy())
    np.testing.assert_array_equal(flipped, copied)


def test_smallest_image() -> None:
    belief = dense_crf(np.full((1, 1, 3), 7, np.uint8), np.array([0.3, 0.7], np.float32).reshape(2, 1, 1))
    assert belief[1, 0, 0] > 0.7


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    image, probabilities = scene(2, 4, 4)
    with pytest.raises(ImportError, match=r"pip install pydensecrf2 or use backend='cpu'"):
        dense_crf(image, probabilities, backend="pydensecrf")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": np.zeros((4, 4, 3))}, TypeError, "image: got float64"),
        ({"image": np.zeros((4, 4), np.uint8)}, ValueError, r"image: got shape \[4, 4\]"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, ValueError, "h, w >= 1"),
        ({"probabilities": np.zeros((2, 4, 4))}, TypeError, "probabilities: got float64"),
        ({"probabilities": np.zeros((2, 4, 5), np.float32)}, ValueError, "resize the maps"),
        ({"probabilities": np.zeros((0, 4, 4), np.float32)}, ValueError, "L >= 1"),
        ({"probabilities": np.ones((257, 4, 4), np.float32)}, ValueError, "got 257 labels"),
        ({"probabilities": np.full((2, 4, 4), np.nan, np.float32)}, ValueError, "got NaN"),
        ({"parameters": replace(PSA, spatial_sxy=1e-6)}, ValueError, "use larger standard deviations"),
        ({"backend": "gpu"}, ValueError, "auto, cpu, cuda, pydensecrf"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "image": np.zeros((4, 4, 3), np.uint8),
        "probabilities": np.ones((2, 4, 4), np.float32),
    }
    with pytest.raises(error, match=message):
        dense_crf(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"iterations": -1}, ValueError, "iterations: got -1"),
        ({"iterations": 1001}, ValueError, "iterations: got 1001, expected 0..1000"),
        ({"iterations": 1.5}, TypeError, "iterations: got float"),
        ({"spatial_sxy": 0.0}, ValueError, "spatial_sxy: got 0"),
        ({"bilateral_srgb": float("nan")}, ValueError, "bilateral_srgb: got nan"),
        ({"bilateral_compat": -1.0}, ValueError, "bilateral_compat: got -1"),
    ],
)
def test_bad_parameters(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CrfParameters(**change)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((4, 4), np.int64), 2), TypeError, "labels: got int64"),
        ((np.zeros((4, 5), np.uint8), 2), ValueError, r"labels: got shape \[4, 5\]"),
        ((np.full((4, 4), 2, np.uint8), 2), ValueError, "values up to 2"),
        ((np.zeros((4, 4), np.uint8), 0), ValueError, "n_labels: got 0"),
        ((np.zeros((4, 4), np.uint8), 257), ValueError, "n_labels: got 257, expected at most 256"),
        ((np.zeros((4, 4), np.uint8), 2, 1.0), ValueError, "confidence: got 1.0"),
    ],
)
def test_bad_labels(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DenseCRF(np.zeros((4, 4, 3), np.uint8)).infer_labels(*arguments)


def test_lattice_too_fine_for_its_keys() -> None:
    image = np.random.default_rng(5).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"bits for a vertex.*larger standard deviations"):
        DenseCRF(image, replace(PSA, bilateral_srgb=0.01))


@pytest.mark.parametrize("dimension", [1, 2, 3, 5])
def test_filter_approximates_the_gaussian(dimension: int) -> None:
    rng = np.random.default_rng(6)
    points = rng.uniform(0, 4, (dimension, 600)).astype(np.float32)
    values = rng.random((600, 2), dtype=np.float32) + (points[0] > 2)[:, None]
    distance = ((points[:, :, None] - points[:, None]) ** 2).sum(axis=0)
    kernel = np.exp(-distance / 2)
    root = np.sqrt(kernel.sum(axis=1))
    expected = (kernel / root / root[:, None]) @ values
    filtered = GaussianFilter(points)(values.astype(np.float32))
    relative = np.abs(filtered - expected).mean() / np.abs(expected - expected.mean()).mean()
    assert relative < 0.25  # the lattice is an approximation of about this quality
    assert np.corrcoef(filtered.ravel(), expected.ravel())[0, 1] > 0.98


def test_filter_is_symmetric() -> None:
    rng = np.random.default_rng(7)
    kernel = GaussianFilter(rng.uniform(0, 3, (1, 40)).astype(np.float32))(np.eye(40, dtype=np.float32))
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-6)
    assert (np.linalg.eigvalsh(kernel.astype(np.float64)) < 1.2).all()
