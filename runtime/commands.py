"""The light commands: parse, call the library, print; bodies import what they need, so help stays fast."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from multisa.runtime.bulk import RunOptions, RunSummary
    from multisa.runtime.bundle import Bundle

Command = TypeVar("Command", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)


def _bundle_option(command: Command) -> Command:
    return click.option(
        "--bundle", type=_PATH, metavar="DIR", help="Bundle to run; the one in the package by default."
    )(command)


def _max_pixels_option(what: str) -> Callable[[Command], Command]:
    return click.option(
        "--max-pixels", type=click.IntRange(1), metavar="N", help=f"Largest {what}; 50 million by default."
    )


def _plans_option(command: Command) -> Command:
    return click.option(
        "--plans",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        metavar="DIR",
        help="Look for TensorRT plans here, too, besides BUNDLE/engines: the --cache of `multisa build`.",
    )(command)


def _engine_options(command: Command) -> Command:
    """Which engine runs the graphs, and in which precision."""
    for decorate in (
        _plans_option,
        click.option(
            "--precision",
            default="auto",
            show_default=True,
            metavar="P",
            help="Of the graphs: fp32, fp16 or int8, as the bundle has.",
        ),
        click.option(
            "--engine",
            default="auto",
            show_default=True,
            metavar="NAME",
            # The names of runtime/engines/choice.py, which help does not load.
            help="What runs the graphs: tensorrt, tensorrt-rtx, onnxruntime-cuda or onnxruntime-cpu; "
            "auto takes the first that is there.",
        ),
    ):
        command = decorate(command)
    return command


def _corpus_options(command: Command) -> Command:
    """The arguments `label` and `segment` share."""
    for decorate in reversed(
        (
            click.argument("images", type=_PATH),
            click.option(
                "-o", "--out", type=_PATH, required=True, metavar="OUT", help="Folder for the results."
            ),
            _bundle_option,
            _engine_options,
            click.option(
                "--workers", type=click.IntRange(1), metavar="N", help="Threads; one a processor by default."
            ),
            click.option(
                "--max-failures",
                default="0",
                show_default=True,
                metavar="N|P%",
                help="Images that may fail before the exit code is 4.",
            ),
            _max_pixels_option("image"),
            click.option("--gallery", is_flag=True, help="Also write OUT/index.html to look at."),
        )
    ):
        command = decorate(command)
    return command


@click.command()
@_corpus_options
@click.option("--labels", type=_PATH, metavar="FILE", help="CSV (image,labels) or JSON ({image: [classes]}).")
def label(
    images: Path,
    out: Path,
    labels: Path | None,
    bundle: Path | None,
    engine: str,
    precision: str,
    plans: Path | None,
    workers: int | None,
    max_failures: str,
    max_pixels: int | None,
    gallery: bool,
) -> None:
    """Turn image-level labels into pixel masks, in OUT/masks.

    IMAGES is a folder, searched to its depth, or one image. Classes come from --labels; images without a row
    there are labelled from the classifier's scores.

    \b
    Example:
      multisa label photos -o out --labels labels.csv --gallery
    """
    from multisa.runtime.engines.choice import EngineRequest
    from multisa.runtime.image_labels import read_image_labels
    from multisa.runtime.label import label_images

    options = _run_options(workers, max_pixels, gallery, max_failures)
    loaded = _load_bundle(bundle)
    rows = read_image_labels(labels, loaded.manifest.foreground) if labels else None
    request = EngineRequest(engine, precision, plans)
    summary = label_images(images, out, bundle=loaded, labels=rows, options=options, request=request)
    _report(summary, out, gallery, max_failures)


@click.command()
@_corpus_options
def segment(
    images: Path,
    out: Path,
    bundle: Path | None,
    engine: str,
    precision: str,
    plans: Path | None,
    workers: int | None,
    max_failures: str,
    max_pixels: int | None,
    gallery: bool,
) -> None:
    """Segment images with the trained segmenter, masks in OUT/masks.

    IMAGES is a folder, searched to its depth, or one image.

    \b
    Example:
      multisa segment photos -o out
    """
    from multisa.runtime.engines.choice import EngineRequest
    from multisa.runtime.segment import segment_images

    options = _run_options(workers, max_pixels, gallery, max_failures)
    request = EngineRequest(engine, precision, plans)
    summary = segment_images(images, out, bundle=_load_bundle(bundle), options=options, request=request)
    _report(summary, out, gallery, max_failures)


@click.command()
@click.argument("pred", type=_PATH)
@click.argument("gt", type=_PATH)
@click.option(
    "--classes", type=_PATH, metavar="FILE", help="Names of the classes in the order of ids, one a line."
)
@_bundle_option
@click.option("--list", "names", type=_PATH, metavar="FILE", help="Masks to compare, one name a line.")
@click.option("--allow-missing", is_flag=True, help="Leave out truth without a prediction.")
@_max_pixels_option("mask")
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
    from multisa.runtime.evaluate import evaluate_masks, read_class_names, read_mask_names
    from multisa.runtime.images import MAX_PIXELS

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
@click.argument("bundle", type=_PATH, required=False)
def inspect(bundle: Path | None) -> None:
    """Verify every file of BUNDLE and tell what is in it; the one in the package by default.

    \b
    Example:
      multisa inspect my-bundle
    """
    from multisa.runtime.bundle import describe

    click.echo(describe(_load_bundle(bundle)))


@click.command()
@_bundle_option
@_plans_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(bundle: Path | None, plans: Path | None, as_json: bool) -> None:
    """Tell what this machine can run: versions, processor, kernels, GPUs, and each engine, tried.

    Exits with 1 where the bundle cannot be used, with 5 where no engine can, else with 0.

    \b
    Example:
      multisa doctor
    """
    from multisa.runtime.doctor import describe_diagnosis, examine

    diagnosis = examine(bundle, plans)
    width = max(80, min(120, shutil.get_terminal_size().columns))
    text = json.dumps(diagnosis.to_json(), indent=2) if as_json else describe_diagnosis(diagnosis, width)
    click.echo(text)
    click.get_current_context().exit(diagnosis.exit_code)


@click.command()
@click.option("-o", "--out", type=_PATH, default=Path("demo-out"), show_default=True, metavar="OUT")
@_bundle_option
@_engine_options
def demo(out: Path, bundle: Path | None, engine: str, precision: str, plans: Path | None) -> None:
    """Label and segment the photographs that come with the package and make a page to look at.

    \b
    Example:
      multisa demo
    """
    from multisa.runtime.bulk import describe_summary
    from multisa.runtime.demo import run_demo
    from multisa.runtime.engines.choice import EngineRequest

    summaries = run_demo(out, _load_bundle(bundle), EngineRequest(engine, precision, plans))
    for name, summary in summaries.items():
        click.echo(f"multisa {name}: {describe_summary(summary)}")
    click.echo(f"open {out / 'index.html'} in a browser")


def _run_options(
    workers: int | None, max_pixels: int | None, gallery: bool, max_failures: str
) -> "RunOptions":
    from multisa.runtime.bulk import RunOptions, failure_limit

    failure_limit(max_failures, images=1)  # a misspelt limit is said now, not after the run
    given: dict[str, Any] = {"workers": workers, "max_pixels": max_pixels}
    return RunOptions(gallery=gallery, **{name: value for name, value in given.items() if value is not None})


def _load_bundle(path: Path | None) -> "Bundle":
    from multisa.runtime.bundle import default_bundle_path, load_bundle
    from multisa.runtime.errors import UsageError

    if path and not path.exists():
        raise UsageError(f"{path}: does not exist, expected a bundle folder as `multisa export` writes")
    return load_bundle(path or default_bundle_path())


def _report(summary: "RunSummary", out: Path, gallery: bool, max_failures: str) -> None:
    from multisa.runtime.bulk import check_failures, describe_summary

    click.echo(describe_summary(summary))
    if summary.done:
        click.echo(f"masks: {out / 'masks'}, records: {out / 'labels.jsonl'}")
    if summary.failures:
        click.echo(f"failures: {out / 'failed.jsonl'}")
    if gallery:
        click.echo(f"open {out / 'index.html'} in a browser")
    check_failures(summary, max_failures, out)
