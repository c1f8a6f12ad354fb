"""Gaussian filtering of scattered values on the permutohedral lattice (Adams, Baek & Davis 2010).

    filtered = GaussianFilter(features)(values)      # features [d, N], values [N, L]

Section numbers below are those of the paper. Splatting and slicing are one sparse matrix and its transpose,
made once; a lattice vertex is known by one 64-bit integer, so finding vertices and neighbours is sorting and
searching.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Norm of a filtered pixel below which it is not divided any further (pydensecrf's value).
NORM_FLOOR = 1e-20

# Largest feature, in standard deviations, that float32 still places well inside a simplex.
FEATURE_LIMIT = 2.0**16


class GaussianFilter:
    """The kernel exp(-|f_i - f_j|^2 / 2) of N fixed points, symmetrically normalised.

    Built once from features float32 [d, N] (positions divided by the standard deviations); call it with
    float32 [N, L] and it returns D^-1/2 K D^-1/2 values, float32 [N, L], D being the row sums of K
    (Kraehenbuehl & Koltun 2013). Raises ValueError when the deviations are too small for a lattice.
    """

    def __init__(self, features: Float32) -> None:
        lattice = _build_lattice(features)
        dimension, points = features.shape
        corners = dimension + 1
        self._neighbours = lattice.neighbours
        starts = np.arange(0, points * corners + 1, corners, dtype=np.int32)
        shape = (points, lattice.neighbours.shape[-1])
        self._slice = csr_array((lattice.weights.reshape(-1), lattice.vertices.reshape(-1), starts), shape=shape)
        # Blurring with (1/2, 1, 1/2) along d+1 axes amplifies; this is pydensecrf's factor.
        self._scale = np.float32(1 / (1 + 2.0**-dimension))
        norm = self(np.ones((points, 1), dtype=np.float32))
        root = 1 / np.sqrt(norm + np.float32(NORM_FLOOR))
        # From here on both uses of the matrix carry the normalisation.
        self._slice.data *= np.repeat(root[:, 0], corners)

    def __call__(self, values: Float32) -> Float32:
        """Filter float32 [N, L] to float32 [N, L]."""
        splat = self._slice.T @ values
        filtered: Float32 = self._slice @ self._blur(splat)
        return filtered

    def _blur(self, splat: Float32) -> Float32:
        """Convolve [M, L] with (1/2, 1, 1/2) along each of the d+1 lattice axes in turn (section 3.2)."""
        vertices, labels = splat.shape
        # The row after the last is the missing neighbour and stays zero.
        padded = np.zeros((vertices + 1, labels), dtype=np.float32)
        np.multiply(splat, self._scale, out=padded[:-1])
        for before, after in self._neighbours:
            sides = padded.take(before, axis=0)
            sides += padded.take(after, axis=0)
            sides *= np.float32(0.5)
            padded[:-1] += sides
        return padded[:-1]


@dataclass(frozen=True)
class _Lattice:
    """Where N points of dimension d lie among M vertices."""

    vertices: npt.NDArray[np.int32]  # [N, d + 1] ids of the corners of each point's simplex
    weights: Float32  # [N, d + 1] barycentric coordinates, summing to one
    neighbours: npt.NDArray[np.intp]  # [d + 1, 2, M] ids along each axis; M where there is none


def _build_lattice(features: Float32) -> _Lattice:
    """Find the enclosing simplex of every point and number the vertices that occur (section 3.1)."""
    dimension = features.shape[0]
    if not float(np.abs(features).max()) < FEATURE_LIMIT:
        raise ValueError(
            f"features: got values up to {np.abs(features).max():.3g} standard deviations, expected below "
            f"{FEATURE_LIMIT:.0f}; use larger standard deviations (sxy, srgb)"
        )
    elevated = _elevate(features)
    origin, rank = _nearest_origin(elevated)
    weights = _barycentric(elevated - origin, rank)
    strides = _key_strides(origin)
    keys = _corner_keys(origin, rank, strides)
    # Neighbouring pixels share simplices, so numbering the distinct simplices first shortens the sort.
    simplex = keys[0] * math.factorial(dimension + 1) + _permutation_index(rank)
    _, first, simplex_of = np.unique(simplex, return_index=True, return_inverse=True)
    vertex_keys, vertex_of = np.unique(keys[:, first].T, return_inverse=True)
    vertices = vertex_of.reshape(-1, dimension + 1).astype(np.int32)[simplex_of]
    return _Lattice(vertices, np.ascontiguousarray(weights.T), _neighbours(vertex_keys, strides))


def _elevate(features: Float32) -> Float32:
    """Map [d, N] onto the hyperplane of zero coordinate sum in d + 1 dimensions, as [d + 1, N].

    Scaled so that splatting, blurring and slicing together have a standard deviation of one (section 3.1).
    """
    dimension, points = features.shape
    # Rounded as in pydensecrf: a point on the border of two simplices must fall into the same
    # one, or the lattices differ and the mean field can amplify that.
    deviation = float(np.float32(math.sqrt(2 / 3) * (dimension + 1)))
    elevated = np.zeros((dimension + 1, points), dtype=np.float32)
    total = np.zeros(points, dtype=np.float32)
    for axis in range(dimension, 0, -1):
        scaled = features[axis - 1] * np.float32(1 / math.sqrt(axis * (axis + 1)) * deviation)
        elevated[axis] = total - np.float32(axis) * scaled
        total += scaled
    elevated[0] = total
    return elevated


def _nearest_origin(elevated: Float32) -> tuple[Float32, npt.NDArray[np.int8]]:
    """Find the remainder-0 vertex of each point's simplex and the rank of each coordinate's difference to it.

    Both are [d + 1, N]; the ranks of a point are a permutation of 0..d, 0 for the largest difference.
    """
    corners, points = elevated.shape
    origin = np.rint(elevated * np.float32(1 / corners))
    excess = origin.sum(axis=0).astype(np.int8)  # rounding can leave the plane by at most d / 2 multiples
    origin *= corners
    difference = elevated - origin
    rank = np.zeros((corners, points), dtype=np.int8)
    for i in range(corners):
        for j in range(i + 1, corners):
            less = difference[i] < difference[j]
            rank[i] += less
            rank[j] += ~less
    rank += excess
    low, high = rank < 0, rank >= corners
    origin += corners * (low.astype(np.float32) - high)
    rank += np.int8(corners) * (low.astype(np.int8) - high)
    return origin, rank


def _barycentric(difference: Float32, rank: npt.NDArray[np.int8]) -> Float32:
    """Compute the weight of each corner from the sorted differences (proposition 4.2): [d + 1, N]."""
    corners = difference.shape[0]
    ordered = np.empty_like(difference)
    np.put_along_axis(ordered, rank.astype(np.intp), difference / np.float32(corners), axis=0)
    weights = np.empty_like(difference)
    weights[0] = 1 + ordered[-1] - ordered[0]
    weights[1:] = (ordered[:-1] - ordered[1:])[::-1]
    return weights


def _key_strides(origin: Float32) -> Int64:
    """Choose the place value of each of the first d coordinates in a vertex key, as int64 [d].

    The last coordinate follows from the zero sum. Each digit has room for a vertex of the simplex and its
    neighbours, d + 1 beyond the origins on both sides twice, so keys of different vertices never meet and a
    step to a neighbour is one addition.
    """
    corners = origin.shape[0]
    room = [int(row.max() - row.min()) + 4 * corners + 1 for row in origin[:-1]]
    if math.prod(room) * math.factorial(corners) >= 2**62:
        raise ValueError(
            f"the lattice of this image needs {math.log2(math.prod(room)):.0f} bits a vertex, expected at "
            f"most {62 - math.log2(math.factorial(corners)):.0f}; use larger standard deviations (sxy, srgb)"
        )
    return np.array([math.prod(room[:axis]) for axis in range(corners - 1)], dtype=np.int64)


def _corner_keys(origin: Float32, rank: npt.NDArray[np.int8], strides: Int64) -> Int64:
    """Pack the corners of each point's simplex into keys, int64 [d + 1, N].

    Corner k is the origin plus k in every coordinate, less d + 1 in the k coordinates of highest rank.
    """
    corners, points = origin.shape
    keys = np.zeros((corners, points), dtype=np.int64)
    for axis, stride in enumerate(strides):
        digits = (origin[axis] - origin[axis].min()).astype(np.int64) + 2 * corners
        keys[0] += digits * stride
    for corner in range(1, corners):
        keys[corner] = keys[corner - 1] + strides.sum()
        for axis, stride in enumerate(strides):
            keys[corner] -= (rank[axis] == corners - corner) * (corners * stride)
    return keys


def _permutation_index(rank: npt.NDArray[np.int8]) -> Int64:
    """Number the permutations [d + 1, N] by their Lehmer code: int64 [N] below (d + 1)!."""
    corners, points = rank.shape
    index = np.zeros(points, dtype=np.int64)
    for i in range(corners):
        smaller_later = np.zeros(points, dtype=np.int8)
        for j in range(i + 1, corners):
            smaller_later += rank[j] < rank[i]
        index += smaller_later.astype(np.int64) * math.factorial(corners - 1 - i)
    return index


def _neighbours(keys: Int64, strides: Int64) -> npt.NDArray[np.intp]:
    """Find both neighbours of each vertex on each axis: sorted keys [M] -> ids [d + 1, 2, M], M for none."""
    dimension, count = len(strides), len(keys)
    neighbours = np.full((dimension + 1, 2, count), count, dtype=np.intp)
    ids = np.arange(count)
    for axis in range(dimension + 1):
        # One step adds 1 to every coordinate and takes d + 1 from that of the axis; the last one is not in
        # the key.
        step = strides.sum() - ((dimension + 1) * strides[axis] if axis < dimension else 0)
        wanted = keys + step
        found = np.minimum(np.searchsorted(keys, wanted), count - 1)
        exists = keys[found] == wanted
        neighbours[axis, 0, exists] = found[exists]
        neighbours[axis, 1, found[exists]] = ids[exists]
    return neighbours
