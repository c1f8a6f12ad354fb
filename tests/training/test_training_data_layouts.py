"""Data sets in the layouts that people have: COCO, images/ with masks/, exports of label tools, and val lists."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multisa.kernels import encode_rle
from multisa.runtime.errors import DatasetError, MultisaError, UsageError
from multisa.training.annotations.base import DrawnMask, MaskFile
from multisa.training.config import load_config
from multisa.training.data import Dataset, read_dataset
from multisa.training.data_check import check_dataset
from multisa.training.pipeline import train
from multisa.training.run_record import SUPERVISED, ImageCounts, load_run

CLASSES = "background\nred\nblue\n"
SIZE = (70, 80)


def mask_of(seed: int, ids: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    small = np.random.default_rng(seed).choice(ids, (7, 8))
    return np.kron(small, np.ones((10, 10), np.int64)).astype(np.uint8)


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def mask_file(path: Path, mask: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if palette:
        image.putpalette([*range(256)] * 3)
    image.save(path)


def text(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco(names: dict[str, int | None], categories: tuple[int, int] = (18, 3)) -> dict[str, object]:
    """Instances of images whose masks `mask_of` draws from their seed; None: an image without an object."""
    images, annotations = [], []
    for key, (name, seed) in enumerate(names.items(), 100):
        images.append({"id": key, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        for runs in encode_rle(mask_of(seed)) if seed is not None else ():
            if runs.class_id:
                segmentation = {"size": list(SIZE), "counts": runs.compressed.decode()}
                ids = {"id": len(annotations), "image_id": key, "category_id": categories[runs.class_id - 1]}
                annotations.append({**ids, "segmentation": segmentation, "area": runs.area, "iscrowd": 0})
    names_of = [{"id": i, "name": name} for i, name in zip(categories, ("red", "blue"), strict=True)]
    return {"images": images, "annotations": annotations, "categories": names_of}


def findings(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {finding.text: finding.names for finding in dataset.findings}


def masks(dataset: Dataset) -> dict[str, np.ndarray | None]:
    items = (*dataset.train_images, *dataset.val)
    return {item.id: item.mask.read() if item.mask else None for item in items}


@pytest.fixture
def coco_2014(tmp_path: Path) -> Path:
    """COCO's own layout: category 3 comes before 18, an image of each list has no annotation."""
    root = tmp_path / "coco"
    for part, first in (("train", 0), ("val", 10)):
        names: dict[str, int | None] = {f"COCO_{part}2014_{first + i:012}.jpg": first + i for i in range(4)}
        for name, seed in names.items():
            picture(root / f"{part}2014" / name, seed or 0)
        names[f"COCO_{part}2014_{first + 3:012}.jpg"] = None
        text(root / "annotations" / f"instances_{part}2014.json", coco(names))
    text(root / "annotations" / "captions_train2014.json", {})
    return root


def test_coco_2014(coco_2014: Path) -> None:
    picture(coco_2014 / "train2014" / "extra.jpg", 50)
    dataset = read_dataset(coco_2014)
    assert dataset.class_names == ("background", "blue", "red")  # in the order of the categories' ids
    assert [item.classes for item in dataset.train_images] == [(1, 2), (1, 2), (1, 2), ()]
    assert [item.image.parent.name for item in dataset.val] == ["val2014"] * 4
    swapped = np.array([0, 2, 1], np.uint8)
    drawn = masks(dataset)
    for part, seed in (("train", 0), ("train", 2), ("val", 10)):
        assert (drawn[f"{part}2014__COCO_{part}2014_{seed:012}"] == swapped[mask_of(seed)]).all()
    assert not np.asarray(drawn["val2014__COCO_val2014_000000000013"]).any()
    assert len(dataset.train) == 4
    assert findings(dataset) == {
        "1 file of another extension than an image's, not used": ("annotations/captions_train2014.json",),
        "4 images named in instances_val2014.json: measured on, never trained on": tuple(i.id for i in dataset.val),
        "instances_train2014.json: images without any annotation are images of background": (
            "COCO_train2014_000000000003.jpg",
        ),
        "instances_val2014.json: images without any annotation are images of background": (
            "COCO_val2014_000000000013.jpg",
        ),
        "1 image in no file of annotations, not used": ("train2014/extra.jpg",),
        "1 image to train on without any class": ("train2014__COCO_train2014_000000000003",),
    }
    report = check_dataset(dataset)
    assert not report.unusable and report.classes == {"blue": 3, "red": 3}


