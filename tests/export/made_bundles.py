"""Bundles of a few graphs, for tests."""

from dataclasses import replace
from pathlib import Path

from multisa.runtime.bundle import Bundle, FileEntry
from multisa.runtime.files import sha256_of_bytes
from multisa.runtime.records import record_to_dict
from multisa.training.config import TrainConfig


def bundle_of(
    packaged: Bundle, folder: Path, config: TrainConfig, files: dict[str, bytes], n_classes: int = 7
) -> Bundle:
    """A bundle of some graphs; the rest of its manifest is the packaged one's."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = packaged.manifest
    return Bundle(
        folder,
        replace(
            manifest,
            classes=manifest.classes[:n_classes],
            parameters=replace(manifest.parameters, cam_scales=config.cam.scales),
            provenance={"config": record_to_dict(config)},
            files={name: FileEntry(sha256_of_bytes(data), len(data)) for name, data in files.items()},
        ),
    )
