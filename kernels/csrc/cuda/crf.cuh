// Mean field of the dense CRF (Kraehenbuehl & Koltun 2011) on lattices that lattice.cuh has built.
//
// A copy is one field of beliefs: images x problems (several label sets of one image). Beliefs and lattice
// values are rows of `lanes` floats, the labels padded to a multiple of four; padding carries zeros.
//   beliefs [copies][pixels][lanes]   values [copies of the lattice][rows][lanes]   unary [copies][labels][pixels]
// The bilateral lattice holds all images of a problem, so its copies are problems; the spatial lattice holds one
// image and has a copy for each image of each problem. The order of sums depends on the data alone.
#pragma once

#include "lattice.cuh"

namespace multisa {

// One touch of a vertex: the point whose belief it adds, and its weight.
struct alignas(8) Entry {
    unsigned point;
    float weight;
};

constexpr int splat_group = 8;      // threads that share a vertex
constexpr int splat_vertices = 32;  // a block
constexpr int hot_entries = 512;    // a vertex of more is worth the whole block

__device__ __forceinline__ void add_scaled(float4 &sum, float weight, const float4 &row) {
    sum.x += weight * row.x;
    sum.y += weight * row.y;
    sum.z += weight * row.z;
    sum.w += weight * row.w;
}

__device__ __forceinline__ float exchange(float value, int distance) {
    return __shfl_xor_sync(0xffffffffu, value, distance);
}

// Sum weighted beliefs over entries begin + first, begin + first + step, ... below end, then over the threads of
// the group that hold the same labels; `quads` (1 or 2) neighbouring threads hold one row. Each exchange halves
// what a thread still has to sum: at the end thread 2 c + q of a group holds component c of quad q.
template <int quads>
__device__ __forceinline__ float gather(const Entry *entries, int begin, int end, int first, int step,
                                        const float4 *beliefs, int row_quads) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int e = begin + first; e < end; e += step) {
        const Entry entry = entries[e];
        add_scaled(sum, entry.weight, beliefs[static_cast<long long>(entry.point) * row_quads]);
    }
    const bool upper = threadIdx.x & 4, odd = threadIdx.x & 2;
    const float even_sum = (upper ? sum.z : sum.x) + exchange(upper ? sum.x : sum.z, 4);
    const float odd_sum = (upper ? sum.w : sum.y) + exchange(upper ? sum.y : sum.w, 4);
    const float component = (odd ? odd_sum : even_sum) + exchange(odd ? even_sum : odd_sum, 2);
    return quads == 1 ? component + exchange(component, 1) : component;
}

// Gather the beliefs at every vertex. A group of threads takes a vertex; a whole block takes one with more than
// hot_entries. blockIdx.y is the copy, blockIdx.z the group of `quads` quads of labels; blocks stride over the
// vertices. partial [splat_vertices * 4 * quads] is shared memory.
template <int quads>
__device__ __forceinline__ void splat(const Entry *entries, const int *starts, const int *vertices,
                                      const float4 *beliefs, int points, int row_quads, float scale, int rows,
                                      float *values, float *partial) {
    constexpr int labels = 4 * quads, slots = splat_group / quads;
    const int group = threadIdx.x / splat_group, member = threadIdx.x % splat_group;
    const int count = *vertices, lanes = 4 * row_quads;
    beliefs += static_cast<long long>(blockIdx.y) * points * row_quads + blockIdx.z * quads + member % quads;
    values += static_cast<long long>(blockIdx.y) * rows * lanes + blockIdx.z * labels;
    const bool holds = quads == 2 || member % 2 == 0;
    const int label = member % quads * 4 + member / 2;
    for (int first = blockIdx.x * splat_vertices; first < count; first += gridDim.x * splat_vertices) {
        const int mine = first + group;
        const int begin = mine < count ? starts[mine] : 0, end = mine < count ? starts[mine + 1] : 0;
        const bool hot = end - begin > hot_entries;
        const float sum = gather<quads>(entries, begin, hot ? begin : end, member / quads, slots, beliefs,
                                        row_quads);
        if (holds && !hot && mine < count) values[static_cast<long long>(mine) * lanes + label] = sum * scale;
        if (!__syncthreads_or(hot)) continue;
        for (int v = first; v < min(first + splat_vertices, count); ++v) {
            if (starts[v + 1] - starts[v] <= hot_entries) continue;
            const float part = gather<quads>(entries, starts[v], starts[v + 1], threadIdx.x / quads,
                                             splat_vertices * slots, beliefs, row_quads);
            if (holds) partial[group * labels + label] = part;
            __syncthreads();
            if (threadIdx.x < labels) {
                float whole = 0.0f;
                for (int g = 0; g < splat_vertices; ++g) whole += partial[g * labels + threadIdx.x];
                values[static_cast<long long>(v) * lanes + threadIdx.x] = whole * scale;
            }
            __syncthreads();  // before the next hot vertex uses the same memory
        }
    }
}

}  // namespace multisa