def test_a_change_of_a_drawn_mask_changes_the_digest(coco_2014: Path) -> None:
    before = read_dataset(coco_2014, quiet=True)
    path = coco_2014 / "annotations" / "instances_val2014.json"
    value = json.loads(path.read_text())
    value["annotations"][0]["category_id"] = 3
    text(path, value)
    after = read_dataset(coco_2014, quiet=True)
    assert before.masks_digest(before.val) == read_dataset(coco_2014, quiet=True).masks_digest(before.val)
    assert before.masks_digest(before.val) != after.masks_digest(after.val)
    assert before.train_images_digest() == after.train_images_digest()


def test_some_of_cocos_classes(coco_2014: Path) -> None:
    text(coco_2014 / "classes.txt", "background\nred\n")
    dataset = read_dataset(coco_2014)
    assert [item.classes for item in dataset.train_images] == [(1,), (1,), (1,), ()]
    assert findings(dataset)["instances_train2014.json: names that are no class are left out"] == (
        "blue in 3 annotations",
    )


def test_coco_that_does_not_fit_together(coco_2014: Path) -> None:
    (coco_2014 / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(DatasetError, match=r"1 of 4 images are missing \(COCO_train2014_0+1.jpg\), expected all"):
        read_dataset(coco_2014)
    text(coco_2014 / "annotations" / "instances_train2017.json", coco({}))
    with pytest.raises(DatasetError, match=r"got instances_train2014.json, instances_train2017.json, expected one"):
        read_dataset(coco_2014)


def test_masks_of_another_size_are_found_before_training(coco_2014: Path) -> None:
    path = coco_2014 / "annotations" / "instances_val2014.json"
    value = json.loads(path.read_text())
    value["images"][0].update(height=SIZE[1], width=SIZE[0])
    value["annotations"] = [entry for entry in value["annotations"] if entry["image_id"] != value["images"][0]["id"]]
    text(path, value)
    (unusable,) = check_dataset(read_dataset(coco_2014)).unusable
    assert "instances_val2014.json: COCO_val2014_000000000010.jpg: got a mask of 70 x 80" in unusable


def test_81_classes(tmp_path: Path) -> None:
    """The ids of COCO have gaps; 80 categories become the classes 1 to 80."""
    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    value = coco({})
    value["categories"] = [{"id": i, "name": f"class {i}"} for i in reversed(ids)]
    value["images"] = [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in ids]
    square = [[0, 0, 30, 0, 30, 30, 0, 30]]
    value["annotations"] = [{"id": i, "image_id": i, "category_id": i, "segmentation": square} for i in ids]
    for i in ids:
        picture(tmp_path / "images" / f"{i}.png", i)
    text(tmp_path / "annotations" / "instances_default.json", value)
    dataset = read_dataset(tmp_path)
    assert len(dataset.class_names) == 81
    for item in dataset.train_images:
        assert item.mask is not None
        expected = ids.index(int(item.image.stem)) + 1
        assert item.classes == (expected,) and np.unique(item.mask.read()).tolist() == [0, expected]


def labelled(root: Path, count: int = 6, ids: Callable[[int], tuple[int, ...]] = lambda seed: (0, 1, 2)) -> Path:
    """images/, masks/ (of all but the last image), labels.csv and classes.txt."""
    for seed in range(count):
        name = f"x/{seed}" if seed % 2 else str(seed)
        picture(root / "images" / f"{name}.png", seed)
        if seed < count - 1:
            mask_file(root / "masks" / f"{name}.png", mask_of(seed, ids(seed)), palette=seed % 3 == 0)
    text(root / "labels.csv", "image,labels\n" + "".join(f"{i},red blue\n" for i in range(count)))
    text(root / "classes.txt", CLASSES)
    return root


def test_images_beside_masks(tmp_path: Path) -> None:
    root = labelled(tmp_path / "set")
    mask_file(root / "masks" / "gone.png", mask_of(0))
    dataset = read_dataset(root)
    assert [item.id for item in dataset.train_images] == [
        "images__0", "images__2", "images__4", "images__x__1", "images__x__3", "images__x__5",
    ]  # fmt: skip
    drawn = masks(dataset)
    for seed, name in ((0, "images__0"), (1, "images__x__1"), (4, "images__4")):
        assert (drawn[name] == mask_of(seed)).all()
    assert drawn["images__x__5"] is None and len(dataset.train) == 5 and dataset.val == ()
    assert findings(dataset) == {
        "1 mask of masks/ of no image, not used": ("gone",),
        "train: 1 of 6 images have no mask and are not measured on": ("images__x__5",),
    }


def test_a_folder_without_masks_keeps_its_digest(tmp_path: Path) -> None:
    """Ids of images are as before, so that finished stages are found."""
    root = labelled(tmp_path / "set")
    masked = read_dataset(root, quiet=True).train_images_digest()
    (root / "masks").rename(tmp_path / "elsewhere")
    assert read_dataset(root, quiet=True).train_images_digest() == masked


@pytest.mark.parametrize("folder", ["masks", "images"])
def test_a_folder_of_that_name_alone_holds_images(tmp_path: Path, folder: str) -> None:
    picture(tmp_path / folder / "a.jpg", 0)
    text(tmp_path / "labels.csv", "image,labels\na.jpg,red\n")
    text(tmp_path / "classes.txt", CLASSES)
    assert [item.id for item in read_dataset(tmp_path).train_images] == [f"{folder}__a"]


CVAT = """<annotations>{}</annotations>"""


def cvat(names: list[str]) -> str:
    polygon = '<polygon label="red" points="10,10;40,10;40,40;10,40"/><tag label="blue"/>'
    size = f'width="{SIZE[1]}" height="{SIZE[0]}"'
    return CVAT.format("".join(f'<image name="{name}" {size}>{polygon}</image>' for name in names))


def test_an_export_gives_labels_and_masks(tmp_path: Path) -> None:
    root = labelled(tmp_path / "set")
    (root / "masks").rename(tmp_path / "elsewhere")
    export = text(tmp_path / "annotations.xml", cvat([f"{i}.png" for i in range(6)]))
    dataset = read_dataset(root, labels=export)
    assert [item.classes for item in dataset.train_images] == [(1, 2)] * 6
    assert all(isinstance(item.mask, DrawnMask) for item in dataset.train) and len(dataset.train) == 6
    assert findings(dataset) == {"1 label source not read, because another one is used": ("labels.csv",)}
    text(export, cvat(["0.png", "1.png", "other.png"]))
    with pytest.raises(
        DatasetError, match=r"annotations.xml: no row for 4 images, .* \(rows about no image: other.png\)"
    ):
        read_dataset(root, labels=export)


def test_voc_with_an_export(voc_folder: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (voc_folder / "JPEGImages").iterdir())
    text_of = cvat(names).replace("red", "square").replace("blue", "disc")
    dataset = read_dataset(voc_folder, labels=text(tmp_path / "annotations.xml", text_of))
    assert [item.classes for item in dataset.train_images] == [(1, 2)] * 8
    assert all(isinstance(item.mask, MaskFile) for item in (*dataset.train, *dataset.val))  # VOC's own
    assert [isinstance(item.mask, DrawnMask) for item in dataset.train_images] == [False] * 8


def test_a_val_list_of_a_folder(tmp_path: Path) -> None:
    root = labelled(tmp_path / "set")
    val = text(tmp_path / "val.txt", "\ufeff# held out\nimages/0.png\r\nx/3\n5\nmissing\n")
    text(root / "labels.csv", "image,labels\n1,red\n2,blue\n3,red\n4,\n")  # val images need no row
    dataset = read_dataset(root, val=val)
    assert [item.image.stem for item in dataset.train_images] == ["2", "4", "1"]
    assert [item.image.stem for item in dataset.val] == ["0", "3"]
    found = findings(dataset)
    assert found["3 images named in val.txt: measured on, never trained on"] == (
        "images__0", "images__x__3", "images__x__5",
    )  # fmt: skip
    assert found["1 name in val.txt of no image, not used"] == ("missing",)
    assert found["val: 1 of 3 images have no mask and are not measured on"] == ("images__x__5",)
    assert found["1 image labelled in labels.csv but not trained on"] == ("images/x/3.png",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.txt", "nothing\n", r"got 1 name \(nothing\), expected some of images of"),
        ("val.txt", "", r"got 0 names \(\), expected some"),
        ("val.csv", "image\n0\n", "got a .csv file, expected a list of images"),
        ("val.json", "{}", "got a .json file, expected a list of images"),
        ("val.txt", "0\n1\n2\n3\n4\n5\n", "none of the 0 images to train on has a label"),
    ],
)
def test_val_lists_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(MultisaError, match=message):
        read_dataset(labelled(tmp_path / "set"), val=text(tmp_path / name, content))


