"""The formats that results can be written in, by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from multisa.runtime.errors import UsageError

if TYPE_CHECKING:  # the command line lists the names without loading what the formats need
    from multisa.runtime.writers.base import Writer, WriterContext

# Name -> what it writes, for people.
WRITERS: dict[str, str] = {
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


def writer_folder(name: str) -> str:
    """The folder below OUT that a sink writes into."""
    return "shards" if name == "tar" else name


def open_writers(
    names: Sequence[str], context: WriterContext, *, image_prefix: str = ""
) -> tuple[Writer, ...]:
    """Make the sinks of these names, each once, in the order of their first mention.

    image_prefix: what stands before an image's id where Label Studio is to find it. Raises UsageError for an
    unknown name, BackendUnavailable where a format's package is not installed.
    """
    unknown = [name for name in names if name not in WRITERS]
    if unknown:
        raise UsageError(f"got the sink {unknown[0]!r}, expected one of {', '.join(WRITERS)}")
    makers = _makers(image_prefix)
    return tuple(makers[name](context) for name in dict.fromkeys(names))


def _makers(image_prefix: str) -> dict[str, Callable[[WriterContext], Writer]]:
    from multisa.runtime.writers.coco import CocoWriter
    from multisa.runtime.writers.cvat import CvatWriter
    from multisa.runtime.writers.datumaro import DatumaroWriter
    from multisa.runtime.writers.files import ConfidenceWriter, MasksWriter, TarWriter
    from multisa.runtime.writers.label_studio import LabelStudioWriter
    from multisa.runtime.writers.parquet import ParquetWriter
    from multisa.runtime.writers.probabilities import ProbabilitiesWriter

    return {
        "masks": MasksWriter,
        "tar": TarWriter,
        "coco": CocoWriter,
        "cvat": CvatWriter,
        "label-studio": lambda context: LabelStudioWriter(context, image_prefix),
        "datumaro": DatumaroWriter,
        "parquet": ParquetWriter,
        "confidence": ConfidenceWriter,
        "soft": ProbabilitiesWriter,
    }
