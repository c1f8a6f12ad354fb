"""A thousand damaged files: each is decoded or refused with a reason, in bounded time, without a warning.

They are decoded in a process of their own with an alarm for each file, so that a crash or a hang of a decoder
fails the test and names the file: `python test_runtime_fuzz.py START STOP` decodes those numbers alone.
"""

import faulthandler
import io
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

FILES, WORKERS = 1000, 2
SECONDS = 20  # for one file of a few kilobytes, on a machine under load
IMAGE = Path(__file__).resolve().parents[2] / "runtime" / "demo_images" / "astronaut.jpg"
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_deflate"}),
    ("TIFF", {"compression": "jpeg"}),
    ("TIFF", {"compression": "tiff_lzw", "big_tiff": True}),
    ("BMP", {}),
    ("PPM", {}),
    ("JPEG2000", {}),
)


def sources() -> list[bytes]:
    """One real image, 96 pixels wide, in every format."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "of a camera"
    with Image.open(IMAGE) as file:
        image = file.convert("RGB").resize((96, 80))
    found = []
    for format, options in KINDS:
        buffer = io.BytesIO()
        with_exif = {} if format in ("GIF", "BMP", "PPM", "JPEG2000") else {"exif": exif}
        image.save(buffer, format, **options, **with_exif)
        found.append(buffer.getvalue())
    return found


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, most of them in the header; sizes made huge, pieces cut, doubled, moved or zeroed."""
    broken = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = int(len(broken) * chance.random() ** chance.choice((1, 4)))
        length = chance.choice((1, 2, 4, 64, 1024))
        kind = chance.randrange(7)
        if kind < 2:
            broken[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 2:
            broken[at : at + length] = chance.choice((b"\xff", b"\x7f", b"\0", b"\x80")) * min(length, 4)
        elif kind == 3:
            del broken[at : at + length]
        elif kind == 4:
            broken[at:at] = broken[at : at + length] * chance.choice((1, 2, 50))
        elif kind == 5:
            del broken[max(at, 1) :]
        else:
            other = chance.randrange(max(len(broken), 1))
            broken[at : at + length] = broken[other : other + length]
    return bytes(broken)


def decode_all(numbers: range) -> None:
    """Decode the damaged files of these numbers; prints how many were decoded and refused."""
    from multisa.runtime.errors import ImageError
    from multisa.runtime.imaging.decode import decode_image

    files = sources()
    warnings.simplefilter("error")
    decoded = refused = 0
    for number in numbers:
        chance = random.Random(number)
        data = damaged(files[number % len(files)], chance)
        os.write(2, f"file {number}\n".encode())
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            image = decode_image(data, max_pixels=2_000_000, long_side=chance.choice((None, 64)))
            assert image.rgb.ndim == 3 and image.rgb.shape[2] == 3
            decoded += 1
        except ImageError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
        faulthandler.cancel_dump_traceback_later()
    print(decoded, refused)


@pytest.mark.parametrize("worker", range(WORKERS))
def test_damaged_files_are_decoded_or_refused(worker: int) -> None:
    numbers = (worker * FILES // WORKERS, (worker + 1) * FILES // WORKERS)
    command = [sys.executable, __file__, *map(str, numbers)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    decoded, refused = map(int, result.stdout.split())
    assert decoded + refused == FILES // WORKERS
    assert min(decoded, refused) > 0.15 * FILES / WORKERS  # neither harmless nor hopeless


if __name__ == "__main__":
    decode_all(range(int(sys.argv[1]), int(sys.argv[2])))
