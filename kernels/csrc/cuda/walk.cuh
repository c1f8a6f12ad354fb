// The random walk: T = D^-1 A^beta applied repeatedly to every channel, one launch per step for all images.
//
// Everything is stored in padded planes: `pitch` columns by `rows` rows, the image at (halo_y, halo_x), zeros
// around it up to whole tiles. A weight that leads out of the grid is zero, so the step needs no bounds check,
// and it writes only zeros into the padding.
//   weights  fp16 [images, pairs, rows, pitch]   affinity^beta of the pair (y, x) -> (y + dy, x + dx)
//   inverse  fp32 [images, rows, pitch]          1 / D, D = 1 + sum of the weights at the pixel as stored
//   centre   fp32 [images, rows, pitch]          1 - inverse * sum: rows sum to one whatever the rounding
//   states   fp32 [images, channels, rows, pitch]
#pragma once

#include "stencil.cuh"

namespace multisa {

constexpr int tile_width = 32, tile_height = 16;  // pixels of a block
constexpr int step_threads = tile_width / run * tile_height;

struct WalkPlane {
    int height, width, rows, pitch, halo_y, halo_x;
    __device__ int size() const { return rows * pitch; }
    __device__ int at(int y, int x) const { return (y + halo_y) * pitch + x + halo_x; }
};

__device__ __forceinline__ void add_scaled(float (&sum)[run], const float4 &weight, const float *values) {
    sum[0] = fmaf(weight.x, values[0], sum[0]);
    sum[1] = fmaf(weight.y, values[1], sum[1]);
    sum[2] = fmaf(weight.z, values[2], sum[2]);
    sum[3] = fmaf(weight.w, values[3], sum[3]);
}

// Four weights from any column: one aligned load or two, `shift` (0..3) being known at compile time.
template <int shift>
__device__ __forceinline__ float4 load_weights(const __half *aligned) {
    const float4 a = load_half4(aligned);
    if constexpr (shift == 0) {
        return a;
    } else {
        const float4 b = load_half4(aligned + run);
        if constexpr (shift == 1) return make_float4(a.y, a.z, a.w, b.x);
        if constexpr (shift == 2) return make_float4(a.z, a.w, b.x, b.y);
        return make_float4(a.w, b.x, b.y, b.z);
    }
}

// All pairs of one row distance and one direction, dx from `dx` on. Forwards the pair is stored at the pixel
// itself, backwards at the neighbour (-dy, -dx).
template <int channels, int radius, int dy, int dx, bool forwards>
__device__ __forceinline__ void add_row(float (&sum)[channels][run],
                                        const float (&window)[channels][Stencil<radius>::window],
                                        const __half *here, int pitch, size_t plane) {
    using S = Stencil<radius>;
    if constexpr (dx <= S::reach) {
        if constexpr (S::holds(dy, dx)) {
            constexpr int column = forwards ? 0 : -dx, shift = ((column % run) + run) % run;
            const __half *pair = here + S::plane(dy, dx) * plane;
            const float4 weight = load_weights<shift>(pair - (forwards ? 0 : dy * pitch) + column - shift);
#pragma unroll
            for (int c = 0; c < channels; ++c)
                add_scaled(sum[c], weight, &window[c][S::halo + (forwards ? dx : -dx)]);
        }
        add_row<channels, radius, dy, dx + 1, forwards>(sum, window, here, pitch, plane);
    }
}

template <int channels, int radius, int dy, bool forwards>
__device__ __forceinline__ void add_rows(float (&sum)[channels][run], const float *tile, int tile_pitch,
                                         int channel_size, const __half *here, int pitch, size_t plane) {
    using S = Stencil<radius>;
    if constexpr (dy <= S::reach) {
        float window[channels][S::window];
#pragma unroll
        for (int c = 0; c < channels; ++c) {
            const float *row = tile + c * channel_size + (forwards ? dy : -dy) * tile_pitch;
#pragma unroll
            for (int i = 0; i < S::window; i += run) {
                const float4 four = *reinterpret_cast<const float4 *>(row + i);
                window[c][i] = four.x;
                window[c][i + 1] = four.y;
                window[c][i + 2] = four.z;
                window[c][i + 3] = four.w;
            }
        }
        add_row<channels, radius, dy, -S::reach, forwards>(sum, window, here, pitch, plane);
        add_rows<channels, radius, dy + 1, forwards>(sum, tile, tile_pitch, channel_size, here, pitch, plane);
    }
}

// After the sum over neighbours: the centre comes last (first, it would absorb small neighbours), then
//   next = scale * average - carry * previous,  total += coefficient * next.
struct StepTail {
    const float *inverse, *centre, *current;
    float *following, *total;
    float scale, carry, coefficient;

