"""Write the README's results section from the results files, or say that it disagrees with them.

python benchmarks/readme_results.py           # rewrite README.md
python benchmarks/readme_results.py --check   # exit 1 when README.md is out of date
"""

import hashlib
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from multisa.benchmarks import readme_bench, readme_graphs
from multisa.benchmarks.readme_runs import runs
from multisa.training.reproduce.paper import MULTI_SA, TABLE2, TABLE3_MIOU

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUNDLE = ROOT / "runtime" / "bundles" / "voc-animals" / "bundle.json"
BACKGROUND_SAMPLE = 128  # as in training/calibration.py, which is not imported: it needs torch
LEAST_AGREEMENT = 0.999  # of labels, PyTorch against the engine
MIOU_TOLERANCE = 0.1  # percent: the bundle's weights are rounded to half precision
START, STOP = "<!-- results: written by benchmarks/readme_results.py -->", "<!-- end of results -->"
# Table 2 of the paper (ResNeSt-101, 21 classes) and its val figure, by the start of our rows' names.
PAPER = {**TABLE2, "DeepLab": TABLE3_MIOU[MULTI_SA]}


def results_section(
    run: dict[str, Any],
    bench: list[dict[str, Any]],
    kernels: list[dict[str, Any]],
    of_runs: list[dict[str, Any]],
    graphs: list[dict[str, Any]],
) -> str:
    """Markdown of all results files.

    bench: segmenting, labelling, start-up; kernels: the walk, the CRF, the codecs; of_runs: as
    `readme_runs.runs` takes them; graphs: CAM head, precisions, plans.
    """
    classes = run["classes"]
    lines = [
        f"| stage | list | mIoU | paper | {' | '.join(classes)} |",
        f"|{'---|' * (len(classes) + 4)}",
    ]
    for row in run["rows"]:
        paper = next((f"{value:.2f}" for name, value in PAPER.items() if row["stage"].startswith(name)), "")
        ious = " | ".join("-" if value is None else f"{value:.1f}" for value in row["iou"])
        cells = [row["stage"], row["measured_on"], f"**{row['miou']:.2f}**", paper, ious]
        lines.append(f"| {' | '.join(cells)} |")
    head, precisions, plans = graphs
    walk, crf, codecs = kernels
    passages = (
        _conditions(run),
        readme_bench.segmenting(bench[0]),
        _paragraph(*readme_bench.segmenting_conditions(bench[0])),
        readme_bench.labelling(bench[1]),
        _paragraph(*readme_bench.labelling_conditions(bench[1]), *readme_bench.start_up(bench[2])),
        _paragraph(*runs(*of_runs)),
        _kernels(walk, crf),
        _codecs(codecs),
        _paragraph(*readme_graphs.head(head)),
        _paragraph(*readme_graphs.precisions(precisions)),
        readme_graphs.plans(plans),
    )
    return "\n\n".join(["\n".join(lines), *passages])


def _conditions(run: dict[str, Any]) -> str:
    cam, segmenter, photographs = run["config"]["cam"], run["config"]["segmenter"], run["photographs"]
    return _paragraph(
        f"Measured on {len(run['classes']) - 1} classes of PASCAL VOC 2012 and background:",
        f"{photographs['weak']} photographs with image-level labels to train on; {photographs['train']} of",
        "them have masks, on which the pseudo-masks are measured (image-level labels given);",
        f"{photographs['val']} other photographs measure the segmenter and choose nothing.",
        f"Backbone {cam['backbone']}, {cam['schedule']['epochs']} epochs for each CAM network and",
        f"{segmenter['schedule']['epochs']} for DeepLabV3+, {run['threads']} CPU cores,",
        f"{run['seconds'] / 60:.0f} minutes for all stages.",
        "Down to the random walk each row is at the one background score with the highest mIoU on the train",
        "list, as in the paper; below it the score is chosen by the masks after the CRF, on",
        f"{_sample(photographs['train'])}. The paper's figures (ResNeSt-101, 21 classes) stand beside for",
        "their order, not for comparison.",
        *_gains(run),
        f"Learned betas: {', '.join(f'{beta:.3f}' for beta in run['betas'])}.",
        "[benchmarks/results/voc-animals.json](benchmarks/results/voc-animals.json)",
    )


