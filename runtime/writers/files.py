"""Plain files: `masks`, `confidence` and `tar`."""

import io
from collections.abc import Sequence

from PIL import Image

from multisa.runtime.imaging.decode import resize_mask
from multisa.runtime.writers.base import (
    LabelledImage,
    ShardFiles,
    WriterBase,
    json_bytes,
    shard_path,
    tar_key,
)
from multisa.runtime.writers.encoding import tar_bytes

_COMPRESSION = 1  # of zlib; confidences are noise to it, and more effort gains little


class MasksWriter(WriterBase):
    """`masks`: a palette PNG for each image, OUT/masks/NAME.png, as VOC tools read them."""

    def encode(self, image: LabelledImage) -> tuple[str, bytes]:
        """The path and the PNG."""
        return mask_path(image.name), image.png

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[tuple[str, bytes]]) -> None:
        """Write the masks of the shard."""
        for path, png in payloads:
            files.write(path, png)

    def results(self, name: str) -> Sequence[str]:
        """The mask."""
        return (mask_path(name),)


def mask_path(name: str) -> str:
    """Path of the mask of the image `name` below the output folder."""
    return f"masks/{name}.png"


class ConfidenceWriter(WriterBase):
    """`confidence`: a grey PNG for each image, OUT/confidence/NAME.png, 0..255 for 0..1."""

    def encode(self, image: LabelledImage) -> tuple[str, bytes]:
        """The path and the PNG."""
        buffer = io.BytesIO()
        size = (image.mask.shape[0], image.mask.shape[1])
        grey = Image.fromarray(resize_mask(image.confidence, size))
        grey.save(buffer, "PNG", compress_level=_COMPRESSION)
        return self.results(image.name)[0], buffer.getvalue()

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[tuple[str, bytes]]) -> None:
        """Write the files of the shard."""
        for path, png in payloads:
            files.write(path, png)

    def results(self, name: str) -> Sequence[str]:
        """The grey image."""
        return (f"confidence/{name}.png",)


_Members = tuple[tuple[str, bytes], ...]


class TarWriter(WriterBase):
    """`tar`: OUT/shards/000012.tar for WebDataset, KEY.png and KEY.json (its record) for each image."""

    def encode(self, image: LabelledImage) -> _Members:
        """The two members of an image."""
        key = tar_key(image.name)
        return (f"{key}.png", image.png), (f"{key}.json", json_bytes(image.record))

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[_Members]) -> None:
        """Write the tar of the shard; none if all its images failed."""
        if payloads:
            files.write(shard_path("shards", shard, "tar"), tar_bytes(m for pair in payloads for m in pair))
