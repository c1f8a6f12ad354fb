"""`import multisa`: its names, what they take and give, and that the command line gives the same bytes."""

import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import multisa
from multisa.runtime.cli.main import root
from multisa.runtime.imaging.decode import read_mask

IMAGES = sorted((multisa.load_bundle().path.parents[1] / "demo_images").glob("*.jpg"))
ROOT = Path(multisa.__file__).resolve().parent
NAMES = {
    "MultisaError",
    "Prediction",
    "PseudoLabeler",
    "Segmenter",
    "__version__",
    "available_backends",
    "evaluate_masks",
    "label_images",
    "load_bundle",
    "segment_images",
}
MOST_FUNCTIONS = 15  # of ours in one call, so that a stranger can follow an image


@pytest.fixture(scope="module")
def segmenter() -> multisa.Segmenter:
    return multisa.Segmenter()


def test_public_names() -> None:
    assert set(multisa.__all__) == NAMES and set(dir(multisa)) >= NAMES
    assert all(getattr(multisa, name) is not None for name in NAMES)
    with pytest.raises(AttributeError, match="has no attribute 'segmenter'"):
        multisa.segmenter  # noqa: B018


def test_import_loads_nothing_heavy() -> None:
    program = (
        "import sys, multisa; multisa.__version__; multisa.MultisaError\n"
        "found = {'numpy', 'onnxruntime', 'PIL', 'tqdm', 'torch', 'click'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


def test_the_command_writes_the_same_bytes(segmenter: multisa.Segmenter, tmp_path: Path) -> None:
    folder = IMAGES[0].parent
    result = CliRunner().invoke(root, ["segment", str(folder), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    records = (tmp_path / "out/labels.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(records) == len(IMAGES) > 2
    for path, line in zip(IMAGES, records, strict=True):
        prediction, record = segmenter(path), json.loads(line)
        prediction.save(tmp_path / "mask.png")
        written = tmp_path / "out" / record["mask"]
        assert (tmp_path / "mask.png").read_bytes() == written.read_bytes() == prediction.png
        np.testing.assert_array_equal(prediction.mask, read_mask(written))
        assert list(prediction.classes) == record["classes"]
        assert round(prediction.uncertainty, 4) == record["uncertainty"]


def test_what_a_call_takes(segmenter: multisa.Segmenter) -> None:
    path = IMAGES[1]
    expected = segmenter(path)
    with Image.open(path) as image:
        for given in (str(path), path.read_bytes(), image, np.asarray(image)):
            assert segmenter(given).png == expected.png
        height, width = image.height, image.width
    assert expected.mask.shape == expected.confidence.shape == (height, width)
    assert expected.mask.dtype == expected.confidence.dtype == np.uint8
    assert 0 <= expected.uncertainty <= 1 and len(np.unique(expected.mask)) > 1


def test_exif_is_applied_and_large_images_are_reduced(segmenter: multisa.Segmenter, tmp_path: Path) -> None:
    with Image.open(IMAGES[1]) as image:
        image.load()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    turned = segmenter(tmp_path / "turned.png")
    assert turned.mask.shape == (image.width, image.height) and turned.orientation == 6
    with Image.open(tmp_path / "turned.png") as opened:
        assert segmenter(opened).png == turned.png
    large = image.resize((3 * image.width, 3 * image.height))
    found = segmenter(large)
    assert found.mask.shape == (large.height, large.width) and max(found.working_size) <= 512


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent.jpg", "absent.jpg: .*check the path"),
        (b"no image", "not an image of a supported format"),
        (np.zeros((4, 4), np.uint8), r"got uint8 \[4, 4\], expected RGB as uint8 \[H, W, 3\]"),
        (np.zeros((4, 4, 3), np.float32), r"got float32 \[4, 4, 3\]"),
        ("a\0b.jpg", "a.*b.jpg"),
        ("/dev/null", "is not a regular file"),
        (Image.new("RGB", (0, 5)), "got an image of 0x5 pixels"),
        (7, "got int, expected a path, the bytes of an image file, a PIL image"),
        (np.zeros((9000, 9000, 3), np.uint8), "9000x9000 = 81000000 pixels, expected at most 50000000"),
    ],
)
def test_what_a_call_refuses(segmenter: multisa.Segmenter, given: object, message: str) -> None:
    with pytest.raises(multisa.MultisaError, match=message):
        segmenter(given)  # type: ignore[arg-type]


def test_several_threads_may_call(segmenter: multisa.Segmenter) -> None:
    expected = [segmenter(path).png for path in IMAGES]
    together = threading.Barrier(4)

    def work(_: int) -> list[bytes]:
        together.wait(timeout=30)
        return [segmenter(path).png for path in IMAGES]

    with ThreadPoolExecutor(4) as threads:
        assert all(found == expected for found in threads.map(work, range(4)))


def test_a_closed_segmenter_says_so() -> None:
    with multisa.Segmenter(threads=1) as segment:
        pass
    with pytest.raises(multisa.MultisaError, match="closed"):
        segment(IMAGES[0])


def test_pictures(segmenter: multisa.Segmenter, tmp_path: Path) -> None:
    prediction = segmenter(IMAGES[1])
    overlay = prediction.overlay(IMAGES[1])
    assert overlay.size == prediction.mask.shape[::-1]
    with Image.open(IMAGES[1]) as image:
        changed = (np.asarray(overlay) != np.asarray(image.convert("RGB"))).any(axis=2)
    np.testing.assert_array_equal(changed & (prediction.mask == 0), False)
    assert changed[prediction.mask > 0].mean() > 0.9
    with pytest.raises(multisa.MultisaError, match=r"expected .* as the mask"):
        prediction.overlay(IMAGES[0])
    with pytest.raises(multisa.MultisaError, match=r"ending in \.png"):
        prediction.save(tmp_path / "mask.jpg")


def test_pseudo_labels() -> None:
    with multisa.PseudoLabeler() as label:
        cat = label(IMAGES[1], labels=["cat"])
        assert cat.classes == ("cat",) and (cat.mask == 1).mean() > 0.1
        assert label(IMAGES[1], labels=[]).mask.max() == 0
        assert label(IMAGES[1]).record()["labels_from"] == "segmenter"
        with pytest.raises(multisa.MultisaError, match="unknown class 'lion', expected cat, cow"):
            label(IMAGES[1], labels=["lion"])
        with pytest.raises(multisa.MultisaError, match="expected a sequence of class names"):
            label(IMAGES[1], labels="cat")


def test_folders(tmp_path: Path) -> None:
    folder = IMAGES[0].parent
    summary = multisa.segment_images(folder, tmp_path / "out", writers=["masks", "coco"], report_images=0)
    assert (summary.images, summary.failures) == (len(IMAGES), 0)
    assert (tmp_path / "out/coco/annotations/instances_default.json").is_file()
    labels = {path.name: ["cat"] if path.stem == "chelsea" else [] for path in IMAGES}
    again = [multisa.label_images(folder, tmp_path / "pseudo", labels, report_images=0) for _ in range(2)]
    assert [run.done_now for run in again] == [len(IMAGES), 0]  # the second call resumes
    evaluation = multisa.evaluate_masks(tmp_path / "out/masks", tmp_path / "pseudo/masks")
    assert evaluation.images == len(IMAGES) and 0 < (evaluation.iou["cat"] or 0) < 1
    assert evaluation.to_json()["miou"] == evaluation.miou and 0 < evaluation.pixel_accuracy < 1
    walked = multisa.label_images(folder, tmp_path / "walk", labels, method="walk", min_area=0.0, report_images=0)
    assert walked.done == len(IMAGES)
    with pytest.raises(multisa.MultisaError, match="label method: got walk, the existing run has segmenter"):
        multisa.label_images(folder, tmp_path / "pseudo", labels, method="walk", report_images=0)
    with pytest.raises(multisa.MultisaError, match="got the argument 'method', expected some of bundle,"):
        multisa.segment_images(folder, tmp_path / "out", method="walk")  # type: ignore[call-arg]
    with pytest.raises(multisa.MultisaError, match="method: got 'cam', expected segmenter or walk"):
        multisa.label_images(folder, tmp_path / "none", method="cam")  # type: ignore[arg-type]
    with pytest.raises(multisa.MultisaError, match="got the argument 'writer', expected some of bundle,"):
        multisa.segment_images(folder, tmp_path / "out", writer="masks")  # type: ignore[call-arg]
    assert multisa.segment_images(IMAGES[:2], tmp_path / "two", report_images=0).images == 2
    for wrong in ([], {"a.jpg": 1}):
        with pytest.raises(multisa.MultisaError, match=r"images: got (list|dict), expected a path, a"):
            multisa.segment_images(wrong, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(multisa.MultisaError, match="labels: got list, expected a file or a mapping"):
        multisa.label_images(folder, tmp_path / "out", ["cat"])  # type: ignore[arg-type]
    with pytest.raises(multisa.MultisaError, match="workers: got 'two', expected an integer"):
        multisa.segment_images(folder, tmp_path / "out", workers="two")  # type: ignore[arg-type]
    with pytest.raises(multisa.MultisaError, match="threads: got 'two', expected an integer of at least 1"):
        multisa.Segmenter(threads="two")  # type: ignore[arg-type]


def test_what_a_shell_shows(segmenter: multisa.Segmenter) -> None:
    """One short line each: the values contain arrays and whole bundles."""
    assert repr(multisa.load_bundle()).startswith("Bundle('voc-animals', 7 classes, path='")
    assert repr(segmenter).startswith("Segmenter(Bundle('voc-animals', ") and "onnxruntime-cpu fp32)" in repr(segmenter)
    assert re.fullmatch(r"Prediction\(300x451, classes=\('cat',\), uncertainty=0\.\d\d\)", repr(segmenter(IMAGES[1])))


def test_one_image_can_be_followed(segmenter: multisa.Segmenter) -> None:
    """The docs page "Follow one image" names the functions that are counted here."""
    segmenter(IMAGES[1])
    called: dict[str, None] = {}

    def trace(frame: object, event: str, _: object) -> None:
        code = frame.f_code  # type: ignore[attr-defined]
        path = Path(code.co_filename)
        ours = path.is_absolute() and path.resolve().is_relative_to(ROOT) and ".venv" not in path.parts
        if event == "call" and ours:
            called[code.co_name] = None

    sys.setprofile(trace)
    try:
        segmenter(IMAGES[1])
    finally:
        sys.setprofile(None)
    assert next(iter(called)) == "__call__"
    assert len(called) - 1 <= MOST_FUNCTIONS, "\n".join(called)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("Follow one image")[2].partition("\n## ")[0]
    assert not [name for name in called if name not in section]
