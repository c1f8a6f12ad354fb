"""Print what Datumaro reads of a folder: {item: {label: digest of its mask}}. FORMAT FOLDER"""

import hashlib
import json
import sys

import numpy as np
from datumaro.components.annotation import AnnotationType
from datumaro.components.dataset import Dataset


def digest(mask: np.ndarray) -> str:
    return hashlib.sha256(repr(mask.shape).encode() + np.packbits(mask != 0).tobytes()).hexdigest()


dataset = Dataset.import_from(sys.argv[2], sys.argv[1])
labels = [label.name for label in dataset.categories()[AnnotationType.label]]
found = {}
for item in dataset:
    # COCO's boxes are annotations of their own.
    masks = [annotation for annotation in item.annotations if annotation.type == AnnotationType.mask]
    found[item.id] = {labels[mask.label]: digest(mask.image) for mask in masks}
print(json.dumps({"labels": labels, "items": found}))
