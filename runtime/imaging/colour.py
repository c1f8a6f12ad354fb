"""Turn samples of 16 bits and colours with a profile into the 8-bit sRGB that the networks see."""

import io
import re
import struct
import sys
import zlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]
ImageType = TypeVar("ImageType", bound=Image.Image)

SCALE_FIRST = "scale them first, for example `gdal_translate -ot Byte -scale IN OUT.png`"
FULL_RANGE = 65535
TWELVE_BITS = 4095
_DEEP_MODE = re.compile(r"(RGB|RGBA|RGBa|RGBX|CMYK);16([BLN])")
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA = 258, 262, 277, 284, 338
# What says how a TIFF stores one plane.
_SHORTS = (258, 259, 262, 266, 274, 277, 284, 317, 320)  # among them compression, predictor, orientation, palette
_LONGS = (256, 257, 278, 322, 323)  # sizes of the image, its strips and its tiles
_PARTS = (273, 279, 324, 325)  # places and lengths of the strips or tiles

MOST_PROFILE_BYTES = 4 * 2**20  # profiles of printers have up to 3 MiB, those of displays some KiB
_CACHED_PROFILES = 16
_MOST_TAGS = 100  # of a profile; the largest in use have about 30
_SPACES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
_PROFILE_CLASSES = (b"mntr", b"scnr", b"prtr", b"spac")
# The matrix of sRGB, adapted to D50 as in profiles, in XYZ.
_SRGB = {b"r": (0.4361, 0.2225, 0.0139), b"g": (0.3851, 0.7169, 0.0971), b"b": (0.1431, 0.0606, 0.7141)}
_MATRIX_TOLERANCE = 0.002  # of XYZ; Display P3 differs by 0.09
_SAME_LEVELS = 2  # of 255: a profile whose colours differ by no more is sRGB


def eight_bits(samples: npt.NDArray[np.integer], kind: str, notes: list[str], top: int | None = None) -> UInt8:
    """Scale samples of 0..`top` to 0..255, rounded to nearest, and note it.

    Without `top` the range is 0..65535, or 0..4095 if no sample exceeds 4095: many cameras and microscopes
    store 12 bits in 16. kind: "grey" or "colour", for the note.
    """
    found = _range_of(samples) if top is None else top
    how = "" if found == FULL_RANGE else f" of at most {found}"
    if found == TWELVE_BITS and top is None:
        how = " without a value above 4095 taken as 12-bit and"
    notes.append(f"16-bit {kind}{how} scaled to 8 bits")
    return _scaled(samples, found)


def _range_of(*samples: npt.NDArray[np.integer]) -> int:
    return TWELVE_BITS if all(part.max() <= TWELVE_BITS for part in samples) else FULL_RANGE


def _scaled(samples: npt.NDArray[np.integer], top: int) -> UInt8:
    levels = np.minimum((np.arange(FULL_RANGE + 1, dtype=np.uint32) * 510 + top) // (2 * top), 255).astype(np.uint8)
    scaled = np.empty(samples.shape, np.uint8)
    for row, target in zip(samples, scaled, strict=True):  # NumPy takes 8 bytes for each index
        target[...] = levels[row]
    return scaled


def is_misread(image: ImageFile.ImageFile) -> bool:
    """Tell whether Pillow may lose bits, mistake the layout, or apply XMP when it loads this opened file."""
    return image.format in ("TIFF", "PPM") or ";16" in _raw_mode(image)


def from_deep_grey(image: Image.Image, notes: list[str]) -> Image.Image:
    """Return 8-bit grey, with opacity where a PNG has a transparent grey, for a loaded image of 16-bit grey."""
    samples = np.asarray(image)
    if samples.min() < 0 or samples.max() > FULL_RANGE:
        raise ValueError(f"32-bit or signed pixels have no defined range, expected 8 or 16 bits: {SCALE_FIRST}")
    # Of these formats, Pillow has scaled the range that the file names to 16 bits.
    top = FULL_RANGE if image.format in ("PPM", "JPEG2000") else None
    grey = eight_bits(samples, "grey", notes, top)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # a TIFF that counts from white
        grey = 255 - grey
    found = with_profile_of(image, Image.fromarray(grey))
    key = image.info.get("transparency")
    if isinstance(key, int):
        found.putalpha(Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8)))
    return found


