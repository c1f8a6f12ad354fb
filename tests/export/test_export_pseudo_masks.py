"""What is compared beside the outputs: labels, pseudo-masks, and maps of the classes that are there."""

import numpy as np
import pytest

from multisa.export.output_masks import add_labels, add_pseudo_mask, add_segmenter_pseudo_mask
from multisa.export.parity import Compared, Outputs, measure_parity
from multisa.kernels import stencil_offsets
from multisa.runtime.bundle import LabelParameters, SegmenterLabelParameters

LABEL = LabelParameters(walk_steps=0, use_crf=False)
IMAGE = np.zeros((64, 64, 3), np.uint8)


def outputs(absent: float, present: float = 0.9) -> Outputs:
    cam = np.zeros((1, 2, 16, 16), np.float32)
    cam[0, 0, :, :8] = present
    cam[0, 1] = absent
    return {"cam": cam, "affinity": np.ones((1, len(stencil_offsets(5)), 16, 16), np.float32)}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (outputs(absent=1.0), None),  # the map of a class that is not there is noise divided by noise
        (outputs(absent=0.0, present=0.5), "cam: largest difference"),
        (outputs(absent=np.nan), "cam: 256 values are not finite"),
        (outputs(absent=0.0, present=np.nan), "cam: 256 values are not finite"),
    ],
)
def test_maps_are_compared_where_the_class_is_there(answer: Outputs, problem: str | None) -> None:
    reference = outputs(absent=0.0)
    answer = dict(answer)
    for values in (reference, answer):
        add_pseudo_mask(IMAGE, (1,), values, LABEL)
    assert np.unique(reference["pseudo_mask"]).tolist() == [0, 1]
    problems = measure_parity([Compared(reference, answer)]).problems()
    assert any(line.startswith(problem) for line in problems) if problem else not problems


def test_no_class_is_background_everywhere() -> None:
    values = outputs(absent=0.5)
    add_pseudo_mask(IMAGE, (), values, LABEL)
    assert not values["pseudo_mask"].any() and values["cam"].size == 0
    # Of cam nothing was left to compare, which says nothing of a graph; another image does.
    report = measure_parity([Compared(values, values)])
    (problem,) = report.problems()
    assert problem.startswith("cam: no value was compared on 1 image;") and report.share() > 1
    found = outputs(absent=0.0)
    add_pseudo_mask(IMAGE, (1,), found, LABEL)
    report.add(Compared(found, found))
    assert report.problems() == []


def probabilities(*classes: float) -> Outputs:
    """The same probabilities in every cell of the left half; certain background in the right half."""
    values = np.zeros((1, len(classes), 16, 16), np.float32)
    values[0, 0] = 1
    values[0, :, :, :8] = np.array(classes, np.float32)[:, None, None]
    return {"probabilities": values}


def test_labels_are_those_of_the_enlarged_probabilities() -> None:
    found = probabilities(0.2, 0.3, 0.5)
    add_labels(IMAGE, found)
    labels, confidence = found["labels"], found["confidence"]
    assert labels.shape == confidence.shape == IMAGE.shape[:2] and labels.dtype == confidence.dtype == np.uint8
    assert (labels[:, :30] == 2).all() and (labels[:, 34:] == 0).all()
    assert (confidence[:, :30] == 128).all() and (confidence[:, 34:] == 255).all()
    # Between the two halves the probabilities of both are interpolated.
    assert 128 > confidence[0, 30:34].min() > 0


def test_the_pseudo_mask_of_the_segmenter_has_only_classes_of_the_labels() -> None:
    found = probabilities(0.2, 0.3, 0.5)
    add_segmenter_pseudo_mask(IMAGE, (1,), found, SegmenterLabelParameters(use_crf=False))
    mask = found["segmenter_pseudo_mask"]
    assert (mask[:, :30] == 1).all() and (mask[:, 34:] == 0).all()
    assert (found["segmenter_pseudo_mask_confidence"][:, :30] == 153).all()  # 0.3 of 0.2 + 0.3
    add_segmenter_pseudo_mask(IMAGE, (1,), found, SegmenterLabelParameters(use_crf=False, background_ratio=2.0))
    assert (found["segmenter_pseudo_mask_confidence"][:, :30] == 191).all()  # 0.3 of 0.1 + 0.3


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.5, 1.5])
def test_what_is_no_probability_makes_no_mask(wrong: float) -> None:
    reference, answer = probabilities(0.2, 0.3, 0.5), probabilities(0.2, 0.3, wrong)
    for outputs in (reference, answer):
        add_labels(IMAGE, outputs)
        add_segmenter_pseudo_mask(IMAGE, (1,), outputs, SegmenterLabelParameters(use_crf=False))
    assert (answer["labels"] == 255).all() and not answer["confidence"].any()
    problems = measure_parity([Compared(reference, answer)]).problems()
    for name in ("probabilities", "labels", "segmenter_pseudo_mask"):
        assert any(line.startswith(f"{name}: ") for line in problems)
