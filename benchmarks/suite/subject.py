"""A stage of the suite as a program of its own: `python benchmarks/segmenting.py --data VOC_LAYOUT`."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multisa.benchmarks.harness import results_folder, save_results
from multisa.benchmarks.suite.machine import describe_run
from multisa.benchmarks.suite.setting import Setting, make_setting
from multisa.runtime.bundle import default_bundle_path


def subject_main(
    subject: str, description: str | None, stage: str, measure: Callable[[Setting], list[dict[str, Any]]]
) -> None:
    """Parse the command line, measure, print, write results/SUBJECT.json."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="data set in VOC layout, with masks")
    parser.add_argument("--bundle", type=Path, default=default_bundle_path())
    parser.add_argument("--engine-cache", type=Path, help="folder of TensorRT plans besides the bundle's own")
    parser.add_argument("--engines", default="", help="names separated by commas; all of them else")
    parser.add_argument("--quick", action="store_true", help="fewer photographs, fewer repeats")
    results_folder(parser)
    options = parser.parse_args()
    engines = tuple(name for name in options.engines.split(",") if name)
    with tempfile.TemporaryDirectory() as scratch:
        setting = make_setting(
            options.bundle,
            options.data,
            Path(scratch),
            engines=engines,
            plans=options.plans,
            quick=options.quick,
        )
        described = describe_run(setting)
        save_results(subject, {"environment": described, stage: measure(setting)}, options.results)
