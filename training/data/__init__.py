"""Read data sets: VOC's layout, COCO's, or a folder of images with labels, and what else a val list names.

dataset = read_dataset(Path("VOC2012"))
dataset = read_dataset(Path("photos"), labels=Path("cvat.zip"), val=Path("val.txt"))
"""

from dataclasses import replace
from pathlib import Path

from multisa.runtime.errors import DatasetError
from multisa.training.data.dataset import (
    VOC_CLASSES,
    Dataset,
    Finding,
    Item,
    log_findings,
    make_finding,
    read_class_names,
    read_working_image,
    spread,
)
from multisa.training.data.folder import read_folder, read_val_folder
from multisa.training.data.voc import read_voc

__all__ = [
    "VOC_CLASSES",
    "Dataset",
    "Finding",
    "Item",
    "log_findings",
    "read_class_names",
    "read_dataset",
    "read_working_image",
    "spread",
]


def read_dataset(root: Path, labels: Path | None = None, val: Path | None = None, *, quiet: bool = False) -> Dataset:
    """Read a data set folder.

    VOC layout: JPEGImages/ (one image per name, of any extension), ImageSets/Segmentation/{train_aug,train,val}.txt,
    SegmentationClass/*.png (only measured against), and image-level labels from labels.json, labels.csv or
    Annotations/*.xml, in that order. train_aug.txt or trainaug.txt lists the images to train on; without it train.txt
    does. SegmentationClassAug/*.png (SBD) has the masks that SegmentationClass lacks.

    COCO layout: annotations/instances_train*.json and instances_val*.json, images below the folder.

    Otherwise: a plain folder of images with labels.json or labels.csv. All images are trained on. With images/ and
    masks/ in it, masks/x/a.png is the mask of images/x/a.jpg, only measured against.

    labels: replaces the data set's own label file; also annotations (training/annotations), whose masks are measured
    against. val: the images to measure the segmenter on, in place of the data set's own: a list of names (.txt) or
    annotations of images of the data set, which are then not trained on, or another folder with images/ and masks/.
    Class names come from classes.txt, one per line, background first; without that file they are VOC's in VOC layout,
    and the categories in COCO's. Text files are UTF-8. Every label, row and image is used, or is in `findings`, which
    are logged unless `quiet`. Raises DatasetError for anything missing or inconsistent and where no image has a label,
    UsageError for a label file or val list that cannot be used.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: not a folder; expected a data set in VOC layout or a folder of images")
    separate = val if val and (val / "images").is_dir() else None
    read = read_voc if (root / "JPEGImages").is_dir() else read_folder
    dataset = read(root, labels, None if separate else val)
    if separate:
        on_val, findings = read_val_folder(separate, dataset.class_names)
        findings.append(make_finding("image", f"of its own val list, not used, but {separate}", _ids(dataset.val)))
        used = (finding for finding in findings if finding.names)
        dataset = replace(dataset, val=on_val, findings=(*dataset.findings, *used))
    if not quiet:
        log_findings(dataset.findings)
    return dataset


def _ids(items: tuple[Item, ...]) -> list[str]:
    return [item.id for item in items]
