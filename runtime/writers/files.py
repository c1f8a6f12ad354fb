"""`masks`: a palette PNG for each image, OUT/masks/NAME.png, as VOC's tools read them."""

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


class MasksWriter(WriterBase):
    """One file for each image."""

    def encode(self, image: LabelledImage) -> tuple[str, bytes]:
        """The path and the PNG."""
        return mask_of(image.name), image.png

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[tuple[str, bytes]]) -> None:
        """Write the masks of the shard."""
        for path, png in payloads:
            files.write(path, png)

    def results(self, name: str) -> Sequence[str]:
        """The mask."""
        return (mask_of(name),)


def mask_of(name: str) -> str:
    """Path of an image's mask below OUT, by the image's name."""
    return f"masks/{name}.png"


_COMPRESSION = 1  # confidences are noise to a compressor; more effort gains little


class ConfidenceWriter(WriterBase):
    """One file for each image."""

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
    """One tar for each shard."""

    def encode(self, image: LabelledImage) -> _Members:
        """The two members of an image."""
        key = tar_key(image.name)
        return (f"{key}.png", image.png), (f"{key}.json", json_bytes(image.record))

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[_Members]) -> None:
        """Write the tar of the shard; none where no image of it could be done."""
        if payloads:
            files.write(shard_path("shards", shard, "tar"), tar_bytes(m for pair in payloads for m in pair))
