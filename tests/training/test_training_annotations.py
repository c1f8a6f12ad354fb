"""Annotation files are read as the tools that write them mean them; damaged and hostile ones are errors."""

import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import multisa
from multisa.kernels import encode_rle
from multisa.runtime.errors import BackendUnavailable, ImageError, UsageError
from multisa.runtime.writers.base import row_runs
from multisa.runtime.writers.label_studio import encode_label_studio_rle
from multisa.training.annotations import registry
from multisa.training.annotations.registry import read_annotations

CLASSES = ("background", "red", "blue")
SIZE = (24, 30)
TRIANGLE = [3.0, 2.0, 20.5, 4.25, 9.0, 19.0]
SQUARE = [1.0, 1.0, 6.0, 1.0, 6.0, 6.0, 1.0, 6.0]


def blocks(seed: int, ids: tuple[int, ...] = (0, 1, 2), size: tuple[int, int] = SIZE) -> np.ndarray:
    small = np.random.default_rng(seed).choice(ids, (size[0] // 4 + 1, size[1] // 4 + 1))
    return np.kron(small, np.ones((4, 4), np.int64))[: size[0], : size[1]].astype(np.uint8)


def save(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def coco(**changes: Any) -> dict[str, Any]:
    """Three images in COCO's original ids: 18 is the dog, 1 the person; the last image has no annotation."""
    person, dog, crowd = blocks(0, (0, 1)), [TRIANGLE, SQUARE], blocks(1, (0, 1))
    whole = {name: {"id": key, "file_name": f"COCO_{key}.jpg"} for name, key in (("a", 9), ("b", 25), ("c", 30))}
    images = [{**image, "height": SIZE[0], "width": SIZE[1]} for image in whole.values()]
    columns = np.flatnonzero(np.diff(crowd.ravel("F"), prepend=0, append=2))
    value = {
        "images": images,
        "annotations": [
            annotation(1, 9, 1, {"size": list(SIZE), "counts": compressed(person)}, int(person.sum())),
            annotation(2, 9, 18, dog, 150.5),
            {
                **annotation(3, 25, 18, {"size": list(SIZE), "counts": np.diff(columns, prepend=0).tolist()}, 9),
                "iscrowd": 1,
            },
            annotation(4, 25, 1, [TRIANGLE], 100),
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
    }
    return {**value, **changes}


def annotation(key: int, image: int, category: int, segmentation: Any, area: float) -> dict[str, Any]:
    fields = {"id": key, "image_id": image, "category_id": category, "segmentation": segmentation}
    return {**fields, "area": area, "bbox": [0, 0, 1, 1], "iscrowd": 0}


def compressed(mask: np.ndarray) -> str:
    return next(runs.compressed for runs in encode_rle(mask) if runs.class_id == 1).decode()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_coco_is_drawn_as_pycocotools_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "instances.json", coco())
    found = read_annotations(path)
    assert found.class_names == ("background", "person", "dog")  # in the order of their ids
    assert [found.labels(name) for name in found.names] == [(1, 2), (1, 2), ()]
    theirs = COCO(path)
    parts = {key: theirs.annToMask(theirs.anns[key]).astype(bool) for key in theirs.anns}
    first = np.zeros(SIZE, np.uint8)
    first[parts[1]], first[parts[2]] = 1, 2  # the smaller object is on top
    assert parts[1].sum() > 150.5 and (parts[1] & parts[2]).any()
    mask = found.mask("COCO_9.jpg", SIZE)
    assert mask is not None and (mask == first).all()
    second = np.where(parts[3], 255, 0)
    second[parts[4]] = 1  # an object over the crowd, though its area is larger
    assert (found.mask("COCO_25.jpg") == second).all()
    assert not np.asarray(found.mask("COCO_30.jpg")).any()
    assert found.notes == {"images without any annotation are images of background": ("COCO_30.jpg",)}


@pytest.mark.parametrize("seed", range(20))
def test_masks_come_back_from_our_run_lengths(tmp_path: Path, seed: int) -> None:
    mask = blocks(seed, tuple(range(seed % 3 + 1)), (int(seed * 7 % 31) + 1, int(seed * 13 % 41) + 1))
    size = {"height": mask.shape[0], "width": mask.shape[1]}
    rows = [
        (runs.class_id, {"size": list(mask.shape), "counts": runs.compressed.decode()}) for runs in encode_rle(mask)
    ]
    value = {
        "images": [{"id": 1, "file_name": "a.jpg", **size}],
        "annotations": [annotation(k, 1, k, runs, 1) for k, runs in rows if k],
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
    }
    found = read_annotations(save(tmp_path / "a.json", value), CLASSES)
    assert (found.mask("a.jpg") == mask).all()
    assert found.labels("a.jpg") == tuple(int(i) for i in np.unique(mask) if i)
    code = {key: encode_label_studio_rle(runs, mask.size) for runs in row_runs(mask) if (key := runs.class_id)}
    results = [brush(CLASSES[key], list(data), mask.shape) for key, data in code.items()]
    found = read_annotations(save(tmp_path / "b.json", [task("a.jpg", *results)]), CLASSES)
    if results:
        assert (found.mask("a.jpg") == mask).all()


def test_classes_can_be_chosen_and_are_found_by_name(tmp_path: Path) -> None:
    found = read_annotations(save(tmp_path / "a.json", coco()), ("background", "Dog"))
    assert [found.labels(name) for name in found.names] == [(1,), (1,), ()]
    assert found.notes["names that are no class are left out"] == ("person in 2 annotations",)


def test_images_with_a_box_alone_have_labels_and_no_mask(tmp_path: Path) -> None:
    value = coco()
    value["annotations"] += [annotation(7, 30, 18, [], 4), annotation(8, 31, 18, [TRIANGLE], 4)]
    found = read_annotations(save(tmp_path / "a.json", value))
    assert (found.labels("COCO_30.jpg"), found.mask("COCO_30.jpg")) == ((2,), None)
    assert found.notes == {
        "images have objects without a segmentation, so no mask": ("COCO_30.jpg",),
        "annotations are about no image of the file": ("annotation 8",),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, r"images\[0\]: got None, expected an object with id, file_name, width, height"),
        ({"images": [{"id": 1, "file_name": 3, "width": 2, "height": 2}]}, r"images\[0\]: got"),
        ({"categories": [{"id": 1, "name": "a"}] * 2}, r"categories\[1\]: got the id 1 a second time"),
        ({"categories": [{"id": i, "name": "a"} for i in (1, 2)]}, "got 2 categories, expected up to 254, each once"),
        ({"annotations": [annotation(1, 9, 5, [], 1)]}, "annotation 1: got the category 5"),
        ({"annotations": [annotation(1, 9, 1, [["x"]], 1)]}, "annotation 1: got a segmentation that is"),
        ({"annotations": [annotation(1, 9, 1, [[1, 2, 3, 4, 5, 1e999]], 1)]}, "no list of points"),
        (
            {"annotations": [annotation(1, 9, 1, {"size": [1, 1], "counts": [1]}, 1)]},
            r"of size \[1, 1\], not \[24, 30\]",
        ),
        ({"annotations": [annotation(1, 9, 1, {"size": [24, 30], "counts": [-1]}, 1)]}, "no list of run lengths"),
        ({"annotations": [annotation(1, 9, 1, {"size": [24, 30], "counts": "PPPP"}, 1)]}, "no run lengths of COCO"),
    ],
)
def test_damaged_coco(tmp_path: Path, changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_annotations(save(tmp_path / "a.json", coco(**changes)))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "got a polygon with a coordinate of 1e.09, expected it near the image"),
        ({"size": list(SIZE), "counts": [700, 1]}, "got runs of 701 pixels for 30 x 24 pixels"),
        ({"size": list(SIZE), "counts": [2**31, 2**31]}, "got runs of 4294967296 pixels"),
    ],
)
def test_masks_that_cannot_be_drawn(tmp_path: Path, segmentation: Any, message: str) -> None:
    value = coco(annotations=[annotation(1, 9, 1, segmentation, 1)])
    with pytest.raises(ImageError, match=rf"COCO_9\.jpg: {message}"):
        read_annotations(save(tmp_path / "a.json", value)).mask("COCO_9.jpg")


