"""Writing files so that a reader sees the old bytes or the new ones; reading what arguments name."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multisa.runtime.errors import BackendUnavailable, MultisaError, UsageError

# What CIFS and some FUSE file systems answer who flushes a folder, and others who may not read it.
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, flush it to the disk and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.tmp")
    # Not tempfile: its files can be read by their owner alone, and results are for all the umask lets in.
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_user_text(path: Path) -> str:
    """Text of a file that an argument names: UTF-8, a byte order mark left out.

    Raises UsageError saying what keeps it from being read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: not found, expected a text file") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def write_json_atomically(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    write_bytes_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sha256_of_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_folder(folder: Path) -> None:
    """Have the disk keep the names in `folder`: without it a rename may not survive a loss of power.

    Where the file system flushes no folders, or this one may not be read, nothing is done.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


@contextmanager
def lock_file(path: Path, say_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of `path`, which is made; the system lets go of it when a process ends, however.

    The file is not removed: who waits for a lock file that is gone holds a lock that nobody else sees.
    `say_waiting` is called before a wait for another process. Raises as `lock_open_file` does.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock_open_file(descriptor, path)
        except BlockingIOError:
            say_waiting()
            lock_open_file(descriptor, path, wait=True)
        yield
    finally:
        os.close(descriptor)


def lock_open_file(descriptor: int, path: Path, *, wait: bool = False) -> None:
    """Lock the file `path`, open as `descriptor`, until that is closed.

    Raises BlockingIOError where another process has the lock, unless it is to `wait`; BackendUnavailable on
    systems without such locks, MultisaError on file systems without them.
    """
    try:
        import fcntl
    except ImportError as error:
        raise BackendUnavailable("expected a system where files can be locked (Linux, macOS)") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise MultisaError(
            f"{path}: cannot be locked ({error.strerror}), and without a lock two processes could write to "
            "the same files: choose a folder on a file system with locks, or have this one mounted with them"
        ) from error
