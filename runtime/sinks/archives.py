"""Tar and zip archives whose bytes depend on their members alone: no times or owners of a machine."""

import io
import tarfile
import zipfile
from collections.abc import Iterable

_MODE = 0o644
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can name

Members = Iterable[tuple[str, bytes]]


def tar_bytes(members: Members) -> bytes:
    """Pack (name, data) into a tar, in the order given."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), _MODE, 0
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(members: Members, *, level: int = 0) -> bytes:
    """Pack (name, data) into a zip, in the order given; deflated from level 1 to 9, stored at 0."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            entry = zipfile.ZipInfo(name, _FIRST_DAY)
            entry.create_system, entry.external_attr = 3, _MODE << 16
            entry.compress_type = zipfile.ZIP_DEFLATED if level else zipfile.ZIP_STORED
            archive.writestr(entry, data, compresslevel=level or None)
    return buffer.getvalue()
