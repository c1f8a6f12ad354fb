"""The parity gate: how far a graph's outputs may be from its reference's, and how far they are.

Outputs are compared elementwise, as labels, and against ground truth. The reference is PyTorch in
`multisa export`, and the bundle's fp32 graphs on ONNX Runtime in `multisa convert` and `multisa parity`. A
figure passes only if it is known to be within its limit: NaN fails.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from multisa.runtime.errors import ParityError, UsageError
from multisa.runtime.evaluation import confusion_matrix, mean_iou
from multisa.runtime.imaging.png import IGNORE_INDEX, UInt8
from multisa.runtime.progress import pluralize

Array = npt.NDArray[np.generic]
Outputs = dict[str, Array]

# Confidence, in 255ths, from which a pixel is confident: the winning class has a probability of at least
# 0.55, the next one at most 0.45, so rounding alone should not exchange them.
CONFIDENT = round(0.55 * 255)
# Messages about figures beyond their limits; `limit` is a Limit, all other names are figures.
BREACHES = {
    "count": "no value was compared on {images}; give other images: cam is compared on the classes they show",
    "not_finite": "{not_finite} values are not finite",
    "max_error": "largest difference {max_error:.3g}, allowed {limit.max_error:g}",
    "mean_error": "mean difference {mean_error:.3g}, allowed {limit.mean_error:g}",
    "agreement": "{agreement:.4%} of the labels agree, needed {limit.agreement:.2%}",
    "confident_agreement": "{confident_agreement:.4%} of the labels of confident pixels agree, "
    "needed {limit.confident_agreement:.2%}",
    "miou_loss": "mIoU {miou:.2f}, the reference's {miou_reference:.2f}, allowed loss {limit.miou_loss:g}",
}
# Mask -> its confidence, 0..255; output_masks.py makes them from the graphs' outputs.
CONFIDENCE = {
    "labels": "confidence",
    "pseudo_mask": "pseudo_mask_confidence",  # from cam and affinity
    "segmenter_pseudo_mask": "segmenter_pseudo_mask_confidence",
}


@dataclass(frozen=True)
class Limit:
    """The largest difference allowed for one output; None where a figure does not apply."""

    max_error: float | None = None
    mean_error: float | None = None
    agreement: float | None = None  # smallest share of equal labels
    confident_agreement: float | None = None  # the same among confident pixels
    miou_loss: float | None = None  # points of mIoU, where there is ground truth

    def given(self) -> dict[str, float]:
        """The figures that apply, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


# The only table of tolerances, by the precision of the graph that is compared. The dense CRF makes nearly all
# pixels of a pseudo-mask confident, those along boundaries too, where rounding decides.
LIMITS: dict[str, dict[str, Limit]] = {
    # Weights are stored as float16 (relative rounding 5e-4), sums are float32.
    "fp32": {
        "cam": Limit(max_error=0.05, mean_error=2e-3),
        "scores": Limit(max_error=0.01),
        "affinity": Limit(max_error=0.1, mean_error=2e-3),
        "probabilities": Limit(mean_error=1e-3),
        "labels": Limit(agreement=0.999, confident_agreement=0.9995, miou_loss=0.05),
        "confidence": Limit(mean_error=1.0),  # of 255
        "pseudo_mask": Limit(agreement=0.998, confident_agreement=0.999, miou_loss=0.1),
        "segmenter_pseudo_mask": Limit(agreement=0.998, confident_agreement=0.998, miou_loss=0.1),
    },
    # The backend runs the fp32 graph and rounds each value between two nodes to 8 bits.
    "bf16": {
        "probabilities": Limit(mean_error=5e-3),
        "labels": Limit(agreement=0.99, confident_agreement=0.999, miou_loss=0.2),
        "confidence": Limit(mean_error=2.5),
        "segmenter_pseudo_mask": Limit(agreement=0.99, confident_agreement=0.99, miou_loss=0.2),
    },
    # Each value between two nodes is rounded to 11 bits.
    "fp16": {
        "cam": Limit(max_error=0.1, mean_error=3e-3),
        "scores": Limit(max_error=0.02),
        "affinity": Limit(max_error=0.1, mean_error=3e-3),
        "probabilities": Limit(mean_error=1e-3),
        "labels": Limit(agreement=0.998, confident_agreement=0.999, miou_loss=0.1),
        "confidence": Limit(mean_error=1.0),
        "pseudo_mask": Limit(agreement=0.997, confident_agreement=0.999, miou_loss=0.1),
        "segmenter_pseudo_mask": Limit(agreement=0.997, confident_agreement=0.998, miou_loss=0.1),
    },
    # Single labels may change, the mIoU may not.
    "int8": {
        "probabilities": Limit(mean_error=0.02),
        "labels": Limit(agreement=0.95, confident_agreement=0.98, miou_loss=0.5),
        "confidence": Limit(mean_error=8.0),
        "segmenter_pseudo_mask": Limit(agreement=0.95, confident_agreement=0.96, miou_loss=0.5),
    },
}


