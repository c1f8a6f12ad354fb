// The permutohedral lattice (Adams, Baek & Davis 2010) of the pixels of one or more images of one size.
//
// A 64-bit key identifies a vertex: its coordinates less the last, and the image, as digits of a mixed-radix
// number, so that a step along a lattice axis is one addition. Vertices are numbered in the order of the first
// touch (pixel, corner), whatever the order in which threads insert them into the hash table.
//
// Shapes: points = images * height * width; corners = d + 1; touch = point * corners + corner;
// weights and ids [corners][points]; neighbours [corners][capacity]. Arithmetic that decides in which simplex a
// point falls is rounded operation by operation (no fused multiply-add), as on the CPU.
#pragma once

#include "device.cuh"

namespace multisa {

constexpr unsigned long long no_key = ~0ull;  // what filling a table with ones leaves
constexpr int max_probes = 1024;              // a table at most half full stays far below

// Bits of the error word.
constexpr unsigned too_many_vertices = 1, bad_probability = 2, bad_label = 4, bad_channel = 8;

// The hash slot at which the search for a key starts (finalisation of MurmurHash3, public domain).
__device__ __forceinline__ unsigned hash_slot(unsigned long long key, unsigned mask) {
    key ^= key >> 33;
    key *= 0xff51afd7ed558ccdull;
    key ^= key >> 33;
    key *= 0xc4ceb9fe1a85ec53ull;
    key ^= key >> 33;
    return static_cast<unsigned>(key) & mask;
}

// Return the slot of a key, inserting it if it is new; -1 if the table is full.
__device__ inline int insert_key(unsigned long long *table, unsigned mask, unsigned long long key) {
    unsigned slot = hash_slot(key, mask);
    for (int probe = 0; probe < max_probes; ++probe) {
        const unsigned long long found = atomicCAS(&table[slot], no_key, key);
        if (found == no_key || found == key) return static_cast<int>(slot);
        slot = (slot + 1) & mask;
    }
    return -1;
}

// Return the slot of a key in a table that no longer changes; -1 if it is absent.
__device__ inline int find_key(const unsigned long long *table, unsigned mask, unsigned long long key) {
    unsigned slot = hash_slot(key, mask);
    for (int probe = 0; probe < max_probes; ++probe) {
        const unsigned long long found = table[slot];
        if (found == key) return static_cast<int>(slot);
        if (found == no_key) return -1;
        slot = (slot + 1) & mask;
    }
    return -1;
}

// A point's simplex: the key of its remainder-0 corner, the rank of each coordinate, the barycentric weights.
template <int d>
struct Simplex {
    float origin[d + 1];
    int rank[d + 1];
    float weight[d + 1];
};

// Locate a point among the simplices (section 3.1 of the paper). scales [d]: the factors of the elevation.
template <int d>
__device__ __forceinline__ Simplex<d> enclosing_simplex(const float *feature, const float *scales) {
    constexpr int corners = d + 1;
    Simplex<d> simplex;
    float elevated[corners];
    float total = 0.0f;
#pragma unroll
    for (int axis = d; axis > 0; --axis) {
        const float scaled = __fmul_rn(feature[axis - 1], scales[axis - 1]);
        elevated[axis] = __fsub_rn(total, __fmul_rn(static_cast<float>(axis), scaled));
        total = __fadd_rn(total, scaled);
    }
    elevated[0] = total;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < corners; ++i) {
        simplex.origin[i] = rintf(__fmul_rn(elevated[i], 1.0f / corners));
        sum += simplex.origin[i];
    }
    const int excess = static_cast<int>(sum);
    float difference[corners];
#pragma unroll
    for (int i = 0; i < corners; ++i) {
        simplex.origin[i] *= corners;
        difference[i] = __fsub_rn(elevated[i], simplex.origin[i]);
        simplex.rank[i] = excess;
    }
#pragma unroll
    for (int i = 0; i < corners; ++i) {
#pragma unroll
        for (int j = i + 1; j < corners; ++j) {
            const bool less = difference[i] < difference[j];
            simplex.rank[i] += less;
            simplex.rank[j] += !less;
        }
    }
    float ordered[corners];
#pragma unroll
    for (int i = 0; i < corners; ++i) {
        // Rounding can leave the plane of zero sum; this moves the farthest coordinates back.
        const int wrap = simplex.rank[i] < 0 ? 1 : simplex.rank[i] >= corners ? -1 : 0;
        simplex.rank[i] += wrap * corners;
        simplex.origin[i] += static_cast<float>(wrap * corners);
        difference[i] = __fsub_rn(elevated[i], simplex.origin[i]) / corners;
    }
#pragma unroll
    for (int k = 0; k < corners; ++k) {
        // Selection instead of indexing keeps the array in registers.
        ordered[k] = difference[0];
#pragma unroll
        for (int i = 1; i < corners; ++i) ordered[k] = simplex.rank[i] == k ? difference[i] : ordered[k];
    }
    simplex.weight[0] = __fsub_rn(__fadd_rn(1.0f, ordered[d]), ordered[0]);
#pragma unroll
    for (int k = 1; k < corners; ++k) simplex.weight[k] = __fsub_rn(ordered[d - k], ordered[d - k + 1]);
    return simplex;
}

