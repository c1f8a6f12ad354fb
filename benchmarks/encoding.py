"""Codecs: masks to palette PNG and COCO run lengths, JPEGs to pixels; against Pillow and pycocotools.

    python benchmarks/encoding.py --data ../shared/data/voc-animals      # two minutes

Masks are drawn by people (enlarged by nearest neighbour for the larger sizes) or made by the packaged
segmenter; images are enlarged bicubically and saved at quality 90. All ways are checked to give the same ids,
runs and pixels. Writes benchmarks/results/encoding.json.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco

from multisa.benchmarks.harness import (
    copied_bytes_per_second,
    environment,
    interleave,
    make_parser,
    save_results,
)
from multisa.kernels import encode_rle
from multisa.runtime.backends.base import SEGMENTER
from multisa.runtime.backends.registry import selected_backends
from multisa.runtime.bundle import default_bundle_path, load_bundle
from multisa.runtime.imaging.decode import (
    decode_image,
    decode_mask,
    read_image,
    resize_image,
    resize_mask,
    working_size,
)
from multisa.runtime.imaging.png import encode_palette_png, png_encoder, voc_palette

UInt8 = npt.NDArray[np.uint8]
OWN_SIZE = "own size, about 500x375"
LARGE = "4000x3000"
SIZES = {OWN_SIZE: None, "1024x1024": (1024, 1024), LARGE: (3000, 4000)}
JPEG_SIZES = {OWN_SIZE: None, "1365x1024": (1024, 1365), LARGE: (3000, 4000)}
QUALITY = 90
ENLARGED = 8  # times the own size, to see what decoding at a reduced scale changes
DRAWN_STEP = 60  # every 60th drawn mask, every 100th image
IMAGE_STEP = 100
REPEATS = 15
REPEATS_ENLARGED = 7


def pillow_png(mask: UInt8, level: int) -> bytes:
    """What Pillow writes at a zlib level; 6 is its default."""
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def pillow_rgb(data: bytes) -> UInt8:
    """What Pillow decodes."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def coco_rle(mask: UInt8) -> list[bytes]:
    """COCO's strings by pycocotools, class by class."""
    return [
        coco.encode(np.asfortranarray((mask == value).astype(np.uint8)))["counts"]
        for value in np.unique(mask)
    ]


