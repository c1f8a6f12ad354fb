"""OUT/report.html of a run that has ended: what is on it is read back from the results and the source."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.runtime.bulk.finish import FAILED_FILE, LABELS_FILE
from multisa.runtime.bulk.folder import REPORT_FOLDER, REPORT_PAGE
from multisa.runtime.bulk.inventory import Inventory
from multisa.runtime.bulk.job import Job
from multisa.runtime.decoding import decode_image
from multisa.runtime.errors import ImageError
from multisa.runtime.images import decode_mask, read_mask
from multisa.runtime.manifest import Manifest
from multisa.runtime.report.pictures import clear_pictures
from multisa.runtime.report.report import write_report
from multisa.runtime.sinks.base import shard_path
from multisa.runtime.sinks.names import tar_key
from multisa.runtime.sources.contract import Source

UInt8 = npt.NDArray[np.uint8]
Record = Mapping[str, Any]

_LONG_SIDE = 640  # of the photographs that are read for the page


def write_page(
    job: Job, manifest: Manifest, inventory: Inventory, shard_size: int, run: Record, pictured: int
) -> None:
    """Write the page and its pictures; an image that cannot be read any more has none.

    Masks are taken from the sinks "masks" or "tar"; with others alone the page has figures only.
    """
    with ExitStack() as stack:
        source = stack.enter_context(job.open_source())
        pictures = _Pictures(job, inventory, shard_size, source)
        write_report(
            job.out,
            records=_lines(job.out / LABELS_FILE),
            run=run,
            failures=_lines(job.out / FAILED_FILE),
            manifest=manifest,
            read_photograph=pictures.photograph,
            read_mask=pictures.mask,
            pictured=pictured if {"masks", "tar"} & set(job.sinks) else 0,
        )


def remove_page(out: Path) -> None:
    """Remove the page of a run and its pictures. Raises UsageError where OUT/report is not the page's own."""
    (out / REPORT_PAGE).unlink(missing_ok=True)
    clear_pictures(out)
    folder = out / REPORT_FOLDER
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


class _Pictures:
    """What the page shows of an image, by its record."""

    def __init__(self, job: Job, inventory: Inventory, shard_size: int, source: Source) -> None:
        self._job, self._inventory, self._shard_size, self._source = job, inventory, shard_size, source

    def photograph(self, record: Record) -> UInt8 | None:
        """uint8 [H, W, 3], upright, perhaps smaller than it is; None when it cannot be had any more."""
        work = self._inventory.work(int(record["index"]))
        try:
            data = self._source.read(work.item)
            return decode_image(data, max_pixels=self._job.max_pixels, long_side=_LONG_SIDE).rgb
        except ImageError:
            return None

    def mask(self, record: Record) -> UInt8:
        """uint8 [H, W] of the photograph's own size."""
        index = int(record["index"])
        name = self._inventory.work(index).name
        if "masks" in self._job.sinks:
            return read_mask(self._job.out / "masks" / f"{name}.png", max_pixels=self._job.max_pixels)
        shard = self._inventory.shard_of(index, self._shard_size)
        with tarfile.open(self._job.out / shard_path("shards", shard, "tar")) as members:
            member = members.extractfile(f"{tar_key(name)}.png")
            assert member is not None  # it is what this run has written
            return decode_mask(member.read(), max_pixels=self._job.max_pixels)


def _lines(path: Path) -> Iterator[Record]:
    if path.is_file():
        with path.open("rb") as lines:
            yield from map(json.loads, lines)
