"""The random walk: ours against the literature's dense squaring and against SciPy, with errors.

    python benchmarks/random_walk.py            # five minutes; --quick leaves out the dense squaring

psa, irn and PuzzleCAM square the transition matrix of the whole grid eight times ("dense squaring"). SciPy
does the same walk as ours on a sparse matrix. Writes benchmarks/results/random_walk.json.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from multisa.benchmarks.harness import (
    Times,
    copied_bytes_per_second,
    environment,
    interleave,
    make_parser,
    peaks,
    roofline_share,
    save_results,
    with_ratios,
)
from multisa.benchmarks.synthetic_images import image_features, smooth_scores
from multisa.benchmarks.worker_process import WorkerProcess
from multisa.kernels import affinity_from_features, random_walk, random_walk_reference, stencil_offsets
from multisa.kernels.common.stencil import pair_slices
from multisa.kernels.common.walk import chebyshev_coefficients, chebyshev_degree

Float32 = npt.NDArray[np.float32]
STEPS = 256
BETA = 8.0
RADIUS = 5
SLOW_REPEATS = 3  # of ways that take seconds


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
    """The literature's way in PyTorch on all cores: square the dense matrix, then one product.

    `steps` is a power of two.
    """
    import torch

    matrix = torch.from_numpy(transition(affinity, beta, radius).toarray()).to(device)
    for _ in range(steps.bit_length() - 1):
        matrix = matrix @ matrix
    flat = torch.from_numpy(scores.reshape(len(scores), -1)).to(device)
    return np.asarray((flat @ matrix.T).cpu().numpy().reshape(scores.shape), np.float32)


class _FlushedDense:
    """Dense squaring in a worker process whose threads flush denormal numbers: they take it when they start.

    Squares of small weights become denormal. The literature's code does not flush them.
    """

    def __init__(self) -> None:
        import torch

        torch.set_flush_denormal(True)

    def seconds(self, size: int, channels: int) -> tuple[float, ...]:
        affinity = affinity_from_features(image_features(size, size))
        scores = smooth_scores(channels, size, size)
        ways = {"dense": lambda: dense_squaring(affinity, scores)}
        return interleave(ways, repeats=0, slow={"dense": SLOW_REPEATS})["dense"].seconds


def compare(size: int, channels: int, *, dense: bool, repeats: int) -> dict[str, Any]:
    """All ways on one image of size x size: times, ratios to ours, errors against float64."""
    affinity = affinity_from_features(image_features(size, size), radius=RADIUS)
    scores = smooth_scores(channels, size, size)
    ways: dict[str, Callable[[], Float32]] = {
        "multisa": lambda: random_walk(scores, affinity),
        "multisa, every step": lambda: random_walk(scores, affinity, exact=True),
        "scipy, Chebyshev": lambda: sparse_chebyshev(affinity, scores),
        "scipy, every step": lambda: sparse_steps(affinity, scores),
    }
    if dense:
        ways["dense squaring"] = lambda: dense_squaring(affinity, scores)
    slow = {name: SLOW_REPEATS for name in ways if not name.startswith("multisa")}
    times = interleave(ways, repeats=repeats, slow=slow)
    reference = random_walk_reference(scores, affinity)
    rows = with_ratios(times, "multisa")
    for name, way in ways.items():
        walked = way()
        rows[name] |= {
            "max_error": float(np.abs(walked - reference).max()),
            "argmax_changes": int((walked.argmax(axis=0) != reference.argmax(axis=0)).sum()),
        }
    if dense:
        with WorkerProcess(_FlushedDense) as worker:
            flushed = Times(worker.call("seconds", size, channels))
        ratio = round(flushed.median / times["multisa"].median, 2)
        rows["dense squaring, denormals flushed"] = {**flushed.to_json(), "times_ours": ratio}
    return {"size": size, "channels": channels, "ways": rows}


def comparisons(*, quick: bool, machine: dict[str, float]) -> list[dict[str, Any]]:
    """All ways at two sizes, and our distance from the roofline; quick: no dense squaring, fewer repeats."""
    repeats = 5 if quick else 15
    compared = [compare(size, 4, dense=size == 64 and not quick, repeats=repeats) for size in (64, 128)]
    return [{**rows, "roofline": roofline(rows, machine)} for rows in compared]


def roofline(times: dict[str, Any], machine: dict[str, float]) -> dict[str, Any]:
    """Time of the arithmetic alone and of the bytes alone at the rates measured on this machine.

    Each product multiplies every pair twice and the self-loop once. It has to read the weights and the state,
    and read and write the previous state, which becomes the next, and the sum of the series. "binding" is the
    longer of the two times: nothing can be faster.
    """
    pixels, channels = times["size"] ** 2, times["channels"]
    planes = len(stencil_offsets(RADIUS))
    products = chebyshev_degree(STEPS)
    operations = products * pixels * channels * (2 * planes + 1)
    moved = products * 4 * pixels * (planes + 5 * channels)
    rate = copied_bytes_per_second(4 * pixels * (planes + 3 * channels))
    taken = times["ways"]["multisa"]["median_ms"] / 1000
    of_arithmetic = (
        operations / machine["multiply_adds_per_second"],
        "multiply-adds over the measured float32 peak of one thread",
    )
    of_bytes = (moved / rate, "bytes over the measured rate of a copy that fits the same cache")
    seconds, text = max(of_arithmetic, of_bytes)
    return {
        "binding": roofline_share(seconds, taken, text),
        "multiply_adds": operations,
        "roofline_ms": round(1000 * of_arithmetic[0], 3),
        "bytes": moved,
        "bytes_per_second_of_a_copy_of_that_size": round(rate),
        "bytes_roofline_ms": round(1000 * of_bytes[0], 3),
    }


def main() -> None:
    """Measure, print, write the results file."""
    options = make_parser(__doc__, quick="without the dense squaring, fewer repeats").parse_args()
    described = environment("scipy", "torch", quick=options.quick)
    machine = peaks()
    threads = "1; dense squaring all cores"
    results = {
        "environment": described,
        "peaks": machine,
        "parameters": {"radius": RADIUS, "beta": BETA, "steps": STEPS, "threads": threads},
        "comparisons": comparisons(quick=options.quick, machine=machine),
    }
    save_results("random_walk", results, options.results)


if __name__ == "__main__":
    main()
