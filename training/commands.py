"""`multisa train` and `multisa reproduce`: the command line of the training pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

WHAT = ("table1", "table2", "table3", "figure4", "figure5", "figure6")

Command = Callable[..., Any]


def training_options(command: Command) -> Command:
    """What names a run: data set, configuration, folder."""
    options = [
        click.option(
            "--data",
            required=True,
            type=click.Path(path_type=Path),
            help="Data set: VOC layout, or photographs with labels.csv.",
        ),
        click.option(
            "--preset", default="lite0", show_default=True, help="Name of a preset, or a TOML file."
        ),
        click.option(
            "--labels",
            type=click.Path(path_type=Path),
            help="Image-level labels (CSV or JSON) instead of the data set's own.",
        ),
        click.option(
            "-o",
            "--output",
            default=Path("runs/multisa"),
            show_default=True,
            type=click.Path(path_type=Path),
            help="Run folder; finished stages in it are reused.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change one value, e.g. cam.schedule.epochs=4.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@training_options
def train(data: Path, preset: str, labels: Path | None, output: Path, overrides: tuple[str, ...]) -> None:
    """Train every stage on photographs with image-level labels.

    Stages that are already made from the same inputs are skipped; an interrupted run goes on where it was.

    Example: multisa train --data VOC2012 --preset lite0 -o runs/voc
    """
    from multisa.training.config import load_config
    from multisa.training.data import read_dataset
    from multisa.training.pipeline import RUN_RECORD, format_table, run_pipeline

    config = load_config(preset, overrides)
    run = run_pipeline(config, read_dataset(data, labels), output)
    click.echo(format_table(run))
    click.echo(f"{run.seconds / 60:.0f} minutes in all; details: {output / RUN_RECORD}")


@click.command()
@click.argument("what", type=click.Choice(WHAT))
@training_options
@click.option("--photographs", type=int, help="How many a figure shows, at even distances in its list.  [4]")
@click.option(
    "--list",
    "chosen",
    type=click.Path(path_type=Path),
    help="File of the ids that a figure shows, instead: one a line.",
)
def reproduce(
    what: str,
    data: Path,
    preset: str,
    labels: Path | None,
    output: Path,
    overrides: tuple[str, ...],
    photographs: int | None,
    chosen: Path | None,
) -> None:
    """Make a table or a figure of the paper from any data set, ours beside the paper's.

    \b
    table1   mIoU of the CAMs with no, one, two, .. self-attentions (trains a network for each)
    table2   mIoU after each stage: CAM, Multi-SA, random walk, dense CRF
    table3   IoU of each class on val, beside the paper's and its rivals'
    figure4  CAM of each level, of all together, and of a network without self-attention
    figure5  CAM, after the random walk, pseudo-mask without and with dense CRF, truth
    figure6  segmentations of val, and truth

    Tables need ground-truth masks to measure on; figures leave truth out where there is none. What a training
    with the same settings has made in the run folder is used, what is missing is trained, and an interrupted
    command goes on where it was. Written to reproduce/ in the run folder.

    Example: multisa reproduce table2 --data VOC2012 --preset lite0 -o runs/voc
    """
    from multisa.training.config import load_config
    from multisa.training.data import read_dataset
    from multisa.training.reproduce.command import reproduce_paper

    config = load_config(preset, overrides)
    click.echo(reproduce_paper(what, config, read_dataset(data, labels), output, photographs, chosen))
