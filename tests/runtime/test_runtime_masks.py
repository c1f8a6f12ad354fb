"""Masks from class probabilities: at the image's own size, without small parts."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from job_runs import records, run_label, run_segment
from PIL import Image
from plain_masks import clear, enlarge, part_sizes, tiny_probabilities

from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.bundle import Bundle, Manifest
from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.imaging.decode import read_mask, resize_image
from multisa.runtime.predict import prediction as prediction_module
from multisa.runtime.predict.postprocess import absorb_parts
from multisa.runtime.predict.prediction import ClassProbabilities, Labelling, Prediction
from multisa.runtime.predict.pseudo_labeler import PseudoLabeler
from multisa.runtime.predict.segmenter import Segmenter
from multisa.runtime.writers.probabilities import mask_from_probabilities, read_probabilities


def discs(height: int, width: int) -> np.ndarray:
    """A bright green disc and a red one on dark ground, uint8 [height, width, 3]."""
    rgb = np.full((height, width, 3), 10, np.uint8)
    y, x = np.mgrid[:height, :width]
    for left, colour in ((0.3, (255, 90, 40)), (0.7, (150, 250, 160))):
        rgb[(y - 0.5 * height) ** 2 + (x - left * width) ** 2 < (0.19 * width) ** 2] = colour
    return rgb


def share_on_the_grid(mask: np.ndarray, size: tuple[int, int]) -> float:
    """Share of the label changes that lie between two pixels of a grid of `size`."""
    changes, on_grid = 0, 0
    for axis in (0, 1):
        change = np.diff(mask, axis=axis).any(axis=1 - axis) * np.count_nonzero(np.diff(mask, axis=axis), axis=1 - axis)
        cells = (np.arange(mask.shape[axis]) * size[axis]) // mask.shape[axis]
        changes += int(change.sum())
        on_grid += int(change[np.diff(cells) > 0].sum())
    return on_grid / changes


@pytest.mark.parametrize("method", ["segment", "segmenter", "walk"])
def test_a_large_image_has_no_steps_of_the_working_grid(bundle: Bundle, method: str) -> None:
    """12 megapixels. An enlarged label map changes on the grid alone."""
    image = discs(3000, 4000)
    if method == "segment":
        with Segmenter(bundle) as segment:
            found = segment(image)
    else:
        with PseudoLabeler(bundle, method=method) as label:  # type: ignore[arg-type]
            found = label(image, ["red thing", "green"])
    assert found.working_size == (64, 80) and found.mask.shape == found.confidence.shape == (3000, 4000)
    assert set(np.unique(found.mask)) == {0, 1, 2}
    assert share_on_the_grid(found.mask, found.working_size) <= 0.3
    rows, columns = (np.arange(full) * small // full for full, small in ((3000, 64), (4000, 80)))
    steps = found.working[0][rows][:, columns]
    assert share_on_the_grid(steps, found.working_size) == 1
    assert (found.mask == steps).mean() > 0.97


def test_mask_and_confidence_are_those_of_enlarged_probabilities(bundle: Bundle) -> None:
    image = discs(333, 401)
    with Segmenter(bundle) as segment:
        found = segment(image)
    seen = resize_image(image, found.working_size)
    maps = enlarge(tiny_probabilities(seen[None])[0], (333, 401))
    sure = clear(maps)
    assert sure.mean() > 0.99 and set(np.unique(found.mask)) == {0, 1, 2}
    np.testing.assert_array_equal(found.mask[sure], maps.argmax(axis=0)[sure])
    np.testing.assert_allclose(found.confidence, 255 * maps.max(axis=0), atol=1)
    small = enlarge(tiny_probabilities(seen[None])[0], found.working_size)
    assert found.mean_confidence == pytest.approx(float(small.max(axis=0).mean()), abs=2e-3)


def test_an_image_of_the_working_size_is_done_once(bundle: Bundle) -> None:
    with Segmenter(bundle) as segment:
        found = segment(discs(64, 80))
    assert found.mask is found.working[0] and found.confidence is found.working[1]


def test_threads_make_masks_at_the_same_time(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two predictions, each of whose masks is only encoded when the other's is, too."""
    together = threading.Barrier(2)
    encode = prediction_module.encode_palette_png

    def wait(*arguments: np.ndarray) -> bytes:
        together.wait(timeout=20)
        return encode(*arguments)

    monkeypatch.setattr(prediction_module, "encode_palette_png", wait)
    with Segmenter(bundle) as segment, ThreadPoolExecutor(2) as threads:
        found = [segment(discs(64, 80)), segment(discs(64, 72))]
        first, second = threads.map(lambda prediction: prediction.png, found)
        assert first != second and found[0].png is first  # made once


