"""What the stages compute: CAM network and maps, affinities and walk, pseudo-masks, segmenter.

Each function works in the folder of its stage (stages.py) and returns the results of the stage. Files are
named by image: ID.npy for maps, ID.png for masks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from multisa.kernels import DenseCRF, enlarge_probabilities
from multisa.runtime.bundle import LabelParameters, SegmenterLabelParameters
from multisa.runtime.imaging.decode import read_image, resize_image, working_size, write_mask
from multisa.runtime.imaging.png import IGNORE_INDEX
from multisa.runtime.predict.postprocess import (
    Float32,
    UInt8,
    pseudo_mask,
    refine,
    resize_maps,
    restrict_probabilities,
    walk_scores,
)
from multisa.training.affinity_net import affinity_loss, pair_counts, pair_targets
from multisa.training.augment import AugmentedImages
from multisa.training.backbones import Backbone
from multisa.training.config import AffinityLabelConfig, CamConfig, SegmenterConfig, TrainConfig
from multisa.training.data import Dataset, Item, read_working_image
from multisa.training.distributed import alone
from multisa.training.inference import as_batch, for_each_item, load_maps, save_maps, torch_device
from multisa.training.loop import CHECKPOINT, BatchLoss, Epoch, LoopOptions, train_network
from multisa.training.models import create_model
from multisa.training.multi_sa import MultiScaleCAM, multilabel_soft_margin
from multisa.training.segmenter import (
    SEGMENTER_STRIDE,
    DeepLabV3Plus,
    SegmentImages,
    multi_scale_probabilities,
    segmentation_loss,
    soft_segmentation_loss,
)
from multisa.training.stage_cache import Results, Stage
from multisa.training.start import start_from_bundle, starts_from_bundle
from multisa.training.thresholds import ThresholdSweep, score_masks, score_thresholds
from multisa.training.watch import RunWatch

Batch = tuple[Tensor, Tensor]  # images uint8 [N, crop, crop, 3], targets as `AugmentedImages` makes them

MEASURED_IMAGES = 16  # images that the magnitudes of levels and the statistics of norms are measured on


def train_cam(
    cam: CamConfig, config: TrainConfig, dataset: Dataset, folder: Path, watch: RunWatch | None = None
) -> Results:
    """Train Multi-SA (or, without taps, the plain CAM) on the train images."""
    torch.manual_seed(config.seed)
    n_classes = len(dataset.class_names)
    device = torch_device(config)
    network = create_model(cam, n_classes).to(device)
    samples = AugmentedImages(dataset.train_images, cam.schedule, config, n_classes=n_classes)
    first = _first_images(samples, network.backbone)
    if not start_from_bundle(network, cam, config, dataset.class_names, first):
        network.eval().fit_level_gain(first)
    network.backbone.freeze(cam.schedule.frozen_levels)
    network.checkpoint_attention = config.execution.checkpoint_attention

    def step(batch: Batch) -> BatchLoss:
        image, labels = (each.to(device) for each in batch)

        def loss(count: Tensor) -> Tensor:
            return multilabel_soft_margin(network(network.backbone.normalise(image)).float(), labels, count)

        return BatchLoss(torch.tensor(len(labels), device=device), loss)

    groups = [(cam.schedule.new_layers_factor, network.new_parameters()), (cam.beta_factor, network.beta_parameters())]
    options = _loop_options(config, folder, f"CAM network, k = {len(network.taps)}", watch.epoch if watch else None)
    losses = train_network(network, groups, samples, step, cam.schedule, options)
    return {"losses": losses, "betas": network.betas()}


def compute_cams(
    cam: CamConfig, config: TrainConfig, dataset: Dataset, items: tuple[Item, ...], trained: Stage, folder: Path
) -> Results:
    """Write ID.npy (maps of the image's classes) and ID.scores.npy; choose the score thresholds."""
    device = torch_device(config)
    network = create_model(cam, len(dataset.class_names), checkpoint=trained.folder / CHECKPOINT)
    multi_scale = MultiScaleCAM(network, scales=cam.scales).to(device)

    def work(item: Item, maps_path: Path, scores_path: Path) -> None:
        with torch.inference_mode():
            maps, scores = multi_scale(as_batch(read_working_image(item.image, config.long_side)).to(device))
        present = maps[0].cpu().numpy()[[class_id - 1 for class_id in item.classes]]
        save_maps(maps_path, present)
        save_maps(scores_path, scores[0].cpu().numpy())

    title = f"CAMs, k = {len(network.taps)}"
    for_each_item(work, items, folder, (".npy", ".scores.npy"), workers=config.workers, title=title)
    return {"score_thresholds": score_thresholds(folder, items, dataset)}


def measure_maps(config: TrainConfig, dataset: Dataset, maps: Stage, folder: Path) -> Results:
    """Score maps against the train masks, for every background score; writes no file."""
    sweep = ThresholdSweep(len(dataset.class_names))
    for item in dataset.train:
        assert item.mask is not None
        sweep.add(load_maps(maps.folder / f"{item.id}.npy"), item.classes, item.mask.read())
    return sweep.results(config.label.background)


def measure_masks(dataset: Dataset, masks: Stage, folder: Path) -> Results:
    """Score pseudo-masks against the train masks; writes no file."""
    return score_masks(masks.folder, dataset.train, len(dataset.class_names))


def make_affinity_labels(config: TrainConfig, dataset: Dataset, cams: Stage, folder: Path) -> Results:
    """Write ID.png for each train image: its correction; otherwise class ids where they are certain, else 255."""
    palette = dataset.mask_palette

    def work(item: Item, path: Path) -> None:
        image = read_working_image(item.image, config.long_side)
        labels = dataset.corrected_mask(item, (image.shape[0], image.shape[1]))
        if labels is None:
            maps = load_maps(cams.folder / f"{item.id}.npy")
            labels = affinity_labels(image, maps, item.classes, config.affinity_labels)
        write_mask(path, labels, palette)

    items = dataset.train_images
    for_each_item(work, items, folder, (".png",), workers=config.workers, title="affinity labels")
    return {}


def affinity_labels(image: UInt8, cam: Float32, class_ids: tuple[int, ...], config: AffinityLabelConfig) -> UInt8:
    """Certain foreground, certain background, and 255 in between (irn).

    image: uint8 [H, W, 3]; cam: float32 [C, h, w] in [0, 1] for `class_ids`. Returns uint8 [H, W]. The
    strongest class competes twice with a constant background score, and the hard labels pass the dense CRF:
    what is foreground against the high score is certain foreground, what is background against the low score
    is certain background.
    """
    size = (image.shape[0], image.shape[1])
    if not class_ids:
        return np.zeros(size, np.uint8)
    scores = resize_maps(cam, size)
    crf = DenseCRF(image, config.crf)

    def refined(background: float) -> UInt8:
        stacked = np.concatenate([np.full((1, *size), background, np.float32), scores])
        hard = stacked.argmax(0).astype(np.uint8)
        q = crf.infer_labels(hard, len(stacked), confidence=config.confidence)
        return np.asarray(np.array((0, *class_ids), np.uint8)[q.argmax(0)])

    assert config.foreground is not None and config.background is not None
    certain_foreground = refined(config.foreground)
    possible_foreground = refined(config.background)
    labels = np.where(certain_foreground == 0, np.uint8(IGNORE_INDEX), certain_foreground)
    labels[(certain_foreground == 0) & (possible_foreground == 0)] = 0
    return labels


def train_affinity(
    config: TrainConfig, dataset: Dataset, labels: Stage, folder: Path, watch: RunWatch | None = None
) -> Results:
    """Train AffinityNet on the affinity labels of the train images."""
    torch.manual_seed(config.seed)
    schedule = config.affinity.schedule
    radius = config.affinity.training_radius
    device = torch_device(config)
    network = create_model(config.affinity).to(device)
    samples = AugmentedImages(
        dataset.train_images,
        schedule,
        config,
        n_classes=len(dataset.class_names),
        masks=labels.folder,
        stride=network.head.stride,
    )
    start_from_bundle(network, config.affinity, config, dataset.class_names, None)
    network.backbone.freeze(schedule.frozen_levels)

    def step(batch: Batch) -> BatchLoss:
        image, mask = (each.to(device) for each in batch)
        pairs = pair_targets(mask, radius)

        def loss(counts: Tensor) -> Tensor:
            levels = network.backbone(network.backbone.normalise(image))
            with torch.autocast(device.type, enabled=False):  # affinities close to 0 and 1 need fp32
                affinity = network.head([level.float() for level in levels], radius)
            return affinity_loss(affinity, *pairs, counts)

        return BatchLoss(pair_counts(*pairs), loss)

    groups = [(schedule.new_layers_factor, network.new_parameters())]
    options = _loop_options(config, folder, f"AffinityNet ({config.affinity.head})", watch.epoch if watch else None)
    return {"losses": train_network(network, groups, samples, step, schedule, options)}


def walk_cams(config: TrainConfig, dataset: Dataset, cams: Stage, trained: Stage, folder: Path) -> Results:
    """Write ID.npy, the maps after the random walk, for each train image."""
    device = torch_device(config)
    network = create_model(config.affinity, checkpoint=trained.folder / CHECKPOINT).to(device)

    def work(item: Item, path: Path) -> None:
        with torch.inference_mode():
            batch = as_batch(read_working_image(item.image, config.long_side)).to(device)
            affinity = network(network.backbone.normalise(batch), config.label.walk_radius)
        maps = load_maps(cams.folder / f"{item.id}.npy")
        save_maps(path, walk_scores(maps, affinity[0].cpu().numpy(), config.label))

    items = dataset.train_images
    for_each_item(work, items, folder, (".npy",), workers=config.workers, title="random walk")
    return {}


def make_pseudo_masks(
    config: TrainConfig,
    parameters: LabelParameters,
    dataset: Dataset,
    items: tuple[Item, ...],
    walked: Stage,
    folder: Path,
) -> Results:
    """Write ID.png for each image of `items`: its correction, or a mask from the walked maps."""
    palette = dataset.mask_palette

    def work(item: Item, path: Path) -> None:
        image = read_working_image(item.image, config.long_side)
        mask = dataset.corrected_mask(item, (image.shape[0], image.shape[1]))
        if mask is None:
            mask = pseudo_mask(image, load_maps(walked.folder / f"{item.id}.npy"), item.classes, parameters).mask
        write_mask(path, mask, palette)

    for_each_item(work, items, folder, (".png",), workers=config.workers, title="pseudo-masks")
    return {}


@dataclass(frozen=True)
class SegmenterTraining:
    """What a segmenter learns from; exactly one of the last three is given."""

    title: str
    items: tuple[Item, ...]
    start: Path | None  # checkpoint of the CAM network whose backbone it starts from
    masks: Path | None = None  # folder of ID.png
    probabilities: Path | None = None  # folder of ID.npy: soft targets
    truth: bool = False  # the masks of the items themselves


def train_segmenter(
    segmenter: SegmenterConfig,
    training: SegmenterTraining,
    config: TrainConfig,
    dataset: Dataset,
    folder: Path,
    watch: RunWatch | None = None,
) -> Results:
    """Train DeepLabV3+ on masks or soft targets."""
    torch.manual_seed(config.seed)
    n_classes = len(dataset.class_names)
    schedule = segmenter.schedule
    device = torch_device(config)
    from_bundle = starts_from_bundle(config, segmenter)
    start = None if from_bundle else training.start
    network = create_model(segmenter if start is None else replace(segmenter, weights="none"), n_classes).to(device)
    if start is not None:
        trained = create_model(config.cam, n_classes, checkpoint=start)
        network.backbone.load_state_dict(trained.backbone.state_dict())
    soft = training.probabilities is not None
    samples = AugmentedImages(
        training.items,
        schedule,
        config,
        n_classes=n_classes,
        masks=training.masks,
        truth=training.truth,
        probabilities=training.probabilities,
        stride=SEGMENTER_STRIDE if soft else 1,
    )
    if from_bundle:
        images = _first_images(samples, network.backbone)
        start_from_bundle(network, segmenter, config, dataset.class_names, images)
    network.backbone.freeze(schedule.frozen_levels)

    def step(batch: Batch) -> BatchLoss:
        image, target = (each.to(device) for each in batch)

        def loss(count: Tensor) -> Tensor:
            logits = network(network.backbone.normalise(image)).float()
            return (soft_segmentation_loss if soft else segmentation_loss)(logits, target, count)

        return BatchLoss(target.sum() if soft else (target != IGNORE_INDEX).sum(), loss)

    def after_epoch(epoch: Epoch) -> None:
        if watch is not None:
            network.eval()
            watch.epoch(epoch, partial(segment_item, SegmentImages(network), config), partial(measure, epoch))

    def measure(epoch: Epoch) -> Results:
        with TemporaryDirectory() as temporary:
            title = f"val after epoch {epoch.number}"
            with alone():  # only rank 0 is here
                return segment_val(network, config, dataset, Path(temporary), title=title)

    groups = [(schedule.new_layers_factor, network.new_parameters())]
    options = _loop_options(config, folder, training.title, after_epoch)
    return {"losses": train_network(network, groups, samples, step, schedule, options)}


def relabel(
    segmenter: SegmenterConfig,
    parameters: SegmenterLabelParameters,
    config: TrainConfig,
    dataset: Dataset,
    trained: Stage,
    folder: Path,
) -> Results:
    """Label the train images with a segmenter, restricted to their image-level labels.

    Writes ID.npy, soft targets [1 + classes of the image, h, w] at stride 4, and ID.png, the mask. Both are those of
    the correction where an image has one.
    """
    device = torch_device(config)
    network = create_model(segmenter, len(dataset.class_names), checkpoint=trained.folder / CHECKPOINT).to(device)
    options = config.relabel
    bias = network.classifier.bias
    assert bias is not None
    # Divides the probability of the background in every view, before they are averaged.
    bias.data[0] -= math.log(parameters.background_ratio)

    def work(item: Item, maps_path: Path, mask_path: Path) -> None:
        image = read_working_image(item.image, config.long_side)
        corrected = dataset.corrected_mask(item, (image.shape[0], image.shape[1]))
        if corrected is not None:
            save_maps(maps_path, one_hot_targets(corrected, item.classes))
            write_mask(mask_path, corrected, dataset.mask_palette)
            return
        with torch.inference_mode():
            every = multi_scale_probabilities(network, as_batch(image).to(device), options.scales, options.mirror)
        before = restrict_probabilities(every[0].cpu().numpy(), item.classes)
        after = refine(image, before, parameters.crf if parameters.use_crf and item.classes else None)
        sharp = functional.adaptive_avg_pool2d(torch.from_numpy(after), before.shape[1:]).numpy()
        save_maps(maps_path, options.crf_share * sharp + (1 - options.crf_share) * before)
        write_mask(mask_path, np.array((0, *item.classes), np.uint8)[after.argmax(0)], dataset.mask_palette)

    items = dataset.train_images
    for_each_item(work, items, folder, (".npy", ".png"), workers=config.workers, title="relabelling")
    return {}


def one_hot_targets(mask: UInt8, class_ids: tuple[int, ...]) -> Float32:
    """Soft targets of a mask: the share of each class in every cell of stride 4; pixels of 255 count for none.

    mask: uint8 [H, W] with ids of the background, `class_ids` and 255. Returns float32 [1 + C, ceil(H/4), ceil(W/4)].
    """
    grid = (-(-mask.shape[0] // SEGMENTER_STRIDE), -(-mask.shape[1] // SEGMENTER_STRIDE))
    each = np.stack([mask == class_id for class_id in (0, *class_ids)]).astype(np.float32)
    return np.asarray(functional.adaptive_avg_pool2d(torch.from_numpy(each), grid).numpy())


def evaluate_segmenter(
    segmenter: SegmenterConfig, config: TrainConfig, dataset: Dataset, trained: Stage, folder: Path
) -> Results:
    """Segment the val list with the PyTorch network, write ID.png and score them."""
    network = create_model(segmenter, len(dataset.class_names), checkpoint=trained.folder / CHECKPOINT)
    return segment_val(network.to(torch_device(config)), config, dataset, folder, title="val")


def segment_val(network: DeepLabV3Plus, config: TrainConfig, dataset: Dataset, folder: Path, *, title: str) -> Results:
    """Segment the val list with a network in evaluation mode, write ID.png to `folder` and score them."""
    segment = SegmentImages(network)

    def work(item: Item, path: Path) -> None:
        write_mask(path, segment_item(segment, config, item), dataset.mask_palette)

    for_each_item(work, dataset.val, folder, (".png",), workers=config.workers, title=title)
    return score_masks(folder, dataset.val, len(dataset.class_names))


def segment_item(segment: SegmentImages, config: TrainConfig, item: Item) -> UInt8:
    """Segment one image: class ids, uint8 [H, W] at its own size."""
    full = read_image(item.image).rgb
    size = (full.shape[0], full.shape[1])
    image = resize_image(full, working_size(*size, config.long_side))
    with torch.inference_mode():
        probabilities = segment(as_batch(image).to(torch_device(config)))[0].cpu().numpy()
    labels, _ = enlarge_probabilities(probabilities, size)
    return labels


def _first_images(samples: AugmentedImages, backbone: Backbone) -> Tensor:
    """A few samples to measure activations on, normalised float32 [N, 3, H, W]."""
    images = torch.stack([samples[i][0] for i in range(min(MEASURED_IMAGES, len(samples)))])
    return backbone.normalise(images.to(backbone.mean.device))


def _loop_options(
    config: TrainConfig, folder: Path, title: str, after_epoch: Callable[[Epoch], None] | None
) -> LoopOptions:
    return LoopOptions(folder / CHECKPOINT, config.seed, config.workers, title, config.execution, after_epoch)
