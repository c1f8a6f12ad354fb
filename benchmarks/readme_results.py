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

from multisa.benchmarks import readme_bench, readme_graphs, readme_kernels
from multisa.benchmarks.readme_runs import runs
from multisa.benchmarks.readme_sources import Files
from multisa.training.reproduce.paper import MULTI_SA, TABLE2, TABLE3_MIOU

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUNDLE = ROOT / "runtime" / "bundles" / "voc-animals" / "bundle.json"
SUBJECTS = (
    *("voc-animals", "segmenting", "labelling", "start_up", "pipeline", "kills", "journal", "doubt"),
    *("random_walk", "dense_crf", "encoding", "cam_head", "precisions", "plans"),
)
BACKGROUND_SAMPLE = 128  # as in training/thresholds.py, which is not imported: it needs torch
LEAST_AGREEMENT = 0.999  # of labels, PyTorch against the engine
MIOU_TOLERANCE = 0.1  # percent: the bundle's weights are rounded to half precision
START, STOP = "<!-- results: written by benchmarks/readme_results.py -->", "<!-- end of results -->"
# Table 2 of the paper (ResNeSt-101, 21 classes) and its val figure, by the start of our rows' names.
PAPER = {**TABLE2, "DeepLab": TABLE3_MIOU[MULTI_SA]}


def results_section(files: Files) -> str:
    """Markdown of the results files, by name."""
    run = files["voc-animals"]
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
    passages = (
        _conditions(run),
        readme_bench.segmenting(files),
        _paragraph(*readme_bench.segmenting_conditions(files)),
        readme_bench.labelling(files),
        _paragraph(*readme_bench.labelling_conditions(files), *readme_bench.start_up(files)),
        _paragraph(*runs(files)),
        _paragraph(*readme_kernels.walk(files), *readme_kernels.crf(files)),
        _paragraph(*readme_kernels.codecs(files)),
        _paragraph(*readme_graphs.head(files)),
        _paragraph(*readme_graphs.precisions(files)),
        readme_graphs.plans(files),
    )
    return "\n\n".join(["\n".join(lines), *passages])


def _conditions(run: dict[str, Any]) -> str:
    cam, segmenter, photographs = run["config"]["cam"], run["config"]["segmenter"], run["images"]
    return _paragraph(
        f"Measured on {len(run['classes']) - 1} classes of PASCAL VOC 2012 and background:",
        f"{photographs['train_images']} photographs with image-level labels to train on;",
        f"{photographs['train']} of them have masks, on which the pseudo-masks are measured",
        "(image-level labels given);",
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


def _paragraph(*pieces: str) -> str:
    return textwrap.fill(" ".join(pieces), 108, break_long_words=False, break_on_hyphens=False)


def disagreements(files: Files, manifest_sha256: str) -> list[str]:
    """What shows that the files are not of one training: the run, the suite's results, the bundle."""
    run, suite = files["voc-animals"], [(name, files[name]) for name in ("segmenting", "labelling")]
    problems = [
        f"{name} was measured with another bundle"
        for name, of in suite
        if of["environment"]["bundle"]["sha256"] != manifest_sha256
    ]
    problems += [
        f"{name} has no row of the default engine that ran"
        for name, rows in (("segmenting", suite[0][1]["segment"]), ("labelling", suite[1][1]["label"]))
        if not any(row.get("default") and row["problem"] is None for row in rows)
    ]
    rows = files["segmenting"]["segment"]
    eager = next((row for row in rows if row["engine"] == "pytorch-eager"), None)
    if eager is None:
        return [*problems, "segmenting has no row of pytorch-eager"]
    if eager["problem"] is not None:
        return [*problems, f"pytorch-eager did not run: {eager['problem']}"]
    val = next(row["miou"] for row in run["rows"] if row["measured_on"] == "val")
    missing = [key for key in ("miou", "label_agreement", "photographs") if eager.get(key) is None]
    if missing:
        return [*problems, f"pytorch-eager has no {', '.join(missing)}"]
    # Fewer photographs than the run measured have another mIoU.
    if eager["photographs"] == run["images"]["val"] and abs(eager["miou"] - val) > MIOU_TOLERANCE:
        problems.append(f"PyTorch eager has mIoU {eager['miou']}, the run's val row {val}")
    if eager["label_agreement"] < LEAST_AGREEMENT:
        agreement = f"{eager['label_agreement']:.4%}"
        problems.append(f"{agreement} of labels agree, expected {LEAST_AGREEMENT:.1%}")
    return problems


def updated(readme: str, section: str) -> str:
    """README text with the section between the two marks made anew."""
    before, rest = readme.split(START)
    _, after = rest.split(STOP)
    return f"{before}{START}\n{section}\n{STOP}{after}"


def main() -> int:
    """Rewrite or check README.md."""
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    missing = [name for name in SUBJECTS if not (RESULTS / f"{name}.json").is_file()]
    if missing:
        print(f"benchmarks/results: {', '.join(missing)} missing; run make bench")
        return 1
    files = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in SUBJECTS}
    problems = disagreements(files, hashlib.sha256(BUNDLE.read_bytes()).hexdigest())
    if problems:
        print(f"the results files disagree, run make train and make bench: {'; '.join(problems)}")
        return 1
    fresh = updated(readme, results_section(files))
    if "--check" in sys.argv[1:]:
        if fresh != readme:
            print("README.md disagrees with benchmarks/results; run python benchmarks/readme_results.py")
        return int(fresh != readme)
    path.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
