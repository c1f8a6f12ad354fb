"""Writes docs/benchmarks.md and the README's summary table from benchmarks/results/*.json.

    python benchmarks/tables.py           # write both
    python benchmarks/tables.py --check   # exit 1 where they are not what the results say

The text is docs/benchmarks.in.md; `{{name}}` in it becomes the table or value of that name.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from multisa.benchmarks import start_up
from multisa.benchmarks.bench_file import number
from multisa.benchmarks.harness import RESULTS
from multisa.runtime.bundle import default_bundle_path
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.training.reproduce.paper import MULTI_SA, TABLE2, TABLE3_MIOU
from multisa.training.thresholds import BACKGROUND_SAMPLE

Row = Mapping[str, Any]
Files = Mapping[str, Any]  # contents of the results files by name
Cells = Sequence[object]

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- results: begin -->"
END = "<!-- results: end -->"
SUBJECTS = (
    "voc-animals", "segmenting", "labelling", "start_up", "pipeline", "crash_recovery", "journal",
    "uncertainty", "random_walk", "dense_crf", "encoding", "cam_head", "precisions", "engines",
)  # fmt: skip
LEAST_AGREEMENT = 0.999  # of labels, PyTorch against the default backend
MIOU_TOLERANCE = 0.1  # percentage points: the bundle's weights are rounded to half precision
# Table 2 of the paper (ResNeSt-101, 21 classes) and its val figure, by the start of our rows' names.
PAPER = {**TABLE2, "DeepLab": TABLE3_MIOU[MULTI_SA]}


def table(head: str, rows: Sequence[Cells]) -> str:
    """A Markdown table; head: titles separated by |; None is a dash."""
    titles = head.split("|")
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join('-' if c is None else str(c) for c in line)} |" for line in lines)


def grid(head: str, rows: Sequence[tuple[Cells, Row]], columns: str) -> str:
    """A table of given cells, then of each row's figures; columns: "title|key/key|format; ..."."""
    specs = [column.split("|") for column in columns.split("; ")]
    lines = [(*cells, *(text(at(row, path), style) for _, path, style in specs)) for cells, row in rows]
    return table("|".join([head, *(title for title, _, _ in specs)]), lines)


def text(value: float | None, style: str) -> str | None:
    """A formatted figure; None stays None."""
    return None if value is None else format(value, style)


def at(row: Row | None, path: str) -> Any:
    """The value at "key/key", None where there is none: quick runs and failed steps leave figures out."""
    found: Any = row
    for key in path.split("/"):
        found = (found or {}).get(key)
    return found


def source(files: Files, name: str) -> str:
    """Link to a results file with the machine, commit and date of its measurement."""
    path = f"benchmarks/results/{name}.json"
    facts = dict.fromkeys(_facts(environment) for environment in _environments(files[name]))
    return f"Source: [{path}](../{path})" + "".join(f"; {fact}" for fact in facts if fact)


def _environments(results: Row) -> Iterator[Row]:
    """Descriptions of the machine: of the whole file, or of each part that was measured by itself."""
    if "processor" in results:
        yield results
    elif "environment" in results:
        yield results["environment"]
    else:
        for part in results.values():
            if isinstance(part, dict) and "environment" in part:
                yield part["environment"]


def _facts(environment: Row) -> str:
    facts = [
        f"{environment['cores']} cores of {environment['processor']}",
        environment["instruction_set"].upper(),
        "quick run" if environment.get("quick") else "",
        f"commit {environment['commit']}" if environment.get("commit") else "",
        str(environment.get("started") or "")[:10],
    ]
    return ", ".join(fact for fact in facts if fact)


def ran(rows: Sequence[Row]) -> list[Row]:
    """The rows without a problem."""
    return [row for row in rows if row["problem"] is None]


def stages(files: Files) -> str:
    """mIoU after each stage of the packaged training."""
    run = files["voc-animals"]
    rows = []
    for row in run["rows"]:
        paper = next((f"{value:.2f}" for name, value in PAPER.items() if row["stage"].startswith(name)), None)
        ious = [text(value, ".1f") for value in row["iou"]]
        rows.append((row["stage"], row["measured_on"], f"**{row['miou']:.2f}**", paper, *ious))
    return table("|".join(["stage|list|mIoU|paper", *run["classes"]]), rows)


