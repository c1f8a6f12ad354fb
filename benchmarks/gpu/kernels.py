"""The CUDA kernels at sizes of use, timed beside the CPU's and the peers' ways, with errors beside the times.

    python -m multisa.benchmarks.gpu.kernels --output kernels.json

"resident" is a call on arrays that lie on the GPU, timed to its end; "host" one on NumPy arrays, copies
included. Dense squaring is what psa and irn do, in PyTorch on the same GPU.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.benchmarks.harness import Times, environment, interleave
from multisa.benchmarks.scenes import class_probabilities, photograph, photograph_bytes, smooth_scores
from multisa.kernels import (
    CrfParameters,
    affinity_from_features,
    dense_crf,
    random_walk,
    random_walk_reference,
    stencil_offsets,
)
from multisa.kernels.common.stencil import pair_slices
from multisa.kernels.common.walk import WalkSettings, chebyshev_degree
from multisa.kernels.cuda import calls
from multisa.kernels.cuda.calls import DeviceArray
from multisa.kernels.cuda.device import Device
from multisa.kernels.cuda.pycuda_device import DeviceUnavailableError
from multisa.runtime.errors import BackendUnavailable, ParityError
from multisa.runtime.files import write_json_atomically

Float32 = npt.NDArray[np.float32]
SETTINGS, CRF = WalkSettings(), CrfParameters()
# The device keeps the walk's weights in fp16, which the reference does not round; the CRF's sums are in
# another order.
WALK_TOLERANCE, CRF_AGREEMENT = 2e-4, 0.9999
WALKS = ((1, 4, 64), (16, 4, 64), (1, 4, 128), (16, 21, 128))  # images, channels, side
CRFS = ((3, 375, 500), (21, 375, 500))  # labels, height, width
SLOW = ("cpu, one thread", "pydensecrf")  # of which three repeats are enough
DENSE_SIDE = 64  # up to which the dense matrix is squared


def on_device(device: Device, array: npt.NDArray[Any]) -> DeviceArray:
    """Copy an array to new memory of the device."""
    there = DeviceArray(device, array.shape, array.dtype.type)
    device.upload(there.pointer, np.ascontiguousarray(array))
    return there


def wait(device: Device, array: DeviceArray) -> None:
    """Wait until what was queued for the array is done."""
    device.download(array.pointer, np.empty(0, array.dtype))


def walk_row(device: Device, images: int, channels: int, side: int, repeats: int) -> dict[str, Any]:
    """The random walk of a batch of the same grid: times, ratios to the resident call, error to float64."""
    one = affinity_from_features(photograph(side, side), radius=SETTINGS.radius)
    affinity = np.repeat(one[None], images, axis=0)
    scores = np.stack([smooth_scores(channels, side, side, seed=seed) for seed in range(images)])
    there = on_device(device, scores), on_device(device, affinity)
    out = DeviceArray(device, scores.shape)

    def resident() -> None:
        calls.random_walk_on_device(*there, SETTINGS, out, device)
        wait(device, out)

    ways: dict[str, Callable[[], object]] = {
        "resident": resident,
        "host": lambda: calls.random_walk_on_device(scores, affinity, SETTINGS, None, device),
        SLOW[0]: lambda: random_walk(scores, affinity),
    }
    dense = dense_squaring(one, scores) if side <= DENSE_SIDE else None
    if dense:
        ways["dense squaring, PyTorch on the GPU"] = dense
    times = interleave(ways, repeats=repeats, slow={SLOW[0]: min(repeats, 3)})
    resident()
    walked = out.numpy()
    expected = random_walk_reference(scores, affinity)
    planes, pixels = len(stencil_offsets(SETTINGS.radius)), images * side * side
    # Each product reads the fp16 weights, the state and the one before, and the sum; it writes state and sum.
    moved = chebyshev_degree(SETTINGS.steps) * pixels * (2 * planes + 4 * 5 * channels)
    return {
        "kernel": "random_walk",
        "shape": {"images": images, "channels": channels, "side": side},
        "ways": described(times),
        "max_error": float(np.abs(walked - expected).max()),
        "label_agreement": float((walked.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        "bytes": moved,
    }


def dense_squaring(affinity: Float32, scores: Float32) -> Callable[[], object] | None:
    """The peers' walk of each image in PyTorch on the GPU, to its end; None where PyTorch reaches no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    height, width = affinity.shape[-2:]
    index = np.arange(height * width).reshape(height, width)
    matrix = np.eye(height * width, dtype=np.float32)
    for plane, offset in zip(affinity, stencil_offsets(SETTINGS.radius), strict=True):
        source, target = pair_slices(offset, (height, width))
        edges = plane[source].ravel() ** np.float32(SETTINGS.beta)
        matrix[index[source].ravel(), index[target].ravel()] = edges
        matrix[index[target].ravel(), index[source].ravel()] = edges
    there = torch.from_numpy(matrix / matrix.sum(axis=1, keepdims=True)).cuda()
    flat = torch.from_numpy(scores.reshape(len(scores), scores.shape[1], -1)).cuda()
    squarings = SETTINGS.steps.bit_length() - 1

    def run() -> None:
        for image in flat:
            power = there
            for _ in range(squarings):
                power = power @ power
            torch.matmul(image, power.T)
        torch.cuda.synchronize()

    return run


