"""Describe a bundle as tables of text or as JSON (`multisa inspect`)."""

import json
from collections.abc import Sequence
from typing import Any

from multisa.runtime.bundle.manifest import Manifest, manifest_to_json
from multisa.runtime.bundle.storage import Bundle

_DIGEST_DIGITS = 12  # of a SHA-256 in the table; --json prints all


def bundle_to_json(bundle: Bundle) -> dict[str, Any]:
    """Return the folder and the contents of bundle.json as JSON values."""
    return {"path": str(bundle.path), **json.loads(manifest_to_json(bundle.manifest))}


def describe(bundle: Bundle) -> str:
    """Return tables of text: classes, parameters, measured mIoU and verified files."""
    manifest = bundle.manifest
    tables = (_classes, _parameters, _metrics, _provenance, _files)
    sections = [[f"{manifest.name} ({bundle.path})"], *(make(manifest) for make in tables)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; columns are as wide as their longest cell, numbers right-aligned."""
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
    thresholds = manifest.parameters.score_thresholds
    rows = []
    for index, name in enumerate(manifest.classes):
        threshold = f"{thresholds[name]:g}" if name in thresholds else "-"
        gain = f"{gains[name]:g}" if name in gains else "-"
        iou = last[index] if index < len(last) else None
        iou_text = f"{iou:.2f}" if isinstance(iou, (int, float)) else "-"
        rows.append((str(index), name, threshold, gain, iou_text))
    return table(("id", "class", "score threshold", "gain", "IoU %"), rows)


def _parameters(manifest: Manifest) -> list[str]:
    parameters, label = manifest.parameters, manifest.parameters.label
    radius = f"radius {label.walk_radius} at stride {parameters.walk_stride}"
    rows = (
        ("image", f"long side at most {parameters.long_side} pixels"),
        ("CAM scales", ", ".join(f"{scale:g}" for scale in parameters.cam_scales)),
        ("random walk", f"{radius}, beta {label.walk_beta:g}, {label.walk_steps} steps"),
        ("background score", f"{label.background:g}"),
        ("dense CRF", "on" if label.use_crf else "off"),
        ("ignored id", str(manifest.ignore_index)),
    )
    return table(("parameter", "value"), rows)


def _metrics(manifest: Manifest) -> list[str]:
    numbers = ((name, n) for name, n in manifest.metrics.items() if isinstance(n, (int, float)))
    rows = [(name, f"{number:g}") for name, number in numbers]
    training = manifest.metrics.get("training", {})
    for stage, values in training.items() if isinstance(training, dict) else ():
        if isinstance(values, dict) and isinstance(values.get("miou"), (int, float)):
            rows.append((f"mIoU %, {stage}", f"{values['miou']:.2f}"))
    return table(("metric", "value"), rows) if rows else []


def _provenance(manifest: Manifest) -> list[str]:
    """Show the values that fit on a line; --json prints all."""
    rows = [
        (name, text if isinstance(text, str) else json.dumps(text))
        for name, text in manifest.provenance.items()
        if isinstance(text, (str, int, float)) or (isinstance(text, dict) and len(json.dumps(text)) < 90)
    ]
    return table(("provenance", "value"), rows) if rows else []


def _files(manifest: Manifest) -> list[str]:
    rows = [
        (name, f"{entry.bytes / 1e6:.2f}", f"{entry.sha256[:_DIGEST_DIGITS]}...")
        for name, entry in manifest.files.items()
    ]
    return table(("file (verified)", "MB", "SHA-256"), rows)