def segmenting(files: Files) -> str:
    """Every way to segment that ran, fastest from file to file first."""
    rows = sorted(ran(files["segmenting"]["segment"]), key=lambda row: -float(row["images_per_second"] or 0))
    return grid(
        "backend|precision|images/s, file to file (× eager)|images/s, plain loop (× eager)",
        [((_backend(r), r["precision"], _rate(r, "end_to_end"), _rate(r, "loop")), r) for r in rows],
        "p50 ms|latency_ms/p50|.0f; p90 ms|latency_ms/p90|.0f; p99 ms|latency_ms/p99|.0f; mIoU|miou|.2f; "
        "labels alike|label_agreement|.2%; start-up s|startup_seconds|.1f; peak MiB|peak_mib/host|,.0f; "
        "model bytes|model_bytes|,; of roofline|limit/share|.0%",
    )


def labelling(files: Files) -> str:
    """Every way to label that ran."""
    rows = ran(files["labelling"]["label"])
    return grid(
        "recipe|backend|precision|images/s, file to file",
        [((r["recipe"], _backend(r), r["precision"], f"{r['images_per_second']:.3g}"), r) for r in rows],
        "default is faster by|default_times_as_fast|,.1f; mIoU|miou|.2f; labels alike|label_agreement|.2%; "
        "images|images|d; pixels each|mean_pixels|,; cam ms|stages_ms/cam|,.0f; "
        "affinity ms|stages_ms/affinity|,.0f; walk ms|stages_ms/walk|,.0f; CRF ms|stages_ms/crf|,.0f; "
        "peak MiB|peak_mib/host|,.0f",
    )


def _backend(row: Row) -> str:
    name = f"{row['backend']} on the GPU" if row["device"] == "cuda" else str(row["backend"])
    return f"**{name}** (default)" if row["default"] else name


def _rate(row: Row, key: str) -> str | None:
    """Images per second, the median of the rounds, and the speedup over the baseline."""
    rates = at(row, f"{key}/images_per_second")
    return f"{median(rates):.1f} ({text(at(row, f'{key}/times_baseline'), '.2f')})" if rates else None


def starts(files: Files) -> str:
    """From a command to its first mask."""
    ways = files["start_up"]["ways"].items()
    rows = [(name, f"{way['median_ms'] / 1000:.2f}", f"{way['times_ours']:.1f}") for name, way in ways]
    return table("new process|seconds|× ours", rows)


def runs(files: Files) -> str:
    """Runs over many images."""
    rows: list[tuple[Cells, Row]] = []
    for command in ("segment", "label"):
        run = files["pipeline"][command]
        together = run["images_per_second"] / run["sum_of_stages_images_per_second"]
        peak = list(run["peak_mib"].values())[1]
        rows.append(((f"`multisa {command}`", run["slowest_stage"], f"{together:.2f}", f"{peak:.0f}"), run))
    return grid(
        "command|slowest stage|of all stages together|peak MiB",
        rows,
        "memory against a tenth of the images|memory_ratio|.2f; images|images|,; "
        "images/s|images_per_second|.1f; of the slowest stage alone|efficiency|.2f",
    )


def recovery(files: Files) -> str:
    """Runs that were killed, and the cost of opening a large run."""
    kills = files["crash_recovery"]
    journal = files["journal"]
    read = [1000 * journal["journal_seconds_for_a_million_images"][size] for size in ("256", "1")]
    written = journal["snapshot"]["seconds_to_write_a_million"]
    rows = (
        ("runs killed with SIGKILL at random moments, then resumed", kills["points"]),
        ("... byte-identical to the uninterrupted run", kills["identical"]),
        ("... committed shards that were computed again", kills["recomputed"]),
        (
            f"reading the journal of {journal['images']:,} images, shards of 256",
            f"{read[0]:.3g} ms per million",
        ),
        ("... one image per shard", f"{read[1]:.3g} ms per million"),
        ("writing the list of images", f"{written:.1f} s per million"),
    )
    return table("measurement|result", rows)


def uncertainty(files: Files) -> str:
    """How well uncertainty ranks masks by their error."""
    names = {"by_uncertainty": "uncertainty", "by_1_minus_confidence": "1 - confidence"}
    methods = files["uncertainty"]["methods"].items()
    return grid(
        "masks of|ranked by",
        [((method, name), found[by]) for method, found in methods for by, name in names.items()],
        "correlation with 1 - IoU|spearman_with_1_minus_iou|.2f; "
        "... with wrong pixels|spearman_with_wrong_pixels|.2f; "
        "error of the first tenth, × average|times_the_average|.2f",
    )


