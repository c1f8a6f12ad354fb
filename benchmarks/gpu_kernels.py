"""The CUDA kernels at realistic sizes, timed against the CPU and the literature's way, with errors.

    python -m multisa.benchmarks.gpu_kernels --output kernels.json

"resident" is a call on arrays in GPU memory, timed until it is finished; "host" one on NumPy arrays, copies
included. "dense squaring" is what psa and irn do, in PyTorch on the same GPU; "interpolate and max" is what enlarging
probabilities takes there. Exit code 3 where a kernel is
too far from its reference, 5 without a usable GPU.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multisa.benchmarks.harness import Times, environment, interleave, with_ratios
from multisa.benchmarks.kernels import transition
from multisa.benchmarks.synthetic_images import class_probabilities, image_bytes, image_features, smooth_scores
from multisa.kernels import (
    CrfParameters,
    affinity_from_features,
    dense_crf,
    enlarge_probabilities,
    random_walk,
    random_walk_reference,
)
from multisa.kernels.common.checks import Float32
from multisa.kernels.common.walk import WalkSettings
from multisa.kernels.cuda import calls
from multisa.kernels.cuda.calls import DeviceArray
from multisa.kernels.cuda.device import Device
from multisa.kernels.cuda.pycuda_device import DeviceUnavailableError
from multisa.runtime.errors import BackendUnavailable, ParityError
from multisa.runtime.files import write_json_atomically

SETTINGS = WalkSettings()
CRF = CrfParameters()
# The device keeps the walk's weights in fp16, unlike the reference; the CRF sums in another order.
WALK_TOLERANCE = 2e-4
CRF_AGREEMENT = 0.9999
ENLARGE_AGREEMENT = 0.9999  # two classes may differ by less than rounding
WALKS = ((1, 4, 64), (16, 4, 64), (1, 4, 128), (16, 21, 128))  # images, channels, side
CRFS = ((3, 375, 500), (21, 375, 500))  # labels, height, width
ENLARGED = ((7, (94, 125), (375, 500)), (7, (96, 128), (3000, 4000)))  # labels, grid, image
ON_CPU = "cpu, one thread"
SLOW_REPEATS = 3  # of ways on the CPU
DENSE_SIDE = 64  # largest grid whose dense matrix is squared


def on_device(device: Device, array: npt.NDArray[Any]) -> DeviceArray:
    """Copy an array to newly allocated memory of the device."""
    copy = DeviceArray(device, array.shape, array.dtype.type)
    device.upload(copy.pointer, np.ascontiguousarray(array))
    return copy


def wait(device: Device, array: DeviceArray) -> None:
    """Wait until the queued work on the array is finished."""
    device.download(array.pointer, np.empty(0, array.dtype))


def walk_row(device: Device, images: int, channels: int, side: int, repeats: int) -> dict[str, Any]:
    """The random walk of a batch on one grid: times, ratios to the resident call, error against float64."""
    import torch

    one = affinity_from_features(image_features(side, side), radius=SETTINGS.radius)
    affinity = np.repeat(one[None], images, axis=0)
    scores = np.stack([smooth_scores(channels, side, side, seed=seed) for seed in range(images)])
    inputs = (on_device(device, scores), on_device(device, affinity))
    out = DeviceArray(device, scores.shape)

    def resident() -> None:
        calls.random_walk_on_device(*inputs, SETTINGS, out, device)
        wait(device, out)

    ways: dict[str, Callable[[], object]] = {
        "resident": resident,
        "host": lambda: calls.random_walk_on_device(scores, affinity, SETTINGS, None, device),
        ON_CPU: lambda: random_walk(scores, affinity),
    }
    if side <= DENSE_SIDE and torch.cuda.is_available():
        ways["dense squaring, PyTorch on the GPU"] = dense_squaring(one, scores)
    times = interleave(ways, repeats=repeats, slow={ON_CPU: min(repeats, SLOW_REPEATS)})
    resident()
    shape = {"images": images, "channels": channels, "side": side}
    expected = random_walk_reference(scores, affinity)
    return result("random_walk", shape, times, out.numpy(), expected)


def dense_squaring(affinity: Float32, scores: Float32) -> Callable[[], object]:
    """The literature's walk of each image in PyTorch on the GPU, until it is finished."""
    import torch

    matrix = torch.from_numpy(transition(affinity, SETTINGS).toarray()).cuda()
    flat = torch.from_numpy(scores.reshape(len(scores), scores.shape[1], -1)).cuda()

    def run() -> None:
        for image in flat:
            power = matrix
            for _ in range(SETTINGS.steps.bit_length() - 1):
                power = power @ power
            torch.matmul(image, power.T)
        torch.cuda.synchronize()

    return run


