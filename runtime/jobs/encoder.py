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
from multisa.runtime.jobs.snapshot import Sample
from multisa.runtime.predict.prediction import DECIMALS, Prediction
from multisa.runtime.predict.uncertainty import uncertainty
from multisa.runtime.writers.base import LabelledImage, Writer


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What a shard keeps of a finished image: small, whatever the image's size."""

    index: int
    record: bytes  # its line of labels.jsonl
    payloads: tuple[Any, ...]  # one for each sink


class Encoder:
    """Encodes for the sinks of a run; `encode` may be called from several threads at once."""

    def __init__(self, out: Path, manifest: Manifest, writers: Sequence[Writer]) -> None:
        self._out, self._manifest, self._writers = out, manifest, tuple(writers)
        self._palette = manifest.mask_palette()[: len(manifest.classes)]

    def encode(self, work: Sample, image: WorkingImage, annotation: Prediction) -> EncodedImage:
        """Raises ImageError when the results of the image cannot be written or a format cannot hold it."""
        paths = [path for writer in self._writers for path in writer.results(work.name)]
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
            probabilities=annotation.probabilities,
        )
        return EncodedImage(
            work.index, json_line(record), tuple(writer.encode(labelled) for writer in self._writers)
        )

    def _record(
        self, work: Sample, image: WorkingImage, annotation: Prediction, counts: Sequence[int]
    ) -> dict[str, Any]:
        classes, pixels = self._manifest.classes, image.height * image.width
        levels = histogram(annotation.confidence) @ np.arange(256)
        confidence = int(levels) / (255 * annotation.confidence.size)
        found = set(annotation.classes) - set(annotation.missing)
        uncertainty_score = uncertainty(confidence, annotation.disagreement, annotation.classes, found)
        masks = [path for writer in self._writers for path in writer.results(work.name)]
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
            "uncertainty": round(uncertainty_score, DECIMALS),
            **annotation.details,
        }
        return {**record, "notes": image.notes} if image.notes else record


def json_line(value: Mapping[str, Any]) -> bytes:
    """One line of JSON in UTF-8, keys sorted; the same value gives the same bytes."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()