class Compared(NamedTuple):
    """Outputs of reference and graph for one image, by name, with ground truth where it is known."""

    expected: Outputs
    got: Outputs
    truth: dict[str, UInt8] = {}  # noqa: RUF012  by output name, [H, W] class ids, 255 = not counted


@dataclass
class Difference:
    """Running comparison of one output over many images."""

    name: str
    limit: Limit
    images: int = 0
    max_error: float = 0.0
    total_error: float = 0.0
    equal: int = 0
    count: int = 0
    confident: int = 0  # confident pixels of the reference
    confident_equal: int = 0
    not_finite: int = 0  # values of either side that are NaN or infinite
    truths: int = 0  # images with ground truth
    confusions: list[npt.NDArray[np.int64]] = field(default_factory=list)  # of the reference and of the graph

    def add(self, reference: Array, answer: Array) -> None:
        """Count two arrays of one shape."""
        if reference.shape != answer.shape:
            raise ParityError(f"shapes differ: reference {reference.shape}, graph {answer.shape}")
        self.images += 1
        self.count += reference.size
        self.equal += int((reference == answer).sum())
        first, second = reference.astype(np.float64), answer.astype(np.float64)
        finite = np.isfinite(first) & np.isfinite(second)
        self.not_finite += int((~finite).sum())
        wide = np.abs(first[finite] - second[finite])
        self.max_error = max(self.max_error, float(wide.max(initial=0.0)))
        self.total_error += float(wide.sum())

    def add_confident(self, reference: Array, answer: Array, confidence: Array) -> None:
        """Compare labels at the confident pixels; confidence: the reference's, 0..255."""
        confident = np.asarray(confidence, np.float64) >= CONFIDENT
        self.confident += int(confident.sum())
        self.confident_equal += int(((reference == answer) & confident).sum())

    def add_truth(self, reference: UInt8, answer: UInt8, truth: UInt8, n_classes: int) -> None:
        """Count both against the ground truth, [H, W] each; labels of no class count as one extra class."""
        beyond = int(truth[truth != IGNORE_INDEX].max(initial=0))
        if beyond >= n_classes:
            raise UsageError(f"ground truth holds class {beyond}, expected 0..{n_classes - 1} or {IGNORE_INDEX}")
        counts = [
            confusion_matrix(np.minimum(labels, n_classes).astype(np.uint8), truth, n_classes + 1)
            for labels in (reference, answer)
        ]
        so_far = self.confusions or [np.zeros_like(count) for count in counts]
        self.confusions = [a + b for a, b in zip(so_far, counts, strict=True)]
        self.truths += 1

    def figures(self) -> dict[str, float]:
        """Each figure that applies, by the name of its limit; mIoU in points; NaN if nothing was measured."""
        if self.name not in CONFIDENCE:  # of labels, class ids, only equality means anything
            finite = self.count - self.not_finite
            return {
                "max_error": self.max_error if self.count else math.nan,
                "mean_error": self.total_error / finite if finite else math.nan,
            }
        found = {"agreement": self.equal / self.count if self.count else math.nan}
        if self.confident:
            found["confident_agreement"] = self.confident_equal / self.confident
        if self.truths:
            reference, answer = (100 * mean_iou(counts) for counts in self.confusions)
            found |= {"miou_reference": reference, "miou": answer, "miou_loss": reference - answer}
        return found

    def shares(self) -> dict[str, float]:
        """The share of its limit that each figure uses; infinite if values are missing or not finite."""
        if not self.count:
            return {"count": math.inf} if self.limit.given() else {}
        found = self.figures()
        shares = {"not_finite": math.inf} if self.not_finite else {}
        for name, allowed in self.limit.given().items():
            if name in found:
                missed = name.endswith("agreement")
                value = (1 - found[name]) / (1 - allowed) if missed else found[name] / allowed
                shares[name] = value if math.isfinite(value) else math.inf
        return shares

    def breaches(self) -> list[str]:
        """Messages about what exceeds the limit."""
        found = {**self.figures(), "not_finite": self.not_finite, "images": pluralize(self.images, "image")}
        exceeded = [key for key, share in self.shares().items() if not share <= 1]
        return [f"{self.name}: {BREACHES[key].format(**found, limit=self.limit)}" for key in exceeded]

    def rows(self) -> Iterator[tuple[str, float, float, bool]]:
        """Name, value (NaN if nothing was measured), limit and whether it holds, of every figure with a limit.

        Also the number of values that are not finite, "not_finite", if there are any.
        """
        figures = self.figures()
        shares = self.shares()
        if self.not_finite:
            yield "not_finite", self.not_finite, 0, False
        for figure, allowed in self.limit.given().items():
            if figure in figures:
                yield figure, figures[figure], allowed, shares.get(figure, math.inf) <= 1