def walk(files: Files) -> str:
    """The random walk on one thread, smallest grid."""
    case = files["random_walk"]["comparisons"][0]
    binding = case["roofline"]["binding"]
    roofline = {"median_ms": binding["roofline_ms"], "times_ours": binding["share"]}
    rows = [((name,), way) for name, way in case["ways"].items()]
    return grid(
        f"256 steps, {case['size']} x {case['size']} pixels, {case['channels']} channels",
        [*rows, ((f"roofline: {binding['text']}",), roofline)],
        "ms|median_ms|,.1f; × ours|times_ours|,.2f; largest error against float64|max_error|.0e",
    )


def crf(files: Files) -> str:
    """The dense CRF on one thread."""
    return grid(
        "parameters",
        [((row["parameters"],), row) for row in files["dense_crf"]["comparisons"]],
        "labels|labels|d; present|present|d; multisa ms|ways/multisa/median_ms|.0f; "
        "pydensecrf ms|ways/pydensecrf/median_ms|.0f; speedup|speedup|.1f; "
        "labels alike|argmax_agreement|.4%; of roofline|roofline/share_of_roofline|.0%",
    )


def codecs(files: Files) -> str:
    """PNG, run lengths and JPEG on one thread."""
    rows: list[Cells] = []
    for name, masks in files["encoding"]["masks"].items():
        png = masks["png"]
        size = png["ours"]["bytes_each"] / png["Pillow"]["bytes_each"]
        rows.append((f"masks, {name}: palette PNG", *_codec(png, "ours", "Pillow"), f"{size:.2f}"))
        rows.append((f"masks, {name}: COCO run lengths", *_codec(masks["rle"], "ours", "pycocotools"), None))
    for name, jpeg in files["encoding"]["jpegs"].items():
        rows.append((f"JPEG, {name}: decoding", *_codec(jpeg["decoding"], "ours", "Pillow"), None))
        cells = _codec(jpeg["decoding_and_resizing"], "ours, scaled", "Pillow")
        rows.append((f"JPEG, {name}: decoding and resizing", *cells, None))
    return table("codec|ms each|compared with|speedup|size", rows)


def _codec(ways: Row, ours: str, theirs: str) -> Cells:
    return f"{ways[ours]['ms_each']:.2f}", theirs, f"{ways[theirs]['times_ours']:.1f}"


def folding(files: Files) -> str:
    """What folding gains."""
    rows: list[Cells] = []
    for name, costs in files["cam_head"]["cost"]["networks"].items():
        left = [f"{row['folded_over_unfolded']:.2f}" for row in costs]
        largest = "yes" if costs[-1]["head_is_largest"] else "no"
        head = text(at(files["cam_head"], f"head/networks/{name}/ratio"), ".1f")
        whole = at(files["cam_head"], f"whole/networks/{name}")
        rows.append((name, *left, largest, head, whole and f"{whole['ratio']:.1f} at {whole['size']} pixels"))
    head = "CAM network|multiply-adds left at 512 pixels|... at 1024|head is the largest part at 1024"
    return table(f"{head}|head: × eager|whole graph, 4 scales: × eager", rows)


def memory(files: Files) -> str:
    """Peak memory with attention as one matrix and in blocks."""
    found = files["cam_head"]["memory"]["networks"].items()
    attention = {True: "blocks", False: "one matrix"}
    rows = [((name, attention[row["blocks"]]), row) for name, measured in found for row in measured]
    return grid("cam.onnx|attention", rows, "pixels|size|d; peak MiB|peak_mib|,")


def precisions(files: Files) -> str:
    """Graphs of lower precision against the fp32 ones."""
    rows: list[tuple[Cells, Row]] = []
    for name in ("fp16", "int8"):
        result = files["precisions"][name]
        speeds = [f"{row['ratio']:.2f} ({row['threads']})" for row in at(result, "speed/rows") or ()]
        rows.append(((name, ", ".join(speeds) or None), result["figures"]))
    return grid(
        "precision|× fp32 (threads)",
        rows,
        "labels alike|labels/agreement|.3%; ... of confident pixels|labels/firm_agreement|.3%; "
        "mIoU|labels/miou|.2f; mIoU of fp32|labels/miou_reference|.2f; "
        "pseudo-masks alike|pseudo_mask/agreement|.3%",
    )


