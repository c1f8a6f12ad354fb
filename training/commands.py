"""`multisa data`, `train`, `compare`, `runs`, `tune` and `reproduce`: the command line of the training pipeline."""

import importlib.util
import json
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from multisa.runtime.cli.options import PATH, json_option, option, together

if TYPE_CHECKING:
    from multisa.training import Dataset

TRAINING_PACKAGES = ("torch", "timm", "safetensors")
PAPER_ITEMS = ("table1", "table2", "table3", "figure4", "figure5", "figure6")

_path = partial(option, type=PATH, metavar="FILE")
_preset = option("--preset", default="lite0", show_default=True, help="Name of a preset, or path of a TOML file.")
_labels = _path(
    "--labels",
    metavar="PATH",
    help="Labels to use instead of the data set's own: CSV, JSON, or annotations of COCO, CVAT or Label Studio, or a "
    "folder of masks.",
)
_val = _path(
    "--val",
    metavar="PATH",
    help="Images to measure on, which are not trained on: a list of names (.txt), annotations or masks of some images "
    "of DATA, or another folder with images/ and masks/.",
)
_corrections = _path(
    "--corrections",
    multiple=True,
    metavar="PATH",
    help="Masks that people corrected: a folder of ID.png, a CVAT or Label Studio export, or COCO JSON. Repeatable.",
)
_overrides = option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one value of the preset, e.g. cam.schedule.epochs=4. Repeatable.",
)
_data = _path(
    "--data",
    required=True,
    metavar="DIR",
    help="Data set: a folder in VOC's or COCO's layout, or a folder of images with labels.csv and classes.txt.",
)
# The options that identify a run: data set, configuration, output folder.
training_options = together(
    _data,
    _preset,
    _labels,
    _val,
    _corrections,
    _path(
        "-o",
        "--output",
        default=Path("runs/multisa"),
        show_default=True,
        metavar="OUT",
        help="Run folder. Finished stages in it are reused.",
    ),
    _overrides,
)


def _read(
    data: Path, labels: Path | None, val: Path | None, corrections: tuple[Path, ...], *, quiet: bool = False
) -> "Dataset":
    from multisa.training import add_corrections, read_dataset

    return add_corrections(read_dataset(data, labels, val, quiet=quiet), *corrections, quiet=quiet)


@click.group()
def data() -> None:
    """Check a data set before training.

    Example: multisa data check VOC2012
    """


@data.command()
@click.argument("data_set", type=PATH, metavar="DATA")
@_labels
@_val
@_corrections
@_preset
@_overrides
@json_option
def check(data_set: Path, preset: str, overrides: tuple[str, ...], *, as_json: bool, **sources: Any) -> None:
    """Read and decode all of a data set, count what is there, and estimate the training.

    Lists files that cannot be used (exit code 1), everything that no training uses and why, images of each
    class, and images that occur twice. Time and disk are estimated with the networks of the preset, each run
    on a few images, if torch and timm are installed.

    Example: multisa data check VOC2012 --preset lite0
    """
    from multisa.runtime.errors import DatasetError
    from multisa.runtime.progress import log, pluralize
    from multisa.training import check_dataset, load_config

    config = load_config(preset, overrides)
    dataset = _read(data_set, quiet=True, **sources)
    report = check_dataset(dataset)
    has_packages = all(map(importlib.util.find_spec, TRAINING_PACKAGES))
    if not has_packages:
        log.info('the training is not estimated: that needs torch and timm (pip install ".[train]")')
    elif not report.unusable:
        from multisa.training.estimate import estimate_training

        report = replace(report, estimate=estimate_training(config, dataset, report.sizes))
    click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False) if as_json else report.table())
    if report.unusable:
        raise DatasetError(f"{data_set}: {pluralize(len(report.unusable), 'file')} cannot be used, listed above")


@click.command()
@training_options
@option(
    "--devices",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that train together on this machine, one for each GPU; without GPUs they share the CPU cores.",
)
@option(
    "--track",
    metavar="NAMES",
    help="Also send metrics to these, separated by commas: tensorboard, mlflow, wandb. Same as the setting trackers.",
)
@_path("--init-from", metavar="BUNDLE", help="Start from the networks of this bundle, with the same or other classes.")
@option("--discard-edits", is_flag=True, help="Make files of finished stages again that were changed by hand.")
def train(  # more than six parameters: one for each option
    data: Path,
    preset: str,
    output: Path,
    overrides: tuple[str, ...],
    *,
    track: str | None,
    init_from: Path | None,
    devices: int,
    discard_edits: bool,
    **sources: Any,
) -> None:
    """Train every stage from image-level labels.

    Run the same command again to resume an interrupted run, also with another number of devices. Stages that are
    already done with the same inputs are skipped. The page train.html in the run folder shows how far the training is,
    metrics.csv has its figures. With --corrections, the masks of these images replace what the stages would make of
    them.

    Example: multisa train --data VOC2012 --preset lite0 -o runs/voc
    """
    from multisa.training import load_config, train
    from multisa.training.distributed import launch, on_main, process_group, rank

    if track is not None:
        overrides = (*overrides, f"trackers={json.dumps([name.strip() for name in track.split(',')])}")
    config = load_config(preset, overrides)
    if init_from:
        config = replace(config, init_from=str(init_from))
    if devices > 1:
        launch(devices, _arguments(without="devices"))
        return
    with process_group(config.device):
        dataset = on_main(partial(_read, data, **sources))
        run = train(config, dataset, output, discard_edits=discard_edits)
        if rank() > 0:
            return
    click.echo(run.format_table())
    click.echo(run.format_minutes())
    click.echo(f"details: {output / 'run.json'}; curves and sample images: {output / 'train.html'}")
    corrections = [("--corrections", path) for path in sources["corrections"]]
    given = [("--data", data), ("--labels", sources["labels"]), ("--val", sources["val"]), *corrections]
    given.append(("-o", Path("bundles", run.config.name)))
    paths = [part for name, path in given if path for part in (name, str(path))]
    click.echo(f"next: {shlex.join(['multisa', 'export', str(output), *paths])}")


