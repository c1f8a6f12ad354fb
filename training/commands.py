"""`multisa train` and `multisa reproduce`: the command line of the training pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PAPER_ITEMS = ("table1", "table2", "table3", "figure4", "figure5", "figure6")

Command = Callable[..., Any]


def training_options(command: Command) -> Command:
    """Options that identify a run: data set, configuration, output folder."""
    options = [
        click.option(
            "--data",
            required=True,
            metavar="DIR",
            type=click.Path(path_type=Path),
            help="Data set: a folder in VOC layout, or a folder of images with labels.csv and classes.txt.",
        ),
        click.option(
            "--preset", default="lite0", show_default=True, help="Name of a preset, or path of a TOML file."
        ),
        click.option(
            "--labels",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="Image-level labels (CSV or JSON) to use instead of the data set's own.",
        ),
        click.option(
            "-o",
            "--output",
            default=Path("runs/multisa"),
            show_default=True,
            metavar="OUT",
            type=click.Path(path_type=Path),
            help="Run folder. Finished stages in it are reused.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override one value of the preset, e.g. cam.schedule.epochs=4. Repeatable.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@training_options
def train(data: Path, preset: str, labels: Path | None, output: Path, overrides: tuple[str, ...]) -> None:
    """Train every stage from image-level labels.

    Run the same command again to resume an interrupted run. Stages that are already done with the same inputs
    are skipped.

    Example: multisa train --data VOC2012 --preset lite0 -o runs/voc
    """
    from multisa.training import load_config, read_dataset, train

    run = train(load_config(preset, overrides), read_dataset(data, labels), output)
    click.echo(run.format_table())
    click.echo(f"{run.seconds / 60:.0f} minutes in total; details: {output / 'run.json'}")


# more than six parameters: click passes each option as a parameter
@click.command()
@click.argument("what", type=click.Choice(PAPER_ITEMS))
@training_options
@click.option(
    "--num-images",
    type=int,
    metavar="N",
    help="Number of images in a figure, evenly spaced in its list.  [4]",
)
@click.option(
    "--list",
    "image_list",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Show the images of this file in a figure instead: one id per line.",
)
def reproduce(
    what: str,
    data: Path,
    preset: str,
    labels: Path | None,
    output: Path,
    overrides: tuple[str, ...],
    num_images: int | None,
    image_list: Path | None,
) -> None:
    """Reproduce a table or a figure of the paper on any data set, with the paper's numbers beside ours.

    \b
    table1   mIoU of the CAMs with no, one, two, .. self-attentions (trains a network for each)
    table2   mIoU after each stage: CAM, Multi-SA, random walk, dense CRF
    table3   IoU of each class on val, beside the paper's and other methods'
    figure4  CAM of each level, of all levels, and of a network without self-attention
    figure5  CAM before and after the random walk, pseudo-mask without and with dense CRF, ground truth
    figure6  segmentations of val, and ground truth

    Tables need ground-truth masks to measure on. Figures show no ground truth if there is none. Stages that a
    training with the same settings finished in the run folder are reused and missing ones are run. Run the
    same command again to resume. Results are written to reproduce/ in the run folder.

    Example: multisa reproduce table2 --data VOC2012 --preset lite0 -o runs/voc
    """
    from multisa.training import load_config, read_dataset, reproduce_paper

    config = load_config(preset, overrides)
    dataset = read_dataset(data, labels)
    click.echo(reproduce_paper(what, config, dataset, output, num_images=num_images, image_list=image_list))
