"""The functions of `import multisa` that process whole folders. The command line calls them too."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from multisa.runtime.backends.registry import AUTO, BackendRequest
from multisa.runtime.bundle import Bundle, LabelMethod, load_bundle
from multisa.runtime.errors import UsageError
from multisa.runtime.image_labels import LabelMapping
from multisa.runtime.jobs.executors import make_executor
from multisa.runtime.jobs.monitor import failure_limit
from multisa.runtime.jobs.record import RunSummary
from multisa.runtime.jobs.run import run
from multisa.runtime.jobs.spec import RunOptions, make_job
from multisa.runtime.jobs.telemetry import LOCALHOST, Telemetry
from multisa.runtime.progress import console
from multisa.runtime.sources.registry import SEVERAL


class RunSettings(TypedDict, total=False):
    """The keyword arguments of `segment_images` and `label_images`, named like the command-line options.

    All are optional; None stands for the default.
    """

    bundle: Bundle | str | Path | None  # a bundle or its folder; default: the packaged bundle
    backend: str  # what runs the graphs; "auto" takes the first usable one
    precision: str  # "fp32", "fp16", "int8" or "bf16"; "auto": fp32 on a CPU, fp16 on a GPU if available
    min_area: float  # parts of a mask with a smaller share of the image are absorbed; default: the bundle's
    engine_cache: str | Path | None  # folder with TensorRT engines, besides those of the bundle
    writers: str | Sequence[str]  # formats to write: "masks" (default), "tar", "coco", ...
    image_prefix: str  # prefix of image paths in Label Studio tasks
    shard_size: int  # images that are committed together; default: 256
    workers: int  # threads; default: one for each usable CPU
    readers: int  # threads that read; default: as many as workers, 16 for images behind a URL
    batch: int  # images of one size per call of a backend; default: 1
    max_pixels: int  # larger images are failures; default: 50 million
    max_failures: int | str  # stop as soon as more images fail: 3, "3" or "2%"; default: no limit
    retry_failed: bool  # try the failed images of an earlier run again
    overwrite: bool  # remove the run in the output folder and start from scratch
    skip_source_check: bool  # resume without listing the images again
    verify: bool  # hash the committed files again and redo any that changed
    report_images: int  # images on OUT/report.html; default: 200; 0: no page
    num_processes: int  # processes side by side; with several GPUs each takes the next one
    ray: str  # address of a Ray cluster that processes the shards
    storage_options: str | Mapping[str, Any]  # options for fsspec, for images behind a URL
    log_json: str  # file for events as JSON lines; "-": stderr
    metrics_port: int  # serve Prometheus metrics on this port
    metrics_host: str  # address to serve metrics on; default: 127.0.0.1
    progress: bool  # show messages and progress on stderr


_RUN_OPTIONS = {field.name for field in fields(RunOptions)}


def segment_images(
    images: str | Path | Sequence[str | Path], output: str | Path, **settings: Unpack[RunSettings]
) -> RunSummary:
    """Segment images in bulk with the trained segmenter, like `multisa segment`.

    images: a folder, one image, a glob, a list (.txt), a manifest (.csv, .jsonl, .parquet), tar shards or a
    zip, on this machine or behind a URL; or a list of image files.
    output: folder for the results: `masks/NAME.png`, `labels.jsonl`, `report.html`, and `failed.jsonl` if
    images failed.
    settings: bundle, backend, precision, min_area, engine_cache, writers, image_prefix, shard_size, workers,
    readers, batch, max_pixels, max_failures, retry_failed, overwrite, skip_source_check, verify, report_images,
    num_processes, ray, storage_options, log_json, metrics_port, metrics_host, progress.
    `multisa.runtime.api.RunSettings` has their types; `multisa segment --help` describes the options of the same
    names (--writer for `writers`).

    To resume an interrupted run, call the function again with the same arguments. A failed image does not
    stop the run.

    Returns a summary of the run, which counts images and failures. Raises UsageError for invalid arguments
    and for arguments that differ from those of the run in `output`, BundleError for a damaged bundle,
    BackendUnavailable if no backend can run, Interrupted after a signal, and TooManyFailures as soon as more
    images fail than `max_failures` allows.
    """
    return _run("segment", images, output, None, settings)


def label_images(
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    labels: str | Path | LabelMapping | None = None,
    *,
    method: LabelMethod | None = None,
    **settings: Unpack[RunSettings],
) -> RunSummary:
    """Make pseudo-masks in bulk from image-level labels, like `multisa label`.

    images, output, settings, result and errors are those of `segment_images`.
    labels: a CSV (`image,labels`) or JSON file, or a mapping from the path or file name of an image to its
    class names. The classes of images without an entry are predicted.
    method: "segmenter", the trained segmenter restricted to the labels, or "walk", class activation maps and
    random walk; by default the bundle's.
    """
    path = Path(labels) if isinstance(labels, str) else labels
    return _run("label", images, output, path, settings, method)


def _run(
    command: Literal["segment", "label"],
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    labels: Path | LabelMapping | None,
    settings: RunSettings,
    method: LabelMethod | None = None,
) -> RunSummary:
    arguments: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    valid = RunSettings.__annotations__
    if unknown := sorted(set(arguments) - set(valid)):
        raise UsageError(f"got the argument {unknown[0]!r}, expected some of {', '.join(valid)}")
    if labels is not None and not isinstance(labels, (Path, Mapping)):
        raise UsageError(f"labels: got {type(labels).__name__}, expected a file or a mapping {{image: [classes]}}")
    paths = [images] if isinstance(images, (str, Path)) else images
    if not isinstance(paths, (list, tuple)) or not paths or not all(isinstance(path, (str, Path)) for path in paths):
        raise UsageError(f"images: got {type(images).__name__}, expected a path, a pattern, or a list of image files")
    for name, value in arguments.items():
        if valid[name] is int and not isinstance(value, int):
            raise UsageError(f"{name}: got {value!r}, expected an integer")
    if arguments.get("num_processes", 1) < 1:
        raise UsageError(f"num_processes: got {arguments['num_processes']}, expected at least 1")
    if "ray" in arguments and "num_processes" in arguments:
        raise UsageError("got both ray and num_processes, expected one of them")
    options = _options(arguments)
    bundle = arguments.get("bundle")
    cache = Path(arguments["engine_cache"]) if arguments.get("engine_cache") else None
    storage = arguments.get("storage_options")
    job = make_job(
        command,
        SEVERAL.join(map(str, paths)),
        Path(output),
        (bundle if isinstance(bundle, Bundle) else load_bundle(bundle)).path,
        BackendRequest(arguments.get("backend", AUTO), arguments.get("precision", AUTO), cache),
        options,
        storage_options=json.dumps(dict(storage)) if isinstance(storage, Mapping) else storage,
        image_prefix=arguments.get("image_prefix", ""),
        method=method,
        min_area=arguments.get("min_area"),
    )
    executor = partial(make_executor, num_processes=arguments.get("num_processes", 1), ray_address=arguments.get("ray"))
    host = arguments.get("metrics_host", LOCALHOST)
    telemetry = Telemetry(arguments.get("log_json"), arguments.get("metrics_port"), host)
    with console() if arguments.get("progress") else nullcontext():
        return run(job, options, executor, labels=labels, telemetry=telemetry)


def _options(arguments: Mapping[str, Any]) -> RunOptions:
    values = {name: value for name, value in arguments.items() if name in _RUN_OPTIONS}
    if "writers" in values:
        names = [values["writers"]] if isinstance(values["writers"], str) else values["writers"]
        values["writers"] = tuple(part for name in names for part in name.split(",") if part)
        if not values["writers"]:
            del values["writers"]
    if "max_failures" in values:
        values["max_failures"] = str(values["max_failures"])
        failure_limit(values["max_failures"], images=1)  # refuse a misspelt limit now, not after the run
    return RunOptions(**values)