def test_a_mask_of_another_size_than_its_image(tmp_path: Path) -> None:
    found = read_annotations(save(tmp_path / "a.json", coco()))
    with pytest.raises(ImageError, match=r"COCO_9\.jpg: got a mask of 30 x 24 pixels, expected 24 x 30"):
        found.mask("COCO_9.jpg", SIZE[::-1])


def test_without_pycocotools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    found = read_annotations(save(tmp_path / "a.json", coco()))
    assert found.labels("COCO_9.jpg") == (1, 2)
    with pytest.raises(BackendUnavailable, match=r'pip install "multisa\[train\]"'):
        found.mask("COCO_9.jpg")


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels><label><name>red</name></label></labels></task></meta>
<image id="0" name="x/a.jpg" width="30" height="24">
  <mask label="blue" source="manual" occluded="0" rle="0, 2, 2, 2" left="3" top="1" width="3" height="2" z_order="2"/>
  <polygon label="red" points="1.00,1.00;6.00,1.00;6.00,6.00;1.00,6.00" z_order="1"/>
  <polygon label="ignore" points="10,10;20,10;20,20;10,20" z_order="0"/>
  <tag label="green" source="manual"/>
</image>
<image id="1" name="x/b.jpg" width="30" height="24"><tag label="blue" source="manual"></tag></image>
<image id="2" name="x/c.jpg" width="30" height="24">
  <box label="red" xtl="1" ytl="1" xbr="2" ybr="2" z_order="0"></box><polygon label="red" points="1,1;6,1;6,6"/>
