"""Weakly supervised semantic segmentation: pixel masks from image-level labels, and a deployable segmenter.

    import multisa

    with multisa.Segmenter() as segment:
        result = segment("photo.jpg")  # a path, bytes, a PIL image, or RGB as uint8 [H, W, 3]
    result.mask, result.confidence  # uint8 [H, W] at the size of the image
    result.save("mask.png")

Names are imported on first use: `import multisa` itself loads neither NumPy nor ONNX Runtime. The packages
`multisa.training`, `multisa.export` and `multisa.kernels` have public names too. Everything else is private.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multisa.runtime.api import label_images, segment_images
    from multisa.runtime.backends.registry import available_backends
    from multisa.runtime.bundle import load_bundle
    from multisa.runtime.errors import MultisaError
    from multisa.runtime.evaluation import evaluate_masks
    from multisa.runtime.predict.prediction import Prediction
    from multisa.runtime.predict.pseudo_labeler import PseudoLabeler
    from multisa.runtime.predict.segmenter import Segmenter

    __version__: str

__all__ = [
    "MultisaError",
    "Prediction",
    "PseudoLabeler",
    "Segmenter",
    "__version__",
    "available_backends",
    "evaluate_masks",
    "label_images",
    "load_bundle",
    "segment_images",
]

_HOMES = {
    "MultisaError": "multisa.runtime.errors",
    "Prediction": "multisa.runtime.predict.prediction",
    "PseudoLabeler": "multisa.runtime.predict.pseudo_labeler",
    "Segmenter": "multisa.runtime.predict.segmenter",
    "available_backends": "multisa.runtime.backends.registry",
    "evaluate_masks": "multisa.runtime.evaluation",
    "label_images": "multisa.runtime.api",
    "load_bundle": "multisa.runtime.bundle",
    "segment_images": "multisa.runtime.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("multisa")
    if name not in _HOMES:
        raise AttributeError(f"module 'multisa' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