def deep_colour(data: bytes, image: ImageFile.ImageFile, notes: list[str]) -> Image.Image:
    """Return an image of 8 bits for a file of 16-bit colour, of which Pillow drops the low bytes; else `image`.

    data: the bytes of the file that `image` was opened from; its pixels are not loaded yet. This also reads
    TIFFs of separate planes where Pillow mistakes their layout.
    """
    tags = getattr(image, "tag_v2", {})
    separate = tags.get(_PLANAR) == 2
    if separate and tags.get(_SAMPLES, 1) == 1:
        return _plane(data, image, 0, 1)
    raw_mode, top = _raw_mode(image), None
    if separate and tags.get(_BITS, (0,))[0] == 16:
        count = tags[_SAMPLES]
        planes = [np.asarray(_plane(data, image, i, count)) for i in range(len(image.getbands()))]
        samples = np.dstack(planes).astype(np.uint16)
    elif raw_mode.startswith("LA;16"):
        samples = _grey_and_opacity(data, image)
    elif _DEEP_MODE.fullmatch(raw_mode):
        samples = _both_bytes(data, image, raw_mode)
    elif (most := _netpbm_range(image)) > 255:
        samples, top = _netpbm(data, image), None if most == FULL_RANGE else most
    else:
        return image
    return _eight_bit_image(samples, image, top, tags.get(_EXTRA, (0,))[0] == 1, notes)


def _eight_bit_image(
    samples: UInt16, image: Image.Image, top: int | None, premultiplied: bool, notes: list[str]
) -> Image.Image:
    alpha, alpha_top = None, FULL_RANGE
    key = image.info.get("transparency")  # the transparent colour of a PNG
    if image.mode == "RGBA":
        alpha_top = _range_of(samples)
        samples, alpha = samples[..., :-1], samples[..., -1:]
        if premultiplied:
            straight = (samples.astype(np.uint32) * alpha_top + alpha // 2) // np.maximum(alpha, 1)
            samples = np.minimum(straight, alpha_top).astype(np.uint16)
    elif image.mode == "RGBX":  # of older Pillow
        samples = samples[..., :3]
    elif isinstance(key, tuple):
        alpha = np.where((samples == np.array(key)).all(axis=2, keepdims=True), 0, FULL_RANGE).astype(np.uint16)
    eight = eight_bits(samples, "grey" if samples.shape[2] == 1 else "colour", notes, top)
    if alpha is not None:
        eight = np.dstack([eight, _scaled(alpha, alpha_top)])
    mode = image.mode if image.mode == "CMYK" else ("L", "LA", "RGB", "RGBA")[eight.shape[2] - 1]
    found = Image.frombytes(mode, (eight.shape[1], eight.shape[0]), eight.tobytes())
    return with_profile_of(image, found)


def with_profile_of(image: Image.Image, other: ImageType) -> ImageType:
    """Return `other` with the colour profile of `image`."""
    if "icc_profile" in image.info:
        other.info["icc_profile"] = image.info["icc_profile"]
    return other


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Return Pillow's name for how the pixels of an opened file are stored, "" where it has none."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else str(next(iter(arguments or ()), ""))


def _both_bytes(data: bytes, image: ImageFile.ImageFile, raw_mode: str) -> UInt16:
    """Decode 16-bit colour [H, W, C] twice, as the two byte orders: of either, Pillow keeps the high bytes."""
    base, order = raw_mode.split(";16")
    base = base.replace("a", "A")  # as stored: dividing by the opacity needs both bytes
    other = type(image)(io.BytesIO(data), "")
    other.info.pop("xmp", None)
    for file, stored in ((image, order), (other, _OTHER_ORDER[order])):
        file.tile = [_with_raw_mode(tile, f"{base};16{stored}") for tile in file.tile]
        file.load()
    samples = np.asarray(image).astype(np.uint16)
    samples <<= 8
    samples |= np.asarray(other)
    return samples


def _with_raw_mode(tile: Any, raw_mode: str) -> Any:
    arguments = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _grey_and_opacity(data: bytes, image: ImageFile.ImageFile) -> UInt16:
    """Decode 16-bit grey with opacity [H, W, 2] from a PNG: stored like RGBA of 8 bits, as which it is opened."""
    if data[12:16] != b"IHDR":
        raise ValueError("its first chunk is not IHDR: save it again")
    header = b"IHDR" + data[16:24] + b"\x08\x06" + data[26:29]
    twin = type(image)(io.BytesIO(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]), "")
    image.load()
    return np.asarray(np.asarray(twin)).view(">u2").astype(np.uint16)


