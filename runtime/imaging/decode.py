"""Decode images and read, write and resize masks. Every part of multisa decodes images with these functions.

    image = decode_image(data, long_side=512)      # image.rgb, image.size

Ordinary JPEGs are decoded by libjpeg-turbo, with the same pixels as Pillow; Pillow decodes everything else.
"""

import errno
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from multisa.runtime.errors import ImageError
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.colour import (
    SCALE_FIRST,
    deep_colour,
    from_deep_grey,
    is_misread,
    srgb_transform,
    without_huge_profile,
)
from multisa.runtime.imaging.guards import (
    MOST_FRAMES,
    check_metadata,
    check_tiff,
    count_frames,
    describe_other,
    has_every_scan,
    is_camera_raw,
)
from multisa.runtime.imaging.png import PNG_SIGNATURE, encode_palette_png

UInt8 = npt.NDArray[np.uint8]

MAX_FILE_BYTES = 512 * 2**20  # of one image; no camera writes more, and a worker holds it in memory
MAX_PIXELS = 50_000_000
MINIMUM_SIDE = 64  # pixels; the smallest side that the exported graphs accept
# Networks learn from images of resampled pixels, and from objects of the size that they have at the working size. An
# image that is smaller is therefore enlarged, but not without a limit, because each doubling costs four times as much.
MAX_ENLARGEMENT = 2.0
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
MASK_FORMATS = ("PNG",)
EXTENSIONS = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm",
))  # fmt: skip
# A JPEG decoded at reduced size keeps at least this many times the side that the networks see. This changes
# 0.5 % of the labels of 13 images enlarged to 12 megapixels (0.2 % on the 12 images of
# benchmarks/results/encoding.json). Saving the networks' input as a JPEG of quality 95 changes 0.8 %.
SCALED_SIDES = 2

# Everything that Pillow's decoders raise for broken files.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, ArithmeticError, MemoryError,
    AttributeError, AssertionError, NotImplementedError, struct.error, zlib.error,
    Image.DecompressionBombError, Warning,  # where the host program turns warnings into errors
)  # fmt: skip
_XMP = frozenset(("xmp", "XML:com.adobe.xmp"))  # Pillow's names for it
_PREFIX_BYTES = 16  # of a file, by which Pillow's plug-ins recognise their format

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """One upright image and its original size."""

    rgb: UInt8  # [h, w, 3], contiguous; of another size than `size` only if loaded with a long side
    orientation: int  # EXIF orientation of the file, 1..8 (1 when absent); `rgb` is already upright
    notes: tuple[str, ...]  # descriptions of lossy conversions
    size: tuple[int, int]  # (H, W) of the upright image before resizing: the size of its mask


