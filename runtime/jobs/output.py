"""The folder of a run: who may write to it, and what is in it."""

import errno
import os
import re
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from multisa.runtime.errors import MultisaError, UsageError
from multisa.runtime.files import flush_folder, lock_open_file
from multisa.runtime.imaging.decode import EXTENSIONS
from multisa.runtime.jobs.shards import FILES, PARTS, PRIVATE, below, leads_elsewhere, listed_files
from multisa.runtime.report.pictures import FOLDER, PAGE
from multisa.runtime.sources.folders import Pattern
from multisa.runtime.sources.remote import protocol_of

SNAPSHOT = f"{PRIVATE}/inventory.sqlite"
CONFIG = f"{PRIVATE}/config.json"
JOURNAL = f"{PRIVATE}/journal.jsonl"
RUN = f"{PRIVATE}/run.json"
LOCK = f"{PRIVATE}/lock"
REPORT_PAGE, REPORT_FOLDER = PAGE, FOLDER

_WILD = re.compile(r"[*?[{]")  # where a pattern, or a range of tar files, ends being a plain path
_FOLDERS_KNOWN = 4096  # of a list's images

_ROOM, _WRITABLE = "make room", "see to it that the folder can be written, or choose another one"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "allow larger files",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EIO: "check the disk",
}


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold OUT for this run; the system lets go of it when the process ends, however.

    Raises UsageError when another run holds it, MultisaError where the file system has no locks.
    """
    path = out / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock_open_file(descriptor, path)
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            raise UsageError(
                f"{out}: another run writes to it ({holder}): wait for it, end it, or choose another folder"
            ) from error
        started = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, {started}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Say what to do where OUT cannot be written. Raises MultisaError."""
    try:
        yield
    except OSError as error:
        place = Path(error.filename or out)
        if error.errno not in _REMEDIES or not place.absolute().is_relative_to(out.absolute()):
            raise
        remedy = _REMEDIES[error.errno]
        raise MultisaError(f"{place}: {error.strerror}: {remedy}, and the same command goes on") from error
    except sqlite3.OperationalError as error:  # says "database or disk is full", and the like
        path = out / SNAPSHOT
        raise MultisaError(
            f"{path}: {error}: see to room and permission, and the same command goes on"
        ) from error