def _netpbm_range(image: ImageFile.ImageFile) -> int:
    """Return the largest value that a binary PGM or PPM may hold; 0 for 8 bits and other formats."""
    if image.format != "PPM" or not image.tile:
        return 0
    tile: Any = image.tile[0]
    return FULL_RANGE if tile[3] == "I;16B" else int(tile[3][1]) if tile[0] == "ppm" else 0


def _netpbm(data: bytes, image: ImageFile.ImageFile) -> UInt16:
    """Decode a binary PGM or PPM of two bytes per sample to [H, W, C]."""
    shape = (image.height, image.width, len(image.getbands()))
    samples = np.frombuffer(data, ">u2", shape[0] * shape[1] * shape[2], image.tile[0][2])
    return samples.reshape(shape).astype(np.uint16)


def _plane(data: bytes, image: ImageFile.ImageFile, index: int, count: int) -> ImageFile.ImageFile:
    """Open one of the `count` planes of a TIFF as a grey TIFF, or its only plane as what it is."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    values: dict[int, tuple[int, ...]] = {}
    for tag in {*_SHORTS, *_LONGS, *_PARTS} & set(tags):
        values[tag] = tags[tag] if isinstance(tags[tag], tuple) else (tags[tag],)
        if tag in _PARTS:
            each = len(values[tag]) // count
            values[tag] = values[tag][index * each : (index + 1) * each]
    values[_BITS] = values.get(_BITS, (1,))[:1]
    values[_SAMPLES] = values[_PLANAR] = (1,)
    if count > 1:
        values[_PHOTOMETRIC] = (1,)
    order = ">" if tags.prefix == b"MM" else "<"
    start = len(data) + len(data) % 2
    beyond, entries = start + 2 + 12 * len(values) + 4, struct.pack(order + "H", len(values))
    contents = b""
    for tag, numbers in sorted(values.items()):
        kind = "H" if tag in _SHORTS else "L"
        content = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(content) > 4:
            contents, content = contents + content, struct.pack(order + "L", beyond + len(contents))
        entries += struct.pack(order + "HHL", tag, 3 if kind == "H" else 4, len(numbers)) + content.ljust(4, b"\0")
    header = tags.prefix + struct.pack(order + "HL", 42, start)
    plane = header + data[8:].ljust(start - 8, b"\0") + entries + bytes(4) + contents
    return with_profile_of(image, type(image)(io.BytesIO(plane), ""))


def without_huge_profile(data: bytes, notes: list[str]) -> bytes:
    """Drop and note a colour profile for whose size Pillow would refuse this PNG."""
    from PIL.PngImagePlugin import MAX_TEXT_CHUNK

    at, end = 8, data.find(b"IDAT")
    while data.find(b"iCCP", at, end) > 0:
        after = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"iCCP":
            packed = data[at + 8 : after].partition(b"\0")[2]
            unpacking = zlib.decompressobj()
            try:
                unpacking.decompress(packed[1:], MAX_TEXT_CHUNK)
            except zlib.error:
                return data
            if not unpacking.unconsumed_tail:
                return data
            notes.append(f"colour profile ignored: expected at most {MAX_TEXT_CHUNK} bytes in a PNG")
            return data[:at] + data[after:]
        at = after
    return data


def srgb_transform(profile: Any, image_mode: str, notes: list[str]) -> "ImageCmsTransform | None":
    """Return what converts an image to 8-bit sRGB by its colour profile, and note it.

    image_mode: L, RGB or CMYK. Returns None where there is nothing to convert: without a profile, with that of
    sRGB, and with one that cannot be used, which is noted.
    """
    if not isinstance(profile, bytes) or not profile:
        return None
    mode = _SPACES.get(profile[16:20], "")
    if len(profile) > MOST_PROFILE_BYTES:
        problem = f"it has {len(profile)} bytes, expected at most {MOST_PROFILE_BYTES}"
    elif profile[36:40] != b"acsp" or profile[12:16] not in _PROFILE_CLASSES or not mode:
        problem = "it is damaged, or not one of grey, RGB or CMYK"
    elif mode != image_mode and (mode, image_mode) != ("RGB", "L"):
        problem = f"it is for {mode}, the image is {image_mode}"
    else:
        found = _transform(profile, mode)
        if not isinstance(found, str):
            notes.append("colours converted to sRGB from the embedded profile")
            return found
        problem = found
    if problem:
        notes.append(f"colour profile ignored: {problem}")
    return None


@lru_cache(_CACHED_PROFILES)
def _transform(profile: bytes, mode: str) -> "ImageCmsTransform | str":
    """Return the transform of a profile to sRGB, "" if it changes nothing, or why there is none."""
    if mode == "RGB" and _is_srgb(profile):
        return ""
    from PIL import ImageCms  # loading it takes milliseconds, and few images need it

    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(256, 16, 3)
        probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0].copy())
        if mode != "CMYK":
            change = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
            return transform if np.abs(change).max() > _SAME_LEVELS else ""
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
        return "it cannot be read"
    return transform


def _is_srgb(profile: bytes) -> bool:
    """Tell whether a profile is a matrix and curves that do what sRGB's do, whatever its name."""
    try:
        (count,) = struct.unpack_from(">I", profile, 128)
        entries = [struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(min(count, _MOST_TAGS))]
        tags = {name: profile[at : at + size] for name, at, size in entries}
        if b"A2B0" in tags or profile[20:24] != b"XYZ ":  # tables, which take precedence
            return False
        for channel, expected in _SRGB.items():
            column = struct.unpack_from(">3i", tags[channel + b"XYZ"], 8)
            if any(abs(value / 65536 - x) > _MATRIX_TOLERANCE for value, x in zip(column, expected, strict=True)):
                return False
            if any(
                abs(_srgb_level(_curve(tags[channel + b"TRC"], i / 64)) - i / 64) * 255 > _SAME_LEVELS
                for i in range(65)
            ):
                return False
    except (struct.error, KeyError, IndexError, ArithmeticError, TypeError, ValueError):
        return False
    return True


def _srgb_level(light: float) -> float:
    return 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055


def _curve(tag: bytes, level: float) -> float:
    """Evaluate a tone curve of an ICC profile: a table, a power, or sRGB's kind of formula."""
    if tag[:4] == b"para" and tag[8:10] == b"\0\3":
        gamma, a, b, c, d = (value / 65536 for value in struct.unpack_from(">5i", tag, 12))
        return float((a * level + b) ** gamma) if level >= d else c * level
    (count,) = struct.unpack_from(">I", tag, 8)
    if tag[:4] != b"curv" or count < 2:  # a power alone is not sRGB
        return 0.0
    at = level * (count - 1)
    low = struct.unpack_from(">H", tag, 12 + 2 * int(at))[0]
    high = struct.unpack_from(">H", tag, 12 + 2 * min(int(at) + 1, count - 1))[0]
    return float(low + (high - low) * (at - int(at))) / FULL_RANGE
