"""The README's passages about the kernels and the codecs."""

from typing import Any

from multisa.benchmarks.readme_sources import Files, source


def walk(files: Files) -> list[str]:
    """The random walk, as pieces of a paragraph."""
    results = files["random_walk"]
    grid, machine = results["comparisons"][0], results["environment"]
    ways, binding = grid["ways"], grid["floor"]["binding"]
    ours, scipy = ways["multisa"], ways["scipy, Chebyshev"]
    pieces = [
        f"Kernels, one thread of an {machine['processor']} with {machine['instruction_set'].upper()},",
        f"medians in turn. A random walk of 256 steps over {grid['size']} x {grid['size']} pixels and",
        f"{grid['channels']} channels takes {ours['median_ms']:.1f} ms;",
    ]
    if "dense squaring" in ways:  # a quick run leaves it out
        dense, flushed = ways["dense squaring"], ways["dense squaring, denormals flushed"]
        pieces += [
            "the literature's squaring of the dense matrix, on all cores,",
            f"{dense['median_ms'] / 1000:.0f} s ({dense['times_ours']:,.0f} times as long;",
            f"{flushed['times_ours']:,.0f} times with denormal numbers flushed);",
        ]
    return [
        *pieces,
        f"the same series on SciPy {scipy['median_ms']:.0f} ms. The largest error against float64 is",
        f"{ours['max_error']:.0e}. The floor, {binding['text']}, is {binding['floor_ms']:.1f} ms:",
        f"{binding['share']:.0%} of what is taken.",
        source(files, "random_walk"),
    ]


def crf(files: Files) -> list[str]:
    """The dense CRF, as pieces of a paragraph."""
    results = files["dense_crf"]
    rows = results["comparisons"]
    named = ", ".join(
        f"{row['speedup']:.1f} times ({row['labels']} labels"
        + (f", {row['present']} of them present)" if row["present"] != row["labels"] else ")")
        for row in rows
        if row["parameters"] == "psa"
    )
    first = rows[0]["ways"]
    agreement = min(row["argmax_agreement"] for row in rows)
    ours, theirs = (first[name]["median_ms"] for name in ("multisa", "pydensecrf"))
    return [
        f"A dense CRF of {results['image'][1]} x {results['image'][0]} pixels and 3 labels takes",
        f"{ours:.0f} ms, pydensecrf {theirs:.0f} ms. Ours is {named} as fast,",
        f"with the same label at {agreement:.4%} of the pixels.",
        source(files, "dense_crf"),
    ]


def codecs(files: Files) -> list[str]:
    """PNG, run lengths and JPEG, as pieces of a paragraph."""
    results: dict[str, Any] = files["encoding"]
    own, large = results["masks"]["segmenter, own size"], results["masks"]["drawn, 1024x1024"]
    png, runs, photograph = large["png"], large["rle"], results["jpegs"]["4000x3000"]
    decoding, ready = photograph["decoding"], photograph["decoding_and_resizing"]
    alike = results["labels_alike_with_scaled_decoding"]
    smaller, larger = (
        one["png"]["ours"]["bytes_each"] / one["png"]["Pillow"]["bytes_each"] for one in (large, own)
    )
    return [
        "Codecs, one thread: a mask of 1024x1024 pixels is a palette PNG after",
        f"{png['ours']['ms_each']:.2f} ms,",
        f"{png['Pillow']['times_ours']:.1f} times as fast as Pillow's default and with",
        f"{smaller:.2f} of its bytes",
        f"({own['png']['Pillow']['times_ours']:.1f} times and",
        f"{larger:.2f} for masks of the segmenter",
        "at the photographs' own size), and COCO's run lengths of all classes after",
        f"{runs['ours']['ms_each']:.2f} ms, {runs['pycocotools']['times_ours']:.1f} times as fast as",
        f"pycocotools for {large['classes_each']} classes. A JPEG of 12 megapixels is decoded",
        f"{decoding['Pillow']['times_ours']:.1f} times as fast as by Pillow to the same pixels, and at the",
        f"size that the networks see {ready['Pillow']['times_ours']:.1f} times as fast, where it is decoded",
        f"smaller: {alike['mean']:.2%} of the labels stay alike ({alike['photographs']} photographs,",
        f"enlarged {alike['enlarged']} times).",
        source(files, "encoding"),
    ]
