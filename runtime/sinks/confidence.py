"""`confidence`: a grey PNG for each image, OUT/confidence/NAME.png: 0..255 for the mask's 0..1, at its size.

The network's answer is enlarged as the mask is, so the two lie over each other: pixels below a threshold can
be set to the ignore id without anything being computed again.
"""

import io
from collections.abc import Sequence

from PIL import Image

from multisa.runtime.images import resize_mask
from multisa.runtime.sinks.base import FormatSink
from multisa.runtime.sinks.contract import LabelledImage, ShardFiles

_COMPRESSION = 1  # confidences are noise to a compressor; more effort gains little


class ConfidenceSink(FormatSink):
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