@dataclass
class ParityReport:
    """Differences by output name, over `images` images."""

    precision: str = "fp32"
    images: int = 0
    differences: dict[str, Difference] = field(default_factory=dict)

    def add(self, pair: Compared, *, n_classes: int = 255) -> None:
        """Count one image. Raises ParityError if the graph lacks an output or gives another shape."""
        for name, limit in LIMITS[self.precision].items():
            if name not in pair.expected:
                continue
            if name not in pair.got:
                raise ParityError(f"{name}: the graph gives {sorted(pair.got)}, expected {name} among them")
            difference = self.differences.setdefault(name, Difference(name, limit))
            reference, answer = pair.expected[name], pair.got[name]
            difference.add(reference, answer)
            confidence = pair.expected.get(CONFIDENCE.get(name, ""))
            if confidence is not None:
                difference.add_confident(reference, answer, confidence)
            if name in pair.truth:
                truth = pair.truth[name]
                labels = [np.asarray(values, np.uint8).reshape(truth.shape) for values in (reference, answer)]
                difference.add_truth(labels[0], labels[1], truth, n_classes)
        self.images += 1

    def problems(self) -> list[str]:
        """Messages about everything beyond its limit; empty if the graphs pass."""
        found = [line for difference in self.differences.values() for line in difference.breaches()]
        return found if self.images else ["no image to compare on; give at least one"]

    def share(self) -> float:
        """The largest share of its limit that any figure uses; above 1 the graphs fail."""
        each = [share for difference in self.differences.values() for share in difference.shares().values()]
        return max(each, default=math.inf)

    def as_json(self) -> dict[str, object]:
        """Figures for the bundle's manifest."""
        found: dict[str, object] = {"images": self.images}
        for name, difference in self.differences.items():
            figures = {key: _number(value) for key, value in difference.figures().items()}
            truths = {"images_with_truth": difference.truths} if difference.truths else {}
            found[name] = figures | truths | {"not_finite": difference.not_finite, "images": difference.images}
        return found

    def full_json(self) -> dict[str, object]:
        """The whole report: figures, their limits, and messages about those beyond."""
        return {
            "precision": self.precision,
            "passed": not self.problems(),
            "problems": self.problems(),
            "figures": self.as_json(),
            "limits": {name: difference.limit.given() for name, difference in self.differences.items()},
            "confident_pixels": f"pixels whose reference confidence is at least {CONFIDENT} of 255",
        }

    def failing(self) -> set[str]:
        """Names of the outputs with a figure beyond its limit; those without any figure are not among them."""
        found = {name: difference.shares() for name, difference in self.differences.items()}
        return {
            name for name, shares in found.items() if any(not s <= 1 for key, s in shares.items() if key != "count")
        }

    def require(self, what: str, remedy: str = "") -> None:
        """Raise ParityError, `what`, every figure beyond its limit, and `remedy`, if there is such a figure."""
        problems = self.problems()
        if problems:
            raise ParityError(f"{what}: {'; '.join([*problems, *([remedy] if remedy else [])])}")


def measure_parity(pairs: Iterable[Compared], precision: str = "fp32", *, n_classes: int = 255) -> ParityReport:
    """Compare the outputs of reference and graphs for each image.

    The report tells whether they are within their limits. Raises ParityError as `ParityReport.add` does.
    """
    report = ParityReport(precision)
    for pair in pairs:
        report.add(pair, n_classes=n_classes)
    return report


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
