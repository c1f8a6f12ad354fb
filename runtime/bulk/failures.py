"""How many images may fail."""

from collections.abc import Sequence
from pathlib import Path

from multisa.runtime.errors import TooManyFailures, UsageError
from multisa.runtime.progress import counted

NAMED = 3  # how many examples a message gives


def check_failures(failures: int, images: int, allowed: str | None, out: Path) -> None:
    """Raise TooManyFailures when more of the images failed than `allowed`: a number, or a share such as "2%".

    None allows none. Raises UsageError when `allowed` is neither.
    """
    if failures > failure_limit(allowed or "0", images):
        limit = f", allowed were {allowed}" if allowed else ""
        raise TooManyFailures(
            f"{failures} of {counted(images, 'image')} failed{limit}: the reasons are in "
            f"{out / 'failed.jsonl'}; --retry-failed tries them again"
        )


def failure_limit(allowed: str, images: int) -> float:
    """How many of `images` may fail: "3" is 3, "2%" is 2 in a hundred. Raises UsageError for other text."""
    number, percent = allowed.removesuffix("%"), allowed.endswith("%")
    if not number.isascii() or not number.replace(".", "", 1 if percent else 0).isdigit():
        raise UsageError(
            f"got {allowed!r} as the number of failures allowed, expected N or P%, as in 3 or 2%"
        )
    return float(number) / 100 * images if percent else float(number)


def name_some(names: Sequence[str], count: int | None = None) -> str:
    """The first few names, and how many more there are of `count` (or of `names`, when they are all)."""
    count = len(names) if count is None else count
    more = f" and {count - NAMED} more" if count > NAMED else ""
    return ", ".join(names[:NAMED]) + more
