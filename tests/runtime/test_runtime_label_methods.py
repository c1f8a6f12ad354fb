"""Pseudo-masks from the segmenter, restricted to the labels, and the choice between the two methods."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from job_runs import public_bytes, records, run_label, run_segment
from plain_masks import clear, enlarge, tiny_probabilities

from multisa.kernels import CrfParameters, DenseCRF
from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle, Manifest, write_bundle
from multisa.runtime.errors import ImageError, UsageError
from multisa.runtime.gpu.stages import GpuLabels
from multisa.runtime.imaging.decode import DecodedImage
from multisa.runtime.predict import pseudo_labeler
from multisa.runtime.predict.postprocess import refine, restrict_probabilities
from multisa.runtime.predict.pseudo_labeler import PseudoLabeler
from multisa.runtime.predict.walk import GpuWalk

CRF = CrfParameters(iterations=2)
NAMES = ("red thing", "green")
SIZE = (70, 78)  # neither side is a multiple of the stride


@pytest.fixture
def image() -> np.ndarray:
    """A patch of class 1 and one of class 2 on dark ground, with noise: uint8 [*SIZE, 3]."""
    rgb = np.full((*SIZE, 3), 30, np.int16)
    rgb[10:40, 6:30] = 115
    rgb[25:60, 40:70] = 215
    return (rgb + np.random.default_rng(0).integers(-20, 20, rgb.shape)).astype(np.uint8)


Make = Callable[..., PseudoLabeler]


@pytest.fixture
def labeler(manifest: Manifest, graphs: dict[str, bytes], tmp_path: Path) -> Make:
    """Opens method "segmenter" of the tiny bundle, with other parameters."""

    def make(min_area: float = 0.0, **parameters: object) -> PseudoLabeler:
        chosen = replace(manifest.parameters.segmenter_label, **parameters)
        all_of = replace(
            manifest.parameters,
            long_side=max(SIZE),  # the network sees the images as they are
            label_method="segmenter",
            segmenter_label=chosen,
            min_area=min_area,
        )
        bundle = write_bundle(tmp_path / "bundle", replace(manifest, parameters=all_of), graphs)
        return PseudoLabeler(bundle)

    return make


def plain(image: np.ndarray, ids: tuple[int, ...], *, use_crf: bool, mirror: bool, ratio: float = 1) -> np.ndarray:
    """The same in NumPy, but for the kernel of the dense CRF: probabilities [1 + len(ids), *SIZE]."""
    maps = tiny_probabilities(image[None])[0]
    if mirror:
        maps = (maps + tiny_probabilities(image[None, :, ::-1])[0][..., ::-1]) / 2
    kept = np.stack([maps[0] / ratio, *(maps[i] for i in ids)])
    full = enlarge(kept / kept.sum(axis=0), SIZE)
    return DenseCRF(image, CRF).infer(full.astype(np.float32)) if use_crf else full


@pytest.mark.parametrize("names", [NAMES, ("green",), ("red thing",)])
@pytest.mark.parametrize(
    ("use_crf", "mirror", "ratio"), [(True, False, 1.0), (False, False, 1.0), (True, True, 1.0), (True, False, 1.5)]
)
def test_masks_are_those_of_a_plain_implementation(
    labeler: Make, image: np.ndarray, names: tuple[str, ...], use_crf: bool, mirror: bool, ratio: float
) -> None:
    with labeler(use_crf=use_crf, mirror=mirror, background_ratio=ratio) as label:
        found = label(image, names)
        assert [selected.graph for selected in label.backends] == ["segmenter"] and label.device == "cpu"
    ids = tuple(NAMES.index(name) + 1 for name in names)
    expected = plain(image, ids, use_crf=use_crf, mirror=mirror, ratio=ratio)
    assert found.probabilities.class_ids == (0, *ids)
    np.testing.assert_allclose(found.probabilities.probabilities, expected, atol=1e-4)
    sure = clear(expected, by=1e-3)
    assert sure.mean() > 0.98
    np.testing.assert_array_equal(found.mask[sure], np.array((0, *ids))[expected.argmax(axis=0)][sure])
    np.testing.assert_allclose(found.confidence, 255 * expected.max(axis=0), atol=1)
    assert set(np.unique(found.mask)) == {0, *ids}  # an absent class never appears


def test_records(labeler: Make, image: np.ndarray) -> None:
    with labeler() as label:
        record = label(image, ["green"]).record()
        maps = tiny_probabilities(image[None])[0]
        assert record["scores"] == pytest.approx(dict(zip(NAMES, maps[1:].max(axis=(1, 2)), strict=True)), abs=1e-4)
        assert (record["labels_from"], record["classes"], record["missing"]) == ("file", ("green",), ())
        assert 0 < record["disagreement"] < 1 and record["confidence"] > 0.9
        dark = label(np.full((*SIZE, 3), 20, np.uint8), ["red thing", "green"])
        assert dark.missing == ("red thing", "green") and dark.uncertainty == 1 and not dark.mask.any()


def test_the_disagreement_is_that_of_before_and_after_the_crf(labeler: Make, image: np.ndarray) -> None:
    with labeler() as label:
        found = label(image, NAMES)
    before, after = (plain(image, (1, 2), use_crf=use_crf, mirror=False) for use_crf in (False, True))
    first, second = before.argmax(axis=0), after.argmax(axis=0)
    shares = [((first == i) & (second == i)).sum() / ((first == i) | (second == i)).sum() for i in range(3)]
    sure = (before.max(axis=0) >= 0.6).mean()
    assert found.disagreement == pytest.approx(1 - np.mean(shares) * sure, abs=0.01)
    assert 0.05 < found.disagreement < 0.9


def test_without_labels_the_classes_are_those_that_win(labeler: Make, image: np.ndarray) -> None:
    with labeler() as label:
        found = label(image)
        assert found.classes == NAMES and found.missing == () and found.record()["labels_from"] == "segmenter"
        np.testing.assert_array_equal(found.mask, label(image, NAMES).mask)
        image[25:60, 40:70] = 30
        one = label(image)
        assert one.classes == ("red thing",) and one.probabilities.class_ids == (0, 1)
        grey = label(np.full((*SIZE, 3), 80, np.uint8))  # class 1 almost wins
        assert grey.classes == () and not grey.mask.any() and (grey.confidence == 255).all()
        assert grey.labelling is not None
        assert grey.uncertainty == pytest.approx(2 * grey.labelling.scores["red thing"], abs=1e-6) and (
            0.8 < grey.uncertainty < 1
        )


def test_the_background_gives_way_only_to_given_labels(labeler: Make, image: np.ndarray) -> None:
    with labeler(use_crf=False) as even, labeler(use_crf=False, background_ratio=4.0) as balanced:
        given = [label(image, NAMES).mask for label in (even, balanced)]
        assert (given[0] > 0).sum() < (given[1] > 0).sum()
        assert ((given[0] > 0) <= (given[1] > 0)).all()
        np.testing.assert_array_equal(even(image).mask, balanced(image).mask)


def test_empty_labels_are_background_without_a_crf(
    labeler: Make, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pseudo_labeler, "refine", lambda *_: pytest.fail("it runs"))
    with labeler() as label:
        found = label(image, [])
    assert not found.mask.any() and (found.confidence == 255).all() and found.uncertainty == 0
    assert found.probabilities.class_ids == (0,) and (found.probabilities.probabilities == 1).all()


def test_images_of_a_batch_are_labelled_by_themselves(labeler: Make, image: np.ndarray) -> None:
    images = np.stack([image, image[::-1], np.full_like(image, 20)])
    labels = (("green",), None, ())
    with labeler(mirror=True) as label:
        together = label.predict_batch(images, labels)
        for one, (maps, given), names in zip(images, together, labels, strict=True):
            assert given == names
            np.testing.assert_allclose(maps, label.predict_batch(one[None], (names,))[0][0], atol=1e-6)


def test_restricted_probabilities() -> None:
    maps = np.random.default_rng(1).dirichlet(np.ones(5), (6, 7)).transpose(2, 0, 1).astype(np.float32)
    before = maps.copy()
    maps[[0, 2, 4], 3, 3] = before[0, 3, 3] = 0
    kept = restrict_probabilities(maps, (2, 4))
    assert kept.shape == (3, 6, 7) and kept.dtype == np.float32
    np.testing.assert_allclose(kept.sum(axis=0), 1, atol=1e-6)
    np.testing.assert_array_equal(kept[:, 3, 3], [1, 0, 0])
    np.testing.assert_allclose(kept[1] * maps[4], kept[2] * maps[2], atol=1e-6)  # proportions are kept
    np.testing.assert_array_equal(restrict_probabilities(maps, ()), np.ones((1, 6, 7)))
    balanced = restrict_probabilities(maps, (2, 4), 3.0)
    np.testing.assert_allclose(balanced[0] * kept[1], kept[0] * balanced[1] / 3, atol=1e-6)
    np.testing.assert_allclose(balanced.sum(axis=0), 1, atol=1e-6)
    assert maps[:2].tobytes() == before[:2].tobytes()  # the argument is not changed


def test_refined_probabilities(image: np.ndarray) -> None:
    maps = np.random.default_rng(2).dirichlet(np.ones(3), (18, 20)).transpose(2, 0, 1).astype(np.float32)
    np.testing.assert_allclose(refine(image, maps, None), enlarge(maps, SIZE), atol=1e-5)
    expected = DenseCRF(image, CRF).infer(refine(image, maps, None))
    np.testing.assert_array_equal(refine(image, maps, CRF), expected)


def test_the_method_is_the_bundles_unless_given(bundle: Bundle, labeler: Make) -> None:
    with PseudoLabeler(bundle) as walk, labeler() as segmenter:
        assert (walk.method, segmenter.method) == ("walk", "segmenter")
        assert [selected.graph for selected in walk.backends] == ["cam", "affinity"]
    with pytest.raises(UsageError, match="method: got 'cam', expected segmenter or walk"):
        PseudoLabeler(bundle, method="cam")  # type: ignore[arg-type]


def test_int8_labels_with_the_segmenter_alone(bundle_of_precisions: Bundle, photos: Path, tmp_path: Path) -> None:
    request = BackendRequest(precision="int8")
    summary = run_label(photos / "a.jpg", tmp_path / "out", bundle_of_precisions, method="segmenter", request=request)
    run = json.loads((tmp_path / "out/.multisa/run.json").read_text())
    assert summary.done == 1 and run["backends"]["segmenter"]["precision"] == "int8"
    with pytest.raises(UsageError, match="only the segmenter exists in int8, expected fp32 or fp16"):
        run_label(photos / "a.jpg", tmp_path / "walk", bundle_of_precisions, method="walk", request=request)


def test_method_and_area_belong_to_the_settings_of_a_run(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    """What is left to the bundle is the same run as the bundle's value."""
    out = tmp_path / "out"
    run_label(photos / "a.jpg", out, bundle)
    assert run_label(photos / "a.jpg", out, bundle, method="walk", min_area=0.0).done_now == 0
    with pytest.raises(UsageError, match="label method: got segmenter, the existing run has walk"):
        run_label(photos / "a.jpg", out, bundle, method="segmenter")
    with pytest.raises(UsageError, match=r"min area: got 0\.01, the existing run has 0\.0"):
        run_label(photos / "a.jpg", out, bundle, min_area=0.01)
    run_segment(photos / "a.jpg", tmp_path / "segment", bundle, min_area=0.01)
    with pytest.raises(UsageError, match=r"min area: got 0\.0, the existing run has 0\.01"):
        run_segment(photos / "a.jpg", tmp_path / "segment", bundle)