// Insert the corners of every point's simplex. One thread per point. The 32 consecutive points of a warp mostly
// share vertices, so one lane inserts for the others.
//   image    uint8 [images][pixels][3], unused where d = 2
//   numbers  divisors [d], scales [d] of the features x, y, r, g, b
//   codes    strides [d], lowest digits [d], steps [d + 1], stride of the image
template <int d>
__device__ __forceinline__ void insert_points(const unsigned char *image, int points, int pixels, int width,
                                              const float *numbers, const long long *codes,
                                              unsigned long long *table, unsigned mask, unsigned *first,
                                              int *slots, float *weights, unsigned *error) {
    constexpr int corners = d + 1;
    const long long *strides = codes, *lowest = codes + d, image_stride = codes[2 * d + corners];
    const int point = blockIdx.x * blockDim.x + threadIdx.x;
    const int lane = threadIdx.x & 31;
    const bool valid = point < points;
    const int pixel = valid ? point % pixels : 0;
    float feature[d];
    feature[0] = static_cast<float>(pixel % width) / numbers[0];
    feature[1] = static_cast<float>(pixel / width) / numbers[1];
#pragma unroll
    for (int i = 2; i < d; ++i) {
        feature[i] = static_cast<float>(valid ? image[3ll * point + i - 2] : 0) / numbers[i];
    }
    const Simplex<d> simplex = enclosing_simplex<d>(feature, numbers + d);
    if (valid) {
#pragma unroll
        for (int corner = 0; corner < corners; ++corner) {
            weights[static_cast<long long>(corner) * points + point] = simplex.weight[corner];
        }
    }
    long long key = point / pixels * image_stride;
    long long stride_sum = 0;
#pragma unroll
    for (int i = 0; i < d; ++i) {
        key += (static_cast<long long>(simplex.origin[i]) - lowest[i]) * strides[i];
        stride_sum += strides[i];
    }
#pragma unroll 1
    for (int corner = 0; corner < corners; ++corner) {
        if (corner > 0) {
            // Corner k is the origin plus k everywhere, less d + 1 in the k coordinates of highest rank.
            key += stride_sum;
#pragma unroll
            for (int i = 0; i < d; ++i) key -= simplex.rank[i] == corners - corner ? corners * strides[i] : 0;
        }
        const unsigned long long code = valid ? static_cast<unsigned long long>(key) : no_key;
        const unsigned long long left = __shfl_up_sync(0xffffffffu, code, 1);
        const bool leads = lane == 0 || code != left;
        const unsigned leaders = __ballot_sync(0xffffffffu, leads);
        const int touch = point * corners + corner;
        int slot = -1;
        if (leads && valid) {
            slot = insert_key(table, mask, code);
            if (slot >= 0) {
                atomicMin(&first[slot], static_cast<unsigned>(touch));
            } else {
                atomicOr(error, too_many_vertices);
            }
        }
        slot = __shfl_sync(0xffffffffu, slot, 31 - __clz(leaders & ((2u << lane) - 1u)));
        if (valid) slots[touch] = slot;
    }
}

}  // namespace multisa

#define MULTISA_INSERT_PARAMETERS                                                                            \
    const unsigned char *image, int points, int pixels, int width, const float *numbers,                     \
        const long long *codes, unsigned long long *table, unsigned mask, unsigned *first, int *slots,       \
        float *weights, unsigned *error
#define MULTISA_INSERT(d)                                                                                    \
    multisa::insert_points<d>(image, points, pixels, width, numbers, codes, table, mask, first, slots,       \
                              weights, error)

// Four blocks per multiprocessor: without this bound, the compiler aims at more and spills.

// The spatial lattice (x, y). It depends on the size alone; `image` is not read.
extern "C" __global__ void __launch_bounds__(256, 4) lattice_insert_2(MULTISA_INSERT_PARAMETERS) {
    MULTISA_INSERT(2);
}