    __device__ __forceinline__ void finish(const float (&sum)[run], size_t state, int pixel) const {
        const float4 r = *reinterpret_cast<const float4 *>(inverse + pixel);
        const float4 c = *reinterpret_cast<const float4 *>(centre + pixel);
        const float4 x = *reinterpret_cast<const float4 *>(current + state);
        float4 next = make_float4(scale * fmaf(r.x, sum[0], c.x * x.x), scale * fmaf(r.y, sum[1], c.y * x.y),
                                  scale * fmaf(r.z, sum[2], c.z * x.z), scale * fmaf(r.w, sum[3], c.w * x.w));
        float4 *const target = reinterpret_cast<float4 *>(following + state);
        if (carry != 0) {
            const float4 previous = *target;
            next.x = fmaf(-carry, previous.x, next.x);
            next.y = fmaf(-carry, previous.y, next.y);
            next.z = fmaf(-carry, previous.z, next.z);
            next.w = fmaf(-carry, previous.w, next.w);
        }
        *target = next;
        if (coefficient != 0) {
            float4 *const sums = reinterpret_cast<float4 *>(total + state);
            float4 t = *sums;
            t.x = fmaf(coefficient, next.x, t.x);
            t.y = fmaf(coefficient, next.y, t.y);
            t.z = fmaf(coefficient, next.z, t.z);
            t.w = fmaf(coefficient, next.w, t.w);
            *sums = t;
        }
    }
};

// Copies the tile of a block with its halo into shared memory: `count` channels from state plane `first` on.
__device__ __forceinline__ void load_tile(float *tile, const float *states, size_t plane, int count,
                                          int tile_rows, int tile_pitch, int pitch) {
    const float *corner = states + static_cast<size_t>(blockIdx.y) * tile_height * pitch + blockIdx.x * tile_width;
    const int fours = tile_pitch / run, all = tile_rows * fours;
    for (int c = 0; c < count; ++c)
        for (int i = threadIdx.x; i < all; i += step_threads)
            reinterpret_cast<float4 *>(tile)[c * all + i] = *reinterpret_cast<const float4 *>(
                corner + c * plane + static_cast<size_t>(i / fours) * pitch + i % fours * run);
}

// A block: a tile of 32x16 pixels of one image, `channels` channels; blockIdx.z = image * groups + group.
// A thread: four pixels of a row in all these channels, so a weight is read once and a 9-tap row of state costs
// three vector loads for 36 products.
template <int channels, int radius>
__device__ __forceinline__ void walk_step(float *tile, const __half *weights, const float *inverse,
                                          const float *centre, const float *current, float *following,
                                          float *total, int rows, int pitch, int groups, float scale,
                                          float carry, float coefficient) {
    using S = Stencil<radius>;
    constexpr int tile_rows = tile_height + 2 * S::reach, tile_pitch = tile_width + 2 * S::halo;
    constexpr int pairs = S::plane(radius, -radius);
    const size_t plane = static_cast<size_t>(rows) * pitch, image = blockIdx.z / groups;
    const size_t first = blockIdx.z * channels * plane;
    load_tile(tile, current + first, plane, channels, tile_rows, tile_pitch, pitch);
    __syncthreads();
    const int x = threadIdx.x % (tile_width / run) * run, y = threadIdx.x / (tile_width / run);
    const int pixel = (blockIdx.y * tile_height + y + S::reach) * pitch + blockIdx.x * tile_width + x + S::halo;
    const __half *here = weights + image * pairs * plane + pixel;
    const float *row = tile + (y + S::reach) * tile_pitch + x;
    float sum[channels][run] = {};
    add_rows<channels, radius, 0, true>(sum, row, tile_pitch, tile_rows * tile_pitch, here, pitch, plane);
    add_rows<channels, radius, 0, false>(sum, row, tile_pitch, tile_rows * tile_pitch, here, pitch, plane);
    const StepTail tail{inverse + image * plane, centre + image * plane, current + first, following + first,
                        total + first, scale, carry, coefficient};
#pragma unroll
    for (int c = 0; c < channels; ++c) tail.finish(sum[c], c * plane + pixel, pixel);
}

}  // namespace multisa

