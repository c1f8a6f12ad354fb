"""The header that runs CUDA kernels on the CPU: what it computes, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from cpu_device import CpuDevice, build

from multisa.kernels.cuda.device import ALIGNMENT, Workspace, divide_up

pytestmark = pytest.mark.slow

KERNELS = """
#include "device.cuh"

// Sums blocks by shared memory of both kinds and by shuffles.
extern "C" __global__ void __launch_bounds__(128) block_sums(const float *in, float *out, int count) {
    __shared__ float parts[4];
    MULTISA_DYNAMIC_SHARED(float, all);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    all[threadIdx.x] = i < count ? in[i] : 0;
    __syncthreads();
    float sum = all[(threadIdx.x + 37) % blockDim.x];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = parts[0] + parts[1] + parts[2] + parts[3];
}

extern "C" __global__ void poison(float *out, int offset) {
    __shared__ float kept[32];
    MULTISA_DYNAMIC_SHARED(float, given);
    out[blockIdx.x * 64 + threadIdx.x] = kept[threadIdx.x];
    out[blockIdx.x * 64 + 32 + threadIdx.x] = given[threadIdx.x];
    kept[threadIdx.x] = given[threadIdx.x] = offset;
}

extern "C" __global__ void convert(const float *in, __half *halves, float *back, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    halves[i] = __float2half_rn(in[i]);
    back[i] = __half2float(halves[i]);
}

extern "C" __global__ void warp_words(int *out) {
    const int lane = threadIdx.x % 32;
    int *const mine = out + threadIdx.x * 8;
    mine[0] = __shfl_sync(0xffffffffu, lane * 10, 7);
    mine[1] = __shfl_up_sync(0xffffffffu, lane, 1);
    mine[2] = __shfl_down_sync(0xffffffffu, lane, 2, 8);
    mine[3] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
    mine[4] = __any_sync(0xffffffffu, lane == 40) * 2 + __all_sync(0xffffffffu, lane < 32);
    mine[5] = static_cast<int>(__match_any_sync(0xffffffffu, lane / 4));
    // Two halves of a warp go their own ways.
    mine[6] = lane < 16 ? __shfl_sync(0x0000ffffu, lane, 3) : __shfl_xor_sync(0xffff0000u, lane, 1);
    mine[7] = __syncthreads_count(lane == 5);
}

extern "C" __global__ void atomics(int *sum, unsigned *most, unsigned long long *first, float *total) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(sum, static_cast<int>(i));
    atomicMax(most, i * 7 % 101);
    atomicCAS(first, ~0ull, static_cast<unsigned long long>(i) + 5);
    atomicAdd(total, 0.5f);
}

