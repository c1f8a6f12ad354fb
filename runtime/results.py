"""The files of a run's folder: none is left there that describes, or was made by, another run.

OUT/.multisa/masks.jsonl names every mask that the runs before this one, finished or not, may have left.
"""

import errno
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.gallery import picture_paths

RECORDS, FAILURES, PAGE = "labels.jsonl", "failed.jsonl", "index.html"
MASKS = ".multisa/masks.jsonl"

# What is wrong with a name, and not with the disk, when a file cannot be written or removed.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)

_NO_FILE_NAME = re.compile("[\0\ud800-\udfff]")


def mask_of(name: str) -> str:
    """Path of an image's mask below OUT, by the image's name."""
    return f"masks/{name}.png"


def begin_results(out: Path, names: Iterable[str]) -> None:
    """Remove what describes an earlier run; its masks stay until `finish_results`.

    names: of the images this run is about. They are noted first, so that a run that is cut leaves no mask
    that a later one does not know.
    """
    _note_masks(out, {mask_of(name) for name in names} | _noted_masks(out))
    for name in (RECORDS, FAILURES, PAGE):
        (out / name).unlink(missing_ok=True)


def finish_results(out: Path, made: Iterable[str], *, pictures: bool) -> None:
    """Remove every mask and picture of this and earlier runs, but not the masks of the images `made`.

    pictures: whether theirs are kept, too. Nothing outside OUT/masks and OUT/overlays is touched, whatever
    the notes say.
    """
    kept = {mask_of(name) for name in made}
    folded = {mask.casefold(): mask for mask in kept}
    for mask in sorted(_noted_masks(out)):
        twin = folded.get(mask.casefold(), mask)
        if twin != mask and (out / mask).exists() and (out / mask).samefile(out / twin):
            continue  # upper and lower case are the same to this file system
        if mask not in kept:
            _remove(out, mask)
        if mask not in kept or not pictures:
            for picture in picture_paths(mask.removeprefix("masks/").removesuffix(".png")):
                _remove(out, picture)
    _note_masks(out, kept)


def _note_masks(out: Path, masks: set[str]) -> None:
    lines = (json.dumps({"mask": mask}) + "\n" for mask in sorted(masks))
    write_bytes_atomically(out / MASKS, "".join(lines).encode())


def _noted_masks(out: Path) -> set[str]:
    """The masks that the notes and the records of earlier runs name; lines of another kind are not ours."""
    masks = set()
    for path in (out / MASKS, out / RECORDS):
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            mask = record.get("mask") if isinstance(record, dict) else None
            if isinstance(mask, str) and _is_mask_path(mask):
                masks.add(mask)
    return masks


def _is_mask_path(text: str) -> bool:
    parts = PurePosixPath(text).parts
    plain = parts[:1] == ("masks",) and ".." not in parts and text.endswith(".png")
    return plain and not _NO_FILE_NAME.search(text)


def _remove(out: Path, relative: str) -> None:
    """Remove a file below OUT and the folders it leaves empty."""
    path, top = out / relative, out / PurePosixPath(relative).parts[0]
    # A link among the folders must not lead the removal elsewhere.
    if not path.parent.resolve().is_relative_to(out.resolve() / top.name):
        return
    try:
        if path.is_dir():
            return
        path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in NAME_ERRORS:
            raise
    for folder in path.relative_to(top).parents[:-1]:
        if (top / folder).is_dir() and not any((top / folder).iterdir()):
            (top / folder).rmdir()
