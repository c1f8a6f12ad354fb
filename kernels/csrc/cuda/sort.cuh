// Exclusive prefix sums and a stable radix sort of (key, value) pairs, both with
// results that do not depend on the order in which threads run: counts are integers, and the position of every
// element follows from its index.
#pragma once

#include "device.cuh"

namespace multisa {

constexpr int sort_threads = 256;
constexpr int sort_warps = sort_threads / 32;
constexpr int sort_items = 8;                         // elements a thread
constexpr int sort_tile = sort_threads * sort_items;  // elements a block
constexpr int sort_digits = 256;                      // most values of a digit

// Inclusive sum over the lanes of a warp.
__device__ __forceinline__ unsigned warp_inclusive_sum(unsigned value) {
    const int lane = threadIdx.x & 31;
    for (int step = 1; step < 32; step *= 2) {
        const unsigned left = __shfl_up_sync(0xffffffffu, value, step);
        if (lane >= step) value += left;
    }
    return value;
}

// Exclusive sum over the sort_threads threads of a block; `total` receives the sum. Every thread must call it.
__device__ __forceinline__ unsigned block_exclusive_sum(unsigned value, unsigned *warp_sums, unsigned &total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const unsigned inclusive = warp_inclusive_sum(value);
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    unsigned before = 0;
    total = 0;
    for (int w = 0; w < sort_warps; ++w) {
        if (w == warp) before = total;
        total += warp_sums[w];
    }
    __syncthreads();  // the caller may come again with the same memory
    return before + inclusive - value;
}

}  // namespace multisa

// Replace each tile of sort_tile values [count] by its exclusive sums; sums[block] gets the sum of the tile.
extern "C" __global__ void __launch_bounds__(256) scan_tiles(unsigned *values, int count, unsigned *sums) {
    using namespace multisa;
    __shared__ unsigned warp_sums[sort_warps];
    const int start = blockIdx.x * sort_tile + threadIdx.x * sort_items;
    unsigned items[sort_items];
    unsigned mine = 0;
#pragma unroll
    for (int i = 0; i < sort_items; ++i) {
        items[i] = start < count - i ? values[start + i] : 0u;
        mine += items[i];
    }
    unsigned total;
    unsigned running = block_exclusive_sum(mine, warp_sums, total);
#pragma unroll
    for (int i = 0; i < sort_items; ++i) {
        if (start < count - i) values[start + i] = running;
        running += items[i];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// Replace the sums [count] of the tiles by their exclusive sums; `total` gets the sum of all. One block.
extern "C" __global__ void __launch_bounds__(256) scan_sums(unsigned *sums, int count, unsigned *total) {
    using namespace multisa;
    __shared__ unsigned warp_sums[sort_warps];
    unsigned carry = 0;
    for (int start = 0; start < count; start += sort_threads) {
        const int i = start + threadIdx.x;
        const unsigned value = i < count ? sums[i] : 0u;
        unsigned tile;
        const unsigned before = block_exclusive_sum(value, warp_sums, tile);
        if (i < count) sums[i] = carry + before;
        carry += tile;
    }
    if (threadIdx.x == 0) *total = carry;
}

// Add to the values [count] of each tile the sum of the tiles before it.
extern "C" __global__ void __launch_bounds__(256) scan_add(unsigned *values, int count, const unsigned *sums) {
    using namespace multisa;
    const unsigned before = sums[blockIdx.x];
    const int start = blockIdx.x * sort_tile + threadIdx.x;
#pragma unroll
    for (int i = 0; i < sort_items; ++i) {
        const int step = i * sort_threads;
        if (start < count - step) values[start + step] += before;
    }
}

// Count the digits (keys >> shift) & (2^bits - 1), bits <= 8, of each tile: counts [2^bits][blocks].
extern "C" __global__ void __launch_bounds__(256)
radix_count(const unsigned *keys, int count, int shift, int bits, unsigned *counts) {
    using namespace multisa;
    __shared__ unsigned histogram[sort_digits];
    histogram[threadIdx.x] = 0;
    __syncthreads();
    const unsigned mask = (1u << bits) - 1u;
    const int start = blockIdx.x * sort_tile + threadIdx.x;
#pragma unroll
    for (int i = 0; i < sort_items; ++i) {
        const int step = i * sort_threads;
        if (start < count - step) atomicAdd(&histogram[keys[start + step] >> shift & mask], 1u);
    }
    __syncthreads();
    if (threadIdx.x <= mask) counts[threadIdx.x * gridDim.x + blockIdx.x] = histogram[threadIdx.x];
}

// Move each pair to its position; counts [2^bits][blocks] are the exclusive sums of radix_count. A warp takes
// 256 consecutive pairs, 32 at a time; lanes of one digit find each other by ballots, so pairs of equal digits
// keep their order.
extern "C" __global__ void __launch_bounds__(256)
radix_scatter(const unsigned *keys, const unsigned *values, int count, int shift, int bits,
              const unsigned *counts, unsigned *sorted_keys, unsigned *sorted_values) {
    using namespace multisa;
    __shared__ unsigned places[sort_warps][sort_digits];
    const unsigned mask = (1u << bits) - 1u;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int start = blockIdx.x * sort_tile + warp * 32 * sort_items + lane;
    for (int w = 0; w < sort_warps; ++w) places[w][threadIdx.x] = 0;
    __syncthreads();
    for (int i = 0; i < sort_items; ++i) {
        if (start < count - i * 32) atomicAdd(&places[warp][keys[start + i * 32] >> shift & mask], 1u);
    }
    __syncthreads();
    if (threadIdx.x <= mask) {
        unsigned place = counts[threadIdx.x * gridDim.x + blockIdx.x];
        for (int w = 0; w < sort_warps; ++w) {
            const unsigned before = place;
            place += places[w][threadIdx.x];
            places[w][threadIdx.x] = before;
        }
    }
    __syncthreads();
    for (int i = 0; i < sort_items && start - lane < count - i * 32; ++i) {
        const bool valid = start < count - i * 32;
        const unsigned key = valid ? keys[start + i * 32] : 0u;
        const unsigned digit = key >> shift & mask;
        unsigned same = __ballot_sync(0xffffffffu, valid);
        for (int bit = 0; bit < bits; ++bit) {
            const unsigned set = __ballot_sync(0xffffffffu, digit >> bit & 1u);
            same &= digit >> bit & 1u ? set : ~set;
        }
        const unsigned lower = __popc(same & ((1u << lane) - 1u));
        const unsigned place = valid ? places[warp][digit] + lower : 0u;
        __syncwarp();
        if (valid) {
            if (lower == 0) places[warp][digit] += __popc(same);
            sorted_keys[place] = key;
            sorted_values[place] = values[start + i * 32];
        }
        __syncwarp();
    }
}
