"""The commands that need no PyTorch: parse, call the library, print.

Each body imports what it needs, so that `--help` stays fast.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from multisa.runtime.cli.options import (
    PATH,
    GroupedCommand,
    backend_options,
    bundle_option,
    engine_cache_option,
    json_option,
    max_pixels_option,
    method_option,
    option,
    output_option,
    run_options,
)

if TYPE_CHECKING:
    from multisa.runtime.api import RunSettings
    from multisa.runtime.bundle import Bundle, LabelMethod
    from multisa.runtime.jobs.record import RunSummary


@click.command(cls=GroupedCommand)
@run_options
@method_option
@option("--labels", type=PATH, metavar="FILE", help="CSV (image,labels) or JSON ({image: [classes]}).")
def label(
    images: tuple[str, ...], output: Path, labels: Path | None, method: "LabelMethod | None", **arguments: Any
) -> None:
    """Turn image-level labels into pixel masks.

    IMAGES is a folder with its subfolders, image files, a glob, a list (.txt), a manifest (.csv, .jsonl,
    .parquet), tar shards or a zip, on this machine or behind a URL. Classes come from --labels or the
    manifest; for images without a row, they are predicted. Run the same command again to resume.

    \b
    Example:
      multisa label photos -o out --labels labels.csv
    """
    from multisa.runtime.api import label_images

    _finish(label_images(images, output, labels, method=method, **_settings(arguments)), arguments)


@click.command(cls=GroupedCommand)
@run_options
def segment(images: tuple[str, ...], output: Path, **arguments: Any) -> None:
    """Segment images with the trained segmenter.

    IMAGES is a folder with its subfolders, image files, a glob, a list (.txt), a manifest (.csv, .jsonl,
    .parquet), tar shards or a zip, on this machine or behind a URL. Run the same command again to resume.

    \b
    Example:
      multisa segment photos -o out
      multisa segment s3://bucket/photos -o out --writer tar,coco
    """
    from multisa.runtime.api import segment_images

    _finish(segment_images(images, output, **_settings(arguments)), arguments)


# more than six parameters: click passes each option as one
@click.command(cls=GroupedCommand)
@click.argument("pred", type=PATH)
@click.argument("gt", type=PATH)
@option("--classes", type=PATH, metavar="FILE", help="Class names in the order of their ids, one per line.")
@bundle_option
@option("--list", "names", type=PATH, metavar="FILE", help="Masks to compare, one name per line.")
@option("--allow-missing", is_flag=True, help="Skip masks without a prediction.")
@option(
    "--ignore-abstained", is_flag=True, help="Leave out pixels that are 255 in PRED; they count as wrong by default."
)
@option("--confusion", is_flag=True, help="Also print the confusion matrix; of many classes, the largest confusions.")
@option("--worst", type=click.IntRange(1), metavar="N", help="Also print the N images with the lowest mIoU.")
@max_pixels_option("mask")
@json_option
def evaluate(
    pred: Path,
    gt: Path,
    classes: Path | None,
    bundle: Path | None,
    names: Path | None,
    allow_missing: bool,
    ignore_abstained: bool,
    confusion: bool,
    worst: int | None,
    max_pixels: int | None,
    as_json: bool,
) -> None:
    """Compare the masks in PRED with the ground truth in GT: IoU per class, mIoU, pixel accuracy.

    Both folders must use the same class ids: those of --classes, or else those of the bundle. Masks painted in
    RGB are read by the colours of the bundle, or those of VOC with --classes.

    \b
    Example:
      multisa evaluate out/masks truth
      multisa evaluate voc-out/masks VOC2012/SegmentationClass --classes voc-classes.txt --list val.txt
    """
    from multisa.runtime.errors import UsageError
    from multisa.runtime.evaluation import evaluate_masks
    from multisa.runtime.imaging.decode import MAX_PIXELS

    if classes and bundle:
        raise UsageError("got both --classes and --bundle, expected one of them")
    manifest = None if classes else _load_bundle(bundle).manifest
    result = evaluate_masks(
        pred,
        gt,
        manifest.classes if manifest else classes,
        names=names,
        palette=manifest.mask_palette() if manifest else None,
        allow_missing=allow_missing,
        ignore_abstained=ignore_abstained,
        worst=worst or 0,
        max_pixels=max_pixels or MAX_PIXELS,
    )
    text = json.dumps(result.to_json(confusion=confusion), indent=2) if as_json else result.table(confusion=confusion)
    click.echo(text)


@click.command(cls=GroupedCommand)
@click.argument("out", type=PATH)
@option("--decisions", type=PATH, required=True, metavar="FILE", help="Decisions that OUT/report.html exported.")
@option("-o", "--output", type=PATH, required=True, metavar="FOLDER", help="New folder for tasks and corrections.")
@bundle_option
@option(
    "--writer", "writers", default="cvat,label-studio", show_default=True, metavar="NAMES", help="Formats of tasks."
)
@option("--image-prefix", metavar="TEXT", help="Prefix of image paths in Label Studio tasks; by default that of OUT.")
def review(out: Path, output: Path, bundle: Path | None, writers: str, **arguments: Any) -> None:
    """Turn decisions about the masks in OUT into annotation tasks and corrections.

    Accepted masks become FOLDER/corrections, for `multisa train --corrections`. Rejected images become tasks for CVAT
    and Label Studio, with their masks to start from. Lists name the images to decide on later, and the undecided ones.

    \b
    Example:
      multisa review out --decisions decisions.json -o review
    """
    from multisa.runtime.review import review_run

    names = [name for name in writers.split(",") if name]
    click.echo(review_run(out, folder=output, bundle=_load_bundle(bundle), writers=names, **arguments).describe())


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=PATH, required=False)
@json_option
def inspect(bundle: Path | None, as_json: bool) -> None:
    """Verify every file of BUNDLE (by default the packaged one) and describe it.

    \b
    Example:
      multisa inspect my-bundle
    """
    from multisa.runtime.bundle import bundle_to_json, describe

    opened = _load_bundle(bundle)
    click.echo(json.dumps(bundle_to_json(opened), indent=2) if as_json else describe(opened))


@click.command(cls=GroupedCommand)
@bundle_option
@engine_cache_option
@json_option
def doctor(bundle: Path | None, engine_cache: Path | None, as_json: bool) -> None:
    """Show what this machine can run: versions, processor, kernels, GPUs, and a test of each backend.

    Exits with 1 if the bundle cannot be used, with 5 if no backend can be used, else with 0.

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


