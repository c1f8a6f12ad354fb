// The pixel side of the mean field: unary energies, and the update that slices both lattices and normalises.
// Shapes and terms are those of crf.cuh. One thread per pixel; blockIdx.y is the copy.
#pragma once

#include "crf.cuh"

namespace multisa {

// The message of one lattice to one pixel of one copy.
struct Sliced {
    const int *vertex_of;  // [corners][points]
    const float *weights;  // [corners][points]
    const float *values;   // [rows][lanes]
    int points, point;
    float compat;
};

// Add the filtered beliefs of the pixel to 4 * quads of its labels, from label `first` on.
template <int corners, int quads>
__device__ __forceinline__ void add_message(const Sliced &lattice, int lanes, int first, float *message) {
#pragma unroll
    for (int corner = 0; corner < corners; ++corner) {
        const long long at = static_cast<long long>(corner) * lattice.points + lattice.point;
        const float weight = lattice.weights[at] * lattice.compat;
        const float *row = lattice.values + static_cast<long long>(lattice.vertex_of[at]) * lanes + first;
#pragma unroll
        for (int q = 0; q < quads; ++q) {
            const float4 four = reinterpret_cast<const float4 *>(row)[q];
            message[4 * q] += weight * four.x;
            message[4 * q + 1] += weight * four.y;
            message[4 * q + 2] += weight * four.z;
            message[4 * q + 3] += weight * four.w;
        }
    }
}

// Both messages; none before the first filtering.
template <int quads>
__device__ __forceinline__ void add_messages(const Sliced &spatial, const Sliced &bilateral, bool filtered,
                                             int lanes, int first, float *message) {
    if (!filtered) return;
    add_message<3, quads>(spatial, lanes, first, message);
    add_message<6, quads>(bilateral, lanes, first, message);
}

// Where the last update writes its result: one plane of `out` per label.
struct Output {
    const int *channels;  // [labels] plane of each label of this copy, -1 for none; null: label l is plane l
    int classes;
    float *planes;  // [classes][pixels] of this copy

    __device__ __forceinline__ void write(int label, int pixels, int pixel, float belief) const {
        const int channel = channels ? channels[label] : label;
        if (channel < 0 || channel >= classes) return;
        planes[static_cast<long long>(channel) * pixels + pixel] = belief;
    }
};

// Labels in registers.
template <int lanes>
__device__ __forceinline__ void update(const Sliced &spatial, const Sliced &bilateral, bool filtered,
                                       const float *unary, int labels, int pixels, int pixel, float *row,
                                       const Output &out) {
    float belief[lanes] = {};
    add_messages<lanes / 4>(spatial, bilateral, filtered, lanes, 0, belief);
    float top = -INFINITY;
#pragma unroll
    for (int l = 0; l < lanes; ++l) {
        belief[l] = l < labels ? belief[l] - unary[static_cast<long long>(l) * pixels + pixel] : -INFINITY;
        top = fmaxf(top, belief[l]);
    }
    float sum = 0.0f;
#pragma unroll
    for (int l = 0; l < lanes; ++l) {
        belief[l] = expf(belief[l] - (top == -INFINITY ? 0.0f : top));
        sum += belief[l];
    }
    const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;  // a copy without labels stays at zero
#pragma unroll
    for (int l = 0; l < lanes; ++l) {
        belief[l] *= scale;
        if (out.planes && l < labels) out.write(l, pixels, pixel, belief[l]);
    }
    if (out.planes) return;
#pragma unroll
    for (int q = 0; q < lanes / 4; ++q) {
        reinterpret_cast<float4 *>(row)[q] =
            make_float4(belief[4 * q], belief[4 * q + 1], belief[4 * q + 2], belief[4 * q + 3]);
    }
}

// Any number of labels: the row of beliefs serves as memory between the passes.
__device__ __forceinline__ void update_any(const Sliced &spatial, const Sliced &bilateral, bool filtered,
                                           const float *unary, int labels, int lanes, int pixels, int pixel,
                                           float *row, const Output &out) {
    float top = -INFINITY;
    for (int first = 0; first < lanes; first += 4) {
        float message[4] = {};
        add_messages<1>(spatial, bilateral, filtered, lanes, first, message);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int l = first + i;
            row[l] = l < labels ? message[i] - unary[static_cast<long long>(l) * pixels + pixel] : -INFINITY;
            top = fmaxf(top, row[l]);
        }
    }
    float sum = 0.0f;
    for (int l = 0; l < lanes; ++l) {
        row[l] = expf(row[l] - (top == -INFINITY ? 0.0f : top));
        sum += row[l];
    }
    const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int l = 0; l < lanes; ++l) {
        row[l] *= scale;
        if (out.planes && l < labels) out.write(l, pixels, pixel, row[l]);
    }
}

}  // namespace multisa

