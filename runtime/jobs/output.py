"""The folder of a run: where it may be, who may write to it, and how to remove its results."""

import errno
import os
import re
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath

from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.files import flush_folder, lock_file
from multisa.runtime.imaging.decode import EXTENSIONS
from multisa.runtime.jobs.shards import FILES, PARTS, PRIVATE, listed_files, remove_file
from multisa.runtime.report.report import FOLDER
from multisa.runtime.sources.folders import Pattern
from multisa.runtime.sources.registry import SEVERAL
from multisa.runtime.sources.remote import protocol_of

SNAPSHOT = f"{PRIVATE}/snapshot.sqlite"
CONFIG = f"{PRIVATE}/config.json"
JOURNAL = f"{PRIVATE}/journal.jsonl"
RUN = f"{PRIVATE}/run.json"
UNUSED = f"{PRIVATE}/unused.jsonl"  # what the run does not use, with the reason
LOCK = f"{PRIVATE}/lock"
LOCK_HOLDER = f"{PRIVATE}/lock-holder"  # text: the lock itself may not be readable

_WILD = re.compile(r"[*?[{]")  # the first special character of a pattern, or of a range of tar files
_CACHED_FOLDERS = 4096  # of the images of a list

_FREE_SPACE = "free some space"
_WRITABLE = "make the folder writable, or choose another one"
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "allow larger files",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EIO: "check the disk",
}


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Hold OUT for this run; the lock ends with the process, however that ends.

    Raises UsageError if another run holds it, MultisaError if the file system has no locks.
    """
    path = output / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(path))
        except BlockingIOError as error:
            raise UsageError(
                f"{output}: another run writes to it ({_read_holder(output)}): wait for it, end it, or "
                "choose another folder"
            ) from error
        started = datetime.now(UTC).isoformat(timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()}, {started}\n"
        (output / LOCK_HOLDER).write_text(holder, encoding="utf-8")
        yield


def _read_holder(output: Path) -> str:
    try:
        return (output / LOCK_HOLDER).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "unknown"


@contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """Raise MultisaError with what to do where OUT cannot be written."""
    try:
        yield
    except OSError as error:
        path = Path(error.filename or output)
        if error.errno not in _REMEDIES or not path.absolute().is_relative_to(output.absolute()):
            raise
        remedy = _REMEDIES[error.errno]
        raise MultisaError(f"{path}: {error.strerror}: {remedy}, then run the same command again to resume") from error
    except sqlite3.OperationalError as error:  # "database or disk is full", and the like
        raise MultisaError(
            f"{output / SNAPSHOT}: {error}: check free space and permissions, then run the same command again to resume"
        ) from error


def check_output(source: str, output: Path, folders: Iterable[str]) -> None:
    """Refuse an OUT whose results could replace the images or be taken for some. Raises UsageError.

    folders: names of the folders below OUT that the run writes to. Links are followed, and folders are
    compared by identity, since a file system may ignore case. For a pattern, the folder it begins in is
    checked, and which of the folders below it the pattern can reach.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file, expected a folder for the results")
    if output.parts and output.parts[0].endswith(":") and len(output.parts[0]) > 2:  # pathlib turns // into /
        raise UsageError(f"{output}: is a URL, expected a local or mounted folder for the results")
    if SEVERAL in source:
        one_per_folder = {os.path.dirname(path): path for path in source.split(SEVERAL)}  # noqa: PTH120
        names = list(folders)
        for path in one_per_folder.values():
            check_output(path, output, names)
        return
    spec = _local_path(source)
    if spec is None:
        return
    local, pattern = _split_pattern(spec)
    if not local.exists():
        return
    results = _result_folders(output, folders)
    if pattern:
        _check_pattern(source, local, pattern, results)
    elif local.is_dir():
        for folder in (output, *results):
            if _is_within(folder, local):
                raise UsageError(
                    f"{folder}: lies inside the images' folder {source}, where masks would be taken for "
                    "images: choose a folder outside it"
                )
    for folder in results:
        if _is_within(local, folder) or _is_within(local.absolute().parent, folder):
            raise _would_replace(source, folder)
    if pattern or local.suffix.lower() not in EXTENSIONS or not local.is_file():
        return
    for holder in {local.absolute().parent, local.resolve().parent}:
        # A folder below that of the image is fine, though: everyone writes `photo.jpg -o output`.
        if any(_is_same(folder.resolve().parent, holder) for folder in results):
            raise _would_lie_beside(output, source)


