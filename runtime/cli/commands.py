"""The light commands: parse, call the library, print; bodies import what they need, so help stays fast."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from multisa.runtime.cli.options import (
    PATH,
    backend_options,
    bundle_option,
    engine_cache_option,
    max_pixels_option,
    run_options,
)

if TYPE_CHECKING:
    from multisa.runtime.bundle import Bundle


@click.command()
@run_options
@click.option("--labels", type=PATH, metavar="FILE", help="CSV (image,labels) or JSON ({image: [classes]}).")
def label(labels: Path | None, **arguments: Any) -> None:
    """Turn image-level labels into pixel masks.

    IMAGES is a folder, searched to its depth, one image, a glob, a list (.txt), a manifest (.csv, .jsonl,
    .parquet), tar shards or a zip, here or behind a URL. Classes come from --labels or the manifest; images
    without a row there are labelled from the classifier's scores. A run that was cut goes on by the same
    command.

    \b
    Example:
      multisa label photos -o out --labels labels.csv
    """
    _run("label", labels, **arguments)


@click.command()
@run_options
def segment(**arguments: Any) -> None:
    """Segment images with the trained segmenter.

    IMAGES is a folder, searched to its depth, one image, a glob, a list (.txt), a manifest (.csv, .jsonl,
    .parquet), tar shards or a zip, here or behind a URL. A run that was cut goes on by the same command.

    \b
    Example:
      multisa segment photos -o out
      multisa segment s3://bucket/photos -o out --writer tar,coco
    """
    _run("segment", None, **arguments)


@click.command()
@click.argument("pred", type=PATH)
@click.argument("gt", type=PATH)
@click.option(
    "--classes", type=PATH, metavar="FILE", help="Names of the classes in the order of ids, one a line."
)
@bundle_option
@click.option("--list", "names", type=PATH, metavar="FILE", help="Masks to compare, one name a line.")
@click.option("--allow-missing", is_flag=True, help="Leave out truth without a prediction.")
@max_pixels_option("mask")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    pred: Path,
    gt: Path,
    classes: Path | None,
    bundle: Path | None,
    names: Path | None,
    allow_missing: bool,
    max_pixels: int | None,
    as_json: bool,
) -> None:
    """Compare the masks of the folder PRED with those of GT: IoU of each class, mIoU, pixel accuracy.

    Both must hold the ids of the same classes: those of --classes, or else of the bundle.

    \b
    Example:
      multisa evaluate out/masks truth
      multisa evaluate voc-out/masks VOC2012/SegmentationClass --classes voc-classes.txt --list val.txt
    """
    from multisa.runtime.errors import UsageError
    from multisa.runtime.evaluation import evaluate_masks, read_class_names, read_mask_names
    from multisa.runtime.imaging.decode import MAX_PIXELS

    if classes and bundle:
        raise UsageError("got both --classes and --bundle, expected one of them")
    class_names = read_class_names(classes) if classes else _load_bundle(bundle).manifest.classes
    listed = read_mask_names(names) if names else None
    result = evaluate_masks(
        pred,
        gt,
        class_names,
        names=listed,
        allow_missing=allow_missing,
        max_pixels=max_pixels or MAX_PIXELS,
    )
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else result.table())


@click.command()
@click.argument("bundle", type=PATH, required=False)
def inspect(bundle: Path | None) -> None:
    """Verify every file of BUNDLE and tell what is in it; the one in the package by default.

    \b
    Example:
      multisa inspect my-bundle
    """
    from multisa.runtime.bundle import describe

    click.echo(describe(_load_bundle(bundle)))


@click.command()
@bundle_option
@engine_cache_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(bundle: Path | None, engine_cache: Path | None, as_json: bool) -> None:
    """Tell what this machine can run: versions, processor, kernels, GPUs, and each engine, tried.

    Exits with 1 where the bundle cannot be used, with 5 where no engine can, else with 0.

    \b
    Example:
      multisa doctor
    """
    from multisa.runtime.doctor import describe_diagnosis, examine

    diagnosis = examine(bundle, engine_cache)
    width = max(80, min(120, shutil.get_terminal_size().columns))
    text = json.dumps(diagnosis.to_json(), indent=2) if as_json else describe_diagnosis(diagnosis, width)
    click.echo(text)
    click.get_current_context().exit(diagnosis.exit_code)


@click.command()
@click.option("-o", "--output", type=PATH, default=Path("demo-out"), show_default=True, metavar="OUT")
@bundle_option
@backend_options
def demo(output: Path, bundle: Path | None, backend: str, precision: str, engine_cache: Path | None) -> None:
    """Label and segment the images that come with the package and make a page to look at.

    \b
    Example:
      multisa demo
    """
    from multisa.runtime.backends.registry import BackendRequest
    from multisa.runtime.demo import run_demo
    from multisa.runtime.jobs.record import describe_summary

    summaries = run_demo(output, _load_bundle(bundle), BackendRequest(backend, precision, engine_cache))
    for name, summary in summaries.items():
        click.echo(f"multisa {name}: {describe_summary(summary, report_images=0)}")
    click.echo(f"open {output / 'index.html'} in a browser")


def _run(command: str, labels: Path | None, **arguments: Any) -> None:
    from multisa.runtime.jobs.monitor import check_failures, failure_limit
    from multisa.runtime.jobs.record import describe_summary
    from multisa.runtime.jobs.request import RunRequest
    from multisa.runtime.jobs.run import run

    allowed = arguments["max_failures"]
    failure_limit(allowed or "0", images=1)  # a misspelt limit is said now, not after the run
    request = RunRequest.from_arguments(command, _load_bundle(arguments.pop("bundle")).path, arguments)
    summary = run(
        request.job, request.options, request.make_executor, labels=labels, telemetry=request.telemetry()
    )
    click.echo(describe_summary(summary, report_images=request.options.report_images))
    check_failures(summary.failures, summary.images, allowed, request.job.output)


def _load_bundle(path: Path | None) -> "Bundle":
    from multisa.runtime.bundle import default_bundle_path, load_bundle
    from multisa.runtime.errors import UsageError

    if path and not path.exists():
        raise UsageError(f"{path}: does not exist, expected a bundle folder as `multisa export` writes")
    return load_bundle(path or default_bundle_path())
