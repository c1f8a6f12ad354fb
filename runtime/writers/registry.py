"""The formats that results can be written in, by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from multisa.runtime.errors import UsageError

if TYPE_CHECKING:  # the command line lists the names without loading what the formats need
    from multisa.runtime.writers.base import Sink, SinkContext

# Name -> what it writes, for people.
SINKS: dict[str, str] = {
    "masks": "palette PNGs, masks/NAME.png",
    "tar": "tar shards for webdataset, shards/",
    "coco": "COCO annotations, coco/annotations/instances_default.json",
    "cvat": "CVAT's Segmentation mask 1.1, cvat/",
    "label-studio": "Label Studio predictions, label-studio/",
    "datumaro": "Datumaro and FiftyOne folder, datumaro/",
    "parquet": "statistics of each image, parquet/",
    "confidence": "grey PNGs, confidence/NAME.png",
    "soft": "class probabilities, soft/",
}


def sink_folder(name: str) -> str:
    """The folder below OUT that a sink writes into."""
    return "shards" if name == "tar" else name


def open_sinks(names: Sequence[str], context: SinkContext, *, image_prefix: str = "") -> tuple[Sink, ...]:
    """Make the sinks of these names, each once, in the order of their first mention.

    image_prefix: what stands before an image's id where Label Studio is to find it. Raises UsageError for an
    unknown name, EngineUnavailable where a format's package is not installed.
    """
    unknown = [name for name in names if name not in SINKS]
    if unknown:
        raise UsageError(f"got the sink {unknown[0]!r}, expected one of {', '.join(SINKS)}")
    makers = _makers(image_prefix)
    return tuple(makers[name](context) for name in dict.fromkeys(names))


def _makers(image_prefix: str) -> dict[str, Callable[[SinkContext], Sink]]:
    from multisa.runtime.writers.coco import CocoSink
    from multisa.runtime.writers.cvat import CvatSink
    from multisa.runtime.writers.datumaro import DatumaroSink
    from multisa.runtime.writers.files import ConfidenceSink, MasksSink, TarSink
    from multisa.runtime.writers.label_studio import LabelStudioSink
    from multisa.runtime.writers.parquet import ParquetSink
    from multisa.runtime.writers.probabilities import SoftSink

    return {
        "masks": MasksSink,
        "tar": TarSink,
        "coco": CocoSink,
        "cvat": CvatSink,
        "label-studio": lambda context: LabelStudioSink(context, image_prefix),
        "datumaro": DatumaroSink,
        "parquet": ParquetSink,
        "confidence": ConfidenceSink,
        "soft": SoftSink,
    }
