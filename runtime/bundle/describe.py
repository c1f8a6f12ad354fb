"""What is in a bundle: tables for people, JSON for programs (`multisa inspect`)."""

import json
from collections.abc import Sequence
from typing import Any

from multisa.runtime.bundle.manifest import Manifest, manifest_to_json
from multisa.runtime.bundle.storage import Bundle

_DIGEST_SHOWN = 12  # characters of a SHA-256; --json has all of them


def bundle_to_json(bundle: Bundle) -> dict[str, Any]:
    """The folder and everything in bundle.json, as JSON values."""
    return {"path": str(bundle.path), **json.loads(manifest_to_json(bundle.manifest))}


def describe(bundle: Bundle) -> str:
    """The bundle as tables of text: classes, parameters, measured mIoU and verified files."""
    manifest = bundle.manifest
    sections = [
        [f"{manifest.name} ({bundle.path})"],
        _classes(manifest),
        _parameters(manifest),
        _metrics(manifest),
        _provenance(manifest),
        _files(manifest),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; columns as wide as their longest cell, numbers to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [all(_is_number(row[column]) for row in cells[1:]) for column in range(len(header))]
    return [
        "  ".join(
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace(",", "").replace("-", "", 1).rstrip("% ").isdigit() or text == "-"


def _classes(manifest: Manifest) -> list[str]:
    label = manifest.parameters.label
    gains = dict(zip(manifest.foreground, label.class_gain, strict=False))
    ious = manifest.metrics.get("training", {})
    last = list(ious.values())[-1].get("iou", []) if isinstance(ious, dict) and ious else []
    rows = []
    for index, name in enumerate(manifest.classes):
        threshold = manifest.parameters.score_thresholds.get(name)
        rows.append(
            (
                str(index),
                name,
                "-" if threshold is None else f"{threshold:g}",
                f"{gains[name]:g}" if name in gains else "-",
                f"{last[index]:.2f}" if index < len(last) and isinstance(last[index], (int, float)) else "-",
            )
        )
    return table(("id", "class", "score threshold", "gain", "IoU %"), rows)


def _parameters(manifest: Manifest) -> list[str]:
    parameters, label = manifest.parameters, manifest.parameters.label
    return table(
        ("parameter", "value"),
        (
            ("image", f"long side at most {parameters.long_side} pixels"),
            ("CAM scales", ", ".join(f"{scale:g}" for scale in parameters.cam_scales)),
            (
                "random walk",
                f"radius {label.walk_radius} at stride {parameters.walk_stride}, "
                f"beta {label.walk_beta:g}, {label.walk_steps} steps",
            ),
            ("background score", f"{label.background:g}"),
            ("dense CRF", "on" if label.use_crf else "off"),
            ("ignored id", str(manifest.ignore_index)),
        ),
    )


def _metrics(manifest: Manifest) -> list[str]:
    rows = [
        (name, f"{value:g}") for name, value in manifest.metrics.items() if isinstance(value, (int, float))
    ]
    training = manifest.metrics.get("training", {})
    for stage, values in training.items() if isinstance(training, dict) else ():
        if isinstance(values, dict) and isinstance(values.get("miou"), (int, float)):
            rows.append((f"mIoU %, {stage}", f"{values['miou']:.2f}"))
    return table(("metric", "value"), rows) if rows else []


def _provenance(manifest: Manifest) -> list[str]:
    """What fits on a line; --json has the rest."""
    rows = [
        (name, text if isinstance(text, str) else json.dumps(text))
        for name, text in manifest.provenance.items()
        if isinstance(text, (str, int, float)) or (isinstance(text, dict) and len(json.dumps(text)) < 90)
    ]
    return table(("provenance", "value"), rows) if rows else []


def _files(manifest: Manifest) -> list[str]:
    rows = [
        (name, f"{entry.bytes / 1e6:.2f}", f"{entry.sha256[:_DIGEST_SHOWN]}...")
        for name, entry in manifest.files.items()
    ]
    return table(("file (verified)", "MB", "SHA-256"), rows)