def test_a_run_shows_its_method(
    bundle: Bundle, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for workers in (1, 3):
        run_label(photos, tmp_path / str(workers), bundle, method="segmenter", min_area=0.001, workers=workers)
    messages = capsys.readouterr().err
    assert re.search(r"segmenter: onnxruntime-cpu, fp32 .*\nlabel method: segmenter\n", messages)
    assert {row["labels_from"] for row in records(tmp_path / "1")} == {"segmenter"}
    run = json.loads((tmp_path / "1/.multisa/run.json").read_text())
    assert (run["label_method"], run["min_area"], list(run["backends"])) == ("segmenter", 0.001, ["segmenter"])
    page = (tmp_path / "1/report.html").read_text()
    assert "<dt>label method</dt><dd>segmenter</dd>" in page and "<dt>min area</dt><dd>0.001</dd>" in page
    assert public_bytes(tmp_path / "1") == public_bytes(tmp_path / "3")


def test_a_large_part_of_the_wrong_class_vanishes(labeler: Make, image: np.ndarray) -> None:
    """The labels decide: what the segmenter calls class 2 becomes background or class 1."""
    with labeler() as label:
        found, free = label(image, ["red thing"]), label(image)
    wrong = free.mask == 2
    assert wrong.mean() > 0.1 and set(np.unique(found.mask[wrong])) <= {0, 1}


class _Pipeline:
    """Answers as a GpuPipeline does: one image with a soft edge, and one that failed."""

    def label(self, images: np.ndarray, labels: object, timer: object) -> list[GpuLabels | ImageError]:
        ramp = np.linspace(0, 1, images.shape[2], dtype=np.float16)
        maps = np.stack([np.broadcast_to(p, images.shape[1:3]) for p in (1 - ramp, ramp)])
        mask = np.where(maps.argmax(axis=0) == 1, np.uint8(2), np.uint8(0))
        confidence = np.floor(255 * maps.max(axis=0).astype(np.float32) + 0.5).astype(np.uint8)
        scores = {"red thing": 0.1, "green": 0.9}
        return [GpuLabels(mask, confidence, ("green",), scores, maps), ImageError("post-processing: got NaN")]


def test_masks_of_a_gpu_are_enlarged_from_its_probabilities(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudo_labeler, "open_walk", lambda manifest, *_: GpuWalk(manifest, _Pipeline()))
    images = np.zeros((2, 64, 80, 3), np.uint8)
    with PseudoLabeler(bundle, method="walk") as label:
        first, second = label.predict_batch(images, (None, ("green",)))
        decoded = DecodedImage(images[0], 1, (), (160, 211))
        found = label.postprocess(first, decoded)
        with pytest.raises(ImageError, match="got NaN"):
            label.postprocess(second, decoded)
    assert label.device == "gpu" and found.record()["labels_from"] == "scores" and found.classes == ("green",)
    # The step lies where the enlarged ramp crosses a half, not at a multiple of the scale.
    (step,) = {int(column) for column in np.argmax(found.mask == 2, axis=1)}
    assert step == int(np.argmax(enlarge(found.probabilities.probabilities, (160, 211))[1, 0] > 0.5)) == 106
    assert 0 < found.disagreement < 1
