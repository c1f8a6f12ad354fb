"""Bundles: what is written is read back, and nothing altered, misspelt or outside the folder is accepted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multisa.runtime.bundle import (
    Bundle,
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


def test_write_refuses_a_folder_that_is_no_bundle(
    tmp_path: Path, graphs: dict[str, bytes], manifest: Manifest
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        write_bundle(tmp_path, manifest, graphs)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


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
    ("data", "match"),
    [(b"short", r"cam\.onnx: got 5 bytes, expected"), (None, r"cam\.onnx: got sha256 .*expected")],
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


def test_link_out_of_the_folder(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.path / "cam.onnx"
    path.rename(tmp_path / "elsewhere.onnx")
    path.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="inside the bundle's folder"):
        load_bundle(bundle.path)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (edit(lambda m: m.update(schema_version=2)), "schema_version: got 2, expected 1"),
        (edit(lambda m: m.pop("palette")), "missing key 'palette'"),
        (edit(lambda m: m.update(colour=1)), "unknown key 'colour'"),
        (edit(lambda m: m["parameters"].update(longside=1)), "parameters: unknown key 'longside'"),
        (edit(lambda m: m["parameters"]["label"]["crf"].pop("iterations")), r"label\.crf: missing key"),
        (edit(lambda m: m["parameters"].update(long_side="80")), r"long_side: got str '80', expected int"),
        (edit(lambda m: m["parameters"].update(long_side=True)), "long_side: got bool True"),
        (edit(lambda m: m["parameters"].update(long_side=8)), "long_side: got 8, expected >="),
        (
            edit(lambda m: m["parameters"].update(cam_scales=1.0)),
            "cam_scales: got float 1.0, expected an array",
        ),
        (edit(lambda m: m["parameters"].update(walk_stride=0)), "walk_stride: got 0"),
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


def test_describe_and_palette(bundle: Bundle) -> None:
    page = describe(bundle)
    for part in ("tiny", "red thing 0.3", "cam.onnx", "miou", "the tests", "scale to 0..1"):
        assert part in page
    palette = bundle.manifest.mask_palette()
    assert palette.shape == (256, 3)
    np.testing.assert_array_equal(palette[:3], bundle.manifest.palette)


def test_default_bundle_path_is_inside_the_package() -> None:
    assert default_bundle_path().parts[-3:] == ("runtime", "bundles", "voc-animals")
