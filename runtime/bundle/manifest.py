"""The schema of bundle.json as frozen dataclasses, with the checks that types cannot express."""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from multisa.kernels import CrfParameters
from multisa.runtime.imaging.decode import MINIMUM_SIDE
from multisa.runtime.imaging.png import IGNORE_INDEX, voc_palette
from multisa.runtime.records import record_from_dict

SCHEMA_VERSION = 2
MANIFEST_NAME = "bundle.json"
GRAPH_NAMES = ("cam.onnx", "affinity.onnx", "segmenter.onnx")
BACKGROUND = "background"

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# Far above any recipe; a longer walk takes minutes or gigabytes for one image.
MAX_WALK_RADIUS = 32
MAX_WALK_STEPS = 65536


# How `multisa label` makes masks from image-level labels: with the segmenter, restricted to the labels, or with class
# activation maps, AffinityNet and the random walk.
LabelMethod = Literal["segmenter", "walk"]


@dataclass(frozen=True)
class SegmenterLabelParameters:
    """The parameters between the segmenter's probabilities and a pseudo-mask (method "segmenter")."""

    mirror: bool = False  # average the probabilities of the image and of its mirror image
    # Where image-level labels are given, the probability of the background is divided by this before they compete.
    background_ratio: float = 1.0
    use_crf: bool = True
    crf: CrfParameters = field(default_factory=CrfParameters)

    def __post_init__(self) -> None:
        if not 1e-3 <= self.background_ratio <= 1e3:
            raise ValueError(f"background_ratio: got {self.background_ratio}, expected a number within 0.001..1000")


@dataclass(frozen=True)
class LabelParameters:
    """The parameters between cam, affinity and a pseudo-mask (method "walk")."""

    walk_radius: int = 5
    walk_beta: float = 8.0
    walk_steps: int = 256
    # Divide the walked maps by their single highest value (irn, PuzzleCAM), or keep them as averages (psa). A
    # pixel enclosed by edges keeps its score and determines that value for the whole image.
    walk_to_peak: bool = True
    background: float = 0.3  # constant score of the background class
    # Factor on the walked map of each foreground class, in the order of the classes; empty: all 1.
    class_gain: tuple[float, ...] = ()
    use_crf: bool = True
    crf: CrfParameters = field(default_factory=CrfParameters)

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value out of its range."""
        rules = (
            ("walk_radius", 2 <= self.walk_radius <= MAX_WALK_RADIUS, f"2..{MAX_WALK_RADIUS}"),
            ("walk_beta", 0 < self.walk_beta < math.inf, "a finite number above 0"),
            ("walk_steps", 0 <= self.walk_steps <= MAX_WALK_STEPS, f"0..{MAX_WALK_STEPS}"),
            # At 0, a pixel where no class scores would have no class; at 1, no class could win.
            ("background", 0 < self.background < 1, "a number above 0 and below 1"),
            ("class_gain", all(0 < gain < math.inf for gain in self.class_gain), "finite numbers above 0"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {expected}")


@dataclass(frozen=True)
class FileEntry:
    """Digest and size of a file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class BundleParameters:
    """The parameters of the runtime besides the graphs."""

    long_side: int  # pixels; images are resized to this for the networks (`working_size`)
    cam_scales: tuple[float, ...]  # the scales fused inside cam.onnx
    walk_stride: int  # stride of affinity.onnx
    label_method: LabelMethod  # the default of `multisa label`
    label: LabelParameters
    segmenter_label: SegmenterLabelParameters
    # Connected parts of a mask with a smaller share of the image take the class around them; 0 keeps every part.
    min_area: float
    score_thresholds: dict[str, float]  # class -> lowest score at which it counts as present


@dataclass(frozen=True)
class Manifest:
    """bundle.json. Every key is required and no other key is allowed."""

    schema_version: int
    name: str
    classes: tuple[str, ...]  # "background" first
    palette: tuple[tuple[int, int, int], ...]  # one colour for each class
    ignore_index: int
    parameters: BundleParameters
    preprocessing: tuple[str, ...]  # the steps of preprocessing, in order, as text
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    files: dict[str, FileEntry]

    @property
    def foreground(self) -> tuple[str, ...]:
        """The classes without the background; map c of cam.onnx is `foreground[c]`, id c + 1."""
        return self.classes[1:]

    def mask_palette(self) -> npt.NDArray[np.uint8]:
        """Return the colours of mask files, uint8 [256, 3]: the bundle's, and VOC's for unused ids."""
        colours = voc_palette()
        colours[: len(self.palette)] = self.palette
        return colours


def manifest_from_json(text: str) -> Manifest:
    """Parse and check bundle.json. Raises ValueError that names the key, the value and what is expected."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply, expected the nesting that `multisa export` writes") from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    # Check this first: the keys of another version differ, which would give a puzzling message.
    if isinstance(value, dict) and "schema_version" in value and version != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version: got {version!r}, expected {SCHEMA_VERSION}: "
            "export the bundle again with this version of multisa"
        )
    manifest = record_from_dict(Manifest, value, complete=True)
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Check what types cannot express. Raises ValueError that names the key and what is expected."""
    classes = manifest.classes
    palette = manifest.palette
    files = sorted(manifest.files)
    parameters = manifest.parameters
    long_side = parameters.long_side
    thresholds = parameters.score_thresholds
    names = sorted(classes[1:])
    gains = len(parameters.label.class_gain)
    bad_names = [name for name in files if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST_NAME]
    has_background = len(classes) >= 2 and classes[0] == BACKGROUND and all(classes)
    in_range = all(0 <= channel <= 255 for colour in palette for channel in colour)
    are_shares = all(0 <= threshold <= 1 for threshold in thresholds.values())
    colours = f"{len(palette)} colours"
    rules = (
        ("classes", has_background, list(classes), f"{BACKGROUND!r} and then at least one class"),
        ("classes", len(set(classes)) == len(classes), list(classes), "each class once"),
        ("classes", len(classes) <= 255, len(classes), "at most 255 (ids have 8 bits)"),
        ("palette", len(palette) == len(classes), colours, f"one per class ({len(classes)})"),
        ("palette", in_range, palette, "channels within 0..255"),
        ("ignore_index", manifest.ignore_index == IGNORE_INDEX, manifest.ignore_index, str(IGNORE_INDEX)),
        ("parameters.long_side", long_side >= MINIMUM_SIDE, long_side, f">= {MINIMUM_SIDE}"),
        ("parameters.min_area", 0 <= parameters.min_area < 1, parameters.min_area, "a share from 0, below 1"),
        ("parameters.walk_stride", parameters.walk_stride >= 1, parameters.walk_stride, ">= 1"),
        ("parameters.score_thresholds", sorted(thresholds) == names, sorted(thresholds), str(names)),
        ("parameters.score_thresholds", are_shares, thresholds, "values within 0..1"),
        ("parameters.label.class_gain", gains in (0, len(names)), f"{gains} numbers", f"{len(names)} or none"),
        ("files", not bad_names, bad_names, "plain file names inside the folder"),
        ("files", set(GRAPH_NAMES) <= set(files), files, f"{', '.join(GRAPH_NAMES)} among them"),
    )
    for key, holds, got, expected in rules:
        if not holds:
            raise ValueError(f"{key}: got {got}, expected {expected}")


def manifest_to_json(manifest: Manifest) -> str:
    """Serialise bundle.json, indented and with a final newline."""
    return json.dumps(asdict(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _refuse_constant(text: str) -> float:
    raise ValueError(f"got {text}, expected a finite number")