def load_image(image: ImageInput, *, max_pixels: int = MAX_PIXELS, long_side: int | None) -> DecodedImage:
    """Load an image as upright RGB, resized to the working size of `long_side`.

    image: a path, the bytes of an image file, a PIL image, or RGB as uint8 [H, W, 3]. With `long_side` None
    the image keeps its size. Raises ImageError for an image that cannot be read or has more than
    `max_pixels`, and for an array of another shape or dtype.
    """
    if isinstance(image, np.ndarray):
        loaded = _from_array(image, max_pixels)
    elif isinstance(image, Image.Image):
        loaded = _from_pillow(image, max_pixels)
    elif isinstance(image, bytes):
        loaded = decode_image(image, max_pixels=max_pixels, long_side=long_side)
    elif isinstance(image, (str, os.PathLike)):
        path = Path(image)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # a device or a pipe may have no end
                raise ImageError("is not a regular file, expected an image file")
            if status.st_size > MAX_FILE_BYTES:
                raise ImageError(f"{status.st_size} bytes, expected at most {MAX_FILE_BYTES}: save it smaller")
            loaded = decode_image(path.read_bytes(), max_pixels=max_pixels, long_side=long_side)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            name = str(image)
            raise ImageError(f"{name if name.isprintable() else repr(name)}: {reason_of(error)}") from error
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error
    else:
        raise ImageError(
            f"got {type(image).__name__}, expected a path, the bytes of an image file, a PIL image, or RGB "
            "as uint8 [H, W, 3]"
        )
    if long_side is None:
        return loaded
    return replace(loaded, rgb=resize_image(loaded.rgb, working_size(*loaded.size, long_side)))


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, long_side: int | None = None) -> DecodedImage:
    """Decode one image file as upright RGB. Accepts every Pillow mode that has a defined 8-bit meaning.

    Repeats grey in all channels, scales 16 bits to 8, converts colours with a profile to sRGB, composites
    transparency on white, turns by the orientation of EXIF alone, and takes the first frame of an animation.
    If `long_side` announces a later resize (see `working_size`), a much larger JPEG is decoded at some eighths
    of its size, but not below SCALED_SIDES times the working size.

    Raises ImageError (the reason) for data that is empty, truncated, not an image, larger than `max_pixels`,
    of a mode without a defined range (float, 32-bit integer), or bloated with metadata. Sizes are checked
    before any pixel is decoded.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        check_metadata(data)
        notes: list[str] = []
        if data.startswith(PNG_SIGNATURE):
            data = without_huge_profile(data, notes)
        with open_image(data, FORMATS, max_pixels) as image:
            if image.format != "JPEG":
                notes += _frame_notes(data, image)
            turns_itself = image.format == "TIFF"  # while loading, when it also drops the tag
            if turns_itself:
                image.info.pop("xmp", None)  # it would turn by this as well
                orientation = _orientation(image)
            rgb, size = _decode_jpeg(data, image, long_side, notes), (image.height, image.width)
            if rgb is None:
                rgb = np.array(_to_rgb(deep_colour(data, image, notes), notes), dtype=np.uint8, order="C")
                size = rgb.shape[:2]
            if not turns_itself:  # a PNG may have it after its pixels
                orientation = _orientation(image)
    except DECODER_ERRORS as error:
        raise ImageError(reason_of(error)) from error
    if orientation != 1 and not turns_itself:
        rgb = _upright(rgb, orientation)
        size = size if orientation < 5 else size[::-1]
    return DecodedImage(rgb, orientation, tuple(notes), size)


def working_size(height: int, width: int, long_side: int, *, enlarge: float = MAX_ENLARGEMENT) -> tuple[int, int]:
    """Return the size (height, width) of the networks' input for an image of this size.

    The long side becomes `long_side`, as far as that enlarges the image at most `enlarge` times; sides below
    MINIMUM_SIDE always become that value. Raises ValueError for long_side < MINIMUM_SIDE.
    """
    if long_side < MINIMUM_SIDE:
        raise ValueError(f"long_side is {long_side}, expected at least {MINIMUM_SIDE}")
    scale = min(enlarge, long_side / max(height, width))
    return max(MINIMUM_SIDE, round(height * scale)), max(MINIMUM_SIDE, round(width * scale))


@contextmanager
def open_image(data: bytes, formats: tuple[str, ...], max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Open an image with Pillow, which reads its header but not its pixels.

    Raises ImageError for an image of more than `max_pixels`, and any of DECODER_ERRORS.
    """
    # `Image.open` first compares the size with a module-wide limit that belongs to the host program. The
    # plug-ins behind it have no limit, and they decode no pixel.
    Image.preinit()
    raw = data[:2] in (b"II", b"MM") and is_camera_raw(data)
    for name in () if raw else formats:  # Pillow would open the thumbnail of a raw file
        if name not in Image.OPEN:  # loading every plug-in takes milliseconds
            Image.init()
        opener, accepts = Image.OPEN[name]
        accepted = True if accepts is None else accepts(data[:_PREFIX_BYTES])
        if accepted is not True and (isinstance(accepted, str) or not accepted):
            continue
        try:
            image = opener(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # another format after all
            continue
        with image:
            if image.width * image.height > max_pixels:
                raise _too_large(image.width, image.height, max_pixels)
            yield image
        return
    raise UnidentifiedImageError(*describe_other(data))


def _too_large(width: int, height: int, max_pixels: int) -> ImageError:
    return ImageError(
        f"{width}x{height} = {width * height} pixels, expected at most {max_pixels}: "
        "shrink it or raise the limit (--max-pixels)"
    )


def reason_of(error: BaseException, formats: tuple[str, ...] = FORMATS) -> str:
    """Describe why an image could not be opened or decoded."""
    if isinstance(error, UnidentifiedImageError):
        found, remedy = error.args
        return f"not an image of a supported format, got {found}, expected {', '.join(formats)}: {remedy}"
    if isinstance(error, OSError) and error.errno is not None:
        reason = os.strerror(error.errno)
        return f"{reason}: check the path" if error.errno == errno.ENOENT else reason
    return f"cannot be decoded: {str(error) or type(error).__name__}"


def _from_array(rgb: UInt8, max_pixels: int) -> DecodedImage:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
        raise ImageError(f"got {rgb.dtype} {list(rgb.shape)}, expected RGB as uint8 [H, W, 3]")
    height, width = rgb.shape[:2]
    if height * width > max_pixels:
        raise _too_large(width, height, max_pixels)
    return DecodedImage(np.ascontiguousarray(rgb), 1, (), (height, width))


def _from_pillow(image: Image.Image, max_pixels: int) -> DecodedImage:
    """Convert a PIL image to upright RGB as `decode_image` does, from its file where Pillow would misread that."""
    if not image.width or not image.height:
        raise ImageError(f"got an image of {image.width}x{image.height} pixels, expected at least one")
    if image.width * image.height > max_pixels:
        raise _too_large(image.width, image.height, max_pixels)
    notes: list[str] = []
    try:
        if isinstance(image, ImageFile.ImageFile) and image.tile and image.tell() == 0 and is_misread(image):
            return decode_image(_bytes_of(image), max_pixels=max_pixels)
        orientation = _orientation(image)
        rgb = np.array(_to_rgb(image, notes), dtype=np.uint8, order="C")
        rgb = _upright(rgb, _orientation(image))
    except DECODER_ERRORS as error:
        raise ImageError(reason_of(error)) from error
    return DecodedImage(rgb, orientation, tuple(notes), (rgb.shape[0], rgb.shape[1]))


def _bytes_of(image: ImageFile.ImageFile) -> bytes:
    """Return the bytes of the file that an image was opened from and not loaded yet."""
    file = image.fp
    if file is None:
        raise ValueError("its file is closed: load it before")
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    return bytes(data)


def _frame_notes(data: bytes, image: ImageFile.ImageFile) -> list[str]:
    # For GIF and TIFF, Pillow counts frames without a limit.
    counted = count_frames(data)
    frames = int(getattr(image, "n_frames", 1)) if counted is None else counted
    if frames <= 1:
        return []
    return [f"first of {'at least ' if counted == MOST_FRAMES else ''}{frames} frames"]


def _orientation(image: Image.Image) -> int:
    exif = image.info.get("exif")
    if isinstance(exif, bytes):
        check_tiff(exif.removeprefix(b"Exif\0\0"))
    tags = image.getexif()
    if not _XMP.isdisjoint(image.info):  # Pillow takes its orientation, which browsers and label tools ignore
        bare = Image.Image()
        bare.info = {name: value for name, value in image.info.items() if name not in _XMP}
        tags = bare.getexif()
    value = tags.get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode_jpeg(data: bytes, image: ImageFile.ImageFile, long_side: int | None, notes: list[str]) -> UInt8 | None:
    """Decode a grey or colour JPEG without defects to uint8 [h, w, 3]; return None to leave it to Pillow.

    At full size the pixels equal Pillow's: both use libjpeg-turbo's accurate DCT and smooth upsampling. A file
    that lacks nothing but its end marker is decoded here too.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    import simplejpeg

    least = (0, 0)
    if long_side is not None:
        height, width = working_size(image.height, image.width, long_side)
        least = (SCALED_SIDES * height, SCALED_SIDES * width)
    for ending in (b"", b"\xff\xd9"):
        try:
            # libjpeg-turbo has no complaint only if the image data are complete.
            rgb: UInt8 = simplejpeg.decode_jpeg(data + ending, "RGB", min_height=least[0], min_width=least[1])
            break
        except ValueError:
            if ending or not has_every_scan(data):
                return None  # Pillow tolerates small defects, and describes the others
    # Pillow must agree on the size: a file whose header has two readings is not ordinary.
    scaled = long_side is not None and rgb.shape[0] >= least[0] and rgb.shape[1] >= least[1]
    if not scaled and rgb.shape[:2] != (image.height, image.width):
        return None
    if ending:
        notes.append("JPEG without its end marker")
    profile = image.info.get("icc_profile")
    transform = srgb_transform(profile, image.mode, notes) if profile else None
    if transform is not None:
        pixels = Image.fromarray(rgb if transform.input_mode == "RGB" else rgb[..., 0].copy())
        rgb = np.array(transform.apply(pixels))
    return rgb


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    image.load()
    if image.mode == "F":
        raise ValueError(f"floating-point pixels have no defined range, expected 8 or 16 bits: {SCALE_FIRST}")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = from_deep_grey(image, notes)
    mode = {"CMYK": "CMYK", "1": "L", "L": "L", "LA": "L", "La": "L"}.get(image.mode, "RGB")
    transform = srgb_transform(image.info.get("icc_profile"), mode, notes)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema()[0] == 255:  # opaque
            alpha = None
        else:
            notes.append("transparency laid on white")
    if transform is not None:
        image = transform.apply(image.convert(transform.input_mode))
        if alpha is not None:
            image.putalpha(alpha)
    elif mode == "CMYK":
        notes.append("CMYK converted without its colour profile")
    if alpha is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _upright(rgb: UInt8, orientation: int) -> UInt8:
    """Rotate and flip an image with this EXIF orientation to stand upright; the result is contiguous."""
    if orientation >= 5:  # stored with rows and columns exchanged
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Read one image file as upright RGB at full size. Raises ImageError (`PATH: reason`)."""
    return load_image(path, max_pixels=max_pixels, long_side=None)


def decode_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8:
    """Decode class ids uint8 [H, W] from the bytes of a palette or 8-bit grey PNG of at most `max_pixels`.

    Raises ImageError (the reason) for anything else: RGB masks and masks of another depth have no ids.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        check_metadata(data)
        with open_image(data, MASK_FORMATS, max_pixels) as image:
            mode = image.mode
            # Pillow stretches grey of 1, 2 or 4 bits to 0..255, which would change the ids.
            raw_mode = str(image.tile[0][3])
            ids = np.array(image) if mode == "P" or (mode == "L" and raw_mode == "L") else None
    except DECODER_ERRORS as error:
        raise ImageError(reason_of(error, MASK_FORMATS)) from error
    if ids is None:
        raise ImageError(
            f"got a mask of mode {raw_mode}, expected a palette or 8-bit grey PNG whose values are "
            "class ids: map each colour to its id and save the ids"
        )
    return ids.astype(np.uint8, copy=False)


def read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises OSError, and ImageError (the reason) for more than MAX_FILE_BYTES."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ImageError(f"{size} bytes, expected at most {MAX_FILE_BYTES}: save it smaller")
    return path.read_bytes()


def read_mask(path: Path, *, max_pixels: int = MAX_PIXELS) -> UInt8:
    """Read class ids uint8 [H, W] as `decode_mask` does. Raises ImageError (`PATH: reason`)."""
    try:
        return decode_mask(read_file(path), max_pixels=max_pixels)
    except OSError as error:
        raise ImageError(f"{path}: {reason_of(error, MASK_FORMATS)}") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def write_mask(path: Path, mask: UInt8, palette: UInt8) -> None:
    """Write class ids uint8 [H, W] atomically as a palette PNG. Raises as `encode_palette_png` does."""
    write_bytes_atomically(path, encode_palette_png(mask, palette))


def resize_image(rgb: UInt8, size: tuple[int, int]) -> UInt8:
    """Resize uint8 [H, W, 3] to [*size, 3] bilinearly, averaging the source area when shrinking."""
    if rgb.shape[:2] == size:
        return rgb
    image = Image.fromarray(np.ascontiguousarray(rgb))
    return np.array(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_mask(mask: UInt8, size: tuple[int, int]) -> UInt8:
    """Resize class ids uint8 [H, W] to `size` by nearest neighbour."""
    if mask.shape[:2] == size:
        return mask
    image = Image.fromarray(np.ascontiguousarray(mask))
    return np.array(image.resize((size[1], size[0]), Image.Resampling.NEAREST))
