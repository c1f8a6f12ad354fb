"""Failures grouped by reason: reasons that differ only in a name or a number are one."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_GROUPS = 100  # kept apart; what comes later under another reason is OTHER
OTHER = "other reasons"

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LONGEST = 300  # characters of a reason


@dataclass
class ReasonGroup:
    """How many images failed for one reason, and the first of them."""

    count: int = 0
    ids: list[str] = field(default_factory=list)


def general_reason(reason: str, image: str = "") -> str:
    """A reason without what belongs to one image: its id, what is quoted, every number.

    >>> general_reason("a/b.jpg: 9000x9000 = 81000000 pixels, expected at most 50000000", "a/b.jpg")
    '…x… = … pixels, expected at most …'
    """
    text = reason[:_LONGEST]
    if image and text.startswith(f"{image}: "):
        text = text[len(image) + 2 :]  # the ids are listed beside the reason
    return _NUMBER.sub("…", _QUOTED.sub("…", _without(text, image)))


def group_failures(failures: Iterable[Mapping[str, Any]], ids: int) -> dict[str, ReasonGroup]:
    """Group the lines of failed.jsonl by reason in one pass, the most frequent first.

    ids: how many of each group are named. Memory is bounded by MOST_GROUPS * ids.
    """
    groups: dict[str, ReasonGroup] = {}
    for failure in failures:
        image = str(failure["image"])
        reason = general_reason(str(failure["reason"]), image)
        if reason not in groups and len(groups) >= MOST_GROUPS:
            reason = OTHER
        group = groups.setdefault(reason, ReasonGroup())
        group.count += 1
        if len(group.ids) < ids:
            group.ids.append(image)
    return dict(sorted(groups.items(), key=lambda item: (-item[1].count, item[0])))


def _without(text: str, image: str) -> str:
    """`text` without `image`, where that is no part of a longer word: ids may be single letters."""
    pieces, end = [], 0
    while image and (start := text.find(image, end)) >= 0:
        stop = start + len(image)
        inside = text[max(start - 1, 0) : start].isalnum() or text[stop : stop + 1].isalnum()
        pieces += [text[end:start], image if inside else "…"]
        end = stop
    return "".join([*pieces, text[end:]])