def test_a_missing_val_list(tmp_path: Path) -> None:
    with pytest.raises(MultisaError, match=r"val.txt: not found, expected a text file"):
        read_dataset(labelled(tmp_path / "set"), val=tmp_path / "val.txt")


def test_val_annotations_bring_their_masks(tmp_path: Path) -> None:
    root = labelled(tmp_path / "set")
    (root / "masks").rename(tmp_path / "drawn")
    for path in sorted((tmp_path / "drawn").rglob("*.png"))[:3]:
        path.unlink()
    dataset = read_dataset(root, val=tmp_path / "drawn")  # a folder of masks
    assert [item.image.stem for item in dataset.val] == ["1", "3"] and len(dataset.train_images) == 4
    assert dataset.val[0].mask is not None and (dataset.val[0].mask.read() == mask_of(1)).all()
    instances = text(tmp_path / "val.json", coco({"images/0.png": 0, "4.png": 4}))
    dataset = read_dataset(root, val=instances)
    assert [item.image.stem for item in dataset.val] == ["0", "4"] and len(dataset.train_images) == 4
    assert dataset.val[1].mask is not None and (dataset.val[1].mask.read() == mask_of(4)).all()


def test_another_folder_to_measure_on(tmp_path: Path, voc_folder: Path) -> None:
    root, other = labelled(tmp_path / "set"), labelled(tmp_path / "other", 4)
    dataset = read_dataset(root, val=other)
    assert [item.id for item in dataset.val] == ["val__images__0", "val__images__2", "val__images__x__1"]
    assert len(dataset.train_images) == 6 and {item.image.parents[1].name for item in dataset.val[:2]} == {"other"}
    found = findings(dataset)
    assert found["2 entries of other, not used"] == ("classes.txt", "labels.csv")
    assert found["val: 1 of 4 images have no mask and are not measured on"] == ("val__images__x__3",)
    report = check_dataset(dataset)
    assert report.images["val"] == 3 and "several times" not in str(report.findings)
    assert any("trained on and in val (same bytes)" in finding.text for finding in report.findings)
    own = read_dataset(voc_folder, quiet=True).val
    voc = read_dataset(voc_folder, val=other)
    assert len(voc.val) == 3
    assert findings(voc)[f"{len(own)} images of its own val list, not used, but {other}"] == tuple(i.id for i in own)
    for path in sorted((other / "masks").rglob("*.png")):
        path.unlink()
    mask_file(other / "masks" / "none.png", mask_of(0))
    with pytest.raises(DatasetError, match="got no image with a mask, expected images/ and masks/"):
        read_dataset(root, val=other)


