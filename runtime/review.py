"""Turn decisions about the masks of a run into work: corrections, and tasks for CVAT and Label Studio.

    FOLDER/corrections/    the accepted masks and classes.txt, for `multisa train --corrections`
    FOLDER/cvat/, label-studio/    the rejected images, with our masks to start from
    FOLDER/rejected.txt, later.txt, undecided.txt    ids of images, one per line; only where there are any

Decisions come from OUT/report.html, which exports them as JSON: {"format": .., "run": key, "decisions": {id: ..}}.
"""

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multisa.runtime.bundle import Bundle
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_user_text, sha256_of_file, write_bytes_atomically
from multisa.runtime.imaging.decode import MAX_PIXELS
from multisa.runtime.imaging.png import encode_palette_png
from multisa.runtime.jobs.finalize import LABELS_FILE, RunMasks
from multisa.runtime.jobs.fingerprint import Fingerprint, read_fingerprint, run_key
from multisa.runtime.jobs.output import SNAPSHOT
from multisa.runtime.jobs.shards import path_below
from multisa.runtime.jobs.snapshot import Snapshot
from multisa.runtime.jobs.spec import SHARD_SIZE
from multisa.runtime.predict.prediction import ClassProbabilities
from multisa.runtime.progress import format_examples, pluralize
from multisa.runtime.writers.base import LabelledImage, WriterContext, line_name
from multisa.runtime.writers.registry import open_writers

FORMAT = "multisa decisions 1"  # in the files that report.html exports
CORRECTIONS = "corrections"  # below FOLDER
ACCEPT, REJECT, LATER = DECISIONS = ("accept", "reject", "later")
UNDECIDED = "undecided"
TASK_WRITERS = ("cvat", "label-studio")
MAX_DECISIONS_BYTES = 2**28  # a million images with long names

Record = Mapping[str, Any]  # a line of labels.jsonl


@dataclass(frozen=True)
class Review:
    """What became of the images of a run."""

    folder: Path
    writers: tuple[str, ...]
    counts: Mapping[str, int]  # images by decision, "undecided" among them

    def describe(self) -> str:
        """Where everything is, and what to do with it, a line each."""
        places = {
            ACCEPT: ("accepted", f"{self.folder / CORRECTIONS} (for `multisa train --corrections`)"),
            REJECT: ("rejected", ", ".join(str(self.folder / name) for name in self.writers)),
            **{name: (name, str(self.folder / f"{name}.txt")) for name in (LATER, UNDECIDED)},
        }
        lines = [
            f"{pluralize(n, 'image')} {places[name][0]}: {places[name][1]}" for name, n in self.counts.items() if n
        ]
        return "\n".join(lines)


def review_run(
    out: Path,
    decisions: Path,
    folder: Path,
    bundle: Bundle,
    *,
    writers: Sequence[str] = TASK_WRITERS,
    image_prefix: str | None = None,
) -> Review:
    """Write FOLDER, which must be empty or missing, from the decisions about the masks of the run in OUT.

    bundle: the one of the run. writers: formats of the tasks, some of TASK_WRITERS. image_prefix: of image paths in
    Label Studio tasks; the run's by default. Raises UsageError for an OUT without a finished run or without masks,
    another bundle, a FOLDER with files, and a decisions file that is damaged or of another run.
    """
    if unknown := [name for name in writers if name not in TASK_WRITERS]:
        raise UsageError(f"--writer: got {unknown[0]!r}, expected some of {', '.join(TASK_WRITERS)}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder}: holds files or is one, expected a new folder: choose another one")
    fingerprint = _settings(out)
    if sha256_of_file(bundle.path / MANIFEST_NAME) != fingerprint.get("bundle"):
        raise UsageError(f"{bundle.path}: is not the bundle of the run in {out}, expected that: give it with --bundle")
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir(parents=True)
    try:
        with Snapshot(out / SNAPSHOT) as snapshot:
            decided = read_decisions(decisions, run_key(fingerprint, snapshot))
            context = WriterContext(temporary, str(fingerprint.get("command")), bundle.manifest, fingerprint["bundle"])
            prefix = str(fingerprint.get("image prefix") or "") if image_prefix is None else image_prefix
            masks = RunMasks(
                out,
                tuple(fingerprint.get("writers", ())),
                snapshot,
                int(fingerprint.get("shard size", SHARD_SIZE)),
                int(fingerprint.get("max pixels", MAX_PIXELS)),
            )
            counts = _Writing(context, masks, tuple(writers), prefix).write(decided, decisions)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Review(folder, tuple(writers), counts)