</image>
<image id="3" name="x/d.jpg" width="30" height="24"></image>
</annotations>
"""


@pytest.mark.parametrize("zipped", [False, True])
def test_cvat(tmp_path: Path, zipped: bool) -> None:
    path = save(tmp_path / "annotations.xml", CVAT)
    if zipped:
        with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
            archive.write(path, "annotations.xml")
        path = tmp_path / "export.zip"
    found = read_annotations(path, CLASSES)
    assert {name: found.labels(name) for name in found.names} == {
        "x/a.jpg": (1, 2), "x/b.jpg": (2,), "x/c.jpg": (1,), "x/d.jpg": (),
    }  # fmt: skip
    mask = np.zeros(SIZE, np.uint8)
    mask[10:20, 10:20] = 255
    mask[1:6, 1:6] = 1
    mask[1, 3:5] = 2  # two of the first row; the third begins the next run
    mask[2, 4:6] = 2
    assert (found.mask("x/a.jpg") == mask).all()
    assert [found.mask(f"x/{name}.jpg") for name in "bcd"] == [None] * 3
    assert found.notes == {
        "images have shapes without pixels, so no mask": ("x/c.jpg (box)",),
        "names that are no class are left out": ("green in 1 annotation",),
    }


BOMB = '<!DOCTYPE a [<!ENTITY b "bbb"><!ENTITY c "&b;&b;">]><annotations><image name="&c;"/></annotations>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "got a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotations/>', "got a document type"),
        ("<html></html>", "got the root <html>"),
        ("<annotations><image", "got unclosed token"),
        ('<annotations><image name="a"/></annotations>', "got 'height'"),
        (
            '<annotations><track><box label="red"/></track></annotations>',
            "got the root <annotations>, or tracks of a video",
        ),
        (CVAT.replace("x/b", "x/a"), "got the image x/a.jpg more than once"),
        (CVAT.replace('rle="0, ', 'rle="-1, '), "got no list of run lengths"),
        (CVAT.replace('rle="0, ', 'rle="z, '), "got invalid literal"),
    ],
)
def test_damaged_and_hostile_cvat(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"annotations.xml: {message}"):
        read_annotations(save(tmp_path / "annotations.xml", text), CLASSES)


def test_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr("multisa.training.annotations.cvat.MAX_FILE_BYTES", 1000)
    with pytest.raises(UsageError, match="expected at most 1000: divide it"):
        read_annotations(save(tmp_path / "a.json", coco()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations.xml", CVAT + " " * 100_000)
    assert (tmp_path / "a.zip").stat().st_size < 1000
    with pytest.raises(UsageError, match="got more than 1000 bytes"):
        read_annotations(tmp_path / "a.zip", CLASSES)
    save(tmp_path / "a.zip", "no zip")
    with pytest.raises(UsageError, match="got File is not a zip file"):
        read_annotations(tmp_path / "a.zip", CLASSES)


def result(kind: str, size: tuple[int, ...] = SIZE, **value: Any) -> dict[str, Any]:
    return {"type": kind, "original_height": size[0], "original_width": size[1], "image_rotation": 0, "value": value}


def brush(name: str, code: list[int], size: tuple[int, ...]) -> dict[str, Any]:
    return result("brushlabels", size, format="rle", rle=code, brushlabels=[name])


def task(image: str, *results: Any, **fields: Any) -> dict[str, Any]:
    return {"data": {"image": image}, "annotations": [{"result": list(results), "was_cancelled": False}], **fields}


def literal_code(values: list[int]) -> list[int]:
    """A brush mask that lists its values one by one, as Label Studio's own editor may write it."""
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{bits - 1:04b}" for bits in (3, 4, 8, 16))
    bits += f"0{3:02b}{len(values) - 1:016b}" + "".join(f"{value:08b}" for value in values)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def test_label_studio(tmp_path: Path) -> None:
    alpha = np.random.default_rng(0).integers(0, 256, (4, 5)).astype(np.uint8)
    points = [[x / 30 * 100, y / 24 * 100] for x, y in ((1, 1), (6, 1), (6, 6), (1, 6))]
    square = result("polygonlabels", points=points, closed=True, polygonlabels=["red"])
    tasks = [
        task("/data/upload/3/0a1b2c3d-a.jpg", square),
        task("/data/local-files/?d=photos/b%20c.jpg", result("choices", choices=["Blue", "red"])),
        task("s3://bucket/d.jpg", brush("blue", literal_code(np.repeat(alpha, 4).tolist()), (4, 5))),
        task("e.jpg", square, result("rectanglelabels", x=1, y=1, width=2, height=2, rectanglelabels=["blue"])),
        task("f.jpg", square, {**square, "image_rotation": 90}),
        task("https://host/x/g.jpg", result("labels", points=points, labels=["green"]), meta={"id": "own/g.jpg"}),
        {"data": {"image": "h.jpg"}, "annotations": [], "predictions": [{"result": [square]}]},
    ]
    tasks[1]["annotations"] += [{"result": [square], "was_cancelled": True}]
    tasks[5]["annotations"].insert(0, {"result": [square]})
    found = read_annotations(save(tmp_path / "export.json", tasks), CLASSES)
    assert {name: found.labels(name) for name in found.names} == {
        "a.jpg": (1,), "photos/b c.jpg": (1, 2), "d.jpg": (2,), "e.jpg": (1, 2), "f.jpg": (1,), "own/g.jpg": (),
    }  # fmt: skip
    mask = np.zeros(SIZE, np.uint8)
    mask[1:6, 1:6] = 1
    assert (found.mask("a.jpg") == mask).all()
    assert (found.mask("d.jpg") == np.where(alpha > 127, 2, 0)).all()
    assert [found.mask(name) for name in ("photos/b c.jpg", "e.jpg", "f.jpg", "own/g.jpg")] == [None] * 4
    assert found.notes == {
        "tasks are not annotated yet (predictions do not count)": ("h.jpg",),
        "tasks have several annotations, of which the last one counts": ("own/g.jpg",),
        "images have regions without pixels, so no mask": ("e.jpg (rectanglelabels)", "f.jpg (polygonlabels)"),
        "names that are no class are left out": ("green in 1 annotation",),
    }


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task("a.jpg"), task("a.jpg")], "task 1: got a.jpg a second time"),
        ([{"data": {"image": "a"}, "predictions": []}], r"got 1 tasks without an annotation \(predictions are none\)"),
        ([task("a.jpg", {"type": "brushlabels"})], "task 0: got KeyError"),
        ([task("a.jpg", brush("red", [300], SIZE))], "task 0: got ValueError"),
        ([task("a.jpg", brush("red", [0, 0], SIZE))], "task 0: got ValueError"),
        ([task("a.jpg", brush("red", literal_code([0] * 8), SIZE))], "brush mask of 8 values with 8 bits, not 2880"),
        ([task("a.jpg", brush("red", literal_code([0] * 16)[:9], (2, 2)))], "task 0: got ValueError"),
        ([task("a.jpg", brush("red", [0], (10**5, 10**5)))], "brush mask of 100000 x 100000 pixels"),
        ([{"data": {}}], "task 0: got TypeError"),
        ({"a": 1}, "got none of the known kinds of annotations, expected COCO JSON"),
        ("[", "not JSON, or nested too deeply"),
    ],
)
def test_damaged_label_studio(tmp_path: Path, tasks: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_annotations(save(tmp_path / "a.json", tasks), CLASSES)


def test_a_folder_of_masks(tmp_path: Path) -> None:
    mask = np.where(blocks(3) == 2, 255, blocks(3)).astype(np.uint8)
    for name in ("a.png", "x/b.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / name)
    for name in ("c.jpg", "notes.txt"):
        (tmp_path / name).touch()
    found = read_annotations(tmp_path, CLASSES)
    assert {name: found.labels(name) for name in found.names} == {"a": (1,), "x/b": (1,)}
    assert (found.mask("x/b") == mask).all()
    assert found.notes == {"entries other than masks (PNG) are not used": ("c.jpg", "notes.txt")}


def test_names_find_images_as_label_files_do(tmp_path: Path) -> None:
    found = read_annotations(save(tmp_path / "annotations.xml", CVAT), CLASSES)
    matches = found.match(["a.jpg", "y/b.jpg", "c.png", "z/d.jpg"], root="x")
    assert matches.found == {"a.jpg": "x/a.jpg"} and matches.unused == ("x/b.jpg", "x/c.jpg", "x/d.jpg")
    with pytest.raises(UsageError, match="matches several images"):
        read_annotations(save(tmp_path / "a.json", coco()), ()).match(["x/COCO_9.jpg", "y/COCO_9.jpg"])


@pytest.mark.parametrize("name", ["a.xml", "a.zip", "a.json", "folder"])
def test_classes_are_needed_where_the_file_lists_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir() if name == "folder" else save(path, "[]")
    with pytest.raises(UsageError, match=r"got no classes, expected their names in classes\.txt"):
        read_annotations(path)


@pytest.mark.slow
def test_the_output_of_a_job(tmp_path: Path) -> None:
    """Its masks, with other ids; its COCO file; its tasks once they are submitted."""
    photos = Path(multisa.__file__).parent / "runtime" / "demo_images"
    out = tmp_path / "out"
    multisa.label_images(photos, out, labels=photos / "labels.csv", writers=["masks", "coco", "label-studio"])
    names = ("background", "person", "cat")
    masks, instances = (
        read_annotations(path, names) for path in (out, out / "coco/annotations/instances_default.json")
    )
    tasks = json.loads((out / "label-studio/000000.json").read_text())
    for entry in tasks:
        entry["annotations"] = entry.pop("predictions")
    brushes = read_annotations(save(tmp_path / "export.json", tasks), names)
    assert masks.names == instances.names == brushes.names == ("astronaut.jpg", "chelsea.jpg", "coffee.jpg")
    for found in (masks, instances, brushes):
        assert [found.labels(name) for name in found.names] == [(1,), (2,), ()]
    with Image.open(out / "masks/astronaut.png") as image:
        own = np.array(image)
    person = int(own.max())
    assert 1 < person < 255
    for name in masks.names[:2]:
        expected = masks.mask(name)
        assert (expected == instances.mask(name)).all() and (expected == brushes.mask(name)).all()
    assert (masks.mask("astronaut.jpg") == (own == person)).all()
    (out / ".multisa/finished.json").unlink()
    with pytest.raises(UsageError, match="got a job that has not finished"):
        read_annotations(out, names)
