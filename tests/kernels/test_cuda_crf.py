"""The CUDA kernels of the dense CRF, run on the CPU: results, order of threads, sanitisers, errors."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import crf_checks
import numpy as np
import pytest
from cpu_device import SOURCES, CpuDevice, build
from crf_checks import IRN, PSA, infer, prepare, refine, scene
from permutohedral_reference import GaussianFilter

from multisa.kernels import CrfParameters, dense_crf
from multisa.kernels.cuda.crf import CrfShape, DeviceCRF
from multisa.kernels.cuda.lattice import Sorter, lattice_geometry

pytestmark = pytest.mark.slow

FEW = replace(PSA, iterations=3)


@pytest.mark.parametrize(
    ("labels", "height", "width", "parameters"),
    [
        (1, 1, 1, PSA),
        (7, 1, 40, PSA),
        (2, 37, 1, IRN),
        (3, 13, 17, IRN),
        (3, 20, 24, PSA),
        (13, 9, 11, FEW),
        (21, 7, 9, FEW),
        (27, 7, 9, FEW),
        (35, 6, 7, FEW),  # more than stay in registers
        (3, 9, 11, replace(PSA, iterations=0)),
        (3, 9, 11, replace(PSA, iterations=1)),
    ],
)
def test_equals_the_cpu(device: CpuDevice, labels: int, height: int, width: int, parameters: CrfParameters) -> None:
    crf_checks.check_against_cpu(device, labels, height, width, parameters)


@pytest.mark.parametrize("parameters", [PSA, IRN], ids=["psa", "irn"])
def test_equals_pydensecrf(device: CpuDevice, parameters: CrfParameters) -> None:
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 (multisa[reference]) is not installed")
    image, probabilities = scene(2, 13, 15)
    expected = dense_crf(image, probabilities, parameters, backend="pydensecrf")
    crf_checks.assert_close(refine(device, image, probabilities, parameters), expected)


@pytest.mark.parametrize("check", [crf_checks.check_batch, crf_checks.check_channels, crf_checks.check_labels])
def test_batches_channels_and_labels(device: CpuDevice, check: Callable[[CpuDevice, int, int], None]) -> None:
    check(device, 9, 12)


def test_constant_image_sums_long_lists(device: CpuDevice) -> None:
    crf_checks.check_constant_image(device)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(library: Path, seed: int) -> None:
    image, probabilities = scene(6, 11, 14)
    ordered, shuffled = (refine(CpuDevice(library, seed=s), image, probabilities, FEW) for s in (0, seed))
    np.testing.assert_array_equal(shuffled, ordered)


def test_one_crf_serves_several_images_and_unaries(device: CpuDevice) -> None:
    (first, probabilities), (second, others) = scene(3, 8, 11), scene(3, 8, 11, seed=1)
    crf = prepare(device, first[None], 3, FEW)
    infer(device, crf, probabilities[None, None])
    stored = crf_checks.put(device, second[None])
    crf.set_images(stored.pointer)
    again = infer(device, crf, others[None, None])[0, 0]
    np.testing.assert_array_equal(again, refine(device, second, others, FEW))


def changed_kernels(folder: Path, file: str, old: str, new: str) -> Path:
    """Copy the sources of the CRF alone, which compile faster, with one text replaced."""
    for name in ("device", "sort", "lattice", "crf", "mean_field"):
        shutil.copy(SOURCES / f"{name}.cuh", folder)
    (folder / "kernels.cu").write_text('#include "mean_field.cuh"\n#include "sort.cuh"\n')
    text = (folder / file).read_text()
    assert text.count(old) == 1
    (folder / file).write_text(text.replace(old, new))
    return folder


def test_missing_barrier_is_caught(tmp_path: Path) -> None:
    image, probabilities = scene(3, 33, 41)
    barrier = "            __syncthreads();\n            if (threadIdx.x < labels)"
    folder = changed_kernels(tmp_path, "crf.cuh", barrier, barrier[29:])
    broken = CpuDevice(build(folder, ("-O0",)))
    belief = refine(broken, np.zeros_like(image), probabilities, replace(PSA, iterations=1))
    assert not np.isfinite(belief).all()  # what was read too early was still poison


SANITISERS = {
    "tsan": ("libtsan.so", ("-DSHIM_THREADS", "-fsanitize=thread")),
    "asan": ("libasan.so", ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")),
}


def run_sanitised(name: str, sources: Path, *checks: str) -> "subprocess.CompletedProcess[str]":
    """Run checks of crf_checks on a sanitised library of `sources`."""
    runtime, flags = SANITISERS[name]
    library = build(sources, ("-O0", *flags))
    found = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": found.stdout.strip(),
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
        # Fibers change stacks, which the check of returned stacks does not follow; Python keeps its memory.
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, os.fspath(Path(crf_checks.__file__)), os.fspath(library), *checks]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "checks"), [("tsan", ("small",)), ("asan", ("small", "overflow"))])
def test_sanitisers_find_nothing(name: str, checks: tuple[str, ...], tmp_path: Path) -> None:
    # Lists of a small problem are short: lower what counts as long, so that this path runs as well.
    sources = changed_kernels(tmp_path, "crf.cuh", "hot_entries = 512", "hot_entries = 4")
    result = run_sanitised(name, sources, *checks)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["checked", *checks]


def test_thread_sanitiser_finds_a_missing_barrier(tmp_path: Path) -> None:
    barrier = "    __syncthreads();\n    const unsigned mask = (1u << bits) - 1u;"
    sources = changed_kernels(tmp_path, "sort.cuh", barrier, barrier[21:])
    result = run_sanitised("tsan", sources, "small")
    assert result.returncode == 66
    assert "data race" in result.stderr and "radix_count" in result.stderr


@pytest.mark.parametrize(("count", "below"), [(1, 1), (31, 2), (2048, 300), (5000, 70000)])
def test_sort_is_stable(device: CpuDevice, count: int, below: int) -> None:
    random = np.random.default_rng(count)
    keys = (random.integers(0, below, count) // 3 * 3).astype(np.uint32)
    sorter = Sorter(device, count)
    device.upload(sorter.keys, keys)
    device.upload(sorter.values, np.arange(count, dtype=np.uint32))
    places = sorter.sort(count, below, 0)
    sorted_keys, sorted_values = np.empty((2, count), dtype=np.uint32)
    device.download(places[0], sorted_keys)
    device.download(places[1], sorted_values)
    order = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(sorted_values, order)
    np.testing.assert_array_equal(sorted_keys, keys[order])


def test_scan_carries_over_more_tiles_than_a_block_has_threads(device: CpuDevice) -> None:
    sums = np.random.default_rng(0).integers(0, 1000, 700).astype(np.uint32)
    stored, total = crf_checks.put(device, sums), device.allocate(4)
    device.launch("scan_sums", (1, 1, 1), (256, 1, 1), (stored.pointer, np.int32(700), total.pointer))
    scanned, whole = np.empty_like(sums), np.empty(1, dtype=np.uint32)
    device.download(stored.pointer, scanned)
    device.download(total.pointer, whole)
    np.testing.assert_array_equal(scanned, np.cumsum(sums) - sums)
    assert whole[0] == sums.sum()


@pytest.mark.parametrize("deviations", [(3.0,) * 2, (60.0,) * 2 + (80.0,) * 3, (90.0,) * 5])
def test_vertices_stay_within_the_bound(deviations: tuple[float, ...]) -> None:
    height, width = 60, 90
    image = np.random.default_rng(1).integers(0, 256, (3, height * width)).astype(np.float32)
    y, x = np.indices((height, width), dtype=np.float32).reshape(2, -1)
    features = np.stack([x, y, *image])[: len(deviations)] / np.array(deviations, dtype=np.float32)[:, None]
    vertices = GaussianFilter(features)._neighbours.shape[-1]
    capacity = lattice_geometry(1, height, width, deviations).capacity
    assert vertices <= capacity < (len(deviations) + 1) * height * width


def test_too_few_vertices_are_reported(device: CpuDevice) -> None:
    crf_checks.check_overflow(device)


def test_bad_values_are_reported(device: CpuDevice) -> None:
    image, probabilities = scene(2, 4, 5)
    crf = prepare(device, image[None], 2, FEW)
    probabilities[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="probabilities: got NaN"):
        infer(device, crf, probabilities[None, None])
    with pytest.raises(ValueError, match="channels: got a value of `classes` or above"):
        infer(device, crf, np.ones((1, 1, 2, 4, 5), np.float32), np.array([[[0, 2]]], dtype=np.int32))
    with pytest.raises(ValueError, match="labels: got a value of n_labels or above"):
        crf_checks.infer_labels(device, crf, np.full((1, 1, 4, 5), 2, np.uint8), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": 0}, "labels: got 0"),
        ({"images": 0}, "images: got 0"),
        ({"problems": 0}, "problems: got 0"),
        ({"max_vertices": 0}, "max_vertices: got 0"),
        ({"images": 300, "problems": 300}, "images x problems: got 90000"),
        ({"images": 40000, "height": 10000}, "expected at most .* pixels in all; split the batch"),
        ({"labels": 2**30}, "labels: got 1073741824 for up to .* vertices"),
        ({"parameters": replace(PSA, bilateral_srgb=0.01)}, "bits a vertex.*larger standard deviations"),
        ({"parameters": replace(PSA, spatial_sxy=1e-6)}, "standard deviations, expected below 65536"),
    ],
)
def test_bad_sizes(device: CpuDevice, change: dict[str, Any], message: str) -> None:
    sizes = {"images": 1, "height": 4, "width": 5, "labels": 2}
    options = {name: change[name] for name in ("parameters", "max_vertices") if name in change}
    sizes |= {name: value for name, value in change.items() if name not in options}
    with pytest.raises(ValueError, match=message):
        DeviceCRF(device, CrfShape(**sizes), **options)


def test_bad_calls(device: CpuDevice) -> None:
    crf = DeviceCRF(device, CrfShape(1, 2, 3, 2))
    with pytest.raises(ValueError, match="images: got none"):
        crf.infer(0, 0)
    with pytest.raises(ValueError, match="classes: got 5 without channels"):
        crf.infer(0, 0, classes=5)
    with pytest.raises(ValueError, match="n_labels: got 3, expected at most labels = 2"):
        crf.infer_labels(0, 3, 0)
    with pytest.raises(ValueError, match="confidence: got 1"):
        crf.infer_labels(0, 2, 0, confidence=1.0)