extern "C" __global__ void missed(int *out) {
    if (threadIdx.x > 0) __syncthreads();
    out[0] = 1;
}
extern "C" __global__ void missed_in_warp(int *out) {
    if (threadIdx.x > 0) out[0] = __shfl_sync(0xffffffffu, 3, 0);
}
extern "C" __global__ void quarrel(int *out) {
    out[threadIdx.x] = threadIdx.x < 16 ? __shfl_sync(0xffffffffu, 3, 0) : __shfl_xor_sync(0xffffffffu, 3, 1);
}
extern "C" __global__ void left_out(int *out) { out[threadIdx.x] = __shfl_sync(0xfffffffeu, 3, 1); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    device = Path(__file__).parents[2] / "kernels" / "csrc" / "cuda" / "device.cuh"
    (folder / "device.cuh").write_text(device.read_text())
    (folder / "kernels.cu").write_text(KERNELS)
    return build(folder)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shared_memory_barriers_and_shuffles(library: Path, seed: int) -> None:
    device = CpuDevice(library, seed=seed)
    values = np.arange(1000, dtype=np.float32)
    source, target = device.allocate(4000), device.allocate(32)
    device.upload(source.pointer, values)
    arguments = (source.pointer, target.pointer, np.int32(1000))
    device.launch("block_sums", (8, 1, 1), (128, 1, 1), arguments, shared_bytes=512)
    sums = np.empty(8, np.float32)
    device.download(target.pointer, sums)
    np.testing.assert_array_equal(sums, np.pad(values, (0, 24)).reshape(8, 128).sum(axis=1))


def test_shared_memory_and_allocations_begin_as_nan(device: CpuDevice) -> None:
    out = device.allocate(4 * 130)
    device.launch("poison", (2, 1, 1), (32, 1, 1), (out.pointer, np.int32(3)), shared_bytes=128)
    values = np.empty(130, np.float32)
    device.download(out.pointer, values)
    assert np.isnan(values).all()  # what the first block left is gone in the second


def test_halves_round_as_numpy_does(device: CpuDevice) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    ordered = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    middles = (ordered[1:] + ordered[:-1]) / 2  # ties
    any_bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    around = [np.nextafter(middles, np.float32(end)) for end in (-1e9, 1e9)]
    values = np.concatenate([halves.astype(np.float32), middles, *around, any_bits])
    source, target, back = (device.allocate(size * values.size) for size in (4, 2, 4))
    device.upload(source.pointer, values)
    arguments = (source.pointer, target.pointer, back.pointer, np.int32(values.size))
    device.launch("convert", (divide_up(values.size, 256), 1, 1), (256, 1, 1), arguments)
    made, floats = np.empty(values.size, np.float16), np.empty(values.size, np.float32)
    device.download(target.pointer, made)
    device.download(back.pointer, floats)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(made.view(np.uint16)[number], expected.view(np.uint16)[number])
    assert np.isnan(made[~number]).all()
    np.testing.assert_array_equal(floats, made.astype(np.float32))


@pytest.mark.parametrize("seed", [0, 3])
def test_words_of_a_warp(library: Path, seed: int) -> None:
    device = CpuDevice(library, seed=seed)
    out = device.allocate(4 * 64 * 8)
    device.launch("warp_words", (1, 1, 1), (64, 1, 1), (out.pointer,))
    words = np.empty((2, 32, 8), np.int32)
    device.download(out.pointer, words)
    np.testing.assert_array_equal(words[0], words[1])
    lane = np.arange(32)
    thirds = sum(1 << int(i) for i in lane[lane % 3 == 0])
    same = [np.uint32(15 << (i // 4 * 4)).astype(np.int32) for i in lane]
    expected = [
        np.full(32, 70),
        np.maximum(lane - 1, 0),
        np.where(lane % 8 < 6, lane + 2, lane),
        np.full(32, np.uint32(thirds).astype(np.int32)),
        np.ones(32),
        same,
        np.where(lane < 16, 3, lane ^ 1),
        np.full(32, 2),
    ]
    np.testing.assert_array_equal(words[0].T, expected)


def test_atomics(device: CpuDevice) -> None:
    buffers = [device.allocate(8) for _ in range(4)]
    for buffer, start in zip(buffers, (np.int32(1), np.uint32(2), ~np.uint64(0), np.float32(0)), strict=True):
        device.upload(buffer.pointer, np.array([start]))
    device.launch("atomics", (3, 1, 1), (50, 1, 1), [buffer.pointer for buffer in buffers])
    results = [np.empty(1, kind) for kind in (np.int32, np.uint32, np.uint64, np.float32)]
    for buffer, result in zip(buffers, results, strict=True):
        device.download(buffer.pointer, result)
    assert [result[0] for result in results] == [1 + 149 * 150 // 2, 100, 5, 75]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missed", "stuck: of 32 threads 31 wait at __syncthreads.* 1 have returned"),
        ("missed_in_warp", "31 in a warp operation, 1 have returned"),
        ("quarrel", "meet in __shfl"),
        ("left_out", "mask leaves out"),
        ("nobody", "no such kernel"),
    ],
)
def test_what_a_device_leaves_undefined_is_an_error(device: CpuDevice, name: str, message: str) -> None:
    out = device.allocate(4 * 32)
    with pytest.raises(RuntimeError, match=message):
        device.launch(name, (1, 1, 1), (32, 1, 1), (out.pointer,))
    later = device.allocate(4 * 64 * 8)
    device.launch("warp_words", (1, 1, 1), (64, 1, 1), (later.pointer,))  # recovers


@pytest.mark.parametrize(
    ("grid", "block", "argument", "shared_bytes", "message"),
    [
        ((0, 1, 1), (1, 1, 1), 0, 0, "grid is empty"),
        ((1, 65536, 1), (1, 1, 1), 0, 0, "grid is empty or too large"),
        ((1, 1, 1), (1025, 1, 1), 0, 0, "block is empty or too large"),
        ((1, 1, 1), (32, 1, 1), 0, 48 * 1024 + 1, "more shared memory"),
        ((1, 1, 1), (32, 1, 1), np.int32(0), 0, "got arguments i, expected P"),
    ],
)
def test_bad_launches(
    device: CpuDevice,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    argument: int,
    shared_bytes: int,
    message: str,
) -> None:
    with pytest.raises(RuntimeError, match=message):
        device.launch("missed", grid, block, (argument,), shared_bytes=shared_bytes)


def test_a_recording_keeps_its_arguments(device: CpuDevice) -> None:
    source, target = device.allocate(512), device.allocate(4)

    def schedule(stream: int) -> None:
        device.fill(source.pointer, 0x3F800000, 128, stream)  # 1.0
        arguments = (source.pointer, target.pointer, np.int32(100))
        device.launch("block_sums", (1, 1, 1), (128, 1, 1), arguments, shared_bytes=512, stream=stream)

    replay = device.record(schedule)
    total = np.zeros(1, np.float32)
    device.download(target.pointer, total)
    assert np.isnan(total[0])  # nothing has run yet
    replay(0)
    device.download(target.pointer, total)
    assert total[0] == 100


def test_workspace(device: CpuDevice) -> None:
    workspace = Workspace(device, {"one": 4, "none": 0, "many": 1000})
    assert workspace["one"] % ALIGNMENT == workspace["many"] % ALIGNMENT == 0
    assert workspace["many"] - workspace["one"] == ALIGNMENT and workspace.size == 5 * ALIGNMENT
    with pytest.raises(KeyError):
        workspace["other"]
