"""Running networks and other work over many images: devices, memory, threads, resumable loops, map files."""

import ctypes
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from multisa.runtime.errors import BackendUnavailable
from multisa.runtime.files import write_bytes_atomically
from multisa.runtime.predict.postprocess import Float32, UInt8
from multisa.runtime.progress import Progress
from multisa.training.config import TrainConfig
from multisa.training.data import Item
from multisa.training.distributed import barrier, local_rank, rank, world_size

# Parameters of mallopt(3), from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def torch_device(config: TrainConfig) -> torch.device:
    """The device a configuration asks for, of this rank. Raises BackendUnavailable for CUDA where torch has none."""
    if config.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", local_rank())  # by number: threads begin on GPU 0
    if config.device == "cuda":
        raise BackendUnavailable(
            f"device 'cuda': torch {torch.__version__} finds no GPU; install a CUDA build of torch and a "
            "driver, or set device=auto"
        )
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for this process instead of returning it to the system.

    Every training step frees and allocates the same large tensors. By default glibc returns each to the system and
    gets it back page by page: a step of the segmenter of `lite0` on two CPU cores took 1.29 times as long. Results
    do not change. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def for_each_item(  # more than six parameters: what to do, with what, and how
    work: Callable[..., None],
    items: Sequence[Item],
    folder: Path,
    suffixes: tuple[str, ...],
    *,
    workers: int,
    title: str,
) -> None:
    """Call `work` on every item that lacks one of its files, on `workers` threads; the ranks divide the items.

    An item has a file `folder`/ID + suffix for each suffix; `work` gets the item and these paths. It writes
    each file atomically, so an interrupted stage resumes where it stopped. The first error ends the stage. Returns
    when every rank is ready.
    """
    items = items[rank() :: world_size()]
    tasks = [(item, [folder / f"{item.id}{suffix}" for suffix in suffixes]) for item in items]
    left = [(item, paths) for item, paths in tasks if not all(path.exists() for path in paths)]
    with (
        _single_threaded_operators(workers),
        ThreadPoolExecutor(workers) as pool,
        Progress(len(items), title, initial=len(items) - len(left)) as bar,
    ):
        futures = [pool.submit(work, item, *paths) for item, paths in left]
        try:
            for future in futures:
                future.result()
                bar.advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    barrier()


def as_batch(image: UInt8) -> torch.Tensor:
    """uint8 [H, W, 3] -> tensor uint8 [1, H, W, 3]."""
    return torch.from_numpy(np.ascontiguousarray(image))[None]


def save_maps(path: Path, maps: Float32) -> None:
    """Write float32 [C, h, w] as a half-precision .npy file, atomically."""
    save_array(path, maps.astype(np.float16))


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a .npy file atomically."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes_atomically(path, buffer.getvalue())


def load_maps(path: Path) -> Float32:
    """Read what `save_maps` wrote as float32 [C, h, w]."""
    return np.asarray(np.load(path, allow_pickle=False), dtype=np.float32)


@contextmanager
def _single_threaded_operators(workers: int) -> Iterator[None]:
    # Several images at a time, one thread each, are faster than one image on all threads.
    before = torch.get_num_threads()
    torch.set_num_threads(max(before // workers, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
