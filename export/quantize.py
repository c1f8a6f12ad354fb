"""Add fp16 and int8 graphs to a bundle, measured against its fp32 graphs; PyTorch is not needed."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multisa.export.compare import ImageSets, LabelledImage, Variant, compare_variants, on_cpu, read_image_sets
from multisa.export.parity import ParityReport
from multisa.export.precision import ConvertedGraph, Reference, convert_to_fp16, convert_to_int8
from multisa.export.report import (
    INT8_FOR,
    REPORT_NAME,
    GraphFile,
    check_report,
    describe_graphs,
    describe_parity,
    format_table,
    graphs_as_json,
    open_bundle,
    report_of_bundle,
    report_to_bytes,
)
from multisa.runtime.backends.base import CONTRACTS, SEGMENTER, GraphContract, graph_file
from multisa.runtime.backends.onnxruntime import OnnxRuntimeBackend
from multisa.runtime.bundle import Bundle, check_replaceable, write_bundle
from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import ParityError, UsageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import UInt8
from multisa.runtime.progress import Progress, log, pluralize
from multisa.runtime.system import installed_versions
from multisa.training.data import read_working_image, spread

SEARCH_IMAGES = 4  # that each measurement of the sensitivity search runs on
TIMED_IMAGES = 4
REPEATS = 5  # timed runs of each image, after one warm-up
TIMED_THREADS = (1, 2)
# Which graphs each precision has. cam and affinity run once, offline; the segmenter is what gets deployed.
GRAPHS: dict[str, tuple[GraphContract, ...]] = {"fp16": CONTRACTS, "int8": (SEGMENTER,)}
INT8_TARGETS = ("cpu", "tensorrt")
_CHUNK = 4  # calibration images in memory at once


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize a bundle."""

    precisions: tuple[str, ...] = ("fp16",)  # "fp16": all three graphs; "int8": the segmenter
    masks: Path | None = None  # ground truth for a folder of images: PNG masks of the same names
    num_images: int = 128  # most images to compare cam and affinity on; the segmenter gets eight times that
    int8_for: str | None = None  # "cpu" (default): fast on CPUs; "tensorrt": without zero points
    threads: int = 2  # to measure with
    keep: bool = False  # write the bundle even if a figure is beyond its limit
    report: Path | None = None  # also write the parity report here, even if a figure is beyond its limit

    @property
    def symmetric(self) -> bool:
        """Whether int8 has no zero points."""
        return self.int8_for == "tensorrt"

    def check(self) -> None:
        """Raise UsageError for options that contradict each other or are unknown."""
        for precision in self.precisions:
            if precision not in GRAPHS:
                raise UsageError(f"precision: got {precision!r}, expected one of {', '.join(GRAPHS)}")
        if not self.precisions:
            raise UsageError(f"precision: got none, expected one of {', '.join(GRAPHS)}")
        if self.int8_for is None:
            return
        if self.int8_for not in INT8_TARGETS:
            raise UsageError(f"int8_for: got {self.int8_for!r}, expected one of {', '.join(INT8_TARGETS)}")
        if "int8" not in self.precisions:
            raise UsageError(f"--int8-for {self.int8_for}: no int8 graph is made, expected --precision int8 with it")


@dataclass(frozen=True)
class QuantizeResult:
    """A bundle with new graphs, and how they compare with the fp32 ones."""

    bundle: Bundle
    graphs: tuple[GraphFile, ...]  # the new ones
    parity: dict[str, ParityReport]  # by precision or way of running it: "fp16 on onnxruntime-cpu"
    speed: tuple[dict[str, Any], ...]  # int8 beside fp32 on this CPU, see `compare_speed`; empty without int8
    problems: tuple[str, ...]  # figures beyond their limits; empty unless `QuantizeOptions.keep`
    seconds: float

    def describe(self) -> str:
        """Tables of graphs, figures and speed for people, then the folder of the new bundle."""
        parts = [describe_graphs(self.graphs)]
        parts += [describe_parity(title, report) for title, report in self.parity.items()]
        if self.speed:
            header = ("int8 speed", "fp32 ms", "int8 ms", "ratio")
            rows = [
                (pluralize(row["threads"], "thread"), *(f"{row[k]:.2f}" for k in ("fp32_ms", "ms", "ratio")))
                for row in self.speed
            ]
            parts.append(format_table(header, rows, right=header[1:]))
        parts.append(f"time: {self.seconds:.1f} s\nbundle: {self.bundle.path}")
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """JSON values; sizes in bytes, times in seconds unless their key says ms."""
        return {
            "bundle": str(self.bundle.path),
            "passed": not self.problems,
            "problems": list(self.problems),
            "graphs": graphs_as_json(self.graphs),
            "parity": {title: report.full_json() for title, report in self.parity.items()},
            "speed": list(self.speed),
            "seconds": round(self.seconds, 2),
        }


