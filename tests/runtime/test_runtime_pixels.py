"""The values of decoded pixels: 16 bits, TIFF layouts, colour profiles, orientation, JPEGs without an end."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multisa.runtime.errors import ImageError
from multisa.runtime.imaging import colour
from multisa.runtime.imaging.decode import decode_image, load_image

RANDOM = np.random.default_rng(5)
DEEP = RANDOM.integers(0, 65536, (37, 22, 4)).astype(np.uint16)
DEEP[0, 0], DEEP[0, 1], DEEP[0, 2] = 0, 65535, 0x0180
TWELVE = DEEP >> 4
EIGHT = (DEEP >> 8).astype(np.uint8)
SCALED = np.rint(DEEP / 257).astype(np.uint8)
SCALED_TWELVE = np.rint(TWELVE / 4095 * 255).astype(np.uint8)
NOTE = "16-bit {} scaled to 8 bits"
TWELVE_NOTE = "16-bit {} without a value above 4095 taken as 12-bit and scaled to 8 bits"


def on_white(rgba: np.ndarray) -> np.ndarray:
    opacity = rgba[..., -1:] / 255
    return np.broadcast_to(rgba[..., :-1] * opacity + 255 * (1 - opacity), (*rgba.shape[:2], 3))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG of 16 bits: grey, grey with opacity, RGB or RGBA by the number of channels."""
    height, width, channels = samples.shape
    head = struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    pieces = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def tiff(
    samples: np.ndarray, photometric: int, *, layout: str = "<1r", tags: dict[int, Sequence[int]] | None = None
) -> bytes:
    """A TIFF of unsigned integers [H, W, C] in strips of 10 rows.

    layout: byte order (< or >), planes together (1) or separate (2), raw (r) or deflated (z).
    """
    order, planar, packing = layout
    height, width, channels = samples.shape
    bits = samples.dtype.itemsize * 8
    stored = samples.astype(samples.dtype.newbyteorder(order))
    planes = [stored] if planar == "1" else [stored[..., i] for i in range(channels)]
    strips = [plane[row : row + 10].tobytes() for plane in planes for row in range(0, height, 10)]
    if packing == "z":
        strips = [zlib.compress(strip) for strip in strips]
    offsets = np.cumsum([8, *map(len, strips)])
    entries: dict[int, tuple[str, Sequence[int]]] = {
        256: ("L", [width]),
        257: ("L", [height]),
        258: ("H", [bits] * channels),
        259: ("H", [8 if packing == "z" else 1]),
        262: ("H", [photometric]),
        273: ("L", offsets[:-1].tolist()),
        277: ("H", [channels]),
        278: ("L", [10]),
        279: ("L", [len(strip) for strip in strips]),
        284: ("H", [int(planar)]),
        **{tag: ("B" if tag in (700, 34675) else "H", value) for tag, value in (tags or {}).items()},
    }
    at = int(offsets[-1])
    beyond, table = b"", struct.pack(order + "H", len(entries))
    after = at + 2 + 12 * len(entries) + 4
    for tag, (kind, values) in sorted(entries.items()):
        content = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(content) > 4:
            content, beyond = struct.pack(order + "L", after + len(beyond)), beyond + content + bytes(len(content) % 2)
        table += struct.pack(order + "HHL", tag, {"B": 1, "H": 3, "L": 4}[kind], len(values)) + content.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HL", 42, at)
    return head + b"".join(strips) + table + bytes(4) + beyond


def ppm(samples: np.ndarray, most: int) -> bytes:
    height, width, channels = samples.shape
    return b"P%d %d %d %d\n" % (5 if channels == 1 else 6, width, height, most) + samples.astype(">u2").tobytes()


def check(data: bytes, expected: np.ndarray, notes: tuple[str, ...], within: float = 0) -> None:
    """Of a file and of a PIL image that Pillow opened and did not load."""
    with Image.open(io.BytesIO(data)) as opened:
        for decoded in (decode_image(data), load_image(opened, long_side=None)):
            assert decoded.rgb.dtype == np.uint8 and decoded.rgb.flags.c_contiguous
            assert decoded.size == decoded.rgb.shape[:2] == expected.shape[:2]
            np.testing.assert_allclose(decoded.rgb, np.broadcast_to(expected, decoded.rgb.shape), rtol=0, atol=within)
            assert decoded.notes == notes


DEPTHS = [(DEEP, SCALED, NOTE), (TWELVE, SCALED_TWELVE, TWELVE_NOTE)]
LAYOUTS = ["<1r", ">1r", "<1z", ">1z", "<2r", ">2r", "<2z", ">2z"]
WHITE = "transparency laid on white"


