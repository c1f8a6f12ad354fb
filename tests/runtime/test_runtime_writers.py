"""What each format writes, read back by its own library where that is in this environment."""

import io
import json
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from pycocotools.coco import COCO
from webdataset.tariterators import group_by_keys, tar_file_expander

from multisa.runtime.errors import BackendUnavailable, ImageError, UsageError
from multisa.runtime.imaging.decode import read_mask
from multisa.runtime.predict.prediction import ClassProbabilities
from multisa.runtime.writers.base import (
    LabelledImage,
    WriterContext,
    distinct_colours,
    encode_rows,
    grey_png,
    ignore_name,
)
from multisa.runtime.writers.coco import CocoWriter
from multisa.runtime.writers.label_studio import LabelStudioWriter
from multisa.runtime.writers.registry import WRITERS, open_writers

NAMES = ("plain", "deep/a.b", "deep/a", "deep%2Fa", "a.jpg", "#ü 日本", "__MACOSX__/x")

Make = Callable[..., LabelledImage]
Write = Callable[..., Path]


@pytest.fixture
def images(labelled: Make, blocks: Callable[..., np.ndarray]) -> list[LabelledImage]:
    """Seven images of different sizes; the third has pixels without a label, the fifth one class alone."""
    masks = [blocks(20 + 3 * i, 41 - 2 * i, seed=i) for i in range(len(NAMES))]
    masks[2][:4, :7] = 255
    masks[4][:] = 2
    maps = np.full((3, 5, 4), 1 / 3, np.float16)
    return [
        labelled(name, mask, index, ClassProbabilities((0, 1, 2), maps))
        for index, (name, mask) in enumerate(zip(NAMES, masks, strict=True))
    ]


def files_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_writers_are_opened_by_name_each_once(writer_context: WriterContext) -> None:
    writers = open_writers(["probabilities", "masks", "probabilities"], writer_context)
    assert [type(writer).__name__ for writer in writers] == ["ProbabilitiesWriter", "MasksWriter"]
    with pytest.raises(UsageError, match="got the writer 'voc', expected one of masks, tar, coco, cvat"):
        open_writers(["masks", "voc"], writer_context)


def test_a_missing_package_is_an_error_when_the_writer_is_opened(
    writer_context: WriterContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r'pip install "multisa\[parquet\]"'):
        open_writers(["parquet"], writer_context)


def test_the_same_images_give_the_same_bytes(images: list[LabelledImage], write_all: Write, tmp_path: Path) -> None:
    first, second = (files_of(write_all(list(WRITERS), images, tmp_path / run)) for run in "ab")
    assert first == second
    assert len({name.split("/")[0] for name in first}) == len(WRITERS)
    for name, data in first.items():
        if name.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in archive} == {(0, 0, 0, "", 0o644)}


def test_files_named_after_images_are_those_that_are_told(
    images: list[LabelledImage], write_all: Write, writer_context: WriterContext, tmp_path: Path
) -> None:
    for name in WRITERS:
        written = files_of(write_all([name], images, tmp_path / name))
        (writer,) = open_writers([name], writer_context)
        told = {path for image in images for path in writer.results(image.name)}
        assert told <= set(written)
        assert bool(told) == (name in ("masks", "datumaro", "confidence"))


def test_a_shard_without_images_writes_no_file(writer_context: WriterContext, tmp_path: Path) -> None:
    class Nothing:
        def write(self, relative: str, data: bytes) -> None:
            raise AssertionError(relative)

        def write_part(self, writer: str, data: bytes) -> None:
            assert data == b""

    for writer in open_writers(list(WRITERS), writer_context):
        writer.write_shard(Nothing(), 0, [])


def test_masks_are_the_pngs(images: list[LabelledImage], write_all: Write) -> None:
    out = write_all(["masks"], images)
    assert files_of(out) == {f"masks/{image.name}.png": image.png for image in images}


