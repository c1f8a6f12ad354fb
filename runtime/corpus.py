"""Finding the images of a corpus, naming their results, keeping the two apart, and mapping in order."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from multisa.runtime.errors import UsageError
from multisa.runtime.images import EXTENSIONS

Item = TypeVar("Item")
Result = TypeVar("Result")

RESULT_FOLDERS = ("masks", "overlays", ".multisa")  # below the folder of a run's results
RESULT_ENDINGS = (".png", ".photo.jpg", ".overlay.jpg")  # of the files that are named after an image

_LOOK_AHEAD = 2  # submitted items for each worker: enough to keep it busy, memory stays bounded


@dataclass(frozen=True)
class CorpusImage:
    """One image and where its results go, both as posix paths."""

    path: Path
    relative: str  # below the corpus' folder
    name: str  # below masks/ and overlays/, without the results' extension


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


def check_output(source: Path, out: Path, corpus: Corpus) -> None:
    """Refuse an output folder whose results could replace a source image or be taken for one.

    `corpus` is what `find_images(source)` found. Symbolic links are followed, and folders are compared by
    identity, as the file system may take upper and lower case for the same. Raises UsageError.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file, expected a folder for the results")
    # A file is replaced or removed through its folder alone, so it is enough to keep the folders apart.
    inner = {PurePosixPath(image.name).parent for image in corpus.images}
    results = [out, *(out / kind / parent for kind in RESULT_FOLDERS for parent in sorted(inner))]
    if source.is_dir():
        for folder in results:
            if _is_within(folder, source):
                raise UsageError(
                    f"{folder}: lies inside the images' folder {source}, where masks would be taken for "
                    "images: choose a folder outside it"
                )
    for kind in RESULT_FOLDERS:
        if _is_within(source, out / kind) or _is_within(source.parent, out / kind):
            raise UsageError(
                f"{source}: lies inside {out / kind}, where the results would replace the images: "
                "choose another folder for the results"
            )
    for holder in {source.parent, source.resolve().parent} if source.is_file() else ():
        # A folder below it is taken, though: `photo.jpg -o out` is what everyone writes.
        if any(_is_same((out / kind).resolve().parent, holder) for kind in RESULT_FOLDERS):
            raise UsageError(
                f"{out}: the results would lie beside the image {source}, where masks would be taken for "
                "images: choose another folder, or one below this"
            )


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` in the order of `items`, computed by `workers` threads.

    At most 2 * workers items are under way or waiting to be taken. The first exception is raised where its
    result would have come; items not yet begun are dropped then, and on an interrupt, too.
    """
    executor = ThreadPoolExecutor(workers, thread_name_prefix="multisa")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) >= _LOOK_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, is the folder or below it once links are followed."""
    resolved = path.resolve()
    return any(_is_same(place, folder) for place in (resolved, *resolved.parents))


def _is_same(path: Path, folder: Path) -> bool:
    return path.exists() and folder.exists() and path.samefile(folder)


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

    So does an image whose mask or picture would have the name of a folder (a.jpg beside a.png/b.jpg).
    """
    names = {relative: PurePosixPath(relative).with_suffix("").as_posix() for relative in relatives}
    folders = {parent.as_posix().casefold() for r in relatives for parent in PurePosixPath(r).parents}
    while True:
        # Some file systems take upper and lower case for the same.
        uses = Counter(name.casefold() for name in names.values())
        for name in names.values():
            uses[name.casefold()] += any(f"{name}{end}".casefold() in folders for end in RESULT_ENDINGS)
        shared = [r for r, name in names.items() if uses[name.casefold()] > 1 and name != r]
        if not shared:
            return [names[relative] for relative in relatives]
        # A full name may in turn be the short name of another image, so this goes on until none is shared.
        names.update({relative: relative for relative in shared})


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()
