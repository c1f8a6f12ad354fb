"""Figures 4 to 6: the CAM of each level, the stages of a mask, and segmentations, as sheets of strips."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from multisa.kernels import enlarge_probabilities
from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_user_text, write_bytes_atomically, write_json_atomically
from multisa.runtime.imaging.decode import resize_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import Float32, UInt8, pseudo_mask
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset, Item, read_working_image, spread
from multisa.training.inference import as_batch, load_maps, torch_device
from multisa.training.loop import CHECKPOINT
from multisa.training.models import create_model, with_taps
from multisa.training.multi_sa import MultiScaleCAM, SingleLevel, shares_at_peak
from multisa.training.pipeline import check_run
from multisa.training.reproduce import paper
from multisa.training.reproduce.pictures import Legend, Strip, coloured, draw_sheet, fitted, heat_map
from multisa.training.reproduce.tables import FOLDER, full_run, provenance
from multisa.training.segmenter import SegmentImages
from multisa.training.stage_cache import StageCache
from multisa.training.stages import BASELINE, CAM, RunStages, make_pseudo_labels

NUM_IMAGES = 4  # shown in a figure by default
MAX_IMAGES = 32  # the whole sheet is held in memory


@dataclass(frozen=True)
class Figure:
    """The contents of a figure, and the digests of what it was made from."""

    title: str
    captions: tuple[str, ...]
    strips: tuple[Strip, ...]
    notes: tuple[str, ...]
    digests: Mapping[str, str]
    shown: frozenset[int] = frozenset()  # class ids that the legend names


def reproduce_figure(
    name: str, config: TrainConfig, dataset: Dataset, root: Path, *, count: int = NUM_IMAGES, chosen: Path | None = None
) -> tuple[Path, str]:
    """Run the stages that `name` ("figure4" to "figure6") needs, and draw the figure for some images.

    count: number of images, evenly spaced in the list; chosen: a file of their ids instead, one per line.
    Figures 4 and 5 show images of the train list, figure 6 of val; if the list has no masks, images trained
    on, without ground truth. Writes NAME.png and NAME.json below `root`/reproduce; returns the path of the
    PNG and a description to print. Raises UsageError for images that are not in the list, and whatever
    `check_run` raises.
    """
    items = choose_images(name, dataset, count, chosen)
    config = replace(config, cam=with_taps(config.cam))
    if name == "figure4" and not config.cam.taps:
        raise UsageError("cam.taps: got none, expected at least one level with self-attention")
    if name == "figure4" and not any(item.classes for item in items):
        raise UsageError("figure4: got no image with a class, expected at least one; choose other images with --list")
    check_run(config, dataset, root)
    figure = FIGURES[name](config, dataset, root, items)
    names = {**dict(enumerate(dataset.class_names)), IGNORE_INDEX: "ignored"}
    colours = [tuple(colour) for colour in dataset.mask_palette.tolist()]
    legend = [Legend(names[i], colours[i]) for i in sorted(figure.shown)]
    path = root / FOLDER / f"{name}.png"
    write_bytes_atomically(path, draw_sheet(figure.captions, figure.strips, legend))
    record = {
        "what": name,
        "title": figure.title,
        "columns": figure.captions,
        "rows": [strip.name for strip in figure.strips],
        "notes": figure.notes,
        **provenance(config, dataset, figure.digests),
    }
    write_json_atomically(path.with_suffix(".json"), record)
    return path, "\n".join([figure.title, f"Columns: {', '.join(figure.captions)}.", *figure.notes])


def choose_images(name: str, dataset: Dataset, count: int, chosen: Path | None) -> tuple[Item, ...]:
    """The images of a figure, as `reproduce_figure` describes."""
    items = (dataset.val if name == "figure6" else dataset.train) or dataset.train_images
    if chosen is None:
        if not 1 <= count <= MAX_IMAGES:
            raise UsageError(f"got {count} images, expected 1..{MAX_IMAGES}")
        return spread(items, count)
    by_id = {item.id: item for item in items}
    ids = list(dict.fromkeys(read_user_text(chosen).split()))
    unknown = next((i for i in ids if i not in by_id), None)
    if unknown is not None:
        which = "val" if items is dataset.val else "train" if items is dataset.train else "training"
        raise UsageError(
            f"{chosen}: {unknown[:80]!r} is not one of the {len(items)} {which} images that {name} can show; "
            f"expected ids such as {items[0].id}"
        )
    if not 1 <= len(ids) <= MAX_IMAGES:
        raise UsageError(f"{chosen}: got {len(ids)} images, expected 1..{MAX_IMAGES}")
    return tuple(by_id[i] for i in ids)


def _figure4(config: TrainConfig, dataset: Dataset, root: Path, items: Sequence[Item]) -> Figure:
    """Fig. 4: the image, the CAM of each level, of all levels, and of a network without attention."""
    stages = RunStages(StageCache(root), config, dataset)
    plain = replace(config.cam, taps=())
    trained = stages.cam_network(config.cam, CAM)
    baseline = stages.cam_network(plain, BASELINE)
    n_classes = len(dataset.class_names)
    network = create_model(config.cam, n_classes, checkpoint=trained.folder / CHECKPOINT)
    parts = [SingleLevel(network, index) for index in range(len(network.taps))]
    whole = (network, create_model(plain, n_classes, checkpoint=baseline.folder / CHECKPOINT))
    device = torch_device(config)
    passes = [MultiScaleCAM(part, scales=config.cam.scales).to(device) for part in (*parts, *whole)]
    strips: list[Strip] = []
    shares = [torch.empty(0, len(parts))]
    for item in items:
        rgb = read_working_image(item.image, config.long_side)
        with torch.inference_mode():
            batch = as_batch(rgb).to(device)
            maps = [inference(batch)[0][0].cpu().numpy() for inference in passes]
            shares.append(shares_at_peak(parts, batch, item.classes).cpu())
        for class_id in item.classes:
            panels = (rgb, *(heat_map(rgb, cam[class_id - 1]) for cam in maps))
            strips.append(_strip(f"{item.id}: {dataset.class_names[class_id]}", panels))
    strides = [network.backbone.strides[tap] for tap in network.taps]
    levels = [f"SA{index} (stride {stride})" for index, stride in enumerate(strides, 1)]
    medians = ", ".join(f"{share:.0%}" for share in torch.cat(shares).quantile(0.5, dim=0).tolist())
    return Figure(
        "Figure 4: class activation maps at the levels of Multi-SA",
        ("image", *levels, "Multi-SA CAM", "CAM without SA"),
        tuple(strips),
        (
            "Each map is divided by its own maximum, so it shows where a level is active, not how much. "
            "Before that division and the ReLU, the levels add up to the Multi-SA CAM.",
            f"Share of each level at the maximum of the sum, at scale 1, median over the rows: {medians}.",
            f"Betas, finest level first: ours {_betas(network.betas())}; the paper's, with "
            f"{paper.TABLE2_BACKBONE}, {_betas(paper.BETAS)}.",
        ),
        {"train_images": stages.images_digest, "cam": trained.digest, "cam-baseline": baseline.digest},
    )


def _figure5(config: TrainConfig, dataset: Dataset, root: Path, items: Sequence[Item]) -> Figure:
    """Fig. 5: the image, its CAM before and after the walk, masks without and with CRF, ground truth."""
    stages = RunStages(StageCache(root), config, dataset)
    labels = make_pseudo_labels(stages)
    label = labels.label

    def panels(item: Item, rgb: UInt8) -> tuple[list[UInt8], list[UInt8]]:
        cams, walked = (load_maps(s.folder / f"{item.id}.npy") for s in (labels.cams, labels.walked))
        masks = [
            pseudo_mask(rgb, walked, item.classes, replace(label, use_crf=use_crf)).mask for use_crf in (False, True)
        ]
        return [heat_map(rgb, _strongest(maps)) for maps in (cams, walked)], masks

    strips, shown, ground_truth = _with_ground_truth(panels, items, config, dataset)
    gains = ", with gains of classes" if label.class_gain else ""
    return Figure(
        "Figure 5: from the class activation maps to pseudo-masks",
        ("image", "Multi-SA CAM", "after random walk", "mask without dCRF", "mask with dCRF", *ground_truth),
        strips,
        (
            "Heat maps show the strongest class of the image-level labels at each pixel. Masks: background "
            f"score {label.background:.2f}{gains}.",
        ),
        {"train_images": stages.images_digest, **{s.name: s.digest for s in stages.cache.stages}},
        shown,
    )


def _figure6(config: TrainConfig, dataset: Dataset, root: Path, items: Sequence[Item]) -> Figure:
    """Fig. 6: the image, the output of the segmenter, ground truth."""
    run = full_run(config, dataset, root)
    checkpoint = run.folder(root, "segmenter") / CHECKPOINT
    device = torch_device(config)
    network = create_model(config.segmenter, len(dataset.class_names), checkpoint=checkpoint)
    inference = SegmentImages(network).to(device)

    def panels(item: Item, rgb: UInt8) -> tuple[list[UInt8], list[UInt8]]:
        with torch.inference_mode():
            probabilities = inference(as_batch(rgb).to(device))[0].cpu().numpy()
        return [], [enlarge_probabilities(probabilities, (rgb.shape[0], rgb.shape[1]))[0]]

    strips, shown, ground_truth = _with_ground_truth(panels, items, config, dataset)
    which = "val" if dataset.val else "the images trained on"
    return Figure(
        f"Figure 6: segmentations of {which}",
        ("image", "DeepLabV3+", *ground_truth),
        strips,
        (),
        {stage.name: stage.digest for stage in run.stages},
        shown,
    )


FIGURES = {"figure4": _figure4, "figure5": _figure5, "figure6": _figure6}


def _with_ground_truth(
    panels: Callable[[Item, UInt8], tuple[list[UInt8], list[UInt8]]],
    items: Sequence[Item],
    config: TrainConfig,
    dataset: Dataset,
) -> tuple[tuple[Strip, ...], frozenset[int], tuple[str, ...]]:
    """A strip per image: the image, `panels` (RGB, then masks) and, if all images have it, ground truth.

    Returns the strips, the ids in their masks except background (classes, and 255 for pixels that the ground
    truth ignores), and the caption of the ground truth.
    """
    strips = []
    shown: set[int] = set()
    has_masks = all(item.mask is not None for item in items)
    for item in items:
        rgb = read_working_image(item.image, config.long_side)
        pictures, masks = panels(item, rgb)
        if item.mask is not None and has_masks:
            masks.append(item.mask.read())
        masks = [resize_mask(mask, (rgb.shape[0], rgb.shape[1])) for mask in masks]
        shown.update(int(i) for mask in masks for i in np.unique(mask))
        classes = ", ".join(dataset.class_names[i] for i in item.classes)
        name = f"{item.id}: {classes}" if classes else item.id
        strips.append(_strip(name, (rgb, *pictures, *(coloured(m, dataset.mask_palette) for m in masks))))
    return tuple(strips), frozenset(shown - {0}), ("ground truth",) if has_masks else ()


def _strip(name: str, panels: Sequence[UInt8]) -> Strip:
    return Strip(name, tuple(fitted(panel) for panel in panels))


def _betas(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _strongest(maps: Float32) -> Float32:
    """float32 [C, h, w] -> [h, w]; zero where there is no class."""
    return maps.max(axis=0) if len(maps) else np.zeros(maps.shape[1:], np.float32)
