"""Whole runs over a small corpus with a tiny real bundle."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from job_runs import public_bytes, reasons, records, run_label, run_segment
from PIL import Image
from plain_masks import clear, enlarge, tiny_probabilities

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle, Manifest, write_bundle
from multisa.runtime.errors import MultisaError, TooManyFailures, UsageError
from multisa.runtime.imaging.decode import read_mask
from multisa.runtime.jobs.monitor import check_failures, failure_limit
from multisa.runtime.jobs.record import RunSummary, describe_summary
from multisa.runtime.jobs.spec import RunOptions, make_job
from multisa.runtime.jobs.stages import Concurrency

Run = Callable[..., RunSummary]
CLASSES = ("background", "red thing", "green")


@pytest.mark.parametrize("run", [run_label, run_segment])
def test_same_bytes_for_any_number_of_workers(run: Run, photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    for out, workers in (("one", 1), ("four", 4), ("again", 4)):
        run(photos, tmp_path / out, bundle, workers=workers)
    run(photos, tmp_path / "again", bundle, workers=2, overwrite=True)  # over itself
    one = public_bytes(tmp_path / "one")
    assert {"labels.jsonl", "failed.jsonl", "masks/deep/c.png"} <= set(one)
    assert one == public_bytes(tmp_path / "four") == public_bytes(tmp_path / "again")


def test_segment_records(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run_segment(photos, out, bundle, workers=2)
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


def test_segment_gives_the_graphs_mask_where_nothing_is_resized(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    coarse = np.random.default_rng(3).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    rgb = np.asarray(Image.fromarray(coarse).resize((80, 70)))
    Image.fromarray(rgb).save(tmp_path / "noise.png")
    run_segment(tmp_path / "noise.png", tmp_path / "out", bundle)
    maps = enlarge(tiny_probabilities(rgb[None])[0], (70, 80))
    expected, mask = maps.argmax(axis=0), read_mask(tmp_path / "out/masks/noise.png")
    assert set(np.unique(expected)) == {0, 1, 2} and clear(maps).mean() > 0.99
    np.testing.assert_array_equal(mask[clear(maps)], expected[clear(maps)])
    row = records(tmp_path / "out")[0]
    means = {name: float(maps.max(axis=0)[mask == i].mean()) for i, name in enumerate(CLASSES)}
    assert row["scores"] == pytest.approx(means, abs=1e-3)
    assert row["confidence"] == pytest.approx(float(maps.max(axis=0).mean()), abs=1e-3)


def test_segment_scores_are_of_the_classes_in_the_mask(bundle: Bundle, tmp_path: Path) -> None:
    Image.new("RGB", (70, 70), (102, 102, 102)).save(tmp_path / "grey.png")
    run_segment(tmp_path / "grey.png", tmp_path / "out", bundle)
    (expected,) = {float(p.max()) for p in tiny_probabilities(np.full((1, 4, 4, 3), 102, np.uint8))}
    assert records(tmp_path / "out")[0]["scores"] == pytest.approx({"red thing": expected}, abs=2e-3)


def test_label_classes_from_file_and_from_scores(
    photos: Path, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    labels = tmp_path / "labels.csv"
    labels.write_text("image,labels\na.jpg,red thing\nb,\nc.jpg,green\ngone.jpg,green\n")
    run_label(photos, out, bundle, labels=labels, workers=2)
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
    assert "labelled with predicted classes: 3 of 6 images: broken.jpg, deep/d.png, turned.jpg" in errors
    assert f"without an image: 1 row of {tmp_path / 'labels.csv'}: gone.jpg" in errors


def test_label_finds_the_red_square(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("image,labels\nb.png,red thing\n")
    run_label(photos / "b.png", tmp_path / "out", bundle, labels=tmp_path / "l.csv")
    mask = read_mask(tmp_path / "out/masks/b.png")
    assert mask[14, 16] == 1  # the middle of the square
    assert mask[-4, 4] == 0  # a dark corner


def test_failures_are_recorded(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "foreign.txt").write_text("keep me")
    summary = run_segment(photos, out, bundle, workers=2, max_pixels=72 * 66)
    assert records(out, "failed.jsonl") == [
        {"index": 2, "image": "broken.jpg", "kind": "decode", "reason": reasons(out)["broken.jpg"]}
    ]
    assert reasons(out)["broken.jpg"].startswith("not an image")  # no path of this machine in it
    assert not (out / "masks" / "broken.png").exists()
    assert summary.failure_kinds == {"decode": 1}
    (photos / "broken.jpg").unlink()
    run_segment(photos, out, bundle, overwrite=True)
    assert not (out / "failed.jsonl").exists()
    assert (out / "foreign.txt").read_text() == "keep me"


def test_private_records(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    run_label(photos, tmp_path / "out", bundle, workers=2)
    run = json.loads((tmp_path / "out/.multisa/run.json").read_text())
    assert run["command"] == "label" and run["workers"] == 2 and run["bundle"]["name"] == "tiny"
    assert (run["images"], run["failures"]) == (5, 1)  # one that failed is not done
    assert run["images_per_second"] == pytest.approx(5 / run["seconds"], rel=0.05)
    stages = {"read", "decode", "cam", "affinity", "walk", "crf", "encode", "commit"}
    assert stages == set(run["stage_seconds"])


def test_notes_are_recorded(bundle: Bundle, tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (0, 0, 0, 9)).save(tmp_path / "glass.png")
    run_segment(tmp_path / "glass.png", tmp_path / "out", bundle)
    assert records(tmp_path / "out")[0]["notes"] == ["transparency laid on white"]


def test_other_files_are_counted(
    photos: Path, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a.txt").touch()
    run_segment(photos, tmp_path / "out", bundle, overwrite=True)
    assert "ignored 1 file not named like an image: .txt: 1 (a.txt)\n" in capsys.readouterr().err
    for name in ("b.TXT", "deep/IMG.HEIC", ".DS_Store"):
        (photos / name).touch()
    run_segment(photos, tmp_path / "out", bundle, overwrite=True)
    messages = capsys.readouterr().err
    assert "ignored 3 files not named like an image: .txt: 2 (a.txt), no extension: 1 (.DS_Store)\n" in messages
    assert "skipped 1: .heic is not a supported format (convert it): 1 (deep/IMG.HEIC)\n" in messages
    run_segment(photos, tmp_path / "out", bundle, log_other_files=False, overwrite=True)
    assert "ignored" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["workers", "readers", "batch", "shard_size", "max_pixels"])
def test_sizes_must_be_positive(photos: Path, bundle: Bundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: got 0, expected at least 1"):
        run_label(photos, tmp_path / "out", bundle, **{name: 0})


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
    run_label(photos / "a.jpg", tmp_path / "four", bundle)
    assert "got 2 maps, expected one for each of 3" in reasons(tmp_path / "four")["a.jpg"]
    three = replace(manifest, parameters=replace(manifest.parameters, label=four.parameters.label))
    bundle = write_bundle(tmp_path / "b", three, graphs)
    run_label(photos / "a.jpg", tmp_path / "three", bundle)
    assert "got 34 offsets" in reasons(tmp_path / "three")["a.jpg"]
    two = replace(
        manifest,
        classes=manifest.classes[:2],
        palette=manifest.palette[:2],
        parameters=replace(manifest.parameters, score_thresholds={"red thing": 0.3}),
    )
    bundle = write_bundle(tmp_path / "b", two, graphs)
    run_segment(photos / "b.png", tmp_path / "two", bundle)
    assert "got probabilities (1, 3, 16, 20), expected (1, 2, 16, 20)" in reasons(tmp_path / "two")["b.png"]


def test_affinities_on_another_grid_than_the_bundle_says(
    photos: Path, tmp_path: Path, manifest: Manifest, graphs: dict[str, bytes]
) -> None:
    eight = replace(manifest, parameters=replace(manifest.parameters, walk_stride=8))
    run_label(photos / "a.jpg", tmp_path / "out", write_bundle(tmp_path / "b", eight, graphs))
    expected = "affinity: got a grid of (16, 20), expected (8, 10) at stride 8"
    assert expected in reasons(tmp_path / "out")["a.jpg"]


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
        summary = run_label(photos, tmp_path / name, bundle, workers=2)
        assert (summary.images, summary.failures) == (6, 6)
        said = reasons(tmp_path / name)
        assert said["broken.jpg"].startswith("not an image")
        assert said["a.jpg"].startswith("post-processing: ") and match in said["a.jpg"]


@pytest.mark.parametrize(
    ("allowed", "images", "limit"), [("0", 9, 0), ("3", 9, 3), ("2%", 200, 4), ("0.5%", 200, 1), ("100%", 7, 7)]
)
def test_failure_limit(allowed: str, images: int, limit: float) -> None:
    assert failure_limit(allowed, images) == limit


@pytest.mark.parametrize("allowed", ["", "%", "-1", "many", "1.5", "1e3", "2%%", "²"])
def test_failure_limit_errors(allowed: str) -> None:
    with pytest.raises(UsageError, match="expected N or P%"):
        failure_limit(allowed, 1)


def test_check_failures() -> None:
    for allowed in ("2", "20%"):
        check_failures(2, 10, allowed, Path("out"))
    with pytest.raises(TooManyFailures, match="2 of 10 images failed, allowed were 1") as caught:
        check_failures(2, 10, "1", Path("out"))
    assert isinstance(caught.value, MultisaError) and caught.value.exit_code == 4


def test_summary(tmp_path: Path) -> None:
    options = RunOptions(workers=2, writers=("masks", "coco"))
    job = make_job("label", "photos", tmp_path, tmp_path / "bundle", BackendRequest(), options)
    summary = RunSummary(
        images=11,
        done=9,
        failures=2,
        done_now=8,
        seconds=4.0,
        stage_seconds={"read": 1.0, "crf": 3.0},
        job=job,
        concurrency=Concurrency((job.pipeline,), 4),
        skipped=3,
        failure_kinds={"decode": 2},
        reasons={"the file is empty": 2},
        images_per_class={"cat": 1, "cow": 0, "dog": 3},
        notes={"16-bit grey scaled to 8 bits": 2},
    )
    lines = describe_summary(summary, report_images=5).splitlines()
    assert lines[0] == "8 images in 4.0 s (2.00/s), 2 failed, 1 done earlier, 3 skipped"
    assert lines[1] == "busy: crf 38%, read 12%"
    assert "failed, 2 images: the file is empty" in lines
    assert lines[-4:] == [
        f"failures: {tmp_path / 'failed.jsonl'} (--retry-failed tries them again)",
        "found: dog in 3 images, cat in 1 image",
        f"notes: 16-bit grey scaled to 8 bits (2 images); see {tmp_path / 'labels.jsonl'}",
        f"open {tmp_path / 'report.html'}",
    ]
    assert describe_summary(summary, report_images=0).splitlines()[-1] == f"open {tmp_path / 'masks'}"
    others = replace(summary, job=replace(job, writers=("coco",)), images_per_class={"cat": 0}, notes={})
    assert describe_summary(others, report_images=0).splitlines()[-2:] == [
        "found: no class in any image",
        f"open {tmp_path / 'coco'}",
    ]


def test_images_are_counted_by_class(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    for _ in ("new", "resumed when finalized"):
        summary = run_segment(photos, tmp_path / "out", bundle)
        found = [name for row in records(tmp_path / "out") for name in row["classes"]]
        assert summary.images_per_class == {name: found.count(name) for name in CLASSES[1:]}
        assert sum(summary.images_per_class.values()) > 5