def compare(
    ways: dict[str, Callable[[Any], object]], inputs: list[Any], repeats: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds per input of each way, and its ratio to ours, which is the first."""
    cases = {name: (lambda way=way: [way(each) for each in inputs]) for name, way in ways.items()}
    times = interleave(cases, repeats=repeats)
    ours = next(iter(times.values())).median
    return {
        name: {
            "ms_each": round(1000 * taken.median / len(inputs), 3),
            "repeats": repeats,
            "times_ours": round(taken.median / ours, 2),
        }
        for name, taken in times.items()
    }


def compare_masks(masks: list[UInt8], repeats: int) -> dict[str, Any]:
    """PNG and run lengths of some masks."""
    palette = voc_palette()
    encoders: dict[str, Callable[[UInt8], bytes]] = {
        "ours": lambda mask: encode_palette_png(mask, palette),
        "Pillow": lambda mask: pillow_png(mask, 6),
        "Pillow, level 1": lambda mask: pillow_png(mask, 1),
    }
    for mask in masks:
        np.testing.assert_array_equal(decode_mask(encoders["ours"](mask)), mask)
        assert [runs.compressed for runs in encode_rle(mask)] == coco_rle(mask)
    png = compare(dict(encoders), masks, repeats)
    for name, encode in encoders.items():
        png[name]["bytes_each"] = round(sum(len(encode(mask)) for mask in masks) / len(masks))
    rle = compare({"ours": encode_rle, "pycocotools": coco_rle}, masks, repeats)
    mean_bytes = sum(mask.size for mask in masks) / len(masks)
    return {
        "masks": len(masks),
        "classes_each": round(float(np.mean([len(np.unique(mask)) for mask in masks])), 1),
        "png": png,
        "rle": rle,
        "limit": {
            "png": roofline(mean_bytes + png["ours"]["bytes_each"], mean_bytes, png["ours"]["ms_each"]),
            "rle": roofline(mean_bytes, mean_bytes, rle["ours"]["ms_each"]),
        },
    }


def roofline(moved: float, held: float, milliseconds: float) -> dict[str, float]:
    """Time to read each pixel and write each byte once, and its share of the time taken."""
    roofline_ms = 1000 * moved / copied_bytes_per_second(int(held))
    return {"roofline_ms": round(roofline_ms, 4), "share": round(roofline_ms / milliseconds, 3)}


def compare_jpegs(files: list[bytes], long_side: int, repeats: int) -> dict[str, Any]:
    """Decoding of some JPEGs: at full size, and to `long_side` including the resizing."""

    def working(data: bytes, *, scaled: bool) -> UInt8:
        image = decode_image(data, long_side=long_side if scaled else None)
        return resize_image(image.rgb, working_size(*image.size, long_side))

    def pillow_working(data: bytes) -> UInt8:
        rgb = pillow_rgb(data)
        return resize_image(rgb, working_size(rgb.shape[0], rgb.shape[1], long_side))

    for data in files:
        np.testing.assert_array_equal(decode_image(data).rgb, pillow_rgb(data))
    differences = [np.abs(working(d, scaled=True).astype(int) - working(d, scaled=False)) for d in files]
    return {
        "images": len(files),
        "decoding": compare({"ours": decode_image, "Pillow": pillow_rgb}, files, repeats),
        "decoding_and_resizing": compare(
            {
                "ours, scaled": lambda data: working(data, scaled=True),
                "ours, whole": lambda data: working(data, scaled=False),
                "Pillow": pillow_working,
            },
            files,
            repeats,
        ),
        "scaled_mean_difference": round(float(np.mean([d.mean() for d in differences])), 3),
        "scaled_largest_difference": int(max(d.max() for d in differences)),
    }


def segment(images: list[Path], long_side: int) -> tuple[list[UInt8], dict[str, Any]]:
    """The segmenter's masks at the images' own size, and how scaled decoding changes labels."""
    bundle = load_bundle(default_bundle_path())
    masks, agreements = [], []
    with selected_backends(bundle, (SEGMENTER,), None) as chosen:
        run = chosen[0].backend.run
        for path in images:
            rgb = read_image(path).rgb
            size = working_size(rgb.shape[0], rgb.shape[1], long_side)
            labels = run(resize_image(rgb, size)[np.newaxis])["labels"][0]
            masks.append(resize_mask(labels, (rgb.shape[0], rgb.shape[1])))
            data = enlarged(rgb, (ENLARGED * rgb.shape[0], ENLARGED * rgb.shape[1]))
            whole, scaled = (
                run(resize_image(decode_image(data, long_side=side).rgb, size)[np.newaxis])["labels"][0]
                for side in (None, long_side)
            )
            agreements.append(float((whole == scaled).mean()))
    return masks, {
        "images": len(agreements),
        "enlarged": ENLARGED,
        "mean": round(float(np.mean(agreements)), 5),
        "least": round(min(agreements), 5),
    }


def enlarged(rgb: UInt8, size: tuple[int, int]) -> bytes:
    """A JPEG of the image at another size."""
    buffer = io.BytesIO()
    image = Image.fromarray(rgb).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def main() -> None:
    """Measure, print, write the results file."""
    parser = make_parser(__doc__, quick="fewer masks, images and repeats")
    parser.add_argument("--data", type=Path, required=True, help="folder with JPEGImages, SegmentationClass")
    options = parser.parse_args()
    described = environment("pillow", "simplejpeg", "pycocotools", quick=options.quick)
    fewer = 3 if options.quick else 1
    drawn = sorted((options.data / "SegmentationClass").glob("*.png"))[:: DRAWN_STEP * fewer]
    images = sorted((options.data / "JPEGImages").glob("*.jpg"))[:: IMAGE_STEP * fewer]
    long_side = load_bundle(default_bundle_path()).manifest.parameters.long_side
    masks = {}
    for name, size in SIZES.items():
        chosen = [decode_mask(path.read_bytes()) for path in (drawn[:3] if name == LARGE else drawn)]
        sized = chosen if size is None else [resize_mask(mask, size) for mask in chosen]
        masks[f"drawn, {name}"] = compare_masks(sized, (REPEATS_ENLARGED if size else REPEATS) // fewer)
    segmented, agreement = segment(images, long_side)
    masks["segmenter, own size"] = compare_masks(segmented, REPEATS // fewer)
    jpegs = {}
    for name, size in JPEG_SIZES.items():
        some = images[:3] if name == LARGE else images
        files = [path.read_bytes() if size is None else enlarged(read_image(path).rgb, size) for path in some]
        jpegs[name] = compare_jpegs(files, long_side, (REPEATS_ENLARGED if size else REPEATS) // fewer)
    results = {
        "environment": described,
        "parameters": {"threads": 1, "encoder": png_encoder(), "long_side": long_side, "quality": QUALITY},
        "masks": masks,
        "jpegs": jpegs,
        "labels_alike_with_scaled_decoding": agreement,
    }
    save_results("encoding", results, options.results)


if __name__ == "__main__":
    main()
