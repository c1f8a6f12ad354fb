"""The permutohedral lattice of images of one size, built and filtered on a device without a synchronisation.

The host schedule of lattice.cuh, crf.cuh and sort.cuh. `LatticeGeometry` holds what follows from the sizes
alone. The number of vertices stays on the device, so memory and grids have the size of an upper bound, and
threads stride over the vertices that exist.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from multisa.kernels.cuda.device import Device, Workspace, divide_up

# As in csrc/cpu/lattice.cpp: the norm below which a pixel is not divided further, and the largest feature.
NORM_FLOOR = 1e-20
FEATURE_LIMIT = 2.0**16  # standard deviations
THREADS = 256  # a block, in all kernels of the lattice
SPLAT_VERTICES = 32  # splat_vertices
STRIDING_BLOCKS = 2048  # enough to fill a device; threads stride over the rest
STRIDES = 8  # of a thread if all vertices of the bound existed; images have a tenth of them
ALL_ONES = 0xFFFFFFFF
FLOAT_ONE = 0x3F800000  # the bits of 1.0f
MAX_TOUCHES = 2**31 - 2**16  # indices of touches, and of the threads of their last block, are int
MAX_CELLS = 2**30  # four-label cells of one copy of the values
SORT_TILE = 2048  # sort_tile of sort.cuh
DIGIT_BITS = 8  # log2 of sort_digits


@dataclass(frozen=True)
class LatticeGeometry:
    """Everything about the lattice of `images` images that does not depend on their colours."""

    images: int
    height: int
    width: int
    numbers: npt.NDArray[np.float32]  # [2 d]: divisors of the features, then factors of the elevation
    codes: npt.NDArray[np.int64]  # [3 d + 2]: strides, lowest digits, axis steps, stride of the image
    capacity: int  # no more vertices than this

    @property
    def dimension(self) -> int:
        """Return the number of features: 2 (x, y) or 5 (x, y, r, g, b)."""
        return len(self.numbers) // 2

    @property
    def points(self) -> int:
        """Return the number of pixels of all images."""
        return self.images * self.height * self.width

    @property
    def touches(self) -> int:
        """Return the number of (pixel, corner of its simplex)."""
        return self.points * (self.dimension + 1)

    @property
    def slots(self) -> int:
        """Return the size of the hash table: a power of two, at most half of it in use."""
        return 1 << (2 * self.capacity - 1).bit_length()


def lattice_geometry(
    images: int,
    height: int,
    width: int,
    deviations: tuple[float, ...],
    *,
    padded: int = 4,
    max_vertices: int | None = None,
) -> LatticeGeometry:
    """Lay out the lattice of features (x, y) or (x, y, r, g, b) with the given standard deviations.

    Raises ValueError if the deviations are too small for 64-bit keys, or if there are too many pixels, or
    values of `padded` labels, to index.
    """
    dimension = len(deviations)
    corners = dimension + 1
    pixels = height * width
    if images * pixels * corners > MAX_TOUCHES:
        raise ValueError(
            f"images: got {images} of {height} x {width}, expected at most {MAX_TOUCHES // corners} "
            "pixels in all; split the batch"
        )
    divisors = np.array(deviations, dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):  # a deviation that is 0 in float32
        extents = np.array([width - 1, height - 1, 255, 255, 255][:dimension]) / divisors.astype(np.float64)
    if not extents.max() < FEATURE_LIMIT:
        raise ValueError(
            f"features: got values up to {extents.max():.3g} standard deviations, expected below "
            f"{FEATURE_LIMIT:.0f}; use larger standard deviations (sxy, srgb)"
        )
    scales = _scales(dimension)
    bound = min(corners * pixels, _vertex_bound(extents)) * images
    capacity = bound if max_vertices is None else min(bound, max_vertices)
    if capacity * padded // 4 > MAX_CELLS:
        raise ValueError(
            f"labels: got {padded} for up to {capacity} vertices, expected a product of at most "
            f"{4 * MAX_CELLS}; split the batch or pass a smaller max_vertices"
        )
    numbers = np.concatenate([divisors, scales])
    return LatticeGeometry(images, height, width, numbers, _codes(images, extents * scales), capacity)


def _scales(dimension: int) -> npt.NDArray[np.float32]:
    """Return the factors of the elevation, rounded as pydensecrf rounds them: float32 [d]."""
    deviation = float(np.float32(math.sqrt(2 / 3) * (dimension + 1)))
    axes = range(1, dimension + 1)
    return np.array([1 / math.sqrt(axis * (axis + 1)) * deviation for axis in axes], dtype=np.float32)


def _vertex_bound(extents: npt.NDArray[np.float64]) -> int:
    """Bound the vertices that points of a box of these extents (in standard deviations) can touch.

    Vertices have cells of equal volume, and those of touched vertices lie in the box grown on all sides by
    the longest edge of a simplex and the covering radius of the lattice A*_d (Conway & Sloane, chapter 4).
    """
    d = len(extents)
    density = math.pow(2 / 3, d / 2) * math.sqrt(d + 1)
    edge = math.sqrt(1.5 * max(k * (d + 1 - k) for k in range(d + 1)) / (d + 1))
    radius = math.sqrt(1.5 * d * (d + 2) / (12 * (d + 1)))
    margin = 1.01 * 2 * (edge + radius)  # a hundredth for rounding
    return math.ceil(density * float(np.prod(extents + margin)))


def _codes(images: int, elevations: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Choose the digits of the vertex keys: strides [d], lowest [d], steps [d + 1], stride of the image.

    A coordinate ranges over the reach of the elevated features and, on both sides, d + 1 each for the nearest
    origin, its correction, the corners of the simplex and their neighbours.
    """
    dimension = len(elevations)
    corners = dimension + 1
    lowest = []
    strides = []
    stride = 1
    for axis in range(dimension):
        # Coordinate `axis` is the sum of the later features less `axis` times its own (section 3.1).
        low = -axis * elevations[axis - 1] if axis else 0.0
        lowest.append(math.floor(low) - 4 * corners)
        strides.append(stride)
        stride *= math.ceil(elevations[axis:].sum()) + 4 * corners - lowest[-1] + 1
    if stride * images >= 2**62:
        raise ValueError(
            f"the lattice of {images} images needs {math.log2(stride * images):.0f} bits a vertex, expected "
            "at most 62; use larger standard deviations (sxy, srgb)"
        )
    steps = [sum(strides) - corners * stride_of_axis for stride_of_axis in (*strides, 0)]
    return np.array([*strides, *lowest, *steps, stride], dtype=np.int64)


