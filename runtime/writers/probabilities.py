"""`probabilities`: OUT/probabilities/000012.tar, the class probabilities of each image.

With them you can try other thresholds without running the networks again. Each image has KEY.npz with four
arrays (`_ARRAYS`) and KEY.json, its record. Their grid [h, w] is that of the probabilities: of `label` the size
of the networks' input, of `segment` a quarter of it, rounded up.

    for image in read_probabilities(Path("out/probabilities/000000.tar")):
        mask = mask_from_probabilities(image, background_weight=0.8)
        write_mask(Path(f"masks/{image.name}.png"), mask, bundle.manifest.mask_palette())
"""

import io
import json
import math
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from multisa.kernels import confidence_levels, enlarge_probabilities
from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import MAX_PIXELS
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import absorb_parts
from multisa.runtime.predict.prediction import ClassProbabilities
from multisa.runtime.writers.base import LabelledImage, json_bytes, tar_key, unescape_name, zip_bytes
from multisa.runtime.writers.files import TarMembers, TarShardWriter

UInt8 = npt.NDArray[np.uint8]

MAX_ARRAY_BYTES = 512 * 2**20  # of one image's probabilities: 255 classes at 1,024 x 1,024 pixels
MAX_RECORD_BYTES = 2**20
_HEADER_BYTES = 256  # more than the header of any of these arrays
_LEVEL = 1  # of deflate; higher levels take several times as long and save few bytes
# Type and number of dimensions of each array.
_ARRAYS = {
    "class_ids": ("|u1", 1),
    "confidence": ("|u1", 2),  # [h, w] of the chosen class, 0..255 for 0..1
    "probabilities": ("<f2", 3),  # [len(class_ids), h, w], 0..1
    "size": ("<i4", 1),  # height and width of the mask
}
# Errors of tarfile and zipfile for broken files (RuntimeError: encrypted, or an unknown compression).
_BROKEN = (
    OSError, EOFError, RuntimeError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<type>[^']{3})', 'fortran_order': False, "
    rb"'shape': \((?P<shape>[0-9, ]{1,64})\), \} *\n",
    re.DOTALL,
)


class ProbabilitiesWriter(TarShardWriter):
    """One tar of arrays for each shard."""

    folder = "probabilities"

    def encode(self, image: LabelledImage) -> TarMembers:
        maps = image.probabilities.probabilities
        arrays: dict[str, npt.NDArray[Any]] = {
            "class_ids": np.array(image.probabilities.class_ids, np.uint8),
            "confidence": confidence_levels(maps.max(axis=0)),
            "probabilities": maps.astype(np.float16),
            "size": np.array(image.mask.shape, np.int32),
        }
        key = tar_key(image.name)
        npz = zip_bytes(((f"{name}.npy", _npy(array)) for name, array in arrays.items()), level=_LEVEL)
        return (f"{key}.npz", npz), (f"{key}.json", json_bytes(image.record))


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    # Fixed byte order and version: the bytes are the same on every machine.
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    np.lib.format.write_array(buffer, np.ascontiguousarray(little), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class StoredProbabilities:
    """The class probabilities of one image, as read from a tar."""

    name: str  # of its results: masks/NAME.png
    record: Mapping[str, Any]  # its line of labels.jsonl
    size: tuple[int, int]  # height and width of the mask
    probabilities: ClassProbabilities
    confidence: UInt8  # [h, w] of the chosen class, 0..255 for 0..1


def read_probabilities(path: Path) -> Iterator[StoredProbabilities]:
    """Read a tar of class probabilities, one image at a time.

    Raises UsageError when the file is missing or contains anything that the writer does not write: other
    members, names that lead out of the output folder, arrays of other types or shapes or above
    MAX_ARRAY_BYTES.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            yield from _images(archive)
    except _BROKEN as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{path}: {reason}: expected a tar of class probabilities, as `--writer probabilities` writes it"
        ) from error


def mask_from_probabilities(
    image: StoredProbabilities,
    *,
    background_weight: float = 1.0,
    minimum_confidence: float = 0.0,
    min_area: float = 0.0,
) -> UInt8:
    """Choose the class of each pixel again: uint8 [H, W] at the image's own size.

    background_weight: factor of the background's probability before the argmax. Without a CRF, the result is
    the mask of a run whose background score is multiplied by it. At 1, and with the `min_area` of the run, the
    result is the mask of the run, except where two probabilities round to the same half-precision number.
    minimum_confidence: pixels whose class has a lower share of the probabilities become 255, "ignore". Confidences
    have steps of 1/255, and this limit is rounded up to the next.
    min_area: connected parts with a smaller share of the image take the class around them; their pixels keep the
    confidence of the class before.
    Raises UsageError for values out of range.
    """
    if not 0 < background_weight < math.inf:
        raise UsageError(f"got {background_weight} as the background's weight, expected a finite number above 0")
    if not 0 <= minimum_confidence < 1:
        raise UsageError(f"got {minimum_confidence} as the lowest confidence, expected 0 or more, below 1")
    if not 0 <= min_area < 1:
        raise UsageError(f"got {min_area} as the smallest area, expected 0 or more, below 1")
    ids = image.probabilities.class_ids
    scores = image.probabilities.probabilities.astype(np.float64)
    scores[np.array(ids) == 0] *= background_weight
    scores /= np.maximum(scores.sum(axis=0), np.finfo(np.float64).tiny)
    mask, confidence = enlarge_probabilities(scores.astype(np.float32), image.size, ids)
    named = [index for index in ids if index] if image.record.get("labels_from") in ("file", "scores") else []
    mask = absorb_parts(mask, min_area, named)
    mask[confidence < math.ceil(minimum_confidence * 255)] = IGNORE_INDEX
    return mask


def _images(archive: tarfile.TarFile) -> Iterator[StoredProbabilities]:
    key, arrays = "", None
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # or it would keep every member
        stem, _, ending = member.name.rpartition(".")
        file = archive.extractfile(member) if member.isreg() else None
        if file is not None and ending == "npz" and arrays is None:
            key, arrays = stem, _arrays(file, member.size)
        elif file is not None and ending == "json" and arrays is not None and stem == key:
            yield _image(key, arrays, _record(file))
            arrays = None
        else:
            raise ValueError(f"got the member {member.name!r}, expected KEY.npz and then KEY.json")
    if arrays is not None:
        raise ValueError(f"got {key!r} without its record")
    _check_end(archive)


def _check_end(archive: tarfile.TarFile) -> None:
    """Refuse a truncated or damaged tar; tarfile treats an unreadable header as the end."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    rest = file.read(tarfile.RECORDSIZE + 1)
    if not tarfile.BLOCKSIZE <= len(rest) <= tarfile.RECORDSIZE or any(rest):
        raise ValueError(f"damaged or truncated at byte {archive.offset}")


def _image(key: str, arrays: Mapping[str, npt.NDArray[Any]], record: Mapping[str, Any]) -> StoredProbabilities:
    probabilities, ids, confidence = (arrays[n] for n in ("probabilities", "class_ids", "confidence"))
    count, *grid = probabilities.shape
    size = arrays["size"].tolist()
    if ids.shape != (count,) or confidence.shape != tuple(grid) or not probabilities.size or len(size) != 2:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"{key!r}: got arrays of shapes {shapes}, which do not fit together")
    if len(np.unique(ids)) != count:
        raise ValueError(f"{key!r}: got the class ids {ids.tolist()}, expected each once")
    if not (probabilities.min() >= 0 and probabilities.max() <= 1):  # or NaN
        raise ValueError(f"{key!r}: got probabilities that are not within 0..1")
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{key!r}: got a size of {size}, expected 1 to {MAX_PIXELS} pixels")
    maps = ClassProbabilities(tuple(ids.tolist()), probabilities.astype(np.float32))
    return StoredProbabilities(_safe_name(key), record, (size[0], size[1]), maps, confidence)


def _arrays(file: IO[bytes], size: int) -> dict[str, npt.NDArray[Any]]:
    if size > MAX_ARRAY_BYTES:
        raise ValueError(f"got arrays of {size} bytes, expected at most {MAX_ARRAY_BYTES}")
    with zipfile.ZipFile(io.BytesIO(file.read())) as archive:
        names = archive.namelist()
        if sorted(names) != [f"{name}.npy" for name in _ARRAYS]:
            raise ValueError(f"got {names[:8]}, expected the arrays {', '.join(_ARRAYS)}")
        return {name: _array(archive, name) for name in _ARRAYS}


def _array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    kind, dimensions = _ARRAYS[name]
    # A zip may declare less than it holds, so limit what is inflated.
    with archive.open(f"{name}.npy") as member:
        data = member.read(MAX_ARRAY_BYTES + _HEADER_BYTES + 1)
    # NumPy's own reader evaluates the header as Python; these headers have one fixed form.
    header = _HEADER.match(data)
    if not header or header["type"].decode() != kind:
        raise ValueError(f"{name}: got another header, expected that of an array of {kind}")
    shape = tuple(map(int, header["shape"].replace(b",", b" ").split()))
    values = memoryview(data)[header.end() :]
    if len(shape) != dimensions or math.prod(shape) * np.dtype(kind).itemsize != len(values):
        raise ValueError(f"{name}: got {len(values)} bytes of shape {shape}, expected {dimensions} dimensions")
    array: npt.NDArray[Any] = np.frombuffer(values, kind).reshape(shape)
    return array


def _record(file: IO[bytes]) -> Mapping[str, Any]:
    data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"got a record of more than {MAX_RECORD_BYTES} bytes")
    try:
        record = json.loads(data)
    except RecursionError as error:
        raise ValueError("got a record that is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("got a record that is not a JSON object")
    return record


def _safe_name(key: str) -> str:
    name = unescape_name(key)
    if not name or name.startswith("/") or "\0" in name or {"..", "."} & set(PurePosixPath(name).parts):
        raise ValueError(f"got the name {name!r}, expected a path below the folder of results")
    return name
