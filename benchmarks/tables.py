"""Writes docs/benchmarks.md and the README's summary table from benchmarks/results/*.json.

    python benchmarks/tables.py           # write both
    python benchmarks/tables.py --check   # exit 1 where they are not what the results say

The text is docs/benchmarks.in.md; `{{name}}` in it becomes the table or value of that name.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from multisa.benchmarks import start_up
from multisa.benchmarks.bench_file import Row, number
from multisa.benchmarks.harness import make_parser
from multisa.runtime.bundle import default_bundle_path
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.training.reproduce.paper import MULTI_SA, TABLE2, TABLE3_MIOU

Files = Mapping[str, Any]  # contents of the results files by name

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- results: begin -->"
END = "<!-- results: end -->"
SUBJECTS = (
    "voc-animals", "variants", "thresholds", "full_size", "segmenting", "labelling", "start_up", "pipeline",
    "crash_recovery", "kernels", "cam_head", "precisions", "engines",
)  # fmt: skip
# What the name of a PyTorch recipe contains, and the method of `multisa label` that it computes.
LABEL_METHODS = {"segmenter": "segmenter", "sparse walk": "walk"}
EARLIER_BUNDLE = "with an earlier bundle than the packaged one, small images not enlarged"
LEAST_AGREEMENT = 0.999  # of labels, PyTorch against the default backend
OF_A_BUNDLE = {"segmenting": "segment", "labelling": "label"}  # results and the key of their rows
MIOU_TOLERANCE = 0.1  # percentage points: the bundle's weights are rounded to half precision
# Table 2 of the paper (ResNeSt-101, 21 classes) and its val figure, by the names of our rows without background score.
PAPER = {**TABLE2, "DeepLabV3+ on pseudo-masks": TABLE3_MIOU[MULTI_SA]}

# Columns of the tables: "title|key/key|format; ...". `ROWS` has the functions that give the rows.
COLUMNS = {
    "variants": "variant|variant; list|measured_on; mIoU|miou; measured on|processor",
    "thresholds": "classes|name; images|images|d; mIoU by Yen|miou|.2f; ... without gains|miou_without_gains|.2f; "
    "best background score|best_miou|.2f; regret|regret|.2f; best with gains|best_miou_with_gains|.2f; "
    "regret|regret_with_gains|.2f",
    "full_size": "mask|name; mIoU|miou|.2f; edges on the grid|on_grid|.0%",
    "segmenting": "backend|title; precision|precision; images/s, file to file (× eager)|end_to_end/rate; "
    "images/s, plain loop (× eager)|loop/rate; p50 ms|latency_ms/p50|.0f; p90 ms|latency_ms/p90|.0f; "
    "p99 ms|latency_ms/p99|.0f; mIoU|miou|.2f; labels alike|label_agreement|.2%; "
    "start-up s|startup_seconds|.1f; peak MiB|peak_mib/host|,.0f; model bytes|model_bytes|,; "
    "of roofline|limit/share|.0%",
    "labelling": "recipe|recipe; backend|title; precision|precision; "
    "images/s, file to file|images_per_second|.3g; default is faster by|default_times_as_fast|,.1f; "
    "mIoU|miou|.2f; labels alike|label_agreement|.2%; images|images|d; pixels each|mean_pixels|,; "
    "segmenter ms|stages_ms/segmenter|,.0f; cam ms|stages_ms/cam|,.0f; affinity ms|stages_ms/affinity|,.0f; "
    "walk ms|stages_ms/walk|,.0f; CRF ms|stages_ms/crf|,.0f; peak MiB|peak_mib/host|,.0f",
    "starts": "new process|name; ms|median_ms|,.0f; × ours|times_ours|.1f",
    "runs": "command|name; slowest stage|slowest_stage; of all stages together|together|.2f; "
    "peak MiB|peak|.0f; memory against a tenth of the images|memory_ratio|.2f; images|images|,; "
    "images/s|images_per_second|.1f; of the slowest stage alone|efficiency|.2f",
    "recovery": "measurement|name; result|value",
    "walk": "256 steps, 64 x 64 pixels, 4 channels|way; ms|median_ms|,.1f; × ours|times_ours|,.2f; "
    "largest error against float64|max_error|.0e",
    "crf": "image, parameters, labels|size; way|way; ms|median_ms|.0f; × ours|times_ours|.2f; "
    "labels alike|label_agreement|.4%; of roofline|limit/share|.0%",
    "folding": "CAM network|name; multiply-adds left at 512 pixels|0/folded_over_unfolded|.2f; "
    "... at 1024|1/folded_over_unfolded|.2f; head is the largest part at 1024|1/head_is_largest; "
    "head: × eager|head/ratio|.1f; whole graph, 4 scales: × eager|whole/ratio|.1f; "
    "... at pixels|whole/size|d",
    "memory": "cam.onnx|name; attention in blocks|blocks; pixels|size|d; peak MiB|peak_mib|,",
}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is a dash."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join('-' if c is None else str(c) for c in line)} |" for line in lines)


def grid(columns: str, rows: Iterable[Row]) -> str:
    """A table of these columns: "title|key/key|format; ..."."""
    specs = [(*column.split("|"), "")[:3] for column in columns.split("; ")]
    lines = [[text(at(row, path), style) for _, path, style in specs] for row in rows]
    return table([title for title, _, _ in specs], lines)


def text(value: Any, style: str = "") -> str | None:
    """A formatted figure; None stays None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return None if value is None else format(value, style)


