"""`masks`: a palette PNG for each image, OUT/masks/NAME.png, as VOC's tools read them."""

from collections.abc import Sequence

from multisa.runtime.sinks.base import FormatSink
from multisa.runtime.sinks.contract import LabelledImage, ShardFiles


class MasksSink(FormatSink):
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
