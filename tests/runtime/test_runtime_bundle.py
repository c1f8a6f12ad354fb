"""Bundles: what is written is read back, and nothing altered, misspelt or outside the folder is accepted."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multisa.kernels import CrfParameters
from multisa.runtime.bundle import (
    Bundle,
    LabelParameters,
    Manifest,
    default_bundle_path,
    describe,
    load_bundle,
    write_bundle,
)
from multisa.runtime.errors import BundleError
from multisa.runtime.files import sha256_of_bytes


def test_round_trip(bundle: Bundle, graphs: dict[str, bytes], manifest: Manifest) -> None:
    loaded = load_bundle(bundle.path)
    assert loaded == bundle
    assert replace(loaded.manifest, files={}) == manifest
    assert {name: loaded.read_file(name) for name in graphs} == graphs
    assert loaded.manifest.files["cam.onnx"].sha256 == sha256_of_bytes(graphs["cam.onnx"])


def test_write_is_deterministic_and_leaves_nothing_else(
    bundle: Bundle, graphs: dict[str, bytes], manifest: Manifest, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    write_bundle(bundle.path, manifest, graphs)  # replaces the bundle that is there
    assert {path.name: path.read_bytes() for path in bundle.path.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [bundle.path.name]


def test_write_refuses_a_folder_that_is_no_bundle(tmp_path: Path, graphs: dict[str, bytes], manifest: Manifest) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not only a bundle"):
        write_bundle(tmp_path, manifest, graphs)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("thesis.txt", "years of work", "thesis.txt does not belong to it"),
        ("photos/a.jpg", "an image", "photos does not belong to it"),
        ("cam.onnx/a.jpg", "an image", "cam.onnx does not belong to it"),
        ("engines", "a file, no cache", "engines does not belong to it"),
        ("bundle.json", '{"name": "of some other tool"}', "is not a manifest"),
        ("bundle.json", '{"schema_version": 1, "files": ["cam.onnx"]}', "is not a manifest"),
        ("bundle.json", "[]", "is not a manifest"),
        ("bundle.json", "{", "not JSON"),
        ("bundle.json", "[" * 500_000, "nested too deeply"),
        ("bundle.json", " " * (2 << 20), "more than"),
    ],
)
def test_write_removes_nothing_foreign(
    bundle: Bundle, graphs: dict[str, bytes], manifest: Manifest, name: str, content: str, match: str
) -> None:
    path = bundle.path / name
    if path.parent != bundle.path:
        path.parent.unlink(missing_ok=True)
        path.parent.mkdir()
    path.write_text(content)
    before = {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}
    with pytest.raises(BundleError, match=match):
        write_bundle(bundle.path, manifest, graphs)
    assert {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()} == before


def test_write_replaces_a_bundle_of_any_version_and_keeps_its_engines(
    bundle: Bundle, graphs: dict[str, bytes], manifest: Manifest
) -> None:
    (bundle.path / "bundle.json").write_text('{"schema_version": 7, "files": {"cam.onnx": 1, "old.bin": 2}}')
    (bundle.path / "old.bin").touch()
    for graph in ("affinity.onnx", "segmenter.onnx"):
        (bundle.path / graph).unlink()
    (bundle.path / "engines" / "key").mkdir(parents=True)
    (bundle.path / "engines" / "key" / "cam.plan").write_bytes(b"a plan")
    assert write_bundle(bundle.path, manifest, graphs) == bundle
    assert {path.name for path in bundle.path.iterdir()} == {"bundle.json", "engines", *graphs}
    assert (bundle.path / "engines" / "key" / "cam.plan").read_bytes() == b"a plan"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_bundle(
    bundle: Bundle,
    graphs: dict[str, bytes],
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    rename = Path.replace

    def replace_unless_new(path: Path, target: Path) -> Path:
        if path.name == "new":  # the last of the renames
            assert not bundle.path.exists() and (path / "engines" / "plan").exists()
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace_unless_new)
    (bundle.path / "engines").mkdir()
    (bundle.path / "engines" / "plan").write_bytes(b"a plan")
    with pytest.raises(type(error)):
        write_bundle(bundle.path, replace(manifest, name="newer"), graphs)
    assert load_bundle(bundle.path) == bundle
    assert (bundle.path / "engines" / "plan").read_bytes() == b"a plan"
    assert list(tmp_path.iterdir()) == [bundle.path]


def test_write_through_a_link(bundle: Bundle, graphs: dict[str, bytes], manifest: Manifest, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(bundle.path.name, target_is_directory=True)
    assert write_bundle(link, replace(manifest, name="newer"), graphs).manifest.name == "newer"
    assert link.is_symlink() and load_bundle(bundle.path).manifest.name == "newer"
    assert {path.name for path in tmp_path.iterdir()} == {link.name, bundle.path.name}


def test_write_takes_an_empty_folder(tmp_path: Path, graphs: dict[str, bytes], manifest: Manifest) -> None:
    (tmp_path / "new").mkdir()
    assert write_bundle(tmp_path / "new", manifest, graphs).manifest.name == "tiny"


def test_write_checks_the_manifest(tmp_path: Path, graphs: dict[str, bytes], manifest: Manifest) -> None:
    with pytest.raises(BundleError, match="palette: got 2 colours"):
        write_bundle(tmp_path / "b", replace(manifest, palette=manifest.palette[:2]), graphs)
    with pytest.raises(BundleError, match="plain file names"):
        write_bundle(tmp_path / "b", manifest, {**graphs, "../escape.onnx": b""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "match"), [(b"short", r"cam\.onnx: got 5 bytes, expected"), (None, r"cam\.onnx: got sha256 .*expected")]
)
def test_tampered_file(bundle: Bundle, data: bytes | None, match: str) -> None:
    path = bundle.path / "cam.onnx"
    original = path.read_bytes()
    path.write_bytes(data or original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(BundleError, match=match):
        load_bundle(bundle.path)
    with pytest.raises(BundleError, match=match):
        bundle.read_file("cam.onnx")


def test_missing_and_unlisted_files(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"no file 'other\.onnx'"):
        bundle.read_file("other.onnx")
    (bundle.path / "cam.onnx").unlink()
    with pytest.raises(BundleError, match=r"cam\.onnx: the file is missing"):
        load_bundle(bundle.path)


def test_graphs_of_other_precisions_are_files_like_others(
    bundle_of_precisions: Bundle, graphs: dict[str, bytes]
) -> None:
    bundle = load_bundle(bundle_of_precisions.path)
    more = {"cam.fp16.onnx", "segmenter.int8.onnx"}
    assert set(bundle.manifest.files) == {*graphs, *more}
    assert bundle.read_file("cam.fp16.onnx") == graphs["cam.onnx"]
    page = describe(bundle)
    assert all(name in page for name in more)
    for name in more:
        path = bundle.path / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # one bit
        for read in (lambda: load_bundle(bundle.path), lambda name=name: bundle.read_file(name)):
            with pytest.raises(BundleError, match=rf"{name}: got sha256 .*expected"):
                read()
        path.unlink()
        with pytest.raises(BundleError, match=rf"{name}: the file is missing"):
            load_bundle(bundle.path)
        path.write_bytes(data)
    assert load_bundle(bundle.path) == bundle


def test_link_out_of_the_folder(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.path / "cam.onnx"
    path.rename(tmp_path / "elsewhere.onnx")
    path.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="inside the bundle's folder"):
        load_bundle(bundle.path)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return change


def label(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["parameters"]["label"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (edit(lambda m: m.update(schema_version=1)), "schema_version: got 1, expected 2"),
        (edit(lambda m: m["parameters"].update(label_method="cam")), r"label_method: got str 'cam', expected one of"),
        (edit(lambda m: m["parameters"].update(min_area=1)), r"min_area: got 1\.0, expected a share from 0, below 1"),
        (
            edit(lambda m: m["parameters"]["segmenter_label"].update(background_ratio=0)),
            r"background_ratio: got 0\.0, expected a number within 0\.001\.\.1000",
        ),
        (edit(lambda m: m.pop("palette")), "missing key 'palette'"),
        (edit(lambda m: m.update(colour=1)), "unknown key 'colour'"),
        (edit(lambda m: m["parameters"].update(longside=1)), "parameters: unknown key 'longside'"),
        (edit(lambda m: m["parameters"]["label"]["crf"].pop("iterations")), r"label\.crf: missing key"),
        (edit(lambda m: m["parameters"].update(long_side="80")), r"long_side: got str '80', expected int"),
        (edit(lambda m: m["parameters"].update(long_side=True)), "long_side: got bool True"),
        (edit(lambda m: m["parameters"].update(long_side=8)), "long_side: got 8, expected >="),
        (edit(lambda m: m["parameters"].update(cam_scales=1.0)), "cam_scales: got float 1.0, expected an array"),
        (edit(lambda m: m["parameters"].update(walk_stride=0)), "walk_stride: got 0"),
        (edit(lambda m: m["parameters"]["label"].update(class_gain=[1.0] * 9)), "class_gain: got 9 numbers"),
        (edit(lambda m: m["parameters"]["label"].update(class_gain=[0.0])), "class_gain: got"),
        (edit(lambda m: label(m).update(walk_radius=0)), r"parameters\.label\.walk_radius: got 0, expected 2"),
        (edit(lambda m: label(m).update(walk_radius=10**9)), r"walk_radius: got 1000000000, expected 2\.\.32"),
        (edit(lambda m: label(m).update(walk_beta=-1)), "walk_beta: got -1.0, expected a finite number above"),
        (edit(lambda m: label(m).update(walk_beta=10**400)), "label.walk_beta: got int 1000"),
        (edit(lambda m: label(m).update(walk_steps=-5)), r"walk_steps: got -5, expected 0\.\.65536"),
        (edit(lambda m: label(m).update(walk_steps=10**9)), "walk_steps: got 1000000000"),
        (edit(lambda m: label(m).update(background=-3)), "background: got -3.0, expected a number above 0"),
        (edit(lambda m: label(m).update(background=0)), "background: got 0.0"),
        (edit(lambda m: label(m).update(background=1)), "background: got 1.0"),
        (edit(lambda m: label(m)["crf"].update(iterations=-1)), r"label\.crf\.iterations: got -1"),
        (edit(lambda m: label(m)["crf"].update(iterations=1001)), r"got 1001, expected 0\.\.1000"),
        (edit(lambda m: label(m)["crf"].update(spatial_sxy=0)), r"label\.crf\.spatial_sxy: got 0\.0"),
        (edit(lambda m: m["parameters"]["score_thresholds"].pop("green")), "score_thresholds"),
        (edit(lambda m: m["parameters"]["score_thresholds"].update(green=2)), "within 0..1"),
        (edit(lambda m: m.update(classes=["a", "b", "c"])), "expected 'background'"),
        (edit(lambda m: m.update(classes=["background", "b", "b"])), "each class once"),
        (edit(lambda m: m["palette"].append([1, 2])), r"palette\[3\]: got 2 values, expected 3"),
        (edit(lambda m: m["palette"].__setitem__(0, [0, 0, 256])), r"0\.\.255"),
        (edit(lambda m: m.update(ignore_index=0)), "ignore_index: got 0"),
        (edit(lambda m: m["files"].update({"../x": m["files"]["cam.onnx"]})), "plain file names"),
        (edit(lambda m: m["files"].update({"/etc/passwd": m["files"]["cam.onnx"]})), "plain file names"),
        (edit(lambda m: m["files"].pop("cam.onnx")), "expected cam.onnx"),
        (edit(lambda m: m.update(files=[])), "files: got list"),
        (edit(lambda m: m.update(metrics={"miou": float("nan")})), "got NaN"),
    ],
)
def test_manifest_errors(bundle: Bundle, change: Callable[[dict[str, Any]], object], match: str) -> None:
    path = bundle.path / "bundle.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=match) as caught:
        load_bundle(bundle.path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_manifest_that_is_no_object(bundle: Bundle, text: str) -> None:
    (bundle.path / "bundle.json").write_text(text)
    with pytest.raises(BundleError):
        load_bundle(bundle.path)


def test_manifest_size_limit(bundle: Bundle) -> None:
    (bundle.path / "bundle.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(BundleError, match="at most"):
        load_bundle(bundle.path)


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        load_bundle(tmp_path / "absent")


def test_nested_too_deeply(bundle: Bundle) -> None:
    (bundle.path / "bundle.json").write_text("[" * 500_000)
    with pytest.raises(BundleError, match="nested too deeply"):
        load_bundle(bundle.path)


def test_walk_beta_beyond_float(bundle: Bundle) -> None:
    path = bundle.path / "bundle.json"
    path.write_text(path.read_text().replace('"walk_beta": 8.0', '"walk_beta": 1e999'))
    with pytest.raises(BundleError, match="walk_beta: got inf, expected a finite number"):
        load_bundle(bundle.path)


@pytest.mark.parametrize(
    "values",
    [
        {"walk_radius": 2, "walk_steps": 0, "walk_beta": 1e-3, "background": 0.01},
        {"walk_radius": 32, "walk_steps": 65536, "background": 0.99, "crf": CrfParameters(iterations=1000)},
    ],
)
def test_label_parameters_at_their_limits(values: dict[str, Any]) -> None:
    assert asdict(LabelParameters(**values)).items() >= {k: v for k, v in values.items() if k != "crf"}.items()


def test_describe_and_palette(bundle: Bundle) -> None:
    page = describe(bundle)
    for part in ("tiny", "red thing", "random walk", "cam.onnx", "miou", "the tests"):
        assert part in page
    assert any(line.split()[1:4] == ["red", "thing", "0.3"] for line in page.splitlines())
    palette = bundle.manifest.mask_palette()
    assert palette.shape == (256, 3)
    np.testing.assert_array_equal(palette[:3], bundle.manifest.palette)


SEGMENTER_ROW = "DeepLabV3+ on pseudo-masks"


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("+ round 1 (train)", f"{SEGMENTER_ROW} (val)", "DeepLabV3+ on ground truth (val)"), 1),
        ((f"{SEGMENTER_ROW} (val)", f"{SEGMENTER_ROW}, seed 3 (val)"), 0),
        (("+ random walk (train)", "+ dense CRF (train)"), 1),
        ((), None),
    ],
)
def test_described_ious_are_those_of_the_segmenter(bundle: Bundle, names: tuple[str, ...], shown: int | None) -> None:
    rows = {name: {"iou": [10.0 + number] * 3} for number, name in enumerate(names)}
    page = describe(replace(bundle, manifest=replace(bundle.manifest, metrics={"training": rows})))
    (line,) = (line for line in page.splitlines() if "red thing" in line)
    assert line.endswith(" -" if shown is None else f" {10 + shown}.00")


def test_strings_of_a_bundle_cannot_control_the_terminal(bundle: Bundle) -> None:
    hostile = {"licences": {"work\x1b[2J": "MIT\x07"}, "note": "a\x9b1mb\r"}
    training = {"row\x1b[H": {"miou": 5.0}}
    manifest = replace(bundle.manifest, provenance=hostile, metrics={"training": training})
    page = describe(replace(bundle, manifest=manifest))
    assert "work[2J" in page and "a1mb" in page and "mIoU %, row[H" in page
    assert all(line.isprintable() for line in page.split("\n"))


def test_default_bundle_path_is_inside_the_package() -> None:
    assert default_bundle_path().parts[-3:] == ("runtime", "bundles", "voc-animals")
