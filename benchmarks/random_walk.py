"""The random walk: ours against the peers' dense squaring and against SciPy, with errors beside the times.

    python benchmarks/random_walk.py            # five minutes; --quick leaves out the dense squaring

Dense squaring is what psa, irn and PuzzleCAM do: the transition matrix of the whole grid, squared eight
times. SciPy does the same walk as ours on a sparse matrix. Writes benchmarks/results/random_walk.json.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from multisa.benchmarks.harness import (
    Times,
    copied_bytes_per_second,
    environment,
    interleave,
    peaks,
    results_folder,
    save_results,
)
from multisa.benchmarks.scenes import photograph, smooth_scores
from multisa.kernels import affinity_from_features, random_walk, random_walk_reference, stencil_offsets
from multisa.kernels.common.stencil import pair_slices
from multisa.kernels.common.walk import chebyshev_coefficients, chebyshev_degree

Float32 = npt.NDArray[np.float32]
STEPS, BETA, RADIUS = 256, 8.0, 5


def transition(affinity: Float32, beta: float = BETA, radius: int = RADIUS) -> Any:
    """The row-stochastic D^-1 A^beta of one image as a sparse matrix (SciPy's csr_array) [h w, h w]."""
    height, width = affinity.shape[-2:]
    index = np.arange(height * width).reshape(height, width)
    rows, columns, values = [index.ravel()], [index.ravel()], [np.ones(index.size)]
    for plane, offset in zip(affinity, stencil_offsets(radius), strict=True):
        source, target = pair_slices(offset, (height, width))
        edges = plane[source].astype(np.float64).ravel() ** beta
        rows += [index[source].ravel(), index[target].ravel()]
        columns += [index[target].ravel(), index[source].ravel()]
        values += [edges, edges]
    shape = (index.size, index.size)
    pairs = (np.concatenate(rows), np.concatenate(columns))
    matrix = csr_array((np.concatenate(values), pairs), shape=shape)
    return (matrix / matrix.sum(axis=1)[:, None]).tocsr().astype(np.float32)


def sparse_chebyshev(affinity: Float32, scores: Float32) -> Float32:
    """Our algorithm on SciPy's sparse products."""
    matrix = transition(affinity)
    coefficients = chebyshev_coefficients(STEPS, chebyshev_degree(STEPS))
    previous = scores.reshape(len(scores), -1).T
    current = matrix @ previous
    total = np.float32(coefficients[0]) * previous + np.float32(coefficients[1]) * current
    for coefficient in coefficients[2:]:
        previous, current = current, 2 * (matrix @ current) - previous
        if coefficient:
            total += np.float32(coefficient) * current
    return np.asarray(np.ascontiguousarray(total.T).reshape(scores.shape), np.float32)


def sparse_steps(
    affinity: Float32, scores: Float32, beta: float = BETA, steps: int = STEPS, radius: int = RADIUS
) -> Float32:
    """Every step on SciPy's sparse products."""
    matrix = transition(affinity, beta, radius)
    state = scores.reshape(len(scores), -1).T
    for _ in range(steps):
        state = matrix @ state
    return np.asarray(np.ascontiguousarray(state.T).reshape(scores.shape), np.float32)


def dense_squaring(
    affinity: Float32,
    scores: Float32,
    beta: float = BETA,
    steps: int = STEPS,
    radius: int = RADIUS,
    device: str = "cpu",
) -> Float32:
    """The peers' way, in PyTorch on all cores: squarings of the dense matrix, then one product.

    `steps` is a power of two.
    """
    import torch

    matrix = torch.from_numpy(transition(affinity, beta, radius).toarray()).to(device)
    for _ in range(steps.bit_length() - 1):
        matrix = matrix @ matrix
    flat = torch.from_numpy(scores.reshape(len(scores), -1)).to(device)
    return np.asarray((flat @ matrix.T).cpu().numpy().reshape(scores.shape), np.float32)


def flushed_dense_squaring(size: int, channels: int) -> Times:
    """The same where denormal numbers, which squares of small weights become, count as zero.

    The peers' code does not ask for that. In a process of its own: threads take the setting when they start.
    """
    command = [sys.executable, __file__, "--flushed-dense", str(size), str(channels)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return Times(tuple(json.loads(result.stdout)))


def time_flushed(size: int, channels: int) -> list[float]:
    """Seconds of three dense squarings in this process, its threads not yet started."""
    import torch

    torch.set_flush_denormal(True)
    affinity, scores = affinity_from_features(photograph(size, size)), smooth_scores(channels, size, size)
    times = interleave({"dense": lambda: dense_squaring(affinity, scores)}, repeats=3, slow={"dense": 3})
    return list(times["dense"].seconds)


def compare(size: int, channels: int, *, dense: bool, repeats: int) -> dict[str, Any]:
    """All ways on one image of size x size: times, ratios to ours, errors against float64."""
    affinity = affinity_from_features(photograph(size, size), radius=RADIUS)
    scores = smooth_scores(channels, size, size)
    ways: dict[str, Callable[[], Float32]] = {
        "multisa": lambda: random_walk(scores, affinity),
        "multisa, every step": lambda: random_walk(scores, affinity, exact=True),
        "scipy, Chebyshev": lambda: sparse_chebyshev(affinity, scores),
        "scipy, every step": lambda: sparse_steps(affinity, scores),
    }
    slow = {"scipy, Chebyshev": 3, "scipy, every step": 3}
    if dense:
        ways["dense squaring"] = lambda: dense_squaring(affinity, scores)
        slow["dense squaring"] = 3
    times = interleave(ways, repeats=repeats, slow=slow)
    reference = random_walk_reference(scores, affinity)
    rows = {}
    for name, way in ways.items():
        walked = way()  # once more: that is what its error is of
        rows[name] = {
            **times[name].to_json(),
            "times_ours": round(times[name].median / times["multisa"].median, 2),
            "max_error": float(np.abs(walked - reference).max()),
            "argmax_changes": int((walked.argmax(axis=0) != reference.argmax(axis=0)).sum()),
        }
    if dense:
        flushed = flushed_dense_squaring(size, channels)
        ratio = round(flushed.median / times["multisa"].median, 2)
        rows["dense squaring, denormals flushed"] = {**flushed.to_json(), "times_ours": ratio}
    return {"size": size, "channels": channels, "ways": rows}


def comparisons(*, quick: bool, machine: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """All ways at two sizes, and how far ours is from the floor; quick: no dense squaring, fewer repeats."""
    machine = machine or peaks()
    compared = [
        compare(64, 4, dense=not quick, repeats=_repeats(quick)),
        compare(128, 4, dense=False, repeats=_repeats(quick)),
    ]
    return [{**rows, "floor": floor(rows, machine)} for rows in compared]


def _repeats(quick: bool) -> int:
    return 5 if quick else 15


def floor(times: dict[str, Any], machine: dict[str, float]) -> dict[str, Any]:
    """What the arithmetic alone and the bytes alone would take, over the rates measured on this machine.

    Each product multiplies every pair twice and the self-loop. It cannot do without reading the weights and
    the state, and reading and writing the state before, which becomes the next, and the sum of the series.
    "binding" is the higher of the two, which nothing can be faster than.
    """
    pixels, channels, planes = times["size"] ** 2, times["channels"], len(stencil_offsets(RADIUS))
    products = chebyshev_degree(STEPS)
    operations = products * pixels * channels * (2 * planes + 1)
    seconds = operations / machine["multiply_adds_per_second"]
    held = 4 * pixels * (planes + 3 * channels)
    moved = products * 4 * pixels * (planes + 5 * channels)
    rate = copied_bytes_per_second(held)
    taken = times["ways"]["multisa"]["median_ms"] / 1000
    highest, text = max(
        (seconds, "multiply-adds over the measured float32 peak of one thread"),
        (moved / rate, "bytes over the measured rate of a copy that fits the same cache"),
    )
    return {
        "binding": {
            "floor_ms": round(1000 * highest, 3),
            "share": round(highest / taken, 3),
            "text": text,
        },
        "multiply_adds": operations,
        "floor_ms": round(1000 * seconds, 3),
        "share_of_peak": round(seconds / taken, 3),
        "bytes": moved,
        "bytes_per_second_of_a_copy_of_that_size": round(rate),
        "bytes_floor_ms": round(1000 * moved / rate, 3),
        "share_of_bytes_floor": round(moved / rate / taken, 3),
    }


def scaling(repeats: int) -> list[dict[str, float]]:
    """Time for one pixel and channel over sizes and channels: a flat line is linear cost."""
    rows = []
    for size, channels in ((32, 4), (64, 1), (64, 4), (64, 16), (128, 4), (256, 4), (512, 4)):
        affinity = affinity_from_features(photograph(size, size), radius=RADIUS)
        scores = smooth_scores(channels, size, size)
        times = interleave({"ours": partial(random_walk, scores, affinity)}, repeats=repeats)
        seconds = times["ours"].median
        rows.append(
            {
                "size": size,
                "channels": channels,
                "median_ms": round(1000 * seconds, 3),
                "ns_per_pixel_and_channel": round(1e9 * seconds / (size * size * channels), 1),
            }
        )
    return rows


def main() -> None:
    """Measure, print, write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="without the dense squaring, fewer repeats")
    results_folder(parser)
    parser.add_argument("--flushed-dense", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flushed_dense:
        print(json.dumps(time_flushed(*options.flushed_dense)))
        return
    described, machine = environment("scipy", "torch", quick=options.quick), peaks()
    results = {
        "environment": described,
        "peaks": machine,
        "parameters": {
            "radius": RADIUS,
            "beta": BETA,
            "steps": STEPS,
            "threads": "1; dense squaring all cores",
        },
        "comparisons": comparisons(quick=options.quick, machine=machine),
        "scaling": scaling(_repeats(options.quick)),
    }
    save_results("random_walk", results, options.results)


if __name__ == "__main__":
    main()
