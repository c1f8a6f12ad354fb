"""The bundle: a folder with three ONNX graphs and bundle.json, which holds every parameter of the runtime."""

from multisa.runtime.bundle.manifest import MANIFEST_NAME, BundleParameters, FileEntry, LabelParameters, Manifest
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
    "LabelParameters",
    "Manifest",
    "bundle_to_json",
    "check_replaceable",
    "default_bundle_path",
    "describe",
    "load_bundle",
    "write_bundle",
]
