"""One finished image to what is written of it: its record, its mask as PNG, what each sink needs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multisa.kernels import histogram
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.imaging.decode import WorkingImage, resize_mask
from multisa.runtime.imaging.png import encode_palette_png
from multisa.runtime.jobs.shards import check_path_length
from multisa.runtime.jobs.snapshot import Work
from multisa.runtime.predict.prediction import DECIMALS, Annotation
from multisa.runtime.predict.uncertainty import doubt
from multisa.runtime.writers.base import LabelledImage, Sink


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What a shard keeps of a finished image: small, whatever the photograph's size."""

    index: int
    record: bytes  # its line of labels.jsonl
    payloads: tuple[Any, ...]  # one for each sink


class Encoder:
    """Encodes for the sinks of a run; `encode` may be called from several threads at once."""

    def __init__(self, out: Path, manifest: Manifest, sinks: Sequence[Sink]) -> None:
        self._out, self._manifest, self._sinks = out, manifest, tuple(sinks)
        self._palette = manifest.mask_palette()[: len(manifest.classes)]

    def encode(self, work: Work, image: WorkingImage, annotation: Annotation) -> EncodedImage:
        """Raises ImageError when the results of the image cannot be written or a format cannot hold it."""
        paths = [path for sink in self._sinks for path in sink.results(work.name)]
        for path in paths:
            check_path_length(self._out, path)
        mask = resize_mask(annotation.mask, (image.height, image.width))
        counts = histogram(mask)[: len(self._manifest.classes)]
        png = encode_palette_png(mask, self._palette)
        record = self._record(work, image, annotation, counts.tolist())
        labelled = LabelledImage(
            index=work.index,
            id=work.item.id,
            name=work.name,
            mask=mask,
            png=png,
            confidence=annotation.confidence,
            record=record,
            soft=annotation.soft,
        )
        return EncodedImage(
            work.index, json_line(record), tuple(sink.encode(labelled) for sink in self._sinks)
        )

    def _record(
        self, work: Work, image: WorkingImage, annotation: Annotation, counts: Sequence[int]
    ) -> dict[str, Any]:
        classes, pixels = self._manifest.classes, image.height * image.width
        levels = histogram(annotation.confidence) @ np.arange(256)
        confidence = int(levels) / (255 * annotation.confidence.size)
        found = set(annotation.classes) - set(annotation.missing)
        doubted = doubt(confidence, annotation.disagreement, annotation.classes, found)
        masks = [path for sink in self._sinks for path in sink.results(work.name)]
        record = {
            "index": work.index,
            "image": work.item.id,
            **({"mask": masks[0]} if masks else {}),
            "width": image.width,
            "height": image.height,
            "orientation": image.orientation,
            "classes": annotation.classes,
            "missing": annotation.missing,
            "pixel_shares": {classes[i]: round(n / pixels, DECIMALS) for i, n in enumerate(counts) if n},
            "confidence": round(confidence, DECIMALS),
            "disagreement": round(annotation.disagreement, DECIMALS),
            "doubt": round(doubted, DECIMALS),
            **annotation.details,
        }
        return {**record, "notes": image.notes} if image.notes else record


def json_line(value: Mapping[str, Any]) -> bytes:
    """One line of JSON in UTF-8, keys sorted; the same value gives the same bytes."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()
