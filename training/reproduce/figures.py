"""Figures 4 to 6: the CAM of each level, the stages of a mask, segmentations; as strips of pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_user_text, write_bytes_atomically, write_json_atomically
from multisa.runtime.imaging.decode import read_mask, resize_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import pseudo_mask
from multisa.training.cams import CHECKPOINT, load_cam_network
from multisa.training.checks import check_run
from multisa.training.config import TrainConfig
from multisa.training.data import DataSet, Item
from multisa.training.device import torch_device
from multisa.training.inference import as_batch, load_maps, read_working_image
from multisa.training.labelling import label_photographs
from multisa.training.multi_sa import MultiSACAM, MultiScaleCAM
from multisa.training.reproduce import paper
from multisa.training.reproduce.levels import OneLevel, shares_at_peak
from multisa.training.reproduce.pictures import Legend, Strip, coloured, draw_sheet, fitted, heat_map
from multisa.training.reproduce.report import FOLDER, provenance
from multisa.training.reproduce.whole import whole_run
from multisa.training.segmentation import load_segmenter
from multisa.training.segmenter import SegmentPhotographs
from multisa.training.stages import BASELINE, CAM, cam_network
from multisa.training.workspace import Workspace

UInt8 = npt.NDArray[np.uint8]

PHOTOGRAPHS = 4  # of a figure, where nothing else is said
MAX_PHOTOGRAPHS = 32  # a sheet is in memory as a whole


@dataclass(frozen=True)
class Drawn:
    """What a figure shows, and the digests of what it was made from."""

    title: str
    captions: tuple[str, ...]
    strips: tuple[Strip, ...]
    notes: tuple[str, ...]
    digests: Mapping[str, str]
    shown: frozenset[int] = frozenset()  # ids of the classes whose colours are to be named


def reproduce_figure(
    name: str,
    config: TrainConfig,
    dataset: DataSet,
    root: Path,
    *,
    count: int = PHOTOGRAPHS,
    chosen: Path | None = None,
) -> tuple[Path, str]:
    """Run what `name` ("figure4" to "figure6") needs and is not made already; draw it for some photographs.

    count: photographs at even distances in the list; chosen: a file of their ids instead, one a line. Figures
    4 and 5 are of the train list, Figure 6 of val; where a list has no masks, of the photographs trained on
    and without truth. Writes NAME.png and NAME.json below `root`/reproduce; returns the picture's path and
    what is to be said of it. Raises UsageError for photographs that are not in the list; else as `check_run`.
    """
    items = choose_photographs(name, dataset, count, chosen)
    if name == "figure4" and not config.cam.taps:
        raise UsageError("cam.taps: got none, expected at least one level with self-attention")
    if name == "figure4" and not any(item.classes for item in items):
        raise UsageError(
            "figure4: got photographs without a class, expected one with: choose others (--list)"
        )
    check_run(config, dataset)
    drawn = FIGURES[name](config, dataset, root, items)
    legend = [_legend(i, dataset) for i in sorted(drawn.shown)]
    path = root / FOLDER / f"{name}.png"
    write_bytes_atomically(path, draw_sheet(drawn.captions, drawn.strips, legend))
    record = {
        "what": name,
        "title": drawn.title,
        "columns": drawn.captions,
        "rows": [strip.name for strip in drawn.strips],
        "notes": drawn.notes,
    }
    write_json_atomically(path.with_suffix(".json"), {**record, **provenance(config, dataset, drawn.digests)})
    return path, "\n".join([drawn.title, f"Columns: {', '.join(drawn.captions)}.", *drawn.notes])


def choose_photographs(name: str, dataset: DataSet, count: int, chosen: Path | None) -> tuple[Item, ...]:
    """The photographs of a figure, as `reproduce_figure` says."""
    items = (dataset.val if name == "figure6" else dataset.train) or dataset.weak
    if chosen is None:
        if not 1 <= count <= MAX_PHOTOGRAPHS:
            raise UsageError(f"got {count} photographs, expected 1..{MAX_PHOTOGRAPHS}")
        number = min(count, len(items))
        return tuple(items[i * len(items) // number] for i in range(number))
    by_id = {item.id: item for item in items}
    ids = list(dict.fromkeys(read_user_text(chosen).split()))
    unknown = next((i for i in ids if i not in by_id), None)
    if unknown is not None:
        which = "val" if items is dataset.val else "train" if items is dataset.train else "weak"
        raise UsageError(
            f"{chosen}: {unknown[:80]!r} is none of the {len(items)} photographs of the {which} list that "
            f"{name} is drawn for; expected ids such as {items[0].id}"
        )
    if not 1 <= len(ids) <= MAX_PHOTOGRAPHS:
        raise UsageError(f"{chosen}: got {len(ids)} photographs, expected 1..{MAX_PHOTOGRAPHS}")
    return tuple(by_id[i] for i in ids)


def _figure4(config: TrainConfig, dataset: DataSet, root: Path, items: Sequence[Item]) -> Drawn:
    """Fig. 4: the photograph, the CAM of each level, of all of them, and of a network without attention."""
    space, weak = Workspace(root), dataset.weak_digest()
    plain = replace(config.cam, taps=())
    trained = cam_network(space, config.cam, config, dataset, weak, CAM)
    baseline = cam_network(space, plain, config, dataset, weak, BASELINE)
    n_classes = len(dataset.class_names)
    network = load_cam_network(config.cam, n_classes, trained.folder / CHECKPOINT)
    parts = [OneLevel(network, index) for index in range(len(network.taps))]
    whole = (network, load_cam_network(plain, n_classes, baseline.folder / CHECKPOINT))
    device = torch_device(config)
    passes = [MultiScaleCAM(part, scales=config.cam.scales).to(device) for part in (*parts, *whole)]
    strips, shares = [], [torch.empty(0, len(parts))]
    for item in items:
        rgb = read_working_image(item, config.long_side)
        with torch.inference_mode():
            batch = as_batch(rgb).to(device)
            maps = [inference(batch)[0][0].cpu().numpy() for inference in passes]
            shares.append(shares_at_peak(parts, batch, item.classes).cpu())
        for class_id in item.classes:
            panels = (rgb, *(heat_map(rgb, cam[class_id - 1]) for cam in maps))
            strips.append(_strip(f"{item.id}: {dataset.class_names[class_id]}", panels))
    medians = ", ".join(f"{share:.0%}" for share in torch.cat(shares).quantile(0.5, dim=0).tolist())
    return Drawn(
        "Figure 4: class activation maps at the levels of Multi-SA",
        ("photograph", *_level_captions(network), "Multi-SA CAM", "CAM without SA"),
        tuple(strips),
        (
            "Each map is divided by its own maximum, so levels show where, not how much; before that, and "
            "before the ReLU, they add up to the Multi-SA CAM.",
            f"Share of each level where the sum is highest, at scale 1, median of the rows: {medians}.",
            f"Betas, finest level first: ours {_betas(network.betas())}; the paper's, of "
            f"{paper.TABLE2_BACKBONE}, {_betas(paper.BETAS)}.",
        ),
        {"weak": weak, "cam": trained.digest, "cam-baseline": baseline.digest},
    )


def _figure5(config: TrainConfig, dataset: DataSet, root: Path, items: Sequence[Item]) -> Drawn:
    """Fig. 5: the photograph, its CAM, that after the random walk, the mask without and with dCRF, truth."""
    space = Workspace(root)
    labelled = label_photographs(space, config, dataset)
    label, palette = labelled.label, dataset.mask_palette
    strips, shown = [], set()
    truths = [item.mask is not None for item in items]
    for item in items:
        rgb = read_working_image(item, config.long_side)
        cams, walked = (load_maps(s.folder / f"{item.id}.npy") for s in (labelled.cams, labelled.walked))
        masks = [
            pseudo_mask(rgb, walked, item.classes, replace(label, use_crf=use_crf)).mask
            for use_crf in (False, True)
        ]
        masks += _truth(item, rgb) if all(truths) else []
        shown |= _ids(masks)
        heat = [heat_map(rgb, _strongest(maps)) for maps in (cams, walked)]
        panels = (rgb, *heat, *(coloured(mask, palette) for mask in masks))
        strips.append(_strip(_named(item, dataset), panels))
    truth = ("ground truth",) if all(truths) else ()
    gains = ", a gain for each class" if label.class_gain else ""
    return Drawn(
        "Figure 5: from the class activation maps to pseudo-masks",
        ("photograph", "Multi-SA CAM", "after random walk", "mask without dCRF", "mask with dCRF", *truth),
        tuple(strips),
        (
            "Heat is that of the strongest class of the image-level label at each pixel. Masks: background "
            f"score {label.background:.2f}{gains}.",
        ),
        {"weak": labelled.data_digest, **{stage.name: stage.digest for stage in space.stages}},
        frozenset(shown),
    )


def _figure6(config: TrainConfig, dataset: DataSet, root: Path, items: Sequence[Item]) -> Drawn:
    """Fig. 6: the photograph, the segmenter's answer, truth."""
    run = whole_run(config, dataset, root)
    checkpoint = run.folder(root, "segmenter") / CHECKPOINT
    device = torch_device(config)
    network = load_segmenter(config.segmenter, len(dataset.class_names), checkpoint)
    inference = SegmentPhotographs(network).to(device)
    strips, shown = [], set()
    truths = [item.mask is not None for item in items]
    for item in items:
        rgb = read_working_image(item, config.long_side)
        with torch.inference_mode():
            labels, _ = inference(as_batch(rgb).to(device))
        masks = [labels[0].cpu().numpy(), *(_truth(item, rgb) if all(truths) else [])]
        shown |= _ids(masks)
        panels = (rgb, *(coloured(mask, dataset.mask_palette) for mask in masks))
        strips.append(_strip(_named(item, dataset), panels))
    which = "val" if dataset.val else "the photographs trained on"
    return Drawn(
        f"Figure 6: segmentations of {which}",
        ("photograph", "DeepLabV3+", *(("ground truth",) if all(truths) else ())),
        tuple(strips),
        (),
        {stage.name: stage.digest for stage in run.stages},
        frozenset(shown),
    )


