"""Which images a plan's profiles leave out."""

from hypothesis import given
from hypothesis import strategies as st

from multisa.runtime.backends.engine_cache import Profile, uncovered_shape

SMALLEST, LONG_SIDE = 64, 68
SIDES = range(SMALLEST, LONG_SIDE + 1)


def profile(batch: int, low: tuple[int, int], high: tuple[int, int]) -> Profile:
    return Profile((batch, *low), (batch, *high), (8, *high))


@st.composite
def profiles(draw: st.DrawFn) -> list[Profile]:
    bounds = st.integers(SMALLEST - 2, LONG_SIDE + 2)
    found = []
    for _ in range(draw(st.integers(0, 4))):
        (top, bottom), (left, right) = (sorted((draw(bounds), draw(bounds))) for _ in range(2))
        found.append(profile(draw(st.integers(1, 2)), (top, left), (bottom, right)))
    return found


@given(profiles())
def test_every_shape_is_looked_at(found: list[Profile]) -> None:
    shapes = [(1, height, width) for height in SIDES for width in SIDES]
    missing = [shape for shape in shapes if not any(p.covers(shape) for p in found)]
    answer = uncovered_shape(found, LONG_SIDE)
    assert answer in missing if missing else answer is None


def test_both_orientations_and_the_square() -> None:
    wide, tall = profile(1, (64, 64), (66, 68)), profile(1, (64, 64), (68, 66))
    assert uncovered_shape([wide, tall], LONG_SIDE) == (1, 67, 67)
    assert uncovered_shape([wide, tall, profile(1, (67, 67), (68, 68))], LONG_SIDE) is None
    assert uncovered_shape([], LONG_SIDE) == (1, 64, 64)
