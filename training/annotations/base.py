"""Annotations of images in one form, and masks: files of class ids, or shapes that are drawn when they are read."""

import importlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import BackendUnavailable, ImageError, UsageError
from multisa.runtime.files import sha256_of_bytes, sha256_of_file
from multisa.runtime.image_labels import ClassNames, ImageLabels, image_key
from multisa.runtime.imaging.decode import MAX_PIXELS, UInt8, read_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.progress import pluralize

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Size = tuple[int, int]  # (H, W) of the upright image

MAX_CLASSES = 255  # ids of one byte, background counted; 255 itself marks pixels to ignore
MAX_FILE_BYTES = 2**30  # of an annotation file; COCO's largest has 0.45 GB
IGNORE_NAME = "ignore"  # the name that our writers give to 255
MOST_SIDES = 4  # long sides of an image; a polygon that goes further out is damaged, and slow to draw
_MOST_CHARACTERS = 7  # of one number in COCO's strings


@dataclass(frozen=True)
class MaskFile:
    """A palette or 8-bit grey PNG of class ids."""

    path: Path
    ids: bytes = b""  # the class id that each of the 256 values means; empty: itself

    def read(self) -> UInt8:
        """Class ids, uint8 [H, W]. Raises ImageError."""
        values = read_mask(self.path)
        return np.frombuffer(self.ids, np.uint8)[values] if self.ids else values

    def digest(self) -> str:
        """SHA-256 of the file, and of what its values mean. Raises OSError."""
        digest = sha256_of_file(self.path)
        return sha256_of_bytes(digest.encode() + self.ids) if self.ids else digest

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Polygons:
    """The pixels inside any of some polygons, as pycocotools draws them."""

    rings: tuple[bytes, ...]  # float64 x, y, x, y, .. in pixels

    def pixels(self, size: Size) -> Bool:
        """True inside, bool [H, W]. Raises ImageError (the reason), BackendUnavailable without pycocotools."""
        rings = [np.frombuffer(ring) for ring in self.rings]
        farthest = max(float(abs(ring).max()) for ring in rings)
        if farthest > MOST_SIDES * max(size):
            raise ImageError(f"got a polygon with a coordinate of {farthest:g}, expected it near the image")
        try:
            coco = importlib.import_module("pycocotools.mask")
        except ImportError as error:
            raise BackendUnavailable(
                'polygons are drawn with pycocotools, which is not installed: pip install "multisa[train]"'
            ) from error
        drawn = coco.merge(coco.frPyObjects([ring.tolist() for ring in rings], *size))
        return runs_of_coco(drawn["counts"], size).pixels(size)


@dataclass(frozen=True)
class Runs:
    """Lengths of the runs outside and inside a shape, in turn, over a box of the image."""

    lengths: bytes  # uint32, the first one outside
    box: Size  # (height, width)
    corner: tuple[int, int] = (0, 0)  # (top, left) of the box
    by_columns: bool = False  # COCO's order

    def pixels(self, size: Size) -> Bool:
        """True inside, bool [H, W]. Raises ImageError (the reason)."""
        (height, width), (top, left) = self.box, self.corner
        lengths = np.frombuffer(self.lengths, np.uint32)
        total = int(lengths.sum(dtype=np.int64))
        if total != height * width or min(top, left) < 0 or top + height > size[0] or left + width > size[1]:
            raise ImageError(
                f"got runs of {total} pixels for {width} x {height} pixels from ({left}, {top}) on, expected as many, "
                f"inside {size[1]} x {size[0]}"
            )
        inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        pixels = np.zeros(size, np.bool_)
        box = inside.reshape(width, height).T if self.by_columns else inside.reshape(height, width)
        pixels[top : top + height, left : left + width] = box
        return pixels


Shape = Polygons | Runs


def polygons_of(rings: Iterable[Any]) -> Polygons | None:
    """Check polygons x, y, x, y, ..; None without one of three points. Raises ValueError."""
    arrays = [np.asarray(ring, np.float64) for ring in rings]
    if any(ring.ndim != 1 or len(ring) % 2 or not np.isfinite(ring).all() for ring in arrays):
        raise ValueError("no list of points")
    whole = tuple(ring.tobytes() for ring in arrays if len(ring) >= 6)
    return Polygons(whole) if whole else None


def runs_of(lengths: Any, box: Size, corner: tuple[int, int] = (0, 0), *, by_columns: bool = False) -> Runs:
    """Check run lengths. Raises ValueError."""
    numbers = np.asarray(lengths)
    if numbers.ndim != 1 or numbers.dtype.kind != "i" or not 0 <= numbers.min(initial=0) <= numbers.max() < 2**32:
        raise ValueError("no list of run lengths")
    return Runs(numbers.astype(np.uint32).tobytes(), box, corner, by_columns)