def _striding_blocks(bound: int, size: int) -> int:
    """Choose how many blocks take `size` elements each at a time, of at most `bound`."""
    return min(divide_up(bound, size * STRIDES), STRIDING_BLOCKS)


class Sorter:
    """Prefix sums and a stable radix sort of up to `largest` pairs of a uint32 key and a uint32 value.

    `sort` takes the pairs at `keys` and `values`, in memory of this object.
    """

    def __init__(self, device: Device, largest: int) -> None:
        """Allocate for `largest` pairs, at least 1."""
        counts = divide_up(largest, SORT_TILE) << DIGIT_BITS
        sizes = dict.fromkeys(("keys0", "values0", "keys1", "values1"), 4 * largest)
        sizes |= {"counts": 4 * counts, "sums": 4 * divide_up(max(largest, counts), SORT_TILE), "total": 4}
        self._device = device
        self._memory = Workspace(device, sizes)
        self.size = self._memory.size
        self.keys = self._memory["keys0"]
        self.values = self._memory["values0"]
        self.total = self._memory["total"]

    def sort(self, count: int, below: int, stream: int) -> tuple[int, int]:
        """Queue a stable sort by key. Return the addresses that will hold the sorted keys and values.

        All keys must be less than `below`: the sort looks at the bits of that number only.
        """
        memory = self._memory
        source = (self.keys, self.values)
        target = (memory["keys1"], memory["values1"])
        bits = max((below - 1).bit_length(), 1)
        width = divide_up(bits, divide_up(bits, DIGIT_BITS))
        tiles = divide_up(count, SORT_TILE)
        grid = (tiles, 1, 1)
        block = (THREADS, 1, 1)
        for shift in range(0, bits, width):
            digit = (np.int32(count), np.int32(shift), np.int32(width), memory["counts"])
            self._device.launch("radix_count", grid, block, (source[0], *digit), stream=stream)
            self.scan(memory["counts"], tiles << width, stream)
            self._device.launch("radix_scatter", grid, block, (*source, *digit, *target), stream=stream)
            source, target = target, source
        return source

    def scan(self, values: int, count: int, stream: int) -> None:
        """Queue replacing uint32 [count] by its exclusive prefix sums, and `total` by the sum.

        `count` is at most the larger of `largest` and the number of counts of its sort.
        """
        sums = self._memory["sums"]
        block = (THREADS, 1, 1)
        tiles = divide_up(count, SORT_TILE)
        whole = (values, np.int32(count), sums)
        self._device.launch("scan_tiles", (tiles, 1, 1), block, whole, stream=stream)
        self._device.launch("scan_sums", (1, 1, 1), block, (sums, np.int32(tiles), self.total), stream=stream)
        self._device.launch("scan_add", (tiles, 1, 1), block, whole, stream=stream)