def at(row: Any, path: str) -> Any:
    """The value at "key/key", None where there is none: quick runs and failed steps leave figures out."""
    for key in path.split("/"):
        row = row[int(key)] if isinstance(row, list) else (row or {}).get(key)
    return row


def source(files: Files, name: str) -> str:
    """Link to a results file with the machine, commit and date of its measurement."""
    path = f"benchmarks/results/{name}.json"
    facts = dict.fromkeys(_facts(environment) for environment in _environments(files[name]))
    return f"Source: [{path}](../{path})" + "".join(f"; {fact}" for fact in facts if fact)


def _environments(results: Row) -> list[Row]:
    """Descriptions of the machine: of the whole file, or of each part that was measured by itself."""
    if "processor" in results:
        return [results]
    parts = (results, *(part for part in results.values() if isinstance(part, dict)))
    return [part["environment"] for part in parts if "environment" in part]


def _facts(environment: Row) -> str:
    facts = [
        f"{environment['cores']} cores of {environment['processor']}",
        environment["instruction_set"].upper(),
        "quick run" if environment.get("quick") else "",
        f"commit {environment['commit']}" if environment.get("commit") else "",
        str(environment.get("started") or "")[:10],
        EARLIER_BUNDLE if environment.get("earlier_bundle") else "",
    ]
    return ", ".join(fact for fact in facts if fact)


def named(rows: Mapping[str, Any]) -> list[Row]:
    """Rows from a mapping, with the key as "name"; a list of rows under one key becomes several."""
    return [
        {"name": name, **row} for name, value in rows.items() for row in (value if isinstance(value, list) else [value])
    ]


def ran(rows: Sequence[Row]) -> list[Row]:
    """The rows without a problem."""
    return [row for row in rows if row["problem"] is None]


def stages(files: Files) -> str:
    """mIoU after each stage of the packaged training."""
    run = files["voc-animals"]
    rows = []
    for row in run["rows"]:
        paper = text(PAPER.get(row["stage"].partition(" (background")[0]), ".2f")
        ious = [text(value, ".1f") for value in row["iou"]]
        rows.append((row["stage"], row["measured_on"], f"**{row['miou']:.2f}**", paper, *ious))
    return table(("stage", "list", "mIoU", "paper", *run["classes"]), rows)


def _with_titles(rows: Sequence[Row]) -> list[Row]:
    """Rows of the suite that ran, with the backend's title and the rates as text."""
    found: list[Row] = []
    for row in ran(rows):
        title = f"{row['backend']} on the GPU" if row["device"] == "cuda" else str(row["backend"])
        rates = {key: {"rate": _rate(row, key)} for key in ("end_to_end", "loop")}
        found.append({**row, **rates, "title": f"**{title}** (default)" if row["default"] else title})
    return found


def _rate(row: Row, key: str) -> str | None:
    """Images per second, the median of the rounds, and the speedup over the baseline."""
    rates = at(row, f"{key}/images_per_second")
    return f"{median(rates):.1f} ({text(at(row, f'{key}/times_baseline'), '.2f')})" if rates else None


def _runs(files: Files) -> Iterator[Row]:
    for command in ("segment", "label"):
        run = files["pipeline"][command]
        together = run["images_per_second"] / run["sum_of_stages_images_per_second"]
        peak = list(run["peak_mib"].values())[1]
        yield {**run, "name": f"`multisa {command}`", "together": together, "peak": peak}


