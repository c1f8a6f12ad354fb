"""Whole runs over a small corpus with a tiny real bundle."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from multisa.runtime.bulk import RunOptions, RunSummary, check_failures, describe_summary, failure_limit
from multisa.runtime.bundle import Bundle, Manifest, write_bundle
from multisa.runtime.corpus import find_images
from multisa.runtime.errors import MultisaError, TooManyFailures, UsageError
from multisa.runtime.image_labels import ImageLabels
from multisa.runtime.images import read_mask
from multisa.runtime.label import label_images
from multisa.runtime.segment import segment_images

Run = Callable[..., RunSummary]
CLASSES = ("background", "red thing", "green")
NO_CLASS: tuple[str, ...] = ()


def records(out: Path, name: str = "labels.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def public_bytes(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file() and ".multisa" not in path.parts)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("run", [label_images, segment_images])
def test_same_bytes_for_any_number_of_workers(run: Run, photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    for out, workers in (("one", 1), ("four", 4), ("again", 4)):
        run(photos, tmp_path / out, bundle=bundle, options=RunOptions(workers=workers, gallery=True))
    run(photos, tmp_path / "again", bundle=bundle, options=RunOptions(workers=2, gallery=True))  # over itself
    one = public_bytes(tmp_path / "one")
    assert {"labels.jsonl", "failed.jsonl", "index.html", "masks/deep/c.png"} <= set(one)
    assert one == public_bytes(tmp_path / "four") == public_bytes(tmp_path / "again")


def test_segment_records(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = segment_images(photos, out, bundle=bundle, options=RunOptions(workers=2))
    assert (summary.images, summary.failures) == (6, 1)
    rows = records(out)
    assert [row["image"] for row in rows] == ["a.jpg", "b.png", "deep/c.jpg", "deep/d.png", "turned.jpg"]
    first, turned = rows[0], rows[4]
    assert sorted(first) == list(first)
    assert (first["height"], first["width"], first["orientation"]) == (40, 90, 1)
    assert (turned["height"], turned["width"], turned["orientation"]) == (72, 48, 6)
    assert first["classes"] == ["red thing", "green"]
    assert "labels_from" not in first and "notes" not in first
    assert sum(first["pixel_shares"].values()) == pytest.approx(1, abs=1e-3)
    assert set(first["scores"]) == set(first["pixel_shares"]) == set(CLASSES)
    for row in rows:
        mask = read_mask(out / row["mask"])
        assert mask.shape == (row["height"], row["width"])
        shares = np.bincount(mask.ravel(), minlength=3) / mask.size
        expected = {name: share for name, share in zip(CLASSES, shares.tolist(), strict=True) if share}
        assert row["pixel_shares"] == pytest.approx(expected, abs=1e-4)


def test_segment_gives_the_graphs_mask_where_nothing_is_resized(
    photos: Path, bundle: Bundle, tmp_path: Path
) -> None:
    rgb = np.random.default_rng(3).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "noise.png")
    segment_images(tmp_path / "noise.png", tmp_path / "out", bundle=bundle)
    brightness = rgb.astype(np.float32).mean(axis=2)
    expected = (brightness > 85).astype(np.uint8) + (brightness > 170)
    np.testing.assert_array_equal(read_mask(tmp_path / "out/masks/noise.png"), expected)
    row = records(tmp_path / "out")[0]
    confidence = brightness.astype(np.uint8) / 255  # as the tiny graph has it
    means = {name: float(confidence[expected == i].mean()) for i, name in enumerate(CLASSES)}
    assert row["scores"] == {name: round(mean, 4) for name, mean in means.items()}
    assert row["confidence"] == round(float(confidence.mean()), 4)


def test_segment_scores_are_of_the_classes_in_the_mask(bundle: Bundle, tmp_path: Path) -> None:
    Image.new("RGB", (70, 70), (102, 102, 102)).save(tmp_path / "grey.png")
    segment_images(tmp_path / "grey.png", tmp_path / "out", bundle=bundle)
    assert records(tmp_path / "out")[0]["scores"] == {"red thing": 0.4}


def test_label_classes_from_file_and_from_scores(
    photos: Path, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    rows = {"a.jpg": ("red thing",), "b": NO_CLASS, "c.jpg": ("green",), "gone.jpg": ("green",)}
    labels = ImageLabels(tmp_path / "labels.csv", rows)
    label_images(photos, out, bundle=bundle, labels=labels, options=RunOptions(workers=2))
    by_image = {row["image"]: row for row in records(out)}
    assert by_image["a.jpg"]["classes"] == ["red thing"]
    assert by_image["a.jpg"]["labels_from"] == "file"
    assert set(by_image["a.jpg"]["pixel_shares"]) == {"background", "red thing"}
    assert by_image["b.png"]["pixel_shares"] == {"background": 1.0}
    assert by_image["b.png"]["confidence"] == 1.0
    assert set(by_image["deep/c.jpg"]["pixel_shares"]) == {"background", "green"}
    other = by_image["deep/d.png"]
    assert other["labels_from"] == "scores"
    assert set(other["classes"]) == {name for name, score in other["scores"].items() if score >= 0.3}
    assert other["classes"]
    errors = capsys.readouterr().err
    assert "labelled from scores: 3 of 6 images: broken.jpg, deep/d.png, turned.jpg" in errors
    assert f"about none of the images: 1 row of {tmp_path / 'labels.csv'}: gone.jpg" in errors


def test_label_finds_the_red_square(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    labels = ImageLabels(tmp_path / "l.csv", {"b.png": ("red thing",)})
    label_images(photos / "b.png", tmp_path / "out", bundle=bundle, labels=labels)
    mask = read_mask(tmp_path / "out/masks/b.png")
    assert mask[14, 16] == 1  # the middle of the square
    assert mask[-4, 4] == 0  # a dark corner


def test_failures_are_recorded_and_their_old_masks_removed(
    photos: Path, bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    (out / "masks" / "broken.png").write_bytes(b"of an earlier run")
    (out / "foreign.txt").write_text("keep me")
    segment_images(photos, out, bundle=bundle, options=RunOptions(workers=2, max_pixels=72 * 66))
    reasons = {row["image"]: row["reason"] for row in records(out, "failed.jsonl")}
    assert list(reasons) == ["broken.jpg"]
    assert reasons["broken.jpg"].startswith("not an image")  # no path of this machine in it
    assert not (out / "masks" / "broken.png").exists()
    assert (out / "foreign.txt").read_text() == "keep me"
    (photos / "broken.jpg").unlink()
    segment_images(photos, out, bundle=bundle)
    assert not (out / "failed.jsonl").exists()


def test_private_records(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    label_images(photos, tmp_path / "out", bundle=bundle, options=RunOptions(workers=2))
    run = json.loads((tmp_path / "out/.multisa/run.json").read_text())
    assert run["command"] == "label" and run["workers"] == 2 and run["bundle"]["name"] == "tiny"
    assert (run["images"], run["failures"]) == (5, 1)  # one that failed is not done
    assert run["images_per_second"] == pytest.approx(5 / run["seconds"], rel=0.05)
    assert {"read", "cam", "affinity", "walk", "crf", "write"} == set(run["stage_seconds"])
    log = records(tmp_path / "out/.multisa", "log.jsonl")
    assert [row["image"] for row in log] == [image.relative for image in find_images(photos).images]
    assert set(log[0]["seconds"]) == {"read", "cam", "affinity", "walk", "crf", "write"}


def test_notes_are_recorded(bundle: Bundle, tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (0, 0, 0, 9)).save(tmp_path / "glass.png")
    segment_images(tmp_path / "glass.png", tmp_path / "out", bundle=bundle)
    assert records(tmp_path / "out")[0]["notes"] == ["transparency laid on white"]


def test_other_files_are_counted(
    photos: Path, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, names in ((1, ["a.txt"]), (2, ["a.txt", "b.txt"])):
        for name in names:
            (photos / name).touch()
        segment_images(photos, tmp_path / "out", bundle=bundle)
        files = "1 file" if number == 1 else "2 files"
        assert f"left out, no image by extension: {files}\n" in capsys.readouterr().err
    segment_images(photos, tmp_path / "out", bundle=bundle, options=RunOptions(tell_other_files=False))
    assert "extension" not in capsys.readouterr().err


def test_workers_must_be_positive(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        label_images(photos, tmp_path / "out", bundle=bundle, options=RunOptions(workers=0))


def test_graphs_that_do_not_fit_the_manifest(
    photos: Path, tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes]
) -> None:
    four = replace(
        manifest,
        classes=(*manifest.classes, "blue"),
        palette=(*manifest.palette, (0, 0, 9)),
        parameters=replace(
            manifest.parameters,
            label=replace(manifest.parameters.label, walk_radius=4),
            score_thresholds={**manifest.parameters.score_thresholds, "blue": 0.5},
        ),
    )
    bundle = write_bundle(tmp_path / "b", four, graphs)
    label_images(photos / "a.jpg", tmp_path / "out", bundle=bundle)
    assert "got 2 maps, expected one for each of 3" in records(tmp_path / "out", "failed.jsonl")[0]["reason"]
    three = replace(manifest, parameters=replace(manifest.parameters, label=four.parameters.label))
    bundle = write_bundle(tmp_path / "b", three, graphs)
    label_images(photos / "a.jpg", tmp_path / "out", bundle=bundle)
    assert "got 34 offsets" in records(tmp_path / "out", "failed.jsonl")[0]["reason"]
    two = replace(
        manifest,
        classes=manifest.classes[:2],
        palette=manifest.palette[:2],
        parameters=replace(manifest.parameters, score_thresholds={"red thing": 0.3}),
    )
    bundle = write_bundle(tmp_path / "b", two, graphs)
    segment_images(photos / "b.png", tmp_path / "out", bundle=bundle)
    assert "got class 2, expected 0..1" in records(tmp_path / "out", "failed.jsonl")[0]["reason"]


def test_affinities_on_another_grid_than_the_bundle_says(
    photos: Path, tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes]
) -> None:
    eight = replace(manifest, parameters=replace(manifest.parameters, walk_stride=8))
    label_images(photos / "a.jpg", tmp_path / "out", bundle=write_bundle(tmp_path / "b", eight, graphs))
    reason = records(tmp_path / "out", "failed.jsonl")[0]["reason"]
    assert "affinity: got a grid of (16, 20), expected (8, 10) at stride 8" in reason


def test_what_a_kernel_refuses_is_a_failure_of_the_image(
    photos: Path, tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes]
) -> None:
    model = onnx.load_from_string(graphs["affinity.onnx"])
    (bias,) = (constant for constant in model.graph.initializer if constant.name == "bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(34, np.nan, np.float32), "bias"))
    broken = {**graphs, "affinity.onnx": model.SerializeToString()}
    narrow = replace(manifest.parameters.label.crf, bilateral_srgb=1e-4)
    label = replace(manifest.parameters.label, crf=narrow)
    small = replace(manifest, parameters=replace(manifest.parameters, label=label))
    for name, bundle, match in (
        ("walk", write_bundle(tmp_path / "nan", manifest, broken), "affinity: got values from nan"),
        ("crf", write_bundle(tmp_path / "narrow", small, graphs), "use larger standard deviations"),
    ):
        summary = label_images(photos, tmp_path / name, bundle=bundle, options=RunOptions(workers=2))
        assert (summary.images, summary.failures) == (6, 6)
        reasons = {row["image"]: row["reason"] for row in records(tmp_path / name, "failed.jsonl")}
        assert reasons["broken.jpg"].startswith("not an image")
        assert reasons["a.jpg"].startswith("post-processing: ") and match in reasons["a.jpg"]


@pytest.mark.parametrize(
    ("allowed", "images", "limit"),
    [("0", 9, 0), ("3", 9, 3), ("2%", 200, 4), ("0.5%", 200, 1), ("100%", 7, 7)],
)
def test_failure_limit(allowed: str, images: int, limit: float) -> None:
    assert failure_limit(allowed, images) == limit


@pytest.mark.parametrize("allowed", ["", "%", "-1", "many", "1.5", "1e3", "2%%", "²"])
def test_failure_limit_errors(allowed: str) -> None:
    with pytest.raises(UsageError, match="expected N or P%"):
        failure_limit(allowed, 1)


def test_check_failures_and_summary() -> None:
    summary = RunSummary(10, 2, 4.0, {"read": 1.0, "crf": 3.0})
    check_failures(summary, "2", Path("out"))
    check_failures(summary, "20%", Path("out"))
    with pytest.raises(TooManyFailures, match="2 of 10 images failed, allowed were 1") as caught:
        check_failures(summary, "1", Path("out"))
    assert isinstance(caught.value, MultisaError) and caught.value.exit_code == 4
    text = describe_summary(summary)
    assert "8 images in 4.0 s (2.00/s), 2 failed" in text and "crf 75%, read 25%" in text
