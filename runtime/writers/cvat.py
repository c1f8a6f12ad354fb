"""`cvat`: OUT/cvat/000012.zip, "Segmentation mask 1.1" of CVAT.

CVAT finds the frame of a mask by its name, so masks keep the names of the source. The value 255 has a colour
and a label, because CVAT refuses undeclared colours. SegmentationObject determines what becomes a shape: it
is 0 for the background and for 255, and the class elsewhere.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from multisa.runtime.imaging.png import IGNORE_INDEX, encode_palette_png, voc_palette
from multisa.runtime.writers.base import (
    LabelledImage,
    ShardFiles,
    Writer,
    WriterContext,
    label_name,
    line_name,
    shard_path,
)
from multisa.runtime.writers.encoding import distinct_colours, ignore_name, with_palette, zip_bytes

_Masks = tuple[str, bytes, bytes]


class CvatWriter(Writer):
    """One zip for each shard."""

    def __init__(self, context: WriterContext) -> None:
        super().__init__(context)
        self._colours = distinct_colours(context.manifest)
        self._voc = voc_palette()

    def encode(self, image: LabelledImage) -> _Masks:
        """Return the name, the mask of classes and the mask of objects."""
        classes = with_palette(image.png, self._colours)
        return line_name(image.name), classes, self._objects(image.mask, image.png)

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[_Masks]) -> None:
        if not payloads:  # all images of the shard failed
            return
        names = "".join(f"{name}\n" for name, _, _ in payloads)
        members = [
            ("labelmap.txt", self._label_map().encode()),
            ("ImageSets/Segmentation/default.txt", names.encode()),
        ]
        members += [(f"SegmentationClass/{name}.png", classes) for name, classes, _ in payloads]
        members += [(f"SegmentationObject/{name}.png", objects) for name, _, objects in payloads]
        files.write(shard_path("cvat", shard, "zip"), zip_bytes(members))

    def _objects(self, mask: npt.NDArray[np.uint8], png: bytes) -> bytes:
        ignored = mask == IGNORE_INDEX
        if ignored.any():
            return encode_palette_png(np.where(ignored, np.uint8(0), mask), self._voc)
        return with_palette(png, self._voc)

    def _label_map(self) -> str:
        manifest = self.context.manifest
        values = [*enumerate(manifest.classes), (IGNORE_INDEX, ignore_name(manifest))]
        lines = (f"{label_name(n)}:{','.join(map(str, self._colours[v].tolist()))}::\n" for v, n in values)
        return "# label:color_rgb:parts:actions\n" + "".join(lines)
