"""`multisa bench`: the command line of the suite."""

from pathlib import Path
from typing import Any

import click

from multisa.runtime.cli.options import PATH, bundle_option, engine_cache_option

_STAGES = "What to measure, separated by commas."
# The names of benchmarks/suite/candidates.py, which help does not load.
_BACKENDS = (
    "Measure only these: tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime-cpu, openvino, pytorch-eager, "
    "pytorch-channels-last-autocast, pytorch-compile."
)


@click.command()
@click.option("--data", type=PATH, required=True, metavar="DATA", help="Data set in VOC layout, with masks.")
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Folder for the report.")
@bundle_option
@engine_cache_option
@click.option("--stages", default="segment,label,kernels", show_default=True, metavar="NAMES", help=_STAGES)
@click.option("--backends", default="", metavar="NAMES", help=_BACKENDS)
@click.option("--quick", is_flag=True, help="Fewer images and repeats: minutes, and more noise.")
@click.option("--compare", type=PATH, metavar="FILE", help="Exit with 3 if worse than this bench.json.")
def bench(output: Path, stages: str, compare: Path | None, **options: Any) -> None:
    """Measure every backend on this machine, and PyTorch beside it: speed, memory and mIoU.

    DIR gets bench.json and bench.html with figures. PyTorch and the literature's recipe take part where torch
    is installed (pip install ".[bench]").

    \b
    Example:
      multisa bench --data VOC2012 -o bench-out
      multisa bench --data VOC2012 -o bench-new --stages segment --compare bench-out/bench.json
    """
    from multisa.benchmarks.bench_file import read_bench
    from multisa.benchmarks.compare import check_against
    from multisa.benchmarks.report import summary_lines, write_report
    from multisa.benchmarks.run_suite import run_suite
    from multisa.benchmarks.suite.context import BenchRequest
    from multisa.runtime.bundle import default_bundle_path

    old = read_bench(compare) if compare else None  # a wrong file is an error before the run, not after it
    options["bundle"] = options["bundle"] or default_bundle_path()
    options["backends"] = [name for name in options["backends"].split(",") if name]
    names = [name for name in stages.split(",") if name]
    result = run_suite(BenchRequest(**options), output, names, lambda found: write_report(found, output))
    click.echo("\n".join([*summary_lines(result), f"open {output / 'bench.html'} in a browser"]))
    if old is not None:
        click.echo(check_against(result, old))