def _sample(train: int) -> str:
    if train <= BACKGROUND_SAMPLE:
        return f"those {train} photographs"
    return f"a sample of {len(range(0, train, -(-train // BACKGROUND_SAMPLE)))} of those {train} photographs"


def _gains(run: dict[str, Any]) -> list[str]:
    gains = run["label"]["class_gain"]
    if not gains:
        return []
    named = ", ".join(f"{name} {gain:g}" for name, gain in zip(run["classes"][1:], gains, strict=True))
    return [
        "The gains, a step the paper does not have, are chosen on the same masks:",
        f"{named}. DeepLabV3+ learns from the masks with gains.",
    ]


def _kernels(walk: dict[str, Any], crf: dict[str, Any]) -> str:
    grid = walk["comparisons"][0]
    ways = grid["ways"]
    ours, dense, scipy = ways["multisa"], ways["dense squaring"], ways["scipy, Chebyshev"]
    flushed = ways["dense squaring, denormals flushed"]
    rows = crf["comparisons"]
    named = ", ".join(
        f"{row['speedup']:.1f} times ({row['labels']} labels"
        + (f", {row['present']} of them present)" if row["present"] != row["labels"] else ")")
        for row in rows
        if row["parameters"] == "psa"
    )
    first = rows[0]["ways"]
    agreement = min(row["argmax_agreement"] for row in rows)
    machine = walk["environment"]
    crf_ours, crf_theirs = (first[name]["median_ms"] for name in ("multisa", "pydensecrf"))
    return _paragraph(
        f"Kernels, one thread of an {machine['processor']} with {machine['instruction_set'].upper()},",
        f"medians in turn. A random walk of 256 steps over {grid['size']} x {grid['size']} pixels and",
        f"{grid['channels']} channels takes {ours['median_ms']:.1f} ms; the literature's squaring of the",
        f"dense matrix, on all cores, {dense['median_ms'] / 1000:.0f} s ({dense['times_ours']:,.0f} times as",
        f"long; {flushed['times_ours']:,.0f} times with denormal numbers flushed); the same series on SciPy",
        f"{scipy['median_ms']:.0f} ms. The largest error against float64 is",
        f"{ours['max_error']:.0e}; {grid['floor']['share_of_peak']:.0%} of the peak rate is used.",
        "[benchmarks/results/random_walk.json](benchmarks/results/random_walk.json)",
        f"A dense CRF of {crf['image'][1]} x {crf['image'][0]} pixels and 3 labels takes {crf_ours:.0f} ms,",
        f"pydensecrf {crf_theirs:.0f} ms. Ours is {named} as fast,",
        f"with the same label at {agreement:.4%} of the pixels.",
        "[benchmarks/results/dense_crf.json](benchmarks/results/dense_crf.json)",
    )


