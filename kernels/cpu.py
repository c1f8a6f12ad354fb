"""The kernels on the CPU: calls of the compiled module `_native` with arguments that are already checked."""

import functools
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from multisa.kernels.common.checks import Float32, UInt8
from multisa.kernels.common.crf import CrfParameters
from multisa.kernels.common.stencil import edge_mask, stencil_offsets
from multisa.kernels.common.walk import WalkSettings, check_walk_values


def _why_missing(error: ImportError) -> str:
    """Say why the compiled module cannot be imported, and what to do."""
    folder = Path(__file__).resolve().parent
    package = folder.parent
    is_clone = (package / "pyproject.toml").is_file()
    install = f"pip install -e {package}" if is_clone else "pip install --force-reinstall . in a clone of the project"
    needs = "which needs a C++17 compiler and Python.h (apt-get install g++ python3-dev)"
    found = sorted(path.name for path in folder.glob("_native.*") if path.suffix != ".pyi")
    expected = [f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    if set(found) & set(expected):
        return f"multisa.kernels: got the error {str(error)!r}, expected a module that loads: {install}, {needs}"
    for entry in sys.path:
        other = Path(entry or ".").resolve() / "multisa"
        if is_clone and other != package and any(other.glob("kernels/_native.*[!i]")):
            return (
                f"multisa.kernels: got the sources in {package}, which hide the multisa installed in {other}, "
                f"expected the installed one: keep {package.parent} off sys.path (run Python in another folder or as "
                f"python -P), or {install}"
            )
    names = f"got {', '.join(found)}" if found else "no compiled module"
    return f"multisa.kernels: {names} in {folder}, expected {expected[0]}: {install}, {needs}"


try:
    from multisa.kernels import _native as native
except ImportError as error:
    raise ImportError(_why_missing(error), name="multisa.kernels._native") from error

if TYPE_CHECKING:
    from multisa.kernels._native import DenseCrf, Lattice

__all__ = ["affinity", "dense_crf", "forget_lattices", "native", "random_walk"]


def random_walk(scores: Float32, affinity: Float32, settings: WalkSettings, out: Float32 | None) -> Float32:
    """Walk float32 [C, h, w] or [N, C, h, w] into `out`, or into a new array.

    Raises ValueError if a score is not finite or an affinity is outside [0, 1].
    """
    batch = (1,) * (4 - scores.ndim)
    # Channels are written one group after another, so the result must not overlap scores that are still read.
    direct = out is not None and out.flags.c_contiguous and not np.may_share_memory(out, scores)
    walked = out if out is not None and direct else np.empty(scores.shape, dtype=np.float32)
    valid = native.walk(
        np.ascontiguousarray(scores).reshape(*batch, *scores.shape),
        np.ascontiguousarray(affinity).reshape(*batch, *affinity.shape),
        walked.reshape(*batch, *scores.shape),
        settings.radius,
        settings.beta,
        settings.radius - 1 if settings.boundary == "psa" else 0,
        settings.steps,
        settings.chebyshev_series(),
    )
    if not valid:
        grid = (scores.shape[-2], scores.shape[-1])
        check_walk_values(scores, affinity, edge_mask(settings.radius, grid, settings.boundary))
    if out is None or walked is out:
        return walked
    out[...] = walked
    return out


def affinity(maps: Float32, radius: int, *, boundary: bool) -> Float32:
    """Compute the affinities of features [..., D, h, w] or boundaries [..., h, w]: float32 [..., P, h, w].

    Raises ValueError for features that are not finite or boundaries outside [0, 1].
    """
    planes = len(stencil_offsets(radius))
    grid = maps.shape[-2:]
    depth = 1 if boundary else maps.shape[-3]
    batch = maps.shape[: maps.ndim - (2 if boundary else 3)]
    flat = np.ascontiguousarray(maps).reshape(-1, depth, *grid)
    result = np.empty((len(flat), planes, *grid), dtype=np.float32)
    if native.affinity(flat, result, radius, boundary):
        return result.reshape(*batch, planes, *grid)
    if boundary:
        raise ValueError(
            f"boundary: got values from {maps.min()} to {maps.max()}, expected probabilities in [0, 1]; "
            "apply the sigmoid first"
        )
    raise ValueError("features: got NaN or infinity, expected finite values; check the network's output")


def dense_crf(image: UInt8, parameters: CrfParameters) -> "DenseCrf":
    """Build the lattices for an image, uint8 [h, w, 3]."""
    height, width = image.shape[:2]
    return native.dense_crf(
        np.ascontiguousarray(image),
        _spatial_lattice(height, width, parameters.spatial_sxy),
        parameters.bilateral_sxy,
        parameters.bilateral_srgb,
        parameters.bilateral_compat,
        parameters.spatial_compat,
    )


def forget_lattices() -> None:
    """Free the spatial lattices that `dense_crf` keeps for further images of the same sizes."""
    _spatial_lattice.cache_clear()


@functools.lru_cache(maxsize=4)
def _spatial_lattice(height: int, width: int, sxy: float) -> "Lattice":
    """Build the lattice of the spatial kernel. It depends only on the size, and corpora repeat a few."""
    return native.spatial_lattice(height, width, sxy)
