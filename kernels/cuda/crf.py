"""The dense CRF of `multisa.kernels.dense_crf` on a device: batches of images of one size.

    crf = DeviceCRF(device, images, height, width, labels)
    crf.set_images(image_address)                  # builds the bilateral lattices
    crf.infer(probabilities_address, out_address)  # any number of times
    crf.check()                                    # waits, and raises what the device found wrong

Same model, same conventions; every address is device memory of the caller's. Results do not depend on the
order in which the device runs threads, nor on the other images of a batch. No figure of this module was
measured on a GPU: the kernels are compiled for devices, and run on the CPU by the test suite.
"""

import numpy as np

from multisa.kernels.cuda.device import Argument, Device, Schedule, Workspace, divide_up
from multisa.kernels.cuda.lattice import Lattice, LatticeBuilder, lattice_geometry
from multisa.kernels.dense_crf import PROBABILITY_FLOOR, CrfParameters
from multisa.kernels.stencil import check_integer

THREADS = 128  # a block of the kernels that take a pixel a thread
MAX_COPIES = 65535  # blocks along the second axis of a grid
REGISTER_LANES = (4, 8, 16, 24, 32)  # padded label counts that stay in registers

# What the bits of the error word (lattice.cuh) mean, from the lowest.
PROBLEMS = (
    "max_vertices: the images need more lattice vertices; the results are void; raise it or leave it out",
    "probabilities: got NaN or infinity, expected finite values",
    "labels: got a value of n_labels or above, expected 0..n_labels-1",
    "channels: got a value of `classes` or above, expected 0..classes-1, or -1 for no label",
)


def problems_of(word: int) -> str:
    """Say what the bits of an error word mean; nothing for 0."""
    return "; ".join(text for bit, text in enumerate(PROBLEMS) if word >> bit & 1)


def padded_labels(labels: int) -> int:
    """Return how many labels' memory and work `labels` take: kernels are compiled for a few counts."""
    return next((n for n in REGISTER_LANES if n >= labels), divide_up(labels, 8) * 8)


