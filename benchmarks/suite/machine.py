"""What a run was measured on: machine, versions, bundle, photographs."""

from typing import Any

from multisa.benchmarks.harness import environment, peaks
from multisa.benchmarks.suite.setting import Setting
from multisa.runtime.backends.gpus import probe_gpus
from multisa.runtime.bundle.manifest import MANIFEST_NAME
from multisa.runtime.files import sha256_of_file

PACKAGES = (
    *("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"),
    *("torch", "timm", "scipy", "pydensecrf2", "pillow", "simplejpeg"),
)


def describe_run(setting: Setting) -> dict[str, Any]:
    """Everything that figures depend on, as JSON values; ask before measuring, for the load."""
    dataset = setting.dataset
    return {
        **environment(*PACKAGES, quick=setting.effort.is_quick),
        "gpus": [gpu.name for gpu in probe_gpus().gpus],
        "bundle": {
            "name": setting.bundle.manifest.name,
            "sha256": sha256_of_file(setting.bundle.path / MANIFEST_NAME),
        },
        "data": {
            "name": dataset.root.name,
            "photographs": {"train": len(dataset.train), "val": len(dataset.val)},
            "digest": dataset.masks_digest(dataset.train + dataset.val),
        },
        "peaks": peaks(),
    }