def check_places(source: str, out: Path, folders: Iterable[str]) -> None:
    """Refuse an OUT whose results could replace the images or be taken for some. Raises UsageError.

    folders: names of those below OUT that the run writes into. Links are followed, and folders are compared
    by identity, as a file system may take upper and lower case for the same. Of a pattern the folder that it
    begins in is looked at, and which of those below it can reach.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file, expected a folder for the results")
    if out.parts and out.parts[0].endswith(":") and len(out.parts[0]) > 2:  # pathlib makes one slash of two
        raise UsageError(f"{out}: is a URL, expected a folder here, or one that is mounted, for the results")
    spec = _local_path(source)
    if spec is None:
        return
    local, text = _plain_and_pattern(spec)
    if not local.exists():
        return
    results = _result_folders(out, folders)
    if text:
        _check_pattern(source, local, text, results)
    elif local.is_dir():
        for folder in (out, *results):
            if _is_within(folder, local):
                raise UsageError(
                    f"{folder}: lies inside the images' folder {source}, where masks would be taken for "
                    "images: choose a folder outside it"
                )
    for folder in results:
        if _is_within(local, folder) or _is_within(local.absolute().parent, folder):
            raise _would_replace(source, folder)
    if text or local.suffix.lower() not in EXTENSIONS or not local.is_file():
        return
    for holder in {local.absolute().parent, local.resolve().parent}:
        # A folder below it is taken, though: `photo.jpg -o out` is what everyone writes.
        if any(_is_same(folder.resolve().parent, holder) for folder in results):
            raise _would_lie_beside(out, source)


def place_check(source: str, out: Path, folders: Iterable[str]) -> Callable[[str], None]:
    """What refuses the place of an image in the local list `source` as `check_places` does one image."""
    spec = _local_path(source)
    results = _result_folders(out, folders)

    @lru_cache(maxsize=_FOLDERS_KNOWN)
    def check_folder(path: str) -> None:
        for folder in results:
            if _is_within(Path(path), folder):
                raise _would_replace(f"{source}: {path}", folder)

    def check(place: str) -> None:
        if spec is not None and not protocol_of(place):
            check_folder(os.path.dirname(os.path.join(os.path.dirname(spec), place)))  # noqa: PTH118, PTH120

    return check


def _check_pattern(source: str, root: Path, text: str, results: Iterable[Path]) -> None:
    """`check_places` for the pattern `text` of paths below `root`."""
    pattern, top = Pattern(text), root.resolve()
    for folder in results:
        path = folder.resolve()
        if path.is_relative_to(top) and path != top and pattern.may_contain(path.relative_to(top).as_posix()):
            raise UsageError(
                f"{folder}: lies inside what {source} takes, where masks would be taken for images: choose "
                "a folder outside it"
            )
        if "/" not in text and _is_same(path.parent, top):
            raise _would_lie_beside(folder.parent, source)


def _local_path(source: str) -> str | None:
    """The path that a source is or begins with; None for a URL of elsewhere."""
    protocol = protocol_of(source)
    if protocol in ("file", "local"):
        return source.partition("://")[2]
    return None if protocol else source


def _plain_and_pattern(spec: str) -> tuple[Path, str]:
    """A path that is there, and ""; of a pattern the folder before what is no plain name, and the rest."""
    wild = None if os.path.lexists(spec) else _WILD.search(spec)
    if not wild:
        return Path(spec), ""
    slash = spec.rfind("/", 0, wild.start()) + 1
    return Path(spec[:slash] or "."), spec[slash:]


def _result_folders(out: Path, folders: Iterable[str]) -> list[Path]:
    return [out / folder for folder in (*folders, PRIVATE, REPORT_FOLDER)]


def _would_replace(source: str, folder: Path) -> UsageError:
    return UsageError(
        f"{source}: lies inside {folder}, where the results would replace the images: choose another folder "
        "for the results"
    )


def _would_lie_beside(out: Path, source: str) -> UsageError:
    return UsageError(
        f"{out}: the results would lie beside the image {source}, where masks would be taken for images: "
        "choose another folder, or one below this"
    )


def check_empty(out: Path, folders: Iterable[str], files: Iterable[str]) -> None:
    """Refuse an OUT with results of which nothing is known: files below `folders`, or at the paths `files`.

    Raises UsageError.
    """
    theirs = [out / name for name in folders if (out / name).is_dir() and any((out / name).iterdir())]
    if theirs := theirs + [out / name for name in files if (out / name).exists()]:
        raise UsageError(
            f"{theirs[0]}: {'holds files' if theirs[0].is_dir() else 'is'} of no run that can be gone on "
            "with: choose another folder, or --overwrite to write into it"
        )


def remove_results(out: Path, others: Iterable[str]) -> None:
    """Remove the files of all shards, `others` (paths below OUT), folders left empty, and the run."""
    _forget_run(out)
    for part in sorted((out / PARTS / FILES).glob("*")):
        for relative, _ in listed_files(part):
            _remove(out, relative)
    for relative in others:
        _remove(out, relative)
    for path in (out / PRIVATE).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != out / LOCK:
            path.unlink()


def _forget_run(out: Path) -> None:
    """Have OUT hold no run: the first thing of a removal, as one that is cut must not leave half a run."""
    for relative in (CONFIG, JOURNAL):
        (out / relative).unlink(missing_ok=True)
    flush_folder(out / PRIVATE)


def _remove(out: Path, relative: str) -> None:
    try:
        path = below(out, relative)
    except ValueError:  # a list that was altered
        return
    if leads_elsewhere(out, path.parent) or path.is_dir():
        return
    path.unlink(missing_ok=True)
    for folder in path.relative_to(out).parents[:-1]:
        if (out / folder).is_dir() and not any((out / folder).iterdir()):
            (out / folder).rmdir()


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, is the folder or below it once links are followed."""
    resolved = path.resolve()
    return any(_is_same(place, folder) for place in (resolved, *resolved.parents))


def _is_same(path: Path, folder: Path) -> bool:
    return path.exists() and folder.exists() and path.samefile(folder)