def quantize_bundle(
    bundle: Bundle | str | Path, images: str | Path, output: str | Path, options: QuantizeOptions | None = None
) -> QuantizeResult:
    """Write a bundle to `output` with all files of `bundle` and new graphs in `options.precisions`.

    images: a data set in VOC layout, or a folder of images, to calibrate and compare on. Measurements decide
    which nodes stay in fp32; then every new graph is compared with the fp32 one on ONNX Runtime's CPU. The
    new bundle holds the figures in bundle.json and the whole report in parity.json.

    Raises ParityError, and writes nothing but `options.report`, if a figure is beyond its limit or an int8
    graph for CPUs is not faster than fp32 here, unless `options.keep`. Raises UsageError for options or
    images that do not fit, BundleError for a damaged bundle or an `output` that holds anything but a bundle.
    """
    start = time.perf_counter()
    options = options or QuantizeOptions()
    options = replace(options, precisions=tuple(dict.fromkeys(options.precisions)))
    options.check()
    source = open_bundle(bundle)
    output = Path(output)
    if output.resolve() == source.path.resolve():
        raise UsageError(f"{output}: is the bundle to read, expected another folder for the new one")
    check_replaceable(output)  # before minutes of work
    check_report(options.report, output)
    classes = source.manifest.classes
    sets = read_image_sets(images, classes, num_images=options.num_images, masks=options.masks)
    converted: dict[str, dict[str, ConvertedGraph]] = {}
    graphs: list[GraphFile] = []
    for precision in options.precisions:
        converted[precision], files = _convert(source, precision, sets, options)
        graphs += files
    reports = compare_variants(source, _variants(converted, options), sets, threads=options.threads)
    entries, problems = _report_entries(source, converted, reports, sets, options)
    report = report_of_bundle(source) | entries
    if options.report:
        write_bytes_atomically(options.report, report_to_bytes(report))
    if problems and not options.keep:
        compared = max(each.images for each in reports.values())
        raise ParityError(
            f"the new graphs are not written: {'; '.join(problems)}; compared on "
            f"{pluralize(compared, 'image')}: compare on more with --num-images, leave a precision out, or write the "
            "graphs anyway with --keep"
        )
    for line in problems:
        log.info(f"kept despite: {line}")
    data = {name: source.read_file(name) for name in source.manifest.files}
    for made in converted.values():
        data |= {file: graph.data for file, graph in made.items()}
    data[REPORT_NAME] = report_to_bytes(report)
    manifest = _manifest(source.manifest, entries, converted, options)
    written = write_bundle(output, manifest, data)
    speed = tuple(entries.get("int8", {}).get("speed", {}).get("rows", ()))
    seconds = time.perf_counter() - start
    return QuantizeResult(written, tuple(graphs), reports, speed, tuple(problems), seconds)


def compare_speed(reference: bytes, answer: bytes, contract: GraphContract, images: Sequence[UInt8]) -> dict[str, Any]:
    """Time two graphs in turn on the same images; medians in milliseconds per image, by number of threads."""
    rows = []
    for threads in TIMED_THREADS:
        graphs = (reference, answer)
        backends = [OnnxRuntimeBackend(data, threads=threads, contract=contract) for data in graphs]
        taken: tuple[list[float], list[float]] = ([], [])
        for turn in range(REPEATS + 1):
            for image in images:
                for backend, seconds in zip(backends, taken, strict=True):
                    start = time.perf_counter()
                    backend.run(image[None])
                    if turn:  # the first is warm-up
                        seconds.append(time.perf_counter() - start)
        first, second = (1e3 * statistics.median(seconds) for seconds in taken)
        times = {"fp32_ms": round(first, 2), "ms": round(second, 2), "ratio": round(first / second, 3)}
        rows.append({"threads": threads, **times})
    return {"backend": backends[0].name, "images": len(images), "repeats": REPEATS, "rows": rows}