class LatticeBuilder:
    """Builds lattices, one after another, in scratch memory that they share."""

    def __init__(self, device: Device, geometries: tuple[LatticeGeometry, ...], error: int) -> None:
        """Allocate for the largest of `geometries`; `error` is the device address of the error word."""
        self._device = device
        self._error = error
        touches = max(geometry.touches for geometry in geometries)
        capacity = max(geometry.capacity for geometry in geometries)
        slots = max(geometry.slots for geometry in geometries)
        sizes = {"table": 8 * slots, "first": 4 * slots, "ids": 4 * slots, "keys": 8 * capacity}
        self._scratch = Workspace(device, sizes | {"slots": 4 * touches})
        self._sorter = Sorter(device, touches)

    @property
    def size(self) -> int:
        """Size of the memory in bytes."""
        return self._scratch.size + self._sorter.size

    def insert(self, lattice: "Lattice", image: int, stream: int) -> None:
        """Queue finding the simplex of every pixel; `image` is uint8 [images, height, width, 3]."""
        geometry = lattice.geometry
        scratch = self._scratch
        memory = lattice.memory
        self._device.fill(scratch["table"], ALL_ONES, 2 * geometry.slots, stream)
        self._device.fill(scratch["first"], ALL_ONES, geometry.slots, stream)
        pixels = geometry.height * geometry.width
        sizes = (np.int32(geometry.points), np.int32(pixels), np.int32(geometry.width))
        table = (scratch["table"], np.uint32(geometry.slots - 1), scratch["first"], scratch["slots"])
        self._launch(
            f"lattice_insert_{geometry.dimension}",
            geometry.points,
            (image, *sizes, memory["numbers"], memory["codes"], *table, memory["weights"], self._error),
            stream,
        )

    def finish(self, lattice: "Lattice", beliefs: int, stream: int) -> None:
        """Queue the rest after `insert`. Overwrites `beliefs`, memory for float32 [points, 4]."""
        self._number(lattice, stream)
        self._link(lattice, stream)
        geometry = lattice.geometry
        memory = lattice.memory
        touches = self._sorter.sort(geometry.touches, geometry.capacity, stream)
        count = np.int32(geometry.touches)
        starts = (touches[0], count, memory["vertices"], memory["starts"])
        self._launch("lattice_starts", geometry.touches, starts, stream)
        sizes = (count, np.int32(geometry.points), np.int32(geometry.dimension + 1))
        entries = (touches[1], *sizes, memory["weights"], memory["entries"])
        self._launch("crf_entries", geometry.touches, entries, stream)
        self._device.fill(beliefs, FLOAT_ONE, 4 * geometry.points, stream)
        lattice.filter(beliefs, 1, 4, stream)
        norm = (memory["vertex_of"], lattice.values, *sizes[1:], np.float32(NORM_FLOOR), memory["weights"])
        self._launch("crf_normalise", geometry.points, norm, stream)
        self._launch("crf_entries", geometry.touches, entries, stream)

    def _number(self, lattice: "Lattice", stream: int) -> None:
        """Number the vertices by their first touch, and store the number of its vertex with every touch."""
        geometry = lattice.geometry
        scratch = self._scratch
        memory = lattice.memory
        count = np.int32(geometry.touches)
        capacity = np.int32(geometry.capacity)
        order = self._sorter.keys  # free until the sort
        first = (scratch["slots"], scratch["first"])
        self._launch("lattice_mark", geometry.touches, (*first, count, order), stream)
        self._sorter.scan(order, geometry.touches, stream)
        table = (scratch["table"], self._sorter.total, capacity, scratch["ids"], scratch["keys"])
        number = (*first, order, count, *table, memory["vertices"], self._error)
        self._launch("lattice_number", geometry.touches, number, stream)
        sizes = (np.int32(geometry.points), np.int32(geometry.dimension + 1), capacity)
        targets = (memory["vertex_of"], memory["weights"], self._sorter.keys, self._sorter.values)
        self._launch("lattice_assign", geometry.touches, (scratch["slots"], scratch["ids"], *sizes, *targets), stream)

    def _link(self, lattice: "Lattice", stream: int) -> None:
        geometry = lattice.geometry
        scratch = self._scratch
        memory = lattice.memory
        steps = memory["codes"] + geometry.codes.itemsize * 2 * geometry.dimension
        table = (scratch["table"], np.uint32(geometry.slots - 1), scratch["ids"], np.int32(geometry.capacity))
        grid = (_striding_blocks(geometry.capacity, THREADS), geometry.dimension + 1, 1)
        arguments = (scratch["keys"], memory["vertices"], steps, *table, memory["neighbours"])
        self._device.launch("lattice_neighbours", grid, (THREADS, 1, 1), arguments, stream=stream)

    def _launch(self, name: str, threads: int, arguments: tuple[int | np.generic, ...], stream: int) -> None:
        """Queue a kernel with one thread per element."""
        grid = (divide_up(threads, THREADS), 1, 1)
        self._device.launch(name, grid, (THREADS, 1, 1), arguments, stream=stream)