@click.command(cls=GroupedCommand)
@output_option(required=False, default=Path("demo-out"), show_default=True)
@bundle_option
@backend_options
def demo(output: Path, bundle: Path | None, backend: str, precision: str, engine_cache: Path | None) -> None:
    """Label and segment the images that come with the package, and write a page with the results.

    \b
    Example:
      multisa demo
    """
    from multisa.runtime.backends.registry import BackendRequest
    from multisa.runtime.demo import run_demo
    from multisa.runtime.jobs.record import describe_summary

    summaries = run_demo(output, _load_bundle(bundle), BackendRequest(backend, precision, engine_cache))
    for name, summary in summaries.items():
        lines = describe_summary(summary, report_images=0).splitlines()[:-1]  # without what to open
        click.echo("\n".join([f"multisa {name}: {lines[0]}", *lines[1:]]))
    click.echo(f"open {output / 'index.html'} in a browser")


def _settings(arguments: Mapping[str, Any]) -> "RunSettings":
    from multisa.runtime.api import RunSettings

    return RunSettings(**{**arguments, "bundle": _load_bundle(arguments["bundle"])})  # type: ignore[typeddict-item]


def _finish(summary: "RunSummary", arguments: Mapping[str, Any]) -> None:
    """Print the summary of a run; exit with code 4 if images failed."""
    from multisa.runtime.jobs.monitor import check_failures
    from multisa.runtime.jobs.record import describe_summary
    from multisa.runtime.report.report import REPORT_IMAGES

    limit = arguments.get("report_images")
    quiet = bool(click.get_current_context().find_root().params.get("quiet"))
    click.echo(describe_summary(summary, report_images=REPORT_IMAGES if limit is None else limit, quiet=quiet))
    check_failures(summary.failures, summary.images, arguments["max_failures"], summary.job.output)


def _load_bundle(path: Path | None) -> "Bundle":
    from multisa.runtime.bundle import load_bundle
    from multisa.runtime.errors import UsageError

    if path and not path.exists():
        raise UsageError(f"{path}: does not exist, expected a bundle folder written by `multisa export`")
    return load_bundle(path)