def prediction(manifest: Manifest, mask: np.ndarray, labels: tuple[str, ...] | None, min_area: float) -> Prediction:
    """A pseudo-mask with certain probabilities."""
    maps = np.stack([mask == i for i in range(3)]).astype(np.float32)
    chosen = (mask, np.full_like(mask, 255))
    labelling = Labelling(labels, "file", {"red thing": 0.5, "green": 0.5}, chosen, 0.0)
    return Prediction(ClassProbabilities((0, 1, 2), maps), mask.shape, mask.shape, manifest, min_area, labelling)


def test_small_parts_take_the_class_around_them(manifest: Manifest) -> None:
    mask = np.zeros((40, 50), np.uint8)
    mask[5:25, 5:25] = 1
    mask[10:12, 10:12] = 0  # a hole of 4 pixels
    mask[30:33, 40:43] = 2  # a speck of 9
    rough = prediction(manifest, mask, None, 0)
    assert rough.mask is mask and rough.classes == ("red thing", "green")
    clean = prediction(manifest, mask, None, 10 / mask.size)
    assert clean.classes == ("red thing",) and clean.record()["pixel_shares"] == {"background": 0.8, "red thing": 0.2}
    at_limit = prediction(manifest, mask, None, 9 / mask.size)
    assert at_limit.classes == ("red thing", "green") and part_sizes(at_limit.mask, 1) == [400]


def test_a_class_of_the_labels_keeps_its_largest_part(manifest: Manifest) -> None:
    mask = np.zeros((40, 50), np.uint8)
    mask[5:25, 5:25] = 1
    mask[30:33, 40:43] = 2  # 9 pixels
    mask[2:4, 30:32] = 2  # 4
    mask[35, 2] = 2
    found = prediction(manifest, mask, ("red thing", "green"), 0.02)
    assert part_sizes(found.mask, 2) == [9] and (found.mask[30:33, 40:43] == 2).all()
    assert found.missing == () and found.classes == ("red thing", "green")
    # Where the class is not in the labels, or has a part that is large enough, nothing is kept.
    assert part_sizes(prediction(manifest, mask, ("red thing",), 0.02).mask, 2) == []
    assert part_sizes(prediction(manifest, mask, ("red thing", "green"), 9 / mask.size).mask, 2) == [9]
    absent = prediction(manifest, np.minimum(mask, 1), ("red thing", "green"), 0.02)
    assert absent.missing == ("green",) and absent.uncertainty == 0.5


