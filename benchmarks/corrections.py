"""The correction curve: val mIoU of the segmenter after some masks of the train list have been corrected.

    python benchmarks/corrections.py --data VOC_LAYOUT --preset lite0 -o runs/corrections

For each seed: train, export, label the train list with that bundle, and rank its images by uncertainty, as report.html
does. Then correct the most uncertain 5, 10 and 20 % with their ground truth and train again, and as many at random. The
stages in the output folder are reused, so the same command resumes. Writes benchmarks/results/corrections.json.
"""

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multisa.benchmarks.harness import environment, make_parser, save_results
from multisa.export.bundle import ExportOptions, export_bundle
from multisa.runtime.api import label_images
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import write_mask
from multisa.runtime.progress import console, log
from multisa.training.config import TrainConfig, load_config
from multisa.training.corrections import add_corrections
from multisa.training.data import Dataset, read_dataset
from multisa.training.pipeline import run_stages, train
from multisa.training.run_record import SEGMENTER, RunRecord

SHARES = (0.05, 0.1, 0.2)  # of the train list
EXPORT_IMAGES = 8  # that graphs are compared with networks on
UNCERTAIN, RANDOM = CHOICES = ("uncertain", "random")


@dataclass(frozen=True)
class Curve:
    """What to measure."""

    dataset: Dataset
    preset: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path

    def config(self, seed: int) -> TrainConfig:
        """The configuration of one seed, without what the curve does not show."""
        plain = ("more_seeds=[]", "supervised=false", "paper_rows=false", f"seed={seed}")
        return load_config(self.preset, [*self.overrides, *plain])


def measure(curve: Curve) -> dict[str, Any]:
    """Train everything that is not finished yet; the results as JSON values, mIoU in percent."""
    if not curve.dataset.train or not curve.dataset.val:
        raise UsageError(
            f"{curve.dataset.root}: got no masks of train or val, expected both to correct and measure with"
        )
    base: list[float] = []
    found: dict[tuple[float, str], list[float]] = {}
    for seed in curve.seeds:
        config, run = curve.config(seed), curve.output / f"seed-{seed}"
        base.append(_val_miou(train(config, curve.dataset, run)))
        for choice, ids in _orders(curve, run, seed).items():
            for share in SHARES:
                chosen = ids[: _count(share, ids)]
                log.info(f"seed {seed}: {len(chosen)} {choice} images corrected")
                corrected = _corrected(curve.dataset, chosen, curve.output / f"seed-{seed}-{choice}-{len(chosen)}")
                found.setdefault((share, choice), []).append(_val_miou(run_stages(config, corrected, run)))
    return {"none": _summary(base), "curve": [_row(share, found, curve.dataset) for share in SHARES]}


def _orders(curve: Curve, run: Path, seed: int) -> dict[str, list[str]]:
    """Ids of the train list in both orders, the first to be corrected first."""
    bundle = run.with_name(f"{run.name}-bundle")
    if not (bundle / MANIFEST_NAME).is_file():
        export_bundle(run, curve.dataset, bundle, ExportOptions(num_images=EXPORT_IMAGES))
    items = {item.image.name: item for item in curve.dataset.train}
    names = curve.dataset.class_names
    labels = {item.image.name: [names[class_id] for class_id in item.classes] for item in items.values()}
    out = run.with_name(f"{run.name}-labels")
    images = [item.image for item in items.values()]
    label_images(images, out, labels, bundle=bundle, report_images=0)
    lines = (out / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    records = sorted(map(json.loads, lines), key=lambda record: (-record["uncertainty"], record["index"]))
    ranked = [items[Path(record["image"]).name].id for record in records]
    shuffled = np.random.default_rng(seed).permutation(len(ranked))
    return {UNCERTAIN: ranked, RANDOM: [curve.dataset.train[place].id for place in shuffled]}


def _corrected(dataset: Dataset, ids: Sequence[str], folder: Path) -> Dataset:
    """The data set with ground truth as the correction of some images, written to a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    masks = {item.id: item.mask for item in dataset.train}
    for name in ids:
        mask = masks[name]
        assert mask is not None  # the list train has those with a mask
        write_mask(folder / f"{name}.png", mask.read(), dataset.mask_palette)
    return add_corrections(dataset, folder, quiet=True)


def _count(share: float, ids: Sequence[str]) -> int:
    return max(round(share * len(ids)), 1)


def _val_miou(run: RunRecord) -> float:
    return next(row.miou for row in run.rows if row.stage == SEGMENTER and row.measured_on == "val")


def _row(share: float, found: Mapping[tuple[float, str], list[float]], dataset: Dataset) -> dict[str, Any]:
    uncertain, by_chance = (found[share, choice] for choice in CHOICES)
    ahead = [ours - theirs for ours, theirs in zip(uncertain, by_chance, strict=True)]
    images = _count(share, [item.id for item in dataset.train])
    row = {"share": share, "images": images, UNCERTAIN: _summary(uncertain), RANDOM: _summary(by_chance)}
    return {**row, "uncertain_ahead_by": _summary(ahead)}


def _summary(values: Sequence[float]) -> dict[str, Any]:
    """Values of the seeds, their mean and their standard deviation (None for one seed), in percent."""
    spread = round(statistics.stdev(values), 2) if len(values) > 1 else None
    return {"seeds": [round(v, 2) for v in values], "mean": round(statistics.fmean(values), 2), "spread": spread}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set in VOC layout, with masks")
    parser.add_argument("--preset", default="lite0", help="preset, or TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the preset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder of runs, to resume in")
    options = parser.parse_args(arguments)
    measured_on = environment("torch", "timm")
    with console():
        dataset = read_dataset(options.data, quiet=True)
        curve = Curve(dataset, options.preset, tuple(options.set), tuple(options.seeds), options.output)
        results = measure(curve)
    described = {"preset": options.preset, "set": options.set, "seeds": options.seeds, "train": len(dataset.train)}
    save_results("corrections", {"environment": measured_on, **described, **results}, options.results)


if __name__ == "__main__":
    main()
