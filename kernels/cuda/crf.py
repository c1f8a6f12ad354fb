"""The dense CRF of `multisa.kernels.dense_crf` on a device: batches of images of one size.

    crf = DeviceCRF(device, CrfShape(images=8, height=375, width=500, labels=21))
    crf.set_images(image_address)                  # builds the bilateral lattices
    crf.infer(probabilities_address, out_address)  # any number of times
    crf.check()                                    # waits; raises ValueError if an input was invalid

Model and conventions are the same; every address is device memory of the caller. Results do not depend on
the order in which the device runs threads, nor on the other images of a batch.
"""

from dataclasses import dataclass

import numpy as np

from multisa.kernels.common.checks import check_integer
from multisa.kernels.common.crf import PROBABILITY_FLOOR, CrfParameters
from multisa.kernels.cuda.device import (
    LARGEST_GRID_YZ,
    Argument,
    Device,
    ErrorWord,
    Schedule,
    Workspace,
    check_positive,
    divide_up,
)
from multisa.kernels.cuda.lattice import Lattice, LatticeBuilder, lattice_geometry

THREADS = 128  # a block of the kernels with one thread per pixel
REGISTER_LABELS = (4, 8, 16, 24, 32)  # padded label counts that stay in registers

# Bits of the error word, as in lattice.cuh.
CRF_ERRORS = {
    1: "max_vertices: the images need more lattice vertices; the results are void; raise it or leave it out",
    2: "probabilities: got NaN or infinity, expected finite values",
    4: "labels: got a value of n_labels or above, expected 0..n_labels-1",
    8: "channels: got a value of `classes` or above, expected 0..classes-1, or -1 for no label",
}