def _arguments(without: str) -> list[str]:
    """The command line of the current command, which has options only, without one of them."""
    ctx = click.get_current_context()
    assert ctx.info_name is not None
    arguments = [ctx.info_name]
    for parameter in ctx.command.params:
        value = ctx.params.get(str(parameter.name))
        if not isinstance(parameter, click.Option) or parameter.name == without or value is None or value is False:
            continue
        for each in value if parameter.multiple else (value,):
            arguments += [parameter.opts[-1]] if parameter.is_flag else [parameter.opts[-1], str(each)]
    return arguments


@click.command()
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN RUN ...")
@json_option
def compare(runs: tuple[Path, ...], *, as_json: bool) -> None:
    """Compare finished runs: settings that differ, time and mIoU of each stage, results.

    Example: multisa compare runs/voc runs/resnet18
    """
    from multisa.training.runs import compare_runs, format_comparison

    found = compare_runs(runs)
    click.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else format_comparison(found))


class _ListByDefault(click.Group):
    """`multisa runs FOLDER` is `multisa runs list FOLDER`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the default command."""
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ListByDefault)
def runs() -> None:
    """List the runs in a folder, or remove what a run no longer uses.

    Example: multisa runs list runs
    """


@runs.command("list")
@click.argument("folder", type=PATH, default=Path("runs"), metavar="[FOLDER]")
@json_option
def list_(folder: Path, *, as_json: bool) -> None:
    """List the runs in a folder (default: runs): state, size on disk, mIoU, date. `multisa runs FOLDER` does the same.

    Example: multisa runs list runs
    """
    from multisa.training.runs import format_runs, list_runs

    entries = list_runs(folder)
    click.echo(json.dumps(entries, indent=2, ensure_ascii=False) if as_json else format_runs(entries))


@runs.command()
@click.argument("run", type=PATH, metavar="RUN")
@option("--yes", is_flag=True, help="Remove without asking.")
def clean(run: Path, *, yes: bool) -> None:
    """Remove the stages of a finished run that its run.json does not use.

    They were made with other settings or other data. A stage that is not finished, or has files that were changed or
    added by hand, is kept.
    Lists what it would remove, and asks.

    Example: multisa runs clean runs/voc
    """
    from multisa.training.runs import describe_unused, remove_stages, run_lock, unused_stages

    with run_lock(run):
        stages = unused_stages(run)
        click.echo(describe_unused(stages))
        if any(not stage.kept_because for stage in stages) and (yes or click.confirm("remove them?")):
            click.echo(f"removed: {remove_stages(stages)}")


@click.command()
@click.argument("run", type=PATH, metavar="RUN")
@_data
@_labels
@_val
@_corrections
@_path("-o", "--output", default=Path("tune.html"), show_default=True, help="The page to write.")
@option(
    "--images",
    "num_images",
    type=click.IntRange(1),
    default=12,
    show_default=True,
    metavar="N",
    help="Number of images to show, evenly spaced in the train list.",
)
@option("--masks", "with_masks", is_flag=True, help="Also compare every score with the masks of the train list.")
def tune(run: Path, data: Path, output: Path, num_images: int, *, with_masks: bool, **sources: Any) -> None:
    """Show how the background score of a finished run was chosen.

    Writes a page with a slider over background scores: the masks of some images at every score, the histogram of the
    scores with the one that Yen's criterion finds, the gains of the classes, and how much the masks change with the
    score. The page is one file and loads nothing.

    Example: multisa tune runs/voc --data VOC2012 -o tune.html
    """
    from multisa.training.tune import write_tune_page

    dataset = _read(data, quiet=True, **sources)
    click.echo(write_tune_page(run, dataset, output, num_images=num_images, with_masks=with_masks))


@click.command()
@click.argument("what", type=click.Choice(PAPER_ITEMS))
@training_options
@option("--num-images", type=int, metavar="N", help="Number of images in a figure, evenly spaced in its list.  [4]")
@_path("--list", "image_list", help="Show the images of this file in a figure instead: one id per line.")
def reproduce(what: str, data: Path, preset: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Reproduce a table or a figure of the paper on any data set, with the paper's numbers beside ours.

    \b
    table1   mIoU of the CAMs with no, one, two, .. self-attentions (trains a network for each)
    table2   mIoU after each stage: CAM, Multi-SA, random walk, dense CRF, rounds
    table3   IoU of each class on val, beside the paper's and other methods'
    figure4  CAM of each level, of all levels, and of a network without self-attention
    figure5  CAM before and after the random walk, pseudo-mask without and with dense CRF, ground truth
    figure6  segmentations of val, and ground truth

    Tables need ground-truth masks to measure on. Figures show no ground truth if there is none. Stages that a
    training with the same settings finished in the run folder are reused and missing ones are run. Run the
    same command again to resume. Results are written to reproduce/ in the run folder.

    Example: multisa reproduce table2 --data VOC2012 --preset lite0 -o runs/voc
    """
    from multisa.training import load_config, reproduce_paper

    config = load_config(preset, overrides)
    dataset = _read(data, *(options.pop(name) for name in ("labels", "val", "corrections")))
    click.echo(reproduce_paper(what, config, dataset, **options))
