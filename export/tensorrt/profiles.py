"""Optimization profiles: the image sizes that an engine accepts, and those it is tuned for."""

import re
from collections.abc import Sequence

from multisa.runtime.backends.engine_cache import Profile, Shape
from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import MINIMUM_SIDE

_FORM = "NxHxW:NxHxW:NxHxW, as in 1x64x64:1x384x512:8x512x512"
_GRID = 32  # sides of the default profiles are multiples of the largest stride of the backbones


def default_profiles(long_side: int) -> tuple[Profile, ...]:
    """Three profiles for images whose long side is at most `long_side` pixels.

    Most images are larger and are reduced to exactly `long_side`, in 4:3 or 3:4: two profiles are tuned for
    these, and the first also covers everything wider than 3:4. The third is tuned for small images. All have
    batch 1, as the runtime runs them: an engine reserves the memory of its largest batch.
    """
    short = _on_grid(long_side * 3 // 4, long_side)
    small = _on_grid(long_side * 5 // 8, long_side)
    smallest: Shape = (1, MINIMUM_SIDE, MINIMUM_SIDE)
    profiles = [
        Profile(smallest, (1, short, long_side), (1, long_side, long_side)),
        Profile(smallest, (1, long_side, short), (1, long_side, short)),
        Profile(smallest, (1, small, small), (1, small, small)),
    ]
    return tuple(dict.fromkeys(profiles))  # they coincide for the smallest long_side


def parse_profiles(texts: Sequence[str], long_side: int) -> tuple[Profile, ...]:
    """Profiles from texts like "1x64x64:1x384x512:8x512x512" (NxHxW as min:opt:max), or the default ones.

    Raises UsageError, naming the profile, for malformed texts and sizes outside 64..`long_side`.
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
            "the graphs take no smaller image"
        )
    if high > long_side:
        raise UsageError(
            f"input image: profile {profile}: got a side of {high}, expected at most {long_side}: the bundle "
            "reduces every image to that long side"
        )


def _on_grid(side: int, long_side: int) -> int:
    rounded = -(-side // _GRID) * _GRID
    return min(max(rounded, MINIMUM_SIDE), long_side)
