"""Finding the images of a corpus and naming them."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from multisa.runtime.errors import UsageError
from multisa.runtime.imaging.decode import EXTENSIONS

_ENDING = ".png"  # of the masks that are named after an image


@dataclass(frozen=True)
class CorpusImage:
    """One image; its path below the folder and its name are posix paths."""

    path: Path
    relative: str  # below the corpus' folder
    name: str  # without extension; unique


@dataclass(frozen=True)
class Corpus:
    """The images, sorted by relative path, and what was passed over (`path: reason`)."""

    images: tuple[CorpusImage, ...]
    skipped: tuple[str, ...]
    other_files: int = 0  # how many files are no images by their extension


def find_images(source: Path) -> Corpus:
    """Find the images below a folder, or take the one file given.

    Files of other extensions are no images and only counted. Hidden files and folders, folders behind
    symbolic links, links that leave the folder, what is no regular file, names that are not UTF-8 and folders
    that cannot be read are passed over and listed in `skipped`. Raises UsageError when `source` does not
    exist, holds no image, or is one file that would be passed over for its name.
    """
    if not source.is_dir():
        return _one_file(source)
    found: list[str] = []
    skipped: list[str] = []
    others = 0
    root = source.resolve()

    def unreadable(error: OSError) -> None:
        skipped.append(f"{_printable(Path(error.filename).relative_to(source).as_posix())}: {error.strerror}")

    for folder, folders, files in os.walk(source, onerror=unreadable):
        here = Path(folder).relative_to(source)
        for name in sorted([*folders, *files]):
            relative = (here / name).as_posix()
            reason = _passed_over(source / relative, root)
            if name in folders:
                if reason or (source / relative).is_symlink():
                    folders.remove(name)
                    skipped.append(f"{_printable(relative)}: {reason or 'symbolic link to a folder'}")
            elif Path(name).suffix.lower() in EXTENSIONS:
                if reason:
                    skipped.append(f"{_printable(relative)}: {reason}")
                else:
                    found.append(relative)
            elif not reason:
                others += 1
    if not found:
        raise UsageError(
            f"{source}: no image found, expected files ending in {', '.join(sorted(EXTENSIONS))}"
        )
    found.sort()
    images = (CorpusImage(source / r, r, n) for r, n in zip(found, _result_names(found), strict=True))
    return Corpus(tuple(images), tuple(sorted(skipped)), others)


def _one_file(source: Path) -> Corpus:
    shown = _printable(str(source))
    if not source.exists():
        raise UsageError(f"{shown}: does not exist, expected a folder of images or one image")
    reason = _bad_name(source.name) or ("" if source.is_file() else "not a regular file")
    if reason:
        raise UsageError(f"{shown}: {reason}, expected a folder of images or one image: rename or copy it")
    return Corpus((CorpusImage(source, source.name, PurePosixPath(source.name).stem),), ())


def _passed_over(path: Path, root: Path) -> str:
    if reason := _bad_name(path.name):
        return reason
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        return "symbolic link that leaves the folder"
    if not path.exists():
        return "broken symbolic link"
    return "" if path.is_file() or path.is_dir() else "not a regular file"


def _bad_name(name: str) -> str:
    if name.startswith("."):
        return "hidden"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return ""


def _result_names(relatives: list[str]) -> list[str]:
    """Names without extension; images that would share one keep their full names, every one of them.

    So does an image whose mask would have the name of a folder (a.jpg beside a.png/b.jpg).
    """
    names = {relative: PurePosixPath(relative).with_suffix("").as_posix() for relative in relatives}
    folders = {parent.as_posix().casefold() for r in relatives for parent in PurePosixPath(r).parents}
    while True:
        # Some file systems take upper and lower case for the same.
        uses = Counter(name.casefold() for name in names.values())
        for name in names.values():
            uses[name.casefold()] += f"{name}{_ENDING}".casefold() in folders
        shared = [r for r, name in names.items() if uses[name.casefold()] > 1 and name != r]
        if not shared:
            return [names[relative] for relative in relatives]
        # A full name may in turn be the short name of another image, so this goes on until none is shared.
        names.update({relative: relative for relative in shared})


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()
