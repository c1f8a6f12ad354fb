// Affinities of the pairs of a half stencil, as fp32 [images, pairs, height, width]; 0 where a pair leaves the grid.
#pragma once

#include "stencil.cuh"

namespace multisa {

constexpr int affinity_width = 32, affinity_height = 8;  // pixels of a block
constexpr int feature_chunk = 16;  // features in shared memory at a time
constexpr int feature_pitch = affinity_width + 8, feature_tile = feature_pitch * (affinity_height + 4);

// The pairs of one row distance, dx from -4 on: |difference| of the thread's four pixels added to each sum.
template <int dy, int dx, int slot>
__device__ __forceinline__ void add_differences(float (&sums)[9][run], const float (&own)[run],
                                                const float (&window)[12]) {
    if constexpr (dx <= 4) {
        if constexpr (Stencil<5>::holds(dy, dx)) {
#pragma unroll
            for (int i = 0; i < run; ++i) sums[slot][i] += fabsf(own[i] - window[4 + dx + i]);
        }
        add_differences<dy, dx + 1, slot + 1>(sums, own, window);
    }
}

template <int dy, int dx, int slot>
__device__ __forceinline__ void store_affinities(const float (&sums)[9][run], float *out, size_t plane, int y, int x,
                                                 int height, int width, float scale) {
    if constexpr (dx <= 4) {
        if constexpr (Stencil<5>::holds(dy, dx)) {
            float *const row = out + Stencil<5>::plane(dy, dx) * plane + static_cast<size_t>(y) * width;
#pragma unroll
            for (int i = 0; i < run; ++i) {
                const int to = x + i + dx;
                const bool exists = y + dy < height && to >= 0 && to < width;
                if (x + i < width) row[x + i] = exists ? expf(-sums[slot][i] * scale) : 0;
            }
        }
        store_affinities<dy, dx + 1, slot + 1>(sums, out, plane, y, x, height, width, scale);
    }
}

// Copies `count` features of a block's pixels, with the four rows below and four columns on either side, into
// shared memory; returns whether the thread saw only finite values.
__device__ __forceinline__ bool load_features(float *tile, const float *features, int count, int height, int width) {
    const int top = blockIdx.y * affinity_height, left = blockIdx.x * affinity_width - 4;
    const size_t plane = static_cast<size_t>(height) * width;
    bool finite = true;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count * feature_tile; i += blockDim.x * blockDim.y) {
        const int row = top + i % feature_tile / feature_pitch, column = left + i % feature_pitch;
        float value = 0;
        if (row < height && column >= 0 && column < width)
            value = features[i / feature_tile * plane + static_cast<size_t>(row) * width + column];
        finite = finite && isfinite(value);
        tile[i] = value;
    }
    return finite;
}

template <int dy>
__device__ __forceinline__ void compare_features(float (&sums)[9][run], const float *here, int count) {
    for (; count > 0; --count, here += feature_tile) {
        float own[run], window[12];
#pragma unroll
        for (int i = 0; i < 12; i += run) {
            const float4 four = *reinterpret_cast<const float4 *>(here + dy * feature_pitch + i);
            window[i] = four.x;
            window[i + 1] = four.y;
            window[i + 2] = four.z;
            window[i + 3] = four.w;
        }
        const float4 four = *reinterpret_cast<const float4 *>(here + 4);
        own[0] = four.x;
        own[1] = four.y;
        own[2] = four.z;
        own[3] = four.w;
        add_differences<dy, -4, 0>(sums, own, window);
    }
}

}  // namespace multisa

