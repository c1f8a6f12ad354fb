// From class maps to labels: bilinear resizing, the background and the division by the sum, argmax.
//
// Resizing is Pillow's BILINEAR, a triangle filter that is widened when an image shrinks. The host computes its
// taps in double: `first` and `count` for every output row or column, `weights` [output][taps].
#pragma once

#include "device.cuh"

namespace multisa {

// The taps of one axis.
struct Taps {
    const int *first, *count;
    const float *weights;
    int most;  // weights kept for each output
};

// One output of a map [.][width]: weighs rows and columns together, a few products when enlarging.
__device__ __forceinline__ float resampled(const float *map, int width, const Taps &rows, const Taps &columns,
                                           int y, int x) {
    const int left = columns.first[x], across = columns.count[x], down = rows.count[y];
    const float *const row_weights = rows.weights + static_cast<size_t>(y) * rows.most;
    const float *const column_weights = columns.weights + static_cast<size_t>(x) * columns.most;
    const float *from = map + static_cast<size_t>(rows.first[y]) * width + left;
    float sum = 0;
    // Enlarging has two taps per axis: unrolling further would waste registers.
#pragma unroll 1
    for (int j = 0; j < down; ++j, from += width) {
        float row = 0;
#pragma unroll 2
        for (int i = 0; i < across; ++i) row = fmaf(column_weights[i], from[i], row);
        sum = fmaf(row_weights[j], row, sum);
    }
    return sum;
}

// 255 times a probability, rounded as by confidence_levels of masks.py.
__device__ __forceinline__ unsigned char confidence_level(float probability) {
    return static_cast<unsigned char>(fminf(fmaxf(probability, 0.0f), 1.0f) * 255 + 0.5f);
}

}  // namespace multisa

#define MULTISA_TAPS                                                                                      \
    const int *__restrict__ row_first, const int *__restrict__ row_count, const float *__restrict__ row_weights, \
        int row_most, const int *__restrict__ column_first, const int *__restrict__ column_count,          \
        const float *__restrict__ column_weights, int column_most
#define MULTISA_TAPS_OF_AXES                                               \
    const multisa::Taps rows{row_first, row_count, row_weights, row_most}; \
    const multisa::Taps columns{column_first, column_count, column_weights, column_most};

// A thread: one pixel of one map. maps fp32 [.][height][width]; out [gridDim.y][to_height][to_width], of map
// channels[blockIdx.y], or of map blockIdx.y if `channels` is null.
extern "C" __global__ void __launch_bounds__(256)
maps_resize(const float *__restrict__ maps, const int *__restrict__ channels, MULTISA_TAPS, int height, int width,
            int to_height, int to_width, float *out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, pixels = to_height * to_width;
    if (i >= pixels) return;
    MULTISA_TAPS_OF_AXES
    const size_t channel = channels ? channels[blockIdx.y] : blockIdx.y;
    const float *const map = maps + channel * height * width;
    out[static_cast<size_t>(blockIdx.y) * pixels + i] =
        multisa::resampled(map, width, rows, columns, i / to_width, i % to_width);
}

// One block: the highest of `count` values, or 0 if none is above 0. The order of comparisons does not matter.
extern "C" __global__ void __launch_bounds__(1024) maps_peak(const float *__restrict__ maps, int count, float *peak) {
    __shared__ float highest[32];
    float high = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) high = fmaxf(high, maps[i]);
    for (int lanes = 16; lanes > 0; lanes /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, lanes));
    if (threadIdx.x % 32 == 0) highest[threadIdx.x / 32] = high;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) high = fmaxf(high, highest[warp]);
    *peak = high;
}

// A thread: one pixel of all labels. maps fp32 [count][height][width], enlarged, divided by `peak` (null or 0: not)
// and multiplied by their gains [count] (null: 1); before them the constant `background`; all divided by their sum:
// out [1 + count][to_height][to_width].
extern "C" __global__ void __launch_bounds__(256)
maps_to_probabilities(const float *__restrict__ maps, int count, MULTISA_TAPS, int height, int width, int to_height,
                      int to_width, const float *__restrict__ peak, const float *__restrict__ gains, float background,
                      float *out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, pixels = to_height * to_width;
    if (i >= pixels) return;
    MULTISA_TAPS_OF_AXES
    const float highest = peak ? *peak : 0, factor = highest > 0 ? 1 / highest : 1;
    const size_t plane = static_cast<size_t>(height) * width;
    const int y = i / to_width, x = i % to_width;
    float sum = background;
#pragma unroll 1
    for (int c = 0; c < count; ++c) {
        float value = multisa::resampled(maps + c * plane, width, rows, columns, y, x) * factor;
        if (gains) value *= gains[c];
        out[static_cast<size_t>(c + 1) * pixels + i] = value;
        sum += value;
    }
    const float share = 1 / sum;
    out[i] = background * share;
    for (int c = 1; c <= count; ++c) out[static_cast<size_t>(c) * pixels + i] *= share;
}

// A thread: one pixel. probabilities fp32 [labels][pixels]; mask: ids[label] of the highest, the first of equals;
// confidence: 255 times the highest, rounded. `soft`, unless null, receives the probabilities as fp16.
extern "C" __global__ void __launch_bounds__(256)
labels_argmax(const float *__restrict__ probabilities, const int *__restrict__ ids, int labels, int pixels,
              unsigned char *mask, unsigned char *confidence, __half *soft) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pixels) return;
    float highest = -INFINITY;
    int best = 0;
    for (int l = 0; l < labels; ++l) {
        const size_t at = static_cast<size_t>(l) * pixels + i;
        const float value = probabilities[at];
        if (value > highest) {
            highest = value;
            best = l;
        }
        if (soft) soft[at] = __float2half_rn(value);
    }
    mask[i] = static_cast<unsigned char>(ids[best]);
    confidence[i] = multisa::confidence_level(highest);
}

// One thread: copies the error words of the kernels before it and clears them. Either may be null.
extern "C" __global__ void __launch_bounds__(32)
take_errors(unsigned *walk_error, unsigned *crf_error, unsigned *out) {
    if (threadIdx.x > 0) return;
    out[0] = walk_error ? *walk_error : 0;
    out[1] = crf_error ? *crf_error : 0;
    if (walk_error) *walk_error = 0;
    if (crf_error) *crf_error = 0;
}

#undef MULTISA_TAPS_OF_AXES
#undef MULTISA_TAPS
