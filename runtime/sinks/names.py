"""Names of images in formats whose tools cannot take every name: escaped; percent-decoding gives them back.

A name that a format takes stays as it is, unless it looks escaped itself; so no two names become one.
"""

import hashlib
import re
from urllib.parse import quote, unquote

# webdataset cuts a key at the first dot of its last part and passes over members like "__MACOSX__/a".
_TAR = re.compile(r"\.(?=[^/]*$)|^__|[\0-\x1f\x7f]")
# Datumaro's and CVAT's lists of names are lines, stripped, and "#" begins a comment.
_LINE = re.compile(r"^#|^\s|\s$|[\0-\x1f\x7f\x85\u2028\u2029]")
_LABEL = re.compile(f"{_LINE.pattern}|:")  # labelmap.txt separates its fields by colons
# Datumaro's masks lie in one folder. "%~" marks a name that was cut.
_FILE = re.compile(r"[/\\\0-\x1f\x7f]|%~")

_MAX_FILE_NAME = 255 - len(".png")  # bytes, on every common file system
_DIGEST = 32  # hexadecimal digits


def tar_key(name: str) -> str:
    """Key of a sample in a tar shard, without a dot in its last part; `plain_name` gives the name back."""
    return _escaped(name, _TAR)


def line_name(name: str) -> str:
    """A name in a list of lines; `plain_name` gives it back."""
    return _escaped(name, _LINE)


def label_name(name: str) -> str:
    """A class in CVAT's labelmap.txt; `plain_name` gives it back."""
    return _escaped(name, _LABEL)


def file_name(name: str) -> str:
    """One file's name, without extension and folders; `plain_name` gives the name back.

    Of a name too long for a file system the beginning stays, and "%~" and a digest of the name follow.
    """
    escaped = _escaped(name, _FILE)
    if len(escaped.encode()) <= _MAX_FILE_NAME:
        return escaped
    ending = "%~" + hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]
    begin = escaped.encode()[: _MAX_FILE_NAME - len(ending)].decode(errors="ignore")
    return begin + ending


def plain_name(escaped: str) -> str:
    """The name that was escaped (not of one that was cut)."""
    return unquote(escaped)


def _escaped(name: str, unsafe: re.Pattern[str]) -> str:
    if not unsafe.search(name) and unquote(name) == name:
        return name
    return unsafe.sub(lambda match: _percent(match[0]), name.replace("%", "%25"))


def _percent(text: str) -> str:
    # `quote` leaves dots, tildes and underscores alone.
    return "".join(quoted if (quoted := quote(c, safe="")) != c else f"%{ord(c):02X}" for c in text)
