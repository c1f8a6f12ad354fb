"""`multisa export`, `multisa convert`, `multisa parity`: the command line of the exporter."""

from pathlib import Path

import click

# Options of `convert` and `parity`.
_photographs_option = click.option(
    "--photographs",
    required=True,
    type=click.Path(path_type=Path),
    help="Data set in VOC layout, or a folder of photographs: compared on, and calibrated by `convert`.",
)
_masks_option = click.option(
    "--masks",
    type=click.Path(path_type=Path),
    help="Ground truth for a folder of photographs: PNG masks of the same names.",
)
_count_option = click.option(
    "--count",
    default=128,
    show_default=True,
    type=click.IntRange(1),
    help="Photographs to compare cam and affinity on at most; the segmenter on eight times as many.",
)


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
@click.option(
    "--report", type=click.Path(path_type=Path), help="Write the parity report here, too, even if it fails."
)
def export(
    run: Path,
    data: Path,
    labels: Path | None,
    output: Path,
    photographs: int,
    full_weights: bool,
    report: Path | None,
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
        report=report,
    )
    click.echo(describe(bundle))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    "precisions",
    required=True,
    multiple=True,
    type=click.Choice(["fp16", "int8"]),
    help="What to make; can be given twice. fp16: all three graphs, int8: the segmenter.",
)
@_photographs_option
@_masks_option
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new bundle."
)
@_count_option
@click.option(
    "--int8-for",
    type=click.Choice(["cpu", "tensorrt"]),
    help="Unsigned values and zero points for a CPU (the default), signed ones without for TensorRT.",
)
@click.option(
    "--threads", default=2, show_default=True, type=click.IntRange(1), help="Threads to measure with."
)
@click.option("--keep", is_flag=True, help="Write the bundle although a figure is beyond its limit.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="Write the parity report here, too, even if it fails."
)
def convert(
    bundle: Path,
    precisions: tuple[str, ...],
    photographs: Path,
    masks: Path | None,
    output: Path,
    count: int,
    int8_for: str | None,
    threads: int,
    keep: bool,
    report: Path | None,
) -> None:
    """Add fp16 and int8 graphs to BUNDLE, written as a new bundle.

    Which nodes stay in fp32 is measured on the photographs, and the new graphs are compared with the fp32
    ones: a figure beyond its limit, or an int8 graph that is not faster on this CPU, is exit code 3.

    \b
    Example:
      multisa convert bundles/voc --precision fp16 --precision int8 --photographs VOC2012 -o bundles/voc-all
    """
    from multisa.export.convert import Settings, convert_bundle
    from multisa.export.photographs import read_photographs
    from multisa.runtime.bundle import describe, load_bundle
    from multisa.runtime.errors import UsageError

    if int8_for and "int8" not in precisions:
        raise UsageError(f"--int8-for {int8_for}: no int8 graph is made, expected --precision int8 with it")
    loaded = load_bundle(bundle)
    chosen = read_photographs(photographs, loaded.manifest.classes, count=count, masks=masks)
    settings = Settings(tuple(dict.fromkeys(precisions)), threads, int8_for == "tensorrt", keep, report)
    click.echo(describe(convert_bundle(loaded, chosen, output, settings)))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    required=True,
    metavar="NAME",
    # The names of runtime/engines/choice.py, which help does not load.
    help="What is compared: tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime-cpu or openvino.",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["fp32", "bf16", "fp16", "int8"]),
    help="Of its graphs; bf16, of which there is no file, for the segmenter on openvino.",
)
@_photographs_option
@_masks_option
@_count_option
@click.option(
    "--engine-cache",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Look for TensorRT plans here, too: the --cache of `multisa build`.",
)
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Threads of the CPU.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the report here, even if it fails.")
def parity(
    bundle: Path,
    backend: str,
    precision: str,
    photographs: Path,
    masks: Path | None,
    count: int,
    plans: Path | None,
    threads: int,
    report: Path | None,
) -> None:
    """Compare an engine's answers on BUNDLE's graphs with those of the fp32 graphs on ONNX Runtime's CPU.

    A figure beyond the limits of the precision is exit code 3, an engine that cannot run here 5.

    \b
    Example:
      multisa parity bundles/voc-all --backend tensorrt-rtx --precision fp16 --photographs VOC2012
    """
    from multisa.export.compare import compare_engine, describe_figures
    from multisa.export.photographs import read_photographs
    from multisa.export.report import check_report, report_to_bytes
    from multisa.runtime.backends.registry import BackendRequest
    from multisa.runtime.bundle import load_bundle
    from multisa.runtime.files import write_bytes_atomically

    check_report(report, bundle)
    loaded = load_bundle(bundle)
    chosen = read_photographs(photographs, loaded.manifest.classes, count=count, masks=masks, calibrate=False)
    title, found = compare_engine(loaded, BackendRequest(backend, precision, plans), chosen, threads=threads)
    if report:
        write_bytes_atomically(report, report_to_bytes({title: found.full_json()}))
    click.echo(f"{title}\n{describe_figures(found)}")
    found.require(f"{title} answers differently from fp32 on onnxruntime-cpu")
