"""`datumaro`: OUT/datumaro, "common_semantic_segmentation" of Datumaro: dataset_meta.json and masks/ITEM.png.

The masks are grey images whose values are the class ids: Datumaro and FiftyOne read the colours of a palette
PNG as values. Pixels without a label (255) get the id after the last class, named "ignore". Datumaro names an
item after the last part of its mask's path, so all masks lie in one folder under escaped names (`file_name`);
names.jsonl maps items to images.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.writers.base import (
    LabelledImage,
    RunFolder,
    ShardFiles,
    Writer,
    encode_rows,
    file_name,
    json_bytes,
    ordered_rows,
)
from multisa.runtime.writers.encoding import distinct_colours, encode_grey, grey_png, ignore_name

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
