"""The half stencil, its paths and its masks."""

import numpy as np
import pytest

from multisa.kernels import path_offsets, stencil_offsets
from multisa.kernels.common.checks import check_integer
from multisa.kernels.common.stencil import edge_mask, pair_slices


@pytest.mark.parametrize(("radius", "count"), [(1, 0), (2, 4), (3, 12), (5, 34), (10, 152)])
def test_number_of_offsets(radius: int, count: int) -> None:
    offsets = stencil_offsets(radius)
    assert len(offsets) == len(set(offsets)) == count
    assert all(dx * dx + dy * dy < radius * radius for dy, dx in offsets)
    assert not {(-dy, -dx) for dy, dx in offsets} & set(offsets)


def test_order_of_offsets_is_part_of_the_format() -> None:
    assert stencil_offsets(2) == ((0, 1), (1, -1), (1, 0), (1, 1))
    assert stencil_offsets(5)[:5] == ((0, 1), (0, 2), (0, 3), (0, 4), (1, -4))
    assert stencil_offsets(5)[-1] == (4, 2)


@pytest.mark.parametrize(
    ("offset", "path"),
    [
        ((0, 2), {(0, 0), (0, 1), (0, 2)}),
        ((2, 2), {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)}),
        ((1, -2), {(0, 0), (0, -1), (0, -2), (1, 0), (1, -1), (1, -2)}),
        ((1, -3), {(0, 0), (0, -1), (0, -2), (0, -3), (1, 0), (1, -1), (1, -2), (1, -3)}),
        ((0, 0), {(0, 0)}),
    ],
)
def test_paths(offset: tuple[int, int], path: set[tuple[int, int]]) -> None:
    assert set(path_offsets(*offset)) == path


@pytest.mark.parametrize("offset", stencil_offsets(5))
def test_path_is_the_strip_around_the_segment(offset: tuple[int, int]) -> None:
    end = np.array(offset, dtype=np.float64)
    near = set()
    for y in range(-6, 7):
        for x in range(-6, 7):
            along = np.clip(np.dot((y, x), end) / np.dot(end, end), 0, 1)
            if np.sum((np.array((y, x)) - along * end) ** 2) < 1 - 1e-9:
                near.add((y, x))
    assert set(path_offsets(*offset)) == near


def test_pair_slices_select_both_ends() -> None:
    grid = np.arange(5 * 7).reshape(5, 7)
    for dy, dx in stencil_offsets(5):
        source, target = pair_slices((dy, dx), (5, 7))
        assert (grid[target] - grid[source] == dy * 7 + dx).all()
        assert grid[source].size == (5 - dy) * (7 - abs(dx))
    assert grid[pair_slices((4, 0), (3, 7))[0]].size == 0


@pytest.mark.parametrize(("boundary", "pairs"), [("full", 130_680), ("psa", 114_240)])
def test_pairs_of_a_64_grid(boundary: str, pairs: int) -> None:
    assert edge_mask(5, (64, 64), boundary).sum() == pairs  # type: ignore[arg-type]


def test_psa_boundary_on_a_grid_smaller_than_its_margins_has_no_pair() -> None:
    assert edge_mask(5, (3, 8), "full").any()
    assert not edge_mask(5, (3, 8), "psa").any()


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError)])
def test_bad_radius(value: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"radius: got .* expected"):
        stencil_offsets(value)


def test_unknown_boundary_names_the_known() -> None:
    with pytest.raises(ValueError, match="full, psa"):
        edge_mask(5, (4, 4), "periodic")  # type: ignore[arg-type]


def test_numpy_integers_are_integers() -> None:
    assert check_integer("steps", np.int64(3), minimum=0) == 3  # type: ignore[arg-type]