def test_a_val_list_of_voc(voc_folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(voc_folder, tmp_path / "voc"))
    val = text(root / "mine.txt", "photo_00\nphoto_11.jpg\n")
    dataset = read_dataset(root, val=val)
    assert [item.id for item in dataset.val] == ["photo_00", "photo_11"]
    assert [item.id for item in dataset.train_images] == [f"photo_{i:02}" for i in range(1, 8)]
    found = findings(dataset)
    assert found["1 entry of ImageSets/Segmentation, not read"] == ("val.txt",)
    assert found["3 images in neither train_aug.txt nor mine.txt, not used"] == tuple(
        f"photo_{i:02}.jpg" for i in (8, 9, 10)
    )
    assert not any("beside JPEGImages" in finding for finding in found)


@pytest.mark.parametrize("name", ["train_aug", "trainaug"])
def test_lists_and_masks_of_sbd(tmp_path: Path, name: str) -> None:
    """VOC 2012 as people have it: 21 classes, the list of SBD in either spelling, its masks beside VOC's."""
    root = tmp_path / "VOC2012"
    for seed, stem in enumerate(("2007_000032", "2008_000008", "2011_000003")):
        picture(root / "JPEGImages" / f"{stem}.jpg", seed)
        text(
            root / "Annotations" / f"{stem}.xml",
            "<annotation><object><name>tvmonitor</name></object><object><name>dog</name></object></annotation>",
        )
        mask_file(root / "SegmentationClassAug" / f"{stem}.png", mask_of(seed, (0, 12, 20, 255)))
    for stem in ("2007_000032", "2011_000003"):
        mask_file(root / "SegmentationClass" / f"{stem}.png", mask_of(9, (0, 12)), palette=True)
    lists = root / "ImageSets" / "Segmentation"
    text(lists / "train.txt", "2007_000032\n")
    text(lists / "val.txt", "2011_000003\n")
    text(lists / f"{name}.txt", "2007_000032\n2008_000008\n")
    text(lists / "trainval.txt", "2007_000032\n2011_000003\n")
    dataset = read_dataset(root)
    assert len(dataset.class_names) == 21 and [item.classes for item in dataset.train_images] == [(12, 20)] * 2
    assert [item.id for item in dataset.train] == ["2007_000032"]  # as before, though SBD has masks of all
    assert [str(item.mask).split("/")[-2] for item in (*dataset.train, *dataset.val)] == ["SegmentationClass"] * 2
    assert findings(dataset)["3 masks besides those of train.txt and val.txt, not used"] == (
        "2007_000032.png", "2008_000008.png", "2011_000003.png",
    )  # fmt: skip
    (lists / "train.txt").unlink()
    pairs = "".join(f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in ("2007_000032", "2008_000008"))
    text(lists / f"{name}.txt", pairs)
    dataset = read_dataset(root)
    assert [str(item.mask).split("/")[-2] for item in dataset.train] == ["SegmentationClass", "SegmentationClassAug"]
    assert findings(dataset)["1 entry of ImageSets/Segmentation, not read"] == ("trainval.txt",)


