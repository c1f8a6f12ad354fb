"""`cvat`: OUT/cvat/000012.zip, "Segmentation mask 1.1" of CVAT.

CVAT finds the frame of a mask by its name, so masks keep the names of the source. The value 255 has a colour
and a label, because CVAT refuses undeclared colours. SegmentationObject determines what becomes a shape: it
is 0 for the background and for 255, and the class elsewhere.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from multisa.runtime.imaging.png import IGNORE_INDEX, encode_palette_png, voc_palette
from multisa.runtime.writers.base import (
    LabelledImage,
    RunFolder,
    ShardFiles,
    Writer,
    WriterContext,
    distinct_colours,
    encode_grey,
    encode_rows,
    file_name,
    grey_png,
    ignore_name,
    json_bytes,
    label_name,
    line_name,
    ordered_rows,
    shard_path,
    with_palette,
    zip_bytes,
)

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
        members = [("labelmap.txt", self._label_map().encode()), ("ImageSets/Segmentation/default.txt", names.encode())]
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


_NAME = "datumaro"

_Item = tuple[int, str, bytes, bytes]


class DatumaroWriter(Writer):
    """One mask for each image, and a table of names."""

    def encode(self, image: LabelledImage) -> _Item:
        """Return the index, the path of the mask, the mask, and the line of the table."""
        line = {"item": file_name(image.name), "image": image.id}
        return image.index, _path(image.name), self._grey(image), json_bytes(line)

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[_Item]) -> None:
        for _, path, png, _ in payloads:
            files.write(path, png)
        files.write_part(_NAME, encode_rows((index, [line]) for index, _, _, line in payloads))

    def finalize(self, folder: RunFolder, shards: int) -> None:
        manifest = self.context.manifest
        names = [*manifest.classes, ignore_name(manifest)]
        colours = distinct_colours(manifest)[[*range(len(manifest.classes)), IGNORE_INDEX]]
        meta = {
            "labels": names,
            "label_map": {str(i): name for i, name in enumerate(names)},
            "segmentation_colors": colours.tolist(),
            "background_label": "0",
        }
        folder.write("datumaro/dataset_meta.json", [json_bytes(meta), b"\n"])
        folder.write("datumaro/names.jsonl", _lines(folder))

    def results(self, name: str) -> Sequence[str]:
        return (_path(name),)

    def _grey(self, image: LabelledImage) -> bytes:
        ignored = image.mask == IGNORE_INDEX
        if ignored.any():
            last = np.uint8(len(self.context.manifest.classes))
            return encode_grey(np.where(ignored, last, image.mask))
        return grey_png(image.mask, image.png)


def _path(name: str) -> str:
    return f"datumaro/masks/{file_name(name)}.png"


def _lines(folder: RunFolder) -> Iterator[bytes]:
    for _, fields in ordered_rows(folder, _NAME):
        yield fields[0] + b"\n"
