"""`multisa export`: the command line of the exporter."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="The data set: its photographs are compared on.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="The label file that `multisa train` was given.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option(
    "--photographs",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="How many photographs to compare on.",
)
@click.option("--full-weights", is_flag=True, help="Store weights as float32 instead of float16.")
def export(
    run: Path, data: Path, labels: Path | None, output: Path, photographs: int, full_weights: bool
) -> None:
    """Convert the networks of the training run RUN to ONNX and write a bundle.

    Every graph is compared with its PyTorch network; one that answers differently is exit code 3, no bundle.

    Example: multisa export runs/voc --data VOC2012 -o bundles/voc
    """
    from multisa.export.bundle import export_bundle
    from multisa.runtime.bundle import describe
    from multisa.training.data import read_dataset
    from multisa.training.pipeline import load_run

    bundle = export_bundle(
        load_run(run),
        run,
        read_dataset(data, labels),
        output,
        photographs=photographs,
        half_weights=not full_weights,
    )
    click.echo(describe(bundle))