def test_webdataset_reads_the_tars(images: list[LabelledImage], write_all: Write) -> None:
    out = write_all(["tar"], images)
    shards = sorted(str(path) for path in (out / "shards").iterdir())
    assert [Path(shard).name for shard in shards] == [f"00000{i}.tar" for i in range(4)]
    samples = []
    for shard in shards:
        with Path(shard).open("rb") as stream:
            samples += group_by_keys(tar_file_expander([{"url": shard, "stream": stream}]))
    assert len({sample["__key__"] for sample in samples}) == len(images)
    for sample, image in zip(samples, images, strict=True):
        assert json.loads(sample["json"]) == image.record
        with Image.open(io.BytesIO(sample["png"])) as mask:
            assert (np.array(mask) == image.mask).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_pycocotools_reads_the_annotations(
    images: list[LabelledImage], write_all: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = COCO(write_all(["coco"], images) / "coco/annotations/instances_default.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == ["red thing", "green"]
    assert sorted(coco.getImgIds()) == [image.index + 1 for image in images]
    for image in images:
        (entry,) = coco.loadImgs(image.index + 1)
        assert (entry["file_name"], entry["height"], entry["width"]) == (image.id, *image.mask.shape)
        mask = np.zeros_like(image.mask)
        for annotation in coco.loadAnns(coco.getAnnIds(image.index + 1)):
            part = coco.annToMask(annotation)
            assert annotation["area"] == part.sum() and not annotation["iscrowd"]
            mask += (part * annotation["category_id"]).astype(np.uint8)
        assert (mask == np.where(image.mask == 255, 0, image.mask)).all()


def test_a_retry_puts_annotations_in_their_place(
    images: list[LabelledImage], writer_context: WriterContext, tmp_path: Path
) -> None:
    from_order = {}
    for order in ([0, 1, 2, 3, 4, 5, 6], [0, 2, 4, 6, 1, 3, 5]):
        writer, parts = CocoWriter(writer_context), []
        rows = [writer.encode(images[place]) for place in order]
        parts = [encode_rows(rows[:2]), encode_rows(rows[2:4]), encode_rows(rows[4:5]), encode_rows(rows[5:])]
        folder = KeptParts(parts)
        writer.finalize(folder, 4)
        from_order[tuple(order)] = folder.data
    first, second = from_order.values()
    assert first == second and len(json.loads(first)["images"]) == 7


class KeptParts:
    """A finished run with these parts; pieces written are joined, or only counted."""

    def __init__(self, parts: list[bytes], times: int = 1, *, joined: bool = True) -> None:
        self.kept, self.times, self.joined, self.data, self.size = parts, times, joined, b"", 0

    def parts(self, writer: str):
        for time in range(self.times):
            for part in self.kept:
                yield part.replace(b"0\t", b"%d\t" % time, 1)

    def write(self, relative: str, pieces) -> None:
        for piece in pieces:
            self.size += len(piece)
            self.data = self.data + piece if self.joined else piece


def test_the_end_takes_no_more_memory_for_ten_times_the_images(
    labelled: Make, writer_context: WriterContext, blocks: Callable[..., np.ndarray]
) -> None:
    writer = CocoWriter(writer_context)
    part = encode_rows([writer.encode(labelled("a", blocks(400, 400, seed=1)))])
    peaks, sizes = [], []
    for shards in (20, 20, 200):  # the first for what Python keeps
        folder = KeptParts([part], shards, joined=False)
        tracemalloc.start()
        writer.finalize(folder, shards)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(folder.size)
    assert sizes[2] > 9 * sizes[1] and sizes[1] > 20 * len(part) / 2
    assert peaks[2] < 1.2 * peaks[1] and peaks[2] < sizes[2] / 10


def test_cvat_declares_every_colour(images: list[LabelledImage], write_all: Write) -> None:
    with zipfile.ZipFile(write_all(["cvat"], images) / "cvat/000001.zip") as archive:
        lines = archive.read("labelmap.txt").decode().splitlines()
        declared = {tuple(map(int, line.split(":")[1].split(","))) for line in lines[1:]}
        assert [line.split(":")[0] for line in lines[1:]] == ["background", "red thing", "green", "ignore"]
        assert archive.read("ImageSets/Segmentation/default.txt").decode() == "deep/a\ndeep%252Fa\n"
        with Image.open(archive.open("SegmentationClass/deep/a.png")) as mask:
            colours = {colour for _, colour in mask.convert("RGB").getcolors()}
            assert colours == declared
        with Image.open(archive.open("SegmentationObject/deep/a.png")) as objects:
            assert (np.array(objects) == np.where(images[2].mask == 255, 0, images[2].mask)).all()


def test_colours_and_names_are_never_shared(writer_context: WriterContext) -> None:
    palette = ((0, 0, 0), (0, 0, 0), (224, 224, 192))  # the second twice, the third is VOC's of 255
    manifest = replace(writer_context.manifest, palette=palette, classes=("background", "ignore", "b"))
    colours = distinct_colours(manifest)
    assert len(np.unique(colours, axis=0)) == 256
    assert colours[0].tolist() == [0, 0, 0] and colours[2].tolist() == [224, 224, 192]
    assert ignore_name(manifest) == "ignore_"


def test_label_studio_tasks(images: list[LabelledImage], write_all: Write) -> None:
    out = write_all(["label-studio"], images)
    (task, _) = json.loads((out / "label-studio/000000.json").read_text())
    assert task["data"] == {"image": "plain.jpg"}
    (prediction,) = task["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("tiny-abababababab", 0.75)
    assert [r["value"]["brushlabels"] for r in prediction["result"]] == [["red thing"], ["green"]]
    assert (prediction["result"][0]["original_width"], prediction["result"][0]["original_height"]) == (41, 20)
    assert '<Label value="red thing" background="#c82828"/>' in (out / "label-studio/labeling_config.xml").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("", "#ü a.jpg"),
        ("s3://bucket/", "s3://bucket/#ü a.jpg"),
        ("s3://bucket", "s3://bucket/#ü a.jpg"),
        ("s3://", "s3://#ü a.jpg"),
        ("images", "images/#ü a.jpg"),
        ("/", "/%23%C3%BC%20a.jpg"),
        ("https://host/", "https://host/%23%C3%BC%20a.jpg"),
        ("https://host", "https://host/%23%C3%BC%20a.jpg"),
        ("https://host/get?", "https://host/get?%23%C3%BC%20a.jpg"),
        ("https://host/get?size=1&file=", "https://host/get?size=1&file=%23%C3%BC%20a.jpg"),
        ("/data/local-files/?d=", "/data/local-files/?d=%23%C3%BC%20a.jpg"),
        ("/data/local-files/?d=images", "/data/local-files/?d=images/%23%C3%BC%20a.jpg"),
        ("/data/local-files/?d=images/", "/data/local-files/?d=images/%23%C3%BC%20a.jpg"),
        ("/data/local-files/?d=images%2F", "/data/local-files/?d=images%2F%23%C3%BC%20a.jpg"),
    ],
)
def test_label_studio_finds_the_images(
    prefix: str, expected: str, labelled: Make, writer_context: WriterContext
) -> None:
    (writer,) = open_writers(["label-studio"], writer_context, image_prefix=prefix)
    task = json.loads(writer.encode(labelled("#ü a", np.zeros((3, 4), np.uint8))))
    assert task["data"]["image"] == expected and task["predictions"][0]["result"] == []


def test_an_image_too_large_for_label_studio_is_refused(
    labelled: Make, writer_context: WriterContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multisa.runtime.writers.label_studio._MAX_PIXELS", 11)
    with pytest.raises(ImageError, match="got 12 pixels, the format takes at most 11"):
        LabelStudioWriter(writer_context).encode(labelled("a", np.ones((3, 4), np.uint8)))


def test_datumaro_masks_are_grey_ids(images: list[LabelledImage], write_all: Write) -> None:
    out = write_all(["datumaro"], images) / "datumaro"
    table = [json.loads(line) for line in (out / "names.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["image"] for line in table] == [image.id for image in images]
    assert len(list((out / "masks").iterdir())) == len(images)
    for line, image in zip(table, images, strict=True):
        path = out / "masks" / f"{line['item']}.png"
        with Image.open(path) as mask:
            assert mask.mode == "L"
        assert (read_mask(path) == np.where(image.mask == 255, 3, image.mask)).all()


@pytest.mark.parametrize("bits", [8, 2])
def test_a_palette_png_becomes_grey(bits: int, blocks: Callable[..., np.ndarray]) -> None:
    mask, buffer = blocks(21, 33), io.BytesIO()
    picture = Image.fromarray(mask)
    picture.putpalette(bytes(range(12)))
    picture.save(buffer, "PNG", bits=bits, transparency=1)
    with Image.open(io.BytesIO(grey_png(mask, buffer.getvalue()))) as grey:
        assert grey.mode == "L" and (np.array(grey) == mask).all()


def test_pyarrow_reads_the_statistics(images: list[LabelledImage], write_all: Write) -> None:
    out = write_all(["parquet"], images)
    rows = pyarrow.parquet.read_table(out / "parquet").to_pylist()
    assert [row["image"] for row in rows] == [image.id for image in images]
    for row, image in zip(rows, images, strict=True):
        assert row["index"] == image.index and row["name"] == image.name
        assert (row["width"], row["height"]) == image.mask.shape[::-1]
        expected = {name: image.record["pixel_shares"].get(name, 0) for name in row["pixel_shares"]}
        assert row["pixel_shares"] == expected and list(expected) == ["background", "red thing", "green"]
        assert row["classes"] == image.record["classes"] and row["notes"] == []
        assert row["confidence"] == 0.75 and row["uncertainty"] is None
        assert json.loads(row["details"]) == {"scores": {"green": 0.5}}
