"""The dense CRF: ours against pydensecrf on one thread, with the agreement of their labels.

    python benchmarks/dense_crf.py              # two minutes

Writes benchmarks/results/dense_crf.json.
"""

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from multisa.benchmarks.harness import environment, interleave, make_parser, peaks, save_results
from multisa.benchmarks.synthetic_images import class_probabilities, image_bytes
from multisa.kernels import CrfParameters, DenseCRF, dense_crf
from multisa.kernels.cpu import forget_lattices

PSA = CrfParameters()
SETTINGS = {
    "psa": PSA,
    "irn": replace(PSA, bilateral_sxy=50.0, bilateral_srgb=5.0),
    "deeplab": replace(PSA, spatial_sxy=1.0, bilateral_sxy=67.0, bilateral_srgb=3.0, bilateral_compat=4.0),
}
HEIGHT = 375
WIDTH = 500


def compare(name: str, labels: int, present: int | None, repeats: int) -> dict[str, Any]:
    """Both on one image: whole calls, from the image to the refined probabilities."""
    image = image_bytes(HEIGHT, WIDTH)
    probabilities = class_probabilities(labels, HEIGHT, WIDTH, present)
    parameters = SETTINGS[name]
    crf = DenseCRF(image, parameters)

    def first_call() -> object:
        # Without the cached spatial lattice of this size: pydensecrf builds its own in each call.
        forget_lattices()
        return dense_crf(image, probabilities, parameters)

    times = interleave(
        {
            "multisa": first_call,
            "multisa, next image of this size": lambda: dense_crf(image, probabilities, parameters),
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


def comparisons(*, quick: bool, machine: dict[str, float]) -> list[dict[str, Any]]:
    """Ours and pydensecrf over labels and parameters, and our distance from the roofline."""
    cases = [("psa", 3, None), ("psa", 21, None), ("psa", 21, 3), ("irn", 3, None), ("deeplab", 3, None)]
    rows = [compare(name, labels, present, 3 if quick else 9) for name, labels, present in cases]
    return [{**row, "roofline": roofline(row, machine)} for row in rows]


def roofline(row: dict[str, Any], machine: dict[str, float]) -> dict[str, float]:
    """Time of the bytes alone: each point's record and energies, read once per iteration."""
    padded = next(length for length in (4, 8, 16, 24, 32) if row["present"] <= length)
    read = PSA.iterations * HEIGHT * WIDTH * (48 + 4 * padded)
    milliseconds = 1000 * read / machine["copied_bytes_per_second"]
    share = round(milliseconds / row["ways"]["multisa"]["median_ms"], 3)
    return {"bytes": read, "roofline_ms": round(milliseconds, 2), "share_of_roofline": share}


def main() -> None:
    """Measure, print, write the results file."""
    options = make_parser(__doc__, quick="fewer repeats").parse_args()
    described = environment("pydensecrf2", quick=options.quick)
    machine = peaks()
    results = {
        "environment": described,
        "peaks": machine,
        "image": [HEIGHT, WIDTH],
        "settings": {name: asdict(parameters) for name, parameters in SETTINGS.items()},
        "comparisons": comparisons(quick=options.quick, machine=machine),
    }
    save_results("dense_crf", results, options.results)


if __name__ == "__main__":
    main()