@dataclass(frozen=True)
class CrfShape:
    """A batch of images of one size, each with `problems` sets of `labels` labels; all at least 1.

    Two problems serve affinity labels: one CRF with more, one with less background.
    """

    images: int
    height: int
    width: int
    labels: int
    problems: int = 1

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError, naming the field, for an invalid size."""
        check_positive(self)
        copies = self.images * self.problems
        if copies > LARGEST_GRID_YZ:
            raise ValueError(f"images x problems: got {copies}, expected at most {LARGEST_GRID_YZ}; split the batch")


def padded_labels(labels: int) -> int:
    """Return the number of labels whose memory and work `labels` take: kernels exist for a few counts."""
    return next((n for n in REGISTER_LABELS if n >= labels), divide_up(labels, 8) * 8)


class DeviceCRF:
    """Dense CRFs of a batch of images of one size. Allocates all of its memory once.

    Calls share that memory: queue them on one stream, or wait between streams.
    """

    def __init__(
        self,
        device: Device,
        shape: CrfShape,
        parameters: CrfParameters | None = None,
        *,
        max_vertices: int | None = None,
    ) -> None:
        """Allocate for the worst image and build the spatial lattice.

        `max_vertices` bounds the vertices of all bilateral lattices together, and with them the memory:
        photos have far fewer than the worst case of six per pixel. `check` raises if they do not suffice.
        Raises ValueError if the sizes or deviations are out of range.
        """
        if max_vertices is not None:
            check_integer("max_vertices", max_vertices, minimum=1)
        self.shape = shape
        self.parameters = CrfParameters() if parameters is None else parameters
        self._device = device
        self._copies = shape.images * shape.problems
        self._pixels = shape.height * shape.width
        self._padded = padded_labels(shape.labels)
        size = (shape.height, shape.width)
        spatial = lattice_geometry(1, *size, (self.parameters.spatial_sxy,) * 2, padded=self._padded)
        deviations = (self.parameters.bilateral_sxy,) * 2 + (self.parameters.bilateral_srgb,) * 3
        bilateral = lattice_geometry(shape.images, *size, deviations, padded=self._padded, max_vertices=max_vertices)
        planes = 4 * self._copies * self._pixels
        self._memory = Workspace(device, {"beliefs": planes * self._padded, "unaries": planes * shape.labels})
        self._errors = ErrorWord(device, CRF_ERRORS)
        self._spatial = Lattice(device, spatial, self._copies, self._padded)
        self._bilateral = Lattice(device, bilateral, shape.problems, self._padded)
        self._builder = LatticeBuilder(device, (spatial, bilateral), self._errors.pointer)
        self._has_images = False
        self._builder.insert(self._spatial, 0, 0)
        self._builder.finish(self._spatial, self._memory["beliefs"], 0)
        self.check()  # waits, so that the lattice is built for every stream
        self._finish_images = device.record(self._queue_finish)
        self._iterate: Schedule | None = None
        if self.parameters.iterations:
            self._iterate = device.record(self._queue_iterations)

    @property
    def size(self) -> int:
        """Device memory in bytes."""
        parts = (self._memory, self._errors, self._spatial.memory, self._bilateral.memory, self._builder)
        return sum(part.size for part in parts)

    @property
    def error(self) -> int:
        """Device address of the word that `check` reads (CRF_ERRORS), for callers that must not wait."""
        return self._errors.pointer

    def set_images(self, images: int, *, stream: int = 0) -> None:
        """Queue building the bilateral lattices of uint8 [images, height, width, 3] RGB at this address."""
        self._builder.insert(self._bilateral, images, stream)
        self._finish_images(stream)
        self._has_images = True

    def infer(
        self, probabilities: int, out: int, *, channels: int = 0, classes: int | None = None, stream: int = 0
    ) -> None:
        """Queue refining probabilities, float32 [problems, images, classes, height, width], into `out`.

        `classes` equals the shape's labels unless `channels` is given: int32 [problems, images, labels], the
        distinct classes that are present in each image, -1 for none. The other classes are left out and are
        exactly 0 in `out`, which has the shape of the probabilities and must not overlap them. `check` raises
        for NaN, infinity and channels out of range.
        """
        labels = self.shape.labels
        classes = labels if classes is None else check_integer("classes", classes, minimum=1)
        if channels == 0 and classes != labels:
            raise ValueError(f"classes: got {classes} without channels, expected labels = {labels}")
        self._check_images()
        if channels:
            self._device.fill(out, 0, self._copies * classes * self._pixels, stream)
        sizes = (np.int32(classes), np.int32(labels), np.int32(self._pixels))
        targets = (np.float32(PROBABILITY_FLOOR), self._memory["unaries"], self._errors.pointer)
        self._launch("crf_unary", (probabilities, channels, *sizes, *targets), stream)
        self._refine(out, channels, classes, stream)

    def infer_labels(self, labels: int, n_labels: int, out: int, *, confidence: float = 0.7, stream: int = 0) -> None:
        """Queue refining hard labels, uint8 [problems, images, height, width] of 0..n_labels-1.

        Each is trusted with probability `confidence`; the others share the rest. `out` receives float32
        [problems, images, labels, height, width], 0 for labels from n_labels on. `check` raises for values
        out of range.
        """
        if check_integer("n_labels", n_labels, minimum=1) > self.shape.labels:
            raise ValueError(f"n_labels: got {n_labels}, expected at most labels = {self.shape.labels}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: got {confidence}, expected a probability between 0 and 1")
        self._check_images()
        other = (1 - confidence) / (n_labels - 1) if n_labels > 1 else 1.0
        energies = (np.float32(-np.log(confidence)), np.float32(-np.log(other)))
        sizes = (np.int32(self.shape.labels), np.int32(self._pixels))
        targets = (self._memory["unaries"], self._errors.pointer)
        arguments = (labels, np.int32(n_labels), *energies, *sizes, *targets)
        self._launch("crf_unary_of_labels", arguments, stream)
        self._refine(out, 0, self.shape.labels, stream)

    def check(self, *, stream: int = 0) -> None:
        """Wait for `stream`. Raise ValueError if an input since the last check was invalid."""
        self._errors.check(stream)

    def _check_images(self) -> None:
        if not self._has_images:
            raise ValueError("images: got none, expected a call of set_images before")

    def _refine(self, out: int, channels: int, classes: int, stream: int) -> None:
        """Queue the mean field, starting from the unaries in memory."""
        if self._iterate:
            self._iterate(stream)
            self._queue_filters(stream)
        self._queue_update(self._iterate is not None, out, channels, classes, stream)

    def _queue_finish(self, stream: int) -> None:
        """Queue the steps after the insertion of the images; they use this object's memory only."""
        self._builder.finish(self._bilateral, self._memory["beliefs"], stream)

    def _queue_iterations(self, stream: int) -> None:
        """Queue all updates but the last, and all filters but the last."""
        for iteration in range(self.parameters.iterations):
            if iteration:
                self._queue_filters(stream)
            self._queue_update(iteration > 0, 0, 0, self.shape.labels, stream)

    def _queue_filters(self, stream: int) -> None:
        self._spatial.filter(self._memory["beliefs"], self._copies, self._padded, stream)
        self._bilateral.filter(self._memory["beliefs"], self.shape.problems, self._padded, stream)

    def _queue_update(self, filtered: bool, out: int, channels: int, classes: int, stream: int) -> None:
        """Queue equation 4 of the paper for every pixel, into the beliefs or, in the last step, `out`."""
        compats = (self.parameters.spatial_compat, self.parameters.bilateral_compat)
        lattices: list[Argument] = []
        for lattice, compat in zip((self._spatial, self._bilateral), compats, strict=True):
            memory = lattice.memory
            lattices += [memory["vertex_of"], memory["weights"], lattice.values]
            lattices += [np.int32(lattice.geometry.capacity), np.float32(compat)]
        sizes = (self.shape.images, self._pixels, self.shape.labels, self._padded)
        arguments = (
            *lattices,
            np.int32(filtered),
            self._memory["unaries"],
            *(np.int32(size) for size in sizes),
            self._memory["beliefs"],
            channels,
            np.int32(classes),
            out,
        )
        kernel = self._padded if self._padded in REGISTER_LABELS else "any"
        self._launch(f"crf_update_{kernel}", arguments, stream)

    def _launch(self, name: str, arguments: tuple[Argument, ...], stream: int) -> None:
        """Queue a kernel with one thread per pixel of each copy."""
        grid = (divide_up(self._pixels, THREADS), self._copies, 1)
        self._device.launch(name, grid, (THREADS, 1, 1), arguments, stream=stream)
