"""Stored class probabilities: the masks made from them, and files that are not what they claim."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from plain_masks import clear, enlarge, part_sizes

from multisa.runtime.bundle import LabelParameters
from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import read_mask, write_mask
from multisa.runtime.imaging.png import voc_palette
from multisa.runtime.predict.postprocess import background_and_foreground, pseudo_mask
from multisa.runtime.predict.prediction import ClassProbabilities
from multisa.runtime.writers import probabilities as probabilities_module
from multisa.runtime.writers.base import LabelledImage, WriterContext, tar_bytes, zip_bytes
from multisa.runtime.writers.probabilities import ProbabilitiesWriter, mask_from_probabilities, read_probabilities

BACKGROUND = 0.3
SIZE = (57, 83)  # of the image; the networks saw it smaller


def scores(seed: int) -> np.ndarray:
    """Two classes' smooth score maps, float32 [2, 24, 32]."""
    return np.random.default_rng(seed).random((2, 24, 32), np.float32)


def made_by_run(seed: int, background: float) -> np.ndarray:
    """The mask that a run without a CRF makes, uint8 SIZE."""
    parameters = LabelParameters(use_crf=False, background=background)
    made = pseudo_mask(np.zeros((24, 32, 3), np.uint8), scores(seed), (1, 2), parameters)
    return ClassProbabilities((0, 1, 2), made.probabilities).choose(SIZE)[0]


def close(seed: int, background: float) -> np.ndarray:
    """Pixels whose two highest probabilities may round to one half-precision number, bool SIZE."""
    return ~clear(enlarge(background_and_foreground(scores(seed), background), SIZE), by=1e-3)


@pytest.fixture
def images(labelled: Callable[..., LabelledImage]) -> list[LabelledImage]:
    made = []
    for seed, name in enumerate(("a", "deep/b.c", "ü%2E")):
        maps = background_and_foreground(scores(seed), BACKGROUND)
        made.append(labelled(name, made_by_run(seed, BACKGROUND), seed, ClassProbabilities((0, 1, 2), maps)))
    return made


@pytest.fixture
def tar(images: list[LabelledImage], write_all: Callable[..., Path]) -> Path:
    return write_all(["probabilities"], images) / "probabilities/000000.tar"


def test_probabilities_are_read_as_they_were_written(tar: Path, images: list[LabelledImage]) -> None:
    read = [*read_probabilities(tar), *read_probabilities(tar.with_name("000001.tar"))]
    assert [image.name for image in read] == [image.name for image in images]
    for found, image in zip(read, images, strict=True):
        assert found.probabilities.class_ids == (0, 1, 2) and found.size == SIZE and found.record == image.record
        maps = image.probabilities.probabilities
        assert found.probabilities.probabilities.dtype == np.float32
        assert (found.probabilities.probabilities == maps.astype(np.float16)).all()
        assert (found.confidence == np.floor(maps.max(axis=0) * 255 + 0.5)).all()


def test_numpy_opens_the_arrays(tar: Path, images: list[LabelledImage]) -> None:
    with tarfile.open(tar) as archive:
        data = archive.extractfile("a.npz").read()
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        assert sorted(arrays) == ["class_ids", "confidence", "probabilities", "size"]
        assert arrays["probabilities"].dtype == np.float16
        assert (arrays["probabilities"] == images[0].probabilities.probabilities.astype(np.float16)).all()


def test_a_huge_weight_is_all_background(tar: Path) -> None:
    for weight in (1e30, 1e300):
        assert not mask_from_probabilities(next(read_probabilities(tar)), background_weight=weight).any()


@pytest.mark.parametrize("weight", [0.5, 1.0, 1.7])
def test_masks_are_those_of_another_background_score(tar: Path, weight: float) -> None:
    for seed, image in enumerate(read_probabilities(tar)):
        mask, expected = (
            mask_from_probabilities(image, background_weight=weight),
            made_by_run(seed, BACKGROUND * weight),
        )
        far = ~close(seed, BACKGROUND * weight)
        assert mask.shape == SIZE and far.mean() > 0.95 and set(np.unique(expected)) == {0, 1, 2}
        assert (mask == expected)[far].all()
    assert (made_by_run(0, BACKGROUND) != made_by_run(0, BACKGROUND * 1.7)).mean() > 0.05


