"""The bundle that plans are built into: a copy of the one given, with fp16 graphs.

python -m multisa.benchmarks.gpu.graphs --photographs photos --output work/bundle --report fp16.json
"""

import argparse
import sys
from pathlib import Path

from multisa.export.quantize import QuantizeOptions, quantize_bundle
from multisa.runtime.bundle import Bundle, default_bundle_path, load_bundle, write_bundle
from multisa.runtime.cpus import usable_cpus
from multisa.runtime.engines.choice import bundle_precisions
from multisa.runtime.engines.contract import CONTRACTS
from multisa.runtime.errors import MultisaError, ParityError

HALF = "fp16"


def make_bundle(bundle: Bundle, output: Path, photographs: Path, count: int, report: Path) -> None:
    """Write `output`: the bundle as it is where it has fp16 graphs, else with them added.

    They are compared on at most `count` photographs, with the figures in `report`. Raises ParityError where
    they answer differently from the fp32 ones; `output` is then a copy without them.
    """
    refused = None
    if any(HALF not in bundle_precisions(bundle, contract) for contract in CONTRACTS):
        options = QuantizeOptions((HALF,), num_images=count, threads=usable_cpus(), report=report)
        try:
            quantize_bundle(bundle, photographs, output, options)
            return
        except ParityError as error:
            refused = error
    write_bundle(output, bundle.manifest, {name: bundle.read_file(name) for name in bundle.manifest.files})
    if refused:
        raise refused


def make_parser() -> argparse.ArgumentParser:
    """The options of `main`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=default_bundle_path())
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32, help="photographs to compare the graphs on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    return parser


def main(arguments: list[str]) -> int:
    """Make it; 3 where the fp16 graphs are refused."""
    options = make_parser().parse_args(arguments)
    try:
        bundle = load_bundle(options.bundle)
        make_bundle(bundle, options.output, options.photographs, options.count, options.report)
    except MultisaError as error:
        print(f"error: {error}")
        return error.exit_code
    print(f"{options.output}: made")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