def image_checker(source: str, output: Path, folders: Iterable[str]) -> Callable[[str], None]:
    """A function that checks the place of each image in the local list `source`, as `check_output` does."""
    spec = _local_path(source)
    results = _result_folders(output, folders)

    @lru_cache(maxsize=_CACHED_FOLDERS)
    def check_folder(path: str) -> None:
        for folder in results:
            if _is_within(Path(path), folder):
                raise _would_replace(f"{source}: {path}", folder)

    def check(place: str) -> None:
        if spec is not None and not protocol_of(place):
            check_folder(os.path.dirname(os.path.join(os.path.dirname(spec), place)))  # noqa: PTH118, PTH120

    return check


def _check_pattern(source: str, root: Path, text: str, results: Iterable[Path]) -> None:
    """`check_output` for the pattern `text` of paths below `root`."""
    pattern = Pattern(text)
    top = root.resolve()
    for folder in results:
        path = folder.resolve()
        if path.is_relative_to(top) and path != top and pattern.may_contain(path.relative_to(top).as_posix()):
            raise UsageError(
                f"{folder}: lies inside what {source} matches, where masks would be taken for images: "
                "choose a folder outside it"
            )
        if "/" not in text and _is_same(path.parent, top):
            raise _would_lie_beside(folder.parent, source)


def _local_path(source: str) -> str | None:
    """The local path of a source; None for a URL of another machine."""
    protocol = protocol_of(source)
    if protocol in ("file", "local"):
        return source.partition("://")[2]
    return None if protocol else source


def _split_pattern(spec: str) -> tuple[Path, str]:
    """An existing path and ""; or the folder before the first wildcard of a pattern, and the rest."""
    wild = None if os.path.lexists(spec) else _WILD.search(spec)
    if not wild:
        return Path(spec), ""
    slash = spec.rfind("/", 0, wild.start()) + 1
    return Path(spec[:slash] or "."), spec[slash:]


def _result_folders(output: Path, folders: Iterable[str]) -> list[Path]:
    return [output / folder for folder in (*folders, PRIVATE, FOLDER)]


def _would_replace(source: str, folder: Path) -> UsageError:
    return UsageError(
        f"{source}: lies inside {folder}, where the results would replace the images: choose another folder "
        "for the results"
    )


def _would_lie_beside(output: Path, source: str) -> UsageError:
    return UsageError(
        f"{output}: the results would lie beside the image {source}, where masks would be taken for images: "
        "choose another folder, or one below this"
    )


def check_empty(output: Path, folders: Iterable[str], files: Iterable[str]) -> None:
    """Refuse an OUT with results of unknown origin: files below `folders`, or at the paths `files`.

    Raises UsageError.
    """
    found = [output / name for name in folders if (output / name).is_dir() and any((output / name).iterdir())]
    if found := found + [output / name for name in files if (output / name).exists()]:
        what = "holds files" if found[0].is_dir() else "is a file"
        raise UsageError(
            f"{found[0]}: {what} of no run that can be resumed: choose another folder, or --overwrite to write into it"
        )


def remove_results(output: Path, others: Iterable[str]) -> None:
    """Remove the files of all shards, `others` (paths below OUT), folders left empty, and the run."""
    # First make OUT hold no run: a removal that is interrupted must not leave half of one.
    for relative in (CONFIG, JOURNAL):
        (output / relative).unlink(missing_ok=True)
    flush_folder(output / PRIVATE)
    for part in sorted((output / PARTS / FILES).glob("*")):
        for relative, _ in listed_files(part):
            _remove(output, relative)
    for relative in others:
        _remove(output, relative)
    for path in (output / PRIVATE).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path not in (output / LOCK, output / LOCK_HOLDER):
            path.unlink()


def _remove(output: Path, relative: str) -> None:
    """Remove a file and the folders that it leaves empty."""
    if remove_file(output, relative):
        for folder in PurePosixPath(relative).parents[:-1]:
            if (output / folder).is_dir() and not any((output / folder).iterdir()):
                (output / folder).rmdir()


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, is the folder or lies below it, links followed."""
    resolved = path.resolve()
    return any(_is_same(parent, folder) for parent in (resolved, *resolved.parents))


def _is_same(path: Path, folder: Path) -> bool:
    return path.exists() and folder.exists() and path.samefile(folder)
