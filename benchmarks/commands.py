"""`multisa bench`: the command line of the suite."""

from pathlib import Path

import click

from multisa.runtime.cli.options import PATH, bundle_option, engine_cache_option


@click.command()
@click.option("--data", type=PATH, required=True, metavar="DATA", help="Data set in VOC layout, with masks.")
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Folder for the report.")
@bundle_option
@engine_cache_option
@click.option(
    "--stages",
    default="segment,label,kernels",
    show_default=True,
    metavar="NAMES",
    help="What to measure, separated by commas.",
)
@click.option(
    "--engines",
    default="",
    metavar="NAMES",
    # The names of benchmarks/suite/contender.py, which help does not load.
    help="Only these: tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime-cpu, openvino, pytorch-eager, "
    "pytorch-channels-last-autocast, pytorch-compile.",
)
@click.option("--quick", is_flag=True, help="Fewer photographs and repeats: minutes, and more noise.")
@click.option("--compare", type=PATH, metavar="FILE", help="Exit with 3 if slower than this bench.json.")
def bench(
    data: Path,
    output: Path,
    bundle: Path | None,
    plans: Path | None,
    stages: str,
    engines: str,
    quick: bool,
    compare: Path | None,
) -> None:
    """Measure every engine on this machine, and PyTorch beside it: speed, memory and mIoU in one report.

    DIR gets bench.json, bench.csv, bench.md and bench.html. PyTorch and the literature's recipe take part
    where torch is installed (pip install ".[bench]").

    \b
    Example:
      multisa bench --data VOC2012 -o bench-out
      multisa bench --data VOC2012 -o bench-new --stages segment --compare bench-out/bench.json
    """
    from multisa.benchmarks.report import read_bench, summary_lines, write_report
    from multisa.benchmarks.suite.compare import check_against
    from multisa.benchmarks.suite.run import BenchRequest, run_suite
    from multisa.runtime.bundle import default_bundle_path

    old = read_bench(compare) if compare else None  # said now, not after the run
    wanted, only = ([name for name in given.split(",") if name] for given in (stages, engines))
    asked = BenchRequest(bundle or default_bundle_path(), data, output, wanted, only, plans, quick)
    result = run_suite(asked, report=lambda bench: write_report(bench, output))
    click.echo("\n".join([*summary_lines(result), f"open {output / 'bench.html'} in a browser"]))
    if old is not None:
        click.echo(check_against(result, old))
