"""What is compared beside the outputs: pseudo-masks, and maps of the classes that are there."""

import numpy as np
import pytest

from multisa.export.compare import add_pseudo_mask
from multisa.export.parity import Compared, Outputs, measure_parity
from multisa.kernels import stencil_offsets
from multisa.runtime.bundle import LabelParameters

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
