"""`multisa build`: the command line of the plan builder."""

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=_PATH)
@click.option(
    "--target",
    "targets",
    multiple=True,
    required=True,
    metavar="SM[,SM...]",
    help="Compute capabilities of the GPUs: sm89 or sm80,sm86,sm89.",
)
@click.option(
    "--precision", default="fp32", show_default=True, metavar="fp32|fp16|int8", help="Of the graphs."
)
@click.option(
    "--graph", "graphs", multiple=True, metavar="NAME", help="cam, affinity or segmenter; all by default."
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="MIN:OPT:MAX",
    help="A bucket of sizes NxHxW: 1x64x64:1x384x512:8x512x512; by default three for one photograph at a "
    "time, from the long side.",
)
@click.option(
    "--library",
    default="tensorrt-rtx",
    show_default=True,
    metavar="tensorrt-rtx|tensorrt",
    help="RTX builds without a GPU; TensorRT for the GPU that is here.",
)
@click.option("--cache", type=_PATH, metavar="DIR", help="Where plans are kept; BUNDLE/engines by default.")
@click.option("--json", "json_file", type=_PATH, metavar="FILE", help="Also write what was done as JSON.")
def build(
    bundle: Path,
    targets: tuple[str, ...],
    precision: str,
    graphs: tuple[str, ...],
    profiles: tuple[str, ...],
    library: str,
    cache: Path | None,
    json_file: Path | None,
) -> None:
    """Build TensorRT plans of BUNDLE's graphs, or find them in the cache.

    \b
    Example:
      multisa build bundles/voc --target sm86,sm89
      multisa build bundles/voc --target sm89 --precision fp16 --profile 1x64x64:1x512x512:4x512x512
    """
    from multisa.export.tensorrt.build import BuildOptions, build_plans, describe_report, report_as_json
    from multisa.runtime.bundle import load_bundle
    from multisa.runtime.errors import UsageError
    from multisa.runtime.files import write_json_atomically

    if not bundle.exists():
        raise UsageError(f"{bundle}: does not exist, expected a bundle folder as `multisa export` writes")
    options = BuildOptions(targets, precision, graphs, profiles, library, cache)
    report = build_plans(load_bundle(bundle), options)
    if report.rows:
        click.echo(describe_report(report))
    if json_file:
        write_json_atomically(json_file, report_as_json(report))
    report.raise_failures()
