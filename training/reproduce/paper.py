"""The paper's results that ours are shown beside, in percent of mIoU, by table.

Yaganapu and Kang, Multi-layered self-attention mechanism for weakly supervised semantic segmentation. This
module imports nothing, so that code which only prints the numbers does not load torch.
"""

# The paper's data: VOC 2012, 20 classes and background; trained on SBD with image-level labels.
CLASSES = 21
TRAINED_ON = 10582  # images
TRAIN = 1464  # images
VAL = 1449  # images

# Names of the backbones in the paper -> in timm.
BACKBONES = {"ResNet-50": "resnet50", "ResNeSt-101": "resnest101e"}

# Table 1, ResNet-50, train: without self-attention, then with one, two and three of them.
TABLE1_BACKBONE = "ResNet-50"
TABLE1 = (46.30, 47.60, 47.01, 47.93)

# Table 2, ResNeSt-101, train: by the names of our rows (training/run_record.py).
TABLE2_BACKBONE = "ResNeSt-101"
TABLE2 = {"CAM, k = 0": 50.64, "Multi-SA CAM": 51.49, "+ random walk": 67.54, "+ dense CRF": 68.07}

# Table 3, val. The names of the classes are the paper's own.
TABLE3_BACKBONE = "ResNeSt-101"
TABLE3_CLASSES = (
    "bkg", "aero", "bike", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "table", "dog", "horse", "mbk", "person", "plant", "sheep", "sofa", "train", "tv",
)  # fmt: skip
MULTI_SA = "Multi-SA"
TABLE3 = {
    MULTI_SA: (89.6, 83.1, 35.5, 84.2, 69.0, 59.1, 86.1, 80.9, 88.4, 30.0, 87.1,
               58.5, 80.9, 82.1, 79.2, 79.6, 54.7, 86.0, 53.6, 55.8, 41.0),
    "AdvCAM": (90.0, 79.8, 34.1, 82.6, 63.3, 70.5, 89.4, 76.0, 87.3, 31.4, 81.3,
               33.1, 82.5, 80.8, 74.0, 72.9, 50.3, 82.3, 42.2, 74.1, 52.9),
    "Puzzle-CAM": (88.3, 82.0, 35.0, 87.9, 63.5, 75.4, 87.3, 77.4, 93.2, 28.4, 86.6,
                   28.4, 89.2, 82.8, 78.5, 32.2, 57.0, 84.5, 37.9, 69.0, 41.4),
    "SC-CAM": (88.8, 51.6, 30.3, 82.9, 53.0, 75.8, 88.6, 74.8, 86.6, 32.4, 79.9,
               53.8, 82.3, 78.5, 70.4, 71.2, 40.2, 78.3, 42.9, 66.8, 58.8),
    "FickleNet": (89.5, 76.6, 32.6, 74.6, 51.5, 71.1, 83.4, 74.4, 83.6, 24.1, 73.4,
                  47.4, 78.2, 74.0, 68.8, 73.2, 47.8, 79.9, 37.0, 57.3, 64.6),
    "SEAM": (88.8, 68.5, 33.3, 85.7, 40.4, 67.3, 78.9, 76.3, 81.9, 29.1, 75.5,
             48.1, 79.9, 73.8, 71.4, 75.2, 48.9, 79.8, 40.9, 58.2, 53.0),
    "AffinityNet": (88.2, 68.2, 30.6, 81.1, 49.6, 61.0, 77.8, 66.1, 75.1, 29.0, 66.0,
                    40.2, 80.4, 62.0, 70.4, 73.7, 42.5, 70.7, 42.6, 68.1, 51.6),
}  # fmt: skip
TABLE3_MIOU = dict(zip(TABLE3, (69.7, 68.1, 66.9, 66.1, 64.9, 64.5, 61.7), strict=True))

# The weights of the self-attentions of ResNeSt-101's last three blocks (section 3.5).
BETAS = (0.034, 0.142, -0.351)

# Other spellings of the paper's names: those of VOC, of COCO, and short ones.
_SPELLINGS = {
    "bkg": ("background", "bg"),
    "aero": ("aeroplane", "airplane", "plane"),
    "bike": ("bicycle",),
    "table": ("diningtable",),
    "mbk": ("motorbike", "motorcycle", "mbike"),
    "plant": ("pottedplant",),
    "sofa": ("couch",),
    "tv": ("tvmonitor", "television"),
}


def paper_class(name: str) -> str | None:
    """The paper's name of a class, whatever its spelling; None for a class that the paper does not have."""
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    return next((known for known in TABLE3_CLASSES if plain in (known, *_SPELLINGS.get(known, ()))), None)


def table3_figure(method: str, name: str) -> float | None:
    """IoU of a class, by any spelling of its name, in the row `method` of Table 3; None if it has none."""
    known = paper_class(name)
    return None if known is None else TABLE3[method][TABLE3_CLASSES.index(known)]
