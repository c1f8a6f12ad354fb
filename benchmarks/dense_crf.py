"""The dense CRF: ours against pydensecrf on one thread, with the agreement beside the times.

    python benchmarks/dense_crf.py              # two minutes

Writes benchmarks/results/dense_crf.json.
"""

import argparse
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from multisa.benchmarks.harness import environment, interleave, peaks, results_folder, save_results
from multisa.benchmarks.scenes import class_probabilities, photograph_bytes
from multisa.kernels import CrfParameters, DenseCRF, dense_crf
from multisa.kernels.cpu import forget_lattices

PSA = CrfParameters()
SETTINGS = {
    "psa": PSA,
    "irn": replace(PSA, bilateral_sxy=50.0, bilateral_srgb=5.0),
    "deeplab": replace(PSA, spatial_sxy=1.0, bilateral_sxy=67.0, bilateral_srgb=3.0, bilateral_compat=4.0),
}
HEIGHT, WIDTH = 375, 500


def compare(name: str, labels: int, present: int | None, repeats: int) -> dict[str, Any]:
    """Both on one photograph: whole calls, from the image to the refined probabilities."""
    image, parameters = photograph_bytes(HEIGHT, WIDTH), SETTINGS[name]
    probabilities = class_probabilities(labels, HEIGHT, WIDTH, present)
    crf = DenseCRF(image, parameters)

    def alone() -> object:
        # Without the spatial lattice of an earlier call on this size: pydensecrf makes its own each time.
        forget_lattices()
        return dense_crf(image, probabilities, parameters)

    times = interleave(
        {
            "multisa": alone,
            "multisa, next photograph of this size": lambda: dense_crf(image, probabilities, parameters),
            "multisa, second call on the image": lambda: crf.infer(probabilities),
            "pydensecrf": lambda: dense_crf(image, probabilities, parameters, backend="pydensecrf"),
        },
        repeats=repeats,
    )
    ours = dense_crf(image, probabilities, parameters)
    theirs = dense_crf(image, probabilities, parameters, backend="pydensecrf")
    return {
        "parameters": name,
        "labels": labels,
        "present": present or labels,
        "ways": {key: value.to_json() for key, value in times.items()},
        "speedup": round(times["pydensecrf"].median / times["multisa"].median, 2),
        "argmax_agreement": float((ours.argmax(axis=0) == theirs.argmax(axis=0)).mean()),
        "max_difference": float(np.abs(ours - theirs).max()),
    }


def scaling(repeats: int) -> list[dict[str, float]]:
    """Time for one pixel over sizes and labels."""
    rows = []
    for size, labels in ((32, 3), (64, 3), (128, 3), (256, 3), (512, 3), (256, 8), (256, 16), (256, 24)):
        image, probabilities = photograph_bytes(size, size), class_probabilities(labels, size, size)
        times = interleave({"ours": partial(dense_crf, image, probabilities)}, repeats=repeats)
        seconds = times["ours"].median
        rows.append(
            {
                "size": size,
                "labels": labels,
                "median_ms": round(1000 * seconds, 2),
                "ns_per_pixel": round(1e9 * seconds / (size * size), 1),
            }
        )
    return rows


def comparisons(*, quick: bool, machine: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Ours and pydensecrf over labels and parameters, and how far ours is from the floor."""
    machine = machine or peaks()
    cases = [("psa", 3, None), ("psa", 21, None), ("psa", 21, 3), ("irn", 3, None), ("deeplab", 3, None)]
    rows = [compare(name, labels, present, _repeats(quick)) for name, labels, present in cases]
    return [{**row, "floor": floor(row, machine)} for row in rows]


def _repeats(quick: bool) -> int:
    return 3 if quick else 9


def floor(row: dict[str, Any], machine: dict[str, float]) -> dict[str, float]:
    """What the bytes alone would take: each point's record and energies, read once in each iteration."""
    padded = next(length for length in (4, 8, 16, 24, 32) if row["present"] <= length)
    read = PSA.iterations * HEIGHT * WIDTH * (48 + 4 * padded)
    seconds = read / machine["copied_bytes_per_second"]
    return {
        "bytes": read,
        "floor_ms": round(1000 * seconds, 2),
        "share_of_floor": round(1000 * seconds / row["ways"]["multisa"]["median_ms"], 3),
    }


def main() -> None:
    """Measure, print, write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    results_folder(parser)
    options = parser.parse_args()
    quick, described = options.quick, environment("pydensecrf2", quick=options.quick)
    machine = peaks()
    results = {
        "environment": described,
        "peaks": machine,
        "image": [HEIGHT, WIDTH],
        "settings": {name: asdict(parameters) for name, parameters in SETTINGS.items()},
        "comparisons": comparisons(quick=quick, machine=machine),
        "scaling": scaling(_repeats(quick)),
    }
    save_results("dense_crf", results, options.results)


if __name__ == "__main__":
    main()
