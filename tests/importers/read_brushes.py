"""Print what Label Studio's own decoder reads of our tasks: {image: {label: digest}}. FILE

Stops where its encoder would have written another code.

The SDK's package loads all of its client; its decoder is one module that needs NumPy and Pillow.
"""

import hashlib
import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

name = "label_studio_sdk/converter/brush.py"
spec = importlib.util.spec_from_file_location("brush", metadata.distribution("label-studio-sdk").locate_file(name))
brush = importlib.util.module_from_spec(spec)
spec.loader.exec_module(brush)

tasks = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
found = {}
for task in tasks:
    (prediction,) = task["predictions"]
    masks = found[task["data"]["image"]] = {}
    for result in prediction["result"]:
        value = result["value"]
        # As the converter passes it on: the fields of the value beside those of the result.
        (layer,) = brush.decode_from_annotation("tag", [{**result, **value}]).values()
        (label,) = value["brushlabels"]
        masks[label] = hashlib.sha256(repr(layer.shape).encode() + np.packbits(layer != 0).tobytes()).hexdigest()
        assert set(np.unique(layer)) <= {0, 255}
        assert brush.mask2rle(layer) == value["rle"], "another code than Label Studio's own"
print(json.dumps(found))
