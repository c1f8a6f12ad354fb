"""What the bytes of a file tell before any pixel is decoded: too much metadata, frames, other formats.

Decoders read metadata record by record, some in quadratic time, though no image needs that much: bounds on it
keep files out that stall a decoder. Broken structures are left to the decoder, which reports them.
"""

import re
import struct
from collections.abc import Iterator
from typing import Literal

MOST_RECORDS = 10_000  # segments, chunks, boxes, tags
MOST_BYTES = 16 * 2**20  # of metadata in a JPEG; a colour profile has at most 16 MiB
MOST_JUNK = 2**16  # bytes between the segments of a JPEG, in the comments of a PPM
MOST_BLOCKS = 4096  # of 255 bytes, before the first frame of a GIF
MOST_SCANS = 64  # of a progressive JPEG: each covers the whole image; encoders write about ten
MOST_FRAMES = 10_000  # of an animation; more are not counted
# The next marker in the image data of a JPEG that has content: no stuffed byte 255, restart or padding.
_NEXT_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
# Bytes of one value of each TIFF type.
_TIFF_SIZES = {
    **dict.fromkeys((1, 2, 6, 7), 1),
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 9, 11, 13), 4),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), 8),
}
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLES, _SUB_DIRECTORIES, _FORMAT, _DNG_VERSION = 254, 258, 262, 277, 330, 339, 50706
_NUMBER_FORMATS = {1: "unsigned integer", 2: "signed integer", 3: "floating-point"}
_COEFFICIENTS = 64  # of a block of a JPEG