// exp(-mean |f_i - f_j|) for radius 5. A block: 32x8 pixels of image blockIdx.z, features fp32 [images, depth,
// height, width] through shared memory in chunks of 16. A thread: four pixels of a row (threadIdx.x) and the pairs
// of one row distance (threadIdx.y = 0..4, the same in a whole warp), so 36 pairs cost four vector loads.
extern "C" __global__ void __launch_bounds__(320)
affinity_features(const float *__restrict__ features, float *out, unsigned *errors, int depth, int height, int width) {
    using namespace multisa;
    MULTISA_DYNAMIC_SHARED(float, tile);
    constexpr int runs = affinity_width / run;
    const int dy = threadIdx.y, row = threadIdx.x / runs, column = threadIdx.x % runs * run;
    const int y = blockIdx.y * affinity_height + row, x = blockIdx.x * affinity_width + column;
    const size_t plane = static_cast<size_t>(height) * width;
    features += blockIdx.z * depth * plane;
    float sums[9][run] = {};
    bool finite = true;
    for (int first = 0; first < depth; first += feature_chunk) {
        const int count = min(feature_chunk, depth - first);
        finite = load_features(tile, features + first * plane, count, height, width) && finite;
        __syncthreads();
        const float *const here = tile + row * feature_pitch + column;
        if (dy == 0) compare_features<0>(sums, here, count);
        if (dy == 1) compare_features<1>(sums, here, count);
        if (dy == 2) compare_features<2>(sums, here, count);
        if (dy == 3) compare_features<3>(sums, here, count);
        if (dy == 4) compare_features<4>(sums, here, count);
        __syncthreads();
    }
    if (!finite) atomicOr(errors, bad_features);
    if (y >= height) return;
    out += blockIdx.z * Stencil<5>::plane(5, -5) * plane;
    const float scale = 1.0f / depth;
    if (dy == 0) store_affinities<0, -4, 0>(sums, out, plane, y, x, height, width, scale);
    if (dy == 1) store_affinities<1, -4, 0>(sums, out, plane, y, x, height, width, scale);
    if (dy == 2) store_affinities<2, -4, 0>(sums, out, plane, y, x, height, width, scale);
    if (dy == 3) store_affinities<3, -4, 0>(sums, out, plane, y, x, height, width, scale);
    if (dy == 4) store_affinities<4, -4, 0>(sums, out, plane, y, x, height, width, scale);
}

// The same for any radius. A thread: one pixel of one pair (blockIdx.y = image * pairs + pair).
extern "C" __global__ void __launch_bounds__(256)
affinity_features_any(const float *__restrict__ features, const int *__restrict__ offsets, float *out,
                      unsigned *errors, int depth, int height, int width, int pairs) {
    const int plane = height * width, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= plane) return;
    const int y = i / width, x = i % width, pair = blockIdx.y % pairs;
    const int to_y = y + offsets[2 * pair], to_x = x + offsets[2 * pair + 1];
    float affinity = 0;
    if (to_y < height && to_x >= 0 && to_x < width) {
        const float *const maps = features + static_cast<size_t>(blockIdx.y / pairs) * depth * plane;
        float sum = 0;
        for (int d = 0; d < depth; ++d) {
            const float *const map = maps + static_cast<size_t>(d) * plane;
            sum += fabsf(map[i] - map[to_y * width + to_x]);
        }
        if (!isfinite(sum)) atomicOr(errors, multisa::bad_features);
        affinity = expf(-sum * (1.0f / depth));
    }
    out[static_cast<size_t>(blockIdx.y) * plane + i] = affinity;
}

// 1 - max over the straight path, any radius. A block: 32x8 pixels of image blockIdx.z, the boundary map fp32
// [images, height, width] with its halo in shared memory. A thread: one pixel, all its pairs. `paths` lists for
// each pair its (dy, dx) and the range of its points in `points`, (dy, dx) each; all threads read the same entry.
extern "C" __global__ void __launch_bounds__(256)
affinity_boundary(const float *__restrict__ boundary, const int4 *__restrict__ paths, const int2 *__restrict__ points,
                  float *out, unsigned *errors, int height, int width, int pairs, int reach) {
    using namespace multisa;
    MULTISA_DYNAMIC_SHARED(float, tile);
    const int pitch = affinity_width + 2 * reach, rows = affinity_height + reach;
    const int top = blockIdx.y * affinity_height, left = blockIdx.x * affinity_width - reach;
    const size_t plane = static_cast<size_t>(height) * width;
    const float *const map = boundary + blockIdx.z * plane;
    bool valid = true;
    for (int i = threadIdx.x; i < rows * pitch; i += blockDim.x) {
        const int row = top + i / pitch, column = left + i % pitch;
        float value = 0;
        if (row < height && column >= 0 && column < width) value = map[static_cast<size_t>(row) * width + column];
        valid = valid && value >= 0 && value <= 1;
        tile[i] = value;
    }
    if (!valid) atomicOr(errors, bad_boundary);
    __syncthreads();
    const int y = top + threadIdx.x / affinity_width, x = left + reach + threadIdx.x % affinity_width;
    if (y >= height || x >= width) return;
    const float *const here = tile + (y - top) * pitch + x - left;
    float *target = out + static_cast<size_t>(blockIdx.z) * pairs * plane + static_cast<size_t>(y) * width + x;
    for (int p = 0; p < pairs; ++p, target += plane) {
        const int4 path = paths[p];
        float highest = 1;
        if (y + path.x < height && x + path.y >= 0 && x + path.y < width) {
            highest = 0;
            for (int i = path.z; i < path.w; ++i) highest = fmaxf(highest, here[points[i].x * pitch + points[i].y]);
        }
        *target = 1 - highest;
    }
}
