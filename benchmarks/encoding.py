"""Codecs: masks to palette PNG and COCO's run lengths, JPEGs to pixels; against Pillow and pycocotools.

    python benchmarks/encoding.py --data ../shared/data/voc-animals      # two minutes

Masks are those people drew (enlarged by nearest neighbour for the larger sizes) and those of the package's
segmenter; photographs are enlarged bicubically and saved at quality 90. All ways are checked to give the same
ids, runs and pixels. Writes benchmarks/results/encoding.json.
"""

import argparse
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
    results_folder,
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
PALETTE = voc_palette()
SIZES = {"own size, about 500x375": None, "1024x1024": (1024, 1024), "4000x3000": (3000, 4000)}
JPEG_SIZES = {"own size, about 500x375": None, "1365x1024": (1024, 1365), "4000x3000": (3000, 4000)}
QUALITY = 90


def pillow_png(mask: UInt8, level: int) -> bytes:
    """What Pillow writes at a zlib level; 6 is its default."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.tobytes())
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


def compare(ways: dict[str, Callable[[], object]], count: int, repeats: int) -> dict[str, Any]:
    """Times of each way for one item, and how many times ours; the first way is ours."""
    times = interleave(ways, repeats=repeats)
    ours = next(iter(times.values())).median
    return {
        name: {
            "ms_each": round(1000 * one.median / count, 3),
            "repeats": repeats,
            "times_ours": round(one.median / ours, 2),
        }
        for name, one in times.items()
    }


def compare_masks(masks: list[UInt8], repeats: int) -> dict[str, Any]:
    """PNG and run lengths of some masks."""
    files = {
        "ours": [encode_palette_png(mask, PALETTE) for mask in masks],
        "Pillow": [pillow_png(mask, 6) for mask in masks],
        "Pillow, level 1": [pillow_png(mask, 1) for mask in masks],
    }
    for mask, data in zip(masks, files["ours"], strict=True):
        np.testing.assert_array_equal(decode_mask(data), mask)
        assert [runs.compressed for runs in encode_rle(mask)] == coco_rle(mask)
    png = compare(
        {
            "ours": lambda: [encode_palette_png(mask, PALETTE) for mask in masks],
            "Pillow": lambda: [pillow_png(mask, 6) for mask in masks],
            "Pillow, level 1": lambda: [pillow_png(mask, 1) for mask in masks],
        },
        len(masks),
        repeats,
    )
    for name, written in files.items():
        png[name]["bytes_each"] = round(sum(map(len, written)) / len(written))
    mean_bytes = sum(mask.size for mask in masks) / len(masks)
    rle = compare(
        {
            "ours": lambda: [encode_rle(mask) for mask in masks],
            "pycocotools": lambda: [coco_rle(mask) for mask in masks],
        },
        len(masks),
        repeats,
    )
    return {
        "masks": len(masks),
        "classes_each": round(float(np.mean([len(np.unique(mask)) for mask in masks])), 1),
        "png": png,
        "rle": rle,
        "limit": {
            "png": floor(mean_bytes + png["ours"]["bytes_each"], mean_bytes, png["ours"]["ms_each"]),
            "rle": floor(mean_bytes, mean_bytes, rle["ours"]["ms_each"]),
        },
    }


def floor(moved: float, held: float, ms: float) -> dict[str, float]:
    """What reading each pixel and writing each byte once would take, and its share of what is taken."""
    floor_ms = 1000 * moved / copied_bytes_per_second(int(held))
    return {"floor_ms": round(floor_ms, 4), "share": round(floor_ms / ms, 3)}


def compare_jpegs(files: list[bytes], long_side: int, repeats: int) -> dict[str, Any]:
    """Decoding of some JPEGs: whole, and for networks that see `long_side`, the resizing with it."""

    def working(data: bytes, *, scaled: bool) -> UInt8:
        photograph = decode_image(data, long_side=long_side if scaled else None)
        return resize_image(photograph.rgb, working_size(*photograph.size, long_side))

    for data in files:
        np.testing.assert_array_equal(decode_image(data).rgb, pillow_rgb(data))
    differences = [np.abs(working(d, scaled=True).astype(int) - working(d, scaled=False)) for d in files]
    decoding = compare(
        {"ours": lambda: [decode_image(d) for d in files], "Pillow": lambda: [pillow_rgb(d) for d in files]},
        len(files),
        repeats,
    )
    to_networks = compare(
        {
            "ours, scaled": lambda: [working(d, scaled=True) for d in files],
            "ours, whole": lambda: [working(d, scaled=False) for d in files],
            "Pillow": lambda: [
                resize_image(rgb, working_size(rgb.shape[0], rgb.shape[1], long_side))
                for rgb in map(pillow_rgb, files)
            ],
        },
        len(files),
        repeats,
    )
    return {
        "photographs": len(files),
        "decoding": decoding,
        "decoding_and_resizing": to_networks,
        "scaled_mean_difference": round(float(np.mean([d.mean() for d in differences])), 3),
        "scaled_largest_difference": int(max(d.max() for d in differences)),
    }


def segment(photographs: list[Path], long_side: int) -> tuple[list[UInt8], dict[str, Any]]:
    """The segmenter's masks at the photographs' own size, and how labels change with scaled decoding."""
    bundle = load_bundle(default_bundle_path())
    masks, alike = [], []
    with selected_backends(bundle, (SEGMENTER,), None) as chosen:
        run = chosen[0].backend.run
        for path in photographs:
            rgb = read_image(path).rgb
            size = working_size(rgb.shape[0], rgb.shape[1], long_side)
            labels = run(resize_image(rgb, size)[np.newaxis])["labels"][0]
            masks.append(resize_mask(labels, (rgb.shape[0], rgb.shape[1])))
            data = enlarged(rgb, (8 * rgb.shape[0], 8 * rgb.shape[1]))
            whole, scaled = (
                run(resize_image(decode_image(data, long_side=side).rgb, size)[np.newaxis])["labels"][0]
                for side in (None, long_side)
            )
            alike.append(float((whole == scaled).mean()))
    return masks, {
        "photographs": len(alike),
        "enlarged": 8,
        "mean": round(float(np.mean(alike)), 5),
        "least": round(min(alike), 5),
    }


def enlarged(rgb: UInt8, size: tuple[int, int]) -> bytes:
    """A JPEG of the photograph at another size."""
    buffer = io.BytesIO()
    image = Image.fromarray(rgb).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def main() -> None:
    """Measure, print, write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with JPEGImages, SegmentationClass")
    parser.add_argument("--quick", action="store_true", help="fewer masks and photographs, fewer repeats")
    results_folder(parser)
    options = parser.parse_args()
    described = environment("pillow", "simplejpeg", "pycocotools", quick=options.quick)
    few = 3 if options.quick else 1
    drawn = sorted((options.data / "SegmentationClass").glob("*.png"))[:: 60 * few]
    photographs = sorted((options.data / "JPEGImages").glob("*.jpg"))[:: 100 * few]
    long_side = load_bundle(default_bundle_path()).manifest.parameters.long_side
    masks = {}
    for name, size in SIZES.items():
        chosen = [
            decode_mask(path.read_bytes()) for path in (drawn if size != SIZES["4000x3000"] else drawn[:3])
        ]
        sized = chosen if size is None else [resize_mask(mask, size) for mask in chosen]
        masks[f"drawn, {name}"] = compare_masks(sized, (15 if size is None else 7) // few)
    segmented, agreement = segment(photographs, long_side)
    masks["segmenter, own size"] = compare_masks(segmented, 15 // few)
    jpegs = {}
    for name, size in JPEG_SIZES.items():
        some = photographs if size != JPEG_SIZES["4000x3000"] else photographs[:3]
        files = [path.read_bytes() if size is None else enlarged(read_image(path).rgb, size) for path in some]
        jpegs[name] = compare_jpegs(files, long_side, (15 if size is None else 7) // few)
    results = {
        "environment": described,
        "parameters": {
            "threads": 1,
            "encoder": png_encoder(),
            "long_side": long_side,
            "quality": QUALITY,
        },
        "masks": masks,
        "jpegs": jpegs,
        "labels_alike_with_scaled_decoding": agreement,
    }
    save_results("encoding", results, options.results)


if __name__ == "__main__":
    main()