#define MULTISA_WALK_STEP_ARGUMENTS                                                                      \
    const __half *__restrict__ weights, const float *__restrict__ inverse,                               \
        const float *__restrict__ centre, const float *__restrict__ current, float *following, float *total, \
        int rows, int pitch, int groups, float scale, float carry, float coefficient
#define MULTISA_WALK_STEP(channels)                                                                       \
    MULTISA_DYNAMIC_SHARED(float, tile);                                                                  \
    multisa::walk_step<channels, 5>(tile, weights, inverse, centre, current, following, total, rows, pitch, \
                                    groups, scale, carry, coefficient)

extern "C" __global__ void __launch_bounds__(128) walk_step_1(MULTISA_WALK_STEP_ARGUMENTS) { MULTISA_WALK_STEP(1); }
extern "C" __global__ void __launch_bounds__(128) walk_step_2(MULTISA_WALK_STEP_ARGUMENTS) { MULTISA_WALK_STEP(2); }
extern "C" __global__ void __launch_bounds__(128) walk_step_3(MULTISA_WALK_STEP_ARGUMENTS) { MULTISA_WALK_STEP(3); }
extern "C" __global__ void __launch_bounds__(128) walk_step_4(MULTISA_WALK_STEP_ARGUMENTS) { MULTISA_WALK_STEP(4); }

// The step for any radius up to 16, one channel a block: loops instead of unrolled code, weights read one by one.
extern "C" __global__ void __launch_bounds__(128) walk_step_any(MULTISA_WALK_STEP_ARGUMENTS, int radius, int pairs) {
    using namespace multisa;
    MULTISA_DYNAMIC_SHARED(float, tile);
    const int reach = radius - 1, halo = (reach + run - 1) / run * run;
    const int tile_pitch = tile_width + 2 * halo;
    const size_t plane = static_cast<size_t>(rows) * pitch, image = blockIdx.z / groups;
    const size_t first = blockIdx.z * plane;
    load_tile(tile, current + first, plane, 1, tile_height + 2 * reach, tile_pitch, pitch);
    __syncthreads();
    const int x = threadIdx.x % (tile_width / run) * run, y = threadIdx.x / (tile_width / run);
    const int pixel = (blockIdx.y * tile_height + y + reach) * pitch + blockIdx.x * tile_width + x + halo;
    const __half *pair = weights + image * pairs * plane + pixel;
    const float *row = tile + (y + reach) * tile_pitch + x + halo;
    float sum[run] = {};
    for (int dy = 0; dy <= reach; ++dy)
        for (int dx = dy ? -reach : 1; dx <= reach; ++dx) {
            if (dy * dy + dx * dx >= radius * radius) continue;
            const int there = dy * tile_pitch + dx, stored = dy * pitch + dx;
            for (int i = 0; i < run; ++i) {
                sum[i] = fmaf(__half2float(pair[i]), row[i + there], sum[i]);
                sum[i] = fmaf(__half2float(pair[i - stored]), row[i - there], sum[i]);
            }
            pair += plane;
        }
    const StepTail tail{inverse + image * plane, centre + image * plane, current + first, following + first,
                        total + first, scale, carry, coefficient};
    tail.finish(sum, pixel, pixel);
}