def engines(files: Files) -> str:
    """TensorRT engines, and where the library builds none."""
    rows: list[Cells] = []
    for name, entry in files["engines"]["bundles"].items():
        for graph in dict.fromkeys(row["graph"] for row in entry["engines"]):
            of_graph = [row for row in entry["engines"] if row["graph"] == graph]
            built = [row for row in of_graph if "failure" not in row]
            targets = " ".join(row["target"] for row in built)
            failed = " ".join(row["target"] for row in of_graph if "failure" in row) or None
            errors = at(entry, f"graphs/{graph}/onnxruntime_against_eager")
            error = f"{max(errors.values()):.0e}" if errors else "see its parity.json"
            ranges = [_range([row[key] for row in built]) for key in ("megabytes", "build_seconds")]
            rows.append((name, graph, targets, failed, *ranges, error))
    head = "network|graph|built for|not built for|MB|seconds each|largest error of the graph against eager"
    return table(head, rows)


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


TABLES: tuple[Callable[[Files], str], ...] = (
    stages, segmenting, labelling, starts, runs, recovery, uncertainty,
    walk, crf, codecs, folding, memory, precisions, engines,
)  # fmt: skip


def values(files: Files) -> dict[str, str]:
    """The single values of the template."""
    run = files["voc-animals"]
    images = run["images"]
    step = -(-images["train"] // BACKGROUND_SAMPLE)
    gains = zip(run["classes"][1:], run["label"]["class_gain"] or (), strict=False)
    alike = files["encoding"]["labels_alike_with_scaled_decoding"]
    default = next(row for row in ran(files["segmenting"]["segment"]) if row["default"])
    few, *_, many = default.get("cores") or [None, None]
    faster = many["images_per_second"] / few["images_per_second"] if few and many else None
    return {
        "foreground": str(len(run["classes"]) - 1),
        "weak": str(images["weak"]),
        "train": str(images["train"]),
        "val": str(images["val"]),
        "sample": str(len(range(0, images["train"], step))),
        "backbone": run["config"]["cam"]["backbone"],
        "cam_epochs": str(run["config"]["cam"]["schedule"]["epochs"]),
        "segmenter_epochs": str(run["config"]["segmenter"]["schedule"]["epochs"]),
        "threads": str(run["threads"]),
        "minutes": f"{run['seconds'] / 60:.0f}",
        "gains": ", ".join(f"{name} {gain:g}" for name, gain in gains),
        "betas": ", ".join(f"{beta:.3f}" for beta in run["betas"]),
        "scaling": f"{faster:.2f} from {few['cores']} to {many['cores']}" if faster else "not measured",
        "scaled_alike": f"{alike['mean']:.2%}",
        "scaled_images": str(alike["images"]),
        "scaled_enlarged": str(alike["enlarged"]),
    }


def document(files: Files, template: str) -> str:
    """docs/benchmarks.md. Raises KeyError for a name in the template that is neither table nor value."""
    known = {f"table {make.__name__}": make(files) for make in TABLES}
    known |= {f"source {name}": source(files, name) for name in files} | values(files)
    return re.sub(r"\{\{(.+?)\}\}", lambda match: known[match[1]], template)


def summary(files: Files) -> str:
    """The README's table."""
    segment = ran(files["segmenting"]["segment"])
    label = ran(files["labelling"]["label"])
    default, ours = (next(row for row in rows if row["default"]) for rows in (segment, label))
    eager = next(row for row in segment if row["backend"] == "pytorch-eager")
    ways = files["start_up"]["ways"]
    walked = files["random_walk"]["comparisons"][0]
    refined = files["dense_crf"]["comparisons"][0]
    rows = [("`segment`, file to file", default, eager, at(default, "end_to_end/times_baseline"))]
    rows += [
        ("`label`, file to file", ours, row, row.get("default_times_as_fast"))
        for row in label
        if row["recipe"].startswith("PyTorch")
    ]
    eager_start = ways[start_up.EAGER_START]
    rows += [("command to first mask", ways[start_up.OURS], eager_start, eager_start["times_ours"])]
    dense = at(walked, "ways/dense squaring") or {}
    walk_name = f"random walk, {walked['size']} x {walked['size']}; dense squaring on all cores"
    rows += [(walk_name, walked["ways"]["multisa"], dense, dense.get("times_ours"))]
    crf_ways = [{"recipe": name, **refined["ways"][name]} for name in ("multisa", "pydensecrf")]
    rows += [(f"dense CRF, {refined['labels']} labels, one thread", *crf_ways, refined["speedup"])]
    cells = [(name, _speed(a), _speed(b, named=True), text(times, ",.1f")) for name, a, b, times in rows]
    machine = _facts(files["segmenting"]["environment"])
    measured = f"Measured on {machine}. All results: [docs/benchmarks.md](docs/benchmarks.md)."
    return f"{table('what|multisa|compared with|speedup', cells)}\n\n{measured}"


def _speed(row: Row, *, named: bool = False) -> str | None:
    """Images per second or time of a row, with the name of what was measured."""
    rate = row.get("images_per_second")
    milliseconds = row.get("median_ms")
    name = f"{row.get('recipe') or row.get('backend') or 'PyTorch'}, " if named else ""
    if rate is not None:
        return f"{name}{number(rate)} images/s"
    return None if milliseconds is None else f"{name}{number(milliseconds)} ms"


def disagreements(files: Files, manifest_sha256: str) -> list[str]:
    """What shows that the results are not of one training: the run, the suite, the bundle."""
    problems = []
    for name, stage in (("segmenting", "segment"), ("labelling", "label")):
        if files[name]["environment"]["bundle"]["sha256"] != manifest_sha256:
            problems.append(f"{name} was measured with another bundle")
        if not any(row.get("default") for row in ran(files[name][stage])):
            problems.append(f"{name} has no row of the default backend that ran")
    rows = ran(files["segmenting"]["segment"])
    eager = next((row for row in rows if row["backend"] == "pytorch-eager"), {})
    missing = [key for key in ("miou", "label_agreement", "images") if eager.get(key) is None]
    if missing:
        return [*problems, f"segmenting has no {', '.join(missing)} of pytorch-eager"]
    run = files["voc-animals"]
    val = next(row["miou"] for row in run["rows"] if row["measured_on"] == "val")
    # A quick run on fewer images has another mIoU.
    if eager["images"] == run["images"]["val"] and abs(eager["miou"] - val) > MIOU_TOLERANCE:
        problems.append(f"pytorch-eager has mIoU {eager['miou']}, the run's val row {val}")
    if eager["label_agreement"] < LEAST_AGREEMENT:
        agreement = f"{eager['label_agreement']:.4%}"
        problems.append(f"{agreement} of pytorch-eager's labels agree, expected {LEAST_AGREEMENT:.1%}")
    return problems


def with_summary(readme: str, table_text: str) -> str:
    """The README with the table between its markers. Raises ValueError without exactly one pair of them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(
            f"README.md: got no single pair of {BEGIN} and {END}, expected them around the table"
        )
    return f"{before}{BEGIN}\n{table_text}\n{END}{after}"


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT, results: Path = RESULTS) -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 on a difference")
    check = parser.parse_args(arguments).check
    missing = [name for name in SUBJECTS if not (results / f"{name}.json").is_file()]
    if missing:
        print(f"benchmarks/results: {', '.join(missing)} missing; run make bench")
        return 1
    files = {name: json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in SUBJECTS}
    manifest = (default_bundle_path() / MANIFEST_NAME).read_bytes()
    if problems := disagreements(files, hashlib.sha256(manifest).hexdigest()):
        print(f"the results disagree, run make train and make bench: {'; '.join(problems)}")
        return 1
    readme = root / "README.md"
    page = root / "docs" / "benchmarks.md"
    template = (root / "docs" / "benchmarks.in.md").read_text(encoding="utf-8")
    fresh = {page: document(files, template)}
    code = 0
    try:
        fresh[readme] = with_summary(readme.read_text(encoding="utf-8"), summary(files))
    except ValueError as error:
        print(error)
        code = 1
    for path, wanted in fresh.items():
        if not check:
            path.write_text(wanted, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != wanted:
            print(f"{path.name} is not what benchmarks/results say; run python benchmarks/tables.py")
            code = 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
