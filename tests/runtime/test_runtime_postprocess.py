"""The step from class activation maps to a pseudo-mask."""

from dataclasses import replace

import numpy as np
import pytest

from multisa.kernels import CrfParameters, stencil_offsets
from multisa.runtime.bundle import LabelParameters
from multisa.runtime.predict.postprocess import pseudo_mask, pseudo_masks, walk_scores

PARAMETERS = LabelParameters(walk_steps=16, crf=CrfParameters(iterations=3))


def walled_in() -> tuple[np.ndarray, np.ndarray]:
    """Weak evidence everywhere, and one strong pixel that no edge of the walk leaves."""
    cam = np.full((2, 12, 12), 0.2, np.float32)
    cam[1] = 0.1
    cam[0, 6, 6] = 1.0
    affinity = np.ones((len(stencil_offsets(5)), 12, 12), np.float32)
    for plane, (dy, dx) in zip(affinity, stencil_offsets(5), strict=True):
        plane[6, 6] = plane[6 - dy, 6 - dx] = 0
    return cam, affinity


def test_walked_maps_are_averages_unless_divided_by_their_peak() -> None:
    cam, affinity = walled_in()
    averages = walk_scores(cam, affinity, replace(PARAMETERS, walk_to_peak=False))
    np.testing.assert_allclose(averages, cam, atol=1e-5)
    weak = walk_scores(cam * np.float32(0.5), affinity, replace(PARAMETERS, walk_to_peak=True))
    # One peak for all classes: the second keeps its proportion to the first.
    assert weak.max() == 1
    np.testing.assert_allclose(weak, cam, atol=1e-5)


@pytest.mark.parametrize("use_crf", [True, False])
def test_several_background_scores_make_the_masks_of_each(use_crf: bool) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    scores = random.random((2, 5, 6), dtype=np.float32)
    parameters = replace(PARAMETERS, use_crf=use_crf)
    together = pseudo_masks(image, scores, (2, 5), parameters, (0.2, 0.8))
    for background, made in zip((0.2, 0.8), together, strict=True):
        alone = pseudo_mask(image, scores, (2, 5), replace(parameters, background=background))
        assert np.array_equal(made.mask, alone.mask) and np.array_equal(made.levels, alone.levels)
    assert (together[0].mask == 0).sum() < (together[1].mask == 0).sum()
    empty = pseudo_masks(image, scores[:0], (), parameters, (0.2, 0.8))
    assert [made.mask.max() for made in empty] == [0, 0]
