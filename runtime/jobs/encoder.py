"""From a prediction to what a run stores of it: its record, and what each writer needs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multisa.runtime.jobs.shards import check_path_length
from multisa.runtime.jobs.snapshot import Sample
from multisa.runtime.predict.prediction import Prediction
from multisa.runtime.writers.base import LabelledImage, Writer


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What a shard keeps of a finished image: small, whatever the image's size."""

    index: int
    record: bytes  # its line of labels.jsonl
    payloads: tuple[Any, ...]  # one for each writer


class Encoder:
    """Encodes predictions for the writers of a run; `encode` may be called from several threads at once."""

    def __init__(self, output: Path, writers: Sequence[Writer]) -> None:
        self._output = output
        self._writers = tuple(writers)

    def encode(self, sample: Sample, prediction: Prediction) -> EncodedImage:
        """Encode one prediction for every writer.

        Raises ImageError where a path of the results is too long or a format cannot hold the image.
        """
        paths = [path for writer in self._writers for path in writer.results(sample.name)]
        for path in paths:
            check_path_length(self._output, path)
        record = {"index": sample.index, "image": sample.item.id, **prediction.record()}
        if paths:
            record["mask"] = paths[0]
        labelled = LabelledImage(
            index=sample.index,
            id=sample.item.id,
            name=sample.name,
            mask=prediction.mask,
            png=prediction.png,
            confidence=prediction.working_confidence,
            record=record,
            probabilities=prediction.probabilities,
        )
        payloads = tuple(writer.encode(labelled) for writer in self._writers)
        return EncodedImage(sample.index, json_line(record), payloads)


def json_line(value: Mapping[str, Any]) -> bytes:
    """One line of JSON in UTF-8, keys sorted; the same value gives the same bytes."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode()
