"""`coco`: OUT/coco/annotations/instances_default.json, where COCO tools expect it beside images/.

As in COCO-Stuff, each foreground class of an image has one annotation, a run-length mask of all its pixels,
with `iscrowd` 0, because tools that train or evaluate ignore crowds. Ids derive from the index of the image,
so a retry does not change them.
"""

from collections.abc import Iterable, Iterator, Sequence

from multisa.kernels import encode_rle
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.writers.base import (
    LabelledImage,
    RunFolder,
    ShardFiles,
    Writer,
    encode_rows,
    json_bytes,
    ordered_rows,
)

_NAME = "coco"
_IDS = 256  # annotation ids reserved for each image, one for each value of a mask

_Row = tuple[int, tuple[bytes, bytes]]


class CocoWriter(Writer):
    """One file for the whole run."""

    def encode(self, image: LabelledImage) -> _Row:
        """Return the index of the image, and as JSON its entry and its comma-separated annotations."""
        height, width = image.mask.shape
        entry = {"id": image.index + 1, "file_name": image.id, "width": width, "height": height}
        annotations = (
            {
                "id": image.index * _IDS + runs.class_id,
                "image_id": image.index + 1,
                "category_id": runs.class_id,
                "segmentation": {"size": [height, width], "counts": runs.compressed.decode("ascii")},
                "area": runs.area,
                "bbox": runs.box,
                "iscrowd": 0,
            }
            for runs in encode_rle(image.mask)
            if runs.class_id not in (0, IGNORE_INDEX)
        )
        return image.index, (json_bytes(entry), b",".join(map(json_bytes, annotations)))

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[_Row]) -> None:
        files.write_part(_NAME, encode_rows(payloads))

    def finalize(self, folder: RunFolder, shards: int) -> None:
        folder.write("coco/annotations/instances_default.json", self._pieces(folder))

    def _pieces(self, folder: RunFolder) -> Iterator[bytes]:
        manifest = self.context.manifest
        info = {"description": f"multisa {self.context.command}, bundle {manifest.name}", "version": "1.0"}
        names = enumerate(manifest.foreground, start=1)
        categories = [{"id": i, "name": name, "supercategory": ""} for i, name in names]
        head = (json_bytes(info), json_bytes(categories))
        yield b'{"info":%s,"licenses":[],\n"categories":%s,\n"images":[\n' % head
        yield from _listed(fields[0] for _, fields in ordered_rows(folder, _NAME))
        yield b'\n],\n"annotations":[\n'
        yield from _listed(fields[1] for _, fields in ordered_rows(folder, _NAME) if fields[1])
        yield b"\n]}\n"


def _listed(values: Iterable[bytes]) -> Iterator[bytes]:
    for number, value in enumerate(values):
        yield b",\n" + value if number else value
