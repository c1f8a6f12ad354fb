"""Running networks and per-image work over many photographs on a few threads, resumably."""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.imaging.decode import read_image, resize_image, working_size
from multisa.runtime.progress import Progress
from multisa.training.data import Item

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


def for_each_item(
    work: Callable[[Item], None],
    items: Sequence[Item],
    made: Callable[[Item], tuple[Path, ...]],
    *,
    workers: int,
    title: str,
) -> None:
    """Call `work` on every item that lacks one of its files `made(item)`, on `workers` threads.

    `work` writes each of them atomically, so an interrupted stage goes on where it stopped. The first error
    ends the stage.
    """
    left = [item for item in items if not all(path.exists() for path in made(item))]
    with (
        _single_threaded_operators(workers),
        ThreadPoolExecutor(workers) as pool,
        Progress(len(items), title, initial=len(items) - len(left)) as bar,
    ):
        futures = [pool.submit(work, item) for item in left]
        try:
            for future in futures:
                future.result()
                bar.advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read_working_image(item: Item, long_side: int) -> UInt8:
    """Read a photograph as uint8 [H, W, 3], reduced so that its long side is at most `long_side`."""
    rgb = read_image(item.image).rgb
    size = working_size(rgb.shape[0], rgb.shape[1], long_side)
    return rgb if size == rgb.shape[:2] else resize_image(rgb, size)


def as_batch(image: UInt8) -> torch.Tensor:
    """uint8 [H, W, 3] -> tensor uint8 [1, H, W, 3]."""
    return torch.from_numpy(np.ascontiguousarray(image))[None]


def save_maps(path: Path, maps: Float32) -> None:
    """Write float32 [C, h, w] as a half-precision .npy file, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, maps.astype(np.float16), allow_pickle=False)
    write_bytes_atomically(path, buffer.getvalue())


def load_maps(path: Path) -> Float32:
    """Read what `save_maps` wrote as float32 [C, h, w]."""
    return np.asarray(np.load(path, allow_pickle=False), dtype=np.float32)


@contextmanager
def _single_threaded_operators(workers: int) -> Iterator[None]:
    # Images side by side on one thread each beat one image on all of them.
    before = torch.get_num_threads()
    torch.set_num_threads(max(before // workers, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
