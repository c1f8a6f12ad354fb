"""`multisa export`, `convert`, `parity` and `build`: parse options, call the library, print the result."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from multisa.runtime.cli.options import FOLDER, PATH, option, together

_path = partial(option, type=PATH, metavar="DIR")
_several = partial(option, multiple=True)
_count = partial(option, type=click.IntRange(1), metavar="N", show_default=True)

_json_option = option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
_result_options = together(
    _path("--report", metavar="FILE", help="Also write the parity report to FILE, even if it fails."), _json_option
)
_image_options = together(
    _path("--images", required=True, help="Data set in VOC layout, or folder of images, to measure on."),
    _path("--masks", help="Ground truth for a folder of images: PNG masks of the same names."),
    _count("--num-images", default=128, help="Most images to compare cam and affinity on; the segmenter gets 8 N."),
    _count("--threads", default=2, help="CPU threads."),
)


@click.command()
@click.argument("run", type=PATH)
@_path("--data", required=True, help="The data set that RUN was trained on.")
@_path("--labels", metavar="PATH", help="The labels given to `multisa train`, if any.")
@_path("--val", metavar="PATH", help="The images to measure on that were given to `multisa train`, if any.")
@_path("--corrections", multiple=True, metavar="PATH", help="The corrections given to `multisa train`. Repeatable.")
@_path("-o", "--output", required=True, help="Folder to write the bundle to.")
@_count("--num-images", default=32, help="Images to compare on.")
@option("--full-weights", is_flag=True, help="Store weights as float32 instead of float16.")
@_several("--notice", "notices", type=PATH, metavar="FILE", help="Add a NOTICE or LICENSE file. Can be repeated.")
@_path("--known-failures", metavar="FILE", help="Markdown for the model card: what the masks get wrong.")
@_result_options
def export(
    run: Path, data: Path, labels: Path | None, val: Path | None, output: Path, *, as_json: bool, **options: Any
) -> None:
    """Export the networks of the training run RUN to ONNX and write a bundle.

    Every graph is compared with its PyTorch network. If a figure is beyond its limit, no bundle is
    written and the exit code is 3. The bundle gets a model card, MODEL_CARD.md, and NOTICE, which names the
    licences of the backbones' weights.

    \b
    Example:
      multisa export runs/voc --data VOC2012 -o bundles/voc
    """
    from multisa.export.bundle import ExportOptions, export_bundle
    from multisa.training import add_corrections, read_dataset

    corrections = options.pop("corrections")
    dataset = add_corrections(read_dataset(data, labels, val, quiet=True), *corrections, quiet=True)
    _print(export_bundle(run, dataset, output, ExportOptions(**options)), as_json)


@click.command()
@click.argument("bundle", type=PATH)
@_several(
    "--precision",
    "precisions",
    required=True,
    type=click.Choice(["fp16", "int8"]),
    help="fp16 converts all three graphs, int8 the segmenter. Can be given twice.",
)
@_image_options
@_path("-o", "--output", required=True, help="Folder to write the new bundle to.")
@option(
    "--int8-for",
    type=click.Choice(["cpu", "tensorrt"]),
    help="cpu (default): unsigned with zero points; tensorrt: signed without.",
)
@option("--keep", is_flag=True, help="Write the bundle even if a figure is beyond its limit.")
@_result_options
def convert(bundle: Path, images: Path, output: Path, *, as_json: bool, **options: Any) -> None:
    """Write a new bundle: BUNDLE with fp16 or int8 graphs added.

    Measurements on the images decide which nodes stay in fp32. Every new graph is compared with the fp32 one.
    If a figure is beyond its limit, or int8 is not faster than fp32 on this CPU, no bundle is written and the
    exit code is 3.

    \b
    Example:
      multisa convert bundles/voc --precision fp16 --precision int8 \\
        --images VOC2012 -o bundles/voc-all
    """
    from multisa.export.quantize import QuantizeOptions, quantize_bundle

    _print(quantize_bundle(bundle, images, output, QuantizeOptions(**options)), as_json)


@click.command()
@click.argument("bundle", type=PATH)
@option(
    "--backend",
    required=True,
    metavar="NAME",
    # The names of the runtime's registry of backends, which help does not load.
    help="What to compare: tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime-cpu or openvino.",
)
@option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["fp32", "bf16", "fp16", "int8"]),
    help="Precision of the graphs; bf16 for the segmenter on openvino.",
)
@_image_options
@_path("--engine-cache", type=FOLDER, help="TensorRT engines built with `multisa build --engine-cache DIR`.")
@_result_options
def parity(bundle: Path, backend: str, images: Path, *, as_json: bool, **options: Any) -> None:
    """Compare BUNDLE's graphs on a backend with its fp32 graphs on ONNX Runtime's CPU.

    The exit code is 3 if a figure is beyond its limit, and 5 if the backend cannot run here.

    \b
    Example:
      multisa parity bundles/voc-all --backend tensorrt-rtx --precision fp16 \\
        --images VOC2012
    """
    from multisa.export.compare import ParityOptions, check_parity

    result = check_parity(bundle, backend, images, ParityOptions(**options))
    _print(result, as_json)
    result.require()


@click.command()
@click.argument("bundle", type=PATH)
@_several(
    "--target",
    "targets",
    required=True,
    metavar="SM[,SM...]",
    help="Compute capabilities of the GPUs: sm89, or sm80,sm86,sm89.",
)
@option("--precision", default="fp32", show_default=True, metavar="fp32|fp16|int8", help="Of the graphs.")
@_several("--graph", "graphs", metavar="NAME", help="cam, affinity or segmenter. Can be repeated; all by default.")
@_several(
    "--profile",
    "profiles",
    metavar="MIN:OPT:MAX",
    help="Image sizes NxHxW: 1x64x64:1x384x512:8x512x512. By default three profiles for one image at a time.",
)
@option(
    "--library",
    default="tensorrt-rtx",
    show_default=True,
    metavar="tensorrt-rtx|tensorrt",
    help="tensorrt-rtx builds without a GPU, tensorrt for the GPU of this machine.",
)
@_path("--engine-cache", help="Folder of the engines; BUNDLE/engines by default.")
@_path("--report", metavar="FILE", help="Also write the JSON object to FILE.")
@_json_option
def build(bundle: Path, report: Path | None, *, as_json: bool, **options: Any) -> None:
    """Build TensorRT engines of BUNDLE's graphs, or find them in the engine cache.

    \b
    Example:
      multisa build bundles/voc --target sm86,sm89
      multisa build bundles/voc --target sm89 --precision fp16 \\
        --profile 1x64x64:1x512x512:4x512x512
    """
    from multisa.export.tensorrt.build import BuildOptions, build_engines
    from multisa.runtime.files import write_json_atomically

    result = build_engines(bundle, BuildOptions(**options))
    _print(result, as_json)
    if report:
        write_json_atomically(report, result.as_json())
    result.raise_failures()


def _print(result: Any, as_json: bool) -> None:
    click.echo(json.dumps(result.as_json(), indent=2, ensure_ascii=False) if as_json else result.describe())
