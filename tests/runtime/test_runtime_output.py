"""Runs whose results could replace an image, or be taken for one, are refused before they write."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from job_runs import run_label, run_segment

from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.jobs.output import check_output
from multisa.runtime.jobs.record import RunSummary

Run = Callable[..., RunSummary]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("out", [".", "deep", "new/out"])
def test_output_inside_the_images_is_refused(photos: Path, bundle: Bundle, out: str) -> None:
    before = sorted(photos.rglob("*"))
    with pytest.raises(UsageError, match="lies inside"):
        run_segment(photos, photos / out, bundle)
    assert sorted(photos.rglob("*")) == before


@pytest.mark.parametrize("below", ["masks", "masks/deep", "report", ".multisa/kept"])
@pytest.mark.parametrize("run", [run_label, run_segment])
def test_images_inside_the_results_are_refused_and_kept(
    run: Run, photos: Path, bundle: Bundle, tmp_path: Path, below: str
) -> None:
    out = tmp_path / "out"
    source = out / below
    source.parent.mkdir(parents=True)
    photos.rename(source)
    (source / "broken.png").write_bytes(b"no image, and its mask would have its very path")
    before = contents(out)
    for images in (source, source / "b.png", source / "broken.png"):
        with pytest.raises(UsageError, match=r"lies inside .*choose"):
            run(images, out, bundle)
    assert contents(out) == before


def test_output_in_the_folder_of_the_one_image_is_refused(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alias.jpg").symlink_to(photos / "a.jpg")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/masks").symlink_to(photos / "masks", target_is_directory=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(photos)
    for image, out in (
        ("a.jpg", "."),
        ("a.jpg", photos),
        ("a.jpg", "deep/.."),
        ("deep/c.jpg", "deep"),
        (tmp_path / "alias.jpg", photos),
        ("a.jpg", tmp_path / "linked"),
    ):
        with pytest.raises(UsageError, match="results would lie beside the image"):
            run_segment(Path(image), Path(out), bundle)
    assert sorted(tmp_path.rglob("*")) == before
    assert run_segment(Path("a.jpg"), Path("out"), bundle).failures == 0


def test_images_reached_through_links_are_kept(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    before = contents(photos)
    for name, place, target in (("all", "masks", photos), ("page", "report", photos)):
        link = tmp_path / name / place
        link.parent.mkdir(parents=True)
        link.symlink_to(target, target_is_directory=True)
        with pytest.raises(UsageError, match="lies inside the images' folder"):
            run_segment(photos, tmp_path / name, bundle)
    for one in ("b.png", "deep/d.png"):  # the link is the image, or leads to it
        with pytest.raises(UsageError, match="would replace the images"):
            run_segment(tmp_path / "all/masks" / one, tmp_path / "all", bundle)
    (tmp_path / "alias.png").symlink_to(photos / "b.png")
    with pytest.raises(UsageError, match="would replace the images"):
        run_segment(tmp_path / "alias.png", tmp_path / "all", bundle)
    inner = tmp_path / "inner/masks/deep"
    inner.parent.mkdir(parents=True)
    inner.symlink_to(photos / "deep", target_is_directory=True)
    with pytest.raises(MultisaError, match=r"masks/deep: is a link to .*remove the link"):
        run_segment(photos, tmp_path / "inner", bundle, overwrite=True)
    assert contents(photos) == before


def test_images_beside_the_results_are_taken(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    assert run_segment(photos, tmp_path, bundle).failures == 1
    assert (tmp_path / "masks/deep/c.png").is_file()


@pytest.mark.parametrize(
    ("pattern", "out", "said"),
    [
        ("photos/**/*.png", "photos/out", "lies inside what"),
        ("photos/**/*.png", "photos", "lies inside what"),
        ("photos/*/*.png", "photos", "lies inside what"),
        ("photos/[!x]*/masks/*.png", "photos/out", "lies inside what"),
        ("photos/*.png", "photos", "would lie beside the image"),
        ("**/*.png", "out", "lies inside what"),
        ("out/masks/*.png", "out", "would replace the images"),
        ("out/masks/de*/*.png", "out", "would replace the images"),
        ("out/shards/{0..3}.tar", "out", "would replace the images"),
        ("file://photos", "photos/out", "lies inside the images' folder"),
        ("FILE://photos/**/*.png", "photos/out", "lies inside what"),
        ("photos/*.png", "photos/out", ""),
        ("*/*.png", "out", ""),
        ("photos/deep/**/*.png", "photos/out", ""),
        ("nowhere/**/*.png", "nowhere/out", ""),  # of which the source has more to say
        ("s3://bucket/**/*.png", "bucket", ""),
        ("x[1]", "x[1]/out", "lies inside the images' folder"),  # a folder of that very name
    ],
)
def test_patterns_that_reach_the_results(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, out: str, said: str
) -> None:
    assert photos == tmp_path / "photos"
    monkeypatch.chdir(tmp_path)
    for folder in ("out/masks/deep", "out/shards", "x[1]"):
        Path(folder).mkdir(parents=True)
    with pytest.raises(UsageError, match=said) if said else nullcontext():
        check_output(pattern, Path(out), ["masks", "shards"])


@pytest.mark.parametrize("name", ["out/masks/b.png", "photos/../out/masks/deep/d.png", "linked/b.png"])
def test_lists_of_images_inside_the_results_are_refused(
    photos: Path, bundle: Bundle, tmp_path: Path, name: str
) -> None:
    out, images = tmp_path / "out", tmp_path / "images.txt"
    out.mkdir()
    photos.rename(out / "masks")
    photos.mkdir()
    (tmp_path / "linked").symlink_to(out / "masks", target_is_directory=True)
    before = contents(out)
    images.write_text(f"{name}\n")
    with pytest.raises(UsageError, match=r"lies inside .*out/masks, where the results would replace"):
        run_segment(images, out, bundle, overwrite=True)
    after = {path: data for path, data in contents(out).items() if ".multisa" not in path.parts}
    assert after == before
    assert run_segment(images, tmp_path / "other", bundle).failures == 0


def test_output_that_is_a_file(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="is a file"):
        run_label(photos, tmp_path / "out", bundle)
