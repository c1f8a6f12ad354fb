// Class probabilities of a grid as the labels and confidences of an image: bilinear interpolation and argmax at once.
// The arithmetic is that of csrc/cpu/enlarge.hpp, in the same order.
#pragma once

#include "device.cuh"
#include "label_maps.cuh"

namespace multisa {

// A pixel on one axis: the grid point before it, and the share of the way from there to the next.
struct GridPlace {
    int before;
    float share;
};

// In whole numbers, so that shares are rounded once. Before the first grid point that point is taken; after the
// last there is no next, and its share is of no effect.
__device__ __forceinline__ GridPlace grid_place(int pixel, int points, int pixels) {
    const long long denominator = 2ll * pixels, numerator = (2ll * pixel + 1) * points - pixels;
    if (numerator < 0) return {0, 0};
    // A division of whole numbers would be slow; that of floats is off by one at most on a grid below 2^22.
    const float divisor = static_cast<float>(denominator);
    int before = static_cast<int>(static_cast<float>(numerator) / divisor);
    long long rest = numerator - before * denominator;
    for (; rest < 0; --before) rest += denominator;
    for (; rest >= denominator; ++before) rest -= denominator;
    return {before, static_cast<float>(rest) / divisor};
}

constexpr int enlarge_columns = 32, enlarge_rows = 4;  // of a warp, and of a thread

}  // namespace multisa

// A warp: 32 columns of four rows, which are mostly in one row of cells; a thread loads the corners once for all of its
// pixels there. Blocks go over the image row by row. probabilities fp32 [classes][height][width]; mask: ids[class]
// of the highest, the first of equals; confidence: 255 times the highest, rounded.
extern "C" __global__ void __launch_bounds__(256, 4)
labels_enlarge(const float *__restrict__ probabilities, const int *__restrict__ ids, int classes, int height, int width,
               int to_height, int to_width, unsigned char *mask, unsigned char *confidence) {
    constexpr int rows = multisa::enlarge_rows, columns = multisa::enlarge_columns;
    const int across = (to_width + columns - 1) / columns;
    const int x = blockIdx.x % across * columns + threadIdx.x % columns;
    const int y = (blockIdx.x / across * (blockDim.x / columns) + threadIdx.x / columns) * rows;
    if (x >= to_width || y >= to_height) return;
    const multisa::GridPlace column = multisa::grid_place(x, width, to_width);
    const int right = min(column.before + 1, width - 1) - column.before;
    multisa::GridPlace row[rows];
    float highest[rows];
    int best[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
        row[r] = multisa::grid_place(min(y + r, to_height - 1), height, to_height);
        highest[r] = -1;
        best[r] = 0;
    }
    const size_t plane = static_cast<size_t>(height) * width;
    const float *corner = probabilities + column.before;
#pragma unroll 1
    for (int c = 0; c < classes; ++c, corner += plane) {
        float top_left, top_right, left_growth, right_growth;
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            if (r == 0 || row[r].before != row[r - 1].before) {
                const float *const top = corner + static_cast<size_t>(row[r].before) * width;
                const float *const bottom = row[r].before + 1 < height ? top + width : top;
                top_left = top[0];
                top_right = top[right];
                left_growth = bottom[0] - top_left;
                right_growth = bottom[right] - top_right;
            }
            const float value = fmaf(left_growth, row[r].share, top_left);
            const float slope = fmaf(right_growth, row[r].share, top_right) - value;
            const float probability = fmaf(slope, column.share, value);
            if (probability > highest[r]) {
                highest[r] = probability;
                best[r] = c;
            }
        }
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
        if (y + r >= to_height) break;
        const size_t at = static_cast<size_t>(y + r) * to_width + x;
        mask[at] = static_cast<unsigned char>(ids[best[r]]);
        confidence[at] = multisa::confidence_level(highest[r]);
    }
}
