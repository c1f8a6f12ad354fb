"""Bounds on the metadata of image files, against files that stall a decoder with millions of tiny records.

Decoders read metadata record by record, some in quadratic time, though no image needs that much. Broken
structures are left to the decoder, which reports them.
"""

import re
import struct
from collections.abc import Iterator

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
        inline = 8 if data[2:3] == b"+" or data[3:4] == b"+" else 4
        sizes = (_TIFF_SIZES.get(kind, 0) * count for kind, count in entries)
        total = sum(size for size in sizes if size > inline)
        if total > len(data):
            raise ValueError(f"its tags claim {total} bytes, the file has {len(data)}: save it again")
        return


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


def _directories(data: bytes) -> Iterator[list[tuple[int, int]]]:
    """Yield (type, count) of each entry in a TIFF's first directory, then an empty list per other one."""
    order = "<" if data[:2] == b"II" else ">"
    big = b"+" in data[2:4]
    head, entry, pointer = ("Q", "2xHQ8x", "Q") if big else ("H", "2xHL4x", "L")
    head_size, entry_size = struct.calcsize(order + head), struct.calcsize(order + entry)
    seen: set[int] = set()
    try:
        (at,) = struct.unpack_from(order + pointer, data, 8 if big else 4)
        while at and at not in seen and len(seen) < MOST_FRAMES:
            (count,) = struct.unpack_from(order + head, data, at)
            read = 0 if seen else min(count, MOST_RECORDS + 1)
            starts = (at + head_size + i * entry_size for i in range(read))
            fields = [struct.unpack_from(order + entry, data, start) for start in starts]
            seen.add(at)
            yield [(kind, number) for kind, number in fields]
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