def runs_of_coco(counts: Any, size: Size) -> Runs:
    """Read COCO's counts, a list, or its compressed string (pycocotools, maskApi.c: rleFrString). Raises ValueError.

    The string has five bits of a number in each character, the lowest first. From the fourth on, numbers are relative
    to the one before the last.
    """
    if not isinstance(counts, str | bytes):
        return runs_of(counts, size, by_columns=True)
    text = counts.encode("ascii") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 32) == 0)
    lengths = np.diff(last, prepend=-1)
    if not len(last) or last[-1] != len(codes) - 1 or lengths.max() > _MOST_CHARACTERS or codes.min() < 0:
        raise ValueError("no run lengths of COCO")
    starts = last + 1 - lengths
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << shifts, starts) - np.where(codes[last] & 16, 1 << (5 * lengths), 0)
    numbers[1::2], numbers[2::2] = numbers[1::2].cumsum(), numbers[2::2].cumsum()
    return runs_of(numbers, size, by_columns=True)


@dataclass(frozen=True)
class DrawnMask:
    """The shapes of one image, drawn one over the other on the background."""

    name: str  # for messages: file and image
    size: Size
    shapes: tuple[tuple[int, Shape], ...]  # class id and shape, from the lowest to the topmost

    def read(self) -> UInt8:
        """Class ids, uint8 [H, W]. Raises ImageError, BackendUnavailable without pycocotools for polygons."""
        if min(self.size) < 1 or self.size[0] * self.size[1] > MAX_PIXELS:
            raise ImageError(f"{self.name}: got {self.size[1]} x {self.size[0]} pixels, expected 1 to {MAX_PIXELS}")
        mask = np.zeros(self.size, np.uint8)
        for class_id, shape in self.shapes:
            try:
                mask[shape.pixels(self.size)] = class_id
            except ImageError as error:
                raise ImageError(f"{self.name}: {error}") from error
        return mask

    def digest(self) -> str:
        """SHA-256 of size and shapes."""
        return sha256_of_bytes(repr((self.size, self.shapes)).encode())

    def __str__(self) -> str:
        return self.name


Mask = MaskFile | DrawnMask


@dataclass(frozen=True)
class AnnotatedImage:
    """What a file says about one image."""

    labels: tuple[int, ...] | None  # ids of foreground classes, ascending; None: those of the mask
    mask: Mask | None


@dataclass(frozen=True)
class Matches:
    """Which annotated image each image of a folder is."""

    found: Mapping[str, str]  # name in the file, by relative path
    unused: tuple[str, ...]  # names in the file of no image, sorted


@dataclass(frozen=True)
class Annotations:
    """The annotations of one file or folder."""

    path: Path
    class_names: tuple[str, ...]  # background first
    images: Mapping[str, AnnotatedImage]  # by the name that the file gives
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # what is not used, by reason

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the images, as the file gives them."""
        return tuple(self.images)

    def labels(self, name: str) -> tuple[int, ...]:
        """Ids of the foreground classes of an image, ascending. Raises ImageError for a mask that cannot be read."""
        image = self.images[name]
        if image.labels is None:
            return foreground(np.unique(image.mask.read()).tolist() if image.mask else ())
        return image.labels

    def mask(self, name: str, size: Size | None = None) -> UInt8 | None:
        """Class ids of an image, uint8 [H, W]; None if it has no mask.

        Raises ImageError for a mask that cannot be read, or is not as large as `size`, the upright image's (H, W).
        """
        source = self.images[name].mask
        mask = source.read() if source else None
        if mask is not None and size is not None and mask.shape != size:
            raise ImageError(
                f"{source}: got a mask of {mask.shape[1]} x {mask.shape[0]} pixels, expected {size[1]} x {size[0]} "
                "as its upright image; they do not belong together"
            )
        return mask

    def match(self, relatives: Iterable[str], root: str = "") -> Matches:
        """Find the images of a folder by their posix paths below it, as label files do (`LabelMatcher`).

        root: name of the folder. Raises UsageError where a name could mean several images, or two names one.
        """
        paths = tuple(relatives)
        rows: dict[str, tuple[str]] = {}
        for name in self.images:
            if rows.setdefault(image_key(name), (name,)) != (name,):
                raise UsageError(f"{self.path}: got {name} more than once, expected each image once: remove others")
        matcher = ImageLabels(str(self.path), rows, "").matcher(paths, root)
        found = {path: match[0] for path in paths if (match := matcher.find(path)) is not None}
        return Matches(found, tuple(sorted(self.images.keys() - found.values())))


class ClassFinder:
    """Class ids by the names in an annotation file; counts the names that are no class."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self._classes = ClassNames(class_names)
        self._unknown: Counter[str] = Counter()

    def find(self, name: str) -> int | None:
        """Id of a class, IGNORE_INDEX for IGNORE_NAME, or None."""
        found = self._classes.find(name)
        if found is None and name != IGNORE_NAME:
            self._unknown[name] += 1
            return None
        return self._classes.classes.index(found) if found else IGNORE_INDEX

    def notes(self, notes: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
        """The notes that are not empty, and one about the names that are no class."""
        counts = (f"{name} in {pluralize(count, 'annotation')}" for name, count in self._unknown.most_common())
        found = {reason: tuple(names) for reason, names in notes.items()}
        found["names that are no class are left out"] = tuple(counts)
        return {reason: names for reason, names in found.items() if names}


def foreground(class_ids: Iterable[int]) -> tuple[int, ...]:
    """The ids of foreground classes among some, each once, ascending."""
    return tuple(sorted(set(class_ids) - {0, IGNORE_INDEX}))