@pytest.mark.parametrize(("samples", "scaled", "note"), DEPTHS, ids=["16", "12"])
def test_png_of_16_bits(samples: np.ndarray, scaled: np.ndarray, note: str) -> None:
    check(png(samples[..., :1]), scaled[..., :1], (note.format("grey"),))
    check(png(samples[..., :3]), scaled[..., :3], (note.format("colour"),))
    check(png(samples[..., :2]), on_white(scaled[..., :2]), (note.format("grey"), WHITE), within=1)
    check(png(samples), on_white(scaled), (note.format("colour"), WHITE), within=1)


def test_opaque_12_bits_of_colour_are_found() -> None:
    opaque = TWELVE.copy()
    opaque[..., 3] = 65535
    expected = SCALED_TWELVE[..., :3]
    check(png(opaque), expected, (TWELVE_NOTE.format("colour"),))


def test_transparent_colours_of_png_are_compared_with_all_16_bits() -> None:
    samples = DEEP[..., :3].copy()
    samples[5, 5], samples[5, 6] = (1000, 2000, 3000), (1000, 2000, 3001)
    expected = np.rint(samples / 257)
    expected[5, 5] = 255
    notes = (NOTE.format("colour"), WHITE)
    check(png(samples, chunk(b"tRNS", struct.pack(">3H", 1000, 2000, 3000))), expected, notes)
    grey = np.rint(samples[..., :1] / 257)
    grey[samples[..., :1] == 1000] = 255
    check(png(samples[..., :1], chunk(b"tRNS", struct.pack(">H", 1000))), grey, (NOTE.format("grey"), WHITE))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("samples", "scaled", "note"), DEPTHS, ids=["16", "12"])
