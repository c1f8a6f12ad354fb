"""The options of the commands, each defined once; those of `label` and `segment` are a run's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)


def bundle_option(command: Command) -> Command:
    """Which bundle is run."""
    return click.option(
        "--bundle", type=PATH, metavar="DIR", help="Bundle to run; the one in the package by default."
    )(command)


def max_pixels_option(what: str) -> Callable[[Command], Command]:
    """How large `what` may be."""
    return click.option(
        "--max-pixels", type=click.IntRange(1), metavar="N", help=f"Largest {what}; 50 million by default."
    )


def engine_cache_option(command: Command) -> Command:
    """Where plans lie besides those of the bundle."""
    return click.option(
        "--engine-cache",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        metavar="DIR",
        help="Look for TensorRT plans here, too, besides BUNDLE/engines: the --cache of `multisa build`.",
    )(command)


def backend_options(command: Command) -> Command:
    """Which engine runs the graphs, and in which precision."""
    for decorate in (
        engine_cache_option,
        click.option(
            "--precision",
            default="auto",
            show_default=True,
            metavar="P",
            help="Of the graphs: fp32, fp16 or int8, as the bundle has; bf16 for segment on openvino.",
        ),
        click.option(
            "--backend",
            default="auto",
            show_default=True,
            metavar="NAME",
            # The names of runtime/engines/choice.py, which help does not load.
            help="What runs the graphs: tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime-cpu or "
            "openvino; auto takes the first that is there.",
        ),
    ):
        command = decorate(command)
    return command


# Images, results, and what makes them.
_WHAT = (
    click.argument("images"),
    click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="Folder for the results."),
    bundle_option,
    backend_options,
)
# What is written, and how wide the stages are.
_HOW = (
    click.option(
        "--writer",
        "writers",
        multiple=True,
        metavar="NAME",
        # The names of runtime/writers/registry.py, which help does not load.
        help="What to write, repeated or separated by commas: masks (the default), tar, coco, cvat, "
        "label-studio, datumaro, parquet, confidence, probabilities.",
    ),
    click.option(
        "--shard-size",
        type=click.IntRange(1),
        metavar="N",
        help="Images that are committed together; 256 by default.",
    ),
    click.option(
        "--workers", type=click.IntRange(1), metavar="N", help="Threads; one a processor by default."
    ),
    click.option(
        "--readers",
        type=click.IntRange(1),
        metavar="N",
        help="Threads that read; as many as --workers by default, 16 where the images are behind a URL.",
    ),
    click.option(
        "--batch",
        type=click.IntRange(1),
        metavar="N",
        help="Images of one size that an engine gets at once; 1 by default.",
    ),
)
# Failures, and a run that is there already.
_SITTINGS = (
    click.option(
        "--max-failures",
        metavar="N|P%",
        help="Stop, with exit code 4, when more images fail. By default a run goes to its end, and "
        "exits with 4 if any failed.",
    ),
    click.option("--retry-failed", is_flag=True, help="Try the failed images of OUT again."),
    click.option("--overwrite", is_flag=True, help="Remove the run that OUT holds and begin anew."),
    click.option(
        "--skip-source-check", is_flag=True, help="Go on without a look at whether IMAGES have changed."
    ),
    click.option("--verify", is_flag=True, help="Read what is committed, and do again what was altered."),
)
# How large an image may be, and how many are shown.
_BOUNDS = (
    max_pixels_option("image"),
    click.option(
        "--report-images",
        type=click.IntRange(0),
        metavar="N",
        help="Images on OUT/report.html, the most uncertain first; 200 by default, 0: no page.",
    ),
)
# Who does the shards.
_ELSEWHERE = (
    click.option(
        "--num-processes",
        type=click.IntRange(1),
        metavar="N",
        help="Processes side by side; with several GPUs each takes the next one.",
    ),
    click.option("--ray", metavar="ADDRESS", help="Do the shards on a Ray cluster; OUT is shared."),
)
# Who is told.
_TOLD = (
    click.option("--log-json", metavar="FILE", help="Write the log as JSON lines, - for stderr."),
    click.option("--metrics-port", type=click.IntRange(1, 65535), metavar="PORT", help="Prometheus metrics."),
    click.option("--metrics-host", metavar="HOST", help="Where they are served; 127.0.0.1 by default."),
)
# For some sources and formats alone.
_SOURCE = (
    click.option(
        "--storage-options",
        metavar="JSON",
        help='For IMAGES behind a URL, as fsspec takes them: \'{"endpoint_url": "..."}\'.',
    ),
    click.option("--image-prefix", metavar="TEXT", help="What Label Studio finds before an image's path."),
)


def run_options(command: Command) -> Command:
    """The arguments that `label` and `segment` share; `bulk.request.RunRequest` takes them."""
    for decorate in reversed((*_WHAT, *_HOW, *_SITTINGS, *_BOUNDS, *_ELSEWHERE, *_TOLD, *_SOURCE)):
        command = decorate(command)
    return command
