"""`label-studio`: OUT/label-studio/000012.json, tasks with predictions; one brush for each class of an image.

OUT/label-studio/labeling_config.xml is the interface the predictions are for. An image is referred to by its
id with a prefix before it: where Label Studio finds the photographs.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from multisa.runtime.errors import ImageError
from multisa.runtime.palette import IGNORE_INDEX
from multisa.runtime.sinks.base import FormatSink, shard_path
from multisa.runtime.sinks.brush import encode_brush
from multisa.runtime.sinks.contract import LabelledImage, RunFolder, ShardFiles, SinkContext
from multisa.runtime.sinks.parts import json_bytes
from multisa.runtime.sinks.runs import FlatRuns, row_runs

_FOLDER = "label-studio"
_WEB = ("http://", "https://", "/")  # prefixes of what a browser fetches: the id has to be escaped


class LabelStudioSink(FormatSink):
    """One list of tasks for each shard."""

    def __init__(self, context: SinkContext, image_prefix: str = "") -> None:
        super().__init__(context)
        self._prefix = image_prefix
        self._version = f"{context.manifest.name}-{context.bundle_sha256[:12]}"

    def encode(self, image: LabelledImage) -> bytes:
        """The task as JSON."""
        try:
            results = [
                self._result(image, runs)
                for runs in row_runs(image.mask)
                if runs.class_id not in (0, IGNORE_INDEX)
            ]
        except ValueError as error:
            raise ImageError(f"label-studio cannot hold it: {error}") from error
        prediction = {
            "model_version": self._version,
            "score": image.record["confidence"],
            "result": results,
        }
        reference = self._prefix + (quote(image.id) if self._prefix.startswith(_WEB) else image.id)
        return json_bytes(
            {"data": {"image": reference}, "meta": {"id": image.id}, "predictions": [prediction]}
        )

    def write_shard(self, files: ShardFiles, shard: int, payloads: Sequence[bytes]) -> None:
        """Write the tasks of the shard; none where no image of it could be done."""
        if payloads:
            tasks = b"[\n" + b",\n".join(payloads) + b"\n]\n"
            files.write(shard_path(_FOLDER, shard, "json"), tasks)

    def finish(self, folder: RunFolder, shards: int) -> None:
        """Write the labelling interface."""
        manifest = self.context.manifest
        colours = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in manifest.palette[1:])
        labels = (
            f'    <Label value={quoteattr(name)} background="{colour}"/>\n'
            for name, colour in zip(manifest.foreground, colours, strict=True)
        )
        brush = f'  <BrushLabels name="tag" toName="image">\n{"".join(labels)}  </BrushLabels>\n'
        text = f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n{brush}</View>\n'
        folder.write(f"{_FOLDER}/labeling_config.xml", [text.encode()])

    def _result(self, image: LabelledImage, runs: FlatRuns) -> dict[str, Any]:
        height, width = image.mask.shape
        code = encode_brush(runs, height * width)
        return {
            "id": f"class-{runs.class_id}",
            "type": "brushlabels",
            "from_name": "tag",
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {
                "format": "rle",
                "rle": list(code),
                "brushlabels": [self.context.manifest.classes[runs.class_id]],
            },
        }
