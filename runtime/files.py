"""Atomic writes, file locks, digests, and reading the text files that a user names."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multisa.runtime.errors import MultisaError, UsageError

# Errors of file systems that cannot flush a folder (CIFS, some FUSE), and of folders that may not be read.
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, flush it to the disk and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.tmp")
    # Not tempfile, whose files only their owner can read: the umask decides who can read results.
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
    """Text of a file that the user names: UTF-8, without a byte order mark.

    Raises UsageError with the reason if it cannot be read.
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


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that the program wrote; empty if there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256_of_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_file(path: Path) -> None:
    """Flush the bytes of a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush the entries of `folder` to the disk: without it a rename may not survive a power failure.

    Does nothing if the file system cannot flush folders or the folder may not be read.
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
def lock_file(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the exclusive lock of `path`, which is created; it ends with the process, however that ends.

    `on_wait` is called before waiting for another process; None: do not wait. Raises BlockingIOError if
    another process holds the lock and `on_wait` is None, MultisaError on file systems without locks, OSError
    if the file cannot be opened.
    """
    from filelock import FileLock, Timeout

    # Without locks of the system there must be an error, as a marker file would outlive a killed process.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            if on_wait is None:
                raise BlockingIOError(errno.EAGAIN, "locked by another process", str(path)) from error
            on_wait()
            lock.acquire()
    except NotImplementedError as error:
        raise _no_locks(path, str(error)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise _no_locks(path, str(error.strerror)) from error
    try:
        yield
    finally:
        lock.release()


def _no_locks(path: Path, reason: str) -> MultisaError:
    return MultisaError(
        f"{path}: cannot be locked ({reason}), and without a lock two processes could write to the same "
        "files: choose a folder on a file system with locks, or mount this one with locks"
    )