def crf_row(device: Device, labels: int, height: int, width: int, repeats: int) -> dict[str, Any]:
    """The dense CRF of one image: times, ratios to the resident call, labels against the CPU's."""
    image = image_bytes(height, width)
    probabilities = class_probabilities(labels, height, width)
    inputs = (on_device(device, image), on_device(device, probabilities))
    made: list[DeviceArray] = []

    def resident() -> None:
        made[:] = [calls.dense_crf_on_device(*inputs, CRF, device)]
        wait(device, made[0])

    ways: dict[str, Callable[[], object]] = {
        "resident": resident,
        "host": lambda: calls.dense_crf_on_device(image, probabilities, CRF, device),
        ON_CPU: lambda: dense_crf(image, probabilities),
        "pydensecrf": lambda: dense_crf(image, probabilities, backend="pydensecrf"),
    }
    slow = dict.fromkeys((ON_CPU, "pydensecrf"), min(repeats, SLOW_REPEATS))
    times = interleave(ways, repeats=repeats, slow=slow)
    shape = {"labels": labels, "height": height, "width": width}
    return result("dense_crf", shape, times, made[0].numpy(), dense_crf(image, probabilities))


def enlarge_row(
    device: Device, labels: int, grid: tuple[int, int], size: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """Labels and confidences of an image from probabilities on a grid: times, ratios, and both against the CPU's."""
    import torch

    probabilities = class_probabilities(labels, *grid)
    source = on_device(device, probabilities)
    made: list[tuple[DeviceArray, DeviceArray]] = []

    def resident() -> None:
        made[:] = [calls.enlarge_on_device(source, size, tuple(range(labels)), device)]
        wait(device, made[0][0])

    ways: dict[str, Callable[[], object]] = {
        "resident": resident,
        "host": lambda: calls.enlarge_on_device(probabilities, size, tuple(range(labels)), device),
        ON_CPU: lambda: enlarge_probabilities(probabilities, size),
    }
    if torch.cuda.is_available():
        ways["interpolate and max, PyTorch on the GPU"] = interpolate_and_max(probabilities, size)
    times = interleave(ways, repeats=repeats, slow={ON_CPU: min(repeats, SLOW_REPEATS)})
    mask, confidence = (each.numpy() for each in made[0])
    expected, sure = enlarge_probabilities(probabilities, size)
    return {
        "kernel": "enlarge",
        "shape": {"labels": labels, "grid": grid, "size": size},
        "ways": with_ratios(times, "resident"),
        "max_error": float(np.abs(confidence.astype(np.int16) - sure).max()) / 255,
        "label_agreement": float((mask == expected).mean()),
    }


def interpolate_and_max(probabilities: Float32, size: tuple[int, int]) -> Callable[[], object]:
    """`enlarge_probabilities` in PyTorch on the GPU, until it is finished."""
    import torch

    source = torch.from_numpy(probabilities)[None].cuda()

    def run() -> None:
        confidence, labels = torch.nn.functional.interpolate(source, size=size, mode="bilinear").max(1)
        labels.to(torch.uint8), (confidence * 255 + 0.5).to(torch.uint8)
        torch.cuda.synchronize()

    return run


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """Where a kernel is too far from its reference; NaN counts as too far."""
    found = []
    for row in rows:
        where = f"{row['kernel']} {row['shape']}: got"
        error, agreement = row["max_error"], row["label_agreement"]
        if row["kernel"] == "random_walk" and not error <= WALK_TOLERANCE:
            found.append(f"{where} error {error:.2g}, expected at most {WALK_TOLERANCE}")
        needed = {"dense_crf": CRF_AGREEMENT, "enlarge": ENLARGE_AGREEMENT}.get(row["kernel"])
        if needed is not None and not agreement >= needed:
            found.append(f"{where} {agreement:.4%} of labels equal, expected {needed:.2%}")
    return found


def result(
    kernel: str, shape: dict[str, int], times: Mapping[str, Times], got: Float32, wanted: npt.NDArray[Any]
) -> dict[str, Any]:
    """A row: times, ratios to the resident call, and the difference from the reference."""
    return {
        "kernel": kernel,
        "shape": shape,
        "ways": with_ratios(times, "resident"),
        "max_error": float(np.abs(got - wanted).max()),
        "label_agreement": float((got.argmax(axis=-3) == wanted.argmax(axis=-3)).mean()),
    }


def measure(device: Device, *, quick: bool) -> dict[str, Any]:
    """All rows, and what is too far from its reference."""
    repeats = 5 if quick else 20
    rows = [walk_row(device, *shape, repeats) for shape in (WALKS[:2] if quick else WALKS)]
    rows += [crf_row(device, *shape, repeats) for shape in (CRFS[:1] if quick else CRFS)]
    rows += [enlarge_row(device, *shape, repeats) for shape in (ENLARGED[:1] if quick else ENLARGED)]
    return {
        "environment": environment("torch", "pycuda", "pydensecrf2", quick=quick),
        "settings": {"walk": asdict(SETTINGS), "crf": asdict(CRF)},
        "rows": rows,
        "problems": problems(rows),
    }


def main(arguments: list[str]) -> int:
    """Measure and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="the smaller sizes, fewer repeats")
    options = parser.parse_args(arguments)
    try:
        device = calls.default_device()
    except DeviceUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return BackendUnavailable.exit_code
    results = measure(device, quick=options.quick)
    write_json_atomically(options.output, results)
    for row in results["rows"]:
        print(row)
    if results["problems"]:
        print(f"error: {'; '.join(results['problems'])}", file=sys.stderr)
        return ParityError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
