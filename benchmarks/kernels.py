"""The kernels: ours against the literature's code, SciPy and PyTorch, with errors.

    multisa bench --data VOC_LAYOUT --stages kernels -o DIR     # --quick leaves out the dense squaring

psa, irn and PuzzleCAM square the transition matrix of the whole grid eight times ("dense squaring", on all
cores; everything else runs on one thread). SciPy does the same walk as ours on a sparse matrix. pydensecrf is
the CRF that everybody uses. PyTorch enlarges probabilities before it takes the argmax, and SciPy finds the connected
parts of a mask, without joining them. Its bench.json is benchmarks/results/kernels.json.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from multisa.benchmarks.harness import Times, copied_bytes_per_second, interleave, peaks, roofline_share, with_ratios
from multisa.benchmarks.synthetic_images import class_probabilities, image_bytes, image_features, smooth_scores
from multisa.benchmarks.worker_process import INSTALL, WorkerProcess
from multisa.kernels import (
    CrfParameters,
    DenseCRF,
    absorb_small_parts,
    affinity_from_features,
    dense_crf,
    enlarge_probabilities,
    random_walk,
    random_walk_reference,
    stencil_offsets,
)
from multisa.kernels.common.checks import Float32, UInt8
from multisa.kernels.common.stencil import pair_slices
from multisa.kernels.common.walk import WalkSettings, chebyshev_degree
from multisa.kernels.cpu import forget_lattices
from multisa.runtime.progress import Progress, log

Row = dict[str, Any]
OURS = "multisa"
WALK = WalkSettings()
CHANNELS = 4
SIDES = (64, 128)  # pixels; the dense matrix is squared for the first
SLOW_REPEATS = 3  # of ways that take seconds
PSA = CrfParameters()
SETTINGS = {
    "psa": PSA,
    "irn": replace(PSA, bilateral_sxy=50.0, bilateral_srgb=5.0),
    "deeplab": replace(PSA, spatial_sxy=1.0, bilateral_sxy=67.0, bilateral_srgb=3.0, bilateral_compat=4.0),
}
CRFS = (("psa", 3, 3), ("psa", 21, 21), ("psa", 21, 3), ("irn", 3, 3), ("deeplab", 3, 3))  # labels, present
HEIGHT = 375
WIDTH = 500
ENLARGED = ((7, (94, 125), (HEIGHT, WIDTH)), (7, (96, 128), (3000, 4000)))  # labels, grid, image
SPECKS = 1e-4  # share of the pixels whose label is changed
MIN_PIXELS = 64


def measure(*, quick: bool) -> list[Row]:
    """A row for each way of each case. A kernel whose packages are missing is one row that says so."""
    machine = peaks()
    rows: list[Row] = []
    kernels: dict[str, tuple[Callable[..., Iterator[Row]], list[tuple[Any, ...]]]] = {
        "random walk": (walk_rows, [(side, side == SIDES[0] and not quick, 5 if quick else 15) for side in SIDES]),
        "dense CRF": (crf_rows, [(*case, 3 if quick else 9) for case in CRFS]),
        "enlarge": (enlarge_rows, [(*case, 5 if quick else 15) for case in ENLARGED]),
        "absorb": (absorb_rows, [(*case, 5 if quick else 15) for case in ENLARGED]),
    }
    with Progress(len(kernels), "kernels", "kernel") as bar:
        for name, (measured, cases) in kernels.items():
            try:
                rows += [{"kernel": name, "problem": None, **r} for case in cases for r in measured(machine, *case)]
            except ImportError as error:  # SciPy, PyTorch or pydensecrf
                missing = f"{error.name} is not installed" if error.name else str(error)
                rows.append({"kernel": name, "way": "", "problem": f"{missing}: {INSTALL}"})
                log.info(f"{name}: skipped: {missing}: {INSTALL}")
            bar.advance()
    return rows


def transition(affinity: Float32, settings: WalkSettings = WALK) -> Any:
    """The row-stochastic D^-1 A^beta of one image as a sparse matrix (SciPy's csr_array) [h w, h w]."""
    from scipy.sparse import csr_array

    height, width = affinity.shape[-2:]
    index = np.arange(height * width).reshape(height, width)
    rows, columns, values = [index.ravel()], [index.ravel()], [np.ones(index.size)]
    for plane, offset in zip(affinity, stencil_offsets(settings.radius), strict=True):
        source, target = pair_slices(offset, (height, width))
        edges = plane[source].astype(np.float64).ravel() ** settings.beta
        rows += [index[source].ravel(), index[target].ravel()]
        columns += [index[target].ravel(), index[source].ravel()]
        values += [edges, edges]
    pairs = (np.concatenate(rows), np.concatenate(columns))
    matrix = csr_array((np.concatenate(values), pairs), shape=(index.size, index.size))
    return (matrix / matrix.sum(axis=1)[:, None]).tocsr().astype(np.float32)


def sparse_steps(affinity: Float32, scores: Float32, settings: WalkSettings = WALK) -> Float32:
    """Every step on SciPy's sparse products."""
    matrix = transition(affinity, settings)
    state = scores.reshape(len(scores), -1).T
    for _ in range(settings.steps):
        state = matrix @ state
    return np.asarray(np.ascontiguousarray(state.T).reshape(scores.shape), np.float32)


def dense_squaring(affinity: Float32, scores: Float32, settings: WalkSettings = WALK, device: str = "cpu") -> Float32:
    """The literature's way in PyTorch on all cores: square the dense matrix, then one product.

    `settings.steps` is a power of two.
    """
    import torch

    matrix = torch.from_numpy(transition(affinity, settings).toarray()).to(device)
    for _ in range(settings.steps.bit_length() - 1):
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

    def seconds(self, side: int) -> tuple[float, ...]:
        affinity = affinity_from_features(image_features(side, side))
        scores = smooth_scores(CHANNELS, side, side)
        ways = {"dense": lambda: dense_squaring(affinity, scores)}
        return interleave(ways, repeats=0, slow={"dense": SLOW_REPEATS})["dense"].seconds


def walk_rows(machine: dict[str, float], side: int, dense: bool, repeats: int) -> Iterator[Row]:
    """All ways on one image of side x side: times, ratios to ours, errors against float64."""
    affinity = affinity_from_features(image_features(side, side), radius=WALK.radius)
    scores = smooth_scores(CHANNELS, side, side)
    ways: dict[str, Callable[[], Float32]] = {
        OURS: lambda: random_walk(scores, affinity),
        "multisa, every step": lambda: random_walk(scores, affinity, exact=True),
        "scipy, every step": lambda: sparse_steps(affinity, scores),
    }
    if dense:
        ways["dense squaring"] = lambda: dense_squaring(affinity, scores)
    slow = {name: SLOW_REPEATS for name in ways if not name.startswith(OURS)}
    times = interleave(ways, repeats=repeats, slow=slow)
    if dense:
        with WorkerProcess(_FlushedDense) as worker:
            times["dense squaring, denormals flushed"] = Times(worker.call("seconds", side))
    reference = random_walk_reference(scores, affinity)
    errors = {name: float(np.abs(way() - reference).max()) for name, way in ways.items()}
    for way, figures in with_ratios(times, OURS).items():
        threads = "all" if way.startswith("dense squaring") else 1
        size = {"size": f"{side}x{side}, {CHANNELS} channels", "threads": threads}
        limit = walk_roofline(side, times[OURS].median, machine) if way == OURS else None
        yield {"way": way, **size, **figures, "max_error": errors.get(way), "limit": limit}


def walk_roofline(side: int, seconds: float, machine: dict[str, float]) -> Row:
    """Time of the arithmetic or of the bytes alone, the longer of the two: nothing can be faster.

    Each product multiplies every pair twice and the self-loop once. It has to read the weights and the state,
    and read and write the previous state, which becomes the next, and the sum of the series.
    """
    pixels = side**2
    planes = len(stencil_offsets(WALK.radius))
    products = chebyshev_degree(WALK.steps)
    operations = products * pixels * CHANNELS * (2 * planes + 1)
    moved = products * 4 * pixels * (planes + 5 * CHANNELS)
    rate = copied_bytes_per_second(4 * pixels * (planes + 3 * CHANNELS))
    arithmetic = operations / machine["multiply_adds_per_second"]
    if arithmetic > moved / rate:
        text = "multiply-adds over the measured float32 peak of one thread"
        return roofline_share(arithmetic, seconds, text)
    return roofline_share(moved / rate, seconds, "bytes over the measured rate of a copy that fits the same cache")


def crf_rows(machine: dict[str, float], name: str, labels: int, present: int, repeats: int) -> Iterator[Row]:
    """Ours and pydensecrf on one image: whole calls, from the image to the refined probabilities."""
    image = image_bytes(HEIGHT, WIDTH)
    probabilities = class_probabilities(labels, HEIGHT, WIDTH, present)
    parameters = SETTINGS[name]
    crf = DenseCRF(image, parameters)

    def first_call() -> Float32:
        # Without the cached spatial lattice of this size: pydensecrf builds its own in each call.
        forget_lattices()
        return dense_crf(image, probabilities, parameters)

    ways: dict[str, Callable[[], Float32]] = {
        OURS: first_call,
        "multisa, next image of this size": lambda: dense_crf(image, probabilities, parameters),
        "multisa, second call on the image": lambda: crf.infer(probabilities),
        "pydensecrf": lambda: dense_crf(image, probabilities, parameters, backend="pydensecrf"),
    }
    times = interleave(ways, repeats=repeats)
    agreement = float((ways[OURS]().argmax(axis=0) == ways["pydensecrf"]().argmax(axis=0)).mean())
    # Each point's record and energies, read once per iteration.
    padded = next(length for length in (4, 8, 16, 24, 32) if present <= length)
    moved = parameters.iterations * HEIGHT * WIDTH * (48 + 4 * padded)
    text = "bytes of the lattice read once per iteration, over the measured bandwidth of a copy"
    limit = roofline_share(moved / machine["copied_bytes_per_second"], times[OURS].median, text)
    size = f"{WIDTH}x{HEIGHT}, {name}, {labels} labels, {present} present"
    for way, figures in with_ratios(times, OURS).items():
        more = {"limit": limit, "label_agreement": agreement} if way == OURS else {"limit": None}
        yield {"way": way, "size": size, "threads": 1, **figures, **more}


def enlarge_rows(
    machine: dict[str, float], labels: int, grid: tuple[int, int], size: tuple[int, int], repeats: int
) -> Iterator[Row]:
    """From probabilities on a grid to labels and confidences: ours, and PyTorch on one thread."""
    probabilities = class_probabilities(labels, *grid)
    ways: dict[str, Callable[[], tuple[UInt8, UInt8]]] = {
        OURS: lambda: enlarge_probabilities(probabilities, size),
        "PyTorch, interpolate and argmax": lambda: interpolated_argmax(probabilities, size),
    }
    times = interleave(ways, repeats=repeats, slow={name: SLOW_REPEATS for name in ways if name != OURS})
    (ours, _), (theirs, _) = (way() for way in ways.values())
    limit = _written_roofline(machine, size, times[OURS].median)
    shape = f"{grid[1]}x{grid[0]} to {size[1]}x{size[0]}, {labels} labels"
    for way, figures in with_ratios(times, OURS).items():
        more = {"limit": limit, "label_agreement": float((ours == theirs).mean())} if way == OURS else {"limit": None}
        yield {"way": way, "size": shape, "threads": 1, **figures, **more}


def interpolated_argmax(probabilities: Float32, size: tuple[int, int]) -> tuple[UInt8, UInt8]:
    """`enlarge_probabilities` in PyTorch, on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        enlarged = torch.nn.functional.interpolate(torch.from_numpy(probabilities)[None], size=size, mode="bilinear")
        highest, labels = enlarged[0].max(dim=0)
        return labels.to(torch.uint8).numpy(), (highest * 255).round().to(torch.uint8).numpy()
    finally:
        torch.set_num_threads(threads)


def absorb_rows(
    machine: dict[str, float], labels: int, grid: tuple[int, int], size: tuple[int, int], repeats: int
) -> Iterator[Row]:
    """Small parts of a mask with specks: ours, and SciPy, which only finds the parts and their areas."""
    from scipy import ndimage

    mask, _ = enlarge_probabilities(class_probabilities(labels, *grid), size)
    mask[np.random.default_rng(0).random(size) < SPECKS] = labels

    def find_parts() -> None:
        for label in range(labels + 1):
            np.bincount(ndimage.label(mask == label)[0].ravel())

    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: absorb_small_parts(mask, MIN_PIXELS),
        "scipy, parts alone": find_parts,
    }
    times = interleave(ways, repeats=repeats, slow={name: SLOW_REPEATS for name in ways if name != OURS})
    limit = _written_roofline(machine, size, times[OURS].median)
    for way, figures in with_ratios(times, OURS).items():
        row = {"way": way, "size": f"{size[1]}x{size[0]}, {labels + 1} labels", "threads": 1}
        yield {**row, **figures, "limit": limit if way == OURS else None}


def _written_roofline(machine: dict[str, float], size: tuple[int, int], seconds: float) -> Row:
    """Two bytes a pixel: a label and a confidence are written, or one label is read and one written."""
    text = "two bytes a pixel over the measured bandwidth of a copy"
    return roofline_share(2 * size[0] * size[1] / machine["copied_bytes_per_second"], seconds, text)
