"""`tar`: OUT/shards/000012.tar, as webdataset reads it: KEY.png, the mask, and KEY.json, the image's record.

KEY is the image's name, escaped where webdataset would cut it (`names.tar_key`).
"""

from collections.abc import Sequence

from multisa.runtime.sinks.archives import tar_bytes
from multisa.runtime.sinks.base import FormatSink, shard_path
from multisa.runtime.sinks.contract import LabelledImage, ShardFiles
from multisa.runtime.sinks.names import tar_key
from multisa.runtime.sinks.parts import json_bytes

_Members = tuple[tuple[str, bytes], ...]


class TarSink(FormatSink):
    """One tar for each shard."""

    def encode(self, image: LabelledImage) -> _Members:
        """The two members of an image."""
        key = tar_key(image.name)
        return (f"{key}.png", image.png), (f"{key}.json", json_bytes(image.record))

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[_Members]) -> None:
        """Write the tar of the shard; none where no image of it could be done."""
        if payloads:
            files.write(shard_path("shards", shard, "tar"), tar_bytes(m for pair in payloads for m in pair))
