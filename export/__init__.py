"""Export trained networks: bundles of ONNX graphs, lower precisions, TensorRT engines, and the parity gate.

    import multisa.export as export

    export.export_bundle("runs/voc", dataset, "bundles/voc")                     # multisa export
    export.quantize_bundle("bundles/voc", "VOC2012", "bundles/all")              # multisa convert
    export.build_engines("bundles/all", export.BuildOptions(targets=("sm89",)))  # multisa build
    export.check_parity("bundles/all", "tensorrt-rtx", "VOC2012")                # multisa parity

Each function takes an options dataclass and returns a result with `describe()` for people and `as_json()`
for programs. Importing this module loads neither torch nor onnx: a name loads what it needs on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multisa.export.bundle import ExportOptions, ExportResult, export_bundle
    from multisa.export.compare import ParityOptions, ParityResult, check_parity
    from multisa.export.quantize import QuantizeOptions, QuantizeResult, quantize_bundle
    from multisa.export.tensorrt.build import BuildOptions, BuildResult, build_engines

__all__ = [
    "BuildOptions",
    "BuildResult",
    "ExportOptions",
    "ExportResult",
    "ParityOptions",
    "ParityResult",
    "QuantizeOptions",
    "QuantizeResult",
    "build_engines",
    "check_parity",
    "export_bundle",
    "quantize_bundle",
]

_MODULES = {
    "bundle": ("ExportOptions", "ExportResult", "export_bundle"),
    "compare": ("ParityOptions", "ParityResult", "check_parity"),
    "quantize": ("QuantizeOptions", "QuantizeResult", "quantize_bundle"),
    "tensorrt.build": ("BuildOptions", "BuildResult", "build_engines"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"multisa.export.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
