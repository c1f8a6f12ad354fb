"""MODEL_CARD.md of a bundle: what it is for, how it was made and measured, from the record of its training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from multisa.export.licences import Origin
from multisa.runtime.bundle import BundleParameters
from multisa.runtime.imaging.decode import MAX_ENLARGEMENT
from multisa.runtime.progress import pluralize
from multisa.training.models import ModelConfig
from multisa.training.run_record import SEGMENTER, SUPERVISED, Row, RunRecord

_INTENDED_USE = """\
`multisa segment` segments images into these classes. `multisa label` makes masks of images whose classes are known,
to correct by hand or to train on. Measure the bundle on images of your own first: the figures below are of images
like those it was trained on. Masks are least certain along outlines and for small objects; each run writes an
uncertainty for every image, to choose what to review. A person has to review masks that decide about people or
their safety."""
_CONFIGURED = "the configuration"
_BALANCE = "background and foreground in the labels trained on (`balance_background`)"
_COMPARED = (
    "the CAM network's classifier on the masks of both methods; the faster one if they are alike "
    "(`metrics.label_method`)"
)
_NOT_COMPARED = "the faster one, because too few images with labels could be compared"
_YEN = "Yen's criterion on the maps of the images trained on"


def model_card(
    run: RunRecord,
    parameters: BundleParameters,
    files: Mapping[str, bytes],
    origins: Sequence[Origin],
    *,
    methods_compared: bool = True,
    known_failures: str = "",
) -> str:
    """Write the card, in Markdown.

    parameters, files: of the bundle. origins: of the backbones' weights. methods_compared: whether the masks of both
    methods of `multisa label` were (label_method.py). known_failures: Markdown from whoever looked at the masks.
    """
    sections = {
        "Intended use": [_INTENDED_USE],
        "Data": _data(run),
        "Thresholds": _thresholds(run, parameters, methods_compared=methods_compared),
        "Accuracy": _accuracy(run),
        "Known failures": _failures(run, known_failures),
        "Training": _training(run),
        "Files": _files(files),
        "Licences": _licences(files, origins),
    }
    parts = ["\n".join(_head(run))]
    parts += [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items()]
    return "\n\n".join(parts) + "\n"


def _head(run: RunRecord) -> Iterator[str]:
    """What `multisa inspect` shows of the card."""
    yield f"# Model card: {run.config.name}"
    yield ""
    yield f"A segmenter of {len(run.classes) - 1} classes and background, trained from image-level labels."
    yield ""
    yield f"- Classes: {', '.join(run.classes[1:])}."
    measured = _measured(run)
    if measured:
        yield f"- mIoU: {measured.miou:.2f} % on the list {measured.measured_on} ({measured.stage})."
    else:
        yield "- mIoU: not measured, the data set has no masks."
    yield f"- Ground-truth masks: {_masks_used(run)}."


def _masks_used(run: RunRecord) -> str:
    if run.images.corrected:
        chosen = "; those of the list train chose the background score" if _are_masks_used(run) else ""
        return f"{run.images.corrected} corrected masks of images to train on were trained on{chosen}"
    if _are_masks_used(run):
        return "those of the list train chose the background score of the pseudo-masks; no mask was trained on"
    if run.config.background_from != "yen" or run.config.affinity_labels.foreground is not None:
        return "this run used no mask. The configured numbers are given; where they come from is not recorded"
    return "no mask was used, neither to train nor to choose a threshold"


def _are_masks_used(run: RunRecord) -> bool:
    return run.config.background_from == "train-masks" and run.images.train > 0


def _data(run: RunRecord) -> Iterator[str]:
    images = run.images
    yield f"- Trained on {images.train_images} images with image-level labels of {len(run.classes) - 1} classes."
    if images.corrected:
        yield f"- {images.corrected} of them have a mask that people corrected, which every stage learns from."
    yield f"- {images.train} of them have masks, on which pseudo-masks are measured (list train)."
    if images.val:
        yield f"- {images.val} other images with masks measure the segmenter (list val) and choose nothing."
    yield f"- Digest of classes, images and labels: `{run.data_digest}`."


def _thresholds(run: RunRecord, parameters: BundleParameters, *, methods_compared: bool) -> Iterator[str]:
    label, segmenter = parameters.label, parameters.segmenter_label
    found = _YEN if run.config.background_from == "yen" else _CONFIGURED
    background = "the highest mIoU on masks of the list train" if _are_masks_used(run) else found
    balance = _BALANCE if run.config.balance_background else _CONFIGURED
    certain = run.config.affinity_labels
    if certain.foreground is None:
        certainty = ("above and below the background score of the maps", _YEN)
    else:
        certainty = (f"foreground {certain.foreground:g}, background {certain.background:g}", _CONFIGURED)
    scores = ", ".join(f"{name} {score:g}" for name, score in parameters.score_thresholds.items())
    gains = zip(run.classes[1:], label.class_gain, strict=False)
    evidence = _COMPARED if methods_compared else _NOT_COMPARED
    method = evidence if run.config.label_method == "auto" else _CONFIGURED
    switches = f"dense CRF {'on' if segmenter.use_crf else 'off'}, mirror image {'on' if segmenter.mirror else 'off'}"
    yield from _table(
        ("parameter", "value", "chosen by"),
        [
            ("`score_thresholds`", scores, "the best F1 against the image-level labels trained on"),
            ("`label_method`", parameters.label_method, method),
            ("`segmenter_label`", switches, _CONFIGURED),
            ("`segmenter_label.background_ratio`", f"{segmenter.background_ratio:.3g}", balance),
            ("`affinity_labels`", *certainty),
            ("`label.background`", f"{label.background:g}", background),
            ("`label.class_gain`", ", ".join(f"{name} {gain:g}" for name, gain in gains) or "none", found),
            ("`min_area`", f"{parameters.min_area:g}", _CONFIGURED),
        ],
    )
    yield ""
    yield f"Ground-truth masks: {_masks_used(run)}."


def _accuracy(run: RunRecord) -> Iterator[str]:
    if not run.rows:
        yield "Not measured: the data set has no masks."
        return
    yield "Intersection over union (IoU) in percent, after each stage."
    yield ""
    rows = [(row.stage, row.measured_on, f"{row.miou:.2f}", *map(_percent, row.iou)) for row in run.rows]
    yield from _table(("stage", "list", "mIoU", *run.classes), rows)
    if any(row.stage == SUPERVISED for row in run.rows):
        yield ""
        yield f'"{SUPERVISED}" is another network, trained on masks for comparison. It is not in this bundle.'


def _failures(run: RunRecord, given: str) -> Iterator[str]:
    measured = _measured(run)
    if measured:
        ious = [(iou, name) for iou, name in zip(measured.iou, run.classes, strict=True) if iou is not None]
        lowest = ", ".join(f"{name} {iou:.1f} %" for iou, name in sorted(ious)[:2])
        yield f"- Lowest IoU on the list {measured.measured_on}: {lowest}."
    if given.strip():
        yield from ("", given.strip()) if measured else (given.strip(),)
    elif not measured:
        yield "None recorded."


def _training(run: RunRecord) -> Iterator[str]:
    config = run.config
    networks: dict[str, ModelConfig] = {"Multi-SA CAM": config.cam, "AffinityNet": config.affinity}
    if config.relabel.rounds:
        networks["teacher"] = config.relabel.teacher
    networks["segmenter (DeepLabV3+)"] = config.segmenter
    rows = []
    for name, network in networks.items():
        plan = network.schedule
        numbers = (plan.epochs, plan.batch_size, plan.crop, f"{plan.learning_rate:g}")
        rows.append((name, network.backbone, network.weights, *map(str, numbers)))
    yield from _table(("network", "backbone", "weights", "epochs", "batch", "crop", "learning rate"), rows)
    yield ""
    if config.relabel.rounds:
        yield f"The teacher labels the images again, {pluralize(config.relabel.rounds, 'time')}."
        yield ""
    yield (
        f"Networks see images at a long side of {config.long_side} pixels, enlarged at most {MAX_ENLARGEMENT:g} times; "
        f"the seed is {config.seed}. All stages took "
        f"{run.seconds / 60:.0f} minutes with torch {run.torch} on {run.threads} threads. `provenance.config` in "
        "bundle.json has every number."
    )


def _files(files: Mapping[str, bytes]) -> Iterator[str]:
    yield from _table(("file", "size"), [(f"`{name}`", _size(len(data))) for name, data in sorted(files.items())])
    yield ""
    yield "bundle.json lists graphs of other precisions, which `multisa convert` adds; parity.json compares them."


def _licences(files: Mapping[str, bytes], origins: Sequence[Origin]) -> Iterator[str]:
    if origins:
        yield from _table(("licence", "of"), [(origin.licence, origin.work) for origin in origins])
        yield ""
    texts = [f"`{name}`" for name in sorted(files) if name.startswith(("NOTICE", "LICEN"))]
    yield f"Texts: {', '.join(texts)}." if texts else "No licence was given with the networks."


def _measured(run: RunRecord) -> Row | None:
    """The figures of the segmenter on the list val; without that list, of the last pseudo-masks."""
    return next((row for row in run.rows if row.stage == SEGMENTER), run.rows[-1] if run.rows else None)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:.1f} kB"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
