"""The bundle: a folder with three ONNX graphs and bundle.json, which holds every parameter of the runtime."""

from multisa.runtime.bundle.manifest import (
    MANIFEST_NAME,
    BundleParameters,
    FileEntry,
    LabelMethod,
    LabelParameters,
    Manifest,
    SegmenterLabelParameters,
)
from multisa.runtime.bundle.storage import (
    ENGINES_FOLDER,
    Bundle,
    bundle_to_json,
    check_replaceable,
    default_bundle_path,
    describe,
    load_bundle,
    write_bundle,
)

__all__ = [
    "ENGINES_FOLDER",
    "MANIFEST_NAME",
    "Bundle",
    "BundleParameters",
    "FileEntry",
    "LabelMethod",
    "LabelParameters",
    "Manifest",
    "SegmenterLabelParameters",
    "bundle_to_json",
    "check_replaceable",
    "default_bundle_path",
    "describe",
    "load_bundle",
    "write_bundle",
]
