// Before and after the steps of the random walk: the weights and row sums from the affinities, the scores into
// padded planes with their range, and the result from them. walk.cuh describes the layouts.
#pragma once

#include "walk.cuh"

#define MULTISA_WALK_PLANE int height, int width, int rows, int pitch, int halo_y, int halo_x
#define MULTISA_WALK_PLANE_NAMES height, width, rows, pitch, halo_y, halo_x

// A thread: one element of one padded plane (blockIdx.y = image * pairs + pair). affinity is fp32 [images, pairs,
// height, width]; offsets holds (dy, dx) of every pair; `margin` > 0 drops the sources near three borders (psa).
extern "C" __global__ void __launch_bounds__(256)
walk_weights(const float *__restrict__ affinity, const int *__restrict__ offsets, __half *weights, unsigned *errors,
             MULTISA_WALK_PLANE, int pairs, int margin, float beta) {
    const multisa::WalkPlane plane{MULTISA_WALK_PLANE_NAMES};
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= plane.size()) return;
    const int y = i / pitch - halo_y, x = i % pitch - halo_x, pair = blockIdx.y % pairs;
    const int to_y = y + offsets[2 * pair], to_x = x + offsets[2 * pair + 1];
    bool exists = y >= 0 && x >= 0 && x < width && to_y < height && to_x >= 0 && to_x < width;
    if (margin > 0) exists = exists && y < height - margin && x >= margin && x < width - margin;
    float weight = 0;
    if (exists) {
        const float value = affinity[(static_cast<size_t>(blockIdx.y) * height + y) * width + x];
        if (value >= 0 && value <= 1)
            weight = powf(value, beta);
        else
            atomicOr(errors, multisa::bad_affinity);
    }
    weights[static_cast<size_t>(blockIdx.y) * plane.size() + i] = __float2half_rn(weight);
}

// A thread: one element of the padded grid of image blockIdx.y. Sums in double are exact: a sum of fp16 values
// up to 1 has fewer than 53 bits. So both directions of a pair use the same rounded weight.
extern "C" __global__ void __launch_bounds__(256)
walk_row_sums(const __half *__restrict__ weights, const int *__restrict__ offsets, float *inverse, float *centre,
              MULTISA_WALK_PLANE, int pairs) {
    const multisa::WalkPlane plane{MULTISA_WALK_PLANE_NAMES};
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= plane.size()) return;
    const int y = i / pitch - halo_y, x = i % pitch - halo_x;
    float r = 0, c = 0;  // the padding stays zero
    if (y >= 0 && y < height && x >= 0 && x < width) {
        const __half *pair = weights + static_cast<size_t>(blockIdx.y) * pairs * plane.size() + i;
        double sum = 0;
        for (int p = 0; p < pairs; ++p, pair += plane.size()) {
            sum += __half2float(*pair);
            sum += __half2float(pair[-(offsets[2 * p] * pitch + offsets[2 * p + 1])]);
        }
        r = static_cast<float>(1 / (1 + sum));
        c = static_cast<float>(1 - r * sum);
    }
    inverse[static_cast<size_t>(blockIdx.y) * plane.size() + i] = r;
    centre[static_cast<size_t>(blockIdx.y) * plane.size() + i] = c;
}

// A block: one channel of one image, `stored` >= `channels` channels kept for whole groups. Writes
// the padded state and coefficient * state, and [min, max] of the channel.
extern "C" __global__ void __launch_bounds__(256)
walk_start(const float *__restrict__ scores, float *state, float *following, float *total, float2 *range,
           unsigned *errors, MULTISA_WALK_PLANE, int channels, int stored, float coefficient) {
    __shared__ float lowest[8], highest[8];
    const multisa::WalkPlane plane{MULTISA_WALK_PLANE_NAMES};
    const size_t image = blockIdx.x / stored;
    const int channel = blockIdx.x % stored;
    const float *source = scores + (image * channels + channel) * height * width;
    const size_t first = static_cast<size_t>(blockIdx.x) * plane.size();
    float low = INFINITY, high = -INFINITY;
    bool finite = true;
    for (int i = threadIdx.x; i < plane.size(); i += blockDim.x) {
        const int y = i / pitch - halo_y, x = i % pitch - halo_x;
        float value = 0;
        if (channel < channels && y >= 0 && y < height && x >= 0 && x < width) {
            value = source[static_cast<size_t>(y) * width + x];
            finite = finite && isfinite(value);
            low = fminf(low, value);
            high = fmaxf(high, value);
        }
        state[first + i] = value;
        following[first + i] = 0;  // the steps write whole tiles, but not the halo around them
        total[first + i] = coefficient * value;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        low = fminf(low, __shfl_xor_sync(0xffffffffu, low, lanes));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, lanes));
    }
    if (threadIdx.x % 32 == 0) {
        lowest[threadIdx.x / 32] = low;
        highest[threadIdx.x / 32] = high;
    }
    if (!finite) atomicOr(errors, multisa::bad_scores);
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < 8; ++warp) {
        low = fminf(low, lowest[warp]);
        high = fmaxf(high, highest[warp]);
    }
    range[blockIdx.x] = make_float2(low, high);
}

// A thread: one pixel of one channel (blockIdx.y = image * channels + channel). An average never leaves the range
// of its input: clamping removes the last 1e-5 of error, and keeps a constant to the bit.
extern "C" __global__ void __launch_bounds__(256)
walk_finish(const float *__restrict__ result, const float2 *__restrict__ range, float *out, MULTISA_WALK_PLANE,
            int channels, int stored) {
    const multisa::WalkPlane plane{MULTISA_WALK_PLANE_NAMES};
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= height * width) return;
    const size_t kept = static_cast<size_t>(blockIdx.y / channels) * stored + blockIdx.y % channels;
    const float value = result[kept * plane.size() + plane.at(i / width, i % width)];
    out[static_cast<size_t>(blockIdx.y) * height * width + i] = fminf(fmaxf(value, range[kept].x), range[kept].y);
}

#undef MULTISA_WALK_PLANE
#undef MULTISA_WALK_PLANE_NAMES