#define MULTISA_SPLAT_PARAMETERS                                                                             \
    const multisa::Entry *entries, const int *starts, const int *vertices, const float4 *beliefs,            \
        int points, int row_quads, float scale, int rows, float *values

// Splat for rows of four labels. Four blocks per multiprocessor: without this bound, the compiler aims at more
// and spills.
extern "C" __global__ void __launch_bounds__(256, 4) crf_splat_4(MULTISA_SPLAT_PARAMETERS) {
    __shared__ float partial[4 * multisa::splat_vertices];
    multisa::splat<1>(entries, starts, vertices, beliefs, points, row_quads, scale, rows, values, partial);
}

// Splat for rows of a multiple of eight labels, eight at a time: whole 32-byte sectors.
extern "C" __global__ void __launch_bounds__(256, 4) crf_splat_8(MULTISA_SPLAT_PARAMETERS) {
    __shared__ float partial[8 * multisa::splat_vertices];
    multisa::splat<2>(entries, starts, vertices, beliefs, points, row_quads, scale, rows, values, partial);
}
#undef MULTISA_SPLAT_PARAMETERS

// Convolve the values with (1/2, 1, 1/2) along one axis of the lattice. A thread takes four labels of a vertex;
// blockIdx.y is the copy; threads stride over the vertices.
extern "C" __global__ void __launch_bounds__(256)
crf_blur(const int2 *neighbours, const int *vertices, const float4 *values, int rows, int row_quads,
         float4 *blurred) {
    const long long start = static_cast<long long>(blockIdx.y) * rows * row_quads;
    values += start;
    blurred += start;
    const int count = *vertices * row_quads;  // rows * row_quads < 2^30
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const int vertex = i / row_quads, quad = i - vertex * row_quads;
        const int2 sides = neighbours[vertex];
        float4 sum = values[i];
        float4 side = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (sides.x >= 0) side = values[sides.x * row_quads + quad];
        if (sides.y >= 0) multisa::add_scaled(side, 1.0f, values[sides.y * row_quads + quad]);
        multisa::add_scaled(sum, 0.5f, side);
        blurred[i] = sum;
    }
}

// Divide the weights [corners][points] by the root of the filtered ones, whose lattice values are given in rows
// of four equal lanes. Splat and slice together then apply the symmetrically normalised kernel.
extern "C" __global__ void __launch_bounds__(256)
crf_normalise(const int *vertex_of, const float4 *values, int points, int corners, float floor,
              float *weights) {
    const int point = blockIdx.x * blockDim.x + threadIdx.x;
    if (point >= points) return;
    float norm = 0.0f;
    for (int corner = 0; corner < corners; ++corner) {
        const long long at = static_cast<long long>(corner) * points + point;
        norm += weights[at] * values[vertex_of[at]].x;
    }
    const float root = 1.0f / sqrtf(norm + floor);
    for (int corner = 0; corner < corners; ++corner) {
        weights[static_cast<long long>(corner) * points + point] *= root;
    }
}

// List the touches [count] in sorted order, with the weights of slicing. One thread per entry.
extern "C" __global__ void __launch_bounds__(256)
crf_entries(const unsigned *touches, int count, int points, int corners, const float *weights,
            multisa::Entry *entries) {
    const int entry = blockIdx.x * blockDim.x + threadIdx.x;
    if (entry >= count) return;
    const unsigned point = touches[entry] / corners, corner = touches[entry] % corners;
    entries[entry] = {point, weights[static_cast<long long>(corner) * points + point]};
}
