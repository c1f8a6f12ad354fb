"""`soft`: OUT/soft/000012.tar, the class probabilities of each image, so that thresholds can be tried without
computing anything again: KEY.npz, four arrays (see `soft_maps`), and KEY.json, the image's record.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.sinks.archives import tar_bytes, zip_bytes
from multisa.runtime.sinks.base import FormatSink, shard_path
from multisa.runtime.sinks.contract import LabelledImage, ShardFiles
from multisa.runtime.sinks.names import tar_key
from multisa.runtime.sinks.parts import json_bytes

_LEVEL = 1  # of deflate: a higher one takes several times as long for few bytes less

_Members = tuple[tuple[str, bytes], ...]


class SoftSink(FormatSink):
    """One tar of arrays for each shard."""

    needs_soft_maps = True

    def encode(self, image: LabelledImage) -> _Members:
        """The two members of an image."""
        soft = image.soft
        assert soft is not None, "the run makes soft maps for a sink that needs them"
        arrays: dict[str, npt.NDArray[Any]] = {
            "class_ids": np.array(soft.class_ids, np.uint8),
            "confidence": image.confidence,
            "probabilities": soft.probabilities.astype(np.float16, copy=False),
            "size": np.array(image.mask.shape, np.int32),
        }
        key = tar_key(image.name)
        npz = zip_bytes(((f"{name}.npy", _npy(array)) for name, array in arrays.items()), level=_LEVEL)
        return (f"{key}.npz", npz), (f"{key}.json", json_bytes(image.record))

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[_Members]) -> None:
        """Write the tar of the shard; none where no image of it could be done."""
        if payloads:
            files.write(shard_path("soft", shard, "tar"), tar_bytes(m for pair in payloads for m in pair))


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    # Fixed byte order and version: the bytes are the same on every machine.
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    np.lib.format.write_array(buffer, np.ascontiguousarray(little), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