def _recovery(files: Files) -> list[Row]:
    """Runs that were killed, and the cost of opening a large run."""
    kills = files["crash_recovery"]
    journal = kills["journal"]
    read = journal["seconds_for_a_million_images"]
    lines = f"reading the journal of {journal['images']:,} images, shards of 256"
    rows = {
        "runs killed with SIGKILL at random moments, then resumed": kills["points"],
        "... byte-identical to the uninterrupted run": kills["identical"],
        "... committed shards that were computed again": kills["recomputed"],
        lines: f"{1000 * read['256']:.3g} ms per million",
        "... one image per shard": f"{1000 * read['1']:.3g} ms per million",
    }
    return [{"name": name, "value": value} for name, value in rows.items()]


def _walk(files: Files) -> list[Row]:
    """The random walk on one thread, smallest grid, and its roofline."""
    rows = of_kernel(files, "random walk")
    rows = [row for row in rows if row["size"] == rows[0]["size"]]
    limit = rows[0]["limit"]
    name = f"roofline: {limit['text']}"
    return [*rows, {"way": name, "median_ms": limit["roofline_ms"], "times_ours": limit["share"]}]


def of_kernel(files: Files, kernel: str) -> list[Row]:
    """The rows of one kernel; the first is ours."""
    return [row for row in ran(files["kernels"]["kernels"]) if row["kernel"] == kernel]


def _folding(files: Files) -> Iterator[Row]:
    results = files["cam_head"]
    for name, costs in results["cost"]["networks"].items():
        parts = {part: at(results, f"{part}/networks/{name}") for part in ("head", "whole")}
        yield {"name": name, "0": costs[0], "1": costs[-1], **parts}


def _full_size(files: Files) -> Iterator[Row]:
    results = files["full_size"]
    for name, miou in results["miou"].items():
        yield {"name": name, "miou": miou, "on_grid": results["changes_on_grid"].get(name)}


ROWS: dict[str, Callable[[Files], Iterable[Row]]] = {
    "variants": lambda files: files["variants"]["rows"],
    "thresholds": lambda files: named(files["thresholds"]["thresholds"]),
    "full_size": _full_size,
    "segmenting": lambda files: sorted(
        _with_titles(files["segmenting"]["segment"]), key=lambda row: -float(row["images_per_second"] or 0)
    ),
    "labelling": lambda files: _with_titles(files["labelling"]["label"]),
    "starts": lambda files: named(files["start_up"]["ways"]),
    "runs": _runs,
    "recovery": _recovery,
    "walk": _walk,
    "crf": lambda files: [r for r in of_kernel(files, "dense CRF") if "," not in r["way"]],
    "folding": _folding,
    "memory": lambda files: named(files["cam_head"]["memory"]["networks"]),
}


def values(files: Files) -> dict[str, str]:
    """The computed values of the template."""
    run = files["voc-animals"]
    gains = zip(run["classes"][1:], run["label"]["class_gain"] or (), strict=False)
    default = next(row for row in ran(files["segmenting"]["segment"]) if row["default"])
    few, *_, many = default.get("cores") or [None, None]
    faster = many["images_per_second"] / few["images_per_second"] if few and many else None
    return {
        "foreground": str(len(run["classes"]) - 1),
        "segmented": str(default["images"]),
        "minutes": f"{run['seconds'] / 60:.0f}",
        "gains": ", ".join(f"{name} {gain:g}" for name, gain in gains),
        "betas": ", ".join(f"{beta:.3f}" for beta in run["betas"]),
        "scaling": f"{faster:.2f} from {few['cores']} to {many['cores']}" if faster else "not measured",
    }


def document(files: Files, template: str) -> str:
    """docs/benchmarks.md. Raises KeyError for a name in the template that is neither table nor value."""
    known = {f"table {name}": grid(COLUMNS[name], rows(files)) for name, rows in ROWS.items()}
    known |= {"table stages": stages(files)}
    known |= {f"source {name}": source(files, name) for name in files} | values(files)

    def replacement(match: re.Match[str]) -> str:
        found = at(files, match[1]) if "/" in match[1] else None  # FILE/key/key
        return known[match[1]] if found is None else str(found)

    return re.sub(r"\{\{(.+?)\}\}", replacement, template)