// The bilateral lattice (x, y, r, g, b).
extern "C" __global__ void __launch_bounds__(256, 4) lattice_insert_5(MULTISA_INSERT_PARAMETERS) {
    MULTISA_INSERT(5);
}
#undef MULTISA_INSERT
#undef MULTISA_INSERT_PARAMETERS

// Mark with 1 the touches [count] that met their vertex first. One thread per touch.
extern "C" __global__ void __launch_bounds__(256)
lattice_mark(const int *slots, const unsigned *first, int count, unsigned *leads) {
    const int touch = blockIdx.x * blockDim.x + threadIdx.x;
    if (touch >= count) return;
    const int slot = slots[touch];
    leads[touch] = slot >= 0 && first[slot] == static_cast<unsigned>(touch);
}

// Number the vertices by `order`, the exclusive sums of the marks: ids [slots], keys [capacity], and their count
// into `vertices`. One thread per touch.
extern "C" __global__ void __launch_bounds__(256)
lattice_number(const int *slots, const unsigned *first, const unsigned *order, int count,
               const unsigned long long *table, const unsigned *total, int capacity, int *ids,
               unsigned long long *keys, int *vertices, unsigned *error) {
    const int touch = blockIdx.x * blockDim.x + threadIdx.x;
    if (touch >= count) return;
    if (touch == 0) {
        const bool fits = *total <= static_cast<unsigned>(capacity);
        *vertices = fits ? static_cast<int>(*total) : capacity;
        if (!fits) atomicOr(error, multisa::too_many_vertices);
    }
    const int slot = slots[touch];
    if (slot < 0 || first[slot] != static_cast<unsigned>(touch)) return;
    const int id = static_cast<int>(order[touch]);
    ids[slot] = id;
    if (id < capacity) keys[id] = table[slot];
}

// Store the vertex id of each touch [points * corners] twice: for slicing, and as the key that sorts touches.
// A touch whose vertex exceeds the capacity gets weight 0 at vertex 0, which keeps every later index in range.
extern "C" __global__ void __launch_bounds__(256)
lattice_assign(const int *slots, const int *ids, int points, int corners, int capacity, int *vertex_of,
               float *weights, unsigned *sort_keys, unsigned *sort_values) {
    const int touch = blockIdx.x * blockDim.x + threadIdx.x;
    if (touch >= points * corners) return;
    const int slot = slots[touch];
    int id = slot < 0 ? capacity : ids[slot];
    const long long at = static_cast<long long>(touch % corners) * points + touch / corners;
    if (id >= capacity) {
        id = 0;
        weights[at] = 0.0f;
    }
    vertex_of[at] = id;
    sort_keys[touch] = static_cast<unsigned>(id);
    sort_values[touch] = static_cast<unsigned>(touch);
}

// Find both neighbours of each vertex along each axis, -1 for none: int2 [corners][capacity]. blockIdx.y is the
// axis; threads stride over the vertices.
extern "C" __global__ void __launch_bounds__(256)
lattice_neighbours(const unsigned long long *keys, const int *vertices, const long long *steps,
                   const unsigned long long *table, unsigned mask, const int *ids, int capacity,
                   int2 *neighbours) {
    const int axis = blockIdx.y, count = *vertices;
    const unsigned long long step = static_cast<unsigned long long>(steps[axis]);
    for (int v = blockIdx.x * blockDim.x + threadIdx.x; v < count; v += gridDim.x * blockDim.x) {
        const int after = multisa::find_key(table, mask, keys[v] + step);
        const int before = multisa::find_key(table, mask, keys[v] - step);
        int2 pair = make_int2(after < 0 ? -1 : ids[after], before < 0 ? -1 : ids[before]);
        if (pair.x >= capacity) pair.x = -1;
        if (pair.y >= capacity) pair.y = -1;
        neighbours[static_cast<long long>(axis) * capacity + v] = pair;
    }
}

// Store where the touches of each vertex start among the sorted ones [count]: starts [vertices + 1].
extern "C" __global__ void __launch_bounds__(256)
lattice_starts(const unsigned *sorted_ids, int count, const int *vertices, int *starts) {
    const int entry = blockIdx.x * blockDim.x + threadIdx.x;
    if (entry >= count) return;
    if (entry == 0 || sorted_ids[entry] != sorted_ids[entry - 1]) starts[sorted_ids[entry]] = entry;
    if (entry == count - 1) starts[*vertices] = count;
}