def test_tiff_of_16_bits(layout: str, samples: np.ndarray, scaled: np.ndarray, note: str) -> None:
    grey, rgb = note.format("grey"), note.format("colour")
    check(tiff(samples[..., :3], 2, layout=layout), scaled[..., :3], (rgb,))
    check(tiff(samples[..., :1], 1, layout=layout), scaled[..., :1], (grey,))
    check(tiff(samples, 2, layout=layout, tags={338: [0]}), scaled[..., :3], (rgb,))
    check(tiff(samples, 2, layout=layout, tags={338: [2]}), on_white(scaled), (rgb, WHITE), within=1)
    associated = samples.copy()
    associated[..., :3] = samples[..., :3].astype(float) * samples[..., 3:] / samples.max()
    data = tiff(associated, 2, layout=layout, tags={338: [1]})
    check(data, on_white(scaled), (rgb, WHITE), within=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiff_of_16_bits_for_printing(layout: str) -> None:
    inverse = 255 - SCALED.astype(float)
    expected = inverse[..., :3] * inverse[..., 3:] / 255
    notes = (NOTE.format("colour"), "CMYK converted without its colour profile")
    check(tiff(DEEP, 5, layout=layout), expected, notes, within=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiff_of_8_bits(layout: str) -> None:
    check(tiff(EIGHT[..., :3], 2, layout=layout), EIGHT[..., :3], ())
    check(tiff(EIGHT[..., :1], 1, layout=layout), EIGHT[..., :1], ())
    check(tiff(EIGHT[..., :1], 0, layout=layout), 255 - EIGHT[..., :1], ())
    check(tiff(EIGHT, 2, layout=layout, tags={338: [2]}), on_white(EIGHT), (WHITE,), within=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiff_of_16_bits_that_counts_from_white(layout: str) -> None:
    if layout[0] == ">":
        with pytest.raises(ImageError, match=r"a TIFF with 1 16-bit unsigned .* interpretation 0, expected .*gdal_tr"):
            decode_image(tiff(DEEP[..., :1], 0, layout=layout))
        return
    check(tiff(DEEP[..., :1], 0, layout=layout), 255 - SCALED[..., :1], (NOTE.format("grey"),))
    check(tiff(TWELVE[..., :1], 0, layout=layout), 255 - SCALED_TWELVE[..., :1], (TWELVE_NOTE.format("grey"),))


@pytest.mark.parametrize("most", [1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_netpbm_of_16_bits(most: int, kind: str) -> None:
    """The range is in the file, so that dark images of 10 and 12 bits stay dark."""
    samples = (DEEP[..., : 1 if kind == "grey" else 3] & most) // (1 if most == 65535 else 4)
    note = NOTE.format(kind) if most == 65535 else f"16-bit {kind} of at most {most} scaled to 8 bits"
    check(ppm(samples, most), np.rint(samples / most * 255), (note,))
    if most == 65535:
        check(
            ppm(TWELVE[..., : samples.shape[2]], most),
            SCALED_TWELVE[..., : samples.shape[2]],
            (TWELVE_NOTE.format(kind),),
        )
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(ppm(samples, most)[:-3])


def test_grey_of_formats_that_name_their_range_is_not_taken_for_12_bits() -> None:
    check(b"P2 3 1 1023 0 10 1023", np.array([[[0], [2], [255]]]), (NOTE.format("grey"),))
    check(b"P2 3 1 1023 0 10 40", np.array([[[0], [2], [10]]]), (NOTE.format("grey"),))
    dark = TWELVE[..., 0]
    check(saved(dark, "JPEG2000"), np.rint(dark / 257)[..., None], (NOTE.format("grey"),))
    in_memory = load_image(Image.fromarray(dark), long_side=None)
    np.testing.assert_array_equal(in_memory.rgb[..., 0], SCALED_TWELVE[..., 0])


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
FLAT = np.repeat(np.repeat(EIGHT[:4, :6, :3], 8, axis=0), 8, axis=1)  # of blocks of one colour, which a JPEG keeps


def saved(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format, **options)
    return buffer.getvalue()


def xmp_png(pixels: np.ndarray, exif: bytes | None) -> bytes:
    """Both of them after the pixels."""
    data = saved(pixels, "PNG")
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    return data[:-12] + text + (chunk(b"eXIf", exif) if exif else b"") + data[-12:]


def xmp_webp(pixels: np.ndarray, exif: bytes | None) -> bytes:
    return saved(pixels, "WEBP", lossless=True, xmp=XMP, exif=exif or b"")


def xmp_jpeg(pixels: np.ndarray, exif: bytes | None) -> bytes:
    content = b"http://ns.adobe.com/xap/1.0/\0" + XMP
    data = saved(pixels, "JPEG", quality=100, subsampling=0, **({"exif": b"Exif\0\0" + exif} if exif else {}))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(content)) + content + data[2:]


def xmp_tiff(pixels: np.ndarray, exif: bytes | None) -> bytes:
    return tiff(pixels, 2, tags={700: XMP, **({274: [8]} if exif else {})})


@pytest.mark.parametrize("make", [xmp_png, xmp_webp, xmp_jpeg, xmp_tiff])
def test_the_orientation_of_xmp_is_ignored_as_browsers_and_label_tools_do(
    make: Callable[[np.ndarray, bytes | None], bytes],
) -> None:
    tags = Image.Exif()
    tags[0x0112] = 8
    for exif, orientation, expected in ((None, 1, FLAT), (tags.tobytes().removeprefix(b"Exif\0\0"), 8, np.rot90(FLAT))):
        data = make(FLAT, exif)
        assert b'tiff:Orientation="6"' in data
        check(data, expected, (), within=4 if make is xmp_jpeg else 0)
        with Image.open(io.BytesIO(data)) as opened:
            assert decode_image(data).orientation == load_image(opened, long_side=None).orientation == orientation


@pytest.mark.parametrize("layout", ["<1r", ">1z", "<2r", ">2z"])
def test_tiff_of_16_bits_is_turned_once(layout: str) -> None:
    for tags in ({274: [6]}, {274: [6], 700: XMP}):
        check(tiff(DEEP[..., :3], 2, layout=layout, tags=tags), np.rot90(SCALED[..., :3], -1), (NOTE.format("colour"),))
    check(tiff(DEEP[..., :3], 2, layout=layout, tags={700: XMP}), SCALED[..., :3], (NOTE.format("colour"),))
    turned = decode_image(tiff(EIGHT[..., :1], 0, layout=layout, tags={274: [6]}))
    np.testing.assert_array_equal(turned.rgb[..., :1], np.rot90(255 - EIGHT[..., :1], -1))
    assert turned.orientation == 6 and turned.size == (22, 37)


KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "restarts": {"restart_marker_blocks": 3},
    "progressive": {"progressive": True},
    "whole samples": {"subsampling": 0},
}


def textured(mode: str = "RGB") -> np.ndarray:
    noise = np.random.default_rng(7).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((52, 37), Image.Resampling.BICUBIC).convert(mode))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", KINDS)
def test_jpeg_without_its_end_is_complete_or_refused(kind: str, mode: str) -> None:
    """Cut at every byte: with all of its image data it is decoded, otherwise refused."""
    data = saved(textured(mode), "JPEG", quality=60, **KINDS[kind])
    whole = decode_image(data)
    assert data.endswith(b"\xff\xd9") and whole.notes == ()
    accepted = []
    for end in range(2, len(data)):
        try:
            decoded = decode_image(data[:end])
        except ImageError as error:
            assert str(error)
            continue
        accepted.append(end)
        np.testing.assert_array_equal(decoded.rgb, whole.rgb)
        assert decoded.notes == ("JPEG without its end marker",)
        with pytest.raises(ImageError, match="truncated"):
            decode_image(data[: end - 3])
    assert accepted == [len(data) - 2, len(data) - 1]


def test_progressive_jpeg_that_lacks_scans_is_refused() -> None:
    """Its scans end where another one begins, and all of its rows are there, though blurred."""
    data = saved(textured(), "JPEG", quality=60, progressive=True)
    starts = [at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xc4", b"\xff\xda")]
    scans = [at for at in starts if data[at + 1] == 0xDA]
    assert len(scans) == 10
    for at in starts:
        if at > scans[0]:
            with pytest.raises(ImageError, match="truncated"):
                decode_image(data[:at])
            with pytest.raises(ImageError, match="truncated"):
                decode_image(data[:at] + b"\xff")


def test_arithmetic_jpeg_without_its_end_is_refused() -> None:
    """Its decoder takes what is missing for zeros."""
    data = bytearray(saved(textured(), "JPEG", progressive=True))
    at = data.index(b"\xff\xc2")
    data[at + 1] = 0xCA
    with pytest.raises(ImageError):
        decode_image(bytes(data[:-2]))


def number(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def curve(gamma: float) -> bytes:
    """A power for gamma > 0, for 0 that of sRGB as a table."""
    if gamma:
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    x = np.arange(1024) / 1023
    light = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + np.rint(light * 65535).astype(">u2").tobytes()


SRGB_FORMULA = b"para\0\0\0\0\0\3\0\0" + b"".join(map(number, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2."""
    described = {b"desc": b"desc\0\0\0\0\0\0\0\5test\0" + bytes(78), b"cprt": b"text\0\0\0\0none\0"}
    tags = {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(number, (0.9642, 1, 0.8249))), **described, **tags}
    at = 132 + 12 * len(tags)
    table, contents = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(contents), len(content))
        contents += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4xI4s4s4s12x4s", at + len(contents), 0x02400000, kind, space, connection, b"acsp")
    return head + bytes(28) + b"".join(map(number, (0.9642, 1, 0.8249))) + bytes(48) + table + contents


def matrix_profile(columns: tuple[tuple[float, ...], ...], tone: bytes) -> bytes:
    tags = {}
    for name, column in zip((b"r", b"g", b"b"), columns, strict=True):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(number, column))
        tags[name + b"TRC"] = tone
    return profile(b"RGB ", tags)


def grey_profile(tone: bytes) -> bytes:
    return profile(b"GRAY", {b"kTRC": tone})


def cmyk_profile() -> bytes:
    """A table in which lightness depends on cyan alone: from white to black."""
    corners = [(round(255 * (1 - cyan)), 128, 128) for cyan in (0, 1) for _ in range(8)]
    linear = bytes(range(256))
    table = b"mft1\0\0\0\0\4\3\2\0" + b"".join(number(i % 4 == 0) for i in range(9))
    table += linear * 4 + bytes(value for corner in corners for value in corner) + linear * 3
    return profile(b"CMYK", {b"A2B0": table, b"A2B1": table}, b"Lab ")


def converted(rgb: np.ndarray, columns: tuple[tuple[float, ...], ...], gamma: float) -> np.ndarray:
    """The colours of RGB with these primaries and this power (0: the curve of sRGB), in sRGB."""
    x = rgb / 255
    light = x**gamma if gamma else np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    light = (light @ np.array(columns) @ np.linalg.inv(np.array(SRGB))).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


CONVERTED = "colours converted to sRGB from the embedded profile"


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize(("columns", "gamma"), [(DISPLAY_P3, 0), (ADOBE, 563 / 256)], ids=["Display P3", "Adobe RGB"])
def test_colours_are_converted_by_their_profile(
    columns: tuple[tuple[float, ...], ...], gamma: float, format: str
) -> None:
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = saved(FLAT, format, icc_profile=matrix_profile(columns, curve(gamma)), **options)
    without = decode_image(saved(FLAT, format, **options)).rgb
    expected = converted(without, columns, gamma)
    assert np.abs(expected - without).max() > 20
    check(data, expected, (CONVERTED,), within=2)


def test_profiles_of_images_with_opacity_palettes_16_bits_and_grey() -> None:
    adobe = matrix_profile(ADOBE, curve(563 / 256))
    rgb = converted(SCALED[..., :3], ADOBE, 563 / 256)
    icc = chunk(b"iCCP", b"test\0\0" + zlib.compress(adobe))
    check(png(DEEP[..., :3], icc), rgb, (NOTE.format("colour"), CONVERTED), within=2)
    for layout in LAYOUTS:
        data = tiff(DEEP[..., :3], 2, layout=layout, tags={34675: list(adobe)})
        check(data, rgb, (NOTE.format("colour"), CONVERTED), within=2)
    expected = on_white(np.dstack([converted(EIGHT[..., :3], ADOBE, 563 / 256), EIGHT[..., 3:]]))
    check(saved(EIGHT, "PNG", icc_profile=adobe), expected, (CONVERTED, WHITE), within=2)
    palette = Image.fromarray(FLAT).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", icc_profile=adobe)
    check(buffer.getvalue(), converted(np.asarray(palette.convert("RGB")), ADOBE, 563 / 256), (CONVERTED,), within=2)
    grey = EIGHT[..., 0]
    light = (grey / 255) ** 1.8
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)[..., None]
    for format in ("PNG", "TIFF"):
        check(saved(grey, format, icc_profile=grey_profile(curve(1.8))), expected, (CONVERTED,), within=2)
    check(saved(grey, "PNG", icc_profile=adobe), converted(np.dstack([grey] * 3), ADOBE, 563 / 256), (CONVERTED,), 2)
    flat = saved(FLAT[..., 0], "JPEG", quality=100, icc_profile=grey_profile(curve(1)))
    assert decode_image(flat).notes == (CONVERTED,)
    assert (decode_image(flat).rgb.astype(int) - FLAT[..., :1]).mean() > 20


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_inks_are_converted_by_their_profile(format: str) -> None:
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, :16, 0], inks[:, 16:, 1:] = 255, 255  # black, then white
    buffer = io.BytesIO()
    Image.frombytes("CMYK", (32, 16), inks.tobytes()).save(buffer, format, icc_profile=cmyk_profile())
    expected = np.zeros((16, 32, 3))
    expected[:, 16:] = 255
    check(buffer.getvalue(), expected, (CONVERTED,), within=4)


@pytest.mark.parametrize(
    "content", [matrix_profile(SRGB, curve(0)), matrix_profile(SRGB, SRGB_FORMULA)], ids=["table", "formula"]
)
def test_profiles_of_srgb_change_nothing_and_need_no_converter(content: bytes) -> None:
    from PIL import ImageCms

    real = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, icc_profile in enumerate((content, real)):
        data = saved(FLAT, "PNG", icc_profile=icc_profile)
        check(data, FLAT, ())
        program = (
            "import sys; from multisa.runtime.imaging.decode import decode_image\n"
            "assert decode_image(sys.stdin.buffer.read()).notes == ()\n"
            "print(sorted(name for name in sys.modules if 'cms' in name.lower()))"
        )
        if number == 0:
            done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True)
            assert done.stdout.strip() == b"[]"
    tables = profile(b"RGB ", {b"A2B0": b""})
    assert not colour._is_srgb(tables) and not colour._is_srgb(matrix_profile(SRGB, curve(2.2)))


def test_profiles_that_cannot_be_used_are_ignored_with_a_note() -> None:
    good = matrix_profile(ADOBE, curve(2.2))
    rows = [
        (b"nonsense", "it is damaged, or not one of grey, RGB or CMYK"),
        (good[:200], "it cannot be read"),
        (grey_profile(curve(1)), "it is for L, the image is RGB"),
        (good[:12] + b"link" + good[16:], "it is damaged, or not one of grey, RGB or CMYK"),
    ]
    for content, reason in rows:
        check(saved(FLAT, "PNG", icc_profile=content), FLAT, (f"colour profile ignored: {reason}",))
    huge = good + bytes(colour.MOST_PROFILE_BYTES)
    for format, most in (("PNG", 2**20), ("WEBP", 2**22)):  # Pillow refuses a PNG with more
        decoded = decode_image(saved(FLAT, format, icc_profile=huge, lossless=True))
        assert f"expected at most {most}" in decoded.notes[0]
        np.testing.assert_array_equal(decoded.rgb, FLAT)
    buffer = io.BytesIO()
    cmyk = Image.fromarray(FLAT).convert("CMYK")
    cmyk.save(buffer, "TIFF", icc_profile=good)
    notes = ("colour profile ignored: it is for RGB, the image is CMYK", "CMYK converted without its colour profile")
    check(buffer.getvalue(), np.asarray(cmyk.convert("RGB")), notes)