def summary(files: Files) -> str:
    """The README's table."""
    segment = ran(files["segmenting"]["segment"])
    default = next(row for row in segment if row["default"])
    eager = next(row for row in segment if row["backend"] == "pytorch-eager")
    starts = files["start_up"]["ways"]
    start = starts[start_up.EAGER_START]
    rows = [("`segment`, file to file", default, "PyTorch eager", eager, at(default, "end_to_end/times_baseline"))]
    rows += _label_rows(ran(files["labelling"]["label"]))
    rows += [("command to first mask", starts[start_up.OURS], "PyTorch eager", start, start["times_ours"])]
    for kernel, other in (("random walk", "dense squaring"), ("dense CRF", "pydensecrf")):
        mine, *others = of_kernel(files, kernel)
        theirs = next((row for row in others if (row["way"], row["size"]) == (other, mine["size"])), {})
        other += ", all cores" * (theirs.get("threads") == "all")
        rows += [(f"{kernel}, {mine['size']}", mine, other, theirs, theirs.get("times_ours"))]
    cells = [
        (name, _speed(row), ", ".join(filter(None, (other, _speed(theirs)))), times and number(times))
        for name, row, other, theirs, times in rows
    ]
    used = [e for name in ("segmenting", "labelling", "start_up", "kernels") for e in _environments(files[name])]
    measured = f"Measured on {'; '.join(dict.fromkeys(map(_facts, used)))}. All results:"
    lines = table(("what", "multisa", "compared with", "speedup"), cells)
    lines += "\n\nSpeedups are medians of paired measurements, so they can differ from the quotient of the rates."
    return f"{lines}\n\n{measured}\n[docs/benchmarks.md](docs/benchmarks.md)."


def _label_rows(rows: Sequence[Row]) -> Iterator[tuple[str, Row, str, Row, float | None]]:
    """Each method of `label` beside the PyTorch recipe of the same method.

    The dense recipe is left out: it was measured on one small image, which the walk of ours was not.
    """
    for row in rows:
        method = next((m for m in LABEL_METHODS if m in row["recipe"]), None)
        if method is None or not row["recipe"].startswith("PyTorch"):
            continue
        ours = next((r for r in rows if r["recipe"].endswith(f"--method {LABEL_METHODS[method]}")), {})
        times, of_ours = row.get("default_times_as_fast"), ours.get("default_times_as_fast")
        name = f"`label --method {LABEL_METHODS[method]}`, file to file"
        yield name, ours, row["recipe"], row, times / of_ours if times and of_ours else None


def _speed(row: Row) -> str:
    """Images per second or time of a row."""
    if row.get("images_per_second") is not None:
        return f"{number(row['images_per_second'])} images/s"
    return f"{number(row['median_ms'])} ms" if "median_ms" in row else ""


def mark_earlier_bundles(files: Files, manifest_sha256: str) -> None:
    """Note in the environments of the results, in place, that they were measured with another bundle."""
    for name in OF_A_BUNDLE:
        environment = files[name]["environment"]
        environment["earlier_bundle"] = environment["bundle"]["sha256"] != manifest_sha256


def disagreements(files: Files) -> list[str]:
    """What shows that the results are not of one training: the run, the suite."""
    problems = []
    for name, stage in OF_A_BUNDLE.items():
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
    agreement = eager["label_agreement"]
    if agreement < LEAST_AGREEMENT:
        problems.append(f"{agreement:.4%} of pytorch-eager's labels agree, expected {LEAST_AGREEMENT:.1%}")
    return problems


def with_summary(readme: str, table_text: str) -> str:
    """The README with the table between its markers. Raises ValueError without exactly one pair of them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"README.md: got no single pair of {BEGIN} and {END}, expected them around the table")
    return f"{before}{BEGIN}\n{table_text}\n{END}{after}"


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Write or check; returns the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 on a difference")
    options = parser.parse_args(arguments)
    check, results = options.check, options.results
    missing = [name for name in SUBJECTS if not (results / f"{name}.json").is_file()]
    if missing:
        print(f"benchmarks/results: {', '.join(missing)} missing; run make bench")
        return 1
    files = {name: json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in SUBJECTS}
    manifest = (default_bundle_path() / MANIFEST_NAME).read_bytes()
    mark_earlier_bundles(files, hashlib.sha256(manifest).hexdigest())
    if problems := disagreements(files):
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