def test_unsure_pixels_are_left_open(tar: Path) -> None:
    image = next(read_probabilities(tar))
    highest = enlarge(image.probabilities.probabilities, SIZE).max(axis=0)
    mask = mask_from_probabilities(image, minimum_confidence=0.5)
    assert (mask[highest < 0.495] == 255).all() and 0.1 < (mask == 255).mean() < 0.9
    sure = highest >= 0.505
    assert (mask != 255)[sure].all() and (mask == mask_from_probabilities(image))[sure].all()


def test_the_lowest_confidence_is_rounded_up(tar: Path) -> None:
    image = next(read_probabilities(tar))
    mask, above = (mask_from_probabilities(image, minimum_confidence=limit) for limit in (153.2 / 255, 154 / 255))
    at_limit = mask_from_probabilities(image, minimum_confidence=153 / 255)
    np.testing.assert_array_equal(mask, above)
    assert (at_limit != above).any()


def test_small_parts_are_absorbed_as_in_a_run(tar: Path) -> None:
    image = next(read_probabilities(tar))
    limit = 40
    mask, rough = (mask_from_probabilities(image, min_area=area) for area in (limit / (57 * 83), 0))
    assert min(min(part_sizes(rough, class_id)) for class_id in (0, 1, 2)) < limit
    assert min(min(part_sizes(mask, class_id)) for class_id in np.unique(mask)) >= limit


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"background_weight": 0.0}, "got 0.0 as the background's weight"),
        ({"background_weight": float("nan")}, "got nan as the background's weight"),
        ({"background_weight": float("inf")}, "got inf as the background's weight"),
        ({"minimum_confidence": 1.0}, "got 1.0 as the lowest confidence"),
        ({"minimum_confidence": -0.1}, "got -0.1 as the lowest confidence"),
        ({"min_area": 1.0}, "got 1.0 as the smallest area"),
    ],
)
def test_thresholds_that_are_none(tar: Path, settings: dict, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        mask_from_probabilities(next(read_probabilities(tar)), **settings)


def test_masks_of_a_whole_run(tar: Path, images: list[LabelledImage], tmp_path: Path) -> None:
    for path in sorted(tar.parent.iterdir()):
        for stored in read_probabilities(path):
            mask = mask_from_probabilities(stored, background_weight=1e-6)
            write_mask(tmp_path / f"new/{stored.name}.png", mask, voc_palette())
    assert len(images) == 3
    for image in images:
        assert set(np.unique(read_mask(tmp_path / f"new/{image.name}.png"))) == {1, 2}


def altered(
    tar: Path, replaced: dict[str, bytes | None], *, key: str = "a", renamed: str | None = None, extra: tuple = ()
) -> bytes:
    """The first image of a tar, some arrays replaced or left out."""
    with tarfile.open(tar) as archive:
        npz, record = (archive.extractfile(f"a.{end}").read() for end in ("npz", "json"))
    with zipfile.ZipFile(io.BytesIO(npz)) as members:
        arrays = {name: members.read(name) for name in members.namelist()}
    kept = [(name, data) for name, data in (arrays | replaced).items() if data is not None]
    return tar_bytes([(f"{key}.npz", zip_bytes(kept, level=1)), (f"{renamed or key}.json", record), *extra])


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def second_image(tar: Path) -> int:
    """Where the tar's second image begins."""
    with tarfile.open(tar) as archive:
        return archive.getmembers()[2].offset


def npz_only(tar: Path) -> bytes:
    with tarfile.open(tar) as archive:
        return tar_bytes([("a.npz", archive.extractfile("a.npz").read())])


def linked() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("a.npz")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    return buffer.getvalue()


HUGE = npy(np.zeros((3, 2, 2), np.float16)).replace(b"(3, 2, 2), }", b"(3,99999,99999), }")
BROKEN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "no tar": (lambda tar: b"nothing" * 200, "expected a tar of class probabilities"),
    "cut short": (lambda tar: tar.read_bytes()[:1500], "expected a tar of class probabilities"),
    "no record": (npz_only, "'a' without its record"),
    "another's record": (lambda tar: altered(tar, {}, key="b", renamed="a"), "got the member 'a.json'"),
    "a damaged header": (lambda tar: tar.read_bytes().replace(b"b%2Ec.npz", b"b%2Ec.np_"), "damaged or truncated"),
    "cut between images": (lambda tar: tar.read_bytes()[: second_image(tar)], "damaged or truncated"),
    "a link": (lambda tar: linked(), "got the member 'a.npz'"),
    "another member": (lambda tar: altered(tar, {}, extra=(("a.txt", b""),)), "got the member 'a.txt'"),
    "a path out": (lambda tar: altered(tar, {}, key="../a"), r"got the name '\.\./a'"),
    "a path out, escaped": (lambda tar: altered(tar, {}, key="x/%2E%2E/a"), r"got the name 'x/\.\./a'"),
    "from the root": (lambda tar: altered(tar, {}, key="%2Fa"), "got the name '/a'"),
    "an array missing": (lambda tar: altered(tar, {"size.npy": None}), "expected the arrays class_ids"),
    "an array more": (lambda tar: altered(tar, {"x.npy": b""}), "expected the arrays class_ids"),
    "objects": (lambda tar: altered(tar, {"class_ids.npy": npy(np.array([None] * 3))}), "another header"),
    "another type": (lambda tar: altered(tar, {"class_ids.npy": npy(np.zeros(3))}), "another header"),
    "a made-up shape": (lambda tar: altered(tar, {"probabilities.npy": HUGE}), r"shape \(3, 99999, 99999\)"),
    "other classes": (lambda tar: altered(tar, {"class_ids.npy": npy(np.zeros(4, np.uint8))}), "do not fit together"),
    "a class twice": (
        lambda tar: altered(tar, {"class_ids.npy": npy(np.array([0, 1, 1], np.uint8))}),
        "expected each once",
    ),
    "no probabilities": (
        lambda tar: altered(tar, {"probabilities.npy": npy(np.full((3, 24, 32), np.nan, np.float16))}),
        r"not within 0\.\.1",
    ),
    "a huge size": (
        lambda tar: altered(tar, {"size.npy": npy(np.array([99999, 99999], np.int32))}),
        "expected 1 to 50000000 pixels",
    ),
    "no size": (
        lambda tar: altered(tar, {"size.npy": npy(np.array([0, 5], np.int32))}),
        "expected 1 to 50000000 pixels",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_hold_no_probabilities(kind: str, tar: Path, tmp_path: Path) -> None:
    make, expected = BROKEN[kind]
    path = tmp_path / "broken.tar"
    path.write_bytes(make(tar))
    with pytest.raises(UsageError, match=expected) as refusal:
        list(read_probabilities(path))
    assert str(refusal.value).startswith(str(path))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory: expected a tar of class probabilities"):
        list(read_probabilities(tmp_path / "none.tar"))


def test_arrays_that_swell_are_refused(tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probabilities_module, "MAX_ARRAY_BYTES", 100_000)
    swollen = npy(np.zeros((3, 1000, 1000), np.float16))
    path = tmp_path / "bomb.tar"
    path.write_bytes(altered(tar, {"probabilities.npy": swollen}))
    assert path.stat().st_size < 100_000
    with pytest.raises(UsageError, match="probabilities: got "):
        list(read_probabilities(path))


def test_damaged_files_are_read_or_refused(
    labelled: Callable[..., LabelledImage], writer_context: WriterContext, tmp_path: Path
) -> None:
    maps = background_and_foreground(scores(1)[:, :4, :4], BACKGROUND)
    image = labelled("a", made_by_run(1, BACKGROUND), 0, ClassProbabilities((0, 1, 2), maps))
    good = tar_bytes(ProbabilitiesWriter(writer_context).encode(image))
    random, path, refused = np.random.default_rng(0), tmp_path / "damaged.tar", 0
    for _ in range(400):
        data = np.frombuffer(good, np.uint8).copy()
        data[random.integers(0, len(data), random.integers(1, 8))] = random.integers(0, 256)
        path.write_bytes(data.tobytes()[: random.integers(len(data) // 2, len(data) + 1)])
        try:
            for found in read_probabilities(path):
                mask_from_probabilities(found)
        except UsageError:
            refused += 1
    assert refused > 100