@pytest.mark.parametrize("seed", range(10))
def test_of_noise_the_named_classes_remain(seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = np.kron(random.choice(4, (12, 15), p=(0.6, 0.3, 0.05, 0.05)), np.ones((2, 2), int)).astype(np.uint8)
    mask[random.random(mask.shape) < 0.02] = 3
    limit = 30
    absorbed, kept = (absorb_parts(mask, limit / mask.size, named) for named in ((), (1, 2, 3)))
    assert set(np.unique(kept)) == {0, *np.unique(mask)}
    for class_id in set(np.unique(kept)) - set(np.unique(absorbed)):
        assert max(part_sizes(kept, class_id)) >= max(part_sizes(mask, class_id))
    assert min(min(part_sizes(absorbed, class_id)) for class_id in np.unique(absorbed)) >= limit
    np.testing.assert_array_equal(absorb_parts(mask, 0, (1, 2, 3)), mask)


def test_a_part_of_exactly_the_share_stays() -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[2, 1:8] = 1  # 0.07 * 100 is 7.000000000000001
    np.testing.assert_array_equal(absorb_parts(mask, 0.07), mask)
    assert not absorb_parts(mask, 0.0701).any()
    for size in (3, 7, 11, 49):
        mask = np.zeros((size, size), np.uint8)
        mask.flat[: size - 1] = 1
        np.testing.assert_array_equal(absorb_parts(mask, (size - 1) / mask.size), mask)


@pytest.mark.parametrize("limit", ["masks.MAX_PARTS_PIXELS", "enlarge.MAX_VALUES"])
def test_an_image_too_large_for_a_kernel_is_an_error_of_the_image(
    bundle: Bundle, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Segmenter(bundle, min_area=0.01) as segment:
        found = segment(discs(150, 211))
    assert found.working[0].shape == found.working_size
    monkeypatch.setattr(f"multisa.kernels.{limit}", 150 * 211 - 1)
    with pytest.raises(ImageError, match=r"post-processing: .* expected at most 31649.* into tiles"):
        found.record()


def test_the_smallest_area_is_the_bundles_unless_given(bundle: Bundle, tmp_path: Path) -> None:
    image = np.full((64, 80, 3), 10, np.uint8)
    image[:40, :40] = 110
    image[56:60, 60:64] = 250  # one cell of the graph
    Image.fromarray(image).save(tmp_path / "a.png")
    for area, classes in ((None, ["red thing", "green"]), (0.01, ["red thing"])):
        run_segment(tmp_path / "a.png", tmp_path / str(area), bundle, min_area=area)
        assert records(tmp_path / str(area))[0]["classes"] == classes
    for wrong in (1, -0.1, float("nan"), "x"):
        with pytest.raises(UsageError, match=r"min_area: got .*, expected a share of the image from 0, below 1"):
            Segmenter(bundle, min_area=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.5])
def test_what_are_no_probabilities_is_an_error_of_the_image(
    bundle: Bundle, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OnnxRuntimeBackend.run

    def broken(self: OnnxRuntimeBackend, image: np.ndarray) -> dict[str, np.ndarray]:
        outputs = run(self, image)
        outputs["probabilities"][0, 1, 2, 3] = value
        return outputs

    monkeypatch.setattr(OnnxRuntimeBackend, "run", broken)
    for predictor in (Segmenter(bundle), PseudoLabeler(bundle, method="segmenter")):
        with predictor, pytest.raises(ImageError, match=r"segmenter: got probabilities from .*, expected 0\.\.1"):
            predictor(discs(64, 80))


@pytest.mark.parametrize("command", ["segment", "segmenter", "walk"])
def test_stored_probabilities_make_the_masks_of_the_run(bundle: Bundle, tmp_path: Path, command: str) -> None:
    Image.fromarray(discs(150, 211)).save(tmp_path / "a.png")
    (tmp_path / "l.csv").write_text("image,labels\na.png,red thing;green\n")
    options = {"writers": ("masks", "probabilities", "confidence"), "min_area": 0.001}
    if command == "segment":
        run_segment(tmp_path / "a.png", tmp_path / "out", bundle, **options)
    else:
        run_label(tmp_path / "a.png", tmp_path / "out", bundle, method=command, labels=tmp_path / "l.csv", **options)
    (stored,) = read_probabilities(tmp_path / "out/probabilities/000000.tar")
    grid = (16, 20) if command == "segment" else (64, 80)
    assert stored.probabilities.probabilities.shape == (3, *grid) and stored.size == (150, 211)
    mask = read_mask(tmp_path / "out/masks/a.png")
    assert set(np.unique(mask)) == {0, 1, 2}
    again = mask_from_probabilities(stored, min_area=0.001)
    maps = enlarge(stored.probabilities.probabilities, stored.size)
    same = again == mask
    assert same.mean() > 0.99 and same[clear(maps, by=0.01)].all()
    confidence = read_mask(tmp_path / "out/confidence/a.png")
    np.testing.assert_allclose(confidence, 255 * maps.max(axis=0), atol=1.5)