def named(dataset: Dataset, *words: str) -> list[str]:
    found = (f for f in dataset.findings if any(word in f.text for word in words))
    return [name.partition(" (")[0] for finding in found for name in finding.names]


def test_random_folders_are_accounted_for(tmp_path: Path) -> None:
    """Each image, mask and name given is used, or listed."""
    read = 0
    for seed in range(60):
        chance, root = random.Random(seed), tmp_path / str(seed)
        stems = chance.sample(["a", "b c", "d.e", "f\u00e9", "x/g", "x/y/h", "k"], chance.randint(2, 7))
        for stem in stems:
            text(root / "images" / f"{stem}.jpg", "")
        for stem in {*chance.sample(stems, len(stems) // 2), *chance.sample(["gone", "x/lost"], chance.randint(0, 2))}:
            text(root / "masks" / f"{stem}{chance.choice(('.png', '.PNG'))}", "")
        text(root / "masks" / "notes.txt", "")
        lines = [chance.choice((stem, f"{stem}.jpg", f"images/{stem}.jpg")) for stem in stems[: chance.randint(0, 3)]]
        lines += chance.sample(["nowhere", "y/nowhere.jpg"], chance.randint(0, 2))
        val = text(tmp_path / f"{seed}.txt", "\n".join(lines))
        text(root / "labels.csv", "image,labels\n" + "".join(f"{stem},red\n" for stem in stems))
        text(root / "classes.txt", CLASSES)
        try:
            dataset = read_dataset(root, val=val if lines else None, quiet=True)
        except MultisaError:
            continue
        read += 1
        used = [item.id for item in (*dataset.train_images, *dataset.val)]
        without = named(dataset, "val: ")
        assert sorted([*used, *without]) == sorted(f"images__{stem.replace('/', '__')}" for stem in stems)
        held = {*named(dataset, "never trained on")}
        assert held == {item.id for item in dataset.val} | {*without}
        assert len(held) + len(named(dataset, "of no image, not used")) - len(named(dataset, "of masks/")) == len(lines)
        given = [p.relative_to(root / "masks").as_posix() for p in (root / "masks").rglob("*") if p.is_file()]
        files = [str(item.mask).partition("/masks/")[2] for item in (*dataset.train_images, *dataset.val) if item.mask]
        unused = [f"{name}.png" for name in named(dataset, "of masks/")]
        left = named(dataset, "entries other than masks")
        assert sorted(name.lower() for name in (*files, *unused, *left)) == sorted(name.lower() for name in given)
    assert 30 < read < 60


def test_errors_of_labels_name_what_is_possible(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", 0)
    with pytest.raises(DatasetError, match=r"no labels.csv, labels.json or annotations/instances_train\*.json"):
        read_dataset(tmp_path)
    export = text(tmp_path / "export.json", [{"data": {"image": "a.jpg"}}])
    with pytest.raises(UsageError, match=r"got no classes, expected their names in classes.txt"):
        read_dataset(tmp_path, labels=export)


@pytest.mark.slow
def test_coco_is_trained_on(coco_2014: Path, tmp_path: Path) -> None:
    """Every stage, with masks drawn in the processes that load samples, and with augmentations there."""
    settings = ["supervised=true", 'segmenter.schedule.augment=["RandomHorizontalFlip(p=0.5)"]', "background_from=yen"]
    run = train(
        load_config(str(Path(__file__).with_name("tiny.toml")), settings), read_dataset(coco_2014), tmp_path / "run"
    )
    assert run.classes == ("background", "blue", "red") and run.images == ImageCounts(4, 4, 4)
    assert {row.measured_on for row in run.rows} == {"train", "val"} and run.rows[-1].stage == SUPERVISED
    assert load_run(tmp_path / "run") == run
