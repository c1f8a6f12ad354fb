"""`label-studio`: OUT/label-studio/000012.json, tasks with predictions: one brush mask per class and image.

OUT/label-studio/labeling_config.xml is their labelling interface. Tasks refer to an image by a prefix, a slash
and its id; Label Studio must find the image at that path or URL.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import ImageError
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.writers.base import (
    LabelledImage,
    RowRuns,
    RunFolder,
    ShardFiles,
    Writer,
    WriterContext,
    json_bytes,
    row_runs,
    shard_path,
)

Int64 = npt.NDArray[np.int64]

_FOLDER = "label-studio"
_CHANNELS = 4  # a brush mask is RGBA with four equal channels
_ON = 255
_VALUE_BITS = 8
_LENGTH_BITS = np.array([3, 4, 8, 16])  # the four widths of a run's length
_HEADER_BITS = (32, 21)  # the number of values, and the widths
_FLAG_BITS = 3  # "a run follows", and which width it has
_MAX_PIECE = 2**16  # the longest run
_WORD = 32  # bits; no code is longer
_MAX_PIXELS = (2**32 - 1) // _CHANNELS  # the header counts values in 32 bits
_WEB = ("http://", "https://", "/")  # prefixes of URLs, in which ids must be escaped
# Ends of prefixes that an id follows at once: a folder, or the value of a query such as /data/local-files/?d=
_COMPLETE = ("/", "%2F", "%2f", "=", "?", "&")


class LabelStudioWriter(Writer):
    """One list of tasks for each shard."""

    def __init__(self, context: WriterContext, image_prefix: str = "") -> None:
        super().__init__(context)
        self._prefix = image_prefix if not image_prefix or image_prefix.endswith(_COMPLETE) else f"{image_prefix}/"
        self._version = f"{context.manifest.name}-{context.bundle_sha256[:12]}"

    def encode(self, image: LabelledImage) -> bytes:
        """Return the task as JSON."""
        try:
            results = [
                self._result(image, runs) for runs in row_runs(image.mask) if runs.class_id not in (0, IGNORE_INDEX)
            ]
        except ValueError as error:
            raise ImageError(f"label-studio cannot hold the mask: {error}") from error
        prediction = {"model_version": self._version, "score": image.record["confidence"], "result": results}
        reference = self._prefix + (quote(image.id) if self._prefix.startswith(_WEB) else image.id)
        return json_bytes({"data": {"image": reference}, "meta": {"id": image.id}, "predictions": [prediction]})

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[bytes]) -> None:
        if payloads:  # else all images of the shard failed
            tasks = b"[\n" + b",\n".join(payloads) + b"\n]\n"
            files.write(shard_path(_FOLDER, shard, "json"), tasks)

    def finalize(self, folder: RunFolder, shards: int) -> None:
        manifest = self.context.manifest
        colours = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in manifest.palette[1:])
        labels = (
            f'    <Label value={quoteattr(name)} background="{colour}"/>\n'
            for name, colour in zip(manifest.foreground, colours, strict=True)
        )
        brush = f'  <BrushLabels name="tag" toName="image">\n{"".join(labels)}  </BrushLabels>\n'
        text = f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n{brush}</View>\n'
        folder.write(f"{_FOLDER}/labeling_config.xml", [text.encode()])

    def _result(self, image: LabelledImage, runs: RowRuns) -> dict[str, Any]:
        height, width = image.mask.shape
        code = encode_label_studio_rle(runs, height * width)
        return {
            "id": f"class-{runs.class_id}",
            "type": "brushlabels",
            "from_name": "tag",
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {
                "format": "rle",
                "rle": list(code),
                "brushlabels": [self.context.manifest.classes[runs.class_id]],
            },
        }


def encode_label_studio_rle(runs: RowRuns, pixels: int) -> bytes:
    """Encode the mask of one class of an image of `pixels` pixels: 255 inside the class, 0 elsewhere.

    Run lengths of four widths, packed into bits. The bytes equal those of Label Studio's encoder (`mask2rle`
    of label-studio-sdk). Raises ValueError for more pixels than the header of the format can count.
    """
    if pixels > _MAX_PIXELS:
        raise ValueError(f"got {pixels} pixels, the format takes at most {_MAX_PIXELS}")
    lengths, values = _pieces(runs, pixels)
    # The index of the width: 0 up to a length of 8, 1 up to 16, 2 up to 256, 3 above.
    width = np.searchsorted(2 ** _LENGTH_BITS[:3], lengths)
    width[lengths < 0] = 3
    lengths = np.abs(lengths)
    bits = _LENGTH_BITS[width]
    codes = (4 + width) << (bits + _VALUE_BITS) | (lengths - 1) << _VALUE_BITS | values
    code_bits = _FLAG_BITS + bits + _VALUE_BITS
    return _pack(np.concatenate((_header(pixels), codes)), np.concatenate((_HEADER_BITS, code_bits)))


def _pieces(runs: RowRuns, pixels: int) -> tuple[Int64, Int64]:
    """Lengths and values of runs, cut into pieces of at most `_MAX_PIECE`.

    The remainder of a cut run is negative: Label Studio's encoder writes it in the widest form.
    """
    bounds = np.empty(2 * len(runs.starts) + 2, np.int64)
    bounds[0], bounds[-1] = 0, pixels
    bounds[1:-1:2] = runs.starts
    bounds[2:-1:2] = runs.ends
    lengths = np.diff(bounds) * _CHANNELS
    values = np.zeros_like(lengths)
    values[1::2] = _ON
    lengths, values = lengths[lengths > 0], values[lengths > 0]
    full = (lengths - 1) // _MAX_PIECE
    last = np.cumsum(full + 1) - 1
    pieces = np.full(int(last[-1]) + 1, _MAX_PIECE)
    rest = lengths - full * _MAX_PIECE
    pieces[last] = np.where(full > 0, -rest, rest)
    return pieces, np.repeat(values, full + 1)


def _header(pixels: int) -> Int64:
    widths = 0
    for bits in _LENGTH_BITS.tolist():
        widths = widths << 4 | (bits - 1)
    return np.array([pixels * _CHANNELS, (_VALUE_BITS - 1) << 16 | widths])


def _pack(codes: Int64, bits: Int64) -> bytes:
    """Concatenate `codes` of `bits` bits each (at most 32), most significant bit first.

    Pads like Label Studio's encoder, with a whole byte where none is needed.
    """
    high_first = (codes << (_WORD - bits)).astype(">u4").view(np.uint8)
    is_used = np.arange(_WORD) < bits[:, None]
    stream = np.unpackbits(high_first)[is_used.ravel()]
    return np.packbits(np.append(stream, np.zeros(8 - len(stream) % 8, np.uint8))).tobytes()
