"""A made-up report with everything that one can hold, and changes to it."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from multisa.benchmarks.compare import WORSE, Comparison, compare_benches

Bench = dict[str, Any]
OURS, INT8, OPENVINO, EAGER = 0, 1, 2, 3  # rows of segment


def _segment(backend: str, precision: str, p50: float, speed: float, miou: float, **more: Any) -> dict[str, Any]:
    """One row; 100 ms and 12 images a second are those of the baseline."""
    loop = speed if backend.startswith("pytorch") else 0.6 * speed
    return {
        "backend": backend,
        "precision": precision,
        "device": "cpu",
        "default": False,
        "problem": None,
        "images_per_second": speed,
        "end_to_end": {
            "by": "loop" if backend.startswith("pytorch") else "multisa segment",
            "images": 128,
            "images_per_second": [0.98 * speed, speed, 1.01 * speed],
            "times_baseline": speed / 12,
        },
        "loop": {"images_per_second": [0.99 * loop, loop, 1.01 * loop], "times_baseline": loop / 12},
        "latency_ms": {
            "p50": p50,
            "p90": 1.2 * p50,
            "p99": 1.5 * p50,
            "min": 0.9 * p50,
            "max": 1.8 * p50,
            "mean": 1.05 * p50,
            "count": 90,
            "repeats": [0.99 * p50, p50, 1.02 * p50],
        },
        "times_baseline": 100 / p50,
        "batches": [
            {"batch": batch, "images_per_second": 1000 / p50 * rate}
            for batch, rate in ((1, 1.0), (2, 1.06), (4, 1.1), (8, 1.08))
        ],
        "sizes": [
            {"long_side": side, "pixels": side * side * 3 // 4, "latency_ms": p50 * (side / 500) ** 1.9}
            for side in (128, 256, 512, 1024)
        ],
        "cores": [{"cores": 1, "images_per_second": 0.55 * speed}, {"cores": 2, "images_per_second": speed}],
        "peak_mib": {"host": 300.0, "device": None},
        "model_bytes": 17_000_000,
        "startup_seconds": 0.4,
        "miou": miou,
        "label_agreement": 0.9998,
        "limit": {"roofline_ms": 12.0, "share": 12 / p50, "text": "multiply-adds over the peak of all cores"},
        **more,
    }


def _recipe(recipe: str, backend: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "backend": backend,
        "precision": "fp32",
        "recipe": recipe,
        "problem": None,
        "images_per_second": 1 / seconds,
        "end_to_end": {
            "by": "loop" if recipe.startswith("PyTorch") else recipe,
            "images": 32,
            "rounds": 3,
            "images_per_second": [0.6 / seconds, 1 / seconds, 1.9 / seconds],  # of different images each
        },
        "stages_ms": {
            "decode": 2.0,
            "cam": 400 * seconds,
            "affinity": 200 * seconds,
            "walk": 300 * seconds,
            "crf": 90 * seconds,
            "encode": 1.0,
        },
        "images": 32,
        "mean_pixels": 180_000.0,
        "peak_mib": {"host": 700.0},
        "startup_seconds": 0.9,
        "miou": 66.2,
        "label_agreement": 1.0,
        **more,
    }


def _kernel(kernel: str, way: str, size: str, median: float, **more: Any) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "way": way,
        "size": size,
        "median_ms": median,
        "min_ms": 0.97 * median,
        "max_ms": 1.2 * median,
        "repeats": 7,
        "threads": 1,
        **more,
    }


def made_up_report() -> dict[str, Any]:
    """A whole report."""

    def against(baseline: float, default: float) -> dict[str, float]:
        return {"times_baseline": baseline, "default_times_as_fast": default}

    walk, crf = "64x64x4", "500x375, 3 labels"
    return {
        "schema_version": 2,
        "environment": {
            "processor": "Made-up Processor 9000",
            "cores": 2,
            "memory_gib": 16.0,
            "instruction_set": "avx512",
            "gpus": [],
            "system": "Linux",
            "python": "3.11.0",
            "versions": {"multisa": "0.1.0", "numpy": "2.0", "torch": "2.9.0+cpu", "scipy": "1.17"},
            "load_at_start": 0.2,
            "quick": False,
            "seconds": 543.2,
            "commit": "ef" * 20,
            "started": "2026-01-01T00:00:00Z",
            "bundle": {"name": "made-up", "sha256": "ab" * 32},
            "data": {"name": "made-up", "images": {"train": 40, "val": 20}, "digest": "cd" * 32},
            "peaks": {"multiply_adds_per_second": 1.1e11, "copied_bytes_per_second": 9e9},
        },
        "segment": [
            _segment("onnxruntime-cpu", "fp32", 40.0, 31.2, 61.23, default=True),
            _segment("onnxruntime-cpu", "int8", 29.0, 38.5, 60.88, notes=["batches: not enough memory"]),
            _segment("openvino", "fp32", 41.5, 30.9, 61.23),
            _segment("pytorch-eager", "fp32", 100.0, 12.0, 61.22, baseline=True),
            _segment("pytorch-channels-last-autocast", "bf16", 80.0, 15.0, 61.1),
            {
                "backend": "pytorch-compile",
                "precision": "fp32",
                "device": "cpu",
                "problem": "no C++ compiler: apt install g++",
            },
            {"backend": "tensorrt", "precision": "fp16", "device": "cuda", "problem": "no GPU is here"},
        ],
        "label": [
            _recipe("multisa label --method segmenter", "onnxruntime-cpu", 0.18, default=True, **against(6.6, 1.0)),
            _recipe("PyTorch eager, sparse walk, pydensecrf", "pytorch-eager", 1.2, baseline=True, **against(1.0, 6.6)),
            _recipe(
                "PyTorch eager, dense walk, pydensecrf",
                "pytorch-eager",
                21.0,
                default_times_as_fast=117.0,
                mean_pixels=4096,
                images=1,
                end_to_end={"by": "loop", "images": 1, "images_per_second": [0.9 / 21, 1 / 21, 1.1 / 21]},
            ),
        ],
        "kernels": [
            _kernel(
                "random walk",
                "multisa",
                walk,
                2.0,
                times_ours=1.0,
                max_error=1e-5,
                limit={"roofline_ms": 0.8, "share": 0.4, "text": "multiply-adds over one core's peak"},
            ),
            _kernel("random walk", "dense squaring", walk, 52_000.0, threads="all", times_ours=26_000.0),
            _kernel("random walk", "scipy, Chebyshev", walk, 59.0, times_ours=29.5),
            _kernel(
                "dense CRF",
                "multisa",
                crf,
                48.0,
                times_ours=1.0,
                limit={"roofline_ms": 10.0, "share": 10 / 48, "text": "bytes over the rate of a copy"},
            ),
            _kernel("dense CRF", "pydensecrf", crf, 284.0, times_ours=5.9),
        ],
    }


def compared(old: Bench, change: Callable[[Bench], object], **more: Any) -> Comparison:
    new = deepcopy(old)
    change(new)
    return compare_benches(new, old, **more)


def found(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(stage, figure, reason) of what is worse."""
    return [(change.row.partition(":")[0], change.figure, change.reason) for change in comparison.only(WORSE)]


def slow(bench: Bench, factor: float, *rows: int) -> None:
    """Rows of segment take `factor` times as long, in all their times."""
    for index in rows:
        row = bench["segment"][index]
        latency, whole = row["latency_ms"], row["end_to_end"]
        latency["p50"] *= factor
        latency["p90"] *= factor
        latency["repeats"] = [one * factor for one in latency["repeats"]]
        row["images_per_second"] /= factor
        whole["images_per_second"] = [one / factor for one in whole["images_per_second"]]
        row["loop"]["images_per_second"] = [one / factor for one in row["loop"]["images_per_second"]]
        for point in (*row["batches"], *row["cores"]):
            point["images_per_second"] /= factor
        for point in row["sizes"]:
            point["latency_ms"] *= factor


def setter(*path: str | int, to: object) -> Callable[[Bench], None]:
    def change(bench: Bench) -> None:
        inside: Any = bench
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = to

    return change


def rounds(*rates: float) -> Callable[[Bench], None]:
    """The default labels so many images per second in its rounds."""

    def change(bench: Bench) -> None:
        row = bench["label"][0]
        row["end_to_end"]["images_per_second"] = list(rates)
        row["images_per_second"] = sorted(rates)[len(rates) // 2]

    return change
