"""`multisa train`: the command line of the training pipeline."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Data set: VOC layout, or photographs with labels.csv.",
)
@click.option("--preset", default="lite0", show_default=True, help="Name of a preset, or a TOML file.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="Image-level labels (CSV or JSON) instead of the data set's own.",
)
@click.option(
    "-o",
    "--output",
    default=Path("runs/multisa"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Run folder; finished stages in it are reused.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value, e.g. cam.schedule.epochs=4.",
)
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
