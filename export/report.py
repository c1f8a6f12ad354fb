"""parity.json: the full report of the parity gate, a file of the bundle beside the graphs it is about."""

import json
from pathlib import Path
from typing import Any

from multisa.runtime.bundle import Bundle, check_replaceable
from multisa.runtime.errors import BundleError, UsageError

REPORT_NAME = "parity.json"
INT8_FOR = "int8_for"  # key of the manifest's provenance: the int8 graphs are for "cpu" or for "tensorrt"


def report_to_bytes(report: dict[str, Any]) -> bytes:
    """Write a report, one entry for each precision or way of running it, as indented JSON."""
    return (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def report_of_bundle(bundle: Bundle) -> dict[str, Any]:
    """Read the report of a bundle; empty for a bundle without one. Raises BundleError for another form."""
    if REPORT_NAME not in bundle.manifest.files:
        return {}
    try:
        report = json.loads(bundle.read_file(REPORT_NAME))
    except ValueError as error:
        raise BundleError(f"{bundle.path / REPORT_NAME}: {error}, expected JSON") from error
    if not isinstance(report, dict):
        raise BundleError(f"{bundle.path / REPORT_NAME}: got {type(report).__name__}, expected an object")
    return report


def check_destinations(output: Path, report: Path | None) -> None:
    """Refuse, before minutes of work, to write a bundle to `output` and a copy of its report to `report`.

    Raises BundleError where `output` is something else than a bundle, UsageError for a report inside it.
    """
    check_replaceable(output)
    check_report(report, output)


def check_report(report: Path | None, bundle: Path) -> None:
    """Raise UsageError for a report inside a bundle's folder, which would be no bundle any more."""
    if report and report.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(
            f"{report}: inside the bundle's folder {bundle}, expected a file elsewhere; a bundle's own "
            f"report is {REPORT_NAME}"
        )