class Lattice:
    """A lattice on the device, and the memory to filter `copies` fields of `padded` labels with it."""

    def __init__(self, device: Device, geometry: LatticeGeometry, copies: int, padded: int) -> None:
        """Allocate the memory; a LatticeBuilder fills it."""
        corners = geometry.dimension + 1
        values = 4 * copies * geometry.capacity * padded
        sizes = dict.fromkeys(("vertex_of", "weights"), 4 * geometry.touches)
        sizes |= {"entries": 8 * geometry.touches, "starts": 4 * (geometry.capacity + 1), "vertices": 4}
        sizes |= {"neighbours": 8 * corners * geometry.capacity, "values0": values, "values1": values}
        sizes |= {"numbers": geometry.numbers.nbytes, "codes": geometry.codes.nbytes}
        self.geometry = geometry
        self.memory = Workspace(device, sizes)
        self._device = device
        device.upload(self.memory["numbers"], geometry.numbers)
        device.upload(self.memory["codes"], geometry.codes)

    @property
    def values(self) -> int:
        """Return the address of the result of `filter`: each of the d + 1 blurs swaps two regions."""
        return self.memory[f"values{(self.geometry.dimension + 1) % 2}"]

    def filter(self, beliefs: int, copies: int, padded: int, stream: int) -> None:
        """Queue splatting and blurring of float32 [copies, points, padded].

        `values` are then float32 [copies, capacity, padded], to be sliced with `vertex_of` and `weights`.
        """
        geometry = self.geometry
        memory = self.memory
        quads = np.int32(padded // 4)
        rows = np.int32(geometry.capacity)
        # Blurring with (1/2, 1, 1/2) along d + 1 axes amplifies; the factor is pydensecrf's.
        scale = np.float32(1 / (1 + 2.0**-geometry.dimension))
        values = memory["values0"]
        blurred = memory["values1"]
        lists = (memory["entries"], memory["starts"], memory["vertices"])
        blocks = _striding_blocks(geometry.capacity, SPLAT_VERTICES)
        self._device.launch(
            "crf_splat_4" if padded == 4 else "crf_splat_8",
            (blocks, copies, max(padded // 8, 1)),
            (THREADS, 1, 1),
            (*lists, beliefs, np.int32(geometry.points), quads, scale, rows, values),
            stream=stream,
        )
        blocks = _striding_blocks(geometry.capacity * padded // 4, THREADS)
        for axis in range(geometry.dimension + 1):
            along = memory["neighbours"] + 8 * axis * geometry.capacity
            arguments = (along, memory["vertices"], values, rows, quads, blurred)
            grid = (blocks, copies, 1)
            self._device.launch("crf_blur", grid, (THREADS, 1, 1), arguments, stream=stream)
            values, blurred = blurred, values