FIGURES: Mapping[str, Callable[[TrainConfig, DataSet, Path, Sequence[Item]], Drawn]] = {
    "figure4": _figure4,
    "figure5": _figure5,
    "figure6": _figure6,
}


def _strip(name: str, panels: Sequence[UInt8]) -> Strip:
    return Strip(name, tuple(fitted(panel) for panel in panels))


def _level_captions(network: MultiSACAM) -> list[str]:
    strides = [network.backbone.strides[tap] for tap in network.taps]
    return [f"SA{index} (stride {stride})" for index, stride in enumerate(strides, 1)]


def _betas(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _strongest(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float32 [C, h, w] -> [h, w]; zero where there is no class."""
    return maps.max(axis=0) if len(maps) else np.zeros(maps.shape[1:], np.float32)


def _truth(item: Item, rgb: UInt8) -> list[UInt8]:
    assert item.mask is not None
    return [resize_mask(read_mask(item.mask), (rgb.shape[0], rgb.shape[1]))]


def _ids(masks: Sequence[UInt8]) -> set[int]:
    """What is in masks beside background: ids of classes, and 255 where truth leaves pixels out."""
    return {int(i) for mask in masks for i in np.unique(mask)} - {0}


def _legend(class_id: int, dataset: DataSet) -> Legend:
    red, green, blue = dataset.mask_palette[class_id].tolist()
    name = "left out of the truth" if class_id == IGNORE_INDEX else dataset.class_names[class_id]
    return Legend(name, (red, green, blue))


def _named(item: Item, dataset: DataSet) -> str:
    classes = ", ".join(dataset.class_names[i] for i in item.classes)
    return f"{item.id}: {classes}" if classes else item.id