class DeviceCRF:
    """Dense CRFs of a batch of images of one size; all memory is allocated when it is made.

    A batch is `images` images, each with `problems` sets of `labels` labels (two for affinity labels). Calls
    share its memory: queue them on one stream, or wait between streams.
    """

    def __init__(
        self,
        device: Device,
        images: int,
        height: int,
        width: int,
        labels: int,
        parameters: CrfParameters | None = None,
        *,
        problems: int = 1,
        max_vertices: int | None = None,
    ) -> None:
        """Allocate for the worst image and build the spatial lattice.

        `max_vertices` bounds the vertices of all bilateral lattices together, and with them the memory:
        photos have far fewer than the worst case of six a pixel. Where they do not suffice, `check` says so.
        Raises ValueError where the sizes or deviations are out of range.
        """
        for name, value in (("images", images), ("height", height), ("width", width), ("labels", labels)):
            check_integer(name, value, minimum=1)
        check_integer("problems", problems, minimum=1)
        if max_vertices is not None:
            check_integer("max_vertices", max_vertices, minimum=1)
        copies = images * problems
        if copies > MAX_COPIES:
            raise ValueError(
                f"images x problems: got {copies}, expected at most {MAX_COPIES}; split the batch"
            )
        self.parameters = of = CrfParameters() if parameters is None else parameters
        self.images, self.height, self.width, self.labels = images, height, width, labels
        self.problems = problems
        self._device, self._copies, self._pixels = device, copies, height * width
        self._lanes = padded_labels(labels)
        deviations = (of.bilateral_sxy,) * 2 + (of.bilateral_srgb,) * 3
        spatial = lattice_geometry(1, height, width, (of.spatial_sxy,) * 2, lanes=self._lanes)
        bilateral = lattice_geometry(
            images, height, width, deviations, lanes=self._lanes, max_vertices=max_vertices
        )
        planes = 4 * copies * self._pixels
        sizes = {"beliefs": planes * self._lanes, "unaries": planes * labels, "error": 4}
        self._memory = Workspace(device, sizes)
        self._spatial = Lattice(device, spatial, copies, self._lanes)
        self._bilateral = Lattice(device, bilateral, problems, self._lanes)
        self._builder = LatticeBuilder(device, (spatial, bilateral), self._memory["error"])
        self._has_images = False
        device.fill(self._memory["error"], 0, 1)
        self._builder.insert(self._spatial, 0, 0)
        self._builder.finish(self._spatial, self._memory["beliefs"], 0)
        # Waits, so that whichever stream comes next finds the lattice built.
        self.check()
        self._finish_images = device.record(self._queue_finish)
        self._iterate: Schedule | None = device.record(self._queue_iterations) if of.iterations else None

    @property
    def size(self) -> int:
        """Device memory in bytes."""
        parts = (self._memory, self._spatial.memory, self._bilateral.memory, self._builder)
        return sum(part.size for part in parts)

    @property
    def error(self) -> int:
        """Device address of the word that `check` reads (`problems_of`), for who must not wait for it."""
        return self._memory["error"]

    def set_images(self, images: int, *, stream: int = 0) -> None:
        """Queue building the bilateral lattices of uint8 [images, height, width, 3] RGB at this address."""
        self._builder.insert(self._bilateral, images, stream)
        self._finish_images(stream)
        self._has_images = True

    def infer(
        self, probabilities: int, out: int, *, channels: int = 0, classes: int | None = None, stream: int = 0
    ) -> None:
        """Queue refining probabilities, float32 [problems, images, classes, height, width], into `out`.

        classes is `labels` unless `channels` is given: int32 [problems, images, labels], the distinct classes
        that are present in each image, -1 for none. Only these take part; the others are exactly 0 in `out`,
        which has the shape of the probabilities and may not overlap them. NaN, infinity and channels out of
        range are found by `check`.
        """
        classes = self.labels if classes is None else check_integer("classes", classes, minimum=1)
        if channels == 0 and classes != self.labels:
            raise ValueError(f"classes: got {classes} without channels, expected labels = {self.labels}")
        self._check_images()
        if channels:
            self._device.fill(out, 0, self._copies * classes * self._pixels, stream)
        sizes = (np.int32(classes), np.int32(self.labels), np.int32(self._pixels))
        targets = (np.float32(PROBABILITY_FLOOR), self._memory["unaries"], self._memory["error"])
        self._launch("crf_unary", (probabilities, channels, *sizes, *targets), stream)
        self._refine(out, channels, classes, stream)

    def infer_labels(
        self, labels: int, n_labels: int, out: int, *, confidence: float = 0.7, stream: int = 0
    ) -> None:
        """Queue refining hard labels, uint8 [problems, images, height, width] of 0..n_labels-1.

        Each is trusted with probability `confidence`, the others share the rest. `out` gets float32
        [problems, images, labels, height, width], 0 for labels from n_labels on. Values out of range are
        found by `check`.
        """
        if check_integer("n_labels", n_labels, minimum=1) > self.labels:
            raise ValueError(f"n_labels: got {n_labels}, expected at most labels = {self.labels}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: got {confidence}, expected a probability between 0 and 1")
        self._check_images()
        other = (1 - confidence) / (n_labels - 1) if n_labels > 1 else 1.0
        energies = (np.float32(-np.log(confidence)), np.float32(-np.log(other)))
        sizes = (np.int32(self.labels), np.int32(self._pixels))
        targets = (self._memory["unaries"], self._memory["error"])
        arguments = (labels, np.int32(n_labels), *energies, *sizes, *targets)
        self._launch("crf_unary_of_labels", arguments, stream)
        self._refine(out, 0, self.labels, stream)

    def check(self, *, stream: int = 0) -> None:
        """Wait for `stream`; raise ValueError if an input since the last check was wrong."""
        error = np.zeros(1, dtype=np.uint32)
        self._device.download(self._memory["error"], error, stream)
        if error[0]:
            self._device.fill(self._memory["error"], 0, 1, stream)
            raise ValueError(problems_of(int(error[0])))

    def _check_images(self) -> None:
        """Raise ValueError where there is nothing to infer on."""
        if not self._has_images:
            raise ValueError("images: got none, expected a call of set_images before")

    def _refine(self, out: int, channels: int, classes: int, stream: int) -> None:
        """Queue the mean field from the unaries in memory."""
        if self._iterate:
            self._iterate(stream)
            self._queue_filters(stream)
        self._queue_update(self._iterate is not None, out, channels, classes, stream)

    def _queue_finish(self, stream: int) -> None:
        """Queue what follows the insertion of the images: it reads and writes this object's memory alone."""
        self._builder.finish(self._bilateral, self._memory["beliefs"], stream)

    def _queue_iterations(self, stream: int) -> None:
        """Queue all updates but the last, and all filters but the last."""
        for iteration in range(self.parameters.iterations):
            if iteration:
                self._queue_filters(stream)
            self._queue_update(iteration > 0, 0, 0, self.labels, stream)

    def _queue_filters(self, stream: int) -> None:
        """Queue filtering the beliefs with both kernels."""
        self._spatial.filter(self._memory["beliefs"], self._copies, self._lanes, stream)
        self._bilateral.filter(self._memory["beliefs"], self.problems, self._lanes, stream)

    def _queue_update(self, filtered: bool, out: int, channels: int, classes: int, stream: int) -> None:
        """Queue equation 4 of the paper for every pixel, into the beliefs or, as the last, into `out`."""
        of = self.parameters
        lattices: list[Argument] = []
        for lattice, compat in ((self._spatial, of.spatial_compat), (self._bilateral, of.bilateral_compat)):
            memory = lattice.memory
            lattices += [memory["vertex_of"], memory["weights"], lattice.values]
            lattices += [np.int32(lattice.geometry.capacity), np.float32(compat)]
        sizes = (self.images, self._pixels, self.labels, self._lanes)
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
        kernel = self._lanes if self._lanes in REGISTER_LANES else "any"
        self._launch(f"crf_update_{kernel}", arguments, stream)

    def _launch(self, name: str, arguments: tuple[Argument, ...], stream: int) -> None:
        """Queue a kernel of one thread a pixel of each copy."""
        grid = (divide_up(self._pixels, THREADS), self._copies, 1)
        self._device.launch(name, grid, (THREADS, 1, 1), arguments, stream=stream)
