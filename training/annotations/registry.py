"""Find out which kind an annotation file is, and read it."""

import json
from pathlib import Path

from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_user_text
from multisa.training.annotations.base import MAX_FILE_BYTES, Annotations
from multisa.training.annotations.coco import is_coco, read_coco
from multisa.training.annotations.cvat import read_cvat
from multisa.training.annotations.label_studio import is_label_studio, read_label_studio
from multisa.training.annotations.masks import read_masks

EXPECTED = "COCO JSON, CVAT XML or zip, Label Studio JSON, or a folder of masks"


def read_annotations(path: Path, class_names: tuple[str, ...] = ()) -> Annotations:
    """Read annotations of images; see the package's docstring.

    class_names: background first; only COCO's files can do without, because they list their classes. Raises
    UsageError for a file that cannot be read, is larger than MAX_FILE_BYTES or of no known kind.
    """
    found = find_annotations(path, class_names)
    if found is None:
        raise UsageError(f"{path}: got none of the known kinds of annotations, expected {EXPECTED}")
    return found


def find_annotations(path: Path, class_names: tuple[str, ...] = ()) -> Annotations | None:
    """Read annotations as `read_annotations` does; None for a file that is none, such as a label file."""
    value, kind = None, path.suffix.lower()
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
        raise UsageError(f"{path}: got {path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}: divide it")
    if kind == ".json":
        try:
            value = json.loads(read_user_text(path))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not JSON, or nested too deeply: {error}") from error
        if is_coco(value):
            return read_coco(path, value, class_names)
    is_known = path.is_dir() or kind in (".xml", ".zip") or is_label_studio(value)
    if is_known and not class_names:
        raise UsageError(f"{path}: got no classes, expected their names in classes.txt, 'background' first")
    if path.is_dir():
        return read_masks(path, class_names)
    if kind in (".xml", ".zip"):
        return read_cvat(path, class_names)
    return read_label_studio(path, value, class_names) if value is not None and is_label_studio(value) else None
