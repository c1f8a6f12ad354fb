"""Plain files: `masks`, `confidence` and `tar`, and the base classes of formats like them."""

from abc import abstractmethod
from collections.abc import Sequence

from multisa.runtime.writers.base import (
    LabelledImage,
    ShardFiles,
    Writer,
    encode_grey,
    json_bytes,
    shard_path,
    tar_bytes,
    tar_key,
)


class PngWriter(Writer):
    """One PNG for each image, OUT/FOLDER/NAME.png."""

    folder: str

    @abstractmethod
    def png(self, image: LabelledImage) -> bytes:
        """Encode the file of one image."""

    def encode(self, image: LabelledImage) -> tuple[str, bytes]:
        return self.results(image.name)[0], self.png(image)

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[tuple[str, bytes]]) -> None:
        for path, png in payloads:
            files.write(path, png)

    def results(self, name: str) -> Sequence[str]:
        return (f"{self.folder}/{name}.png",)


class MasksWriter(PngWriter):
    """`masks`: palette PNGs, as VOC tools read them."""

    folder = "masks"

    def png(self, image: LabelledImage) -> bytes:
        return image.png


class ConfidenceWriter(PngWriter):
    """`confidence`: grey PNGs, 0..255 for 0..1."""

    folder = "confidence"

    def png(self, image: LabelledImage) -> bytes:
        return encode_grey(image.confidence)


TarMembers = tuple[tuple[str, bytes], ...]


class TarShardWriter(Writer):
    """One tar for each shard, OUT/FOLDER/000012.tar, without those whose images all failed."""

    folder: str

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[TarMembers]) -> None:
        if payloads:
            data = tar_bytes(member for members in payloads for member in members)
            files.write(shard_path(self.folder, shard, "tar"), data)


class TarWriter(TarShardWriter):
    """`tar`: shards for WebDataset with KEY.png and KEY.json (its record) for each image."""

    folder = "shards"

    def encode(self, image: LabelledImage) -> TarMembers:
        key = tar_key(image.name)
        return (f"{key}.png", image.png), (f"{key}.json", json_bytes(image.record))
