"""A bundle's fp32 graphs -> fp16 and int8 graphs beside them, in a new bundle; PyTorch is not needed.

`multisa convert BUNDLE --precision fp16 --photographs FOLDER -o NEW_BUNDLE`. The reference of the parity gate
is the bundle's own fp32 graphs on ONNX Runtime.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.export.compare import Variant, compare_variants, on_cpu
from multisa.export.lower import Lowered, half_of, int8_of
from multisa.export.photographs import Photograph, Photographs, spread, working_image
from multisa.export.report import INT8_FOR, REPORT_NAME, check_destinations, report_of_bundle, report_to_bytes
from multisa.runtime.backends.base import CONTRACTS, SEGMENTER, GraphContract, graph_file
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.bundle import Bundle, write_bundle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import ParityError, UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.progress import Progress, log, pluralize
from multisa.runtime.system import installed_versions

UInt8 = npt.NDArray[np.uint8]

SEARCHED = 4  # photographs that each trial of the sensitivity search runs on
TIMED, REPEATS = 4, 5
TIMED_THREADS = (1, 2)
# The graphs that have each form. CAM and affinities are made once, offline; the segmenter is deployed.
GRAPHS: dict[str, tuple[GraphContract, ...]] = {"fp16": CONTRACTS, "int8": (SEGMENTER,)}
_CHUNK = 4


@dataclass(frozen=True)
class Settings:
    """How to convert."""

    precisions: tuple[str, ...]
    threads: int = 2
    symmetric: bool = False  # int8 without zero points, for TensorRT, instead of the form a CPU is fast at
    keep: bool = False  # write the bundle although the gate is closed
    report: Path | None = None  # also write the report here, whether or not the gate is open


def convert_bundle(bundle: Bundle, photographs: Photographs, output: Path, settings: Settings) -> Bundle:
    """Write a bundle with all files of `bundle` and its graphs in `settings.precisions`.

    Raises ParityError, with nothing written but the report, when a graph answers differently from the fp32
    one or an int8 graph is not faster, unless `settings.keep`; what `check_destinations` raises comes first.
    """
    if output.resolve() == bundle.path.resolve():
        raise UsageError(f"{output}: is the bundle that is read, expected another folder for the new one")
    check_destinations(output, settings.report)
    lowered = {
        precision: _lower(bundle, precision, photographs, settings) for precision in settings.precisions
    }
    variants = [
        Variant(
            title,
            precision,
            tuple(map(_contract, graphs)),
            on_cpu({name: pick(graph) for name, graph in graphs.items()}, settings.threads),
        )
        for precision, graphs in lowered.items()
        for title, pick in _ways_of_running(precision)
    ]
    reports = compare_variants(bundle, variants, photographs, threads=settings.threads)
    full: dict[str, Any] = {title: report.full_json() for title, report in reports.items()}
    problems = [f"{title}: {line}" for title, report in reports.items() for line in report.problems()]
    for precision, graphs in lowered.items():
        full[precision]["fp32_nodes"] = {
            graph_file(_contract(name), precision): graph.as_json() for name, graph in graphs.items()
        }
    if "int8" in lowered:
        images = _images(bundle, spread(photographs.segmented, TIMED))
        speed = compare_speed(
            bundle.read_file(graph_file(SEGMENTER)), lowered["int8"][SEGMENTER.name].data, SEGMENTER, images
        )
        full["int8"]["speed"] = speed
        # What TensorRT gains no CPU can tell.
        slow = [
            f"int8: {row['ratio']:.2f} times the speed of fp32 with threads={row['threads']}, needed > 1"
            for row in speed["rows"]
            if not row["ratio"] > 1 and not settings.symmetric
        ]
        problems += slow
        full["int8"]["problems"] += slow
        full["int8"]["passed"] = not full["int8"]["problems"]
    report = report_of_bundle(bundle) | full
    if settings.report:
        write_bytes_atomically(settings.report, report_to_bytes(report))
    if problems and not settings.keep:
        compared = max(report.photographs for report in reports.values())
        raise ParityError(
            f"the converted graphs are not shipped: {'; '.join(problems)}; compared on "
            f"{pluralize(compared, 'photograph')}: give more of them, or keep the graphs all the same by --keep"
        )
    for line in problems:
        log.info(f"kept all the same: {line}")
    files = {name: bundle.read_file(name) for name in bundle.manifest.files}
    for precision, graphs in lowered.items():
        files |= {graph_file(_contract(name), precision): graph.data for name, graph in graphs.items()}
    files[REPORT_NAME] = report_to_bytes(report)
    return write_bundle(output, _manifest(bundle.manifest, full, lowered, settings), files)


def compare_speed(
    reference: bytes, answer: bytes, contract: GraphContract, images: Sequence[UInt8]
) -> dict[str, Any]:
    """Time two graphs in turn on the same photographs; medians of milliseconds for one, by threads."""
    rows = []
    for threads in TIMED_THREADS:
        engines = [
            OnnxRuntimeBackend(data, threads=threads, contract=contract) for data in (reference, answer)
        ]
        taken: tuple[list[float], list[float]] = ([], [])
        for turn in range(REPEATS + 1):
            for image in images:
                for backend, seconds in zip(engines, taken, strict=True):
                    start = time.perf_counter()
                    backend.run(image[None])
                    if turn:  # the first is warm-up
                        seconds.append(time.perf_counter() - start)
        first, second = (1e3 * statistics.median(seconds) for seconds in taken)
        rows.append(
            {
                "threads": threads,
                "fp32_ms": round(first, 2),
                "ms": round(second, 2),
                "ratio": round(first / second, 3),
            }
        )
    return {"engine": engines[0].name, "photographs": len(images), "repeats": REPEATS, "rows": rows}


def _lower(
    bundle: Bundle, precision: str, photographs: Photographs, settings: Settings
) -> dict[str, Lowered]:
    images = _images(bundle, spread(photographs.calibrated, SEARCHED))
    made = {}
    with Progress(len(GRAPHS[precision]), precision, "graph") as bar:
        for contract in GRAPHS[precision]:
            data = bundle.read_file(graph_file(contract))
            if precision == "fp16":
                made[contract.name] = half_of(data, contract, images, threads=settings.threads)
            else:
                chunks = _chunks(bundle, photographs.calibrated)
                made[contract.name] = int8_of(
                    data,
                    contract,
                    images,
                    chunks,
                    symmetric=settings.symmetric,
                    threads=settings.threads,
                )
            choice = made[contract.name].choice
            kept = len(choice.kept) + len(made[contract.name].too_large)
            log.info(
                f"{graph_file(contract, precision)}: {kept} nodes "
                f"kept in fp32 after {len(choice.trials)} trials, {choice.share:.0%} of the limits used"
            )
            bar.advance(note=contract.name)
    return made


def _ways_of_running(precision: str) -> tuple[tuple[str, Callable[[Lowered], bytes]], ...]:
    if precision == "fp16":
        # ONNX Runtime's CPU does not round between fp16 nodes; the gate is to see what others answer.
        return ("fp16", lambda graph: graph.measured), ("fp16 on onnxruntime-cpu", lambda graph: graph.data)
    return ((precision, lambda graph: graph.data),)


def _images(bundle: Bundle, photographs: Sequence[Photograph]) -> list[UInt8]:
    return [working_image(photograph, bundle.manifest.parameters.long_side) for photograph in photographs]


def _chunks(bundle: Bundle, photographs: Sequence[Photograph]) -> Iterator[list[UInt8]]:
    for start in range(0, len(photographs), _CHUNK):
        yield _images(bundle, photographs[start : start + _CHUNK])


def _contract(name: str) -> GraphContract:
    return next(contract for contract in CONTRACTS if contract.name == name)


def _manifest(
    manifest: Manifest, full: dict[str, Any], lowered: dict[str, dict[str, Lowered]], settings: Settings
) -> Manifest:
    metrics, provenance = dict(manifest.metrics), dict(manifest.provenance)
    for title, entry in full.items():
        metrics[f"parity of {title}"] = entry["figures"] | (
            {"speed": entry["speed"]["rows"]} if "speed" in entry else {}
        )
    for precision, graphs in lowered.items():
        provenance[f"{precision} graphs"] = {
            "kept_in_fp32": {
                graph_file(_contract(name), precision): {
                    **dict.fromkeys(graph.too_large, "touches values too large for fp16"),
                    **graph.choice.kept_json(),
                }
                for name, graph in graphs.items()
            },
            "versions": installed_versions(("multisa", "onnx", "onnxruntime")),
        }
    if "int8" in lowered:
        provenance[INT8_FOR] = "tensorrt" if settings.symmetric else "cpu"
    return replace(manifest, metrics=metrics, provenance=provenance)