def read_decisions(path: Path, key: str) -> dict[str, str]:
    """Decisions by image id, from a file that the page of the run with this key exported.

    Raises UsageError for a file that is damaged, of another run, or without a decision.
    """
    if path.is_file() and path.stat().st_size > MAX_DECISIONS_BYTES:
        raise UsageError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_DECISIONS_BYTES}")
    remedy = "export the decisions again from report.html of the run"
    try:
        value = json.loads(read_user_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON ({error}): {remedy}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UsageError(f'{path}: got no "format": "{FORMAT}", expected decisions that report.html exported: {remedy}')
    found = value.get("decisions")
    if not isinstance(found, dict) or not all(decision in DECISIONS for decision in found.values()):
        raise UsageError(f"{path}: got other decisions than {', '.join(DECISIONS)} by image id: {remedy}")
    if value.get("run") != key:
        raise UsageError(f"{path}: holds decisions about another run, or one that was started over since: {remedy}")
    if not found:
        raise UsageError(f"{path}: holds no decision: decide in report.html with the keys a, r and l, and export again")
    return found


def _settings(out: Path) -> Fingerprint:
    fingerprint = read_fingerprint(out)
    if fingerprint is None or not (out / LABELS_FILE).is_file():
        raise UsageError(f"{out}: holds no finished run, expected the output folder of `multisa label` or `segment`")
    if not {"masks", "tar"} & set(fingerprint.get("writers", ())):
        raise UsageError(
            f"{out}: has no masks to read back, expected those of the writer masks or tar: run it again with "
            "--writer masks"
        )
    return fingerprint


class _Folder:
    """Collects the files of the tasks; takes the place of ShardFiles and RunFolder of a run."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, relative: str, data: bytes | Iterable[bytes]) -> None:
        """Write a file with the posix path `relative`. Raises ValueError for one that leads out of the folder."""
        write_bytes_atomically(path_below(self._root, relative), data if isinstance(data, bytes) else b"".join(data))

    def write_part(self, writer: str, data: bytes) -> None:
        """Ignore it: the writers of tasks have no parts."""

    def parts(self, writer: str) -> Iterator[bytes]:
        """No part."""
        return iter(())


@dataclass(frozen=True)
class _Writing:
    """Writes the folder of a review."""

    context: WriterContext
    masks: RunMasks
    writers: tuple[str, ...]
    image_prefix: str

    def write(self, decided: dict[str, str], source: Path) -> dict[str, int]:
        """Write everything; returns the number of images by decision."""
        groups: dict[str, list[Record]] = {name: [] for name in (*DECISIONS, UNDECIDED)}
        left = set(decided)
        labels = self.masks.output / LABELS_FILE
        try:
            with labels.open("rb") as lines:
                for record in map(json.loads, lines):
                    groups[decided.get(record["image"], UNDECIDED)].append(record)
                    left.discard(record["image"])
                    if not 0 <= record["index"] < self.masks.snapshot.images:
                        raise ValueError(f"the index {record['index']}")
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{labels}: got {error!r}, expected the records of the run: start it over") from error
        if left:
            raise UsageError(
                f"{source}: got decisions about {pluralize(len(left), 'image')} without a mask in the run "
                f"({format_examples(sorted(left))}), expected images of {LABELS_FILE}: export the decisions again"
            )
        files = _Folder(self.context.out)
        for name in (REJECT, LATER, UNDECIDED):
            if ids := "".join(f"{line_name(str(record['image']))}\n" for record in groups[name]):
                files.write(f"{'rejected' if name == REJECT else name}.txt", ids.encode(errors="surrogateescape"))
        if groups[ACCEPT]:
            files.write(f"{CORRECTIONS}/classes.txt", "".join(f"{n}\n" for n in self.context.manifest.classes).encode())
        for record in groups[ACCEPT]:
            image = self._labelled(record)
            files.write(f"{CORRECTIONS}/{image.name}.png", image.png)
        self._write_tasks(files, groups[REJECT])
        return {name: len(records) for name, records in groups.items()}

    def _write_tasks(self, files: _Folder, rejected: list[Record]) -> None:
        if not rejected:
            return
        for writer in open_writers(self.writers, self.context, image_prefix=self.image_prefix):
            shards = range(-(-len(rejected) // SHARD_SIZE))
            for shard in shards:
                records = rejected[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]
                writer.write_shard(files, shard, [writer.encode(self._labelled(record)) for record in records])
            writer.finalize(files, len(shards))

    def _labelled(self, record: Record) -> LabelledImage:
        """An image of the run as writers receive it, without what the formats of tasks do not store."""
        name, mask = self.masks.read(int(record["index"]))
        return LabelledImage(
            index=int(record["index"]),
            id=str(record["image"]),
            name=name,
            mask=mask,
            png=encode_palette_png(mask, self.context.manifest.mask_palette()),
            confidence=np.zeros_like(mask),
            record=record,
            probabilities=ClassProbabilities((), np.zeros((0, 1, 1), np.float32)),
        )