// The arguments of an update, resolved for one pixel. `filtered` is 0 for the first update, which is the
// softmax of the unary; `out` is null except for the last, which writes there instead of `beliefs`.
#define MULTISA_UPDATE_PARAMETERS                                                                            \
    const int *spatial_vertex_of, const float *spatial_weights, const float *spatial_values,                 \
        int spatial_rows, float spatial_compat, const int *bilateral_vertex_of,                              \
        const float *bilateral_weights, const float *bilateral_values, int bilateral_rows,                   \
        float bilateral_compat, int filtered, const float *unaries, int images, int pixels, int labels,      \
        int lanes, float *beliefs, const int *channels, int classes, float *out
#define MULTISA_UPDATE(call)                                                                                 \
    const int pixel = blockIdx.x * blockDim.x + threadIdx.x;                                                 \
    if (pixel >= pixels) return;                                                                             \
    const long long copy = blockIdx.y;                                                                       \
    const int problem = blockIdx.y / images, image = blockIdx.y % images;                                    \
    const multisa::Sliced spatial = {spatial_vertex_of, spatial_weights,                                     \
                                     spatial_values + copy * spatial_rows * lanes, pixels, pixel,            \
                                     spatial_compat};                                                        \
    const multisa::Sliced bilateral = {bilateral_vertex_of, bilateral_weights,                               \
                                       bilateral_values + static_cast<long long>(problem) * bilateral_rows * \
                                                              lanes,                                         \
                                       images * pixels, image * pixels + pixel, bilateral_compat};           \
    const float *unary = unaries + copy * labels * pixels;                                                   \
    float *row = beliefs + (copy * pixels + pixel) * lanes;                                                  \
    const multisa::Output output = {channels ? channels + copy * labels : nullptr, classes,                  \
                                    out ? out + copy * classes * pixels : nullptr};                          \
    call

extern "C" __global__ void __launch_bounds__(128) crf_update_4(MULTISA_UPDATE_PARAMETERS) {
    MULTISA_UPDATE(multisa::update<4>(spatial, bilateral, filtered, unary, labels, pixels, pixel, row, output));
}

extern "C" __global__ void __launch_bounds__(128) crf_update_8(MULTISA_UPDATE_PARAMETERS) {
    MULTISA_UPDATE(multisa::update<8>(spatial, bilateral, filtered, unary, labels, pixels, pixel, row, output));
}

extern "C" __global__ void __launch_bounds__(128) crf_update_16(MULTISA_UPDATE_PARAMETERS) {
    MULTISA_UPDATE(multisa::update<16>(spatial, bilateral, filtered, unary, labels, pixels, pixel, row, output));
}

extern "C" __global__ void __launch_bounds__(128) crf_update_24(MULTISA_UPDATE_PARAMETERS) {
    MULTISA_UPDATE(multisa::update<24>(spatial, bilateral, filtered, unary, labels, pixels, pixel, row, output));
}

extern "C" __global__ void __launch_bounds__(128) crf_update_32(MULTISA_UPDATE_PARAMETERS) {
    MULTISA_UPDATE(multisa::update<32>(spatial, bilateral, filtered, unary, labels, pixels, pixel, row, output));
}

extern "C" __global__ void __launch_bounds__(128) crf_update_any(MULTISA_UPDATE_PARAMETERS) {
    MULTISA_UPDATE(
        multisa::update_any(spatial, bilateral, filtered, unary, labels, lanes, pixels, pixel, row, output));
}
#undef MULTISA_UPDATE
#undef MULTISA_UPDATE_PARAMETERS

// Energies -log of the probabilities [copies][classes][pixels] clipped to [floor, 1]: unaries
// [copies][labels][pixels]. channels [copies][labels] says the class of each label, -1 for none with infinite
// energy; null: label l is class l.
extern "C" __global__ void __launch_bounds__(128)
crf_unary(const float *probabilities, const int *channels, int classes, int labels, int pixels, float floor,
          float *unaries, unsigned *error) {
    const int pixel = blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel >= pixels) return;
    const long long copy = blockIdx.y;
    for (int l = 0; l < labels; ++l) {
        const int channel = channels ? channels[copy * labels + l] : l;
        float energy = INFINITY;
        if (channel >= classes) {
            atomicOr(error, multisa::bad_channel);
        } else if (channel >= 0) {
            const float p = probabilities[(copy * classes + channel) * pixels + pixel];
            if (!isfinite(p)) atomicOr(error, multisa::bad_probability);
            energy = -logf(fminf(fmaxf(p, floor), 1.0f));
        }
        unaries[(copy * labels + l) * pixels + pixel] = energy;
    }
}

// Energies of hard labels [copies][pixels], values below n_labels: one for the given label, one for the
// others. Labels from n_labels on are left out.
extern "C" __global__ void __launch_bounds__(128)
crf_unary_of_labels(const unsigned char *given, int n_labels, float same, float other, int labels, int pixels,
                    float *unaries, unsigned *error) {
    const int pixel = blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel >= pixels) return;
    const long long copy = blockIdx.y;
    const int label = given[copy * pixels + pixel];
    if (label >= n_labels) atomicOr(error, multisa::bad_label);
    for (int l = 0; l < labels; ++l) {
        const float energy = l >= n_labels ? INFINITY : l == label ? same : other;
        unaries[(copy * labels + l) * pixels + pixel] = energy;
    }
}