def crf_row(device: Device, labels: int, height: int, width: int, repeats: int) -> dict[str, Any]:
    """The dense CRF of one photograph: times, ratios to the resident call, labels against the CPU's."""
    image, probabilities = photograph_bytes(height, width), class_probabilities(labels, height, width)
    there = on_device(device, image), on_device(device, probabilities)
    kept: list[DeviceArray] = []

    def resident() -> None:
        kept[:] = [calls.dense_crf_on_device(*there, CRF, device)]
        wait(device, kept[0])

    ways: dict[str, Callable[[], object]] = {
        "resident": resident,
        "host": lambda: calls.dense_crf_on_device(image, probabilities, CRF, device),
        SLOW[0]: lambda: dense_crf(image, probabilities),
        SLOW[1]: lambda: dense_crf(image, probabilities, backend="pydensecrf"),
    }
    times = interleave(ways, repeats=repeats, slow=dict.fromkeys(SLOW, min(repeats, 3)))
    made, expected = kept[0].numpy(), dense_crf(image, probabilities)
    return {
        "kernel": "dense_crf",
        "shape": {"labels": labels, "height": height, "width": width},
        "ways": described(times),
        "max_error": float(np.abs(made - expected).max()),
        "label_agreement": float((made.argmax(axis=0) == expected.argmax(axis=0)).mean()),
    }


def described(times: dict[str, Times]) -> dict[str, dict[str, float | int]]:
    """Milliseconds of each way, and its median over that of the resident call."""
    ours = times["resident"].median
    return {
        name: {**case.to_json(), "times_ours": round(case.median / ours, 2)} for name, case in times.items()
    }


def copied_bytes_per_second() -> float | None:
    """Bytes that a copy in the GPU's memory reads and writes in a second; None where PyTorch reaches none."""
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.ones(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(16):
            target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(16 * 2 * source.numel() / min(seconds))


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """Where a kernel is further from its reference than it may be."""
    found = []
    for row in rows:
        where = f"{row['kernel']} {row['shape']}"
        # Written so that NaN is a problem, too.
        if row["kernel"] == "random_walk" and not row["max_error"] <= WALK_TOLERANCE:
            found.append(f"{where}: error {row['max_error']:.2g}, expected at most {WALK_TOLERANCE}")
        if row["kernel"] == "dense_crf" and not row["label_agreement"] >= CRF_AGREEMENT:
            found.append(
                f"{where}: {row['label_agreement']:.4%} of labels agree, expected {CRF_AGREEMENT:.2%}"
            )
    return found


def measure(device: Device, *, quick: bool) -> dict[str, Any]:
    """All rows, with the GPU's floor of the walk: the bytes that it moves over the rate of a copy."""
    repeats = 5 if quick else 20
    rows = [walk_row(device, *shape, repeats) for shape in (WALKS[:2] if quick else WALKS)]
    rows += [crf_row(device, *shape, repeats) for shape in (CRFS[:1] if quick else CRFS)]
    rate = copied_bytes_per_second()
    for row in rows:
        if rate and "bytes" in row:
            row["bytes_floor_ms"] = round(1000 * row["bytes"] / rate, 4)
    return {
        "environment": environment("torch", "pycuda", "pydensecrf2"),
        "settings": {"walk": asdict(SETTINGS), "crf": asdict(CRF)},
        "copied_bytes_per_second": rate,
        "rows": rows,
        "problems": problems(rows),
    }


def make_parser() -> argparse.ArgumentParser:
    """The options of `main`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="the smaller sizes, fewer repeats")
    return parser


def main(arguments: list[str]) -> int:
    """Measure, write; 3 where a kernel is further from its reference than it may be, 5 without a GPU."""
    options = make_parser().parse_args(arguments)
    try:
        device = calls.default_device()
    except DeviceUnavailableError as error:
        print(f"error: {error}")
        return BackendUnavailable.exit_code
    results = measure(device, quick=options.quick)
    write_json_atomically(options.output, results)
    for row in results["rows"]:
        print(row)
    if results["problems"]:
        print(f"error: {'; '.join(results['problems'])}")
        return ParityError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
