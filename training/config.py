"""Every number of a training run: frozen dataclasses, read from TOML and changed by overrides."""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from multisa.kernels import CrfParameters
from multisa.runtime.bundle import LabelParameters, SegmenterLabelParameters
from multisa.runtime.bundle.manifest import MAX_WALK_RADIUS
from multisa.runtime.errors import UsageError
from multisa.runtime.files import read_user_text
from multisa.runtime.imaging.decode import MINIMUM_SIDE
from multisa.runtime.records import record_from_dict
from multisa.training.transforms import parse_transform

MAX_SEED = 2**32 - 1

# Between the background score of the maps and the scores of certain foreground and background: ReCAM's authors
# advise 0.10 to 0.15 above and 0.10 below.
AFFINITY_MARGIN = 0.12


@dataclass(frozen=True)
class Schedule:
    """How one network is trained: SGD with the poly schedule lr * (1 - t / T) ** power, set at every step."""

    epochs: int = 10
    batch_size: int = 16
    crop: int = 256  # pixels, square
    resize: tuple[int, int] = (256, 448)  # pixels; the long side is drawn uniformly from this range
    learning_rate: float = 0.01  # of the backbone
    new_layers_factor: float = 10.0  # learning rate of the new layers relative to the backbone's
    # A real momentum. (The optimiser of irn and PuzzleCAM passes its weight decay to SGD as the momentum;
    # their learning rate of 0.1 then corresponds to about 0.01 with a momentum of 0.9.)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    poly_power: float = 0.9
    clip_norm: float = 10.0  # gradients of a larger norm are scaled down to it
    freeze_batch_norm: bool = True  # keep the running statistics (irn, psa); scale and shift are trained
    frozen_levels: int = 0  # levels of the backbone that keep their weights, the finest first
    colour_jitter: float = 0.0  # brightness, contrast and saturation are multiplied by up to 1 +- this
    augment: tuple[str, ...] | str = ()  # more: ["RandomGrayscale(p=0.1)", ..] or "module:function" (transforms.py)
    # Decay per step of the moving average of the weights, which is what the checkpoint holds in the end; 0: none.
    ema: float = 0.0

    def __post_init__(self) -> None:
        _expect(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _expect(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _expect(self.crop >= MINIMUM_SIDE, "crop", self.crop, f"at least {MINIMUM_SIDE}")
        _expect(1 <= self.resize[0] <= self.resize[1], "resize", self.resize, "an ascending range from 1")
        for name in ("learning_rate", "new_layers_factor"):
            _expect(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a finite number above 0")
        for name in ("weight_decay", "poly_power"):
            _expect(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a finite number from 0")
        for name in ("momentum", "colour_jitter", "ema"):
            _expect(0 <= getattr(self, name) < 1, name, getattr(self, name), "within 0..1, below 1")
        entries = (self.augment,) if isinstance(self.augment, str) else self.augment
        object.__setattr__(self, "augment", tuple(entry for entry in entries if entry))
        for entry in self.augment:
            try:
                parse_transform(entry)
            except ValueError as error:
                raise ValueError(f"augment: {error}") from error
        _expect(self.frozen_levels >= 0, "frozen_levels", self.frozen_levels, "at least 0")
        _expect(self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0")


@dataclass(frozen=True)
class CamConfig:
    """The Multi-SA network and its inference."""

    backbone: str = "tf_efficientnet_lite0"
    weights: str = "packaged"  # or "timm", "none" (random), or the path of a file (weights.py)
    # Levels of the backbone, finest first; k = len(taps). None: the last levels from stride 8 on, three at most,
    # which `with_taps` of models.py finds.
    taps: tuple[int, ...] | None = None
    scales: tuple[float, ...] = (0.5, 1.0, 1.5)  # multiples of 1/16, so that sizes in the graph are exact
    # Learning rate of the betas relative to the backbone's. Each is a single number that must move from 0 to
    # a few tenths. At a fifth of this factor they hardly leave 0 and the attention behind them hardly learns;
    # at three times the factor they reach 0.6 and the maps spread over the surroundings.
    beta_factor: float = 10.0
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        _expect(0 < self.beta_factor < math.inf, "beta_factor", self.beta_factor, "a finite number above 0")
        taps = self.taps or ()
        ordered = list(taps) == sorted(set(taps)) and min(taps, default=0) >= 0
        _expect(ordered, "taps", self.taps, "ascending levels of the backbone, from 0")
        _expect_scales(self.scales)


@dataclass(frozen=True)
class AffinityLabelConfig:
    """From class activation maps to the labels of AffinityNet (irn): two dense CRFs on hard labels."""

    # Background scores: only certain foreground exceeds `foreground`, even weak activations exceed `background`.
    # None: AFFINITY_MARGIN above and below the score that Yen's criterion finds for the maps.
    foreground: float | None = None
    background: float | None = None
    confidence: float = 0.7  # probability given to the hard label
    crf: CrfParameters = field(default_factory=lambda: CrfParameters(bilateral_sxy=50.0, bilateral_srgb=5.0))

    def __post_init__(self) -> None:
        both = (self.foreground, self.background)
        if self.foreground is not None and self.background is not None:
            _expect(0 < self.foreground < 1, "foreground", self.foreground, "above 0 and below 1")
            below = f"above 0 and below foreground, {self.foreground}"
            _expect(0 < self.background < self.foreground, "background", self.background, below)
        else:
            _expect(both == (None, None), "foreground, background", both, "both, or neither")
        _expect(0 < self.confidence < 1, "confidence", self.confidence, "above 0 and below 1")


@dataclass(frozen=True)
class AffinityConfig:
    """AffinityNet: semantic features (Ahn & Kwak 2018) or class boundaries (irn)."""

    backbone: str = "tf_efficientnet_lite0"
    weights: str = "packaged"
    head: Literal["features", "boundary"] = "boundary"
    training_radius: int = 5  # grid cells; the loss covers pairs closer than this
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        within = 2 <= self.training_radius <= MAX_WALK_RADIUS
        _expect(within, "training_radius", self.training_radius, f"2..{MAX_WALK_RADIUS}")


@dataclass(frozen=True)
class SegmenterConfig:
    """DeepLabV3+."""

    backbone: str = "tf_efficientnet_lite0"
    weights: str = "packaged"
    # Start from the backbone of the trained CAM network, which knows the classes, instead of `weights`.
    start_from_cam: bool = False
    decoder_channels: int = 128
    atrous_rates: tuple[int, ...] = (6, 12, 18)
    dropout: float = 0.1
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        _expect(self.decoder_channels >= 1, "decoder_channels", self.decoder_channels, "at least 1")
        _expect(min(self.atrous_rates, default=1) >= 1, "atrous_rates", self.atrous_rates, "each at least 1")
        _expect(0 <= self.dropout < 1, "dropout", self.dropout, "within 0..1, below 1")


@dataclass(frozen=True)
class RelabelConfig:
    """Rounds: a segmenter labels the images it was trained on again, and the next segmenter learns from that.

    The labels of a round are the segmenter's probabilities, averaged over scales and mirror images, restricted to the
    image-level labels and refined with the dense CRF.
    """

    rounds: int = 0  # 0: the segmenter is trained on the pseudo-masks of the random walk
    scales: tuple[float, ...] = (0.75, 1.0, 1.25)  # of the working size, multiples of 1/16
    mirror: bool = True
    # The next segmenter learns from soft targets: this share of the probabilities after the dense CRF, the rest
    # from before it, where they are less certain of themselves.
    crf_share: float = 0.5
    teacher: SegmenterConfig = field(default_factory=SegmenterConfig)  # of every round

    def __post_init__(self) -> None:
        _expect(self.rounds >= 0, "rounds", self.rounds, "at least 0")
        _expect(0 <= self.crf_share <= 1, "crf_share", self.crf_share, "within 0..1")
        _expect_scales(self.scales)


@dataclass(frozen=True)
class ExecutionConfig:
    """How training uses the hardware: the losses and the batches of every network are the same with all of these."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of layers while training; weights and losses stay fp32
    accumulate: int = 1  # a process computes its share of a batch in this many parts: less memory
    # Batch norms that are trained take the statistics of all processes, or each those of its own samples.
    batch_norm: Literal["synchronised", "local"] = "synchronised"
    checkpoint_attention: bool = False  # compute self-attention again for its gradient instead of storing it
    compile: bool = False  # the backbone, with torch.compile

    def __post_init__(self) -> None:
        _expect(self.accumulate >= 1, "accumulate", self.accumulate, "at least 1")

    def identity(self, *, has_trained_norms: bool) -> dict[str, Any]:
        """What changes a trained network by more than rounding and is not the default: inputs of its stage.

        has_trained_norms: whether the network has batch norms that compute statistics of what they get, so that it
        matters which samples they get together.
        """
        names = ("precision", "accumulate", "batch_norm") if has_trained_norms else ("precision",)
        default = ExecutionConfig()
        changed = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}
        return {"execution": changed} if changed else {}


@dataclass(frozen=True)
class TrainConfig:
    """One run of the whole pipeline; `load_config` reads it."""

    name: str = "multisa"
    seed: int = 0
    # Folder of a bundle whose networks the networks of this run start from (start.py); "": from `weights`.
    init_from: str = ""
    # Processes that load samples while training; threads per stage that works on images. For each of --devices.
    workers: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where torch has it
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    long_side: int = 512  # pixels; images are resized to this when they are read (`working_size`)
    # Also measure the rows of the paper that the run itself does not need: the plain CAM (k = 0), and pseudo-masks
    # by the paper's protocol.
    paper_rows: bool = False
    supervised: bool = False  # also train the segmenter on the masks of the train list, the upper bound
    # Also train the deployed segmenter, and the supervised one, with these seeds, to see how far the results vary.
    more_seeds: tuple[int, ...] = ()
    # Where the background score of the walk's pseudo-masks comes from: Yen's criterion, which also gives each class
    # a gain and needs no masks; `label.background`; or the score whose masks have the highest mIoU on the train
    # list (the paper's protocol). Checkpoints are never selected: the last epoch's is used.
    background_from: Literal["yen", "config", "train-masks"] = "yen"
    # Where image-level labels are given, divide a segmenter's probability of the background by how much more frequent
    # than the foreground it was in the labels it learned from (balance.py).
    balance_background: bool = True
    cam: CamConfig = field(default_factory=CamConfig)
    affinity_labels: AffinityLabelConfig = field(default_factory=AffinityLabelConfig)
    affinity: AffinityConfig = field(default_factory=AffinityConfig)
    label: LabelParameters = field(default_factory=LabelParameters)
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)  # the one that is deployed
    relabel: RelabelConfig = field(default_factory=RelabelConfig)
    # How `multisa label` of the bundle makes masks; "auto": as export finds best without masks.
    label_method: Literal["auto", "segmenter", "walk"] = "auto"
    segmenter_label: SegmenterLabelParameters = field(default_factory=SegmenterLabelParameters)
    min_area: float = 0.0005  # share of the image; smaller connected parts of a mask take the class around them
    # To watch a training; these two change no result and are in no digest.
    val_every: int = 0  # measure segmenters on the val list after this many epochs; 0: only at the end
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()  # where metrics go beside metrics.csv

    def __post_init__(self) -> None:
        _expect(self.workers >= 1, "workers", self.workers, "at least 1")
        _expect(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0..{MAX_SEED}")
        seeds = (self.seed, *self.more_seeds)
        differ = len(set(seeds)) == len(seeds) and all(0 <= seed <= MAX_SEED for seed in seeds)
        _expect(differ, "more_seeds", self.more_seeds, f"numbers within 0..{MAX_SEED} that differ from seed, each once")
        _expect(self.long_side >= MINIMUM_SIDE, "long_side", self.long_side, f"at least {MINIMUM_SIDE}")
        _expect(self.val_every >= 0, "val_every", self.val_every, "a number of epochs, or 0")
        _expect(0 <= self.min_area < 1, "min_area", self.min_area, "a share from 0, below 1")
        for where, part in self.segmenters().items():
            if part.start_from_cam and part.backbone != self.cam.backbone:
                raise ValueError(
                    f"{where}.backbone: got {part.backbone}, expected cam.backbone, {self.cam.backbone}, because "
                    f"{where}.start_from_cam is true; make the two equal, or set it to false"
                )

    def segmenters(self) -> "dict[str, SegmenterConfig]":
        """The segmenters that this run trains, by their key: the teacher only if there are rounds."""
        teacher = {"relabel.teacher": self.relabel.teacher} if self.relabel.rounds else {}
        return {"segmenter": self.segmenter, **teacher}

    def networks(self) -> "dict[str, CamConfig | AffinityConfig | SegmenterConfig]":
        """All networks that this run trains, by their key."""
        return {"cam": self.cam, "affinity": self.affinity, **self.segmenters()}

    def with_paper_masks(self) -> "TrainConfig":
        """The same with the paper's pseudo-masks: dense CRF, one background score, chosen on the train masks."""
        label = replace(self.label, class_gain=(), use_crf=True)
        return replace(self, background_from="train-masks", label=label)


def preset_names() -> list[str]:
    """Names of the presets in the package, sorted."""
    folder = resources.files("multisa.training.presets")
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_config(preset: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a preset by name, or a UTF-8 TOML file by path, and apply overrides like "cam.schedule.epochs=4".

    Keys that the file leaves out have the defaults of `TrainConfig`. Raises UsageError for an unknown preset
    or key, a value of the wrong type or out of range, and a file that is not UTF-8 or not TOML.
    """
    path = Path(preset)
    if preset in preset_names():
        text = (resources.files("multisa.training.presets") / f"{preset}.toml").read_text(encoding="utf-8")
    elif path.suffix == ".toml" and path.is_file():
        text = read_user_text(path)
    else:
        raise UsageError(f"preset {preset!r}: expected one of {', '.join(preset_names())}, or a .toml file")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{preset}: not valid TOML: {error}") from error
    for override in overrides:
        _apply(values, override)
    try:
        return record_from_dict(TrainConfig, values, where=preset)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise UsageError(f"override {override!r}: expected KEY=VALUE, for example cam.schedule.epochs=4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *tables, name = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UsageError(f"override {override!r}: {table} is a value, not a table")
    values[name] = value


def _expect_scales(scales: tuple[float, ...]) -> None:
    exact = all(scale > 0 and (scale * 16).is_integer() for scale in scales)
    _expect(bool(scales) and exact, "scales", scales, "one or more multiples of 1/16")


def _expect(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {got}, expected {expected}")
