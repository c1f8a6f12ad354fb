"""The writers by their names on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from multisa.runtime.errors import UsageError

if TYPE_CHECKING:  # the command line lists the names without importing the formats
    from multisa.runtime.writers.base import Writer, WriterContext

# Name -> what it writes, and where below the output folder.
WRITERS: dict[str, str] = {
    "masks": "palette PNGs, masks/NAME.png",
    "tar": "tar shards for webdataset, shards/",
    "coco": "COCO annotations, coco/annotations/instances_default.json",
    "cvat": "CVAT's Segmentation mask 1.1, cvat/",
    "label-studio": "Label Studio predictions, label-studio/",
    "datumaro": "Datumaro and FiftyOne folder, datumaro/",
    "parquet": "statistics of each image, parquet/",
    "confidence": "grey PNGs, confidence/NAME.png",
    "probabilities": "class probabilities, probabilities/",
}


def writer_folder(name: str) -> str:
    """Return the subfolder of the output folder that a writer uses."""
    return "shards" if name == "tar" else name


def open_writers(names: Sequence[str], context: WriterContext, *, image_prefix: str = "") -> tuple[Writer, ...]:
    """Create the writers with these names, in their order and without duplicates.

    image_prefix: precedes an image's id in the path or URL that Label Studio loads. Raises UsageError for an
    unknown name, BackendUnavailable if the package of a format is not installed.
    """
    unknown = [name for name in names if name not in WRITERS]
    if unknown:
        raise UsageError(f"got the writer {unknown[0]!r}, expected one of {', '.join(WRITERS)}")
    from multisa.runtime.writers.coco import CocoWriter
    from multisa.runtime.writers.cvat_datumaro import CvatWriter, DatumaroWriter
    from multisa.runtime.writers.files import ConfidenceWriter, MasksWriter, TarWriter
    from multisa.runtime.writers.label_studio import LabelStudioWriter
    from multisa.runtime.writers.parquet import ParquetWriter
    from multisa.runtime.writers.probabilities import ProbabilitiesWriter

    classes: dict[str, Callable[[WriterContext], Writer]] = {
        "masks": MasksWriter,
        "tar": TarWriter,
        "coco": CocoWriter,
        "cvat": CvatWriter,
        "label-studio": lambda context: LabelStudioWriter(context, image_prefix),
        "datumaro": DatumaroWriter,
        "parquet": ParquetWriter,
        "confidence": ConfidenceWriter,
        "probabilities": ProbabilitiesWriter,
    }
    return tuple(classes[name](context) for name in dict.fromkeys(names))
