from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

def walk(
    scores: npt.NDArray[np.float32],
    affinity: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
    radius: int,
    beta: float,
    margin: int,
    steps: int,
    coefficients: Sequence[float],
) -> bool: ...
def affinity(map: npt.NDArray[np.float32], out: npt.NDArray[np.float32], radius: int, boundary: bool) -> bool: ...

class Lattice:
    vertices: int

class DenseCrf:
    def infer(
        self,
        probabilities: npt.NDArray[np.float32],
        labels: Sequence[int],
        out: npt.NDArray[np.float32],
        iterations: int,
    ) -> None: ...
    def infer_labels(
        self, labels: npt.NDArray[np.uint8], confidence: float, out: npt.NDArray[np.float32], iterations: int
    ) -> None: ...

def spatial_lattice(height: int, width: int, sxy: float) -> Lattice: ...
def dense_crf(
    image: npt.NDArray[np.uint8],
    spatial: Lattice,
    sxy: float,
    srgb: float,
    bilateral_compat: float,
    spatial_compat: float,
) -> DenseCrf: ...
def encode_rle(
    mask: npt.NDArray[np.uint8],
) -> list[tuple[int, int, tuple[int, int, int, int], npt.NDArray[np.uint32], bytes, npt.NDArray[np.uint32]]]: ...
def deflate_mask(mask: npt.NDArray[np.uint8]) -> bytes: ...
def histogram(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]: ...
def joint_histogram(rows: npt.NDArray[np.uint8], columns: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]: ...
def enlarge(
    probabilities: npt.NDArray[np.float32],
    ids: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.uint8],
    confidence: npt.NDArray[np.uint8],
) -> bool: ...
def absorb_small_parts(
    mask: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8], min_pixels: int, kept: npt.NDArray[np.uint8]
) -> None: ...
def peak_multiply_adds(seconds: float) -> float: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def choose_instruction_set(name: str) -> None: ...
