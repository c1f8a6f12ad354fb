"""Writing files so that a reader sees the old bytes or the new ones; reading what arguments name."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multisa.runtime.errors import EngineUnavailable, UsageError


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
        raise UsageError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error


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
    """Have the disk keep the names in `folder`: without it a rename may not survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(path: Path, say_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of `path`, which is made; the system lets go of it when a process ends, however.

    The file is not removed: who waits for a lock file that is gone holds a lock that nobody else sees.
    `say_waiting` is called before a wait for another process. Raises EngineUnavailable on systems without
    such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise EngineUnavailable(
            "plans are built where files can be locked (Linux, macOS); use ONNX Runtime here"
        ) from error
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say_waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