def _codecs(results: dict[str, Any]) -> str:
    own, large = results["masks"]["segmenter, own size"], results["masks"]["drawn, 1024x1024"]
    png, runs, photograph = large["png"], large["rle"], results["jpegs"]["4000x3000"]
    decoding, ready = photograph["decoding"], photograph["decoding_and_resizing"]
    alike = results["labels_alike_with_scaled_decoding"]
    smaller, larger = (
        one["png"]["ours"]["bytes_each"] / one["png"]["Pillow"]["bytes_each"] for one in (large, own)
    )
    return _paragraph(
        "Codecs, one thread: a mask of 1024x1024 pixels is a palette PNG after",
        f"{png['ours']['ms_each']:.2f} ms,",
        f"{png['Pillow']['times_ours']:.1f} times as fast as Pillow's default and with",
        f"{smaller:.2f} of its bytes",
        f"({own['png']['Pillow']['times_ours']:.1f} times and",
        f"{larger:.2f} for masks of the segmenter",
        "at the photographs' own size), and COCO's run lengths of all classes after",
        f"{runs['ours']['ms_each']:.2f} ms, {runs['pycocotools']['times_ours']:.1f} times as fast as",
        f"pycocotools for {large['classes_each']} classes. A JPEG of 12 megapixels is decoded",
        f"{decoding['Pillow']['times_ours']:.1f} times as fast as by Pillow to the same pixels, and at the",
        f"size that the networks see {ready['Pillow']['times_ours']:.1f} times as fast, where it is decoded",
        "smaller:",
        f"{alike['mean']:.2%} of the labels stay alike ({alike['photographs']} photographs, enlarged",
        f"{alike['enlarged']} times). [benchmarks/results/encoding.json](benchmarks/results/encoding.json)",
    )


def _paragraph(*pieces: str) -> str:
    return textwrap.fill(" ".join(pieces), 108, break_long_words=False, break_on_hyphens=False)


def disagreements(
    run: dict[str, Any], segmenting: dict[str, Any], labelling: dict[str, Any], manifest_sha256: str
) -> list[str]:
    """What shows that the files are not of one training: the run, the suite's results, the bundle."""
    val = next(row["miou"] for row in run["rows"] if row["measured_on"] == "val")
    default = next(row for row in segmenting["segment"] if row["default"])
    eager = next((row for row in segmenting["segment"] if row["engine"] == "pytorch-eager"), default)
    agreement, whole = eager["label_agreement"], eager["photographs"] == run["photographs"]["val"]
    measured = {
        name: of["environment"]["bundle"]["sha256"]
        for name, of in (("segmenting", segmenting), ("labelling", labelling))
    }
    checks = (
        *(
            (sha256 == manifest_sha256, f"{name} was measured with another bundle")
            for name, sha256 in measured.items()
        ),
        # Fewer photographs than the run measured have another mIoU.
        (
            not whole or abs(eager["miou"] - val) <= MIOU_TOLERANCE,
            f"PyTorch eager has mIoU {eager['miou']}, the run's val row {val}",
        ),
        (agreement >= LEAST_AGREEMENT, f"{agreement:.4%} of labels agree, expected {LEAST_AGREEMENT:.1%}"),
    )
    return [problem for holds, problem in checks if not holds]


def updated(readme: str, section: str) -> str:
    """README text with the section between the two marks made anew."""
    before, rest = readme.split(START)
    _, after = rest.split(STOP)
    return f"{before}{START}\n{section}\n{STOP}{after}"


def main() -> int:
    """Rewrite or check README.md."""
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    run, segmenting, labelling, starts = (
        json.loads((RESULTS / f"{subject}.json").read_text(encoding="utf-8"))
        for subject in ("voc-animals", "segmenting", "labelling", "start_up")
    )
    problems = disagreements(run, segmenting, labelling, hashlib.sha256(BUNDLE.read_bytes()).hexdigest())
    if problems:
        print(f"the results files disagree, run make train and make bench: {'; '.join(problems)}")
        return 1
    kernels, of_runs, graphs = (
        [json.loads((RESULTS / f"{subject}.json").read_text(encoding="utf-8")) for subject in subjects]
        for subjects in (
            ("random_walk", "dense_crf", "encoding"),
            ("pipeline", "kills", "journal", "doubt"),
            ("cam_head", "precisions", "plans"),
        )
    )
    fresh = updated(readme, results_section(run, [segmenting, labelling, starts], kernels, of_runs, graphs))
    if "--check" in sys.argv[1:]:
        if fresh != readme:
            print("README.md disagrees with benchmarks/results; run python benchmarks/readme_results.py")
        return int(fresh != readme)
    path.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
