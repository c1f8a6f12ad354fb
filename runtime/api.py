"""The functions of `import multisa` that work on whole folders; the command line calls them, too."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from multisa.runtime.backends.registry import AUTO, BackendRequest
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.errors import UsageError
from multisa.runtime.jobs.executors import make_executor
from multisa.runtime.jobs.monitor import failure_limit
from multisa.runtime.jobs.record import RunSummary
from multisa.runtime.jobs.run import run
from multisa.runtime.jobs.spec import RunOptions, make_job
from multisa.runtime.jobs.telemetry import LOCALHOST, Telemetry
from multisa.runtime.progress import console

ImageLabelMapping = Mapping[str, Sequence[str]]


class RunSettings(TypedDict, total=False):
    """The keyword arguments of `segment_images` and `label_images`, named as the options of the commands."""

    bundle: Bundle | str | Path | None  # or its folder; the packaged one by default
    backend: str  # what runs the graphs; "auto" takes the first that is usable
    precision: str  # "fp32", "fp16", "int8", "bf16"; "auto" is fp32 on a CPU, fp16 on a GPU that has it
    engine_cache: str | Path | None  # a folder of TensorRT engines besides the bundle's own
    writers: str | Sequence[str]  # what to write: "masks" by default, "tar", "coco", ...
    image_prefix: str  # what Label Studio puts before the path of an image
    shard_size: int  # images that are committed together, 256
    workers: int  # threads; one for each usable CPU
    readers: int  # threads that read; as many as workers, 16 for images behind a URL
    batch: int  # images of one size that a backend gets at once, 1
    max_pixels: int  # larger images are failures, 50 million
    max_failures: int | str  # stop when more images fail: 3, "3" or "2%"
    retry_failed: bool  # try the failed images of an earlier run again
    overwrite: bool  # remove the run that the output folder holds
    skip_source_check: bool  # resume without listing the images again
    verify: bool  # hash what is committed, and redo what was altered
    report_images: int  # images on OUT/report.html, 200; 0 for no page
    num_processes: int  # processes side by side; with several GPUs each takes the next one
    ray: str  # address of a Ray cluster that processes the shards
    storage_options: str | Mapping[str, Any]  # for images behind a URL, as fsspec takes them
    log_json: str  # a file of events as JSON lines; "-" is stderr
    metrics_port: int  # serve Prometheus metrics on this port
    metrics_host: str  # ... of this address, 127.0.0.1
    progress: bool  # show messages and progress on stderr


_OF_THE_OPTIONS = {field.name for field in fields(RunOptions)}


def segment_images(images: str | Path, output: str | Path, **settings: Unpack[RunSettings]) -> RunSummary:
    """Segment images in bulk with the trained segmenter, as `multisa segment` does.

    images: a folder, one image, a glob, a list (.txt), a manifest (.csv, .jsonl, .parquet), tar shards or a
    zip, here or behind a URL. output: the folder for the results: `masks/NAME.png`, `labels.jsonl`,
    `failed.jsonl` where images failed, `report.html`. settings: see `RunSettings`. A run that was interrupted
    resumes when the function is called again with the same arguments.

    Returns what was done, failed images included. Raises UsageError for arguments that cannot be used or
    that differ from those of the run in `output`, BundleError, BackendUnavailable, Interrupted after a
    signal, TooManyFailures once more images fail than `max_failures` allows.
    """
    return _run("segment", images, output, None, settings)


def label_images(
    images: str | Path,
    output: str | Path,
    labels: str | Path | ImageLabelMapping | None = None,
    **settings: Unpack[RunSettings],
) -> RunSummary:
    """Make pseudo-masks in bulk from image-level labels, as `multisa label` does.

    images, output, settings, errors: as for `segment_images`. labels: a CSV (`image,labels`) or JSON file, or
    a mapping from image to class names; images without an entry are labelled from the classifier's scores.
    """
    with ExitStack() as stack:
        path = None
        if isinstance(labels, Mapping):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="multisa-labels-"))
            path = Path(folder, "labels.json")
            # Canonical: a run with the same labels resumes.
            given = {image: list(names) for image, names in labels.items()}
            path.write_text(json.dumps(given, sort_keys=True), encoding="utf-8")
        elif labels is not None:
            path = Path(labels)
        return _run("label", images, output, path, settings)


def _run(
    command: Literal["segment", "label"],
    images: str | Path,
    output: str | Path,
    labels: Path | None,
    settings: RunSettings,
) -> RunSummary:
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    unknown = sorted(set(given) - set(RunSettings.__annotations__))
    if unknown:
        valid = ", ".join(RunSettings.__annotations__)
        raise UsageError(f"got the argument {unknown[0]!r}, expected some of {valid}")
    if "ray" in given and "num_processes" in given:
        raise UsageError("got both --ray and --num-processes, expected one of them")
    options = _options(given)
    bundle = given.get("bundle")
    cache = given.get("engine_cache")
    storage = given.get("storage_options")
    job = make_job(
        command,
        str(images),
        Path(output),
        (bundle if isinstance(bundle, Bundle) else load_bundle(bundle)).path,
        BackendRequest(
            given.get("backend", AUTO), given.get("precision", AUTO), Path(cache) if cache else None
        ),
        options,
        storage_options=json.dumps(dict(storage)) if isinstance(storage, Mapping) else storage,
        image_prefix=given.get("image_prefix", ""),
    )
    executor = partial(
        make_executor, num_processes=given.get("num_processes", 1), ray_address=given.get("ray")
    )
    metrics = given.get("metrics_port"), given.get("metrics_host", LOCALHOST)
    with console() if given.get("progress") else nullcontext():
        return run(
            job, options, executor, labels=labels, telemetry=Telemetry(given.get("log_json"), *metrics)
        )


def _options(given: Mapping[str, Any]) -> RunOptions:
    values = {name: value for name, value in given.items() if name in _OF_THE_OPTIONS}
    if "writers" in values:
        names = [values["writers"]] if isinstance(values["writers"], str) else values["writers"]
        values["writers"] = tuple(part for name in names for part in name.split(",") if part)
        if not values["writers"]:
            del values["writers"]
    if "max_failures" in values:
        values["max_failures"] = str(values["max_failures"])
        failure_limit(values["max_failures"], images=1)  # a misspelt limit is refused now, not after the run
    return RunOptions(**values)