_AGAIN = "download or copy it again"
_CAMERA_RAW = ("a camera's raw file", "develop it, for example `darktable-cli IN OUT.jpg`")
_VIDEO = ("a video", "extract frames, for example `ffmpeg -i IN -vf fps=1 OUT%05d.png`")
# What people take for images: (offset, pattern, what it is, what helps). The first that matches counts.
_OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, rb"\0+\Z", "nothing but zero bytes", _AGAIN),
    (0, rb"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull`"),
    (4, rb"ftyp.{0,24}avi[fs]", "AVIF", "convert it, for example `avifdec IN OUT.png`"),
    (4, rb"ftyp(hei|hev|mif1|msf1)", "HEIC", "convert it, for example `heif-convert IN OUT.jpg`"),
    (4, rb"ftypcrx ", *_CAMERA_RAW),
    (0, rb"(II|MM).{6}CR|II[RU]|MMOR|FUJIFILM|FOVb|\0MRM", *_CAMERA_RAW),
    (4, rb"ftyp|moov|mdat|wide|free", *_VIDEO),
    (0, rb"\x1aE\xdf\xa3|RIFF.{4}AVI |\0\0\x01\xba|FLV\x01", *_VIDEO),
    (0, rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL", "convert it, for example `djxl IN OUT.png`"),
    (0, rb"II\xbc", "JPEG XR", "convert it, for example `JxrDecApp -i IN -o OUT.bmp`"),
    (0, rb"%PDF", "PDF", "extract its images (`pdfimages -all IN OUT`) or draw its pages (`pdftoppm -png IN OUT`)"),
    (0, rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript", "draw it, for example `magick IN OUT.png`"),
    (0, rb"8BPS", "a Photoshop document", "export it, for example `magick 'IN[0]' OUT.png`"),
    (0, rb"\x76\x2f\x31\x01", "OpenEXR", "convert it, for example `magick IN -auto-level OUT.png`"),
    (0, rb"#\?R", "Radiance HDR", "convert it, for example `magick IN -auto-level OUT.png`"),
    (128, rb"DICM", "DICOM", "convert it, for example `dcmj2pnm +on +Wm IN OUT.png`"),
    (0, rb"\x93NUMPY", "a NumPy array", "save it as PNG, for example with `PIL.Image.fromarray`"),
    (0, rb"\x1f\x8b", "a gzip file", "unpack it (`gunzip`)"),
    (0, rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a compressed file", "unpack it"),
    (0, rb"PK\x03\x04", "a ZIP file", "unpack it (`unzip`)"),
    (0, rb"(\xef\xbb\xbf)?\s*<(svg|[?!].{0,1000}<svg)", "SVG", "draw it, for example `rsvg-convert IN -o OUT.png`"),
    (0, rb"(\xef\xbb\xbf)?\s*<(!doctype )?html", "an HTML page", f"{_AGAIN}: a server may have sent an error page"),
    (0, rb"(\xef\xbb\xbf)?\s*<[?!\w]", "XML", f"{_AGAIN}: a server may have sent an error"),
    (0, rb"(\xef\xbb\xbf)?\s*[{\[]\s*[\"\[{\]}\d]", "JSON", f"{_AGAIN}: a server may have sent an error"),
    (0, rb"[\t\r\n\x20-\x7e]{1,256}", "text", _AGAIN),
)  # fmt: skip
_MOST_SNIFFED = 4096  # bytes


def check_metadata(data: bytes) -> None:
    """Raise ValueError for more metadata than any image needs. Decodes no pixel."""
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    elif data.startswith(_TIFF_MAGIC):
        check_tiff(data)
    elif data.startswith(b"\xff\x4f\xff\x51"):
        _check_codestream(data, 0)
    elif data[4:8] == b"jP  ":
        _check_jpeg2000(data)
    elif data.startswith(b"P"):
        _check_ppm(data)
    elif data.startswith(b"BM"):
        _check_bmp(data)


def count_frames(data: bytes) -> int | None:
    """Count the frames of a GIF or TIFF, up to MOST_FRAMES; None for formats whose header has the number."""
    if data.startswith(b"GIF8"):
        return sum(1 for kind in _gif_blocks(data) if kind == b",")
    if data.startswith(_TIFF_MAGIC):
        return sum(1 for _ in _directories(data))
    return None


def check_tiff(data: bytes) -> None:
    """Raise ValueError when the first tags of a TIFF, or of EXIF, claim more bytes than it has."""
    for entries in _directories(data):
        if len(entries) > MOST_RECORDS:
            raise _excess("tags", MOST_RECORDS)
        inline = _inline_bytes(data)
        sizes = (_TIFF_SIZES.get(kind, 0) * count for _, kind, count, _ in entries)
        total = sum(size for size in sizes if size > inline)
        if total > len(data):
            raise ValueError(f"its tags claim {total} bytes, the file has {len(data)}: save it again")
        return


def _inline_bytes(data: bytes) -> int:
    """Return how many bytes a tag of a TIFF holds; more are elsewhere."""
    return 8 if b"+" in data[2:4] else 4


def _tiff_numbers(data: bytes) -> dict[int, int]:
    """Return the first number of each tag in the first directory of a TIFF."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    numbers = {}
    for tag, kind, count, at in next(_directories(data), []):
        size = _TIFF_SIZES.get(kind, 1)
        if size * count > _inline_bytes(data):
            at = int.from_bytes(data[at : at + _inline_bytes(data)], order)
        numbers[tag] = int.from_bytes(data[at : at + size], order)
    return numbers


def is_camera_raw(data: bytes) -> bool:
    """Tell whether this is a raw file in the layout of TIFF, whose first image is a thumbnail."""
    if not data.startswith(_TIFF_MAGIC):
        return False
    numbers = _tiff_numbers(data)
    has_thumbnail = bool(numbers.get(_SUBFILE, 0) & 1) and _SUB_DIRECTORIES in numbers
    return data[8:10] == b"CR" or _DNG_VERSION in numbers or has_thumbnail


def describe_other(data: bytes) -> tuple[str, str]:
    """Return what the file is that no decoder accepts, and what to do."""
    if data.startswith(_TIFF_MAGIC):
        if is_camera_raw(data):
            return _CAMERA_RAW
        numbers = _tiff_numbers(data)
        if _BITS not in numbers:
            return "a damaged TIFF", _AGAIN
        kind = _NUMBER_FORMATS.get(numbers.get(_FORMAT, 1), "other")
        return (
            f"a TIFF with {numbers.get(_SAMPLES, 1)} {numbers[_BITS]}-bit {kind} samples of photometric "
            f"interpretation {numbers.get(_PHOTOMETRIC, 0)}",
            "convert it to 8 bits, for example `gdal_translate -ot Byte -scale IN OUT.png`",
        )
    for offset, pattern, name, remedy in _OTHERS:
        if re.match(pattern, data[offset : offset + _MOST_SNIFFED], re.DOTALL | re.IGNORECASE):
            return name, remedy
    return "an unknown or damaged file", "convert it or leave it out"


def has_every_scan(data: bytes) -> bool:
    """Tell whether the scans of a Huffman-coded JPEG, complete or not, are for all coefficients of all components."""
    missing: dict[int, set[int]] = {}
    at = 2
    for _ in range(MOST_RECORDS):
        segment = _NEXT_SEGMENT.search(data, at)
        if segment is None or segment[1] == b"\xd9":
            break
        marker, start = segment[1][0], segment.end()
        at = start + max(int.from_bytes(data[start : start + 2], "big"), 2)
        content = data[start + 2 : at]
        if marker in (0xC0, 0xC1, 0xC2):
            missing = {component: set(range(_COEFFICIENTS)) for component in content[6::3]}
        elif 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # arithmetic coding has no redundancy
            return False
        elif marker == 0xDA and len(content) == 4 + 2 * content[0]:
            first, last, bits = content[-3:]
            if bits & 15 == 0:  # not left to a later scan
                for component in content[1:-3:2]:
                    missing.get(component, set()).difference_update(range(first, last + 1))
    return bool(missing) and not any(missing.values())


def _excess(what: str, most: int) -> ValueError:
    return ValueError(f"more than {most} {what}, which no image needs: save it again without metadata")


def _check_jpeg(data: bytes) -> None:
    at, records, junk, size = 2, 0, 0, 0
    while at + 4 <= len(data):
        start = data.find(b"\xff", at)
        if start < 0:
            start = len(data)
        junk += start - at
        if junk > MOST_JUNK:
            raise _excess("bytes between segments", MOST_JUNK)
        marker = data[start + 1] if start + 1 < len(data) else 0xDA
        if marker == 0xDA:  # the image data begin
            break
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:  # those without content
            at = start + (1 if marker == 0xFF else 2)
            junk += 1
            continue
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        at = start + 2 + max(length, 2)
        records, size = records + 1, size + length
        if records > MOST_RECORDS or size > MOST_BYTES:
            raise _excess(f"segments, or {MOST_BYTES} bytes of them,", MOST_RECORDS)
    # Counting is quick and suffices for nearly all files. Phones append videos, in which any bytes occur.
    if data.count(b"\xff\xda", at) > MOST_SCANS:
        _check_scans(data, at)


def _check_scans(data: bytes, at: int) -> None:
    """Follow the markers as decoders do, from the first scan after `at` to the end of the image."""
    scans = 0
    for _ in range(MOST_RECORDS):
        marker = _NEXT_SEGMENT.search(data, at)
        if marker is None or marker[1] == b"\xd9":
            return
        scans += marker[1] == b"\xda"
        if scans > MOST_SCANS:
            raise _excess("scans", MOST_SCANS)
        at = marker.end() + max(int.from_bytes(data[marker.end() : marker.end() + 2], "big"), 2)
    raise _excess("segments", MOST_RECORDS)


def _check_png(data: bytes) -> None:
    at, records, pieces = 8, 0, 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        is_piece = data[at + 4 : at + 8] in (b"IDAT", b"fdAT")
        pieces += is_piece
        records += not is_piece
        # Encoders write pieces of 8 KiB and more, so 50 times as many pass.
        if records > MOST_RECORDS or pieces > 50 * MOST_RECORDS:
            raise _excess("chunks", MOST_RECORDS)
        at += 12 + length


def _gif_blocks(data: bytes) -> Iterator[bytes]:
    """Yield b"," for each frame and b"!" for each block before it; ends at MOST_FRAMES or MOST_RECORDS^2."""
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    frames = blocks = 0
    while at < len(data) and frames < MOST_FRAMES:
        kind = data[at : at + 1]
        if kind == b"!":
            at += 2
        elif kind == b"," and at + 10 < len(data):
            flags = data[at + 9]
            at += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            frames += 1
            yield kind
        else:
            return
        while at < len(data) and data[at] > 0:
            at += 1 + data[at]
            blocks += 1
            if kind == b"!":
                yield kind
            elif blocks > 100 * MOST_RECORDS:  # an image of 255 MB, or an attack
                return
        at += 1


def _check_gif(data: bytes) -> None:
    for blocks, kind in enumerate(_gif_blocks(data)):
        if kind == b",":
            return
        if blocks >= MOST_BLOCKS:
            raise _excess("blocks before the first frame", MOST_BLOCKS)


def _directories(data: bytes) -> Iterator[list[tuple[int, int, int, int]]]:
    """Yield (tag, type, count, position of the value) of each entry in a TIFF's first directory, then an empty
    list per other one."""
    order = "<" if data[:2] == b"II" else ">"
    big = b"+" in data[2:4]
    head, entry, pointer = ("Q", "HHQ8x", "Q") if big else ("H", "HHL4x", "L")
    head_size, entry_size = struct.calcsize(order + head), struct.calcsize(order + entry)
    seen: set[int] = set()
    try:
        (at,) = struct.unpack_from(order + pointer, data, 8 if big else 4)
        while at and at not in seen and len(seen) < MOST_FRAMES:
            (count,) = struct.unpack_from(order + head, data, at)
            read = 0 if seen else min(count, MOST_RECORDS + 1)
            starts = (at + head_size + i * entry_size for i in range(read))
            fields = [(*struct.unpack_from(order + entry, data, start), start) for start in starts]
            seen.add(at)
            yield [(tag, kind, number, start + (12 if big else 8)) for tag, kind, number, start in fields]
            (at,) = struct.unpack_from(order + pointer, data, at + head_size + count * entry_size)
    except struct.error:
        return


def _check_codestream(data: bytes, at: int) -> None:
    """Follow the main header of JPEG 2000 from SOC to the first tile."""
    at += 2
    for _ in range(MOST_RECORDS):
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if len(marker) < 2 or marker in (b"\xff\x90", b"\xff\xd9"):
            return
        if length < 2:
            raise ValueError("a marker of its header has no length")
        at += 2 + length
    raise _excess("markers", MOST_RECORDS)


def _check_jpeg2000(data: bytes) -> None:
    at = 0
    for _ in range(MOST_RECORDS):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"jp2c":
            return _check_codestream(data, at + 8)
        if kind == b"jp2h":  # enter this box
            at += 8
        elif length == 1:
            at += max(int.from_bytes(data[at + 8 : at + 16], "big"), 16)
        elif length < 8:  # the last box, or a broken one
            return None
        else:
            at += length
    raise _excess("boxes", MOST_RECORDS)


def _check_ppm(data: bytes) -> None:
    if data[1:2] in b"123" and data.count(b"#") > MOST_RECORDS // 10:
        raise _excess("comments", MOST_RECORDS // 10)
    at = tokens = 0
    while tokens < 4 and at < len(data):
        if at > MOST_JUNK:
            raise _excess("bytes of header", MOST_JUNK)
        if data[at : at + 1] == b"#":
            at = data.find(b"\n", at)
            if at < 0:
                at = len(data)
        elif data[at : at + 1].isspace():
            at += 1
        else:
            tokens += 1
            while at < min(len(data), MOST_JUNK) and not data[at : at + 1].isspace():
                at += 1
        if at >= len(data) > MOST_JUNK:
            raise _excess("bytes of header", MOST_JUNK)


def _check_bmp(data: bytes) -> None:
    if len(data) < 34 or int.from_bytes(data[30:34], "little") not in (1, 2):  # run lengths of 8 or 4 bits
        return
    width, height = struct.unpack_from("<ll", data, 18)
    # A run of one pixel takes two bytes, the end of a row two more. Moves without a pixel are unlimited.
    most = 4 * abs(width * height) + 2**20
    if len(data) > most:
        raise ValueError(f"{len(data)} bytes of run lengths for {width}x{height} pixels: save it again")
