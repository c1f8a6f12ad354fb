"""`coco`: OUT/coco/annotations/instances_default.json, where COCO tools expect it beside images/.

Each foreground class of an image has one annotation, a run-length mask of all its pixels as in COCO-Stuff.
`iscrowd` is 0, also as there: tools that train or evaluate ignore crowds. Ids derive from the index of the
image, so a retry does not change them.
"""

from collections.abc import Iterable, Iterator, Sequence

from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.writers.base import (
    LabelledImage,
    RunFolder,
    ShardFiles,
    WriterBase,
    encode_rows,
    json_bytes,
    ordered_rows,
)
from multisa.runtime.writers.encoding import coco_masks

_NAME = "coco"
_IDS = 256  # annotation ids reserved for each image, one for each value of a mask

_Row = tuple[int, tuple[bytes, bytes]]


class CocoWriter(WriterBase):
    """One file for the whole run."""

    def encode(self, image: LabelledImage) -> _Row:
        """The index of the image, its entry, and its annotations separated by commas, as JSON."""
        height, width = image.mask.shape
        entry = {"id": image.index + 1, "file_name": image.id, "width": width, "height": height}
        annotations = (
            {
                "id": image.index * _IDS + mask.class_id,
                "image_id": image.index + 1,
                "category_id": mask.class_id,
                "segmentation": {"size": [height, width], "counts": mask.counts},
                "area": mask.area,
                "bbox": mask.box,
                "iscrowd": 0,
            }
            for mask in coco_masks(image.mask)
            if mask.class_id not in (0, IGNORE_INDEX)
        )
        return image.index, (json_bytes(entry), b",".join(map(json_bytes, annotations)))

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[_Row]) -> None:
        """Keep the entries of the shard for `finalize`."""
        files.write_part(_NAME, encode_rows(payloads))

    def finalize(self, folder: RunFolder, shards: int) -> None:
        """Write the annotations of all images in their order."""
        folder.write("coco/annotations/instances_default.json", self._pieces(folder))

    def _pieces(self, folder: RunFolder) -> Iterator[bytes]:
        manifest = self.context.manifest
        info = {"description": f"multisa {self.context.command}, bundle {manifest.name}", "version": "1.0"}
        names = enumerate(manifest.foreground, start=1)
        categories = [{"id": i, "name": name, "supercategory": ""} for i, name in names]
        yield b'{"info":%s,"licenses":[],\n"categories":%s,\n"images":[\n' % (
            json_bytes(info),
            json_bytes(categories),
        )
        yield from _listed(fields[0] for _, fields in ordered_rows(folder, _NAME))
        yield b'\n],\n"annotations":[\n'
        yield from _listed(fields[1] for _, fields in ordered_rows(folder, _NAME) if fields[1])
        yield b"\n]}\n"


def _listed(values: Iterable[bytes]) -> Iterator[bytes]:
    for number, value in enumerate(values):
        yield b",\n" + value if number else value