def _convert(
    bundle: Bundle, precision: str, sets: ImageSets, options: QuantizeOptions
) -> tuple[dict[str, ConvertedGraph], list[GraphFile]]:
    images = _images(bundle, spread(sets.calibration, SEARCH_IMAGES))
    made: dict[str, ConvertedGraph] = {}
    files = []
    with Progress(len(GRAPHS[precision]), precision, "graph") as bar:
        for contract in GRAPHS[precision]:
            start = time.perf_counter()
            data = bundle.read_file(graph_file(contract))
            reference = Reference(data, contract, images, options.threads)
            if precision == "fp16":
                graph = convert_to_fp16(reference)
            else:
                starts = range(0, len(sets.calibration), _CHUNK)
                chunks = (_images(bundle, sets.calibration[first : first + _CHUNK]) for first in starts)
                graph = convert_to_int8(reference, chunks, symmetric=options.symmetric)
            file = graph_file(contract, precision)
            made[file] = graph
            seconds = time.perf_counter() - start
            size = len(graph.data)
            files.append(GraphFile(contract.name, precision, file, size, seconds, graph.fp32_nodes))
            log.info(
                f"{file}: {pluralize(graph.fp32_nodes, 'node')} kept in fp32 after "
                f"{pluralize(len(graph.search.trials), 'trial')}, {graph.search.share:.0%} of the limits used"
            )
            bar.advance(note=contract.name)
    return made, files


def _variants(converted: Mapping[str, Mapping[str, ConvertedGraph]], options: QuantizeOptions) -> list[Variant]:
    found = []
    for precision, graphs in converted.items():
        contracts = GRAPHS[precision]
        by_name = {contract.name: graphs[graph_file(contract, precision)] for contract in contracts}
        ways = {precision: {name: graph.emulated for name, graph in by_name.items()}}
        if precision == "fp16":
            # ONNX Runtime's CPU does not round between fp16 nodes; the emulated graph shows what
            # hardware gives.
            ways["fp16 on onnxruntime-cpu"] = {name: graph.data for name, graph in by_name.items()}
        for title, files in ways.items():
            found.append(Variant(title, precision, contracts, on_cpu(files, options.threads)))
    return found


def _report_entries(
    bundle: Bundle,
    converted: Mapping[str, Mapping[str, ConvertedGraph]],
    reports: Mapping[str, ParityReport],
    sets: ImageSets,
    options: QuantizeOptions,
) -> tuple[dict[str, Any], list[str]]:
    """The entries of parity.json by title, and messages about all figures beyond their limits."""
    entries: dict[str, Any] = {title: report.full_json() for title, report in reports.items()}
    problems = [f"{title}: {line}" for title, report in reports.items() for line in report.problems()]
    for precision, graphs in converted.items():
        entries[precision]["fp32_nodes"] = {file: graph.as_json() for file, graph in graphs.items()}
    if "int8" in converted:
        images = _images(bundle, spread(sets.segmenter, TIMED_IMAGES))
        int8 = converted["int8"][graph_file(SEGMENTER, "int8")].data
        speed = compare_speed(bundle.read_file(graph_file(SEGMENTER)), int8, SEGMENTER, images)
        entries["int8"]["speed"] = speed
        # A CPU cannot tell what TensorRT gains.
        slow = [
            f"int8: {row['ratio']:.2f} times the speed of fp32 with threads={row['threads']}, needed > 1"
            for row in speed["rows"]
            if not row["ratio"] > 1 and not options.symmetric
        ]
        problems += slow
        entries["int8"]["problems"] += slow
        entries["int8"]["passed"] = not entries["int8"]["problems"]
    return entries, problems


def _images(bundle: Bundle, images: Sequence[LabelledImage]) -> list[UInt8]:
    return [read_working_image(image.path, bundle.manifest.parameters.long_side) for image in images]


def _manifest(
    manifest: Manifest,
    entries: Mapping[str, Any],
    converted: Mapping[str, Mapping[str, ConvertedGraph]],
    options: QuantizeOptions,
) -> Manifest:
    metrics = dict(manifest.metrics)
    provenance = dict(manifest.provenance)
    for title, entry in entries.items():
        speed = {"speed": entry["speed"]["rows"]} if "speed" in entry else {}
        metrics[f"parity of {title}"] = entry["figures"] | speed
    for precision, graphs in converted.items():
        kept: dict[str, Any] = {}
        for file, graph in graphs.items():
            too_large = dict.fromkeys(graph.too_large, "touches values too large for fp16")
            kept[file] = {**too_large, **graph.search.kept_json()}
        versions = installed_versions(("multisa", "onnx", "onnxruntime"))
        provenance[f"{precision} graphs"] = {"kept_in_fp32": kept, "versions": versions}
    if "int8" in converted:
        provenance[INT8_FOR] = "tensorrt" if options.symmetric else "cpu"
    return replace(manifest, metrics=metrics, provenance=provenance)
