"""Prefix sums and a stable radix sort on a device: the host schedule of sort.cuh."""

import numpy as np

from multisa.kernels.cuda.device import Device, Workspace, divide_up

THREADS = 256  # sort_threads
TILE = 2048  # sort_tile
DIGIT_BITS = 8  # log2 of sort_digits


class Sorter:
    """Sorts up to `largest` pairs of a uint32 key and a uint32 value in memory of its own.

    sorter.sort(count, below)      # of the pairs at sorter.keys and sorter.values
    """

    def __init__(self, device: Device, largest: int) -> None:
        """Allocate for `largest` pairs, 1 or more."""
        counts = divide_up(largest, TILE) << DIGIT_BITS
        sizes = dict.fromkeys(("keys0", "values0", "keys1", "values1"), 4 * largest)
        sizes |= {"counts": 4 * counts, "sums": 4 * divide_up(max(largest, counts), TILE), "total": 4}
        self._device = device
        self._memory = Workspace(device, sizes)
        self.size = self._memory.size
        self.keys, self.values = self._memory["keys0"], self._memory["values0"]
        self.total = self._memory["total"]

    def sort(self, count: int, below: int, stream: int) -> tuple[int, int]:
        """Queue sorting by key, equal keys keeping their order; return where keys and values will be.

        All keys must be less than `below`: its bits are what the sort looks at.
        """
        memory = self._memory
        source, target = (self.keys, self.values), (memory["keys1"], memory["values1"])
        bits = max((below - 1).bit_length(), 1)
        width = divide_up(bits, divide_up(bits, DIGIT_BITS))
        tiles = divide_up(count, TILE)
        grid, block = (tiles, 1, 1), (THREADS, 1, 1)
        for shift in range(0, bits, width):
            digit = (np.int32(count), np.int32(shift), np.int32(width), memory["counts"])
            self._device.launch("radix_count", grid, block, (source[0], *digit), stream=stream)
            self.scan(memory["counts"], tiles << width, stream)
            self._device.launch("radix_scatter", grid, block, (*source, *digit, *target), stream=stream)
            source, target = target, source
        return source

    def scan(self, values: int, count: int, stream: int) -> None:
        """Queue replacing uint32 [count] by its exclusive sums, and `total` by the sum of all.

        `count` is at most the larger of `largest` and the number of counts of its sort.
        """
        sums, block = self._memory["sums"], (THREADS, 1, 1)
        tiles = divide_up(count, TILE)
        whole = (values, np.int32(count), sums)
        self._device.launch("scan_tiles", (tiles, 1, 1), block, whole, stream=stream)
        self._device.launch("scan_sums", (1, 1, 1), block, (sums, np.int32(tiles), self.total), stream=stream)
        self._device.launch("scan_add", (tiles, 1, 1), block, whole, stream=stream)
