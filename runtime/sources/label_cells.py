"""Labels as tables and the files beside an image write them: a list of names, or names in one text."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from multisa.runtime.image_labels import split_classes

Labels = tuple[str, ...]

MOST_LABELS = 10_000  # of one image


@dataclass(frozen=True)
class CellReader:
    """Reads labels; `classes` tells names that hold spaces from several names, and labels from a caption."""

    column: str = "labels"
    classes: Collection[str] = ()

    def from_value(self, value: Any) -> Labels | None:
        """A list of names, a text of them, or None. Raises ValueError for anything else."""
        if value is None:
            return None
        if isinstance(value, str):
            value = split_classes(value, self.classes)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"got {str(value)[:80]!r}, expected a list of class names or one text")
        if len(value) > MOST_LABELS:
            raise ValueError(f"got {len(value)} labels, expected at most {MOST_LABELS}")
        return tuple(dict.fromkeys(value))

    def from_file(self, kind: str, data: bytes) -> Labels | None:
        """What a file of a sample says: "json", "cls" or "txt". Raises ValueError when it cannot be read."""
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8 text") from None
        if kind != "json":
            labels = self.from_value(text.strip())
            # Most shards keep a caption in .txt.
            is_caption = kind == "txt" and self.classes and not set(labels or ()) <= set(self.classes)
            return None if is_caption else labels
        value = parse_json(text)
        return self.from_value(value.get(self.column)) if isinstance(value, dict) else None


def parse_json(text: str) -> Any:
    """The value of a JSON text of any origin. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON, or nested too deeply") from None
