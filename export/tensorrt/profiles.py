"""Shape buckets: the sizes of photographs that a plan is legal for, and those it is tuned for."""

import re
from collections.abc import Sequence

from multisa.runtime.backends.engine_cache import Profile, Shape
from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import MINIMUM_SIDE

_FORM = "NxHxW:NxHxW:NxHxW, as in 1x64x64:1x384x512:8x512x512"
_GRID = 32  # sides of default buckets are multiples of it, as the strides of every backbone are


def default_profiles(long_side: int) -> tuple[Profile, ...]:
    """Three buckets for photographs whose long side is at most `long_side`.

    Most photographs are larger and come reduced to just that, in 4:3 or 3:4, which two buckets are tuned for;
    what is wider than 3:4 takes the first of them. The third is for small ones. All are for one photograph
    at a time, as the runtime runs them: a plan takes the memory that its largest batch needs.
    """
    short = _on_grid(long_side * 3 // 4, long_side)
    small = _on_grid(long_side * 5 // 8, long_side)
    smallest: Shape = (1, MINIMUM_SIDE, MINIMUM_SIDE)
    buckets = [
        Profile(smallest, (1, short, long_side), (1, long_side, long_side)),
        Profile(smallest, (1, long_side, short), (1, long_side, short)),
        Profile(smallest, (1, small, small), (1, small, small)),
    ]
    return tuple(dict.fromkeys(buckets))  # they coincide where long_side is the smallest there is


def parse_profiles(texts: Sequence[str], long_side: int) -> tuple[Profile, ...]:
    """Profiles from min:opt:max of NxHxW, checked against the bundle; without any, the default ones.

    Raises UsageError that names the profile, what was got and expected.
    """
    if not texts:
        return default_profiles(long_side)
    profiles = tuple(_parse(text) for text in texts)
    for text, profile in zip(texts, profiles, strict=True):
        if profiles.count(profile) > 1:
            raise UsageError(f"profile {text}: given twice, expected each once")
        _check(profile, long_side)
    return profiles


def _parse(text: str) -> Profile:
    parts = text.lower().split(":")
    if len(parts) != 3 or not all(re.fullmatch(r"\d{1,6}x\d{1,6}x\d{1,6}", part) for part in parts):
        raise UsageError(f"profile: got {text!r}, expected {_FORM}")
    shapes = [tuple(map(int, part.split("x"))) for part in parts]
    try:
        return Profile(*[(batch, height, width) for batch, height, width in shapes])
    except ValueError as error:
        raise UsageError(f"input image: {error}") from error


def _check(profile: Profile, long_side: int) -> None:
    low, high = min(profile.minimum[1:]), max(profile.maximum[1:])
    if low < MINIMUM_SIDE:
        raise UsageError(
            f"input image: profile {profile}: got a side of {low}, expected at least {MINIMUM_SIDE}: "
            "the graphs take no smaller photograph"
        )
    if high > long_side:
        raise UsageError(
            f"input image: profile {profile}: got a side of {high}, expected at most {long_side}: the bundle "
            "reduces every photograph to that long side"
        )


def _on_grid(side: int, long_side: int) -> int:
    rounded = -(-side // _GRID) * _GRID
    return min(max(rounded, MINIMUM_SIDE), long_side)
